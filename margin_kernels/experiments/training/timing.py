"""What a training step costs, as a ratio to a step of another loss."""

from __future__ import annotations

import operator
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..config import Config
from ..data import Dataset
from .trainer import Trainer

TOLERANCE = 0.1  # by which the baseline's ratio to itself may differ from 1


def time_steps(
    baseline: Config, configs: dict[str, Config], dataset: Dataset, repeats: int
) -> dict[str, dict[str, float]]:
    """Milliseconds per training step of each config and the ratio to `baseline`'s, interleaved three by three: a step
    of the baseline, of the config, and of a second network of the baseline, each first in turn.

    ratio = median over repeats of (time of a step) / (time of the baseline's step beside it): what slows the machine
    for a while slows both. `control` is the same ratio of the baseline's second network, 1 on a quiet machine; of the
    baseline itself the one of both ratios that is further from 1. Fresh networks, one fixed batch, three steps of each
    beforehand.
    """
    reference, second = Trainer(baseline, dataset), Trainer(baseline, dataset)
    batch = torch.arange(min(baseline.training.batch_size, len(dataset.train)))
    results = {}
    for name, config in configs.items():
        trainer = Trainer(of_its_own_loss(config), dataset)
        in_turn = (reference, trainer, second)
        for _ in range(3):
            for each in in_turn:
                each.step(batch)
        times: list[list[float]] = [[], [], []]
        for repeat in range(repeats):
            for which in (*range(repeat % 3, 3), *range(repeat % 3)):
                times[which].append(_seconds(in_turn[which], batch))
        base, own, again = times
        control = statistics.median(map(operator.truediv, again, base))
        ratio = statistics.median(map(operator.truediv, own, base))
        if replace(config, name=baseline.name) == baseline:  # one more control
            control = max(control, ratio, key=lambda found: abs(found - 1))
        results[name] = {
            "ms_per_step": 1000 * statistics.median(own),
            "baseline_ms_per_step": 1000 * statistics.median(base),
            "ratio": ratio,
            "control": control,
        }
    return results


def reliable(timing: Mapping[str, float | None]) -> bool:
    """Whether steps of the baseline took the same time in both of its networks, within TOLERANCE. What was timed by an
    earlier version has no control: nothing speaks against it."""
    control = timing.get("control")
    return control is None or abs(control - 1) <= TOLERANCE


def of_its_own_loss(config: Config) -> Config:
    """The config whose steps are of its own loss from the first one on."""
    return replace(config, loss=replace(config.loss, cross_entropy_epochs=0, gamma_unit="absolute"))


def _seconds(trainer: Trainer, batch: Tensor) -> float:
    """Wall clock of one step; Trainer.step reads the loss, so it ends when the device has finished."""
    start = time.perf_counter()
    trainer.step(batch)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - start

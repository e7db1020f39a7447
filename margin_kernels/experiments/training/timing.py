"""What a training step costs, as a ratio to a step of another loss."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor

from ..config import Config
from ..data import Dataset
from .trainer import Trainer


def time_steps(
    baseline: Config, configs: dict[str, Config], dataset: Dataset, repeats: int
) -> dict[str, dict[str, float]]:
    """Milliseconds per training step of each config and the ratio to `baseline`'s, interleaved pair by pair.

    ratio = median over repeats of (time of a step) / (time of the baseline's step just before it): what slows the
    machine for a while slows both. Fresh networks, one fixed batch, three steps of each beforehand.
    """
    reference = Trainer(baseline, dataset)
    batch = torch.arange(min(baseline.training.batch_size, len(dataset.train)))
    results = {}
    for name, config in configs.items():
        trainer = Trainer(of_its_own_loss(config), dataset)
        for _ in range(3):
            reference.step(batch)
            trainer.step(batch)
        pairs = [(_seconds(reference, batch), _seconds(trainer, batch)) for _ in range(repeats)]
        results[name] = {
            "ms_per_step": 1000 * statistics.median(own for _, own in pairs),
            "baseline_ms_per_step": 1000 * statistics.median(base for base, _ in pairs),
            "ratio": statistics.median(own / base for base, own in pairs),
        }
    return results


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

"""What a trained network is worth: accuracy, clean and attacked, and distances to the decision boundary.

accuracy under attack   share of ALL samples that are classified correctly at the attacked image, clipped to [0, 1]
worst                   share of samples that no attack of the table moves over the boundary
deepfool                mean ||r||_2 over correctly classified samples, r the DeepFool perturbation
rho_adv                 mean ||r||_2 / ||x||_2 over the same samples [M]
distance                signed distance d per tap, mean over samples; positive on the right side
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..deepfool import deepfool
from . import attacks
from .config import Config, EvaluationConfig, exponent
from .data import Dataset, Split
from .distance import signed_distance, tap_names
from .training import Trainer, accuracy

METHODS = ("fgsm", "ifgsm")


def evaluate(
    model: nn.Module,
    split: Split,
    hidden: tuple[str, ...],
    config: EvaluationConfig,
    device: torch.device | str = "cpu",
    tick: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """All measurements of `model` on `split` as plain numbers; `hidden` are its hidden taps; `tick` is told the
    share of the work that was just done."""
    attacked = split.head(config.attack_samples)
    result: dict[str, Any] = {"samples": len(split), "clean": accuracy(model, split, device), "eps": config.eps}
    tick(0.02)
    result.update(at_radius(model, attacked, config.eps, config, device))
    tick(0.1)
    result["curve_eps"] = list(config.curve)
    result["curves"] = {f"{method}_{objective}": [] for method in METHODS for objective in attacks.OBJECTIVES}
    for eps in config.curve:
        at_eps = result if eps == config.eps else at_radius(model, attacked, eps, config, device)
        for key, values in result["curves"].items():
            values.append(at_eps[key])
        tick(0.6 / len(config.curve))
    result.update(boundary_norms(model, split.head(config.deepfool_samples), config, device))
    tick(0.2)
    p = exponent(config.distance_p)
    distances = signed_distance(model, split.head(config.distance_samples), hidden, p, config.batch_size, device)
    taps = tap_names(hidden)
    result["distance_p"] = config.distance_p
    result["distance"] = dict(zip(taps, distances.mean(0).tolist(), strict=True))
    # five digits: these only feed histograms
    result["distances"] = {tap: [float(f"{v:.5g}") for v in distances[:, i].tolist()] for i, tap in enumerate(taps)}
    tick(0.08)
    return result


def at_radius(
    model: nn.Module, split: Split, eps: float, config: EvaluationConfig, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Accuracy under each attack of l_inf radius `eps`, under the worst of them, and the fractions of zero
    gradients."""
    names = [f"{method}_{objective}" for method in METHODS for objective in attacks.OBJECTIVES]
    hits = dict.fromkeys([*names, "worst"], 0)
    zeros = dict.fromkeys(attacks.OBJECTIVES, 0.0)
    with attacks.eval_mode(model):
        for x, y in split.batches(config.batch_size, device):
            standing = torch.ones_like(y, dtype=torch.bool)
            for objective in attacks.OBJECTIVES:
                one = attacks.fgsm(model, x, y, eps, objective)
                many = attacks.ifgsm(model, x, y, eps, steps=config.steps, objective=objective)
                zeros[objective] += one.zero_gradient * len(y)
                for method, attack in zip(METHODS, (one, many), strict=True):
                    right = _right(model, attack.images, y)
                    standing &= right
                    hits[f"{method}_{objective}"] += int(right.sum())
            hits["worst"] += int(standing.sum())
    count = len(split)
    shares = {key: value / count for key, value in hits.items()}
    return {**shares, **{f"zero_{objective}": value / count for objective, value in zeros.items()}}


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


def boundary_norms(
    model: nn.Module, split: Split, config: EvaluationConfig, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """DeepFool l2 norms over the correctly classified samples for which it finds the boundary."""
    norms, ratios, missed = [], [], 0
    with attacks.eval_mode(model):
        for x, y in split.batches(config.batch_size, device):
            right = _right(model, x, y)
            x = x[right]
            if len(x) == 0:
                continue
            found = deepfool(model, x, max_iter=config.deepfool_iterations)
            missed += int((~found.success).sum())
            norms.append(found.distance[found.success])
            ratios.append((found.distance / x.flatten(1).norm(dim=1))[found.success])
    norm = float(torch.cat(norms).mean()) if norms else math.nan
    ratio = float(torch.cat(ratios).mean()) if ratios else math.nan
    return {"deepfool": norm, "rho_adv": ratio, "deepfool_missed": missed}


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
        trainer = Trainer(config, dataset)
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


def _seconds(trainer: Trainer, batch: Tensor) -> float:
    """Wall clock of one step; Trainer.step reads the loss, so it ends when the device has finished."""
    start = time.perf_counter()
    trainer.step(batch)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - start

"""What a trained network is worth: accuracy, clean, attacked and under noise, and distances to the decision boundary.

accuracy under attack   share of ALL samples that are classified correctly at the attacked image
black_box               the same at images that were attacked on another network, the attacker
reverse                 accuracy of the attacker at the images that were attacked on this network
noise                   accuracy at clip(x + sigma n), n standard normal
worst                   share of samples that no attack of the table moves over the boundary
saturated               share of the attacked samples with 1 - p_y < 6e-8, where p_y rounds to 1 in fp32
deepfool_norm           mean ||r||_2 over all samples, r the DeepFool perturbation that changes the prediction [A]
deepfool_norm_correct   the same over the correctly classified samples
rho_adv                 mean ||r||_2 / ||x||_2 over the correctly classified samples [M]
distance                signed distance d per tap, mean over samples; positive on the right side
reached                 median of d over the samples with d > 0, in the norm of the network's own margin loss
counts                  how many samples FGSM and IFGSM attacked, and how many had noise

Attacked and noisy images are clipped to [0, 1], whitened ones are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from margin_kernels import deepfool
from margin_kernels.task.auto_gamma import positive_median

from ..config import EvaluationConfig, LossConfig, exponent
from ..data import Split
from ..models import load_model
from . import attacks, histogram
from .distance import signed_distance, tap_names

METHODS = ("fgsm", "ifgsm")
SIDES = ("black_box", "reverse")  # with an attacker: attacked by it, and attacking it


def evaluate(
    model: nn.Module,
    split: Split,
    hidden: tuple[str, ...],
    config: EvaluationConfig,
    device: torch.device | str = "cpu",
    tick: Callable[[float], None] = lambda share: None,
    loss: LossConfig | None = None,
) -> dict[str, Any]:
    """All measurements of `model` on `split` as plain numbers; `hidden` are its hidden taps; `tick` is told the
    share of the work that was just done. `loss`: that of its training, for the distances that gamma asked for."""
    attacked = split.head(config.attack_samples)
    attacker = None if config.attacker is None else load_attacker(Path(config.attacker), split, device)
    result: dict[str, Any] = {"samples": len(split), "clean": accuracy(model, split, device), "eps": config.eps}
    result["counts"] = {"fgsm": len(attacked), "ifgsm": len(attacked.head(config.ifgsm_samples))}
    result["counts"]["noise"] = len(split.head(config.noise_samples))
    tick(0.02)
    result.update(at_radius(model, attacked, config.eps, config, device, attacker))
    tick(0.1)
    result["curve_eps"] = list(config.curve)
    measured = {config.eps: result}
    for eps in config.curve:
        if eps not in measured and eps == 0:  # no attack
            own = _clean(model, attacked, config, device)
            reverse = {} if attacker is None else _clean(attacker, attacked, config, device)
            measured[eps] = {**own, "black_box": own, "reverse": reverse}
        elif eps not in measured:
            measured[eps] = at_radius(model, attacked, eps, config, device, attacker)
        tick(0.6 / len(config.curve))
    names = attack_names(config)
    result["curves"] = {name: [measured[eps][name] for eps in config.curve] for name in names}
    for side in SIDES if attacker is not None else ():
        result[f"{side}_curves"] = {name: [measured[eps][side][name] for eps in config.curve] for name in names}
    if config.noise_sigmas:
        result["noise_sigmas"] = list(config.noise_sigmas)
        result["noise"] = under_noise(model, split.head(config.noise_samples), config, device)
    if config.deepfool_samples:
        result.update(boundary_norms(model, split.head(config.deepfool_samples), config, device))
    tick(0.2)
    result["distance_p"] = config.distance_p
    result["distance"], result["distances"] = {}, {}
    if config.distance_samples:
        p = exponent(config.distance_p)
        distances = signed_distance(model, split.head(config.distance_samples), hidden, p, config.batch_size, device)
        taps = tap_names(hidden)
        result["distance"] = dict(zip(taps, distances.mean(0).tolist(), strict=True))
        result["distances"] = {tap: five_digits(distances[:, i]) for i, tap in enumerate(taps)}
        if loss is not None and loss.kind == "large_margin":
            if exponent(loss.p) != p:
                part = split.head(config.distance_samples)
                distances = signed_distance(model, part, hidden, exponent(loss.p), config.batch_size, device)
            medians = positive_median(distances).tolist()
            result["reached"] = {"p": loss.p, "median": dict(zip(taps, medians, strict=True))}
    tick(0.08)
    return result


def five_digits(values: Tensor) -> list[float]:
    """Per-sample values as a record keeps them: they only feed histograms."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def _attacked(split: Split, config: EvaluationConfig) -> dict[str, Split]:
    """The samples that each method attacks."""
    parts = {"fgsm": split, "ifgsm": split.head(config.ifgsm_samples)}
    return {method: part for method, part in parts.items() if len(part)}


def attack_names(config: EvaluationConfig) -> list[str]:
    """The attacks that are run, METHOD_OBJECTIVE."""
    methods = METHODS if config.ifgsm_samples != 0 else METHODS[:1]
    return [f"{method}_{objective}" for method in methods for objective in attacks.OBJECTIVES]


def at_radius(
    model: nn.Module,
    split: Split,
    eps: float,
    config: EvaluationConfig,
    device: torch.device | str = "cpu",
    attacker: nn.Module | None = None,
) -> dict[str, Any]:
    """Accuracy under each attack of l_inf radius `eps`, under the worst of them (over the samples that all of them
    attack), the shares of zero gradients and of saturated images; with an `attacker` also "black_box", the accuracy at
    the attacker's images, and "reverse", that of the attacker at the images made here, each by attack."""
    judges = [model] if attacker is None else [model, attacker]
    (standing, *reverse), zeros, saturated = _standing(model, judges, split, eps, config, device)
    common = min(len(values) for values in standing.values())
    worst = torch.stack([values[:common] for values in standing.values()]).all(0)
    result: dict[str, Any] = _shares({**standing, "worst": worst})
    result |= {f"zero_{objective}": value for objective, value in zeros.items()}
    result["saturated"] = saturated
    if attacker is not None:
        (black_box,), _, _ = _standing(attacker, [model], split, eps, config, device)
        result |= {"black_box": _shares(black_box), "reverse": _shares(reverse[0])}
    return result


def _clean(model: nn.Module, split: Split, config: EvaluationConfig, device: torch.device | str) -> dict[str, float]:
    """Accuracy on the clean images of each attack, which are not the whole split."""
    clean = {method: accuracy(model, part, device) for method, part in _attacked(split, config).items()}
    return {name: clean[name.split("_")[0]] for name in attack_names(config)}


def _standing(
    maker: nn.Module,
    judges: list[nn.Module],
    split: Split,
    eps: float,
    config: EvaluationConfig,
    device: torch.device | str,
) -> tuple[list[dict[str, Tensor]], dict[str, float], float]:
    """For each judge which of the images attacked on `maker` it classifies correctly (bool [N] by attack), the shares
    of the maker's zero gradients, and the share of images with 1 - p_y < 6e-8."""
    right: list[dict[str, list[Tensor]]] = [{name: [] for name in attack_names(config)} for _ in judges]
    zeros = dict.fromkeys(attacks.OBJECTIVES, 0.0)
    saturated = 0.0
    with attacks.eval_mode(nn.ModuleList([maker, *judges])):
        for method, part in _attacked(split, config).items():
            for x, y in part.batches(config.batch_size, device):
                for objective in attacks.OBJECTIVES:
                    if method == "fgsm":
                        attack = attacks.fgsm(maker, x, y, eps, objective, part.bounds)
                        zeros[objective] += attack.zero_gradient * len(y)
                        saturated += attack.saturated * len(y) / len(attacks.OBJECTIVES)
                    else:
                        attack = attacks.ifgsm(maker, x, y, eps, None, config.steps, objective, part.bounds)
                    for judge, found in zip(judges, right, strict=True):
                        found[f"{method}_{objective}"].append(_right(judge, attack.images, y))
    standing = [{name: torch.cat(parts) for name, parts in found.items()} for found in right]
    return standing, {objective: value / len(split) for objective, value in zeros.items()}, saturated / len(split)


def under_noise(
    model: nn.Module, split: Split, config: EvaluationConfig, device: torch.device | str = "cpu"
) -> list[float]:
    """Accuracy at clip(x + sigma n) for each sigma; n is drawn once from the seed, on the CPU, and scaled: the same
    noise for every model, sigma, batch size and device. Raises ValueError for a negative sigma."""
    if any(not sigma >= 0 for sigma in config.noise_sigmas):
        raise ValueError(f"evaluation.noise_sigmas must be numbers >= 0, got {config.noise_sigmas}")
    generator = torch.Generator().manual_seed(config.noise_seed)
    noise = torch.randn(split.images.shape, generator=generator)
    hits = [0] * len(config.noise_sigmas)
    with attacks.eval_mode(model):
        parts = zip(split.batches(config.batch_size, device), noise.split(config.batch_size), strict=True)
        for (x, y), drawn in parts:
            for i, sigma in enumerate(config.noise_sigmas):
                noisy = (x + sigma * drawn.to(device)).clamp(*split.bounds)
                hits[i] += int(_right(model, noisy, y).sum())
    return [hit / len(split) for hit in hits]


def load_attacker(folder: Path, split: Split, device: torch.device | str = "cpu") -> nn.Module:
    """The network of evaluation.attacker. Raises CheckpointError where the folder holds none, ValueError where it
    takes other images."""
    model, description = load_model(folder)
    check_images(folder, description, split, "evaluation.attacker")
    return model.to(device)


def check_images(folder: Path, description: dict[str, Any], split: Split, where: str) -> None:
    """Raises ValueError where the network of a run takes other images than those of `split`."""
    preprocess = description.get("preprocess", "none")
    if preprocess != split.preprocess:
        raise ValueError(
            f"{where}: the network of {folder} takes images with data.preprocess {preprocess!r}, these have "
            f"{split.preprocess!r}"
        )
    if tuple(description["shape"]) != tuple(split.images.shape[1:]):
        raise ValueError(
            f"{where}: the network of {folder} takes images of shape {description['shape']}, these are "
            f"{list(split.images.shape[1:])}"
        )


def _shares(standing: dict[str, Tensor]) -> dict[str, float]:
    return {name: _share(values) for name, values in standing.items()}


def _share(values: Tensor) -> float:
    return int(values.sum()) / len(values)


def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x).argmax(1) == y


def boundary_norms(
    model: nn.Module, split: Split, config: EvaluationConfig, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """DeepFool l2 norms, over the samples for which it finds the boundary.

    Returns:
        deepfool_norm: mean over all of them
        deepfool_norm_correct: mean over those classified correctly; rho_adv the same of the relative norms
        deepfool_missed: number of samples without a boundary
        deepfool_norms: the norm of each sample, negative where it is misclassified (NaN where missed)
        histograms: counts of these and of the relative norms (histogram.py)
    """
    norms, ratios = [], []
    with attacks.eval_mode(model):
        for x, y in split.batches(config.batch_size, device):
            side = torch.where(_right(model, x, y), 1.0, -1.0)
            found = deepfool(model, x, max_iter=config.deepfool_iterations, step_limit=config.deepfool_step_limit)
            norms.append(side * found.distance.masked_fill(~found.success, math.nan))
            ratios.append(norms[-1] / x.flatten(1).norm(dim=1))
    margins, relative = torch.cat(norms).cpu(), torch.cat(ratios).cpu()
    right = margins > 0
    return {
        "deepfool_norm": float(margins.abs().nanmean()),
        "deepfool_norm_correct": float(margins[right].mean()),
        "rho_adv": float(relative[right].mean()),
        "deepfool_missed": int(margins.isnan().sum()),
        "deepfool_norms": five_digits(margins),
        "histograms": {
            "deepfool_norm": histogram.counts(margins.tolist(), "deepfool_norm"),
            "rho_adv": histogram.counts(relative.tolist(), "rho_adv"),
        },
    }


def accuracy(model: nn.Module, split: Split, device: torch.device | str = "cpu", batch_size: int = 1000) -> float:
    """Share of `split` whose largest logit is the label, in eval mode."""
    return hits(model, split, device, batch_size) / len(split)


def hits(model: nn.Module, split: Split, device: torch.device | str = "cpu", batch_size: int = 1000) -> int:
    """Number of samples of `split` whose largest logit is the label, in eval mode."""
    found = 0
    with attacks.eval_mode(model), torch.no_grad():
        for x, y in split.batches(batch_size, device):
            found += int((model(x).argmax(1) == y).sum())
    return found

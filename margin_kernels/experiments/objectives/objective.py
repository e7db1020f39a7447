"""What is minimised: one module per run that maps a batch to its loss and logits, chosen by name.

    cross_entropy        mean_n logsumexp_i z_ni - z_ny
    hinge                mean_n max(0, 1 + max_{j != y} z_nj - z_ny)        the multi-class hinge of [M]
    squared_hinge        mean_n [delta - z_ny]_+^2 + sum_{c != y} [delta + z_nc]_+^2        the baseline of [R]
    large_margin         LargeMarginLoss over named taps [E]
    margin_sensitivity   MarginSensitivityLoss at the input [M]
    adversarial_margin   AdversarialMarginLoss: DeepFool distances [Y] [A]
    one_to_n             OneToNLoss [R]
    fgsm_training        1/2 CE(x) + 1/2 CE(x'), x' = x attacked by FGSM or PGD          adversarial training
    vat                  CE(x) + weight KL(p(x) || p(x + r))        virtual adversarial training (Miyato et al.)

A new loss is one entry of OBJECTIVES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import margin_kernels as mk

from ..config import AdversarialTrainingConfig, LossConfig, VirtualAdversarialConfig, exponent
from ..evaluation import attacks, logit_gap


def hinge(logits: Tensor, target: Tensor) -> Tensor:
    """Multi-class hinge: logits [N, C], target [N] -> mean over n of max(0, 1 + max_{j != y} z_j - z_y)."""
    return F.relu(1 + logit_gap(logits, target)).mean()


def squared_hinge(logits: Tensor, target: Tensor, delta: float) -> Tensor:
    """One-against-all squared hinge: logits [N, C], target [N] -> mean over n of [delta - z_y]_+^2 + sum over c != y of
    [delta + z_c]_+^2 ([R] eq. 10, lambda = 0)."""
    sign = 1 - 2 * F.one_hot(target, logits.shape[1]).to(logits.dtype)
    return F.relu(delta + sign * logits).square().sum(1).mean()


class LogitTask(nn.Module):
    """A loss of the logits alone, with the interface of MarginTask: task(x [N, *], y [N]) -> {"loss": scalar,
    "output": [N, C]}."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        logits = self.model(x)
        return {"loss": self.loss(logits.float(), target), "output": logits.detach()}


class AdversarialTrainingTask(nn.Module):
    """loss = 1/2 CE(x) + 1/2 CE(x'), both in the model's own mode; x' maximises CE within eps of x, clipped to
    `bounds`, by the gradient of the label's log-odds, which has the direction of CE's and does not vanish.

    The attack runs in eval mode, so that it meets the network that will be attacked: dropout masks are off and batch
    norm's running statistics see no attack iterates, only x and x' once each. x' is a constant of the backward pass.
    """

    def __init__(self, model: nn.Module, config: AdversarialTrainingConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.bounds = (0.0, 1.0)

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        eps, steps, alpha = self.config.eps, self.config.steps, self.config.alpha
        if steps == 1:
            attack = attacks.fgsm(self.model, x, target, eps, bounds=self.bounds)
        else:
            attack = attacks.pgd(self.model, x, target, eps, alpha, steps, "ce", self.bounds)
        logits = self.model(x)
        attacked = self.model(attack.images)
        loss = 0.5 * (F.cross_entropy(logits.float(), target) + F.cross_entropy(attacked.float(), target))
        return {"loss": loss, "output": logits.detach()}


class VirtualAdversarialTask(nn.Module):
    """loss = CE(x) + weight mean_n KL(p(x_n) || p(x_n + r_n)) with p(x) a constant (Miyato, Maeda, Koyama, Ishii, TPAMI
    2019, eq. 5 and 8, and algorithm 1).

        d ~ N(0, 1) per pixel;   `iterations` times: d <- grad_v KL(p(x) || p(x + v)) at v = xi d / ||d||_2
        r = eps d / ||d||_2, l2 over all pixels of an image; not clipped

    Labels play no part in r. As in AdversarialTrainingTask the search for r runs in eval mode: no dropout masks, no
    batch norm statistics of its iterates; x and x + r then pass once each in the model's own mode. Where the divergence
    has no gradient (a saturated softmax) r is 0.
    """

    def __init__(self, model: nn.Module, config: VirtualAdversarialConfig) -> None:
        super().__init__()
        if config.iterations < 1:
            raise ValueError(f"loss.virtual_adversarial.iterations must be at least 1, got {config.iterations}")
        for name in ("eps", "xi"):
            if not getattr(config, name) > 0:
                raise ValueError(f"loss.virtual_adversarial.{name} must be above 0, got {getattr(config, name)}")
        self.model = model
        self.config = config

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        moved = x + self.config.eps * self.direction(x)
        logits = self.model(x)
        divergence = kl_divergence(logits.detach(), self.model(moved))
        loss = F.cross_entropy(logits, target) + self.config.weight * divergence / len(x)
        return {"loss": loss, "output": logits.detach()}

    def direction(self, x: Tensor) -> Tensor:
        """d / ||d||_2 per image: x [N, *] -> [N, *], no graph."""
        with attacks.eval_mode(self.model):
            with torch.no_grad():
                logits = self.model(x)
            direction = unit(torch.randn_like(x))
            for _ in range(self.config.iterations):
                with torch.enable_grad():
                    step = (self.config.xi * direction).requires_grad_()
                    divergence = kl_divergence(logits, self.model(x + step))
                    direction = unit(torch.autograd.grad(divergence, step)[0])
        return direction


def kl_divergence(logits: Tensor, other: Tensor) -> Tensor:
    """Sum over n of KL(softmax(logits_n) || softmax(other_n)); logits, other [N, C]; fp32 also under autocast."""
    return F.kl_div(other.log_softmax(1), logits.log_softmax(1), reduction="sum", log_target=True)


def unit(v: Tensor) -> Tensor:
    """v / ||v||_2 per sample, [N, *], 0 where v is 0. Divided by the largest entry first: squares of the gradients of
    nearly saturated networks underflow."""
    flat = v.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    return F.normalize(flat, dim=1).view_as(v)


def layers(names: list[str], hidden: tuple[str, ...]) -> tuple[str, ...]:
    """Tap names with `hidden` replaced by the network's hidden layers."""
    return tuple(tap for name in names for tap in (hidden if name == "hidden" else (name,)))


def per_tap(values: float | str | list[float] | None, config: LossConfig, taps: tuple[str, ...]) -> Any:
    """gamma or layer weights for the loss: where there is one for each of config.layers, that of `hidden` counts for
    every hidden tap; anything else as it is."""
    if not isinstance(values, list) or len(values) != len(config.layers):
        return values
    spread = len(taps) - len(config.layers) + 1  # taps that `hidden` stands for
    repeats = (spread if name == "hidden" else 1 for name in config.layers)
    return [value for value, times in zip(values, repeats, strict=True) for _ in range(times)]


def in_medians(config: LossConfig, taps: tuple[str, ...], medians: list[float]) -> dict[str, list[float]]:
    """gamma and layer_weights of gamma_unit "median": factor * median, and weight / gamma; four digits."""

    def spread(values: Any) -> list[float]:
        found = per_tap(values, config, taps)
        return found if isinstance(found, list) else [found] * len(taps)

    gamma = [factor * median for factor, median in zip(spread(config.gamma), medians, strict=True)]
    weights = [weight / value for weight, value in zip(spread(config.layer_weights or 1.0), gamma, strict=True)]
    return {key: [float(f"{v:.4g}") for v in found] for key, found in (("gamma", gamma), ("layer_weights", weights))}


def _cross_entropy(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    return LogitTask(model, F.cross_entropy)


def _hinge(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    return LogitTask(model, hinge)


def _squared_hinge(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    return LogitTask(model, partial(squared_hinge, delta=config.one_to_n.delta))


def _margin_sensitivity(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    loss = mk.MarginSensitivityLoss(**dataclasses.asdict(config.sensitivity))
    return mk.MarginTask(model, loss, layers=("input",), passes=config.passes, batchnorm=config.batchnorm)


def _one_to_n(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    options = dataclasses.asdict(config.one_to_n)
    head = getattr(model, "head", None)
    if options["weight_norm"] and not isinstance(head, nn.Linear):
        raise ValueError("loss.one_to_n.weight_norm needs a network whose logits come from a linear layer `head`")
    options["weight_norm"] = head if options["weight_norm"] else None
    return mk.MarginTask(model, mk.OneToNLoss(**options))


def _fgsm_training(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    return AdversarialTrainingTask(model, config.adversarial_training)


def _vat(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    return VirtualAdversarialTask(model, config.virtual_adversarial)


def _large_margin(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    if config.gamma_unit != "absolute":
        raise ValueError(f"loss.gamma_unit is {config.gamma_unit!r}, which only a training run can measure")
    loss = mk.LargeMarginLoss(
        gamma=per_tap(config.gamma, config, taps),
        p=exponent(config.p),
        top_k=config.top_k,
        aggregation=config.aggregation,
        alpha=config.alpha,
        eps=config.eps,
        layer_weights=per_tap(config.layer_weights, config, taps),
        layer_reduction=config.layer_reduction,
        layer_scale=config.layer_scale,
        space=config.space,
        second_order=config.second_order,
        margin_weight=config.margin_weight,
        cross_entropy_weight=config.cross_entropy_weight,
        auxiliary=config.auxiliary,
        competitors=config.competitors,
        soft_shift=config.soft_shift,
        label_smoothing=config.label_smoothing,
        gamma_factor=config.gamma_factor,
        warmup=config.warmup,
    )
    return mk.MarginTask(model, loss, layers=taps, passes=config.passes, batchnorm=config.batchnorm)


def _adversarial_margin(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    options = dataclasses.asdict(config.adversarial)
    return mk.MarginTask(model, mk.AdversarialMarginLoss(**options))


OBJECTIVES: dict[str, Callable[[nn.Module, LossConfig, tuple[str, ...]], nn.Module]] = {
    "cross_entropy": _cross_entropy,
    "hinge": _hinge,
    "large_margin": _large_margin,
    "squared_hinge": _squared_hinge,
    "margin_sensitivity": _margin_sensitivity,
    "adversarial_margin": _adversarial_margin,
    "one_to_n": _one_to_n,
    "fgsm_training": _fgsm_training,
    "vat": _vat,
}


def of_the_whole_batch(task: nn.Module) -> bool:
    """Prepares a task for parts of a batch, one on each of several processes, of any size and also none. Whether its
    loss is then that of the whole batch, when the processes average; else it is the mean over the part."""
    if isinstance(task, mk.MarginTask):
        task.loss.process_group = "world"
        return True
    return False


def build(
    model: nn.Module, config: LossConfig, hidden: tuple[str, ...], bounds: tuple[float, float] = (0.0, 1.0)
) -> nn.Module:
    """The module to train: task(x, y) -> dict with "loss" and "output"; it owns `model`. `hidden`: the network's
    hidden taps; `bounds`: what attacked images are clipped to."""
    if config.kind not in OBJECTIVES:
        raise ValueError(f"loss.kind must be one of {', '.join(OBJECTIVES)}, got {config.kind!r}")
    task = OBJECTIVES[config.kind](model, config, layers(config.layers, hidden))
    if isinstance(task, AdversarialTrainingTask):
        task.bounds = bounds
    return task

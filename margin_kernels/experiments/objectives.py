"""What is minimised: one module per run that maps a batch to its loss and logits, chosen by name.

    cross_entropy        mean_n logsumexp_i z_ni - z_ny
    hinge                mean_n max(0, 1 + max_{j != y} z_nj - z_ny)        the multi-class hinge of [M]
    squared_hinge        mean_n [delta - z_ny]_+^2 + sum_{c != y} [delta + z_nc]_+^2        the baseline of [N]
    large_margin         LargeMarginLoss over named taps [E]
    margin_sensitivity   MarginSensitivityLoss at the input [M]
    adversarial_margin   AdversarialMarginLoss: DeepFool distances [D] [A]
    one_to_n             OneToNLoss [N]
    fgsm_training        1/2 CE(x) + 1/2 CE(x'), x' = x attacked by FGSM or PGD          adversarial training

A new loss is one entry of OBJECTIVES.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

import margin_kernels as mk

from . import attacks
from .attacks import logit_gap
from .config import AdversarialTrainingConfig, LossConfig, exponent


def hinge(logits: Tensor, target: Tensor) -> Tensor:
    """Multi-class hinge: logits [N, C], target [N] -> mean over n of max(0, 1 + max_{j != y} z_j - z_y)."""
    return F.relu(1 + logit_gap(logits, target)).mean()


def squared_hinge(logits: Tensor, target: Tensor, delta: float) -> Tensor:
    """One-against-all squared hinge: logits [N, C], target [N] -> mean over n of [delta - z_y]_+^2 + sum over c != y of
    [delta + z_c]_+^2 ([N] eq. 10, lambda = 0)."""
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
    """loss = 1/2 CE(x) + 1/2 CE(x'), both in the model's own mode; x' maximises CE within eps of x, clipped to [0, 1].

    The attack runs in eval mode, so that it meets the network that will be attacked: dropout masks are off and batch
    norm's running statistics see no attack iterates, only x and x' once each. x' is a constant of the backward pass.
    """

    def __init__(self, model: nn.Module, config: AdversarialTrainingConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config

    def forward(self, x: Tensor, target: Tensor) -> dict[str, Tensor]:
        eps, steps, alpha = self.config.eps, self.config.steps, self.config.alpha
        if steps == 1:
            attack = attacks.fgsm(self.model, x, target, eps)
        else:
            attack = attacks.pgd(self.model, x, target, eps, alpha, steps, objective="ce")
        logits = self.model(x)
        attacked = self.model(attack.images)
        loss = 0.5 * (F.cross_entropy(logits.float(), target) + F.cross_entropy(attacked.float(), target))
        return {"loss": loss, "output": logits.detach()}


def layers(names: list[str], hidden: tuple[str, ...]) -> tuple[str, ...]:
    """Tap names with `hidden` replaced by the network's hidden layers."""
    return tuple(tap for name in names for tap in (hidden if name == "hidden" else (name,)))


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


def _large_margin(model: nn.Module, config: LossConfig, taps: tuple[str, ...]) -> nn.Module:
    loss = mk.LargeMarginLoss(
        gamma=config.gamma,
        p=exponent(config.p),
        top_k=config.top_k,
        aggregation=config.aggregation,
        alpha=config.alpha,
        eps=config.eps,
        layer_weights=config.layer_weights,
        layer_reduction=config.layer_reduction,
        layer_scale=config.layer_scale,
        space=config.space,
        second_order=config.second_order,
        margin_weight=config.margin_weight,
        cross_entropy_weight=config.cross_entropy_weight,
        auxiliary=config.auxiliary,
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
}


def build(model: nn.Module, config: LossConfig, hidden: tuple[str, ...]) -> nn.Module:
    """The module to train: task(x, y) -> dict with "loss" and "output"; it owns `model`. `hidden`: the network's
    hidden taps."""
    if config.kind not in OBJECTIVES:
        raise ValueError(f"loss.kind is {config.kind!r}; allowed: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[config.kind](model, config, layers(config.layers, hidden))

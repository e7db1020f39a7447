"""Margin sensitivity: classification loss + weight * max over j != y of || grad_h (z_y - z_j) ||_q ** power."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..backends import BACKENDS
from ..deprecation import former, renamed
from ..gradients.choose import choose
from ..gradients.request import Captured, Request
from .base import (
    COMPETITORS,
    NOTHING,
    REDUCTIONS,
    TapLoss,
    count,
    exponent,
    group_exists,
    non_negative,
    number,
    one_of,
    optional,
)

CLASSIFICATIONS = ("hinge", "cross_entropy")
# How the norm is differentiated, as the passes that do it.
GRADIENTS = {"auto": None, "tangent": "split", "double_backward": "loop"}


class SensitivityMargins(NamedTuple):
    """What one evaluation of MarginSensitivityLoss shows; everything but `loss` is detached.

    loss [] or [N];  classification [N], the hinge or the cross-entropy;  nll [N], the cross-entropy;
    gap [N], of the strongest competitor;
    norm [N], || d (z_y - z_j) / d h ||_q;  competitor [N], the j where it is largest
    """

    loss: Tensor
    classification: Tensor
    nll: Tensor
    gap: Tensor
    norm: Tensor
    competitor: Tensor


class MarginSensitivityLoss(TapLoss):
    """Margin sensitivity: a classification loss and the norm of the gradient by which the margin can be changed.

        gap[n]   = max over j != y_n of z[n,j] - z[n,y_n]
        hinge[n] = max(0, 1 + gap[n])                          or cross-entropy
        S[n]     = max over j != y_n of || d (z[n,y_n] - z[n,j]) / d h[n] ||_q ** power        q = p / (p - 1)
        loss[n]  = hinge[n] + weight * S[n]

    h is one tap: in MarginTask the input unless `layers` names another. The competitor j of S is chosen without a
    graph, by one activation-only backward pass for each. Then the chosen pair alone is differentiated, exactly (second
    order). So every layer must be twice differentiable (attention:
    torch.nn.attention.sdpa_kernel(SDPBackend.MATH)).

    One logit f, [N,1] or [N], with targets -1 and +1: S = || d f / d h ||_q ** power, gap = -y f, and cross-entropy is
    softplus(-y f).

    Args:
        weight: factor of S, finite, >= 0.
        p: norm in which the margin is measured, in [1, inf]; float("inf") or "inf". S has the dual norm: p = 2 is the
            l2 norm of the gradient, p = inf its l1 norm.
        power: of the norm, finite, >= 1. Where the norm is 0 its derivative counts as 0.
        classification: "hinge" or "cross_entropy". The hinge fails where no label has half of the probability, as with
            60 % of wrong labels; cross-entropy does not.
        top_k: competitors among which j is chosen, those with the largest logits, 1 <= top_k <= C - 1; None: all C - 1.
            1 takes the strongest competitor and needs no passes for the choice.
        gradient: how the norm is differentiated in the parameters. "tangent": by one tangent pass, 4 F in all, exact in
            piecewise-linear networks with the hinge and top_k=1 (gradients/tangent.py), in MarginTask; the loss
            is then connected to the parameters alone. "double_backward": 6 F, any network. "auto": as `passes` says, in
            MarginTask by default a tangent where that is exact.
        reduction: "mean", "sum" or "none" over samples.
        backend: "auto" or a backend of margin_kernels.backends, for all ops.
        process_group: None: the loss of this process's batch. "world", a ProcessGroup or a DeviceMesh of one dimension:
            each process has a part of one batch, of any size and also none; the mean over the processes of the loss,
            which DistributedDataParallel and fully_shard differentiate, is that of the whole batch.

    Raises:
        ValueError, TypeError: naming the argument, its value, and what is allowed; more than one tap; a tangent that
            would not be exact, with the operation that it fails at.

    A NaN or infinite logit makes the loss of its sample NaN. Equal norms: the stronger competitor is differentiated.
    Source: Matyasko, Chau. Margin Maximization for Robust Classification using Deep Learning. IJCNN 2017, eq. 14, 18
    and 19; `power` and `weight` of the presets are those of the authors' code.
    """

    second_order = True
    shown = ("weight", "p", "power")
    checks: ClassVar = {
        "weight": non_negative,
        "p": exponent,
        "power": lambda name, value: number(name, value, least=1),
        "classification": one_of(*CLASSIFICATIONS),
        "top_k": optional(lambda name, value: count(name, value, COMPETITORS)),
        "gradient": one_of(*GRADIENTS),
        "reduction": one_of(*REDUCTIONS),
        "backend": one_of("auto", *BACKENDS),
        "process_group": group_exists,
    }

    candidates = former("candidates", "top_k")

    @renamed("candidates", "top_k")
    def __init__(
        self,
        weight: float = 0.1,
        p: float | str = 2,
        power: float = 2,
        classification: str = "hinge",
        top_k: int | None = None,
        gradient: str = "auto",
        reduction: str = "mean",
        backend: str = "auto",
        process_group: Any = None,
    ) -> None:
        super().__init__()
        self.keep(locals())

    def passes(self, asked: str) -> str:
        return GRADIENTS[self.gradient] or asked

    def request(self, classes: int) -> Request:
        """What this loss asks of a forward pass with so many classes."""
        outside = None
        if classes < 2 or self.classification != "hinge" or (self.top_k != 1 and classes > 2):
            outside = 'it takes more than one logit, classification="hinge" and top_k=1'
        return Request(self.p, second_order=True, outside=outside, backend=self.backend)

    def count(self, logits: Tensor) -> int:
        """Backward passes of one step: of the choice, and of the chosen pair."""
        choices = 1 if _is_binary(logits) else self.top_k or logits.shape[1] - 1
        return choices + (choices > 1)

    def statistics(
        self, logits: Tensor, target: Tensor, captured: Captured, passes: str = "loop", **how: Any
    ) -> SensitivityMargins:
        """The loss and all that it measured on the way.

        Args:
            logits: [N,C], from which the classification loss is taken
            target: [N] int64, values in [0, C)
            captured: the forward pass whose tap is measured; its logits may differ from `logits` (frozen batch norm)
            passes: as `passes` of MarginTask; what `gradient` says goes before it
            **how: arguments of margin_kernels.gradients.choose
        """
        if len(captured.taps) != 1:
            names = ", ".join(tap.name for tap in captured.taps)
            raise ValueError(f"MarginSensitivityLoss measures at one tap, got {len(captured.taps)}: {names}")
        if self.gradient != "auto":
            how["asked"] = f'gradient="{self.gradient}"'
        passes = self.passes(passes)
        classes = 1 if _is_binary(logits) else logits.shape[-1]
        gradients = choose(passes, self.request(classes), captured, logits, **how)
        source = gradients.logits
        competitors, gap, nll = self._gaps(source, target)
        if classes == 1:
            norm, competitor = gradients.logit_norms().squeeze(1), competitors.squeeze(1)
        else:
            # On a GPU a target outside [0, C) makes gap and nll NaN; clamped, it is also safe to index with.
            label = target.clamp(0, logits.shape[1] - 1)
            if competitors.shape[1] > 1:  # the one with the largest norm, of equal ones the first
                widest = gradients.measured(label, competitors).squeeze(-1).argmax(1, keepdim=True)
                competitors = competitors.gather(1, widest)
            norm, competitor = gradients.norms(label, competitors)[:, 0, 0], competitors.squeeze(1)
        classification = self._classification(gap, nll)
        loss = self.reduced(classification + self.weight * norm.pow(self.power))
        loss = gradients.attach(loss)
        return SensitivityMargins(loss, classification.detach(), nll.detach(), gap.detach(), norm.detach(), competitor)

    def logit_statistics(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What the logits alone show, detached: classification, gap and nll [N]."""
        _, gap, nll = self._gaps(logits, target)
        return {"classification": self._classification(gap, nll).detach(), "nll": nll.detach(), "gap": gap.detach()}

    def _gaps(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The competitors to choose from [N,k], strongest first, the gap of the strongest and the cross-entropy [N]."""
        if _is_binary(logits):
            gap = _binary_gap(logits, target)
            return torch.zeros(len(gap), 1, dtype=torch.int64, device=gap.device), gap, F.softplus(gap)
        most = logits.shape[1] - 1 if logits.dim() == 2 else 1
        if self.top_k is not None and logits.dim() == 2 and self.top_k > most:
            raise ValueError(f"top_k must be at most the number of classes - 1 = {most}, got {self.top_k}")
        found = functional.competitors(logits, target, self.top_k or most, NOTHING, backend=self.backend)
        return found.competitor, found.gap[:, 0], found.nll

    def _classification(self, gap: Tensor, nll: Tensor) -> Tensor:
        return F.relu(1 + gap) if self.classification == "hinge" else nll


def _is_binary(logits: Tensor) -> bool:
    return logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1)


def _binary_gap(logits: Tensor, target: Tensor) -> Tensor:
    """-y f, [N], of one logit f; NaN where it is not finite, and on a GPU where y is neither -1 nor +1."""
    if not isinstance(target, Tensor) or target.shape != logits.shape[:1]:
        raise ValueError(f"target must be [N] = [{logits.shape[0]}] for one logit, got {list(target.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    valid = target.abs() == 1
    # Reading a value of a GPU would wait for it.
    if target.device.type == "cpu" and not bool(valid.all()):
        raise ValueError(f"target must be -1 or +1 for one logit, got {target[~valid][0].item()}")
    f = logits.reshape(-1)
    f = f if f.dtype == torch.float64 else f.float()
    # A factor, not a mask: the gradient of what is not finite is NaN as well.
    return -target.to(f.dtype) * f * torch.where(torch.isfinite(f) & valid, 1.0, float("nan")).to(f.dtype)

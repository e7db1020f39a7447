"""Margin sensitivity: classification loss + weight * max over j != y of || grad_h (z_y - z_j) ||_q ** power."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import functional, taps
from ..backends import BACKENDS
from ..passes import difference_norms, logit_norms, split_taps
from ..split_backward import Kind, NotExact, Split, split_or_loop
from ..tangent import TangentSplit
from ..taps import Captured, cut_sources
from .options import REDUCTIONS, RIVALS, choice, count, norm_exponent, number

CLASSIFICATIONS = ("hinge", "cross_entropy")
# How the norm is differentiated, as the passes that do it.
GRADIENTS = {"auto": None, "tangent": "split", "double_backward": "loop"}


class SensitivityMargins(NamedTuple):
    """What one evaluation of MarginSensitivityLoss shows; everything but `loss` is detached.

    loss [] or [N];  classification [N], the hinge or the cross-entropy;  nll [N], the cross-entropy;
    gap [N], of the strongest rival;  norm [N], || d (z_y - z_j) / d h ||_q;  index [N], the rival j where it is largest
    """

    loss: Tensor
    classification: Tensor
    nll: Tensor
    gap: Tensor
    norm: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is a method


class MarginSensitivityLoss(nn.Module):
    """Margin sensitivity: a classification loss and the norm of the gradient by which the margin can be changed.

        gap[n]   = max over j != y_n of z[n,j] - z[n,y_n]
        hinge[n] = max(0, 1 + gap[n])                          or cross-entropy
        S[n]     = max over j != y_n of || d (z[n,y_n] - z[n,j]) / d h[n] ||_q ** power        q = p / (p - 1)
        loss[n]  = hinge[n] + weight * S[n]

    h is one tap: in MarginTask the input unless `layers` names another. The rival j of S is chosen without a graph, one
    activation-only backward pass each; then the chosen pair alone is differentiated, exactly (second order). So every
    layer must be twice differentiable (attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH)).

    One logit f, [N,1] or [N], with targets -1 and +1: S = || d f / d h ||_q ** power, gap = -y f, and cross-entropy is
    softplus(-y f).

    Args:
        weight: factor of S, finite, >= 0.
        p: norm in which the margin is measured, in [1, inf]; float("inf") or "inf". S has the dual norm: p = 2 is the
            l2 norm of the gradient, p = inf its l1 norm.
        power: of the norm, finite, >= 1. Where the norm is 0 its derivative counts as 0.
        classification: "hinge" or "cross_entropy". The hinge fails where no label has half of the probability, as with
            60 % of wrong labels; cross-entropy does not.
        candidates: rivals among which j is chosen, the largest logits, 1 <= candidates <= C - 1; None: all C - 1.
            1 takes the strongest rival and needs no passes for the choice.
        gradient: how the norm is differentiated in the parameters. "tangent": by one tangent pass, 4 F in all, exact in
            piecewise-linear networks with the hinge and candidates=1 (margin_kernels.tangent), in MarginTask; the loss
            is then connected to the parameters alone. "double_backward": 6 F, any network. "auto": as `passes` says, in
            MarginTask by default a tangent where that is exact.
        reduction: "mean", "sum" or "none" over samples.
        backend: "auto" or a backend of margin_kernels.backends, for all ops.

    Raises:
        ValueError, TypeError: naming the argument, its value, and what is allowed; more than one tap; a tangent that
            would not be exact, with the operation that it fails at.

    A NaN or infinite logit makes the loss of its sample NaN. Equal norms: the stronger rival is differentiated.
    Source: Matyasko, Chau. Margin Maximization for Robust Classification using Deep Learning. IJCNN 2017, eq. 14, 18
    and 19; `power` and `weight` of the presets are those of the authors' code.
    """

    # What MarginTask gives it: the taps of one forward pass.
    needs = "taps"
    # What MarginTask asks: the norms are always differentiated.
    second_order = True

    def __init__(
        self,
        weight: float = 0.1,
        p: float | str = 2,
        power: float = 2,
        classification: str = "hinge",
        candidates: int | None = None,
        gradient: str = "auto",
        reduction: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.weight = number("weight", weight, least=0)
        self.p = norm_exponent(p)
        self.power = number("power", power, least=1)
        self.classification = choice("classification", classification, CLASSIFICATIONS)
        self.candidates = None if candidates is None else count("candidates", candidates, RIVALS)
        self.gradient = choice("gradient", gradient, tuple(GRADIENTS))
        self.reduction = choice("reduction", reduction, REDUCTIONS)
        self.backend = choice("backend", backend, ("auto", *BACKENDS))
        self._tried: dict[Kind, str | None] = {}

    def forward(self, logits: Tensor, target: Tensor, activations: Sequence[Tensor]) -> Tensor:
        """The loss, [] or [N], of logits [N,C] and target [N] int64, or one logit and target -1 or +1.

        activations holds one tensor, h [N,*] of the same forward: it requires grad and is in the graph of the logits.
        """
        return self.margins(logits, target, taps.explicit(logits, activations)).loss

    def margins(self, logits: Tensor, target: Tensor, captured: Captured, passes: str = "loop") -> SensitivityMargins:
        """The loss and all that it measured on the way.

        logits    [N,C], from which the classification loss is taken
        target    [N] int64, values in [0, C)
        captured  the forward pass whose tap is measured; its logits may differ from `logits` (frozen batch norm)
        passes    "loop": the loss is differentiated twice and goes back through the logits. "split": the gradients of
                  the parameters of a piecewise-linear network come from one pass and its tangents
                  (margin_kernels.tangent), for candidates=1 and the hinge. "auto": split where that is exact. What
                  `gradient` says goes before it
        Raises ValueError where a split is asked for and cannot be.
        """
        if len(captured.taps) != 1:
            names = ", ".join(tap.name for tap in captured.taps)
            raise ValueError(f"MarginSensitivityLoss measures at one tap, got {len(captured.taps)}: {names}")
        return split_or_loop(
            GRADIENTS[self.gradient] or passes,
            partial(self._split, logits, captured),
            partial(self._margins, logits, target, captured),
            asked='passes="split"' if self.gradient == "auto" else 'gradient="tangent"',
        )

    def _margins(self, logits: Tensor, target: Tensor, captured: Captured, split: Split | None) -> SensitivityMargins:
        source = logits if split is None else logits.detach().requires_grad_()
        rivals, gap, nll = self._gaps(source, target)
        if _is_binary(logits):
            norm = logit_norms(captured, self.p, second_order=True, backend=self.backend).squeeze(1)
            index = rivals.squeeze(1)
        else:
            # On a GPU a target outside [0, C) makes gap and nll NaN; clamped, it is also safe to index with.
            label = target.clamp(0, logits.shape[1] - 1)
            chosen = self._widest(captured, label, rivals)
            norm = self._norms(captured, label, chosen, second_order=True, split=split).squeeze(1)
            index = chosen.squeeze(1)
        classification = self._classification(gap, nll)
        loss = functional.reduced(classification + self.weight * norm.pow(self.power), self.reduction)
        if split is None:
            cut_sources(loss, captured)
        else:
            loss = split.loss(loss, source, None, rivals, label)
        return SensitivityMargins(loss, classification.detach(), nll.detach(), gap.detach(), norm.detach(), index)

    def _split(self, logits: Tensor, captured: Captured) -> Split:
        """The split backward of this loss. Raises NotExact with the reason where there is none."""
        passed = split_taps(captured, logits, "logit", self.p)
        if _is_binary(logits) or self.classification != "hinge" or (self.candidates != 1 and logits.shape[1] > 2):
            raise NotExact('it takes more than one logit, classification="hinge" and candidates=1')
        return TangentSplit(captured, passed, self._tried)

    def logit_statistics(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What the logits alone show, detached: classification, gap and nll [N]."""
        _, gap, nll = self._gaps(logits, target)
        return {"classification": self._classification(gap, nll).detach(), "nll": nll.detach(), "gap": gap.detach()}

    def _gaps(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The rivals to choose from [N,k], strongest first, the gap of the strongest [N] and the cross-entropy [N]."""
        if _is_binary(logits):
            gap = _binary_gap(logits, target)
            return torch.zeros(len(gap), 1, dtype=torch.int64, device=gap.device), gap, F.softplus(gap)
        rivals = logits.shape[1] - 1 if logits.dim() == 2 else 1
        if self.candidates is not None and logits.dim() == 2 and self.candidates > rivals:
            raise ValueError(f"candidates must be at most the number of classes - 1 = {rivals}, got {self.candidates}")
        index, gap, nll = functional.competitors(logits, target, self.candidates or rivals, backend=self.backend)
        return index, gap[:, 0], nll

    def _classification(self, gap: Tensor, nll: Tensor) -> Tensor:
        return F.relu(1 + gap) if self.classification == "hinge" else nll

    def _widest(self, captured: Captured, label: Tensor, rivals: Tensor) -> Tensor:
        """The rival with the largest norm, [N,1]; of equal ones the first."""
        if rivals.shape[1] == 1:
            return rivals
        norms = self._norms(captured, label, rivals, second_order=False)
        return rivals.gather(1, norms.argmax(1, keepdim=True))

    def _norms(
        self, captured: Captured, label: Tensor, index: Tensor, second_order: bool, split: Split | None = None
    ) -> Tensor:
        """|| d (z[n,i] - z[n,y_n]) / d h[n] ||_q, [N,k], of the rivals index [N,k]."""
        norms = difference_norms(
            captured, label, index, self.p, second_order=second_order, split=split, backend=self.backend
        )
        return norms.squeeze(-1)

    def extra_repr(self) -> str:
        parts = [f"weight={self.weight:g}", f"p={self.p:g}", f"power={self.power:g}"]
        defaults = {
            "classification": "hinge",
            "candidates": None,
            "gradient": "auto",
            "reduction": "mean",
            "backend": "auto",
        }
        parts += [f"{name}={getattr(self, name)!r}" for name, value in defaults.items() if getattr(self, name) != value]
        return ", ".join(parts)


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

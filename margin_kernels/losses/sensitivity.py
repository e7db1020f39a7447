"""Margin sensitivity: classification loss + weight * max over j != y of || grad_h (z_y - z_j) ||_q ** power."""

from __future__ import annotations

from collections.abc import Sequence
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
    REDUCTIONS,
    TapLoss,
    count,
    exponent,
    fraction,
    group_exists,
    integer,
    non_negative,
    number,
    one_of,
    optional,
    weights_of_classes,
)
from .targets import Targets, cross_entropy, ranked

CLASSIFICATIONS = ("hinge", "cross_entropy")
# How the norm is differentiated, as the passes that do it.
GRADIENTS = {"auto": None, "tangent": "split", "double_backward": "loop"}


class SensitivityMargins(NamedTuple):
    """What one evaluation of MarginSensitivityLoss shows; everything but `loss` is detached.

    loss [] or [N];  classification [N], the hinge or the cross-entropy with their weights;  nll [N], the cross-entropy
    of the label;  gap [N], of the strongest competitor;
    norm [N], || d (z_y - z_j) / d h ||_q;  competitor [N], the j where it is largest;
    valid (bool) [N], 1[target != ignore_index]
    """

    loss: Tensor
    classification: Tensor
    nll: Tensor
    gap: Tensor
    norm: Tensor
    competitor: Tensor
    valid: Tensor


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

    One logit f, [N,1] or [N], with targets 0 and 1, or -1 and +1, stands for the two classes z = (0, f):
    S = || d f / d h ||_q ** power, gap = -y f with y = -1 or +1, and cross-entropy is softplus(-y f).

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
        ignore_index: samples with this target are left out of every sum and mean.
        class_weight: None or one weight >= 0 for each class, which multiplies all terms of its samples; "mean" divides
            by the sum of the weights, as torch.nn.CrossEntropyLoss (and by the number of samples for soft targets).
        label_smoothing: of the cross-entropy, in [0, 1], as torch.nn.CrossEntropyLoss, over the finite classes.
        reduction: "mean", "sum" or "none" over samples.
        backend: "auto" or a backend of margin_kernels.backends, for all ops.
        process_group: None: the loss of this process's batch. "world", a ProcessGroup or a DeviceMesh of one dimension:
            each process has a part of one batch, of any size and also none; the mean over the processes of the loss,
            which DistributedDataParallel and fully_shard differentiate, is that of the whole batch.

    Raises:
        ValueError, TypeError: naming the argument, its value, and what is allowed; more than one tap; a tangent that
            would not be exact, with the operation that it fails at.

    Soft targets [N,C] (mixup, distillation): the cross-entropy of the soft target, of two classes the hinges of both in
    its shares, and S of its largest class, of equal ones the lowest.
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
        "ignore_index": integer,
        "class_weight": optional(weights_of_classes),
        "label_smoothing": fraction,
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
        ignore_index: int = -100,
        class_weight: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.keep(locals())
        self._check_together()

    def _check_together(self) -> None:
        if self.label_smoothing > 0 and self.classification == "hinge":
            raise ValueError(
                f'label_smoothing must be 0 with classification="hinge", which has none, got {self.label_smoothing}'
            )

    def passes(self, asked: str) -> str:
        return GRADIENTS[self.gradient] or asked

    def request(self, classes: int, soft_targets: bool = False) -> Request:
        """What this loss asks of a forward pass with so many classes."""
        self._check_together()
        outside = None
        if (self.classification != "hinge" or self.top_k != 1) and classes > 2:
            outside = 'it takes classification="hinge" and top_k=1'
        return Request(self.p, second_order=True, outside=outside, backend=self.backend)

    def count(self, logits: Tensor) -> int:
        """Backward passes of one step: of the choice, and of the chosen pair."""
        choices = self.top_k or logits.shape[1] - 1
        return choices + (choices > 1)

    def statistics(
        self,
        logits: Tensor,
        target: Tensor,
        captured: Captured,
        passes: str = "loop",
        sample_weight: Tensor | None = None,
        everywhere: tuple[Tensor, Tensor, Tensor | None] | None = None,
        **how: Any,
    ) -> SensitivityMargins:
        """The loss and all that it measured on the way.

        Args:
            logits: [N,C], from which the classification loss is taken
            target: [N] int64, values in [0, C), or soft [N,C]
            captured: the forward pass whose tap is measured; its logits may differ from `logits` (frozen batch norm)
            passes: as `passes` of MarginTask; what `gradient` says goes before it
            sample_weight: [N], or None
            everywhere: logits, target and sample weights of all rows of which these are drawn: the classification loss
                and the denominator of a mean are theirs
            **how: arguments of margin_kernels.gradients.choose
        """
        if len(captured.taps) != 1:
            names = ", ".join(tap.name for tap in captured.taps)
            raise ValueError(f"MarginSensitivityLoss measures at one tap, got {len(captured.taps)}: {names}")
        if self.gradient != "auto":
            how["asked"] = f'gradient="{self.gradient}"'
        passes = self.passes(passes)
        targets = self.targets(logits, target, sample_weight)
        request = self.request(logits.shape[-1], targets.soft is not None)
        gradients = choose(passes, request, captured, logits, **how)
        source = gradients.logits
        found = self._gaps(source, targets)
        competitors, label = found.competitor, targets.safe(logits.shape[1])
        # Against its own label a sample has no direction.
        competitors = torch.where(targets.valid.unsqueeze(1), competitors, label.unsqueeze(1))
        if competitors.shape[1] > 1:  # the one with the largest norm, of equal ones the first
            widest = gradients.measured(label, competitors).squeeze(-1).argmax(1, keepdim=True)
            competitors = competitors.gather(1, widest)
        norm = gradients.norms(label, competitors)[:, 0, 0]
        penalty = targets.weighed(self.weight * norm.pow(self.power))
        if everywhere is None:
            rows, all_targets = (found, source, targets), targets
            classification = self._classification(*rows)
            loss = self.reduced(classification + penalty, targets.counts())
        else:
            all_targets = self.targets(*everywhere)
            rows = self._gaps(everywhere[0], all_targets, 1), everywhere[0], all_targets
            classification = self._classification(*rows)
            share = all_targets.counts()
            loss = self.reduced(classification, share) + self.reduced(penalty, share)
        return SensitivityMargins(
            gradients.attach(loss),
            classification.detach(),
            rows[0].nll.detach(),
            found.gap[:, 0].detach(),
            norm.detach(),
            competitors.squeeze(1),
            targets.valid,
        )

    def logit_statistics(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the logits alone show, detached: loss, its classification part; classification, gap, nll, valid [N]."""
        targets = self.targets(logits, target, sample_weight)
        found = self._gaps(logits, targets)
        classification = self._classification(found, logits, targets)
        loss = self.reduced(classification, targets.counts())
        return {
            "loss": loss.detach(),
            "classification": classification.detach(),
            "nll": found.nll.detach(),
            "gap": found.gap[:, 0].detach(),
            "valid": targets.valid,
        }

    def _gaps(self, logits: Tensor, targets: Targets, top_k: int | None = None) -> functional.Competitors:
        """The competitors to choose from [N,k], strongest first, their gaps and the cross-entropy."""
        most = logits.shape[1] - 1 if logits.dim() > 1 else 1
        k = self.top_k if top_k is None else top_k
        if k is not None and logits.dim() > 1 and k > most:
            raise ValueError(f"top_k must be at most the number of classes - 1 = {most}, got {k}")
        return ranked(logits, targets, k or most, self.smoothed, self.backend)

    def _classification(self, found: functional.Competitors, logits: Tensor, targets: Targets) -> Tensor:
        """The hinge or the cross-entropy of each row, [N], weighed."""
        if self.classification == "cross_entropy":
            return cross_entropy(found, logits, targets, self.label_smoothing)
        gap = found.gap[:, 0]
        if targets.soft is None:
            return targets.weighed(F.relu(1 + gap))
        if targets.soft.shape[1] > 2:
            raise ValueError(
                'classification must be "cross_entropy" for soft targets of more than two classes, got "hinge"'
            )
        share = targets.soft if targets.class_weight is None else targets.soft * targets.class_weight
        own = share.gather(1, targets.label.unsqueeze(1)).squeeze(1)
        terms = own * F.relu(1 + gap) + (share.sum(1) - own) * F.relu(1 - gap)
        return terms if targets.sample is None else terms * targets.sample

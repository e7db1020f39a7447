"""Large margin loss: hinge on the linearised distance at every tap to the decision boundaries of the competitors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..backends import BACKENDS, EXTENSION
from ..backends import choose as choose_backend
from ..gradients.choose import Split, choose, takes_gradient
from ..gradients.request import Captured, Request
from ..process_group import WORLD, Group
from ..reference.margin_hinge import AGGREGATIONS
from ..tracing import tracing
from . import base
from .base import TapLoss, optional
from .margins import Margins
from .targets import Targets, cross_entropy, ranked, rows_of

# Norms up to this multiple of eps, or up to this value, count as 0: the distance would be the gap over eps.
DEGENERATE, LEAST_NORM = 100.0, 1e-4
OUTSIDE = (
    "the gradient of the cross-entropy is not among those of the passes: take "
    'competitors="soft", cross_entropy_weight=0, auxiliary="pairwise", or all competitors'
)
SMOOTHED = "label smoothing leads the cross-entropy away from the direction of the passes: take label_smoothing=0"
MIXED = "a soft target leads the cross-entropy away from the direction of the passes: take class indices"
# What the soft competitor leaves no choice of.
WITH_SOFT = {"top_k": 1, "aggregation": "max", "space": "logit", "auxiliary": "cross_entropy"}


class Medians(Protocol):
    """The running medians that gamma="auto" goes by."""

    def step(self, distance: Tensor, usable: Tensor, warmup: int, group: Group) -> tuple[Tensor, Tensor]:
        """Takes distances [N,k,L] where usable, of this process; the medians [L], and whether the margin has its
        weight, [] bool."""

    def known(self) -> list[float] | None:
        """The medians where the host knows that they are fixed."""


def _gamma(name: str, value: Any) -> float | list[float] | str:
    if value == "auto":
        return "auto"
    if isinstance(value, (str, Tensor)) or not (base.is_number(value) or isinstance(value, Sequence)):
        raise TypeError(
            f'{name} must be a number, a list of numbers, one for each layer, or "auto", got '
            f"{repr(value) if isinstance(value, str) else type(value).__name__}"
        )
    return base.positive_of_layers(name, value)


class LargeMarginLoss(TapLoss):
    """Large margin loss: hinge on the linearised distance of the sample, at every tap, to the decision boundaries.

        gap[n,j]    = s[n,i] - s[n,y_n]      i = j-th of the top_k logits without the label; s = logits or softmax
        D[n,j,l]    = || d gap[n,j] / d h_l[n] ||_q            q = p / (p - 1)
        d[n,j,l]    = - gap[n,j] / (eps + D[n,j,l])            distance in the p-norm, positive on the right side
        term[n,j,l] = min( max(gamma_l - d, 0), alpha gamma_l )          0 where D <= min_norm
        loss[n]     = sum_l w_l agg_j term[n,j,l] / sum_l w_l
        total       = margin_weight * loss + cross_entropy_weight * (nll or log(1 + exp(z_best - z_y)))

    competitors="soft" puts all classes into one competitor, whose direction is that of the cross-entropy:

        gap[n]      = -phi[n] = logsumexp_{i != y_n} z[n,i] - z[n,y_n]        within log(C - 1) of the largest gap

    so that the split backward gives margin and cross-entropy together at the price of the cross-entropy. phi is the
    lower bound of the distance to the strongest rival, in logits, and phi + log(R) the upper one, R the number of
    rivals. With soft_shift s the gap is -phi - s log(R), and a sample is on the right side where p_y > 1 / (1 + R^s).

    Args:
        gamma: margin that is asked for, > 0, in the units of the activations; one number or one for each layer. "auto",
            in a MarginTask: gamma_factor times the running median of each layer's own distance, over the samples on
            the right side; every term divided by its gamma. The margin has no weight until the network was right about
            a fifth of the samples in `warmup` steps; then gamma is fixed. Kept in the state dict of the task, the same
            on all processes.
        gamma_factor, warmup: of gamma="auto"; > 0, and >= 0 steps.
        p: norm of the distances, in [1, inf]; float("inf") or "inf".
        competitors: "hard", the top_k largest scores of other classes (the paper), or "soft": `competitor` [N,1] then
            names the strongest rival, and top_k, aggregation, space and auxiliary stay at their defaults.
        soft_shift: of the soft competitor, in [0, 1]: where between its bounds the gap lies. 0: phi; 1/2: the middle,
            within log(R) / 2 of the hard gap. R counts the other classes of a sample whose logits are not -inf.
        top_k: competitors k, 1 <= k <= C - 1. The passes cost k activation-only backward passes.
        aggregation: over competitors, "max", "sum", "mean", or "mean_distance" (one term of the mean distance).
        alpha: the terms are clipped at alpha * gamma, > 0; None: no clip.
        eps: added to D, >= 0.
        layer_weights: None or one weight >= 0 for each layer.
        layer_scale: None, or "numel": D is divided by the number of elements of the layer's activation.
        space: scores s, "logit" or "probability". Probability distances grow like sinh(gap): gamma must be far larger.
        second_order: False: D is a constant in the backward pass (the paper); True: D is differentiated as well, for
            which every layer must be twice differentiable (attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH)).
        margin_weight, cross_entropy_weight: finite, >= 0.
        auxiliary: what cross_entropy_weight weighs: "cross_entropy", or "pairwise", the logistic loss of the label and
            its best competitor, for which the split backward (`passes` of MarginTask) needs no pass of its own.
        layer_reduction: "mean" (weighted) or "sum" (of w_l term) over layers.
        reduction: "mean", "sum" or "none" over samples, of the margin loss and the cross-entropy alike.
        ignore_index: samples with this target are left out of every sum and mean; their `distance` is 0.
        class_weight: None or one weight >= 0 for each class, which weighs its samples in the margin loss and the
            cross-entropy alike; "mean" divides by the sum of the weights, as torch.nn.CrossEntropyLoss (and by the
            number of samples for soft targets).
        label_smoothing: of the cross-entropy, in [0, 1], as torch.nn.CrossEntropyLoss, over the finite classes.
        backend: "auto" or a backend of margin_kernels.backends, for all ops.
        min_norm: a term whose own D, before layer_scale, is at most this has no direction (zero head, dead units): it
            is left out, with slope 0, and counted in `degenerate`. None: 100 eps, at most 1e-4.
        process_group: None: the loss of this process's batch. "world", a ProcessGroup or a DeviceMesh of one dimension:
            each process has a part of one batch, of any size and also none; the mean over the processes of the loss,
            which DistributedDataParallel and fully_shard differentiate, is that of the whole batch.
            gamma="auto" measures over all processes in any case.

    Soft targets [N,C] (mixup, distillation): the cross-entropy is that of the soft target, the margin that of its
    largest class, of equal ones the lowest.

    Every option may be set between steps (a schedule of gamma). Raises:
        ValueError, TypeError: naming the argument, its value, and what is allowed.

    Source: Elsayed, Krishnan, Mobahi, Regan, Bengio. Large Margin Deep Networks for Classification. NeurIPS 2018.
    """

    live = ("gamma", "alpha", "layer_weights", "margin_weight", "cross_entropy_weight", "min_norm", "gamma_factor")
    shown = ("gamma", "p", "top_k", "aggregation")
    checks: ClassVar = {
        "gamma": _gamma,
        "p": base.exponent,
        "competitors": base.one_of("hard", "soft"),
        "soft_shift": base.fraction,
        "top_k": lambda name, value: base.count(name, value, base.COMPETITORS),
        "aggregation": base.one_of(*AGGREGATIONS),
        "alpha": optional(base.positive),
        "eps": base.non_negative,
        "layer_weights": optional(base.weights_of_layers),
        "layer_scale": base.one_of(None, "numel"),
        "space": base.one_of("logit", "probability"),
        "second_order": base.flag,
        "margin_weight": base.non_negative,
        "cross_entropy_weight": base.non_negative,
        "auxiliary": base.one_of("cross_entropy", "pairwise"),
        "layer_reduction": base.one_of("mean", "sum"),
        "reduction": base.one_of(*base.REDUCTIONS),
        "backend": base.one_of("auto", *BACKENDS),
        "min_norm": optional(base.non_negative),
        "ignore_index": base.integer,
        "class_weight": optional(base.weights_of_classes),
        "label_smoothing": base.fraction,
        "gamma_factor": base.positive,
        "warmup": lambda name, value: int(base.non_negative(name, base.integer(name, value))),
        "process_group": base.group_exists,
    }

    def __init__(
        self,
        gamma: float | Sequence[float] | str = 1.0,
        p: float | str = 2,
        top_k: int = 1,
        aggregation: str = "max",
        alpha: float | None = None,
        eps: float = 1e-6,
        layer_weights: Sequence[float] | None = None,
        layer_scale: str | None = None,
        space: str = "logit",
        second_order: bool = False,
        margin_weight: float = 1.0,
        cross_entropy_weight: float = 0.0,
        auxiliary: str = "cross_entropy",
        layer_reduction: str = "mean",
        reduction: str = "mean",
        backend: str = "auto",
        min_norm: float | None = None,
        competitors: str = "hard",
        ignore_index: int = -100,
        class_weight: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        gamma_factor: float = 1.0,
        warmup: int = 50,
        process_group: Any = None,
        soft_shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.keep(locals())
        self._check_together()

    def _check_together(self) -> None:
        """Options that rule out others. Raises ValueError."""
        if self.gamma == "auto" and self.cross_entropy_weight == 0:
            raise ValueError(
                'cross_entropy_weight must be > 0 with gamma="auto", whose first steps train with it alone'
            )
        if self.label_smoothing > 0 and self.auxiliary == "pairwise":
            raise ValueError(f'label_smoothing must be 0 with auxiliary="pairwise", got {self.label_smoothing}')
        if self.competitors == "hard" and self.soft_shift > 0:
            raise ValueError(
                f'soft_shift must be 0 with competitors="hard", whose gap is exact, got {self.soft_shift}: take '
                'competitors="soft"'
            )
        if self.competitors == "soft":
            for name, default in WITH_SOFT.items():
                if getattr(self, name) != default:
                    raise ValueError(
                        f'{name} must be {default!r} with competitors="soft", which has one competitor made of all '
                        f"classes, got {getattr(self, name)!r}"
                    )

    def request(self, classes: int, soft_targets: bool = False) -> Request:
        """What this loss asks of a forward pass with so many classes."""
        self._check_together()
        if self.top_k >= classes:
            raise ValueError(f"top_k must be in [1, {classes - 1}] for {classes} classes, got {self.top_k}")
        soft = self.competitors == "soft"
        outside = None
        if self.cross_entropy_weight > 0 and self.auxiliary == "cross_entropy" and self.top_k < classes - 1:
            if not soft:
                outside = OUTSIDE
            elif self.label_smoothing > 0 or soft_targets:
                outside = SMOOTHED if self.label_smoothing > 0 else MIXED
        return Request(self.p, self.space, self.layer_scale, self.second_order, self.top_k, soft, outside, self.backend)

    def statistics(
        self,
        logits: Tensor,
        target: Tensor,
        captured: Captured,
        passes: str = "loop",
        medians: Medians | None = None,
        sample_weight: Tensor | None = None,
        everywhere: tuple[Tensor, Tensor, Tensor | None] | None = None,
        **how: Any,
    ) -> Margins:
        """The loss and what it measured, of logits [N,C], target [N] int64 or [N,C], and the forward pass whose taps
        are measured (its logits are others under frozen batch norm); `passes` as in MarginTask, `medians` for
        gamma="auto", `how` as in `choose`. everywhere: logits, target and sample weights of all rows of which these are
        drawn: the cross-entropy and the denominator of a mean are theirs."""
        targets = self.targets(logits, target, sample_weight)
        self._check_targets(targets)
        request = self.request(logits.shape[-1], targets.soft is not None)
        gradients = choose(passes, request, captured, logits, **how)
        if takes_gradient(gradients) and everywhere is None and self._is_plain(logits, targets, captured):
            fixed = medians.known() if self.gamma == "auto" and medians is not None else None
            if self.gamma != "auto" or fixed is not None:
                return self._at_once(logits, targets, gradients, captured, fixed)
        source = gradients.logits
        found = self.gaps(source, targets)
        index, gap, valid = found.competitor, found.gap, targets.valid
        label = targets.safe(logits.shape[1])
        # Ignored samples take no part in the passes: against its own label a sample has no direction.
        norm = gradients.norms(label, torch.where(valid.unsqueeze(1), index, label.unsqueeze(1)))
        numbers = self.numbers(captured.layers or norm.shape[2])
        live = torch.tensor(numbers, dtype=norm.dtype) if self._live is None else self._live
        columns = live.to(norm, non_blocking=True).split(captured.layers or norm.shape[2])[:4]
        columns = columns if captured.chosen is None else [column[captured.chosen] for column in columns]
        gamma, cap, weights, least = columns
        if self.layer_scale == "numel":  # D was divided by these numbers
            least = least / least.new_tensor([tap.shape.numel() // max(captured.batch, 1) for tap in captured.taps])
        reduction, on = self.layer_reduction, None
        if self.gamma == "auto":
            if medians is None:
                raise ValueError(
                    'gamma must be a number or a list without a MarginTask, which keeps the medians of "auto"'
                )
            with torch.no_grad():
                counts = valid if targets.share is None else targets.share > 0
                usable = (norm > least) & counts.view(-1, 1, 1)
                together = Group(self.process_group or WORLD)
                median, on = medians.step(-gap.unsqueeze(2) / (self.eps + norm), usable, self.warmup, together)
                median = median if captured.chosen is None else median[captured.chosen]
                gamma, cap = gamma * median, cap * median
                weights = weights / gamma / (weights.sum() if reduction == "mean" else 1)
            reduction = "sum"
        loss, distance = functional.hinge_of(
            gap, norm, gamma, cap, weights, least, self.eps, self.aggregation, reduction, self.backend
        )
        loss = loss if on is None else torch.where(on, loss, 0)
        gaps, norms = gap.detach(), norm.detach()
        active, degenerate = functional.flags_of(gaps, norms, distance, gamma, cap, least, valid, self.backend)
        active = active if on is None else active & on
        rows = (found, source, targets) if everywhere is None else self._everywhere(*everywhere)
        total = gradients.attach(self._total(targets.weighed(loss), *rows))
        nll = rows[0].nll.detach()
        return Margins(total, nll, gaps, index, norms, distance, active, degenerate, valid)

    def _is_plain(self, logits: Tensor, targets: Targets, captured: Captured) -> bool:
        """Whether the loss is a mean or sum over the rows of this process of nothing but hinge and cross-entropy."""
        return (
            type(self) is LargeMarginLoss  # a class derived from it may have gaps or a reduction of its own
            and targets.soft is None
            and targets.factor is None
            and targets.share is None
            and self.label_smoothing == 0
            and self.auxiliary == "cross_entropy"
            and self.reduction != "none"
            and self.layer_scale is None
            and captured.chosen is None
            and logits.dtype in (torch.float32, torch.float64)
            and self.group().size == 1
            and not tracing()
            and choose_backend("competitors", (logits,), self.backend)[0] == "cpu"
        )

    def _at_once(
        self, logits: Tensor, targets: Targets, gradients: Split, captured: Captured, medians: list[float] | None
    ) -> Margins:
        """`statistics` of such a loss, its gradient in the logits found together with it. medians: of gamma="auto"."""
        assert EXTENSION is not None
        soft, classes = self.competitors == "soft", logits.shape[1]
        gap, nll, index, normalizer, valid, direction = EXTENSION.ranked_once(
            logits, targets.label, self.top_k, targets.ignored, soft
        )
        if self.soft_shift > 0:
            gap = self._shifted(gap, logits, valid)
        label = targets.safe(classes)
        rivals = index if soft else torch.where(valid.unsqueeze(1), index, label.unsqueeze(1))
        norm = gradients.norms(label, rivals, direction if soft else None)
        layers = captured.layers or norm.shape[2]
        numbers = self.numbers(layers)
        gamma, cap, weight, least = (numbers[i * layers : (i + 1) * layers] for i in range(4))
        reduction = self.layer_reduction
        if medians is not None:
            whole = sum(weight) if reduction == "mean" else 1.0
            gamma, cap = ([x * m for x, m in zip(values, medians, strict=True)] for values in (gamma, cap))
            weight, reduction = [w / g / whole for w, g in zip(weight, gamma, strict=True)], "sum"
        loss, gradient, weights, distance, active, degenerate = EXTENSION.loss_and_gradient(
            logits,
            targets.label,
            gap,
            nll,
            index,
            normalizer,
            valid,
            norm.to(gap.dtype),
            gamma,
            cap,
            weight,
            least,
            self.eps,
            self.margin_weight,
            self.cross_entropy_weight,
            self.aggregation,
            reduction,
            self.reduction == "mean",
            soft,
        )
        total = gradients.known(loss, gradient, weights)
        return Margins(total, nll, gap, index, norm, distance, active, degenerate, valid)

    def numbers(self, layers: int) -> list[float]:
        """What a compiled step does not fix but reads anew: gamma, cap, layer weight and min_norm for each layer, and
        the weights of margin and cross-entropy."""
        gamma = [self.gamma_factor] * layers if self.gamma == "auto" else self._spread("gamma", layers)
        cap = [math.inf if self.alpha is None else self.alpha * value for value in gamma]
        weights = self._spread("layer_weights", layers) or [1.0] * layers
        least = min(DEGENERATE * self.eps, LEAST_NORM) if self.min_norm is None else self.min_norm
        return [*gamma, *cap, *weights, *[least] * layers, self.margin_weight, self.cross_entropy_weight]

    def logit_statistics(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the logits alone show, detached: loss, the part of the auxiliary term; gap, competitor [N,k]; nll, valid
        [N]."""
        targets = self.targets(logits, target, sample_weight)
        self._check_targets(targets)
        found = self.gaps(logits, targets)
        nothing = found.nll.new_zeros(found.nll.shape)
        loss = self._total(nothing, found, logits, targets).detach()
        return {
            "loss": loss,
            "nll": found.nll.detach(),
            "gap": found.gap.detach(),
            "competitor": found.competitor,
            "valid": targets.valid,
        }

    def _check_targets(self, targets: Targets) -> None:
        if targets.soft is not None and self.cross_entropy_weight > 0 and self.auxiliary == "pairwise":
            raise ValueError('auxiliary must be "cross_entropy" for soft targets, got "pairwise"')

    def _everywhere(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None
    ) -> tuple[functional.Competitors, Tensor, Targets]:
        """What the auxiliary term takes of all rows."""
        targets = self.targets(logits, target, sample_weight)
        k = 1 if self.auxiliary == "pairwise" else 0
        return ranked(logits, targets, k, self.smoothed, self.backend), logits, targets

    def gaps(self, logits: Tensor, targets: Targets) -> functional.Competitors:
        """competitor and gap [N,k] in the loss's space, nll [N] of logits [N,C]: all that needs no activations."""
        found = ranked(logits, targets, self.top_k, self.smoothed, self.backend)
        if self.competitors == "soft":
            gap = -found.phi.unsqueeze(1)
            if self.soft_shift > 0:
                gap = self._shifted(gap, rows_of(logits), targets.valid)
            return found._replace(gap=gap)
        if self.space == "probability":
            wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
            scores = torch.softmax(logits, 1, dtype=wide)
            own = targets.safe(logits.shape[1]).unsqueeze(1)
            found = found._replace(gap=scores.gather(1, found.competitor) - scores.gather(1, own))
        return found

    def _shifted(self, gap: Tensor, logits: Tensor, valid: Tensor) -> Tensor:
        """Soft gaps [N,1] of these rows, lower by soft_shift log(R); those of ignored rows as they are."""
        rivals = (logits != -math.inf).sum(1).sub(1).clamp(min=1)  # a label that is masked has an infinite gap
        return gap - (self.soft_shift * valid * rivals.to(gap.dtype).log()).unsqueeze(1)

    def _total(self, margin: Tensor, found: functional.Competitors, logits: Tensor, targets: Targets) -> Tensor:
        """margin_weight times the reduced margin terms, weighed already, and cross_entropy_weight times the auxiliary
        term of the rows that `found`, logits and targets are of: as many or more."""
        margin_weight, cross_entropy_weight = (
            (self.margin_weight, self.cross_entropy_weight) if self._live is None else self._live[-2:]
        )
        share = targets.counts()
        margin = margin if self.margin_weight == 1 else margin * margin_weight
        if self.cross_entropy_weight == 0:
            return self.reduced(margin, share)
        terms = self._auxiliary(found, logits, targets)
        terms = terms if self.cross_entropy_weight == 1 else terms * cross_entropy_weight
        if len(terms) == len(margin):
            return self.reduced(margin + terms, share)
        return self.reduced(margin, share) + self.reduced(terms, share)

    def _auxiliary(self, found: functional.Competitors, logits: Tensor, targets: Targets) -> Tensor:
        """The auxiliary term of each row, [N], weighed."""
        if self.auxiliary == "cross_entropy":
            return cross_entropy(found, logits, targets, self.label_smoothing)
        wide = rows_of(logits).to(torch.promote_types(logits.dtype, torch.float32))
        wide = torch.where(targets.valid.unsqueeze(1), wide, 0)
        own = targets.safe(logits.shape[1]).unsqueeze(1)
        return targets.weighed(F.softplus(wide.gather(1, found.competitor[:, :1]) - wide.gather(1, own)).squeeze(1))

    def _spread(self, name: str, layers: int) -> Any:
        value = getattr(self, name)
        values = value if isinstance(value, list) or value is None else [value] * layers
        if values is not None and len(values) != layers:
            raise ValueError(f"{name} must be one number or one for each of the {layers} taps, got {len(values)}")
        return values

"""What targets say of the rows of logits, and their cross-entropy.

    target                  label y[n]                 cross-entropy of row n, w the class weights (1 without)
    int64 [N]               itself                     w_y (-log p_y)
    floating [N,C], soft    its largest class          sum_c w_c s_c (-log p_c),  s[n] >= 0 with sum 1: mixup

    with label_smoothing e and the M classes of finite logits       (1 - e) * that + e / M sum_c w_c (-log p_c)

Margins are measured to the label: of equal soft entries the lowest class. Every term of a row has its sample weight; a
mean divides by the sum of w_y times sample weight for class indices, of the sample weights alone for soft targets, as
torch.nn.functional.cross_entropy does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..backends import is_functorch_wrapped
from ..outputs import with_zero
from ..tracing import tracing

# An ignore_index that no target has.
NOTHING = -(2**63)
NEEDS_CLASSES = (
    "logits must be [N,C] with C >= 2 for {name}, which weighs the score of every class, got those of a model with "
    "one: give it two outputs"
)
# How far the entries of a soft target may sum from 1: as half precision rounds them.
SUM_TOLERANCE = 1e-2


class Targets(NamedTuple):
    """The targets of N rows of logits [N,C].

    label [N] int64, or `ignored` where the row counts for nothing;  soft [N,C] or None;  valid [N] bool;
    class_weight [C] or None;  sample [N], the sample weights, or None;  factor [N], what a row's margin is multiplied
    by, None where that is 1;  share [N], what a row adds to the denominator of a mean, None where `valid` says it
    """

    label: Tensor
    ignored: int
    soft: Tensor | None
    valid: Tensor
    class_weight: Tensor | None
    sample: Tensor | None
    factor: Tensor | None
    share: Tensor | None

    def safe(self, classes: int) -> Tensor:
        """The labels as indices: on a GPU one outside [0, C) has made gap and nll NaN."""
        return self.label.clamp(0, classes - 1)

    def weighed(self, terms: Tensor) -> Tensor:
        """The terms [N] of rows, with the rows' factors; 0 where the row is ignored."""
        terms = torch.where(self.valid, terms, 0)
        return terms if self.factor is None else terms * self.factor

    def counts(self) -> Tensor:
        """What every row adds to the denominator of a mean, [N]: bool where that is 1 or 0."""
        return self.valid if self.share is None else self.share


def read(
    logits: Tensor,
    target: Tensor,
    ignore_index: int = NOTHING,
    class_weight: Sequence[float] | None = None,
    sample_weight: Tensor | None = None,
) -> Targets:
    """The targets of logits [N,C], or of the N S rows of [N,C,S]: int64 [N], or floating [N,C]; sample_weight [N] >= 0.

    Raises ValueError, TypeError for shapes and types, on the CPU also for soft targets whose rows are no distributions
    and for weights that are negative or not finite; elsewhere these make the loss of the row NaN.
    """
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a tensor, int64 [N] or soft targets [N,C], got {type(target).__name__}")
    if class_weight is not None and logits.dim() > 1 and len(class_weight) != logits.shape[1]:
        raise ValueError(
            f"class_weight must hold one weight for each of {logits.shape[1]} classes, got {len(class_weight)}"
        )
    for name, tensor in (("target", target), ("sample_weight", sample_weight)):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            raise ValueError(f"{name} must not require grad, for the loss is not differentiated in it: detach it")
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    rows = logits.shape[0] * logits.shape[2:].numel()
    weights = None
    if class_weight is not None:
        weights = torch.tensor(class_weight, dtype=wide).to(logits.device, non_blocking=True)
    sample = None if sample_weight is None else _sample_weight(sample_weight, rows, logits.device, wide)
    if target.is_floating_point():
        soft, label = _soft(target, rows, logits, wide)
        valid = torch.ones_like(label, dtype=torch.bool)
        factor = sample if weights is None else _times((soft * weights).sum(1), sample)
        share = sample
        return Targets(label, NOTHING, soft, valid, weights, sample, factor, share)
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, got {str(target.dtype).removeprefix('torch.')}")
    valid = target != ignore_index
    factor, share = sample, None if sample is None else torch.where(valid, sample, 0)
    if weights is not None and logits.dim() > 1:
        own = weights[torch.where(valid, target, 0).clamp(0, logits.shape[1] - 1)]
        factor = share = torch.where(valid, _times(own, sample), 0)
    return Targets(target, ignore_index, None, valid, weights, sample, factor, share)


def ranked(logits: Tensor, targets: Targets, k: int, smoothed: bool, backend: str) -> functional.Competitors:
    """`functional.competitors` of logits [N,C], or of the N S rows of [N,C,S], whose targets these are."""
    if logits.dim() == 2:
        return functional.competitors(logits, targets.label, k, targets.ignored, smoothed, backend)
    label = targets.label.view(logits.shape[0], logits.shape[2:].numel())
    found = functional.competitors(logits, label, k, targets.ignored, smoothed, backend)
    return functional.reshaped(found, lambda value: value.flatten(0, 1))


def rows_of(logits: Tensor) -> Tensor:
    """Logits [N,C] themselves, [N,C,S] as N S rows."""
    return logits if logits.dim() == 2 else logits.transpose(1, 2).flatten(0, 1)


def cross_entropy(found: functional.Competitors, logits: Tensor, targets: Targets, smoothing: float) -> Tensor:
    """The cross-entropy [N] of each row, with its weights; 0 where the row is ignored. `found` is what `competitors`
    gives for these rows, with `uniform` where `smoothing` > 0."""
    weights, soft = targets.class_weight, targets.soft
    if soft is None:
        terms = found.nll
        if weights is None and smoothing == 0:  # 0 in rows that are ignored, as `competitors` has it
            return terms if targets.sample is None else terms * targets.sample
        if weights is not None:
            terms = terms * weights[targets.safe(len(weights))]
    else:
        terms = _divergence(found.nll, rows_of(logits), targets.label, soft if weights is None else soft * weights)
    if smoothing > 0:
        smooth = found.uniform if weights is None else _weighed_by_class(rows_of(logits), weights)
        assert smooth is not None
        terms = torch.lerp(terms, smooth, smoothing)
    terms = torch.where(targets.valid, terms, 0)
    return terms if targets.sample is None else terms * targets.sample


def _divergence(nll: Tensor, logits: Tensor, label: Tensor, share: Tensor) -> Tensor:
    """-sum_c a_c log p_c, [N], of shares a [N,C] >= 0, from nll = -log p_y: what is small beside 1 stays."""
    z = logits.to(share.dtype)
    own = z.gather(1, label.unsqueeze(1))
    taken = share > 0
    below = torch.where(taken, own - torch.where(taken, z, 0), 0)
    return share.sum(1) * nll + (share * below).sum(1)


def _weighed_by_class(logits: Tensor, weight: Tensor) -> Tensor:
    """sum_c w_c (-log p_c) / M over the M finite classes, [N]."""
    z = logits.to(weight.dtype)
    finite = z != -math.inf
    below = torch.where(finite, torch.logsumexp(z, 1, keepdim=True) - torch.where(finite, z, 0), 0)
    return (below * weight).sum(1) / finite.sum(1)


def _times(values: Tensor, factor: Tensor | None) -> Tensor:
    return values if factor is None else values * factor


def _soft(target: Tensor, rows: int, logits: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Soft targets [N,C], NaN in rows that are no distribution, and the largest class of each [N]."""
    if logits.dim() < 2 or target.shape != (rows, logits.shape[1]):
        raise ValueError(
            f"target must be int64 classes [N], or soft targets of the shape {list(logits.shape)} of the logits, got "
            f"{str(target.dtype).removeprefix('torch.')} of shape {list(target.shape)}"
        )
    if target.device != logits.device:
        raise ValueError(f"target must be on the device of logits ({logits.device}), got {target.device}")
    soft = target.detach().to(wide)
    proper = (soft >= 0).all(1) & ((soft.sum(1) - 1).abs() <= SUM_TOLERANCE)
    if _readable(target):
        if not bool(proper.all()):
            row = int((~proper).nonzero()[0])
            raise ValueError(
                "target must hold probabilities >= 0 with sum 1 in each row, as mixup makes them, got "
                f"{soft[row].tolist()[:8]} at row {row}"
            )
        return soft, soft.argmax(1)
    return torch.where(proper.unsqueeze(1), soft, math.nan), torch.where(proper, soft.argmax(1), 0)


def _sample_weight(weight: Tensor, rows: int, device: torch.device, wide: torch.dtype) -> Tensor:
    if not isinstance(weight, Tensor):
        raise TypeError(f"sample_weight must be a tensor [N], got {type(weight).__name__}")
    if weight.dim() != 1 or len(weight) != rows:
        raise ValueError(f"sample_weight must have shape [{rows}] to match logits, got {list(weight.shape)}")
    if weight.device != device:
        raise ValueError(f"sample_weight must be on the device of logits ({device}), got {weight.device}")
    weight = weight.detach().to(wide)
    proper = (weight >= 0) & (weight < math.inf)
    if _readable(weight) and not bool(proper.all()):
        raise ValueError(f"sample_weight must be finite and >= 0, got {weight[~proper][0].item()}")
    return torch.where(proper, weight, math.nan)


def _readable(tensor: Tensor) -> bool:
    """Whether values can be read for nothing."""
    return tensor.device.type == "cpu" and not tracing() and not is_functorch_wrapped(tensor)


def two_classes(logits: Tensor, target: Tensor, ignored: int | None = None) -> tuple[Tensor, Tensor]:
    """One logit f [N] or [N,1] as two classes, z = (0, f) [N,2], whose softmax is sigmoid(f) and whose gap is -f for
    class 1 and f for class 0; and the targets as theirs.

    target [N] or [N,1]: integers or bool, 1 against 0 or -1, or `ignored`; or floating, soft targets: the probability
    of class 1, or -1 and +1. Raises ValueError for other values where they lie on the CPU.
    """
    if not isinstance(target, Tensor) or target.shape not in (logits.shape, logits.shape[:1]):
        shape = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise ValueError(f"target must be [N] = [{len(logits)}] for one logit, got {shape}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    return with_zero(logits), _of_one_logit(target.reshape(-1), ignored)


def _of_one_logit(target: Tensor, ignored: int | None) -> Tensor:
    hard = not target.is_floating_point()
    left_out = target == ignored if hard and ignored is not None else torch.zeros_like(target, dtype=torch.bool)
    if _readable(target):
        whole = (target == 1) | (target == 0) | (target == -1) | left_out
        allowed = whole if hard else whole | ((target > 0) & (target < 1))
        if not bool(allowed.all()):
            raise ValueError(f"target must be 0 or 1, or -1 or +1, for one logit, got {target[~allowed][0].item()}")
        if bool(((target == -1) & ~left_out).any()) and not bool(((target.abs() == 1) | left_out).all()):
            raise ValueError("target must be 0 or 1, or -1 or +1, for one logit, got a batch with -1 and others")
    if hard:
        label = target.long()
        return torch.where((label == -1) & ~left_out, 0, label)
    share = torch.where(target == -1, 0, target)
    return torch.stack([1 - share, share], 1)

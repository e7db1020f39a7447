"""1-to-N loss: each sample against the logits that the batch's other classes have in its column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks, functional
from ..backends import BACKENDS
from ..deprecation import former, renamed
from ..outputs import is_one_logit
from ..reference.one_to_n import BOUNDS, logsumexp, one_to_n
from .base import (
    REDUCTIONS,
    MarginLoss,
    flag,
    group_exists,
    integer,
    one_of,
    optional,
    positive,
    weights_of_classes,
)
from .targets import NEEDS_CLASSES, NOTHING, Targets, read


def _linear(name: str, value: Any) -> nn.Linear | None:
    if value is not None and not isinstance(value, nn.Linear):
        raise TypeError(f"{name} must be None or the model's final nn.Linear, got {type(value).__name__}")
    return value


class OneToNMargins(NamedTuple):
    """What one evaluation of OneToNLoss shows; everything but `loss` is detached.

    loss [] or [N];  per_sample [N], the loss of each;  nll [N], the cross-entropy;
    gap [N], of the strongest competitor;  valid (bool) [N], 1[target != ignore_index]
    """

    loss: Tensor
    per_sample: Tensor
    nll: Tensor
    gap: Tensor
    valid: Tensor


class OneToNLoss(MarginLoss):
    """1-to-N loss: one positive logit against all negative ones of the batch in the same column, in O(N C).

        a_i = min(z[i,y_i], delta)
        A_c = logsumexp over j with y_j != c of max(z[j,c], -delta)          (+ delta for bound="positive")
        L_i = softplus(A_{y_i} - a_i)                                         = -log of eq. 8
        L_i = logaddexp(A_{y_i}, logsumexp_k z[i,k]) - a_i                    with cross_entropy, eq. 14

    Args:
        delta: half the margin, in units of the logits, finite, > 0.
        bound: "symmetric": scores bounded to [-delta, delta]; "positive": negatives bounded from 0.
        cross_entropy: adds the sample's own softmax denominator.
        weight_norm: None, or the model's final nn.Linear: each logit is divided by the l2 norm of its row of the
            weight (||W_c|| = 1 of the derivation), with gradient. A row of zeros gives NaN. The layer stays the
            model's: this module owns no parameters.
        reduction: "mean", "sum" or "none" over samples.
        backend: "auto" or a backend of margin_kernels.backends, for all ops.
        process_group: None: the loss of this process's batch. "world", a ProcessGroup or a DeviceMesh of one dimension:
            each process has a part of one batch, of any size and also none; the mean over the processes of the loss,
            which DistributedDataParallel and fully_shard differentiate, is that of the whole batch.
            The negatives are those of all processes: one exchange of C numbers in forward and one in backward, no
            logits, computed by PyTorch's operations. For training steps, which all processes take together; without
            gradients, and before init_process_group, the batch is the process's own.
        ignore_index: None, or the target of samples that have no loss and are nobody's negatives; the loss is then
            computed by PyTorch's operations.
        class_weight: None or one weight >= 0 for each class, which multiplies the losses of its samples; "mean" divides
            by the sum of the weights. The negatives are not weighed.

    Raises:
        ValueError, TypeError: naming the argument, its value, and what is allowed.

    A batch of one class has no negatives: loss and gradient 0 without cross_entropy. A non-finite logit gives NaN in
    every loss that it enters.
    Source: Rocca Layza, Pedrini, Torres. 1-to-N Large Margin Classifier. SIBGRAPI 2020, eq. 8 and 14.
    """

    needs = "logits"
    takes_one_logit = False
    shown = ("delta", "bound")
    checks: ClassVar = {
        "delta": positive,
        "bound": one_of(*BOUNDS),
        "cross_entropy": flag,
        "weight_norm": _linear,
        "reduction": one_of(*REDUCTIONS),
        "backend": one_of("auto", *BACKENDS),
        "process_group": group_exists,
        "ignore_index": optional(integer),
        "class_weight": optional(weights_of_classes),
    }

    across_processes = former("across_processes", "process_group")

    @renamed("across_processes", "process_group")
    def __init__(
        self,
        delta: float = 1.0,
        bound: str = "symmetric",
        cross_entropy: bool = False,
        weight_norm: nn.Linear | None = None,
        reduction: str = "mean",
        backend: str = "auto",
        process_group: Any = None,
        ignore_index: int | None = None,
        class_weight: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.keep(locals())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight_norm":
            # In a tuple, so that it is not registered: its parameters are the model's. Copies of a task copy it with
            # the model, as one object.
            name, value = "_head", (_linear(name, value),)
        super().__setattr__(name, value)

    @property
    def weight_norm(self) -> nn.Linear | None:
        """The layer whose row norms divide the logits."""
        return self._head[0]

    def forward(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss, [] or [N], of logits [N,C] and target [N] int64. sample_weight [N] >= 0 multiplies the loss of a
        sample, and is what it counts in a mean."""
        return self.statistics(self.whole(logits), target, sample_weight).loss

    def targets(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Targets:
        if is_one_logit(logits):
            raise ValueError(NEEDS_CLASSES.format(name="OneToNLoss"))
        if isinstance(target, Tensor) and target.is_floating_point():
            raise ValueError(
                "target must be int64 classes [N] for OneToNLoss, whose negatives are the samples of other classes, "
                f"got soft targets of shape {list(target.shape)}"
            )
        ignored = NOTHING if self.ignore_index is None else self.ignore_index
        return read(logits, target, ignored, self.class_weight, sample_weight)

    def statistics(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> OneToNMargins:
        """The loss of logits [N,C] and target [N] int64, and statistics of each sample."""
        targets = self.targets(logits, target, sample_weight)
        per_sample = targets.weighed(self._per_sample(logits, targets))
        loss = self.reduced(per_sample, targets.counts())
        found = functional.competitors(logits.detach(), target, 1, targets.ignored, backend=self.backend)
        return OneToNMargins(loss, per_sample.detach(), found.nll, found.gap[:, 0], targets.valid)

    def logit_statistics(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Loss [] or [N], per_sample, nll, gap and valid, each [N]; detached."""
        found = self.statistics(logits, target, sample_weight)
        return {**found._asdict(), "loss": found.loss.detach()}

    def _per_sample(self, logits: Tensor, targets: Targets) -> Tensor:
        scores, target = self._scores(logits), targets.label
        group = self.group()
        if group.size == 1 and self.ignore_index is None:
            return functional.one_to_n(
                scores, target, self.delta, self.bound, self.cross_entropy, "none", backend=self.backend
            )
        checks.check_one_to_n(scores, target, self.delta, self.bound, targets.ignored)

        def joined(column: Tensor) -> Tensor:
            return column if group.size == 1 else logsumexp(group.columns(column))

        valid = None if self.ignore_index is None else targets.valid
        with torch.autocast(logits.device.type, enabled=False):
            return one_to_n(scores, target, self.delta, self.bound, self.cross_entropy, joined, valid)

    def _scores(self, logits: Tensor) -> Tensor:
        """The logits, divided by the norms of their weight rows where that is asked for."""
        head = self.weight_norm
        if head is None:
            return logits
        if logits.dim() != 2 or logits.shape[1] != head.out_features:
            raise ValueError(
                f"weight_norm must be the layer that makes the logits, got one of {head.out_features} outputs for "
                f"logits {list(logits.shape)}"
            )
        with torch.autocast(logits.device.type, enabled=False):
            norm = functional.dual_norm([head.weight], 2, batch_dims=1, backend=self.backend).squeeze(1)
            return (logits if logits.dtype == torch.float64 else logits.float()) / norm

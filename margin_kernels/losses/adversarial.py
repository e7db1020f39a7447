"""Adversarial margin losses: the distance that DeepFool finds, as a term of the loss.

    Delta(n)  DeepFool perturbation of sample n: T (classified correctly): until the prediction changes
                                                 F (misclassified): until the ground truth is predicted
    m(n)      = ||Delta||_p   ([A] eq. 6)    or   ||Delta||_p / ||x||_p   ([Y] eq. 5)
    R         = sum over T of min(weight shrink(-c m), 50) + sum over F of min(weight shrink(d m), 50)
    total     = mean nll + R / N

The search for Delta runs without a graph and records which boundary each step went to. Where the loss needs gradients
the steps are then repeated with a graph, one backward pass for each instead of one for each competitor, and only for
the samples that take part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..backends import BACKENDS
from ..batchnorm import running_statistics, training_batchnorms
from ..deepfool import Search, convolves, differentiable, host_sees, outside_inference_mode, search
from ..deepfool_checks import check_search, described
from ..deprecation import former, renamed
from ..gradients.loop import pair_gradient
from ..outputs import is_one_logit
from ..process_group import Group
from ..reference.dual_norm import dual_exponent
from ..replay import ReplayedModel
from ..second_derivative import check_second_derivative, is_missing, sentence
from ..sharding import check_order, check_plain, nodes_of, whole
from .base import (
    MarginLoss,
    count,
    exponent,
    flag,
    fraction,
    group_exists,
    integer,
    non_negative,
    one_of,
    optional,
    positive,
    weights_of_classes,
)
from .targets import Targets, cross_entropy, ranked

AGGREGATIONS = ("avg", "min")
SHRINKAGES = ("lin", "exp", "inv")
GRADIENTS = ("unrolled", "envelope", "first_order")
# The largest weight * shrink of one sample, as in the code of [A].
TERM_LIMIT = 50.0
# MIN looks for its samples among this share of the batch [A].
MIN_SHARE = 0.2


class AdversarialMargins(NamedTuple):
    """What one evaluation of AdversarialMarginLoss shows; everything but `loss` is detached.

    loss [];  nll [N];  distance m [N], NaN where the logits are;  success [N] bool, whether the boundary was crossed;
    correct [N] bool, whether n is in T;  selected [N] bool, whether n takes part in R;  iterations [N];  label [N], the
    class predicted at x + Delta;  valid (bool) [N], 1[target != ignore_index]
    """

    loss: Tensor
    nll: Tensor
    distance: Tensor
    success: Tensor
    correct: Tensor
    selected: Tensor
    iterations: Tensor
    label: Tensor
    valid: Tensor


class AdversarialMarginLoss(MarginLoss):
    """Cross-entropy and a penalty on small DeepFool perturbations: Deep Defense and adversarial margin maximisation.

        m      = ||Delta||_p, or ||Delta||_p / ||x||_p with normalize       Delta: DeepFool, at most max_iter steps of
                                                                           (1 + overshoot) times the distance
        total  = mean nll + 1 / N * sum of terms over the samples that take part
        term     correctly classified samples                        misclassified samples
        "lin"    -weight c m                                         weight d m
        "exp"    min(weight exp(-c m), 50)                           min(weight exp(d m), 50)
        "inv"    min(weight / (1 + c m), 50)                         weight / (1 - min(d m, max(0, 1 - weight / 50)))

        A term at its limit has no gradient: with weight 32 and d 1, "exp" leaves misclassified samples alone from
        m = ln(50 / 32) = 0.446 on.

    Args:
        weight: lambda >= 0. Terms are limited after the multiplication with it, as in the code of [A].
        c, d: slopes > 0 for correctly classified and misclassified samples. With "avg" d draws the boundary towards the
            label of every misclassified sample: where many labels may be wrong, take a small one.
        aggregation: "avg": every sample takes part; "min": of the correctly classified, for each class the sample with
            the smallest m if it is among the int(0.2 N) smallest of the batch, of the misclassified for each class the
            one with the largest m if among the int(0.2 N) largest (at least one each). Samples whose boundary was not
            crossed are left out; R is divided by N all the same.
        shrinkage: "lin", "exp" or "inv".
        normalize: distances relative to the norm of the sample (Deep Defense).
        max_iter, overshoot, top_k: as in `deepfool`.
        gradient: "unrolled": through all steps, second order in the network. "first_order": the same steps with the
            gradients w of the scores taken as constants. "envelope": by the envelope theorem at the boundary point
            b = x + Delta, d m = d g(b) / ||grad_x g(b)||_q with g the gap that b closes; one forward and one
            backward pass, exact where Delta is the shortest way to the boundary.
        p: norm of the distances, in [1, inf]; float("inf") or "inf".
        ignore_index: samples with this target count for nothing, and "min" does not look at them.
        class_weight: None or one weight >= 0 for each class, which multiplies cross-entropy and term of its samples;
            N is then the sum of the weights, as in torch.nn.CrossEntropyLoss (for soft targets it stays N).
        label_smoothing: of the cross-entropy, in [0, 1], as torch.nn.CrossEntropyLoss, over the finite classes.
        backend: "auto" or a backend of margin_kernels.backends, for all ops.
        process_group: None: the loss of this process's batch. "world", a ProcessGroup or a DeviceMesh of one dimension:
            each process has a part of one batch, of any size and also none; the mean over the processes of the loss,
            which DistributedDataParallel and fully_shard differentiate, is that of the whole batch, and "min" selects
            from it.

    Soft targets [N,C] (mixup, distillation): the cross-entropy is that of the soft target; its largest class, of equal
    ones the lowest, is the label that a sample is right or wrong about. A model with one logit f, [N] or [N,1], has the
    classes z = (0, f), and targets 0 and 1, or -1 and +1.

    While Delta is computed batch norm uses running statistics, dropout holds its masks, and autocast is off. "unrolled"
    needs layers that PyTorch can differentiate twice, and says which one it cannot.

    The model runs several times, and MarginTask leaves it as one forward pass of the whole batch does: random numbers,
    buffers (running statistics, spectral norm, counters), attributes of its modules, and lists, dicts and sets in them.
    Forward hooks see one pass, unless they change what the model computes: those take part in every pass. Not undone
    is what a forward pass does to parameters, to other objects that attributes hold, and to global variables
    (margin_kernels.replay). One model must not run in two threads at a time.

    Presets: [A] MNIST: the defaults. [Y]: weight 15, c 25, d 5, normalize, aggregation "avg".

    Raises:
        ValueError, TypeError: naming the argument, its value, and what is allowed.

    Sources: Yan, Guo, Zhang. Deep Defense. NeurIPS 2018 [Y]. Yan, Guo, Zhang. Adversarial Margin Maximization Networks.
    TPAMI 2019 [A].
    """

    needs = "model"
    shown = (
        "weight", "c", "d", "aggregation", "shrinkage", "normalize", "max_iter", "overshoot", "top_k",
        "gradient", "p",
    )  # fmt: skip
    checks: ClassVar = {
        "weight": non_negative,
        "c": positive,
        "d": positive,
        "aggregation": one_of(*AGGREGATIONS),
        "shrinkage": one_of(*SHRINKAGES),
        "normalize": flag,
        "max_iter": count,
        "overshoot": non_negative,
        "top_k": count,
        "gradient": one_of(*GRADIENTS),
        "p": exponent,
        "backend": one_of("auto", *BACKENDS),
        "process_group": group_exists,
        "ignore_index": integer,
        "class_weight": optional(weights_of_classes),
        "label_smoothing": fraction,
    }

    candidates = former("candidates", "top_k", less=1)

    @renamed("candidates", "top_k", less=1)
    def __init__(
        self,
        weight: float = 32.0,
        c: float = 2.0,
        d: float = 1.0,
        aggregation: str = "min",
        shrinkage: str = "exp",
        normalize: bool = False,
        max_iter: int = 5,
        overshoot: float = 0.02,
        top_k: int = 9,
        gradient: str = "unrolled",
        p: float | str = 2,
        backend: str = "auto",
        process_group: Any = None,
        ignore_index: int = -100,
        class_weight: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.keep(locals())
        check_search(self.p, self.max_iter, self.overshoot, self.top_k)

    def forward(
        self, logits: Tensor, target: Tensor, model: nn.Module, x: Tensor, sample_weight: Tensor | None = None
    ) -> Tensor:
        """The loss [] of logits [N,C] = model(x) and target [N] int64 or [N,C]; model and x [N,*] to measure distances
        with. sample_weight [N] >= 0 multiplies the terms of a sample, and is what it counts in the mean."""
        logits, target = self.whole(logits), whole(target)
        if is_one_logit(logits):
            raise ValueError(
                "logits must be [N,C] with C >= 2, got those of a model with one: train it with MarginTask, or give it "
                "two classes, torch.cat([torch.zeros_like(f), f], 1)"
            )
        return self.statistics(logits, target, model, x, sample_weight=whole(sample_weight)).loss

    def logit_statistics(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the logits alone show, detached: loss, its cross-entropy; gap, competitor [N,1]; nll, valid [N]."""
        targets = self.targets(logits, target, sample_weight)
        found, terms = self._cross_entropy(logits, targets)
        loss = self._mean(terms.sum(), targets).detach()
        return {
            "loss": loss,
            "nll": found.nll.detach(),
            "gap": found.gap.detach(),
            "competitor": found.competitor,
            "valid": targets.valid,
        }

    def _cross_entropy(self, logits: Tensor, targets: Targets) -> tuple[functional.Competitors, Tensor]:
        """What `competitors` gives, and the cross-entropy of each row, [N], weighed."""
        found = ranked(logits, targets, 1, self.smoothed, self.backend)
        return found, cross_entropy(found, logits, targets, self.label_smoothing)

    def _mean(self, total: Tensor, targets: Targets) -> Tensor:
        """A sum over the samples of this process, divided by what they count."""
        return self.group().whole(total, targets.counts().sum())

    def statistics(
        self,
        logits: Tensor,
        target: Tensor,
        model: nn.Module,
        x: Tensor,
        replayed: ReplayedModel | None = None,
        source: Tensor | None = None,
        whole_batch: bool = False,
        sample_weight: Tensor | None = None,
    ) -> AdversarialMargins:
        """The loss and all that it measured on the way.

        replayed: the model, whose first pass gave the logits: the distances are those of the same function, dropout
        masks included, and hooks see one pass. None: of the model as it is now and of masks drawn now; hooks run in
        every pass.
        source: the tensor at which the graph of the logits begins, if it is known: the first DeepFool step is taken on
        that graph.
        whole_batch: every sample takes part in every pass, and their number depends on no value.
        """
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            raise ValueError(f"x must be a floating-point tensor [N, *], got {described(x)}")
        check_plain(x)
        if self.gradient == "unrolled" and self.weight > 0:  # before a sample crosses its boundary and needs it
            check_order(nodes_of(logits))
        targets = self.targets(logits, target, sample_weight)
        found_at_x, terms_of_labels = self._cross_entropy(logits, targets)
        target = differentiable(targets.safe(logits.shape[1]))
        x = differentiable(x.detach())
        training = training_batchnorms(model)
        mixed = torch.is_autocast_enabled(x.device.type)
        replay = ReplayedModel(model, x) if replayed is None else replayed
        # In half precision a step of two per cent beyond the boundary is often none.
        with (
            outside_inference_mode(),
            running_statistics(training) if training else nullcontext(),
            torch.autocast(x.device.type, enabled=False),
            replay.replaying(),
        ):
            if replayed is None:
                replay.try_out(x)
            wide = x if x.dtype == torch.float64 else x.float()
            # The forward pass of the loss, where it was that of the same function and no hook sees a pass on its graph.
            same = not (training or mixed or (replayed is None and replay.draws))
            shared = same and not replay.graph_hooked and wide.dtype == x.dtype
            found = search(
                replay,
                wide,
                target,
                self.p,
                self.max_iter,
                self.overshoot,
                "step",
                self.top_k,
                logits=differentiable(logits) if same else None,
                source=source if shared else None,
                whole_batch=replay.draws or whole_batch,
                together=not whole_batch and not convolves(model),
                backend=self.backend,
            )
            result = found.result
            correct = found.prediction == target
            scale = self._norm(wide) if self.normalize else None
            distance = result.distance if scale is None else result.distance / scale
            # An image that is 0 has no relative distance.
            usable = result.success if scale is None else result.success & (scale > 0)
            selected = self._selected(distance, correct, usable, targets.valid, target, logits.shape[1])
            everyone = replay.draws or whole_batch
            rows = self._rows(selected, logits.shape[1], everyone)
            terms = self._terms(replay, wide, found, target, scale, rows, everyone)
        if targets.factor is not None:
            terms = terms * targets.factor[rows]
        regularizer = torch.where(selected[rows], terms, 0).sum()
        loss = self._mean(terms_of_labels.sum() + regularizer, targets)
        return AdversarialMargins(
            loss,
            found_at_x.nll.detach(),
            distance,
            result.success,
            correct,
            selected,
            result.iterations,
            result.label,
            targets.valid,
        )

    def _norm(self, x: Tensor) -> Tensor:
        """||x[n]||_p, [N]."""
        return functional.dual_norm([x], dual_exponent(self.p), batch_dims=1, backend=self.backend)[:, 0]

    def _selected(
        self, m: Tensor, correct: Tensor, success: Tensor, valid: Tensor, target: Tensor, classes: int
    ) -> Tensor:
        """Which samples take part, [N] bool."""
        success = success & valid
        if self.aggregation == "avg":
            return success
        group = self.group()
        if group.size > 1:
            nearest = _first_of_all_processes(m, correct & success, valid, target, classes, group)
            return nearest | _first_of_all_processes(-m, ~correct & success, valid, target, classes, group)
        most = _share_of(valid.sum())
        nearest = _first_of_each_class(m, correct & success, target, classes, most)
        return nearest | _first_of_each_class(-m, ~correct & success, target, classes, most)

    def _rows(self, selected: Tensor, classes: int, all_of_them: bool) -> Tensor:
        """Indices [S] of samples that are repeated with a graph: all selected ones, and others where to leave them out
        would mean to wait for the device, to draw other dropout masks, or to take other passes than other processes."""
        everyone = torch.arange(len(selected), device=selected.device)
        if all_of_them:
            return everyone
        if host_sees(selected):
            return everyone[selected]
        if self.aggregation == "avg":
            return everyone
        if self.group().size > 1:  # all that the whole batch selects may be here
            return everyone
        slots = 2 * min(classes, max(1, int(MIN_SHARE * len(selected))))
        return selected.float().topk(min(slots, len(selected))).indices

    def _terms(
        self,
        replay: ReplayedModel,
        x: Tensor,
        found: Search,
        target: Tensor,
        scale: Tensor | None,
        rows: Tensor,
        everyone: bool,
    ) -> Tensor:
        """The terms of samples rows [S], with a graph; everyone: in as many passes for every batch."""
        correct = (found.prediction == target)[rows]
        if (len(rows) == 0 and not everyone) or len(found.upper) == 0 or self.weight == 0:
            return x.new_zeros(len(rows))
        if torch.is_grad_enabled():
            measure = self._envelope if self.gradient == "envelope" else self._unrolled
            m = measure(replay, x, found, target, rows, everyone)
        else:
            m = found.result.distance[rows]
        if scale is not None:
            m = m / torch.where(scale > 0, scale, 1)[rows]
        return torch.where(correct, self._limited_right(-self.c * m), self._limited_wrong(self.d * m))

    def _limited_right(self, t: Tensor) -> Tensor:
        """min(weight shrink(t), 50) of t = -c m <= 0, [S]; LIN has no limit."""
        if self.shrinkage == "lin":
            return self.weight * t
        return (self.weight * (t.exp() if self.shrinkage == "exp" else 1 / (1 - t))).clamp_max(TERM_LIMIT)

    def _limited_wrong(self, t: Tensor) -> Tensor:
        """The same of t = d m >= 0, limited before exp(t) overflows and before the pole of 1 / (1 - t)."""
        if self.shrinkage == "lin":
            return self.weight * t
        if self.shrinkage == "inv":
            return self.weight / (1 - t).clamp_min(min(1.0, self.weight / TERM_LIMIT))
        largest = math.log(TERM_LIMIT + self.weight)  # of t + ln(weight), where t = ln(50 / weight + 1)
        return (t + math.log(self.weight)).clamp_max(largest).exp().clamp_max(TERM_LIMIT)

    def _unrolled(
        self, replay: ReplayedModel, x: Tensor, found: Search, target: Tensor, rows: Tensor, everyone: bool
    ) -> Tensor:
        """||Delta||_p [S], the steps of the search repeated with a graph toward the boundaries that it chose."""
        x, iterations = x[rows], found.result.iterations[rows]
        leaving = host_sees(x) and not everyone
        delta = torch.zeros_like(x)
        all_of_them = torch.arange(len(rows), device=rows.device)
        for i in range(len(found.upper)):
            active = iterations > i
            moving = all_of_them[active] if leaving else all_of_them
            if len(moving) == 0 and not everyone:
                break
            point = x[moving] + delta[moving]
            if not point.requires_grad:
                point.requires_grad_()
            upper, lower = found.upper[i, rows[moving]], found.lower[i, rows[moving]]
            logits = replay(point)
            gap = _difference(logits, upper, lower)
            w = self._gradient_with_graph(logits, upper, lower, point, check=i == 0)
            step = functional.deepfool_step(gap.unsqueeze(1), w.unsqueeze(1), active[moving], self.p, self.backend).step
            delta = delta.index_add(0, moving, (1 + self.overshoot) * step)
        return self._norm(delta)

    def _gradient_with_graph(self, logits: Tensor, upper: Tensor, lower: Tensor, point: Tensor, check: bool) -> Tensor:
        """d (z_upper - z_lower) / d point, [S, *], differentiable for "unrolled" alone."""
        if self.gradient != "unrolled":
            return pair_gradient(logits, upper, lower, point)
        instead = 'take gradient="envelope" or "first_order"'
        try:
            w = pair_gradient(logits, upper, lower, point, second_order=True)
        except (RuntimeError, NotImplementedError) as error:
            if not is_missing(error):
                raise
            raise ValueError(sentence(str(error), instead)) from error
        if check:
            check_second_derivative(w, point, instead)
        return w

    def _envelope(
        self, replay: ReplayedModel, x: Tensor, found: Search, target: Tensor, rows: Tensor, everyone: bool
    ) -> Tensor:
        """||Delta||_p [S] with the gradient (g - const) / ||grad_x g||_q at x + Delta, g = z_upper - z_lower > 0 on the
        side of x."""
        result, target = found.result, target[rows]
        point = (x[rows] + result.perturbation[rows]).requires_grad_()
        last = (result.iterations[rows] - 1).clamp_min(0)
        # T leaves its class for the one predicted at x*; F enters the target from the class predicted before.
        correct = found.prediction[rows] == target
        before = torch.where(correct, target, found.lower[last, rows])
        after = torch.where(correct, result.label[rows], target)
        # A sample that takes no part may have a masked class there, and inf * 0 is NaN in the backward.
        before = torch.where(result.success[rows], before, after)
        logits = replay(point)
        g = _difference(logits, before, after)
        w = pair_gradient(logits, before, after, point)
        slope = functional.dual_norm([w], self.p, batch_dims=1, backend=self.backend)[:, 0]
        change = (g - g.detach()) / torch.where(slope == 0, math.inf, slope)
        return self._norm(result.perturbation[rows]) + change


def _difference(logits: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
    """z_upper - z_lower, [S], in float32 or wider."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (z.gather(1, upper.unsqueeze(1)) - z.gather(1, lower.unsqueeze(1))).squeeze(1)


def _share_of(samples: Tensor) -> Tensor:
    """How many samples of a batch of so many valid ones MIN looks at, []."""
    return (MIN_SHARE * samples.double()).floor().clamp(min=1)


def _first_of_each_class(value: Tensor, among: Tensor, target: Tensor, classes: int, most: Tensor) -> Tensor:
    """[N] bool: for each class the sample with the smallest value, if it is one of the `most` smallest; of samples
    `among` alone, equal values in the order of the batch."""
    rank = torch.empty_like(target)
    order = torch.where(among, value, math.inf).sort(stable=True).indices
    rank[order] = torch.arange(len(target), device=target.device)
    first = torch.full((classes,), len(target), device=target.device)
    first = first.scatter_reduce(0, target, torch.where(among, rank, len(target)), "amin")
    return among & (rank < most) & (rank == first[target])


def _first_of_all_processes(
    value: Tensor, among: Tensor, valid: Tensor, target: Tensor, classes: int, group: Group
) -> Tensor:
    """`_first_of_each_class` of the batch that the processes of a group have together, in their order; [N] of this
    one's samples. Exchanges C numbers three times, whatever part of the batch each has."""
    value = torch.where(among, value, math.inf).double()
    before, _ = group.counts(len(value), value.device)
    place = before + torch.arange(len(value), device=value.device)
    none = torch.iinfo(torch.int64).max

    def least(rows: Tensor, nothing: float) -> Tensor:
        """The smallest of each class, [C]."""
        found = torch.full((classes,), nothing, dtype=rows.dtype, device=rows.device)
        return group.reduce(found.scatter_reduce(0, target, rows, "amin"), "min", "the selection of samples")

    smallest = least(value, math.inf)
    first = least(torch.where(among & (value == smallest[target]), place, none), none)
    column = value.unsqueeze(1)
    ahead = (column < smallest) | ((column == smallest) & (place.unsqueeze(1) < first))
    rank = group.reduce(ahead.sum(0), "sum", "the selection of samples")
    most = _share_of(group.reduce(valid.sum(), "sum", "the count of samples"))
    return among & (place == first[target]) & (rank[target] < most)

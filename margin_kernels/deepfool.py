"""DeepFool: the distance to the nearest decision boundary by repeated linearisation ([Y], [A],
Moosavi-Dezfooli 2016).

At x + Delta, for each candidate class j and reference class r:   gap_j = z_j - z_r,   w_j = grad_x gap_j

    distance to the linearised boundary   |gap_j| / ||w_j||_q        the candidate with the smallest one is stepped to:
    step   |gap| / ||w||_q^q * |w|^(q-1) sign(w): the smallest step in the p norm that reaches it
           p = 2: |gap| w / ||w||_2^2     p = inf: (|gap| / ||w||_1) sign(w)     p = 1: (|gap| / ||w||_inf) sign(w_i)
           e_i, i = argmax |w_i|

until the predicted class changes, at most `max_iter` times. All samples move together; finished ones are masked, and
leave the batch where the host reads the mask anyway. `deepfool` measures: its result carries no graph. `search` also
keeps which boundary each step went to, from which a loss can repeat the steps with a graph.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from . import functional
from .deepfool_checks import (
    check_arguments,
    check_logits,
    check_search,
    warn_of_probabilities,
    warn_of_training_mode,
)
from .deprecation import renamed
from .gradients.autograd_graph import without_hooks
from .gradients.loop import pair_gradient, passes_to
from .outputs import is_one_logit, logits_in, with_zero
from .random_state import RandomState
from .replay import ReplayedModel, untouched
from .sharding import check_plain, crossed, whole, whole_logits
from .tracing import tracing

LOG = logging.getLogger(__name__)
Model = nn.Module | Callable[[Tensor], Tensor]

# foolbox adds this to every linearised distance in "total" mode, so that a step ends behind the boundary also where
# overshoot is 0.
TOTAL_SLACK = 1e-4
# A gap that is exactly 0 gives no step, and a sample on the boundary of a tie would stay there: gaps count as at least
# this far open.
SMALLEST_GAP = 1e-12
# How many iterations a CUDA batch runs between two readings of the active mask: a reading waits for the device.
CUDA_CHECK_EVERY = 5


class DeepFoolResult(NamedTuple):
    """perturbation [N, *], its p norm [N] (NaN where the logits are, inf where all competitors are masked), steps taken
    [N] int64, boundary crossed [N] bool, and the class predicted at x + perturbation [N] int64."""

    perturbation: Tensor
    distance: Tensor
    iterations: Tensor
    success: Tensor
    label: Tensor


class Search(NamedTuple):
    """DeepFoolResult and the way there: the classes predicted at x, prediction [N], and the boundary
    z_upper = z_lower that step i of a sample went to, upper and lower [u, N] for u iterations, valid for
    i < iterations[n]."""

    result: DeepFoolResult
    prediction: Tensor
    upper: Tensor
    lower: Tensor


@renamed("candidates", "top_k", less=1)
def deepfool(
    model: Model,
    x: Tensor,
    target: Tensor | None = None,
    p: float | str = 2,
    max_iter: int = 50,
    overshoot: float = 0.02,
    overshoot_mode: str = "total",
    top_k: int = 9,
    bounds: tuple[float, float] | None = None,
    step_limit: float | None = None,
) -> DeepFoolResult:
    """Smallest perturbation in the p norm that changes the prediction, to first order.

    x_next = x_0 + (1 + overshoot) * sum of steps   ("total", as foolbox's L2DeepFoolAttack)
    x_next = x + (1 + overshoot) * step             ("step", as [A])

    Args:
        model: maps [N, *] to logits [N, C], or to an object or dict with `logits`; one logit f [N] or [N, 1] stands for
            the classes (0, f). Each row depends on its own sample only. Put it into eval mode first. Its buffers and
            attributes are afterwards as before; its hooks see every forward pass.
        x: floating [N, *].
        target: int64 [N], or None: the reference class is the prediction at x. With targets, samples predicted as their
            target are treated so too, and the others the other way round ([A], set F): they move until the target is
            predicted, the reference being whatever is predicted meanwhile.
        p: in [1, inf]; float("inf") or "inf".
        max_iter: at least 1.
        overshoot: finite, >= 0.
        overshoot_mode: "total" or "step", as above.
        top_k: competitors of the reference class that take part, those with the largest logits at x; 1 to C - 1, larger
            means all.
        bounds: (low, high) clips x + perturbation; x must lie inside.
        step_limit: > 0 shortens each step to that p norm (0.5 in [M]).

    Returns:
        DeepFoolResult; distance is that of the perturbation as applied, overshoot included. It works under no_grad and
        inference_mode, and returns no graph.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is allowed.

    Warns, if batch norm or dropout is in training mode, and if the model seems to return probabilities.
    """
    exponent = check_search(p, max_iter, overshoot, top_k)
    check_arguments(model, x, target, overshoot_mode, bounds, step_limit)
    check_plain(x)
    target = whole(target)
    read = _Reads(model)
    with outside_inference_mode(), untouched(model):
        x = differentiable(x)
        random = RandomState.now(x)
        with torch.no_grad():
            logits = whole(read(x))
        check_logits(logits, x, target)
        coupled = warn_of_training_mode(model, random.changed())
        warn_of_probabilities(logits)
        options = (max_iter, overshoot, overshoot_mode, top_k, bounds, step_limit, logits)
        together = not convolves(model)
        return search(read, x, target, exponent, *options, whole_batch=coupled, together=together).result


class _Reads:
    """A model as a function of x whose value is its logits [N, C]."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Any:
        made = self.model(x)
        found = logits_in(made)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            return made
        return with_zero(found) if is_one_logit(found) else found


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Gradients can be taken inside, also where the caller is in inference mode."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def differentiable(x: Tensor) -> Tensor:
    """x, or its clone where it was made in inference mode: autograd saves no such tensor."""
    return x.clone() if x.is_inference() else x


def search(
    model: Model,
    x: Tensor,
    target: Tensor | None,
    p: float,
    max_iter: int,
    overshoot: float,
    overshoot_mode: str = "step",
    top_k: int = 9,
    bounds: tuple[float, float] | None = None,
    step_limit: float | None = None,
    logits: Tensor | None = None,
    source: Tensor | None = None,
    whole_batch: bool = False,
    together: bool = False,
    backend: str = "auto",
) -> Search:
    """`deepfool` with the boundaries that its steps went to; the other arguments as there, checked by the caller.

    What it takes beside them:

    * logits: model(x) if it is known.
    * source: the tensor at which the graph of these logits begins, if they have one: the first step then needs no
      forward pass of its own.
    * whole_batch: finished samples stay in the batch, for models whose rows depend on their place in it (dropout masks
      that are drawn again) or on the others (batch norm).
    * together: the gradients of all competitors in one batched backward pass, faster for networks without convolutions.
    """
    x = differentiable(x.detach())
    target = None if target is None else differentiable(target)
    total, moved = torch.zeros_like(x), x.clone()
    # Where the host sees the mask anyway, a pass without a graph finds what is done, and only the others pay for
    # gradients: one for each competitor, or a single one where the target is the only one.
    whole_batch = whole_batch or tracing()
    host_reads = host_sees(x) and not whole_batch
    rows = torch.arange(len(x), device=x.device)  # the samples still in the batch
    iterations = torch.zeros_like(rows)
    uppers: list[Tensor] = []
    lowers: list[Tensor] = []
    if logits is None:
        with torch.no_grad():
            logits = whole(model(x))
        check_logits(logits, x, None)
    state = _State.start(logits, x, target, top_k)
    for step in range(max_iter + 1):
        last = step == max_iter
        if step and (host_reads or last):
            with torch.no_grad():
                state.look(rows, whole(model(_taken(moved, rows))))
        if host_reads or (step and not last and step % CUDA_CHECK_EVERY == 0 and not whole_batch):
            rows = rows[state.active[rows]]
        if last or (step and len(rows) == 0 and not whole_batch):
            break
        upper, lower = torch.zeros_like(iterations), torch.zeros_like(iterations)
        shared = step == 0 and source is not None and state.shares(rows, host_reads)
        for group in (rows,) if shared or not host_reads else state.groups(rows):
            with torch.enable_grad():
                if shared:
                    assert source is not None
                    leaf, output = source, logits
                else:
                    leaf = _taken(moved, group).detach().requires_grad_()
                    with without_hooks(model.model if isinstance(model, (ReplayedModel, _Reads)) else model):
                        output = whole_logits(model(leaf))
                if not host_reads:
                    state.look(group, output.detach())
                above, below = state.boundaries(group, host_reads and not shared)
                active = _taken(state.active, group)
                slack = overshoot_mode == "total"
                delta, choice = _nearest_step(
                    output, leaf, above, below, active, p, slack, step_limit, together, backend
                )
            upper = _placed(upper, group, above.gather(1, choice[:, None])[:, 0])
            lower = _placed(lower, group, below)
            # delta is 0 for samples that are not active
            if overshoot_mode == "total":
                total = _placed(total, group, _taken(total, group) + delta)
                following = _taken(x, group).add(_taken(total, group), alpha=1 + overshoot)
            else:
                following = _taken(moved, group).add(delta, alpha=1 + overshoot)
            if bounds is not None:
                keep = active.view(-1, *[1] * (x.ndim - 1))
                following = torch.where(keep, following.clamp(*bounds), _taken(moved, group))
            moved = _placed(moved, group, following)
            iterations = _placed(iterations, group, _taken(iterations, group) + active)
        uppers.append(upper)
        lowers.append(lower)
    empty = iterations.new_zeros(0, len(x))
    paths = torch.stack(uppers) if uppers else empty, torch.stack(lowers) if lowers else empty
    return Search(state.result(x, moved, p, iterations), state.prediction, *paths)


def _taken(tensor: Tensor, rows: Tensor) -> Tensor:
    """tensor[rows] of increasing rows; the tensor itself where these are all."""
    return tensor if len(rows) == len(tensor) else tensor[rows]


def _placed(tensor: Tensor, rows: Tensor, value: Tensor) -> Tensor:
    """The tensor with `value` in increasing rows: in its memory, or `value` itself where these are all."""
    if len(rows) == len(tensor):
        return value
    tensor[rows] = value
    return tensor


def host_sees(x: Tensor) -> bool:
    """Whether the host can read a mask of this device without waiting for it."""
    return x.device.type == "cpu" and not tracing()


class _State:
    """Of every sample [N]: reference classes, what is predicted now, whether it still moves."""

    def __init__(
        self, prediction: Tensor, competitors: Tensor, goal: Tensor, toward: Tensor, finite: Tensor, enclosed: Tensor
    ) -> None:
        self.prediction, self.competitors, self.goal, self.toward = prediction, competitors, goal, toward
        self.finite, self.enclosed, self.active = finite, enclosed, finite & ~enclosed
        self.label = prediction.clone()

    @classmethod
    def start(cls, output: Tensor, x: Tensor, target: Tensor | None, top_k: int) -> _State:
        """From the logits [N, C] at x. `toward`: samples that move toward their target, which is not predicted.
        `enclosed`: all boundaries of the sample lead to masked classes."""
        logits = output.detach()
        # stable: equal logits keep the lower class first, as everywhere in this library
        ranking = logits.sort(dim=1, descending=True, stable=True).indices[:, : top_k + 1]
        prediction, competitors = ranking[:, 0], ranking[:, 1:]
        toward = torch.zeros_like(prediction, dtype=torch.bool) if target is None else prediction != target
        goal = prediction if target is None else target
        nearest = torch.where(toward, goal, competitors[:, 0])
        enclosed = logits.gather(1, nearest[:, None])[:, 0] == -math.inf
        return cls(prediction, competitors, goal, toward, _usable(logits), enclosed)

    def look(self, rows: Tensor, logits: Tensor) -> None:
        """Takes note of the logits [n, C] of samples rows [n]."""
        label = logits.argmax(1)
        toward, goal = _taken(self.toward, rows), _taken(self.goal, rows)
        finite = _taken(self.finite, rows) & _usable(logits)
        active = _taken(self.active, rows) & (toward == (label != goal)) & finite
        self.label = _placed(self.label, rows, label)
        self.finite, self.active = _placed(self.finite, rows, finite), _placed(self.active, rows, active)

    def groups(self, rows: Tensor) -> list[Tensor]:
        """Samples rows [n] by the number of boundaries that they may go to, empty groups left out."""
        toward = self.toward[rows]
        return [group for group in (rows[~toward], rows[toward]) if len(group)]

    def shares(self, rows: Tensor, host_reads: bool) -> bool:
        """Whether the first step is cheaper on the graph of the whole batch than on graphs of the two groups: a forward
        pass saved, and for each sample that moves toward its target as many backward passes as for the others."""
        if not host_reads:
            return True
        if len(rows) < len(self.active):
            return False
        return int(self.toward.sum()) * (self.competitors.shape[1] - 1) < len(rows)

    def boundaries(self, rows: Tensor, grouped: bool) -> tuple[Tensor, Tensor]:
        """Classes (upper, lower), [n, m] and [n]: the boundaries z_upper = z_lower that a step may go to. Samples that
        move toward their target have one boundary only, {target, prediction}: m = 1 where rows is one of `groups`, else
        it is repeated so that the batch stays rectangular."""
        toward, goal, competitors = (_taken(of, rows) for of in (self.toward, self.goal, self.competitors))
        if grouped and bool(toward.any()):
            competitors = competitors[:, :1]
        upper = torch.where(toward[:, None], goal[:, None].expand_as(competitors), competitors)
        return upper, torch.where(toward, _taken(self.label, rows), goal)

    def result(self, x: Tensor, moved: Tensor, p: float, iterations: Tensor) -> DeepFoolResult:
        crossed = (self.toward == (self.label == self.goal)) & self.finite
        perturbation = moved - x
        distance = torch.linalg.vector_norm(perturbation.flatten(1), ord=p, dim=1)
        valid = self.finite & ~perturbation.flatten(1).isnan().any(1)
        distance = distance.masked_fill(self.enclosed, math.inf).masked_fill(~valid, math.nan)
        return DeepFoolResult(perturbation, distance, iterations, crossed & valid, self.label)


def _usable(logits: Tensor) -> Tensor:
    """Rows [N] of logits [N, C] that predict a class: no NaN, no +inf, not every class masked."""
    return (logits < math.inf).all(1) & (logits > -math.inf).any(1)


def _nearest_step(
    output: Tensor,
    leaf: Tensor,
    upper: Tensor,
    lower: Tensor,
    active: Tensor,
    p: float,
    slack: bool,
    step_limit: float | None,
    together: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The step [n, *] to the nearest of the linearised boundaries, 0 where no gradient points anywhere, and which of
    the boundaries that is, [n]."""
    z = output.to(torch.promote_types(output.dtype, torch.float32))
    with torch.no_grad():
        # The boundary {j, j} in the place of one to a masked class: no gradient, so infinitely far away.
        upper = torch.where(z.gather(1, upper) == -math.inf, lower[:, None], upper)
    gap = z.gather(1, upper) - z.gather(1, lower[:, None])  # [n, m]
    gradients = _gradients(output, gap, leaf, upper, lower, together)
    with torch.no_grad():
        gap = gap.detach().abs().clamp_min(SMALLEST_GAP)
        step, choice, distance = functional.deepfool_step(gap, gradients, active, p, backend)
        if slack:
            step = step * _per_sample(1 + TOTAL_SLACK / distance, step)
            distance = distance + TOTAL_SLACK
        if step_limit is not None:
            step = step * _per_sample((step_limit / distance).clamp_max(1), step)
    return step, choice


def _gradients(output: Tensor, gap: Tensor, leaf: Tensor, upper: Tensor, lower: Tensor, together: bool) -> Tensor:
    """d gap[n, j] / d leaf[n], [n, m, *]: in m backward passes, or `together` in one of m cotangents, as far as the
    functions of the graph can be batched."""
    count = gap.shape[1]
    if together and count > 1 and not crossed(output):  # no collective runs in a batched pass
        one_hot = torch.eye(count, dtype=gap.dtype, device=gap.device).unsqueeze(1).expand(count, *gap.shape)
        try:
            with torch.autocast(leaf.device.type, enabled=False):
                batched = torch.autograd.grad(gap, leaf, one_hot, retain_graph=True, is_grads_batched=True)
            return batched[0].transpose(0, 1)
        except RuntimeError as error:
            LOG.debug("competitors one at a time: %s", error)
    passes = passes_to(output, leaf)
    return torch.stack([pair_gradient(output, upper[:, j], lower, leaf, passes=passes) for j in range(count)], 1)


def convolves(model: Model) -> bool:
    """Whether a model has, or may have, convolutions, which gain nothing from cotangents side by side."""
    return not isinstance(model, nn.Module) or any(isinstance(module, _ConvNd) for module in model.modules())


def _per_sample(factor: Tensor, like: Tensor) -> Tensor:
    """factor [n] as [n, 1, ...], 1 where nothing is to be scaled: inactive samples and those without a direction."""
    return torch.where(factor.isfinite(), factor, 1.0).to(like.dtype).view(-1, *[1] * (like.ndim - 1))

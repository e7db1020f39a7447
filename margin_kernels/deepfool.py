"""DeepFool: the distance to the nearest decision boundary by repeated linearisation ([D], [A],
Moosavi-Dezfooli 2016).

At x + Delta, for each candidate class j and reference class r:   gap_j = z_j - z_r,   w_j = grad_x gap_j

    distance to the linearised boundary   |gap_j| / ||w_j||_q        the candidate with the smallest one is stepped to:
    step   p = 2: |gap| w / ||w||_2^2     p = inf: (|gap| / ||w||_1) sign(w)     p = 1: (|gap| / ||w||_inf) sign(w_i)
    e_i, i = argmax |w_i|
           in general |gap| / ||w||_q^q * |w|^(q-1) sign(w): the smallest step in the p norm that reaches it

until the predicted class changes, at most `max_iter` times. All samples move together; finished ones are masked, and
leave the batch where the host looks at the mask anyway. A measurement: the result carries no graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# foolbox adds this to every linearised distance in "total" mode, so that a step ends behind the boundary also where
# overshoot is 0.
TOTAL_SLACK = 1e-4
# How many iterations a CUDA batch runs between two looks at the active mask: a look waits for the device.
CUDA_CHECK_EVERY = 5


class DeepFoolResult(NamedTuple):
    """perturbation [N, *], its p norm [N] (NaN where the logits are), steps taken [N] int64, boundary crossed [N]
    bool, and the class predicted at x + perturbation [N] int64."""

    perturbation: Tensor
    distance: Tensor
    iterations: Tensor
    success: Tensor
    label: Tensor


def deepfool(
    model: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor | None = None,
    p: float = 2,
    max_iter: int = 50,
    overshoot: float = 0.02,
    overshoot_mode: str = "total",
    candidates: int = 10,
    bounds: tuple[float, float] | None = None,
) -> DeepFoolResult:
    """Smallest perturbation in the p norm that changes the prediction, to first order.

    x_next = x_0 + (1 + overshoot) * sum of steps   ("total", as foolbox's L2DeepFoolAttack)
    x_next = x + (1 + overshoot) * step             ("step", as [A])

    Arguments: `model` maps [N, *] to logits [N, C], each row depending on its own sample only (eval mode is the
    caller's to choose); `x` floating [N, *]; `target` int64 [N] or None; `p` 1, 2 or inf; `max_iter` >= 1;
    `overshoot` >= 0; `candidates` the number of largest logits at x taken part in, the prediction included (2 to C;
    larger means all); `bounds` (low, high) clips x + perturbation. Without `target` the reference class is the
    prediction at x. With it, samples predicted as their target are treated so too, and the others the other way
    round ([A], set F): they move until the target is predicted, the reference being whatever is predicted meanwhile.
    Returns DeepFoolResult; distance is that of the perturbation as applied, overshoot included. Raises ValueError
    for an argument out of range.
    """
    _check(x, target, p, max_iter, overshoot, overshoot_mode, candidates, bounds)
    x = x.detach()
    logits = _logits(model, x)
    if logits.shape[1] < 2:
        raise ValueError(f"the model returns {logits.shape[1]} class; DeepFool needs at least 2")
    finite = ~logits.isnan().any(1)
    # stable: equal logits keep the lower class first, as everywhere in this library
    ranking = logits.sort(dim=1, descending=True, stable=True).indices[:, :candidates]
    reference, rivals = ranking[:, 0], ranking[:, 1:]
    toward = torch.zeros_like(finite) if target is None else (reference != target)

    moved, total = x.clone(), torch.zeros_like(x)
    active = finite.clone()
    label, iterations = reference.clone(), torch.zeros_like(reference)
    rows = torch.arange(len(x), device=x.device)  # the samples still in the batch
    goal = reference if target is None else torch.where(toward, target, reference)
    for step in range(max_iter + 1):
        if x.device.type != "cuda" or step % CUDA_CHECK_EVERY == 0:
            rows = rows[active[rows]]
            if len(rows) == 0:
                break
        with torch.enable_grad():
            leaf = moved[rows].requires_grad_(True)
            output = model(leaf)
            predicted = output.detach().argmax(1)
            label[rows] = predicted
            done = torch.where(toward[rows], predicted == goal[rows], predicted != goal[rows])
            finite[rows] &= ~output.detach().isnan().any(1)
            active[rows] &= ~done & finite[rows]
            if step == max_iter:
                break
            delta = _nearest_step(
                output, leaf, _pairs(predicted, goal[rows], rivals[rows], toward[rows]), p, overshoot_mode
            )
        keep = active[rows].view(-1, *[1] * (x.ndim - 1))
        total[rows] += torch.where(keep, delta, 0)
        if overshoot_mode == "total":
            following = x[rows] + (1 + overshoot) * total[rows]
        else:
            following = moved[rows] + (1 + overshoot) * delta
        if bounds is not None:
            following = following.clamp(*bounds)
        moved[rows] = torch.where(keep, following, moved[rows])
        iterations[rows] += active[rows].long()

    crossed = torch.where(toward, label == goal, label != goal) & finite
    perturbation = moved - x
    distance = torch.linalg.vector_norm(perturbation.flatten(1), ord=p, dim=1)
    valid = finite & ~perturbation.flatten(1).isnan().any(1)
    return DeepFoolResult(perturbation, distance.masked_fill(~valid, math.nan), iterations, crossed & valid, label)


def _logits(model: nn.Module | Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(x)
    if logits.ndim != 2 or len(logits) != len(x):
        raise ValueError(f"the model returns {list(logits.shape)} for x {list(x.shape)}; logits [N, C] expected")
    return logits


def _pairs(predicted: Tensor, goal: Tensor, rivals: Tensor, toward: Tensor) -> tuple[Tensor, Tensor]:
    """Classes (upper, lower), [n, m] and [n]: the boundaries z_upper = z_lower that a step may go to. Samples that
    move toward their target have one boundary only, {target, prediction}, repeated so that the batch stays
    rectangular."""
    upper = torch.where(toward[:, None], goal[:, None].expand_as(rivals), rivals)
    lower = torch.where(toward, predicted, goal)
    return upper, lower


def _nearest_step(output: Tensor, leaf: Tensor, pairs: tuple[Tensor, Tensor], p: float, mode: str) -> Tensor:
    """The step [n, *] to the nearest of the linearised boundaries; 0 where no gradient points anywhere."""
    upper, lower = pairs
    gap = output.gather(1, upper) - output.gather(1, lower[:, None])  # [n, m]
    slack = TOTAL_SLACK if mode == "total" else 0.0
    best = torch.full_like(gap[:, 0], math.inf).detach()
    step = torch.zeros_like(leaf)
    for j in range(gap.shape[1]):
        (gradient,) = torch.autograd.grad(gap[:, j].sum(), leaf, retain_graph=j + 1 < gap.shape[1])
        distance, direction = _project(gap[:, j].detach().abs(), gradient, p)
        closer = distance < best
        best = torch.where(closer, distance, best)
        shape = (-1, *[1] * (leaf.ndim - 1))
        step = torch.where(closer.view(shape), (distance + slack).view(shape) * direction, step)
    return step.detach()


def _project(gap: Tensor, gradient: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Distance |gap| / ||w||_q [n] (inf where w = 0) and the direction [n, *] of p norm 1 along which it is
    measured."""
    flat = gradient.flatten(1)
    if p == 2:
        norm = torch.linalg.vector_norm(flat, dim=1)
        direction = flat / norm[:, None]
    elif p == 1:
        norm, where = flat.abs().max(1)  # the first maximum: one coordinate carries the whole step
        direction = torch.zeros_like(flat).scatter(1, where[:, None], flat.gather(1, where[:, None]).sign())
    else:
        norm = flat.abs().sum(1)
        direction = flat.sign()
    dead = norm == 0
    distance = torch.where(dead, math.inf, gap / norm)
    return distance, torch.where(dead[:, None], 0, direction).view_as(gradient)


def _check(
    x: Tensor,
    target: Tensor | None,
    p: float,
    max_iter: int,
    overshoot: float,
    overshoot_mode: str,
    candidates: int,
    bounds: tuple[float, float] | None,
) -> None:
    if not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"x is {x.dtype} {list(x.shape)}; a floating-point tensor [N, *] is expected")
    if target is not None and (target.shape != x.shape[:1] or target.is_floating_point()):
        raise ValueError(f"target is {target.dtype} {list(target.shape)}; int64 [{len(x)}] is expected")
    if p not in (1, 2, math.inf):
        raise ValueError(f"p is {p}; allowed: 1, 2, inf")
    if max_iter < 1:
        raise ValueError(f"max_iter is {max_iter}; allowed: at least 1")
    if not overshoot >= 0:
        raise ValueError(f"overshoot is {overshoot}; allowed: overshoot >= 0")
    if overshoot_mode not in ("total", "step"):
        raise ValueError(f"overshoot_mode is {overshoot_mode!r}; allowed: 'total', 'step'")
    if candidates < 2:
        raise ValueError(f"candidates is {candidates}; allowed: at least 2, the prediction and one rival")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds is {bounds}; allowed: (low, high) with low < high")

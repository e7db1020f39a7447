"""
distance_j = |gap_j| / ||w_j||_q,   choice = argmin_j,   step = distance u,   u = d ||w|| / d w of the chosen w   [N, *]
t    = grad_distance + <grad_step, u>,   n = ||w||_q,   d = |gap| / n,   H = d2n / dw2
dgap = sign(gap) t / n,   dw = -(d / n) t u + d H grad_step     for the chosen candidate, 0 for the others
H v  = (q-1) / n ((|w| / n)^(q-2) v - u <u, v>),   0 for q = 1 and q = inf

Forward: the norms of all candidates (dual_norm), then for each sample the choice, then one program for each tile of the
step. Backward: one program for each sample has <grad_step, u>, then one for each tile of dgradients. Reads the
gradients once, the chosen one again (p = 1: twice), writes the step; backward reads two rows twice and writes N k rows.
q = inf (p = 1): the whole step goes on the first of the largest |w_i|.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .dual_norm import _dual_norm
from .launch import Tile, accumulate, aligned, cdiv, kernel, launch, tile_for
from .numerics import address, divide, dual, narrow, scale_down, slope, slope_power, whole_vectors, widen
from .second import second_derivative

SAMPLES = 128

_INF = tl.constexpr(float("inf"))
_NO_COLUMN = tl.constexpr(2**62)


@triton.jit
def _unit_step(w, norm, first, column, KIND: tl.constexpr, Q: tl.constexpr):
    """u of entries w [ROWS, BLOCK], norm and first [ROWS, 1]; 0 where the norm is 0."""
    if KIND == "max":
        sign = tl.where(w > 0, 1.0, tl.where(w < 0, -1.0, w)).to(w.dtype)
        return tl.where((norm != 0) & (column == first), sign, 0.0)
    else:
        return slope(w, norm, norm, KIND, Q)


@triton.jit
def _curvature(w, v, u, dot, norm, KIND: tl.constexpr, Q: tl.constexpr):
    """H v with dot = <u, v>; the first term is 0 at zero entries for q < 2."""
    if KIND == "max" or KIND == "sum":
        return tl.zeros(w.shape, w.dtype)
    else:
        if KIND == "square":
            inner = v - u * dot
        else:
            a, _ = scale_down(norm)
            ratio = tl.abs(w) * a * divide(tl.full(norm.shape, 1.0, norm.dtype), norm * a)
            # (|w| / n)^(q-2) = (|w| / n)^(q-1) / (|w| / n)
            power = divide(slope_power(ratio, KIND, Q), tl.where(ratio == 0, 1.0, ratio))
            inner = (Q - 1) * (tl.where(ratio == 0, 0.0, power) * v - u * dot)
        return divide(inner, tl.zeros(w.shape, w.dtype) + norm)


@kernel
def _choose(
    gap,  # [N, k]
    gap_stride_n,
    gap_stride_k,
    norms,  # [N, k], contiguous
    active,  # [N] bool or None
    active_stride,
    distance,  # [N]
    choice,  # [N]
    norm,  # [N]: of the chosen candidate; 0 where not active, NaN where anything is not finite
    samples,
    k,
    SAMPLES: tl.constexpr,
):
    ACC: tl.constexpr = norms.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    inside = sample < samples
    best = tl.full([SAMPLES], _INF, ACC)
    chosen = tl.zeros([SAMPLES], tl.int64)
    chosen_norm = tl.load(norms + sample * k, inside, other=0.0)
    poison = tl.zeros([SAMPLES], ACC)
    for j in range(k):
        g = widen(tl.load(gap + sample * gap_stride_n + j * gap_stride_k, inside, other=0.0), ACC)
        n = tl.load(norms + sample * k + j, inside, other=0.0)
        masked = tl.abs(g) == _INF
        poison += tl.where(masked, 0.0, g - g) + (n - n)
        d = tl.where((n == 0) | masked, _INF, divide(tl.abs(g), tl.where(n == 0, 1.0, n)))
        if j == 0:  # norm 0 for a masked class, chosen where all are: no step and no derivative
            chosen_norm = tl.where(masked, 0.0, chosen_norm)
        nearer = d < best
        best = tl.where(nearer, d, best)
        chosen = tl.where(nearer, j, chosen)
        chosen_norm = tl.where(nearer, n, chosen_norm)
    best += poison
    chosen_norm += poison
    chosen = tl.where(poison == 0, chosen, 0)
    if active is not None:
        live = tl.load(active + sample * active_stride, inside, other=0) != 0
        best = tl.where(live, best, 0.0)
        chosen = tl.where(live, chosen, 0)
        chosen_norm = tl.where(live, chosen_norm, 0.0)
    tl.store(distance + sample, best, inside)
    tl.store(choice + sample, chosen, inside)
    tl.store(norm + sample, chosen_norm, inside)


@kernel
def _first_largest(
    gradients,  # [N, k, D], unit stride inside the rows
    stride_n,
    stride_k,
    choice,  # [N]
    norm,  # [N]
    first,  # [N]: the first column where |w| is the norm
    samples,
    length,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = sample < samples
    source = (gradients + sample * stride_n + tl.load(choice + sample, inside, other=0) * stride_k)[:, None]
    n = tl.load(norm + sample, inside, other=0.0)[:, None]
    place = tl.full([ROWS, BLOCK], _NO_COLUMN, tl.int64)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < whole_vectors(length, VEC))
        w = widen(tl.load(address(source, column, VEC), mask, other=0.0), norm.dtype.element_ty)
        place = tl.where(mask & (tl.abs(w) == n) & (column < place), column, place)
    tl.store(first + sample, tl.min(place, 1), inside)


@kernel
def _step(
    gradients,  # [N, k, D], unit stride inside the rows
    stride_n,
    stride_k,
    choice,  # [N]
    distance,  # [N]
    norm,  # [N]
    first,  # [N] for p = 1, else None
    step,  # [N, D]
    samples,
    length,
    KIND: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    ACC: tl.constexpr = norm.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = sample < samples
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None] & (column < whole_vectors(length, VEC))
    source = gradients + sample * stride_n + tl.load(choice + sample, inside, other=0) * stride_k
    w = widen(tl.load(address(source[:, None], column, VEC), mask, other=0.0), ACC)
    n = tl.load(norm + sample, inside, other=0.0)[:, None]
    d = tl.load(distance + sample, inside, other=0.0)[:, None]
    place = column
    if first is not None:
        place = tl.load(first + sample, inside, other=0)[:, None]
    # A flat sample has distance infinity, and one that is not active may hold NaN: both have norm 0.
    value = tl.where(n == 0, 0.0, d * _unit_step(w, n, place, column, KIND, Q))
    destination = address((step + sample * length)[:, None], column, VEC)
    tl.store(destination, narrow(value, step.dtype.element_ty), mask)


@kernel
def _reduce(
    grad_step,  # [N, D], contiguous, or None
    grad_distance,  # [N] or None
    distance_stride,
    gap,  # [N, k]
    gap_stride_n,
    gap_stride_k,
    gradients,  # [N, k, D], unit stride inside the rows
    stride_n,
    stride_k,
    choice,  # [N]
    norm,  # [N]
    first,  # [N] for p = 1, else None
    sums,  # [N, 3]: <grad_step, u>, t, |gap| / n
    dgap,  # [N, k], contiguous, 0 but for the chosen candidates
    samples,
    k,
    length,
    KIND: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    ACC: tl.constexpr = norm.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = sample < samples
    n = tl.load(norm + sample, inside, other=0.0)
    chosen = tl.load(choice + sample, inside, other=0)
    g = widen(tl.load(gap + sample * gap_stride_n + chosen * gap_stride_k, inside, other=0.0), ACC)
    t = tl.zeros([ROWS], ACC)
    if grad_distance is not None:
        t += widen(tl.load(grad_distance + sample * distance_stride, inside, other=0.0), ACC)
    dot = tl.zeros([ROWS], ACC)
    if grad_step is not None:
        source = (gradients + sample * stride_n + chosen * stride_k)[:, None]
        arriving = (grad_step + sample * length)[:, None]
        lanes = tl.zeros([ROWS, BLOCK], ACC)
        for start in range(0, length, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            mask = inside[:, None] & (column < whole_vectors(length, VEC))
            w = widen(tl.load(address(source, column, VEC), mask, other=0.0), ACC)
            v = widen(tl.load(address(arriving, column, VEC), mask, other=0.0), ACC)
            place = column
            if first is not None:
                place = tl.load(first + sample, inside, other=0)[:, None]
            u = _unit_step(w, n[:, None], place, column, KIND, Q)
            lanes += tl.where(mask & (u != 0), u * v, 0.0)
        dot = tl.sum(lanes, 1)
    t += dot
    flat = n == 0
    safe = tl.where(flat, 1.0, n)
    tl.store(sums + sample * 3, dot, inside)
    tl.store(sums + sample * 3 + 1, t, inside)
    tl.store(sums + sample * 3 + 2, tl.where(flat, 0.0, divide(tl.abs(g), safe)), inside)
    sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g)).to(ACC)
    value = tl.where(flat, 0.0, divide(sign * t, safe))
    tl.store(dgap + sample * k + chosen, narrow(value, dgap.dtype.element_ty), inside)


@kernel
def _backward(
    grad_step,  # [N, D], contiguous, or None
    gradients,  # [N, k, D], unit stride inside the rows
    stride_n,
    stride_k,
    choice,  # [N]
    norm,  # [N]
    first,  # [N] for p = 1, else None
    sums,  # [N, 3]
    dgradients,  # [N, k, D], contiguous
    rows,  # N * k
    k,
    length,
    KIND: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    ACC: tl.constexpr = norm.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    sample = row // k
    chosen = inside & (tl.load(choice + sample, inside, other=0) == row % k)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_columns = column < whole_vectors(length, VEC)
    mask = chosen[:, None] & in_columns  # the other candidates' gradients are not read
    source = gradients + sample * stride_n + (row % k) * stride_k
    w = widen(tl.load(address(source[:, None], column, VEC), mask, other=0.0), ACC)
    n = tl.load(norm + sample, chosen, other=0.0)[:, None]
    dot = tl.load(sums + sample * 3, chosen, other=0.0)[:, None]
    t = tl.load(sums + sample * 3 + 1, chosen, other=0.0)[:, None]
    d = tl.load(sums + sample * 3 + 2, chosen, other=0.0)[:, None]
    place = column
    if first is not None:
        place = tl.load(first + sample, chosen, other=0)[:, None]
    safe = tl.where(n == 0, 1.0, n)
    u = _unit_step(w, n, place, column, KIND, Q)
    value = -divide(d, safe) * t * u
    if grad_step is not None:
        v = widen(tl.load(address((grad_step + sample * length)[:, None], column, VEC), mask, other=0.0), ACC)
        value += d * _curvature(w, v, u, dot, safe, KIND, Q)
    value = tl.where(chosen[:, None] & (n != 0), value, 0.0)
    destination = address((dgradients + row * length)[:, None], column, VEC)
    tl.store(destination, narrow(value, dgradients.dtype.element_ty), inside[:, None] & in_columns)


def _rows(gradients: Tensor) -> tuple[Tensor, Tile]:
    """[N, k, D] with unit stride inside aligned rows: a view where there is one."""
    n, k = gradients.shape[:2]
    g = gradients.reshape(n, k, math.prod(gradients.shape[2:]))
    tile = tile_for(g.shape[2], g.dtype)
    if not ((g.stride(2) == 1 or g.shape[2] == 1) and aligned(g, tile.vec, 2)):
        g = g.clone(memory_format=torch.contiguous_format)
    return g, tile


def _first(g: Tensor, tile: Tile, choice: Tensor, norm: Tensor) -> Tensor:
    first = torch.empty_like(choice)
    arguments = (g, g.stride(0), g.stride(1), choice, norm, first, g.shape[0], g.shape[2])
    launch(_first_largest, (cdiv(g.shape[0], tile.rows),), g, *arguments, **tile.constants)
    return first


@torch.library.custom_op("margin_kernels_triton::deepfool_step", mutates_args=())
def _deepfool_step(
    gap: Tensor, gradients: Tensor, active: Tensor | None, p: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, k), acc, device = gap.shape, accumulate(gap.dtype, gradients.dtype), gap.device
    distance, norm = (torch.empty(n, dtype=acc, device=device) for _ in range(2))
    choice = torch.empty(n, dtype=torch.int64, device=device)
    step = torch.empty(n, *gradients.shape[2:], dtype=gradients.dtype, device=device)
    if n == 0:
        return step, distance, choice, norm
    g, tile = _rows(gradients)
    kind, q = dual(p)
    norms = _dual_norm([g.to(acc) if acc == torch.float64 else g], p, 2)
    mask = (active, 0 if active is None else active.stride(0))
    arguments = (gap, *gap.stride(), norms, *mask, distance, choice, norm, n, k)
    launch(_choose, (cdiv(n, SAMPLES),), gap, *arguments, SAMPLES=SAMPLES)
    first = _first(g, tile, choice, norm) if kind == "max" else None
    grid = (cdiv(n, tile.rows), cdiv(g.shape[2], tile.block))
    arguments = (g, g.stride(0), g.stride(1), choice, distance, norm, first, step, n, g.shape[2])
    launch(_step, grid, gap, *arguments, KIND=kind, Q=q, **tile.constants)
    return step, distance, choice, norm


@_deepfool_step.register_fake
def _(gap, gradients, active, p):
    n, acc = gap.shape[0], accumulate(gap.dtype, gradients.dtype)
    return (
        gradients.new_empty(n, *gradients.shape[2:]),
        gap.new_empty(n, dtype=acc),
        gap.new_empty(n, dtype=torch.int64),
        gap.new_empty(n, dtype=acc),
    )


@torch.library.custom_op("margin_kernels_triton::deepfool_step_backward", mutates_args=())
def _deepfool_step_backward(
    grad_step: Tensor | None,
    grad_distance: Tensor | None,
    gap: Tensor,
    gradients: Tensor,
    choice: Tensor,
    norm: Tensor,
    active: Tensor | None,
    p: float,
) -> tuple[Tensor, Tensor]:
    (n, k), device = gap.shape, gap.device
    dgap = torch.zeros(n, k, dtype=gap.dtype, device=device)
    dgradients = torch.empty(gradients.shape, dtype=gradients.dtype, device=device)
    if n == 0:
        return dgap, dgradients
    g, tile = _rows(gradients)
    kind, q = dual(p)
    choice, norm, length = choice.contiguous(), norm.contiguous(), g.shape[2]
    first = _first(g, tile, choice, norm) if kind == "max" else None
    if grad_step is not None:
        grad_step = grad_step.reshape(n, length).to(gradients.dtype).contiguous()
        if not aligned(grad_step, tile.vec):
            grad_step = grad_step.clone()
    sums = torch.empty(n, 3, dtype=norm.dtype, device=device)
    distance = (grad_distance, 0 if grad_distance is None else grad_distance.stride(0))
    row = (g, g.stride(0), g.stride(1), choice, norm, first)
    arguments = (grad_step, *distance, gap, *gap.stride(), *row, sums, dgap, n, k, length)
    launch(_reduce, (cdiv(n, tile.rows),), gap, *arguments, KIND=kind, Q=q, **tile.constants)
    grid = (cdiv(n * k, tile.rows), cdiv(length, tile.block))
    arguments = (grad_step, *row, sums, dgradients, n * k, k, length)
    launch(_backward, grid, gap, *arguments, KIND=kind, Q=q, **tile.constants)
    return dgap, dgradients


@_deepfool_step_backward.register_fake
def _(grad_step, grad_distance, gap, gradients, choice, norm, active, p):
    contiguous = torch.contiguous_format
    return torch.empty_like(gap, memory_format=contiguous), torch.empty_like(gradients, memory_format=contiguous)


def _save(ctx, inputs, output):
    gap, gradients, active, ctx.p = inputs
    _, _, choice, norm = output
    ctx.save_for_backward(gap, gradients, choice, norm, active)
    ctx.mark_non_differentiable(choice, norm)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_step, grad_distance, _choice, _norm):
    if grad_step is None and grad_distance is None:
        return None, None, None, None
    return *_deepfool_step_backward(grad_step, grad_distance, *ctx.saved_tensors, ctx.p), None, None


_deepfool_step.register_autograd(_differentiate, setup_context=_save)


def _save_backward(ctx, inputs, output):
    grad_step, grad_distance, gap, gradients, _, _, active, ctx.p = inputs
    ctx.save_for_backward(grad_step, grad_distance, gap, gradients, active)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx, from_gap, from_gradients):
    grad_step, grad_distance, gap, gradients, active = ctx.saved_tensors
    (d_step, d_distance), (d_gap, d_gradients) = second_derivative(
        lambda g, w: reference.deepfool_step(g, w, active, ctx.p)[:2],
        [gap, gradients],
        [grad_step, grad_distance],
        [from_gap, from_gradients],
    )
    return d_step, d_distance, d_gap, d_gradients, None, None, None, None


_deepfool_step_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)


def deepfool_step(gap: Tensor, gradients: Tensor, active: Tensor | None, p: float) -> tuple[Tensor, Tensor, Tensor]:
    step, distance, choice, _ = _deepfool_step(gap, gradients, active, float(p))
    return step, distance, choice

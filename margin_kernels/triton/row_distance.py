"""
norm[n,j] = || rows[index[n,j]] - rows[target[n]] ||_q,   q = p / (p - 1)                                    [N, k]
drows     = sum over pairs of grad u (e_index - e_target),   u = d norm / d difference                       [C, D]

Forward: one program for a tile of pairs; it reads both rows of each, and no difference is ever stored. Backward: the
two contributions of each pair are sorted by class on the device; one program for each class and tile of columns adds
those of its class in the order of the pairs, so that the sum has a fixed order without atomics, and stores them once.
A pair with an index or a target outside [0, C) is NaN and contributes nothing.
"""

import torch
import triton.language as tl
from torch import Tensor

from .. import reference
from .launch import accumulate, cdiv, kernel, launch, readable, tile_for
from .numerics import add_magnitudes, address, dual, narrow, norm_of, slope, whole_vectors, widen
from .second import second_derivative


@kernel
def _forward(
    rows,  # [C, D], rows row_stride apart
    row_stride,
    index,  # [N * k]
    target,  # [N]
    norms,  # [N * k]; COUNT: read
    ties,  # [N * k] int32, how many entries attain the maximum; only for COUNT
    pairs,  # N * k
    k,
    classes,
    length,
    COUNT: tl.constexpr,
    KIND: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """The norms, or with COUNT the number of entries that attain a maximum norm."""
    ACC: tl.constexpr = norms.dtype.element_ty
    pair = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = pair < pairs
    i = tl.load(index + pair, inside, other=0)
    y = tl.load(target + pair // k, inside, other=0)
    valid = (i >= 0) & (i < classes) & (y >= 0) & (y < classes)
    readable_pair = (inside & valid)[:, None]
    a = (rows + i * row_stride)[:, None]
    b = (rows + y * row_stride)[:, None]
    largest = tl.zeros([ROWS], ACC)
    total = tl.zeros([ROWS], ACC)
    lanes = tl.zeros([ROWS, BLOCK], tl.int32)
    if COUNT:
        norm = tl.load(norms + pair, inside, other=0.0)[:, None]
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = readable_pair & (column < whole_vectors(length, VEC))
        first = widen(tl.load(address(a, column, VEC), mask, other=0.0), ACC)
        second = widen(tl.load(address(b, column, VEC), mask, other=0.0), ACC)
        if COUNT:
            lanes += (mask & (tl.abs(first - second) == norm)).to(tl.int32)
        else:
            largest, total = add_magnitudes(largest, total, tl.abs(first - second), KIND, Q)
    if COUNT:
        tl.store(ties + pair, tl.sum(lanes, 1), inside)
    else:
        tl.store(norms + pair, tl.where(valid, norm_of(largest, total, KIND, Q), float("nan")), inside)


@kernel
def _backward(
    grad,  # [N * k]
    rows,  # [C, D], rows row_stride apart
    row_stride,
    index,  # [N * k]
    target,  # [N]
    norms,  # [N * k]
    ties,  # [N * k] int32 for p = 1, else None
    order,  # [2 N k]: numbers of the contributions by class; below N k that of the index, above that of the target
    starts,  # [C + 1]: where the contributions of each class begin in `order`
    drows,  # [C, D]
    pairs,  # N * k
    k,
    length,
    KIND: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    ACC: tl.constexpr = norms.dtype.element_ty
    class_ = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = column < whole_vectors(length, VEC)
    none = tl.zeros([1, 1], tl.int64)
    total = tl.zeros([1, BLOCK], ACC)
    for position in range(tl.load(starts + class_), tl.load(starts + class_ + 1)):
        which = tl.load(order + position)
        pair = which % pairs + none
        a = rows + tl.load(index + pair) * row_stride
        b = rows + tl.load(target + pair // k) * row_stride
        first = widen(tl.load(address(a, column, VEC), mask, other=0.0), ACC)
        second = widen(tl.load(address(b, column, VEC), mask, other=0.0), ACC)
        norm = tl.load(norms + pair)
        tied = norm
        if KIND == "max":
            tied = tl.load(ties + pair).to(ACC)
        u = widen(tl.load(grad + pair), ACC) * slope(first - second, norm, tied, KIND, Q)
        u = tl.where(norm == 0, 0.0, u)
        total += tl.where(which < pairs, u, -u)
    destination = address(drows + class_ * length + none, column, VEC)
    tl.store(destination, narrow(total, drows.dtype.element_ty), mask)


@torch.library.custom_op("margin_kernels_triton::row_distance", mutates_args=())
def _row_distance(rows: Tensor, index: Tensor, target: Tensor, p: float) -> Tensor:
    return _launch_forward(rows, index, target, p, None)


def _launch_forward(rows: Tensor, index: Tensor, target: Tensor, p: float, norms: Tensor | None) -> Tensor:
    """The norms [N, k]; where they are given, the number of entries that attain them."""
    (classes, length), (n, k) = rows.shape, index.shape
    tile = tile_for(length, rows.dtype)
    w = readable(rows, tile.vec)
    kind, q = dual(p)
    count = norms is not None
    ties = torch.empty(n, k, dtype=torch.int32, device=w.device) if count else None
    if norms is None:
        norms = torch.empty(n, k, dtype=accumulate(w.dtype), device=w.device)
    arguments = (w, w.stride(0), index.contiguous(), target.contiguous(), norms, ties, n * k, k, classes, length)
    grid = (cdiv(n * k, tile.rows),)
    launch(_forward, grid, w, *arguments, COUNT=count, KIND=kind, Q=q, **tile.constants)
    return norms if ties is None else ties


@_row_distance.register_fake
def _(rows, index, target, p):
    return rows.new_empty(index.shape, dtype=accumulate(rows.dtype))


@torch.library.custom_op("margin_kernels_triton::row_distance_backward", mutates_args=())
def _row_distance_backward(grad: Tensor, rows: Tensor, index: Tensor, target: Tensor, norm: Tensor, p: float) -> Tensor:
    (classes, length), (n, k) = rows.shape, index.shape
    if n == 0:
        return torch.zeros(classes, length, dtype=rows.dtype, device=rows.device)
    tile = tile_for(length, rows.dtype)
    w, norms = readable(rows, tile.vec), norm.contiguous()
    kind, q = dual(p)
    ties = _launch_forward(rows, index, target, p, norms) if kind == "max" else None
    label = target.unsqueeze(1)
    valid = (index >= 0) & (index < classes) & (label >= 0) & (label < classes)
    # Class C stands for no class: nothing reads what is sorted there. A stable sort keeps the order of the pairs.
    contributions = torch.stack([torch.where(valid, index, classes), torch.where(valid, label, classes)]).flatten()
    sorted_classes, order = torch.sort(contributions, stable=True)
    starts = torch.searchsorted(sorted_classes, torch.arange(classes + 1, device=w.device))
    drows = torch.empty(classes, length, dtype=w.dtype, device=w.device)
    pair = (index.contiguous(), target.contiguous(), norms, ties)
    arguments = (grad.contiguous(), w, w.stride(0), *pair, order, starts, drows, n * k, k, length)
    grid = (classes, cdiv(length, tile.block))
    launch(_backward, grid, w, *arguments, KIND=kind, Q=q, BLOCK=tile.block, VEC=tile.vec)
    return drows


@_row_distance_backward.register_fake
def _(grad, rows, index, target, norm, p):
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    *tensors, ctx.p = inputs
    ctx.save_for_backward(*tensors, output)


def _differentiate(ctx, grad):
    return _row_distance_backward(grad, *ctx.saved_tensors, ctx.p), None, None, None


_row_distance.register_autograd(_differentiate, setup_context=_save)


def _save_backward(ctx, inputs, output):
    grad, rows, index, target, _, ctx.p = inputs
    ctx.save_for_backward(grad, rows, index, target)


def _differentiate_backward(ctx, v):
    """The norm counts as a function of the rows. The differences [N, k, D] exist here and nowhere else."""
    grad, rows, index, target = ctx.saved_tensors
    (d_grad,), (d_rows,) = second_derivative(
        lambda w: [reference.row_distance(w, index, target, ctx.p)], [rows], [grad], [v]
    )
    return d_grad, d_rows, None, None, None, None


_row_distance_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)


def row_distance(rows: Tensor, index: Tensor, target: Tensor, p: float) -> Tensor:
    return _row_distance(rows, index, target, float(p))

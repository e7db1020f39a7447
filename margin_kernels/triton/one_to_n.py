"""
A_c  = logsumexp over j with y_j != c of max(z[j,c], -delta)      (+ delta for bound = "positive")               [C]
L_i  = softplus(A_{y_i} - a_i),  a_i = min(z[i,y_i], delta);  with cross_entropy logaddexp(A_{y_i}, l_i) - a_i    [N]
s_i  = sigmoid(A_{y_i} - a_i)  (with cross_entropy sigmoid(A_{y_i} - l_i)),  S_c = sum of grad_i s_i over y_i = c
dz   = S_c exp(max(z, -delta) - A_c) 1[z > -delta]  for y_j != c;   -grad_i s_i 1[z < delta]  at the label;
       with cross_entropy -grad_i 1[z < delta] at the label, and grad_i (1 - s_i) softmax_i everywhere

Forward: a program for each 128 columns and 256 rows leaves one maximum and one sum for each column; a second kernel
merges those of a column in the order of the rows; a third has the losses. Backward: s, then S, then dz, stored once.
Reads N C elements (with cross_entropy twice more, from cache while a row fits), backward the same and writes N C.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .launch import accumulate, cdiv, kernel, launch, readable, tile_for
from .numerics import address, divide, log1p, narrow, whole_vectors, widen
from .second import second_derivative

COLUMNS = 128
TILE_ROWS = 16
CHUNK_ROWS = 256

_INF = tl.constexpr(float("inf"))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), exact for small exp(x) too."""
    return tl.where(x > 0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return divide(tl.where(x >= 0, 1.0, e).to(x.dtype), 1 + e)


@triton.jit
def _finite_or_nan(z, usable):
    """z; NaN where it is NaN or +inf or the row's target is outside [0, C). -inf is a masked class."""
    return tl.where(usable, tl.where(z == -_INF, z, z + (z - z)), float("nan"))


@kernel
def _columns(
    logits,  # [N, C], rows row_stride apart
    row_stride,
    target,  # [N]
    parts,  # [S, 2, C]: largest bounded logit of each column in a chunk of rows, sum of exp(b - largest)
    samples,
    classes,
    delta: tl.float64,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    ACC: tl.constexpr = parts.dtype.element_ty
    chunk = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_columns = column < whole_vectors(classes, VEC)
    delta = tl.full([1, 1], delta, ACC)
    # Every negative is at least -delta, so the sum is 0 only where there is none.
    largest = tl.zeros([1, BLOCK], ACC) - delta
    total = tl.zeros([1, BLOCK], ACC)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, samples), ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        y = tl.load(target + row, row < samples, other=0)
        mask = (row < samples) & in_columns
        z = widen(tl.load(address(logits + row * row_stride, column, VEC), mask, other=0.0), ACC)
        z = _finite_or_nan(z, (y >= 0) & (y < classes))
        b = tl.where(z <= -delta, -delta, z)
        negative = mask & (y != column)
        larger = tl.maximum(largest, tl.max(tl.where(negative & (b == b), b, -delta), 0)[None, :])
        total = total * tl.exp(largest - larger)
        total += tl.sum(tl.where(negative, tl.exp(b - larger), 0.0), 0)[None, :]
        largest = larger
    place = parts + chunk * 2 * classes + column
    tl.store(place, largest, in_columns)
    tl.store(place + classes, total, in_columns)


@kernel
def _merge(
    parts,  # [S, 2, C]
    columns,  # [C]
    classes,
    chunks,
    delta: tl.float64,
    lift: tl.float64,  # delta for bound = "positive", else 0
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = columns.dtype.element_ty
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    largest = -tl.full([BLOCK], delta, ACC)
    total = tl.zeros([BLOCK], ACC)
    for chunk in range(chunks):
        place = parts + tl.full([BLOCK], 2, tl.int64) * chunk * classes + column
        top = tl.load(place, inside, other=0.0)
        part = tl.load(place + classes, inside, other=0.0)
        larger = tl.maximum(largest, top)
        total = total * tl.exp(largest - larger) + part * tl.exp(top - larger)
        largest = larger
    value = tl.where(total == 0, -_INF, largest + tl.log(tl.where(total == 0, 1.0, total)))
    tl.store(columns + column, value + tl.full([BLOCK], lift, ACC), inside)


@triton.jit
def _own(logits, row_stride, target, columns, row, inside, classes, ACC: tl.constexpr):
    """(y, whether it is a class, z[i, y_i], A_{y_i}) of rows [ROWS]; NaN for both where it is not."""
    y = tl.load(target + row, inside, other=0)
    labelled = (y >= 0) & (y < classes)
    safe = tl.where(labelled, y, 0)
    z = _finite_or_nan(widen(tl.load(logits + row * row_stride + safe, inside, other=0.0), ACC), labelled)
    return y, labelled, z, tl.where(labelled, tl.load(columns + safe, inside, other=0.0), float("nan"))


@kernel
def _losses(
    logits,  # [N, C], rows row_stride apart
    row_stride,
    target,  # [N]
    columns,  # [C]
    loss,  # [N]
    normalizer,  # [N]: logsumexp of each row, or None without cross-entropy
    samples,
    classes,
    delta: tl.float64,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    ACC: tl.constexpr = loss.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < samples
    delta = tl.full([1], delta, ACC)
    _, labelled, z_label, against = _own(logits, row_stride, target, columns, row, inside, classes, ACC)
    a = tl.where(z_label >= delta, delta, z_label)
    if normalizer is None:
        value = _softplus(against - a)
        value = tl.where(against == -_INF, 0.0, value)
    else:
        source = (logits + row * row_stride)[:, None]
        largest = tl.full([ROWS, BLOCK], -_INF, ACC)
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            mask = inside[:, None] & (column < whole_vectors(classes, VEC))
            largest = tl.maximum(largest, widen(tl.load(address(source, column, VEC), mask, other=-_INF), ACC))
        # A row whose classes are all masked sums to 0, relative to 0.
        top = tl.max(largest, 1)
        top = tl.where(top == -_INF, 0.0, top)
        lanes = tl.zeros([ROWS, BLOCK], ACC)
        for start in range(0, classes, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            mask = inside[:, None] & (column < whole_vectors(classes, VEC))
            z = widen(tl.load(address(source, column, VEC), mask, other=0.0), ACC)
            lanes += tl.where(mask & (z != -_INF), tl.exp(z - top[:, None]) + (z - z), 0.0)
        total = tl.sum(lanes, 1)
        log_sum = tl.where(total == 0, -_INF, top + tl.log(tl.where(total == 0, 1.0, total)))
        log_sum = tl.where(labelled, log_sum, float("nan"))
        tl.store(normalizer + row, log_sum, inside)
        value = tl.where(against == -_INF, 0.0, _softplus(against - log_sum)) + (log_sum - a)
        value = tl.where(log_sum == -_INF, against - a, value)
    tl.store(loss + row, value, inside)


@kernel
def _weights(
    grad,  # [N]
    grad_stride,
    logits,  # [N, C], rows row_stride apart
    row_stride,
    target,  # [N]
    columns,  # [C]
    normalizer,  # [N] or None
    shares,  # [N]: grad_i s_i
    samples,
    classes,
    delta: tl.float64,
    ROWS: tl.constexpr,
):
    ACC: tl.constexpr = shares.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < samples
    _, _, z_label, against = _own(logits, row_stride, target, columns, row, inside, classes, ACC)
    delta = tl.full([1], delta, ACC)
    positive = tl.where(z_label >= delta, delta, z_label)
    if normalizer is not None:
        positive = tl.load(normalizer + row, inside, other=0.0)
    share = tl.where(against == -_INF, 0.0, _sigmoid(against - positive))
    g = widen(tl.load(grad + row * grad_stride, inside, other=0.0), ACC)
    tl.store(shares + row, g * share, inside)


@kernel
def _class_sums(
    target,  # [N]
    shares,  # [N]
    sums,  # [C]: S_c
    samples,
    classes,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for a tile of classes: it runs over all samples, in order."""
    class_ = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    lanes = tl.zeros([ROWS, BLOCK], sums.dtype.element_ty)
    for start in range(0, samples, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        y = tl.load(target + row, row < samples, other=-1)
        share = tl.load(shares + row, row < samples, other=0.0)
        lanes += tl.where(y == class_, share, 0.0)
    tl.store(sums + class_, tl.sum(lanes, 0)[None, :], class_ < classes)


@kernel
def _backward(
    grad,  # [N]
    grad_stride,
    logits,  # [N, C], rows row_stride apart
    row_stride,
    target,  # [N]
    columns,  # [C]
    normalizer,  # [N] or None
    shares,  # [N]
    sums,  # [C]
    dlogits,  # [N, C]
    samples,
    classes,
    delta: tl.float64,
    lift: tl.float64,  # delta for bound = "positive", else 0
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """One program for each tile of dlogits."""
    ACC: tl.constexpr = sums.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    in_columns = column < whole_vectors(classes, VEC)
    mask = (row < samples) & in_columns
    delta = tl.full([1, 1], delta, ACC)
    y = tl.load(target + row, row < samples, other=0)
    z = widen(tl.load(address(logits + row * row_stride, column, VEC), mask, other=0.0), ACC)
    z = _finite_or_nan(z, (y >= 0) & (y < classes))
    against = tl.load(columns + column, in_columns, other=0.0)
    total = tl.load(sums + column, in_columns, other=0.0)
    share = tl.load(shares + row, row < samples, other=0.0)
    g = widen(tl.load(grad + row * grad_stride, row < samples, other=0.0), ACC)
    # A is at least b, so the exponent is at most 0 but for rounding.
    exponent = z + tl.full([1, 1], lift, ACC) - against
    negative = tl.where(z <= -delta, 0.0, total * tl.exp(exponent))
    at_label = -share
    if normalizer is not None:
        at_label = -g
    # z - z is 0, or NaN where z is
    masked = z == -_INF
    label = tl.where(z >= delta, 0.0, tl.where(masked, 0.0, z - z) + at_label)
    dz = tl.where(y == column, label, negative)
    if normalizer is not None:
        log_sum = tl.load(normalizer + row, row < samples, other=0.0)
        dz += tl.where(masked & (log_sum == log_sum), 0.0, (g - share) * tl.exp(z - log_sum))
    destination = address(dlogits + row * classes, column, VEC)
    tl.store(destination, narrow(dz, dlogits.dtype.element_ty), mask)


@torch.library.custom_op("margin_kernels_triton::one_to_n", mutates_args=())
def _one_to_n(
    logits: Tensor, target: Tensor, delta: float, bound: str, cross_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (n, classes), acc = logits.shape, accumulate(logits.dtype)
    tile = tile_for(classes, logits.dtype)
    z, y = readable(logits, tile.vec), target.contiguous()
    chunks = cdiv(n, CHUNK_ROWS)
    loss, columns = torch.empty(n, dtype=acc, device=z.device), torch.empty(classes, dtype=acc, device=z.device)
    normalizer = torch.empty(n if cross_entropy else 0, dtype=acc, device=z.device)
    parts = torch.empty(chunks, 2, classes, dtype=acc, device=z.device)
    block = {"BLOCK": COLUMNS, "ROWS": TILE_ROWS, "VEC": tile.vec, "CHUNK": CHUNK_ROWS}
    grid = (cdiv(classes, COLUMNS), chunks)
    launch(_columns, grid, z, z, z.stride(0), y, parts, n, classes, delta, **block)
    lift = delta if bound == "positive" else 0.0
    launch(_merge, (cdiv(classes, COLUMNS),), z, parts, columns, classes, chunks, delta, lift, BLOCK=COLUMNS)
    rows = (z, z.stride(0), y, columns, loss, normalizer if cross_entropy else None, n, classes, delta)
    launch(_losses, (cdiv(n, tile.rows),), z, *rows, **tile.constants)
    return loss, columns, normalizer


@_one_to_n.register_fake
def _(logits, target, delta, bound, cross_entropy):
    (n, classes), acc = logits.shape, accumulate(logits.dtype)
    return (
        logits.new_empty(n, dtype=acc),
        logits.new_empty(classes, dtype=acc),
        logits.new_empty(n if cross_entropy else 0, dtype=acc),
    )


@torch.library.custom_op("margin_kernels_triton::one_to_n_backward", mutates_args=())
def _one_to_n_backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    column: Tensor,
    normalizer: Tensor,
    delta: float,
    bound: str,
    cross_entropy: bool,
) -> Tensor:
    (n, classes), acc = logits.shape, column.dtype
    tile = tile_for(classes, logits.dtype)
    z, y, columns = readable(logits, tile.vec), target.contiguous(), column.contiguous()
    rows = (grad, grad.stride(0), z, z.stride(0), y, columns, normalizer.contiguous() if cross_entropy else None)
    shares, sums = torch.empty(n, dtype=acc, device=z.device), torch.empty(classes, dtype=acc, device=z.device)
    dlogits = torch.empty(n, classes, dtype=z.dtype, device=z.device)
    launch(_weights, (cdiv(n, 128),), z, *rows, shares, n, classes, delta, ROWS=128)
    launch(_class_sums, (cdiv(classes, COLUMNS),), z, y, shares, sums, n, classes, ROWS=TILE_ROWS, BLOCK=COLUMNS)
    lift = delta if bound == "positive" else 0.0
    grid = (cdiv(n, tile.rows), cdiv(classes, tile.block))
    arguments = (*rows, shares, sums, dlogits, n, classes, delta, lift)
    launch(_backward, grid, z, *arguments, **tile.constants)
    return dlogits


@_one_to_n_backward.register_fake
def _(grad, logits, target, column, normalizer, delta, bound, cross_entropy):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    logits, target, ctx.delta, ctx.bound, ctx.cross_entropy = inputs
    _, column, normalizer = output
    ctx.save_for_backward(logits, target, column, normalizer)
    ctx.mark_non_differentiable(column, normalizer)


def _differentiate(ctx, grad, _column, _normalizer):
    options = (ctx.delta, ctx.bound, ctx.cross_entropy)
    return _one_to_n_backward(grad, *ctx.saved_tensors, *options), None, None, None, None


_one_to_n.register_autograd(_differentiate, setup_context=_save)


def _save_backward(ctx, inputs, output):
    grad, logits, target, _, _, *ctx.options = inputs
    ctx.save_for_backward(grad, logits, target)


def _differentiate_backward(ctx, v):
    grad, logits, target = ctx.saved_tensors
    (d_grad,), (d_logits,) = second_derivative(
        lambda z: [reference.one_to_n(z, target, *ctx.options)], [logits], [grad], [v]
    )
    return d_grad, d_logits, *[None] * 6


_one_to_n_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)


def one_to_n(logits: Tensor, target: Tensor, delta: float, bound: str, cross_entropy: bool) -> Tensor:
    loss, _, _ = _one_to_n(logits, target, float(delta), bound, cross_entropy)
    return loss

"""
index = the k largest z[n, i] with i != y[n], decreasing, equal logits: lowest class first      [N, k] int64
gap   = z[n, index] - z[n, y[n]]        nll = logsumexp_i z[n, i] - z[n, y[n]]                  [N, k], [N]
dz    = g_nll (softmax(z) - e_y) + sum_j g_gap_j (e_index_j - e_y)                              [N, C]

Forward: one program for a tile of rows; it runs over the row once for each competitor and once for the sum of
exponentials, of which only the first read comes from memory, the others from cache. The next competitor is the first
class behind the last one in the order (larger logit, then lower class): nothing is marked or sorted, any k will do.
Rows above 65536 classes: one program for each 16384 of them, then one for each row that merges their lists.
Reads N C elements, writes 2 N k + 3 N numbers. Backward reads and writes N C elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulate, cdiv, kernel, launch, readable, tile_for
from .numerics import address, narrow, whole_vectors, widen

LONG = 65536
SHORTEST_CHUNK = 16384

_INF = tl.constexpr(float("inf"))
_NO_CLASS = tl.constexpr(2**31 - 1)


@triton.jit
def _next(
    values, places, begin, end, inside, y, last, last_place,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(value, class) [ROWS] of the first class of columns [begin, end) that is not y and comes behind `last`.

    values [ROWS, 1]: addresses of the rows. places: the same for the classes, or None where they are the columns.
    """
    best = tl.full([ROWS, BLOCK], -_INF, ACC)
    place = tl.full([ROWS, BLOCK], _NO_CLASS, tl.int32)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = inside & (column < whole_vectors(end, VEC))
        value = widen(tl.load(address(values, column, VEC), mask, other=0.0), ACC)
        if places is None:
            where = column
        else:
            where = tl.load(places + column, mask, other=0)
        behind = (value < last[:, None]) | ((value == last[:, None]) & (where > last_place[:, None]))
        # Classes come in increasing order, so an equal one does not replace the one that a lane holds.
        up = mask & behind & (where != y[:, None]) & (value > best)
        best = tl.where(up, value, best)
        place = tl.where(up, where, place)
    first = tl.max(best, 1)
    return first, tl.min(tl.where(best == first[:, None], place, _NO_CLASS), 1)


@triton.jit
def _sum_exp(
    values, begin, end, inside, top,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sum of exp(z - top) over columns [begin, end) of every row, [ROWS]; NaN where one of them is not finite."""
    lanes = tl.zeros([ROWS, BLOCK], ACC)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = inside & (column < whole_vectors(end, VEC))
        value = widen(tl.load(address(values, column, VEC), mask, other=0.0), ACC)
        lanes += tl.where(mask, tl.exp(value - top[:, None]) + value * 0, 0.0)
    return tl.sum(lanes, 1)


@triton.jit
def _put(index, gap, j, usable, value, place, y, z_label, inside):
    """Competitor j of each row. Unusable rows hold the first classes other than the label, and NaN."""
    tl.store(index + j, tl.where(usable, place, j + (j >= y).to(tl.int32)).to(tl.int64), inside)
    tl.store(gap + j, tl.where(usable, value - z_label, float("nan")), inside)


@kernel
def _forward(
    logits,  # [N, C], rows row_stride apart
    row_stride,
    target,  # [N]
    target_stride,
    index,  # [N, k];     CHUNK: classes of the chunks' competitors [N, S, k] int32
    gap,  # [N, k];       CHUNK: their logits [N, S, k]
    nll,  # [N];          CHUNK: not read
    normalizer,  # [N, 2];CHUNK: [N, S, 2], largest logit of the chunk and sum of exp(z - largest)
    samples,
    classes,
    k,
    CHUNK: tl.constexpr,  # columns for each program, 0: all of them
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    ACC: tl.constexpr = gap.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < samples
    if CHUNK:
        begin = tl.program_id(1) * CHUNK
        end = tl.minimum(begin + CHUNK, classes)
    else:
        begin = 0
        end = classes
    y = tl.load(target + row * target_stride, inside, other=0)
    labelled = (y >= 0) & (y < classes)
    y = tl.where(labelled, y, 0).to(tl.int32)
    z_label = widen(tl.load(logits + row * row_stride + y, inside, other=0.0), ACC)
    values = (logits + row * row_stride)[:, None]

    last = tl.full([ROWS], _INF, ACC)
    place = tl.full([ROWS], -1, tl.int32)
    last, place = _next(values, None, begin, end, inside[:, None], y, last, place, ROWS, BLOCK, VEC, ACC)
    if CHUNK:
        top = tl.where((y >= begin) & (y < end), tl.maximum(last, z_label), last)
        total = _sum_exp(values, begin, end, inside[:, None], top, ROWS, BLOCK, VEC, ACC)
        part = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(normalizer + part * 2, top, inside)
        tl.store(normalizer + part * 2 + 1, total, inside)
        tl.store(index + part * k, place, inside)
        tl.store(gap + part * k, last, inside)
        for j in range(1, k):
            last, place = _next(values, None, begin, end, inside[:, None], y, last, place, ROWS, BLOCK, VEC, ACC)
            tl.store(index + part * k + j, place, inside)
            tl.store(gap + part * k + j, last, inside)
    else:
        top = tl.maximum(last, z_label)
        total = _sum_exp(values, begin, end, inside[:, None], top, ROWS, BLOCK, VEC, ACC)
        usable = labelled & (total == total)
        log_sum = tl.where(usable, tl.log(total), float("nan"))
        tl.store(normalizer + row * 2, tl.where(usable, top, float("nan")), inside)
        tl.store(normalizer + row * 2 + 1, log_sum, inside)
        tl.store(nll + row, log_sum + (top - z_label), inside)
        _put(index + row * k, gap + row * k, 0, usable, last, place, y, z_label, inside)
        for j in range(1, k):
            last, place = _next(values, None, begin, end, inside[:, None], y, last, place, ROWS, BLOCK, VEC, ACC)
            _put(index + row * k, gap + row * k, j, usable, last, place, y, z_label, inside)


@kernel
def _merge(
    logits,  # [N, C]
    row_stride,
    target,  # [N]
    target_stride,
    places,  # [N, S, k] int32
    values,  # [N, S, k]
    parts,  # [N, S, 2]
    index,  # [N, k]
    gap,  # [N, k]
    nll,  # [N]
    normalizer,  # [N, 2]
    classes,
    k,
    candidates,  # S times the length of a chunk's list
    chunks,  # S
    CHUNKS: tl.constexpr,  # S, rounded up to a power of two
    BLOCK: tl.constexpr,
):
    """One program for each row; a tile of one row."""
    ACC: tl.constexpr = gap.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    y = tl.load(target + row * target_stride)
    labelled = (y >= 0) & (y < classes)
    y = tl.where(labelled, y, 0).to(tl.int32)
    z_label = widen(tl.load(logits + row * row_stride + y), ACC)

    chunk = tl.arange(0, CHUNKS)[None, :]
    pair = parts + (row[:, None] * chunks + chunk) * 2
    tops = tl.load(pair, chunk < chunks, other=-_INF)
    totals = tl.load(pair + 1, chunk < chunks, other=0.0)
    top = tl.max(tops, 1)
    # A chunk of NaN has a NaN total, whatever its largest logit is.
    total = tl.sum(tl.where(chunk < chunks, totals * tl.exp(tops - top[:, None]), 0.0), 1)
    usable = labelled & (total == total)
    log_sum = tl.where(usable, tl.log(total), float("nan"))
    tl.store(normalizer + row * 2, tl.where(usable, top, float("nan")))
    tl.store(normalizer + row * 2 + 1, log_sum)
    tl.store(nll + row, log_sum + (top - z_label))

    values = (values + row * candidates)[:, None]
    places = (places + row * candidates)[:, None]
    inside = row[:, None] >= 0
    last = tl.full([1], _INF, ACC)
    place = tl.full([1], -1, tl.int32)
    for j in range(k):
        last, place = _next(values, places, 0, candidates, inside, y, last, place, 1, BLOCK, 1, ACC)
        _put(index + row * k, gap + row * k, j, usable, last, place, y, z_label, row >= 0)


@kernel
def _backward(
    grad_gap,  # [N, k] or None
    gap_stride_n,
    gap_stride_k,
    grad_nll,  # [N] or None
    nll_stride,
    logits,  # [N, C], rows row_stride apart; read only with grad_nll
    row_stride,
    target,  # [N]
    target_stride,
    index,  # [N, k]
    normalizer,  # [N, 2]
    dlogits,  # [N, C]
    samples,
    classes,
    k,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    """One program for each tile of dlogits; the few unit vectors are compared in, so that each entry is stored once."""
    ACC: tl.constexpr = normalizer.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < samples
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = inside[:, None] & (column < whole_vectors(classes, VEC))
    is_label = column == tl.load(target + row * target_stride, inside, other=0)[:, None]
    top = tl.load(normalizer + row * 2, inside, other=0.0)[:, None]
    log_sum = tl.load(normalizer + row * 2 + 1, inside, other=0.0)[:, None]
    dz = tl.zeros([ROWS, BLOCK], ACC)
    if grad_nll is not None:
        g = widen(tl.load(grad_nll + row * nll_stride, inside, other=0.0), ACC)[:, None]
        source = address((logits + row * row_stride)[:, None], column, VEC)
        value = widen(tl.load(source, mask, other=0.0), ACC)
        # exp(z - top) exp(-log_sum): the first argument stays <= 0 without rounding
        softmax = tl.exp(tl.minimum(value - top, 0.0)) * tl.exp(-log_sum)
        dz = g * tl.where(is_label, softmax - 1, softmax)
    if grad_gap is not None:
        total = tl.zeros([ROWS, 1], ACC)
        for j in range(k):
            place = tl.load(index + row * k + j, inside, other=-1)[:, None]
            g = widen(tl.load(grad_gap + row * gap_stride_n + j * gap_stride_k, inside, other=0.0), ACC)[:, None]
            dz += tl.where(column == place, g, 0.0)
            total += g
        dz -= tl.where(is_label, total, 0.0)
    dz = tl.where(log_sum == log_sum, dz, log_sum)  # an unusable row is NaN everywhere
    destination = address((dlogits + row * classes)[:, None], column, VEC)
    tl.store(destination, narrow(dz, dlogits.dtype.element_ty), mask)


@torch.library.custom_op("margin_kernels_triton::competitors", mutates_args=())
def _competitors(logits: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (n, classes), acc = logits.shape, accumulate(logits.dtype)
    tile = tile_for(classes, logits.dtype)
    z = readable(logits, tile.vec)
    index = torch.empty(n, k, dtype=torch.int64, device=z.device)
    gap, nll, normalizer = (torch.empty(*s, dtype=acc, device=z.device) for s in ((n, k), (n,), (n, 2)))
    row = (z, z.stride(0), target, target.stride(0))
    if classes <= LONG:
        outputs = (index, gap, nll, normalizer)
        launch(_forward, (cdiv(n, tile.rows),), z, *row, *outputs, n, classes, k, CHUNK=0, **tile.constants)
        return gap, nll, index, normalizer
    # The number of chunks stays small for any number of classes, so that one tile holds what they found.
    chunk = max(SHORTEST_CHUNK, triton.next_power_of_2(cdiv(classes, 512)))
    chunks, listed = cdiv(classes, chunk), min(k, chunk)
    places = torch.empty(n, chunks, listed, dtype=torch.int32, device=z.device)
    values = torch.empty(n, chunks, listed, dtype=acc, device=z.device)
    parts = torch.empty(n, chunks, 2, dtype=acc, device=z.device)
    grid = (cdiv(n, tile.rows), chunks)
    launch(_forward, grid, z, *row, places, values, nll, parts, n, classes, listed, CHUNK=chunk, **tile.constants)
    outputs = (index, gap, nll, normalizer)
    candidates = chunks * listed
    block = min(triton.next_power_of_2(max(candidates, 128)), 2048)
    sizes = (classes, k, candidates, chunks)
    constants = {"CHUNKS": triton.next_power_of_2(chunks), "BLOCK": block}
    launch(_merge, (n,), z, *row, places, values, parts, *outputs, *sizes, **constants)
    return gap, nll, index, normalizer


@_competitors.register_fake
def _(logits: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, acc = logits.shape[0], accumulate(logits.dtype)
    return (
        logits.new_empty(n, k, dtype=acc),
        logits.new_empty(n, dtype=acc),
        logits.new_empty(n, k, dtype=torch.int64),
        logits.new_empty(n, 2, dtype=acc),
    )


@torch.library.custom_op("margin_kernels_triton::competitors_backward", mutates_args=())
def _competitors_backward(
    grad_gap: Tensor | None,
    grad_nll: Tensor | None,
    logits: Tensor,
    target: Tensor,
    index: Tensor,
    normalizer: Tensor,
) -> Tensor:
    n, classes = logits.shape
    tile = tile_for(classes, logits.dtype)
    z = readable(logits, tile.vec)
    dlogits = torch.empty(n, classes, dtype=z.dtype, device=z.device)
    gap_strides = (0, 0) if grad_gap is None else grad_gap.stride()
    nll_stride = 0 if grad_nll is None else grad_nll.stride(0)
    grid = (cdiv(n, tile.rows), cdiv(classes, tile.block))
    grads = (grad_gap, *gap_strides, grad_nll, nll_stride)
    row = (z, z.stride(0), target, target.stride(0))
    saved = (index.contiguous(), normalizer.contiguous())
    launch(_backward, grid, z, *grads, *row, *saved, dlogits, n, classes, index.shape[1], **tile.constants)
    return dlogits


@_competitors_backward.register_fake
def _(grad_gap, grad_nll, logits, target, index, normalizer):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    (logits, target, _), (_, _, index, normalizer) = inputs, output
    ctx.save_for_backward(logits, target, index, normalizer)
    ctx.mark_non_differentiable(index, normalizer)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_gap, grad_nll, _index, _normalizer):
    if grad_gap is None and grad_nll is None:
        return None, None, None
    return _competitors_backward(grad_gap, grad_nll, *ctx.saved_tensors), None, None


_competitors.register_autograd(_differentiate, setup_context=_save)


def _save_backward(ctx, inputs, output):
    grad_gap, grad_nll, logits, target, index, normalizer = inputs
    ctx.save_for_backward(grad_nll, logits, target, index, normalizer)
    ctx.gap_dtype = None if grad_gap is None else grad_gap.dtype


def _differentiate_backward(ctx, v):
    """With v what arrives at dz: d g_nll = <v, softmax - e_y>, d g_gap_j = v[I_j] - v[y],
    dz' = g_nll softmax (v - <v, softmax>). Plain PyTorch, so it can be differentiated again."""
    grad_nll, logits, target, index, normalizer = ctx.saved_tensors
    acc = normalizer.dtype
    # Unusable rows are NaN here too; a target outside [0, C) must not be gathered with.
    v = v.to(acc) * torch.where(normalizer[:, 1:].isnan(), float("nan"), 1.0).to(acc)
    y = target.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    d_gap = d_nll = d_logits = None
    if ctx.gap_dtype is not None:
        d_gap = (v.gather(1, index) - v.gather(1, y)).to(ctx.gap_dtype)
    if grad_nll is not None:
        softmax = torch.softmax(logits.to(acc), 1)
        mean = (v * softmax).sum(1, keepdim=True)
        d_nll = (mean - v.gather(1, y)).squeeze(1).to(grad_nll.dtype)
        d_logits = (grad_nll.to(acc).unsqueeze(1) * softmax * (v - mean)).to(logits.dtype)
    return d_gap, d_nll, d_logits, None, None, None


_competitors_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)


def competitors(logits: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    gap, nll, index, _ = _competitors(logits, target, k)
    return index, gap, nll

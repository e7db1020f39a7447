"""
index = the k largest z[n, i] with i != y[n], decreasing, equal logits: lowest class first      [N, k] int64
gap   = z[n, index] - z[n, y[n]]                                                                [N, k]
R     = the largest competitor,  S = sum of exp(z - R) over the competitors,  phi = z[n, y[n]] - R - log S [N]
nll   = log1p(S exp(R - z[n, y[n]])),   uniform = mean over the finite classes of -log p        [N]
dz    = the competitors' and the label's entries of csrc/math/competitors.h                          [N, C]

Forward: one program for a tile of rows, which reads every row once. Of a row longer than a tile each lane sees every
BLOCK-th class: it keeps the first of them and their sum of exponentials, relative to a logit of its own. The first of
all lanes is the next competitor; its lane alone then reads its C / BLOCK classes again, for the first one behind it in
the order (larger logit, then lower class). Any k will do, and masked classes (-inf) come last by themselves.
Rows above 65536 classes: one program for each 16384 of them, then one for each row that merges their lists.
Reads N C elements, and C / BLOCK for each competitor but the last (none in rows of one tile); writes 2 N k + 5 N
numbers. Backward reads and writes N C elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import accumulate, cdiv, kernel, launch, readable, tile_for
from .numerics import address, divide, exact_exp, log1p, narrow, whole_vectors, widen

LONG = 65536
SHORTEST_CHUNK = 16384

_INF = tl.constexpr(float("inf"))
_NO_CLASS = tl.constexpr(2**31 - 1)
# A lane's sum moves to a larger logit only where that is 4 above the one it is relative to: the roundings of a move
# then reach a share of the sum that falls by exp(-4) with each later move, however often the logits grow.
_STEP = tl.constexpr(4.0)
_STRIDE = tl.constexpr(32)


@triton.jit
def _first(best, place):
    """(value, class) [ROWS] of the first of the classes [ROWS, BLOCK]; (-inf, _NO_CLASS) where there is none."""
    value = tl.max(best, 1)
    return value, tl.min(tl.where(best == value[:, None], place, _NO_CLASS), 1)


@triton.jit
def _read(
    values, begin, end, inside, y,
    UNIFORM: tl.constexpr, WHOLE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One read of the competitors in columns [begin, end) of every row.

    Returns the first one of each lane, values and classes [ROWS, BLOCK]; and of each row [ROWS] the largest logit R,
    the sum of exp(z - R), the number of the finite ones and the sum of R - z over these (both 0 but for UNIFORM).
    The sum is 0 where every competitor is masked, NaN where one is NaN or +inf.
    values [ROWS, 1]: addresses of the rows. WHOLE: the columns are one tile.
    """
    best = tl.full([ROWS, BLOCK], -_INF, ACC)
    place = tl.full([ROWS, BLOCK], _NO_CLASS, tl.int32)
    if WHOLE:
        column = begin + tl.arange(0, BLOCK)[None, :]
        mask = inside & (column < whole_vectors(end, VEC))
        value = widen(tl.load(address(values, column, VEC), mask, other=0.0), ACC)
        rival = mask & (column != y[:, None])
        best = tl.where(rival, value, best)
        place = tl.where(rival, column, place)
        top = tl.max(best, 1)
        base = tl.where(top > -_INF, top, 0.0)[:, None]
        masked = best == -_INF
        total = tl.sum(tl.where(masked, 0.0, tl.exp(best - base)), 1)
        if UNIFORM:
            count = tl.sum(tl.where(masked, 0.0, 1.0).to(ACC), 1)
            deficit = tl.sum(tl.where(masked, 0.0, base - best), 1)
    else:
        base = tl.full([ROWS, BLOCK], -_INF, ACC)
        totals = tl.zeros([ROWS, BLOCK], ACC)
        if UNIFORM:
            counts = tl.zeros([ROWS, BLOCK], ACC)
            deficits = tl.zeros([ROWS, BLOCK], ACC)
        for start in range(begin, end, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            mask = inside & (column < whole_vectors(end, VEC))
            value = widen(tl.load(address(values, column, VEC), mask, other=0.0), ACC)
            rival = mask & (column != y[:, None])
            value = tl.where(rival, value, -_INF)
            # Classes come in increasing order, so an equal one does not replace the one that a lane holds.
            # A lane that holds nothing yet takes a masked class too.
            up = rival & ((value > best) | (place == _NO_CLASS))
            best = tl.where(up, value, best)
            place = tl.where(up, column, place)
            moves = value > base + _STEP
            ahead = value - base
            e = tl.exp(tl.where(moves, -ahead, ahead))
            masked = value == -_INF
            totals = tl.where(moves, totals * e + 1.0, totals + tl.where(masked, 0.0, e))
            if UNIFORM:
                # Relative to the base as well; the first class of a lane moves no sum.
                deficits += tl.where(moves, tl.where(counts > 0, counts * ahead, 0.0), tl.where(masked, 0.0, -ahead))
                counts += tl.where(masked, 0.0, 1.0)
            base = tl.where(moves, value, base)
        top = tl.max(best, 1)
        base_of_row = tl.where(top > -_INF, top, 0.0)[:, None]
        total = tl.sum(totals * exact_exp(base - base_of_row), 1)
        if UNIFORM:
            count = tl.sum(counts, 1)
            deficit = tl.sum(tl.where(counts > 0, deficits + counts * (base_of_row - base), 0.0), 1)
    if not UNIFORM:
        count = tl.zeros([ROWS], ACC)
        deficit = tl.zeros([ROWS], ACC)
    return best, place, top, total, count, deficit


@triton.jit
def _behind(values, begin, end, y, last, last_place, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """(value, class) [1] of the first class behind `last`, also [1], in its lane; a tile of one row."""
    lane = begin + (last_place - begin) % BLOCK
    best = tl.full([1], -_INF, ACC)
    place = tl.full([1], _NO_CLASS, tl.int32)
    for start in range(0, end - begin, BLOCK * _STRIDE):
        column = lane[:, None] + start + tl.arange(0, _STRIDE)[None, :] * BLOCK
        mask = column < end
        value = widen(tl.load(values + column, mask, other=0.0), ACC)
        behind = (value < last[:, None]) | ((value == last[:, None]) & (column > last_place[:, None]))
        mask = mask & behind & (column != y[:, None])
        first, where = _first(tl.where(mask, value, -_INF), tl.where(mask, column, _NO_CLASS))
        up = (first > best) | (place == _NO_CLASS)
        best = tl.where(up, first, best)
        place = tl.where(up, where, place)
    return best, place


@triton.jit
def _remove(
    best, place, values, begin, end, y, last, last_place,
    WHOLE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The lanes (best, place) [ROWS, BLOCK] without the class `last` of each row."""
    if WHOLE:
        next_value = tl.full(last.shape, -_INF, ACC)
        next_place = tl.full(last.shape, _NO_CLASS, tl.int32)
    else:
        next_value, next_place = _behind(values, begin, end, y, last, last_place, BLOCK, ACC)
    hit = place == last_place[:, None]
    return tl.where(hit, next_value[:, None], best), tl.where(hit, next_place[:, None], place)


@triton.jit
def _put(index, gap, j, usable, ignored, value, place, y, z_label, inside):
    """Competitor j of each row. A row with NaN holds the first classes but the label, an ignored one the first."""
    constant = tl.where(ignored, 0.0, float("nan"))
    first = tl.where(ignored, j, j + (j >= y).to(tl.int32))
    difference = tl.where(value == -_INF, value, value - z_label)
    tl.store(index + j, tl.where(usable, place, first).to(tl.int64), inside)
    tl.store(gap + j, tl.where(usable, difference, constant), inside)


@triton.jit
def _put_losses(
    nll, phi, uniform, normalizer, row, usable, ignored, z_label, top, total, count, deficit, inside,
):  # fmt: skip
    """nll, phi, uniform and (R, S, number of finite classes) of each row, from R, S and the competitors' spread."""
    constant = tl.where(ignored, 0.0, float("nan"))
    masked = z_label == -_INF
    alone = total == 0
    lead = tl.where(masked | alone, 0.0, z_label - top)
    e = exact_exp(-tl.abs(lead))
    behind = tl.log(tl.where(alone, 1.0, total + e)) - lead
    loss = tl.where(lead >= 0, log1p(total * e), behind)
    value = tl.where(alone, 0.0, tl.where(masked, _INF, loss))
    log_sum = tl.log(tl.where(alone, 1.0, total))
    odds = tl.where(alone, _INF, tl.where(masked, -_INF, lead - log_sum))
    tl.store(nll + row, tl.where(usable, value, constant), inside)
    tl.store(phi + row, tl.where(usable, odds, constant), inside)
    tl.store(normalizer + row * 3, tl.where(usable, top, constant), inside)
    tl.store(normalizer + row * 3 + 1, tl.where(usable, total, constant), inside)
    if uniform is None:
        tl.store(normalizer + row * 3 + 2, tl.where(usable, 0.0, constant), inside)
    else:
        classes = count + tl.where(masked, 0.0, 1.0)
        # From the largest of all logits: every term is then >= 0.
        ahead = (deficit + count * lead) / classes
        mean = tl.where(lead >= 0, loss + ahead, loss + lead + (deficit - lead) / classes)
        mean = tl.where(masked, log_sum + deficit / classes, mean)
        tl.store(uniform + row, tl.where(usable, tl.where(alone, 0.0, mean), constant), inside)
        tl.store(normalizer + row * 3 + 2, tl.where(usable, classes, constant), inside)


@triton.jit
def _usable(labelled, ignored, z_label, top, total):
    """Rows with a label, a finite logit, and neither NaN nor +inf."""
    finite = (total == total) & (z_label < _INF)
    return labelled & finite & ((top > -_INF) | (z_label > -_INF)) & (ignored == 0)


@kernel
def _forward(
    logits,  # [N, C], rows row_stride apart
    row_stride,
    target,  # [N]
    target_stride,
    ignore_index,
    index,  # [N, k];     CHUNK: classes of the chunks' competitors [N, S, k] int32
    gap,  # [N, k];       CHUNK: their logits [N, S, k]
    nll,  # [N];          CHUNK: not read
    phi,  # [N];          CHUNK: not read
    uniform,  # [N] or None
    normalizer,  # [N, 3];CHUNK: [N, S, 4], R and S of the chunk, number of the finite ones and sum of R - z over them
    samples,
    classes,
    k,
    CHUNK: tl.constexpr,  # columns for each program, 0: all of them
    WHOLE: tl.constexpr,  # whether the columns of a program are one tile
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
    ignored = y == ignore_index
    labelled = (y >= 0) & (y < classes)
    y = tl.where(labelled, y, 0).to(tl.int32)
    z_label = widen(tl.load(logits + row * row_stride + y, inside, other=0.0), ACC)
    values = (logits + row * row_stride)[:, None]

    best, place, top, total, count, deficit = _read(
        values, begin, end, inside[:, None], y, uniform is not None, WHOLE, ROWS, BLOCK, VEC, ACC
    )
    if CHUNK:
        part = row * tl.num_programs(1) + tl.program_id(1)
        tl.store(normalizer + part * 4, top, inside)
        tl.store(normalizer + part * 4 + 1, total, inside)
        tl.store(normalizer + part * 4 + 2, count, inside)
        tl.store(normalizer + part * 4 + 3, deficit, inside)
    else:
        usable = _usable(labelled, ignored, z_label, top, total)
        _put_losses(nll, phi, uniform, normalizer, row, usable, ignored, z_label, top, total, count, deficit, inside)
    for j in range(k):
        last, last_place = _first(best, place)
        if CHUNK:
            tl.store(index + part * k + j, last_place, inside)
            tl.store(gap + part * k + j, last, inside)
        else:
            _put(index + row * k, gap + row * k, j, usable, ignored, last, last_place, y, z_label, inside)
        if j + 1 < k:
            best, place = _remove(best, place, values, begin, end, y, last, last_place, WHOLE, BLOCK, ACC)


@kernel
def _merge(
    logits,  # [N, C]
    row_stride,
    target,  # [N]
    target_stride,
    ignore_index,
    places,  # [N, S, k] int32
    values,  # [N, S, k]
    parts,  # [N, S, 4]
    index,  # [N, k]
    gap,  # [N, k]
    nll,  # [N]
    phi,  # [N]
    uniform,  # [N] or None
    normalizer,  # [N, 3]
    classes,
    k,
    listed,  # length of a chunk's list
    chunks,  # S
    CHUNKS: tl.constexpr,  # S, rounded up to a power of two
):
    """One program for each row, a tile of one row. A lane holds the first class of a chunk's list that is left."""
    ACC: tl.constexpr = gap.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    y = tl.load(target + row * target_stride)
    ignored = y == ignore_index
    labelled = (y >= 0) & (y < classes)
    y = tl.where(labelled, y, 0).to(tl.int32)
    z_label = widen(tl.load(logits + row * row_stride + y), ACC)

    chunk = tl.arange(0, CHUNKS)[None, :]
    part = parts + (row[:, None] * chunks + chunk) * 4
    tops = tl.load(part, chunk < chunks, other=-_INF)
    totals = tl.load(part + 1, chunk < chunks, other=0.0)
    top = tl.max(tops, 1)
    # A chunk of masked classes adds nothing. One with a NaN has a NaN total, whatever its largest logit is.
    base = tl.where(top > -_INF, top, 0.0)
    total = tl.sum(tl.where(totals == 0, 0.0, totals * tl.exp(tops - base[:, None])), 1)
    count = tl.zeros([1], ACC)
    deficit = tl.zeros([1], ACC)
    if uniform is not None:
        counts = tl.load(part + 2, chunk < chunks, other=0.0)
        deficits = tl.load(part + 3, chunk < chunks, other=0.0)
        count = tl.sum(counts, 1)
        deficit = tl.sum(tl.where(counts > 0, deficits + counts * (base[:, None] - tops), 0.0), 1)
    usable = _usable(labelled, ignored, z_label, top, total)
    inside = row >= 0
    _put_losses(nll, phi, uniform, normalizer, row, usable, ignored, z_label, top, total, count, deficit, inside)

    head = (row[:, None] * chunks + chunk) * listed
    end = tl.where(chunk < chunks, head + listed, head)
    best = tl.load(values + head, head < end, other=-_INF)
    place = tl.load(places + head, head < end, other=_NO_CLASS)
    for j in range(k):
        last, last_place = _first(best, place)
        _put(index + row * k, gap + row * k, j, usable, ignored, last, last_place, y, z_label, inside)
        hit = place == last_place[:, None]
        head += hit.to(tl.int64)
        best = tl.where(hit, tl.load(values + head, hit & (head < end), other=-_INF), best)
        place = tl.where(hit, tl.load(places + head, hit & (head < end), other=_NO_CLASS), place)


@triton.jit
def _per_sample(grad, stride, row, inside, ROWS: tl.constexpr, ACC: tl.constexpr):
    """The gradient of an output [N] in each row, 0 where nothing depends on it."""
    if grad is None:
        g = tl.zeros([ROWS], ACC)
    else:
        g = widen(tl.load(grad + row * stride, inside, other=0.0), ACC)
    return g


@kernel
def _backward(
    grad_gap,  # [N, k] or None
    gap_stride_n,
    gap_stride_k,
    grad_nll,  # [N] or None
    nll_stride,
    grad_phi,  # [N] or None
    phi_stride,
    grad_uniform,  # [N] or None
    uniform_stride,
    logits,  # [N, C], rows row_stride apart
    row_stride,
    target,  # [N]
    target_stride,
    index,  # [N, k]
    normalizer,  # [N, 3]
    dlogits,  # [N, C]
    samples,
    classes,
    k,
    LOSSES: tl.constexpr,  # whether a gradient [N] arrives: only then is the whole row read
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
    values = logits + row * row_stride
    y = tl.load(target + row * target_stride, inside, other=0)
    top = tl.load(normalizer + row * 3, inside, other=0.0)
    total = tl.load(normalizer + row * 3 + 1, inside, other=0.0)
    # S = 0: a row that is ignored, or without a competitor, has no gradient; its target may be no class. NaN: all NaN.
    silent = (total > 0) == 0
    y = tl.where(silent, -1, y)
    z_label = widen(tl.load(values + y, inside & (y >= 0), other=0.0), ACC)
    masked = z_label == -_INF
    is_label = column == y[:, None]
    dz = tl.zeros([ROWS, BLOCK], ACC)
    if LOSSES:
        g_nll = _per_sample(grad_nll, nll_stride, row, inside, ROWS, ACC)
        g_phi = tl.where(masked, 0.0, _per_sample(grad_phi, phi_stride, row, inside, ROWS, ACC))
        g_uniform = _per_sample(grad_uniform, uniform_stride, row, inside, ROWS, ACC)
        sum_ = tl.where(silent, 1.0, total)
        lead = tl.where(silent, 0.0, z_label - top)
        e = exact_exp(-tl.abs(lead))
        label = tl.where(lead >= 0, 1.0, e)
        rest = tl.where(lead >= 0, sum_ * e, sum_)
        p_label = divide(label, label + rest)
        p_rest = divide(rest, label + rest)
        weight = g_nll * p_rest - g_phi
        factor = divide(weight + g_uniform * p_rest, sum_)
        value = widen(tl.load(address(values[:, None], column, VEC), mask, other=0.0), ACC)
        base = tl.where(silent, 0.0, top)[:, None]
        # The label's own argument may be positive; its entry is another.
        dz = tl.where(value == -_INF, 0.0, exact_exp(tl.minimum(value - base, 0.0)) * factor[:, None])
        dz = tl.where(is_label, (g_uniform * p_label - weight)[:, None], dz)
        if grad_uniform is not None:
            count = tl.load(normalizer + row * 3 + 2, inside, other=1.0)
            share = divide(g_uniform, tl.where(silent, 1.0, count))
            dz -= tl.where(value == -_INF, 0.0, share[:, None])
    if grad_gap is not None:
        of_label = tl.zeros([ROWS], ACC)
        for j in range(k):
            place = tl.load(index + row * k + j, inside, other=0)
            z_other = widen(tl.load(values + place, inside, other=0.0), ACC)
            g = widen(tl.load(grad_gap + row * gap_stride_n + j * gap_stride_k, inside, other=0.0), ACC)
            g = tl.where(masked | (z_other == -_INF), 0.0, g)
            dz += tl.where(column == place[:, None], g[:, None], 0.0)
            of_label += g
        dz -= tl.where(is_label, of_label[:, None], 0.0)
    dz = tl.where(silent[:, None], total[:, None], dz)
    destination = address((dlogits + row * classes)[:, None], column, VEC)
    tl.store(destination, narrow(dz, dlogits.dtype.element_ty), mask)


@torch.library.custom_op("margin_kernels_triton::competitors", mutates_args=())
def _competitors(
    logits: Tensor, target: Tensor, k: int, ignore_index: int, uniform: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (n, classes), acc = logits.shape, accumulate(logits.dtype)
    tile = tile_for(classes, logits.dtype)
    if uniform:  # two more sums for every row of the tile, or registers spill
        tile = tile._replace(rows=max(1, tile.rows // 2))
    z = readable(logits, tile.vec)
    index = torch.empty(n, k, dtype=torch.int64, device=z.device)
    shapes = ((n, k), (n,), (n,), (n if uniform else 0,), (n, 3))
    gap, nll, phi, smoothing, normalizer = (torch.empty(*s, dtype=acc, device=z.device) for s in shapes)
    row = (z, z.stride(0), target, target.stride(0), ignore_index)
    losses = (nll, phi, smoothing if uniform else None)
    result = (gap, nll, phi, smoothing, index, normalizer)
    if classes <= LONG:
        outputs = (index, gap, *losses, normalizer)
        constants = {"CHUNK": 0, "WHOLE": classes <= tile.block, **tile.constants}
        launch(_forward, (cdiv(n, tile.rows),), z, *row, *outputs, n, classes, k, **constants)
        return result
    # The number of chunks stays small for any number of classes, so that one tile holds what they found.
    chunk = max(SHORTEST_CHUNK, triton.next_power_of_2(cdiv(classes, 512)))
    chunks, listed = cdiv(classes, chunk), min(k, chunk)
    places = torch.empty(n, chunks, listed, dtype=torch.int32, device=z.device)
    values = torch.empty(n, chunks, listed, dtype=acc, device=z.device)
    parts = torch.empty(n, chunks, 4, dtype=acc, device=z.device)
    grid = (cdiv(n, tile.rows), chunks)
    constants = {"CHUNK": chunk, "WHOLE": False, **tile.constants}
    launch(_forward, grid, z, *row, places, values, *losses, parts, n, classes, listed, **constants)
    outputs = (index, gap, *losses, normalizer)
    sizes = (classes, k, listed, chunks)
    launch(_merge, (n,), z, *row, places, values, parts, *outputs, *sizes, CHUNKS=triton.next_power_of_2(chunks))
    return result


@_competitors.register_fake
def _(logits: Tensor, target: Tensor, k: int, ignore_index: int, uniform: bool) -> tuple[Tensor, ...]:
    n, acc = logits.shape[0], accumulate(logits.dtype)
    return (
        logits.new_empty(n, k, dtype=acc),
        logits.new_empty(n, dtype=acc),
        logits.new_empty(n, dtype=acc),
        logits.new_empty(n if uniform else 0, dtype=acc),
        logits.new_empty(n, k, dtype=torch.int64),
        logits.new_empty(n, 3, dtype=acc),
    )


@torch.library.custom_op("margin_kernels_triton::competitors_backward", mutates_args=())
def _competitors_backward(
    grad_gap: Tensor | None,
    grad_nll: Tensor | None,
    grad_phi: Tensor | None,
    grad_uniform: Tensor | None,
    logits: Tensor,
    target: Tensor,
    index: Tensor,
    normalizer: Tensor,
) -> Tensor:
    n, classes = logits.shape
    tile = tile_for(classes, logits.dtype)
    # A thread holds what belongs to every row of its tile: half as many rows as in the forward, or registers spill.
    tile = tile._replace(rows=max(1, tile.rows // 2))
    z = readable(logits, tile.vec)
    dlogits = torch.empty(n, classes, dtype=z.dtype, device=z.device)
    grads = (grad_gap, *((0, 0) if grad_gap is None else grad_gap.stride()))
    for grad in (grad_nll, grad_phi, grad_uniform):
        grads += (grad, 0 if grad is None else grad.stride(0))
    losses = any(grad is not None for grad in (grad_nll, grad_phi, grad_uniform))
    grid = (cdiv(n, tile.rows), cdiv(classes, tile.block))
    row = (z, z.stride(0), target, target.stride(0))
    saved = (index.contiguous(), normalizer.contiguous())
    sizes = (n, classes, index.shape[1])
    launch(_backward, grid, z, *grads, *row, *saved, dlogits, *sizes, LOSSES=losses, **tile.constants)
    return dlogits


@_competitors_backward.register_fake
def _(grad_gap, grad_nll, grad_phi, grad_uniform, logits, target, index, normalizer):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    (logits, target, *_), (_, _, _, smoothing, index, normalizer) = inputs, output
    ctx.save_for_backward(logits, target, index, normalizer)
    ctx.mark_non_differentiable(*((index, normalizer) if inputs[4] else (index, normalizer, smoothing)))
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_gap, grad_nll, grad_phi, grad_uniform, _index, _normalizer):
    grads = (grad_gap, grad_nll, grad_phi, grad_uniform)
    if all(grad is None for grad in grads):
        return (None,) * 5
    return _competitors_backward(*grads, *ctx.saved_tensors), None, None, None, None


_competitors.register_autograd(_differentiate, setup_context=_save)


def _save_backward(ctx, inputs, output):
    grad_gap, *rest = inputs
    ctx.save_for_backward(*rest)
    ctx.gap_dtype = None if grad_gap is None else grad_gap.dtype


def _differentiate_backward(ctx, v):
    """The formulas of csrc/autograd/competitors.cpp, in plain PyTorch, so it can be differentiated again."""
    grad_nll, grad_phi, grad_uniform, logits, target, index, normalizer = ctx.saved_tensors
    acc = normalizer.dtype
    total = normalizer[:, 1:2]
    silent, poisoned = total == 0, total.isnan()
    v = v.to(acc).masked_fill(silent, 0.0).masked_fill(poisoned, float("nan"))
    # A target outside [0, C) must not be gathered with.
    y = target.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    z = logits.to(acc).masked_fill(silent | poisoned, 0.0)
    finite, v_label = z != -float("inf"), v.gather(1, y)
    label_is_masked = ~finite.gather(1, y)
    d_gap = d_nll = d_phi = d_uniform = d_logits = None
    if ctx.gap_dtype is not None:
        unused = ~finite.gather(1, index) | label_is_masked
        d_gap = (v.gather(1, index) - v_label).masked_fill(unused, 0.0).to(ctx.gap_dtype)
    if grad_nll is not None or grad_phi is not None or grad_uniform is not None:
        others = z.scatter(1, y, -float("inf"))
        q = torch.softmax(others, 1)
        largest = others.amax(1, keepdim=True).detach()
        phi = z.gather(1, y) - largest - torch.logsumexp(others - largest, 1, keepdim=True)
        rest, label = torch.sigmoid(-phi), torch.zeros_like(z).scatter(1, y, 1.0)
        v_others = (v * q).sum(1, keepdim=True)
        t = v_others - v_label
        both = sum(g.to(acc).unsqueeze(1) for g in (grad_nll, grad_uniform) if g is not None)
        weight = both * rest
        d_logits = both * torch.sigmoid(phi) * rest * t * (q - label)
        if grad_nll is not None:
            d_nll = (rest * t).squeeze(1).to(grad_nll.dtype)
        if grad_uniform is not None:
            mean = v.masked_fill(~finite, 0.0).sum(1, keepdim=True) / finite.sum(1, keepdim=True)
            d_uniform = (rest * t + v_label - mean).squeeze(1).to(grad_uniform.dtype)
        if grad_phi is not None:
            d_phi = -t.masked_fill(label_is_masked, 0.0).squeeze(1).to(grad_phi.dtype)
            weight = weight - grad_phi.to(acc).unsqueeze(1).masked_fill(label_is_masked, 0.0)
        d_logits = (d_logits + weight * q * (v - v_others)).to(logits.dtype)
    return d_gap, d_nll, d_phi, d_uniform, d_logits, None, None, None


_competitors_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)


def competitors(
    logits: Tensor, target: Tensor, k: int, ignore_index: int = -100, uniform: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    gap, nll, phi, smoothing, index, _ = _competitors(logits, target, k, ignore_index, uniform)
    return gap, nll, phi, smoothing if uniform else None, index

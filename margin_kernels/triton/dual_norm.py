"""
norms[..., l] = || G_l[..., :] ||_q,   q = p / (p - 1)                                          [N, k, L] or [N, L]
dG_l          = grad_l sign(G_l) (|G_l| / norm_l)^(q-1),   0 where the norm is 0

One launch for eight layers: a program takes a tile of rows of one layer, or 32768 elements of one row where rows are
longer than 65536; those parts are merged by one more launch for each such layer. Every tile is in registers while its
largest entry is found, so that a single read gives the sum relative to that entry, whatever its magnitude.
Reads every gradient once (backward too, and writes it once; p = 1 reads twice there, to count the entries at the
maximum); writes one number for each row.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Tile, accumulate, aligned, cdiv, kernel, launch, tile_for
from .numerics import (
    add_magnitudes,
    add_totals,
    address,
    dual,
    narrow,
    needs_float64,
    norm_of,
    slope,
    whole_vectors,
    widen,
)

LAYERS = 8  # in one launch: each has its own code, so that its tile depends on no other layer
LONG = 65536
PART = 32768


@triton.jit
def _row_address(data, row, inner, outer_stride, inner_stride):
    """Row r stands for (r // inner, r % inner) of the batch dimensions."""
    return data + (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def _tile_total(
    data, inside, begin, end,
    ACC: tl.constexpr, KIND: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(largest, total) of numerics.add_magnitudes over columns [begin, end) of the rows at addresses data [ROWS]."""
    largest = tl.zeros([ROWS], ACC)
    total = tl.zeros([ROWS], ACC)
    for start in range(begin, end, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < whole_vectors(end, VEC))
        g = widen(tl.load(address(data[:, None], column, VEC), mask, other=0.0), ACC)
        largest, total = add_magnitudes(largest, total, tl.abs(g), KIND, Q)
    return largest, total


@kernel
def _forward(
    data,  # L matrices: N * k rows of lengths[l] elements
    outer_strides,  # L
    inner_strides,  # L
    lengths,  # L
    parts,  # L buffers [N * k, S, 2] for (largest, total), not read where S = 1
    norms,  # [N * k, L], rows norm_stride apart
    norm_stride,
    rows,  # N * k
    inner,  # k
    ROWS: tl.constexpr,  # L
    BLOCK: tl.constexpr,  # L
    VEC: tl.constexpr,  # L
    PARTS: tl.constexpr,  # S for each of the L layers
    LENGTH: tl.constexpr,  # of a part
    KIND: tl.constexpr,
    Q: tl.constexpr,
):
    ACC: tl.constexpr = norms.dtype.element_ty
    program = tl.program_id(0)
    first = 0
    for layer in tl.static_range(len(ROWS)):
        programs = tl.cdiv(rows, ROWS[layer]) * PARTS[layer]
        if (program >= first) & (program < first + programs):
            row = ((program - first) // PARTS[layer]).to(tl.int64) * ROWS[layer] + tl.arange(0, ROWS[layer])
            inside = row < rows
            source = _row_address(data[layer], row, inner, outer_strides[layer], inner_strides[layer])
            if PARTS[layer] == 1:
                largest, total = _tile_total(
                    source, inside, 0, lengths[layer], ACC, KIND, Q, ROWS[layer], BLOCK[layer], VEC[layer]
                )
                tl.store(norms + row * norm_stride + layer, norm_of(largest, total, KIND, Q), inside)
            else:
                part = (program - first) % PARTS[layer]
                begin = part.to(tl.int64) * LENGTH
                end = tl.minimum(begin + LENGTH, lengths[layer])
                largest, total = _tile_total(
                    source, inside, begin, end, ACC, KIND, Q, ROWS[layer], BLOCK[layer], VEC[layer]
                )
                pair = parts[layer] + (row * PARTS[layer] + part) * 2
                tl.store(pair, largest, inside)
                tl.store(pair + 1, total, inside)
        first += programs


@kernel
def _merge(
    parts,  # [N * k, S, 2]
    norms,  # one column of [N * k, L], rows norm_stride apart
    norm_stride,
    count,  # S
    KIND: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for each row."""
    ACC: tl.constexpr = norms.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    largest = tl.zeros([1], ACC)
    total = tl.zeros([1], ACC)
    for start in range(0, count, BLOCK):
        part = start + tl.arange(0, BLOCK)[None, :]
        pair = parts + (row[:, None] * count + part) * 2
        m = tl.load(pair, part < count, other=0.0)
        t = tl.load(pair + 1, part < count, other=0.0)
        largest, total = add_totals(largest, total, m, t, KIND, Q)
    tl.store(norms + row * norm_stride, norm_of(largest, total, KIND, Q))


@kernel
def _count_ties(
    data,  # a matrix: N * k rows of `length` elements
    outer_stride,
    inner_stride,
    length,
    norms,  # a column of [N * k, L], rows norm_stride apart
    norm_stride,
    ties,  # [N * k] int32: how many entries of the row attain the maximum
    rows,
    inner,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    source = _row_address(data, row, inner, outer_stride, inner_stride)[:, None]
    norm = tl.load(norms + row * norm_stride, inside, other=0.0)[:, None]
    lanes = tl.zeros([ROWS, BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        mask = inside[:, None] & (column < whole_vectors(length, VEC))
        g = widen(tl.load(address(source, column, VEC), mask, other=0.0), norms.dtype.element_ty)
        lanes += (mask & (tl.abs(g) == norm)).to(tl.int32)
    tl.store(ties + row, tl.sum(lanes, 1), inside)


@kernel
def _backward(
    grad,  # [N * k, L], contiguous
    data,  # L matrices
    outer_strides,
    inner_strides,
    lengths,
    out,  # L matrices with the layout of data, but their own batch strides
    out_outer_strides,
    out_inner_strides,
    norms,  # [N * k, L], contiguous
    norm_stride,
    ties,  # L buffers [N * k] int32 for p = 1, else not read
    rows,
    inner,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    VEC: tl.constexpr,
    KIND: tl.constexpr,
    Q: tl.constexpr,
):
    """One program for each tile of one layer."""
    ACC: tl.constexpr = norms.dtype.element_ty
    program = tl.program_id(0)
    first = 0
    for layer in tl.static_range(len(ROWS)):
        across = tl.cdiv(lengths[layer], BLOCK[layer])
        programs = tl.cdiv(rows, ROWS[layer]) * across
        if (program >= first) & (program < first + programs):
            row = ((program - first) // across).to(tl.int64) * ROWS[layer] + tl.arange(0, ROWS[layer])
            inside = row < rows
            column = ((program - first) % across) * BLOCK[layer] + tl.arange(0, BLOCK[layer])[None, :]
            mask = inside[:, None] & (column < whole_vectors(lengths[layer], VEC[layer]))
            source = _row_address(data[layer], row, inner, outer_strides[layer], inner_strides[layer])
            g = widen(tl.load(address(source[:, None], column, VEC[layer]), mask, other=0.0), ACC)
            norm = tl.load(norms + row * norm_stride + layer, inside, other=1.0)[:, None]
            weight = widen(tl.load(grad + row * norm_stride + layer, inside, other=0.0), ACC)[:, None]
            if KIND == "max":
                tied = tl.load(ties[layer] + row, inside, other=1).to(ACC)[:, None]
            else:
                tied = norm
            u = slope(g, norm, tied, KIND, Q)
            dg = tl.where(norm == 0, 0.0, weight * u)
            place = _row_address(out[layer], row, inner, out_outer_strides[layer], out_inner_strides[layer])
            destination = address(place[:, None], column, VEC[layer])
            tl.store(destination, narrow(dg, out[layer].dtype.element_ty), mask)
        first += programs


class Rows(NamedTuple):
    """A gradient as the kernels read it: each row one run of memory."""

    data: Tensor
    outer_stride: int
    inner_stride: int
    length: int
    tile: Tile


def rows_of(gradient: Tensor, batch_dims: int) -> Rows:
    """Itself where the dimensions behind the batch fill one run of memory in any order (a norm sees no order)."""
    length = math.prod(gradient.shape[batch_dims:])
    tile = tile_for(length, gradient.dtype)
    g = gradient
    if not (_dense(g, batch_dims) and aligned(g, tile.vec, batch_dims)):
        g = g.clone(memory_format=torch.contiguous_format)
    return Rows(g, g.stride(0), g.stride(1) if batch_dims == 2 else 0, length, tile)


def _dense(gradient: Tensor, batch_dims: int) -> bool:
    expected = 1
    sizes = zip(gradient.stride()[batch_dims:], gradient.shape[batch_dims:], strict=True)
    for stride, size in sorted((stride, size) for stride, size in sizes if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _groups(gradients: list[Tensor], batch_dims: int) -> list[tuple[int, list[Rows]]]:
    """(index of the first layer, layers) for each launch."""
    return [(i, [rows_of(g, batch_dims) for g in gradients[i : i + LAYERS]]) for i in range(0, len(gradients), LAYERS)]


def _tiles(layers: list[Rows]) -> dict[str, tuple[int, ...]]:
    return {
        "ROWS": tuple(layer.tile.rows for layer in layers),
        "BLOCK": tuple(layer.tile.block for layer in layers),
        "VEC": tuple(layer.tile.vec for layer in layers),
    }


def _matrices(layers: list[Rows]) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]:
    return (
        tuple(layer.data for layer in layers),
        tuple(layer.outer_stride for layer in layers),
        tuple(layer.inner_stride for layer in layers),
    )


@torch.library.custom_op("margin_kernels_triton::dual_norm", mutates_args=())
def _dual_norm(gradients: list[Tensor], p: float, batch_dims: int) -> Tensor:
    lead, device = gradients[0].shape[:batch_dims], gradients[0].device
    acc = accumulate(*(g.dtype for g in gradients))
    if acc == torch.float32 and needs_float64(p):
        return _dual_norm([g.double() for g in gradients], p, batch_dims).float()
    if acc == torch.float64:  # layers of other dtypes are computed in float64 too
        gradients = [g.double() for g in gradients]
    norms = torch.empty(*lead, len(gradients), dtype=acc, device=device)
    rows, inner = math.prod(lead), lead[1] if batch_dims == 2 else 1
    kind, q = dual(p)
    flat = norms.view(rows, len(gradients))
    for first, layers in _groups(gradients, batch_dims) if rows > 0 else ():
        count = tuple(1 if layer.length <= LONG else cdiv(layer.length, PART) for layer in layers)
        parts = tuple(flat if c == 1 else torch.empty(rows, c, 2, dtype=acc, device=device) for c in count)
        programs = sum(cdiv(rows, layer.tile.rows) * c for layer, c in zip(layers, count, strict=True))
        data = (*_matrices(layers), tuple(layer.length for layer in layers), parts)
        arguments = (*data, flat[:, first:], flat.stride(0), rows, inner)
        constants = {**_tiles(layers), "PARTS": count, "LENGTH": PART, "KIND": kind, "Q": q}
        launch(_forward, (programs,), norms, *arguments, **constants)
        for layer, (buffer, c) in enumerate(zip(parts, count, strict=True), start=first):
            if c > 1:
                block = min(triton.next_power_of_2(max(c, 128)), 1024)
                column = (flat[:, layer:], flat.stride(0))
                launch(_merge, (rows,), norms, buffer, *column, c, KIND=kind, Q=q, BLOCK=block)
    return norms


@_dual_norm.register_fake
def _(gradients, p, batch_dims):
    lead, acc = gradients[0].shape[:batch_dims], accumulate(*(g.dtype for g in gradients))
    return gradients[0].new_empty(*lead, len(gradients), dtype=acc)


@torch.library.custom_op("margin_kernels_triton::dual_norm_backward", mutates_args=())
def _dual_norm_backward(
    grad: Tensor, gradients: list[Tensor], norms: Tensor, p: float, batch_dims: int
) -> list[Tensor]:
    acc, device = norms.dtype, norms.device
    if acc == torch.float32 and needs_float64(p):
        doubles = [g.double() for g in gradients]
        # A norm beyond float32 stays infinite, and the derivative 0.
        exact = torch.where(norms.isinf(), norms.double(), _dual_norm(doubles, p, batch_dims))
        slopes = _dual_norm_backward(grad.double(), doubles, exact, p, batch_dims)
        return [torch.empty_like(g).copy_(s) for g, s in zip(gradients, slopes, strict=True)]
    result = [torch.empty_like(g) for g in gradients]
    lead = gradients[0].shape[:batch_dims]
    rows, inner = math.prod(lead), lead[1] if batch_dims == 2 else 1
    if rows == 0:
        return result
    kind, q = dual(p)
    grad, norms = grad.reshape(rows, -1).contiguous(), norms.reshape(rows, -1).contiguous()
    wide = [g.double() for g in gradients] if acc == torch.float64 else gradients
    for first, layers in _groups(wide, batch_dims):
        # Native where the result has the layout of what is read; else through a contiguous result and a copy.
        outputs = [_output(r, layer, batch_dims) for r, layer in zip(result[first:], layers, strict=False)]
        ties = tuple(norms for _ in layers)
        if kind == "max":
            ties = tuple(torch.empty(rows, dtype=torch.int32, device=device) for _ in layers)
            for i, (layer, buffer) in enumerate(zip(layers, ties, strict=True)):
                grid, row = (cdiv(rows, layer.tile.rows),), (*layer[:3], layer.length)
                column = (norms[:, first + i :], norms.stride(0))
                launch(_count_ties, grid, norms, *row, *column, buffer, rows, inner, **layer.tile.constants)
        programs = sum(cdiv(rows, layer.tile.rows) * cdiv(layer.length, layer.tile.block) for layer in layers)
        data = (*_matrices(layers), tuple(layer.length for layer in layers), *_matrices(outputs))
        saved = (norms[:, first:], norms.stride(0), ties, rows, inner)
        launch(_backward, (programs,), norms, grad[:, first:], *data, *saved, **_tiles(layers), KIND=kind, Q=q)
        for r, output in zip(result[first:], outputs, strict=False):
            if output.data is not r:
                r.copy_(output.data)
    return result


def _output(result: Tensor, source: Rows, batch_dims: int) -> Rows:
    data = source.data
    same = result.dtype == data.dtype and result.stride()[batch_dims:] == data.stride()[batch_dims:]
    if not (same and aligned(result, source.tile.vec, batch_dims)):
        # Rows of the layout that is read, one behind the other: those that are read may overlap or be expanded.
        lead, length = data.shape[:batch_dims], source.length
        outer = [length * math.prod(lead[d + 1 :]) for d in range(batch_dims)]
        result = torch.empty_strided(
            data.shape, (*outer, *data.stride()[batch_dims:]), dtype=data.dtype, device=data.device
        )
    return Rows(result, result.stride(0), result.stride(1) if batch_dims == 2 else 0, source.length, source.tile)


@_dual_norm_backward.register_fake
def _(grad, gradients, norms, p, batch_dims):
    return [torch.empty_like(g) for g in gradients]


def _save(ctx, inputs, output):
    gradients, ctx.p, ctx.batch_dims = inputs
    ctx.save_for_backward(*gradients, output)


def _differentiate(ctx, grad):
    *gradients, norms = ctx.saved_tensors
    return _dual_norm_backward(grad, gradients, norms, ctx.p, ctx.batch_dims), None, None


_dual_norm.register_autograd(_differentiate, setup_context=_save)


def _save_backward(ctx, inputs, output):
    grad, gradients, norms, ctx.p, ctx.batch_dims = inputs
    ctx.save_for_backward(*gradients, grad, norms)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx, v):
    """du/dG v = (q-1)/D [(|G|/D)^(q-2) v - u <u, v>]. The norms come in as an argument but count as a function of the
    gradients: their own gradient is left out. Plain PyTorch, so it can be differentiated again."""
    *gradients, grad, norms = ctx.saved_tensors
    kind, q = dual(ctx.p)
    d_grads: list[Tensor] = []
    d_gradients: list[Tensor | None] = []
    for layer, (g, w) in enumerate(zip(gradients, v, strict=True)):
        if w is None:
            d_grads.append(torch.zeros_like(grad[..., layer]))
            d_gradients.append(None)
            continue
        norm = norms[..., layer : layer + 1]
        wide, w = g.to(norms.dtype), w.to(norms.dtype).flatten(ctx.batch_dims)
        (u,) = _dual_norm_backward(torch.ones_like(norm), [wide], norm, ctx.p, ctx.batch_dims)
        along = (u.flatten(ctx.batch_dims) * w).sum(-1)  # <u, v>
        d_grads.append(along.to(grad.dtype))
        curved = kind not in ("max", "sum")  # there u is piecewise constant
        d_gradients.append(_curvature(wide, w, norm, grad[..., layer : layer + 1], along, q).to(g) if curved else None)
    return torch.stack(d_grads, -1), d_gradients, None, None, None


def _curvature(g, v, norm, grad, along, q):
    """grad (q-1)/D [(|G|/D)^(q-2) v - u <u, v>]; 0 where D = 0, and for q < 2 the first term is 0 where G = 0."""
    flat = norm == 0
    d = torch.where(flat, 1.0, norm)
    ratio = g.flatten(norm.dim() - 1) / d
    zero = ratio == 0
    magnitude = torch.where(zero, 1.0, ratio.abs())
    u = torch.where(zero, 0.0, ratio.sign() * magnitude.pow(q - 1))
    diagonal = torch.ones_like(ratio) if q == 2 else torch.where(zero, 0.0, magnitude.pow(q - 2))
    h = (diagonal * v - u * along.unsqueeze(-1)) * (q - 1) / d
    return torch.where(flat, 0.0, h * grad.to(norm.dtype)).view(g.shape)


_dual_norm_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)


def dual_norm(gradients: list[Tensor], p: float, batch_dims: int) -> Tensor:
    return _dual_norm(list(gradients), float(p), batch_dims)

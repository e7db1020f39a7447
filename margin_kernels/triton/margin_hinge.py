"""
distance d[n,j,l] = -gap[n,j] / (eps + norm[n,j,l])                 loss = over_l over_j min(max(gamma_l - d, 0), cap_l)
dgap[n,j] = g[n] sum_l c / e,    dnorm[n,j,l] = -g[n] c gap / e^2   with e = eps + norm, c the weight of an active term

A program takes a tile of samples and all layers and runs over the competitors, backward twice: which of them is the
nearest, or their mean distance, comes before any derivative. Reads and writes N k (L + 1) numbers, L + 1 of them twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from .launch import accumulate, cdiv, kernel, launch
from .numerics import divide, narrow, widen
from .second import second_derivative

TILE = 256  # samples times layers

_INF = tl.constexpr(float("inf"))


@triton.jit
def _load_distance(
    gap, gap_stride_n, gap_stride_k, norm, norm_stride_n, norm_stride_k, norm_stride_l,
    sample, j, layer, mask, eps, least, ACC: tl.constexpr,
):  # fmt: skip
    """(distance, gap, eps + norm, whether the pair is left out) of competitor j, [SAMPLES, LAYERS] each."""
    g = widen(tl.load(gap + sample * gap_stride_n + j * gap_stride_k, mask, other=0.0), ACC)
    place = norm + sample * norm_stride_n + j * norm_stride_k + layer * norm_stride_l
    n = widen(tl.load(place, mask, other=1.0), ACC)
    e = eps + n
    # A masked competitor is infinitely far on the right side, a masked label on the wrong one, whatever the norm is.
    distance = tl.where(tl.abs(g) == _INF, -g, divide(-g, e))
    return distance, g, e, (g == -_INF) | ((n <= least) & (g == g))


@triton.jit
def _load_layers(
    gamma, gamma_stride, cap, cap_stride, weight, weight_stride, min_norm, min_norm_stride, layer, layers,
    MEAN_OF_LAYERS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """gamma, cap, the weight of each layer's term and min_norm, [1, LAYERS] each; weight 0 behind the last layer."""
    inside = layer < layers
    g = widen(tl.load(gamma + layer * gamma_stride, inside, other=0.0), ACC)
    c = tl.full(layer.shape, _INF, ACC)
    if cap is not None:
        c = widen(tl.load(cap + layer * cap_stride, inside, other=0.0), ACC)
    w = tl.where(inside, 1.0, 0.0).to(ACC)
    if weight is not None:
        w = widen(tl.load(weight + layer * weight_stride, inside, other=0.0), ACC)
    legal = (g >= 0) & (c >= 0) & (w >= 0)
    least = tl.full(layer.shape, -_INF, ACC)  # no norm is below
    if min_norm is not None:
        least = widen(tl.load(min_norm + layer * min_norm_stride, inside, other=0.0), ACC)
        legal = legal & (least >= 0)
    if MEAN_OF_LAYERS:
        w = divide(w, tl.zeros(layer.shape, ACC) + tl.sum(w, 1)[:, None])
    # The host does not read them: a wrong one makes the loss NaN.
    return g, c, tl.where(legal, w, float("nan")), least


@triton.jit
def _term(distance, gamma, cap):
    """min(max(gamma - d, 0), cap); NaN stays."""
    shortfall = gamma - distance
    return tl.where(shortfall <= 0, 0.0, tl.where(shortfall >= cap, cap, shortfall))


@triton.jit
def _flat(distance, gamma, cap):
    """Where the term has slope 0: both kinks are, NaN is not, so that it stays NaN in the gradient."""
    shortfall = gamma - distance
    return (shortfall <= 0) | (shortfall >= cap)


@triton.jit
def _nearer(distance, best):
    """Before `best`, found earlier? The first of equals stays, and so does the first NaN."""
    return (best == best) & ((distance < best) | (distance != distance))


@kernel
def _forward(
    gap,  # [N, k]
    gap_stride_n,
    gap_stride_k,
    norm,  # [N, k, L]
    norm_stride_n,
    norm_stride_k,
    norm_stride_l,
    gamma,  # [L]
    gamma_stride,
    cap,  # [L] or None
    cap_stride,
    weight,  # [L] or None
    weight_stride,
    min_norm,  # [L] or None
    min_norm_stride,
    loss,  # [N]
    distances,  # [N, k, L], contiguous
    samples,
    k,
    layers,
    eps: tl.float64,
    AGGREGATION: tl.constexpr,
    MEAN_OF_LAYERS: tl.constexpr,
    SAMPLES: tl.constexpr,
    LAYERS: tl.constexpr,
):
    ACC: tl.constexpr = loss.dtype.element_ty
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    layer = tl.arange(0, LAYERS)[None, :]
    mask = (sample < samples)[:, None] & (layer < layers)
    eps = tl.full([1, 1], eps, ACC)
    bounds = _load_layers(
        gamma, gamma_stride, cap, cap_stride, weight, weight_stride, min_norm, min_norm_stride, layer, layers,
        MEAN_OF_LAYERS, ACC,
    )  # fmt: skip
    result = tl.zeros([SAMPLES, LAYERS], ACC)
    count = tl.zeros([SAMPLES, LAYERS], ACC)  # of the pairs that are not left out
    if AGGREGATION == "max":
        result += _INF
    for j in range(k):
        distance, _, _, out = _load_distance(
            gap, gap_stride_n, gap_stride_k, norm, norm_stride_n, norm_stride_k, norm_stride_l,
            sample[:, None], j, layer, mask, eps, bounds[3], ACC,
        )  # fmt: skip
        tl.store(distances + (sample[:, None] * k + j) * layers + layer, distance, mask)
        count += tl.where(out, 0.0, 1.0)
        if AGGREGATION == "max":
            result = tl.where(_nearer(distance, result) & (out == 0), distance, result)
        elif AGGREGATION == "mean_distance":
            result += tl.where(out, 0.0, distance)
        else:
            result += tl.where(out, 0.0, _term(distance, bounds[0], bounds[1]))
    if AGGREGATION == "mean":
        result = divide(result, tl.zeros([SAMPLES, LAYERS], ACC) + k)
    if AGGREGATION == "mean_distance":
        result = divide(result, tl.maximum(count, 1.0))
    if AGGREGATION == "max" or AGGREGATION == "mean_distance":
        result = tl.where(count == 0, 0.0, _term(result, bounds[0], bounds[1]))
    tl.store(loss + sample, tl.sum(tl.where(mask, result * bounds[2], 0.0), 1), sample < samples)


@kernel
def _backward(
    grad,  # [N]
    grad_stride,
    gap,  # [N, k]
    gap_stride_n,
    gap_stride_k,
    norm,  # [N, k, L]
    norm_stride_n,
    norm_stride_k,
    norm_stride_l,
    gamma,  # [L]
    gamma_stride,
    cap,  # [L] or None
    cap_stride,
    weight,  # [L] or None
    weight_stride,
    min_norm,  # [L] or None
    min_norm_stride,
    dgap,  # [N, k], contiguous
    dnorm,  # [N, k, L], contiguous, or None
    samples,
    k,
    layers,
    eps: tl.float64,
    AGGREGATION: tl.constexpr,
    MEAN_OF_LAYERS: tl.constexpr,
    ACC: tl.constexpr,
    SAMPLES: tl.constexpr,
    LAYERS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    layer = tl.arange(0, LAYERS)[None, :]
    mask = (sample < samples)[:, None] & (layer < layers)
    eps = tl.full([1, 1], eps, ACC)
    bounds = _load_layers(
        gamma, gamma_stride, cap, cap_stride, weight, weight_stride, min_norm, min_norm_stride, layer, layers,
        MEAN_OF_LAYERS, ACC,
    )  # fmt: skip
    g = widen(tl.load(grad + sample * grad_stride, sample < samples, other=0.0), ACC)[:, None]
    share = g * bounds[2]
    # "max": the distance of the nearest competitor and its number; "mean_distance": the mean
    common = tl.zeros([SAMPLES, LAYERS], ACC)
    nearest = tl.full([SAMPLES, LAYERS], -1, tl.int32)
    count = tl.zeros([SAMPLES, LAYERS], ACC)
    if AGGREGATION == "max":
        common += _INF
    if AGGREGATION == "max" or AGGREGATION == "mean_distance":
        for j in range(k):
            distance, _, _, out = _load_distance(
                gap, gap_stride_n, gap_stride_k, norm, norm_stride_n, norm_stride_k, norm_stride_l,
                sample[:, None], j, layer, mask, eps, bounds[3], ACC,
            )  # fmt: skip
            if AGGREGATION == "max":
                nearer = _nearer(distance, common) & (out == 0)
                common = tl.where(nearer, distance, common)
                nearest = tl.where(nearer, j, nearest)
            else:
                common += tl.where(out, 0.0, distance)
                count += tl.where(out, 0.0, 1.0)
    if AGGREGATION == "mean":
        share = divide(share, tl.zeros([SAMPLES, LAYERS], ACC) + k)
    if AGGREGATION == "mean_distance":
        count = tl.maximum(count, 1.0)
        common = divide(common, count)
        share = divide(share, count)
    for j in range(k):
        distance, w, e, out = _load_distance(
            gap, gap_stride_n, gap_stride_k, norm, norm_stride_n, norm_stride_k, norm_stride_l,
            sample[:, None], j, layer, mask, eps, bounds[3], ACC,
        )  # fmt: skip
        if AGGREGATION == "max" or AGGREGATION == "mean_distance":
            flat = _flat(common, bounds[0], bounds[1])
        else:
            flat = _flat(distance, bounds[0], bounds[1])
        if AGGREGATION == "max":
            flat = flat | (nearest != j)
        flat = flat | out | (tl.abs(w) == _INF) | (layer >= layers)
        # Selected, not multiplied: a slope is 0 even where the gap or the norm is infinite.
        slope = tl.where(flat, 0.0, divide(share, e))
        place = sample * k + j
        tl.store(dgap + place, narrow(tl.sum(slope, 1), dgap.dtype.element_ty), sample < samples)
        if dnorm is not None:
            d = tl.where(flat | (e == _INF), 0.0, divide(-slope * w, e))
            tl.store(dnorm + place[:, None] * layers + layer, narrow(d, dnorm.dtype.element_ty), mask)


def _tile(layers: int) -> dict[str, int]:
    across = triton.next_power_of_2(layers)
    return {"SAMPLES": max(1, TILE // across), "LAYERS": across}


def _with_stride(tensor: Tensor | None) -> tuple[Tensor | None, int]:
    return tensor, 0 if tensor is None else tensor.stride(0)


@torch.library.custom_op("margin_kernels_triton::margin_hinge", mutates_args=())
def _margin_hinge(
    gap: Tensor,
    norm: Tensor,
    gamma: Tensor,
    cap: Tensor | None,
    weight: Tensor | None,
    min_norm: Tensor | None,
    eps: float,
    aggregation: str,
    layer_reduction: str,
) -> tuple[Tensor, Tensor]:
    n, k, layers = norm.shape
    acc = accumulate(gap.dtype, norm.dtype)
    loss = torch.empty(n, dtype=acc, device=gap.device)
    distances = torch.empty(n, k, layers, dtype=acc, device=gap.device)
    inputs = (gap, *gap.stride(), norm, *norm.stride())
    bounds = (*_with_stride(gamma), *_with_stride(cap), *_with_stride(weight), *_with_stride(min_norm))
    tile = _tile(layers)
    constants = {"AGGREGATION": aggregation, "MEAN_OF_LAYERS": layer_reduction == "mean", **tile}
    grid = (cdiv(n, tile["SAMPLES"]),)
    launch(_forward, grid, gap, *inputs, *bounds, loss, distances, n, k, layers, eps, **constants)
    return loss, distances


@_margin_hinge.register_fake
def _(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction):
    acc = accumulate(gap.dtype, norm.dtype)
    return gap.new_empty(gap.shape[0], dtype=acc), gap.new_empty(norm.shape, dtype=acc)


@torch.library.custom_op("margin_kernels_triton::margin_hinge_backward", mutates_args=())
def _margin_hinge_backward(
    grad: Tensor,
    gap: Tensor,
    norm: Tensor,
    gamma: Tensor,
    cap: Tensor | None,
    weight: Tensor | None,
    min_norm: Tensor | None,
    eps: float,
    aggregation: str,
    layer_reduction: str,
    norm_grad: bool,
) -> tuple[Tensor, Tensor]:
    n, k, layers = norm.shape
    dgap = torch.empty(n, k, dtype=gap.dtype, device=gap.device)
    dnorm = torch.empty(norm.shape if norm_grad else (0,), dtype=norm.dtype, device=gap.device)
    inputs = (grad, grad.stride(0), gap, *gap.stride(), norm, *norm.stride())
    bounds = (*_with_stride(gamma), *_with_stride(cap), *_with_stride(weight), *_with_stride(min_norm))
    tile = _tile(layers)
    acc = tl.float64 if accumulate(gap.dtype, norm.dtype) == torch.float64 else tl.float32
    constants = {"AGGREGATION": aggregation, "MEAN_OF_LAYERS": layer_reduction == "mean", "ACC": acc}
    outputs = (dgap, dnorm if norm_grad else None)
    grid = (cdiv(n, tile["SAMPLES"]),)
    launch(_backward, grid, gap, *inputs, *bounds, *outputs, n, k, layers, eps, **constants, **tile)
    return dgap, dnorm


@_margin_hinge_backward.register_fake
def _(grad, gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction, norm_grad):
    dnorm = norm.new_empty(norm.shape if norm_grad else (0,))
    return torch.empty_like(gap, memory_format=torch.contiguous_format), dnorm


def _save(ctx, inputs, output):
    gap, norm, gamma, cap, weight, min_norm, ctx.eps, ctx.aggregation, ctx.layer_reduction = inputs
    ctx.save_for_backward(gap, norm, gamma, cap, weight, min_norm)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, grad, _distance):
    norm_grad = ctx.needs_input_grad[1]
    options = (ctx.eps, ctx.aggregation, ctx.layer_reduction)
    dgap, dnorm = _margin_hinge_backward(grad, *ctx.saved_tensors, *options, norm_grad)
    return dgap, dnorm if norm_grad else None, *[None] * 7


_margin_hinge.register_autograd(_differentiate, setup_context=_save)


def _save_backward(ctx, inputs, output):
    grad, gap, norm, gamma, cap, weight, min_norm, *ctx.options, ctx.norm_grad = inputs
    ctx.save_for_backward(grad, gap, norm, gamma, cap, weight, min_norm)
    ctx.set_materialize_grads(False)


def _differentiate_backward(ctx, from_gap, from_norm):
    """from_gap [N, k], from_norm [N, k, L]: what arrives at dgap and dnorm."""
    grad, gap, norm, *bounds = ctx.saved_tensors
    (d_grad,), (d_gap, d_norm) = second_derivative(
        lambda g, n: [reference.margin_hinge(g, n, *bounds, *ctx.options)[0]],
        [gap, norm],
        [grad],
        [from_gap, from_norm if ctx.norm_grad else None],
    )
    return d_grad, d_gap, d_norm, *[None] * 8


_margin_hinge_backward.register_autograd(_differentiate_backward, setup_context=_save_backward)


def margin_hinge(
    gap: Tensor,
    norm: Tensor,
    gamma: Tensor,
    cap: Tensor | None,
    weight: Tensor | None,
    min_norm: Tensor | None,
    eps: float,
    aggregation: str,
    layer_reduction: str,
) -> tuple[Tensor, Tensor]:
    return _margin_hinge(gap, norm, gamma, cap, weight, min_norm, float(eps), aggregation, layer_reduction)

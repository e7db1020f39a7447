"""One function per op. Formulas: z logits [N, C], y target [N], k competitors, L layers, q = p / (p - 1).

Inputs may be float64, float32, bfloat16 or float16 with any strides; gaps, norms, distances and losses are float32
(float64 for float64 inputs). All are differentiable twice; nothing synchronises with the device.
`backend` is "auto", "cuda", "cpu", "triton" or "reference" (see margin_kernels.backends).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends import choose

_COMPILED = ("cpu", "cuda")
Layerwise = float | Sequence[float] | Tensor


class Competitors(NamedTuple):
    """What `competitors` returns: index [N, k] int64, gap [N, k], nll [N]."""

    index: Tensor  # type: ignore[assignment]  # tuple.index is a method
    gap: Tensor
    nll: Tensor


def competitors(logits: Tensor, target: Tensor, k: int = 1, backend: str = "auto") -> Competitors:
    """The k strongest classes other than the label, their gaps to it, and the cross-entropy, from one read.

        index[n] = the k largest z[n, i] with i != y[n], in decreasing order, equal logits: lowest class first
        gap      = z[n, index] - z[n, y[n]]
        nll      = logsumexp_i z[n, i] - z[n, y[n]]

    Args:
        logits: [N, C], C >= 2.
        target: [N] int64 in [0, C).
        k: number of competitors, 1 <= k <= C - 1.

    Returns:
        Competitors(index [N, k] int64, gap [N, k], nll [N]); gap and nll are differentiable in the logits. A row that
        holds NaN or infinity gives gap = nll = NaN and a NaN gradient. On a GPU so does a target outside [0, C).

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or k; on the CPU also a target outside [0, C).
        BackendError: a backend named by the caller cannot run.
    """
    name, op = choose("competitors", (logits,), backend)
    if name in _COMPILED:
        gap, nll, index, _ = op(logits, target, k)
    else:
        checks.check_competitors(logits, target, k)
        index, gap, nll = op(logits, target, k)
    return Competitors(index, gap, nll)


def dual_norm(gradients: Sequence[Tensor], p: float = 2, batch_dims: int = 2, backend: str = "auto") -> Tensor:
    """Dual norms of the rows of several layers' gradients in one launch.

        norms[..., l] = || gradients[l][..., :] ||_q      q = p / (p - 1);  p = 1: maximum, p = inf: sum of magnitudes

    Args:
        gradients: a list of L tensors [N, k, *] (batch_dims=2) or [N, *] (batch_dims=1) with equal leading dimensions.
        p: the norm in which distances are measured, in [1, inf].
        batch_dims: how many leading dimensions index rows; the others are flattened into the row.

    Returns:
        [N, k, L] or [N, L]. Neither overflows nor flushes to zero where the norm itself is representable.
        Gradient sign(G) |G|^(q-1) / norm^(q-1): 0 where the norm is 0, split evenly over the maxima for p = 1.
        Not-a-number entries give NaN. Bitwise repeatable; a row's result does not depend on the other rows.

    Raises:
        ValueError, TypeError: an empty list, unequal leading dimensions or devices, p < 1, integer tensors.
        BackendError: a backend named by the caller cannot run.
    """
    if isinstance(gradients, Tensor):
        raise TypeError("gradients must be a list of tensors, one per layer, got a single tensor: wrap it in a list")
    if len(gradients) == 0:
        raise ValueError("gradients must hold at least one tensor, got an empty list")
    name, op = choose("dual_norm", gradients, backend)
    if name not in _COMPILED:
        checks.check_dual_norm(gradients, p, batch_dims)
    return op(gradients, p, batch_dims)


def margin_hinge(
    gap: Tensor,
    norm: Tensor,
    gamma: Layerwise,
    cap: Layerwise | None = None,
    eps: float = 1e-6,
    aggregation: str = "max",
    layer_reduction: str = "mean",
    reduction: str = "mean",
    layer_weights: Layerwise | None = None,
    backend: str = "auto",
) -> Tensor:
    """Hinge on the signed distance to the decision boundaries, clipped, aggregated over classes and layers.

        d[n, j, l] = -gap[n, j] / (eps + norm[n, j, l])
        term       = min(max(gamma_l - d, 0), cap_l)        slope -1 where 0 < gamma_l - d < cap_l, else 0
        over j     : "max" | "sum" | "mean" of the terms, or "mean_distance" = the term of the mean distance
        over l     : "mean" = sum_l w_l t_l / sum_l w_l | "sum" = sum_l w_l t_l          (w = layer_weights, default 1)
        over n     : "mean" | "sum" | "none"

    Args:
        gap: [N, k], from `competitors`.
        norm: [N, k, L], from `dual_norm`. Detach it for the first-order gradient of the paper.
        gamma, cap, layer_weights: one number, L numbers, or a tensor [L]. gamma and cap in units of distance.
        eps: added to the norm, >= 0.

    Returns:
        the loss, [] or [N] for reduction="none". Equal distances: the competitor with the lowest j takes the gradient.

    Raises:
        ValueError, TypeError: shapes, devices, negative eps, unknown names.
        BackendError: a backend named by the caller cannot run.

    Source: Elsayed et al., Large Margin Deep Networks for Classification, NeurIPS 2018, eq. 7 and section 4.1.
    """
    loss, _ = margin_hinge_with_distance(
        gap, norm, gamma, cap, eps, aggregation, layer_reduction, reduction, layer_weights, backend
    )
    return loss


def margin_hinge_with_distance(
    gap: Tensor,
    norm: Tensor,
    gamma: Layerwise,
    cap: Layerwise | None = None,
    eps: float = 1e-6,
    aggregation: str = "max",
    layer_reduction: str = "mean",
    reduction: str = "mean",
    layer_weights: Layerwise | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`margin_hinge` and the signed distances [N, k, L] that it computed on the way, without gradient."""
    if norm.dim() != 3:
        raise ValueError(f"norm must have shape [N, k, L], got {list(norm.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of mean, sum, none, got {reduction}")
    gamma = per_layer(gamma, norm)
    cap = None if cap is None else per_layer(cap, norm)
    weight = None if layer_weights is None else per_layer(layer_weights, norm)
    name, op = choose("margin_hinge", (gap, norm), backend)
    if name not in _COMPILED:
        checks.check_margin_hinge(gap, norm, gamma, cap, weight, eps, aggregation, layer_reduction)
    loss, distance = op(gap, norm, gamma, cap, weight, eps, aggregation, layer_reduction)
    if reduction != "none":
        loss = loss.mean() if reduction == "mean" else loss.sum()
    return loss, distance


def per_layer(value: Layerwise, norm: Tensor) -> Tensor:
    """[L] on the device of norm [N, k, L]: a tensor [L] as it is, a number for all layers, or L numbers."""
    if isinstance(value, Tensor) and value.dim() == 1:
        return value
    dtype = torch.float64 if norm.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        return value.to(dtype).expand(norm.shape[2])
    if isinstance(value, (int, float)):
        return torch.full((norm.shape[2],), float(value), dtype=dtype, device=norm.device)
    return torch.tensor(value, dtype=dtype, device=norm.device)

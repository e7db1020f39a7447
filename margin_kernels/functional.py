"""One function per op. Formulas: z logits [N, C], y target [N], k competitors, L layers, q = p / (p - 1).

Inputs may be float64, float32, bfloat16 or float16 with any strides; gaps, norms, distances and losses are float32
(float64 for float64 inputs). All are differentiable twice; nothing synchronises with the device. So targets are checked
where they are read: on the CPU one outside [0, C) is an error that names it, on a GPU it gives NaN, and a device-side
assert only in a debug build (MARGIN_KERNELS_DEBUG=1 at installation).
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


class DeepFoolStep(NamedTuple):
    """What `deepfool_step` returns: step [N, *], choice [N] int64, distance [N]."""

    step: Tensor
    choice: Tensor
    distance: Tensor


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


def row_distance(rows: Tensor, index: Tensor, target: Tensor, p: float = 2, backend: str = "auto") -> Tensor:
    """Dual norms of the differences of gathered rows: the closed-form margin of a last layer z = W h + b.

        norm[n, j] = || rows[index[n, j]] - rows[target[n]] ||_q      q = p / (p - 1)

    Args:
        rows: [C, D], the weight of the last layer.
        index: [N, k] int64 in [0, C): competitors.
        target: [N] int64 in [0, C).
        p: the norm in which distances are measured, in [1, inf].

    Returns:
        [N, k]. 0 with gradient 0 where index == target. Nothing of size [N, k, D] is allocated by the compiled
        kernels. On a GPU a pair with an index or target outside [0, C) is NaN and has no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, p < 1; on the CPU also an index or target outside [0, C).
        BackendError: a backend named by the caller cannot run.

    Source: Elsayed et al., Large Margin Deep Networks for Classification, NeurIPS 2018, eq. 7, for the last layer.
    """
    name, op = choose("row_distance", (rows,), backend)
    if name not in _COMPILED:
        checks.check_row_distance(rows, index, target, p)
    return op(rows, index, target, p)


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
    loss = reduced(loss, reduction)
    return loss, distance


def one_to_n(
    logits: Tensor,
    target: Tensor,
    delta: float = 1.0,
    bound: str = "symmetric",
    cross_entropy: bool = False,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """1-to-N loss: each sample against the logits that the batch's other classes have in its column, in O(N C).

        a_i  = min(z[i, y_i], delta)
        A_c  = logsumexp over j with y_j != c of max(z[j, c], -delta)         (+ delta for bound="positive")
        L_i  = softplus(A_{y_i} - a_i)                                        = -log of eq. 8
        L_i  = logaddexp(A_{y_i}, logsumexp_k z[i, k]) - a_i                  with cross_entropy, eq. 14
        over i: "mean" | "sum" | "none"

    Args:
        logits: [N, C], C >= 2.
        target: [N] int64 in [0, C).
        delta: half the margin, in units of the logits, finite and > 0. No gradient where z reaches delta (-delta).
        bound: "symmetric": scores bounded to [-delta, delta]; "positive": negatives bounded from 0.
        cross_entropy: adds the sample's own softmax denominator.

    Returns:
        the loss, [] or [N] for reduction="none". A batch of one class has no negatives: loss and gradient 0 (what
        remains with cross_entropy is logsumexp_k z[i, k] - a_i). A non-finite logit gives NaN in every loss that it
        enters; on a GPU a target outside [0, C) makes its row of logits NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, delta, unknown names; on the CPU also a target outside [0, C).
        BackendError: a backend named by the caller cannot run.

    Source: Rocca Layza, Pedrini, Torres, 1-to-N Large Margin Classifier, SIBGRAPI 2020, eq. 8 and 14.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of mean, sum, none, got {reduction}")
    name, op = choose("one_to_n", (logits,), backend)
    if name in _COMPILED:
        loss, _, _ = op(logits, target, delta, bound, cross_entropy)
    else:
        checks.check_one_to_n(logits, target, delta, bound)
        loss = op(logits, target, delta, bound, cross_entropy)
    return reduced(loss, reduction)


def deepfool_step(
    gap: Tensor, gradients: Tensor, active: Tensor | None = None, p: float = 2, backend: str = "auto"
) -> DeepFoolStep:
    """The step to the nearest linearised decision boundary: norms, choice of the boundary and step on the device.

        distance_j = |gap_j| / || w_j ||_q      w_j = gradients[n, j], q = p / (p - 1); infinity where w_j = 0
        choice     = argmin_j distance_j        equal distances: lowest j
        step       = distance u,   u = sign(w) (|w| / ||w||_q)^(q-1) of the chosen j;   || step ||_p = distance

    Args:
        gap: [N, k], k >= 1: scores of the candidates minus that of the reference class.
        gradients: [N, k, *], the gradient of each gap in the input.
        active: [N] bool or None for all. Where False: step, choice, distance and gradients 0.
        p: the norm in which distances are measured, in [1, inf]. p = 1: the whole step goes on the first of the
            largest |w_i|.

    Returns:
        DeepFoolStep(step [N, *] of the dtype of gradients, choice [N] int64, distance [N]); step and distance are
        differentiable twice in gap and gradients, through the chosen candidate. All w_j = 0: step 0, distance
        infinity, choice 0. NaN or infinity in an active sample: step and distance NaN, choice 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, p < 1.
        BackendError: a backend named by the caller cannot run.

    Source: Moosavi-Dezfooli, Fawzi, Frossard, DeepFool, CVPR 2016, eq. 8; Yan et al. 2019 (TPAMI) for any p.
    """
    name, op = choose("deepfool_step", (gap, gradients), backend)
    if name in _COMPILED:
        step, distance, choice, _ = op(gap, gradients, active, p)
    else:
        checks.check_deepfool_step(gap, gradients, active, p)
        step, distance, choice = op(gap, gradients, active, p)
    return DeepFoolStep(step, choice, distance)


def reduced(per_sample: Tensor, reduction: str) -> Tensor:
    """per_sample [N] as [] for "mean" and "sum", as it is for "none"."""
    if reduction == "none":
        return per_sample
    return per_sample.mean() if reduction == "mean" else per_sample.sum()


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

"""One function per op. Formulas: z logits [N, C], y target [N], k competitors, L layers, q = p / (p - 1).

Inputs may be float64, float32, bfloat16 or float16 with any strides; gaps, norms, distances and losses are float32
(float64 for float64 inputs). All are differentiable twice; nothing synchronises with the device. So targets are checked
where they are read: on the CPU one outside [0, C) is an error that names it, on a GPU it gives NaN, and a device-side
assert only in a debug build (MARGIN_KERNELS_DEBUG=1 at installation).
`backend` is "auto", "cuda", "cpu", "triton" or "reference" (see margin_kernels.backends).
DTensors are gathered, whatever their placements: the result is a plain tensor, the same on every process, and gradients
are sharded as the arguments are (see margin_kernels.sharding). A plain tensor beside them stands for the whole, too.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .backends import COMPILED, EXTENSION, choose, is_functorch_wrapped
from .checks import Layerwise
from .sharding import gathered
from .tracing import is_plain, tracing

__all__ = [
    "Competitors",
    "DeepFoolStep",
    "competitors",
    "deepfool_step",
    "dual_norm",
    "margin_hinge",
    "one_to_n",
    "row_distance",
]


def __dir__() -> list[str]:
    """The public names: what is imported here, and what losses take from here besides, are not among them."""
    return sorted(__all__)


class Competitors(NamedTuple):
    """What `competitors` returns, by name: competitor [N, k] int64, the other [N, k] and [N], valid [N] bool."""

    competitor: Tensor
    gap: Tensor
    nll: Tensor
    phi: Tensor
    uniform: Tensor | None
    valid: Tensor


def competitors(
    logits: Tensor,
    target: Tensor,
    k: int = 1,
    ignore_index: int = -100,
    uniform: bool = False,
    backend: str = "auto",
) -> Competitors:
    """The k strongest classes other than the label, their gaps, cross-entropy and log-odds, from one read.

        competitor = the k largest z[n, i] with i != y[n], in decreasing order, equal logits: lowest class first
        gap        = z[n, competitor] - z[n, y[n]]
        nll        = logsumexp_i z[n, i] - z[n, y[n]]
        phi        = z[n, y[n]] - logsumexp_{i != y[n]} z[n, i]               nll = softplus(-phi)
        uniform    = mean over the classes c with finite z[n, c] of -log p_c  p = softmax(z[n])

    nll and phi are right to float32 rounding for any confidence: the sum over j != y never meets the label's 1.

    Args:
        logits: [N, C], C >= 2. A class with logit -inf is masked: probability 0, gradient 0. Or [N, C, *S], predictions
            at positions, in any memory format: the CPU kernel reads them where they lie, other backends make one copy
            where the classes are not side by side.
        target: [N] int64 in [0, C), or ignore_index; [N, *S] for predictions at positions, and so are the results.
        k: number of competitors, 0 <= k <= C - 1.
        ignore_index: rows with this target are left out; it may be the number of a class.
        uniform: also return `uniform`, the term of label smoothing.
        backend: "auto", or the name of the one that must run.

    Returns:
        Competitors(competitor [N, k] int64, gap [N, k], nll [N], phi [N], uniform [N] or None, valid [N] bool =
        target != ignore_index); gap, nll, phi and uniform are differentiable twice in the logits.

        row                          competitor                 gap        nll   phi   gradient
        masked class                 not among the k while finite ones are left        0 in that class
        fewer than k finite classes  then the masked, in order  -inf                   0 from that gap
        no finite class but label    masked classes             -inf       0     inf   0
        masked label                 k largest                  inf        inf   -inf  nll: p - e_y; gap, phi: 0
        target == ignore_index       first k classes            0          0     0     0
        NaN or +inf, target outside  first k without the label  NaN        NaN   NaN   NaN

        `uniform` counts finite classes only and is 0 where target == ignore_index. A row without any finite logit is
        NaN. A target outside [0, C) gives NaN on a GPU and is an error on the CPU.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or k; on the CPU also a target outside [0, C).
        BackendError: a backend named by the caller cannot run.
    """
    logits, target = gathered(logits, target)
    name, op = choose("competitors", (logits,), backend)
    if logits.dim() > 2:
        return _at_positions(logits, target, k, ignore_index, uniform, name)
    if name not in COMPILED:
        checks.check_competitors(logits, target, k, ignore_index)
        gap, nll, phi, smoothing, index = op(logits, target, k, ignore_index, uniform)
        valid = target != ignore_index
    else:
        gap, nll, phi, smoothing, index, _, valid = op(logits, target, k, ignore_index, uniform)
    return Competitors(index, gap, nll, phi, smoothing if uniform else None, valid)


def _at_positions(
    logits: Tensor, target: Tensor, k: int, ignore_index: int, uniform: bool, backend: str
) -> Competitors:
    """`competitors` of logits [N, C, *S] and target [N, *S]."""
    shape = torch.Size([logits.shape[0], *logits.shape[2:]])
    if target.dim() < 2:
        raise ValueError(f"logits must have shape [N, C], got {list(logits.shape)}")
    if target.shape != shape:
        raise ValueError(f"target must have shape {list(shape)} to match logits, got {list(target.shape)}")
    rows = logits.movedim(1, -1)
    if backend == "cpu" and not rows.is_contiguous():
        _, op = choose("competitors", (logits,), backend)
        gap, nll, phi, smoothing, index, _, valid = op(logits.flatten(2), target.flatten(), k, ignore_index, uniform)
        found = Competitors(index, gap, nll, phi, smoothing if uniform else None, valid)
    else:
        found = competitors(rows.flatten(0, -2), target.flatten(), k, ignore_index, uniform, backend)
    return reshaped(found, lambda value: value.unflatten(0, shape))


def reshaped(found: Competitors, change: Callable[[Tensor], Tensor]) -> Competitors:
    """The same with every tensor changed."""
    index, gap, nll, phi, smoothing, valid = found
    smoothing = None if smoothing is None else change(smoothing)
    return Competitors(change(index), change(gap), change(nll), change(phi), smoothing, change(valid))


class DeepFoolStep(NamedTuple):
    """What `deepfool_step` returns: step [N, *], choice [N] int64, distance [N]."""

    step: Tensor
    choice: Tensor
    distance: Tensor


def dual_norm(gradients: Sequence[Tensor], p: float | str = 2, batch_dims: int = 2, backend: str = "auto") -> Tensor:
    """Dual norms of the rows of several layers' gradients in one launch.

        norms[..., l] = || gradients[l][..., :] ||_q      q = p / (p - 1);  p = 1: maximum, p = inf: sum of magnitudes

    Args:
        gradients: a list of L tensors [N, k, *] (batch_dims=2) or [N, *] (batch_dims=1) with equal leading dimensions.
        p: the norm in which distances are measured, in [1, inf]; "inf" is infinity.
        batch_dims: how many leading dimensions index rows; the others are flattened into the row.
        backend: "auto", or the name of the one that must run.

    Returns:
        [N, k, L] or [N, L]. Neither overflows nor flushes to zero where the norm itself is representable. On the CPU
        norms of float32, bfloat16 and float16 are within 2 units in the last place of float32, for every p (measured
        over rows of 1 to 5000 entries; the bounds of each power stand in csrc/cpu/dual_norm_kernel.h).
        Gradient sign(G) |G|^(q-1) / norm^(q-1): 0 where the norm is 0, split evenly over the maxima for p = 1.
        A norm beyond the range of its type is infinite, with gradient 0 (sign(G) for p = inf); an infinite entry makes
        the norm infinite and, but for p = 1 and p = inf, its own gradient NaN. NaN entries give NaN.
        Bitwise repeatable; a row's result does not depend on the other rows.

    Raises:
        ValueError, TypeError: an empty list, unequal leading dimensions or devices, p < 1, integer tensors.
        BackendError: a backend named by the caller cannot run.
    """
    if isinstance(gradients, Tensor):
        raise TypeError("gradients must be a list of tensors, one per layer, got a single tensor: wrap it in a list")
    if len(gradients) == 0:
        raise ValueError("gradients must hold at least one tensor, got an empty list")
    p = checks.exponent(p)
    gradients = gathered(*gradients)
    name, op = choose("dual_norm", gradients, backend)
    if name not in COMPILED:
        checks.check_dual_norm(gradients, p, batch_dims)
    return op(gradients, p, batch_dims)


def row_distance(rows: Tensor, index: Tensor, target: Tensor, p: float | str = 2, backend: str = "auto") -> Tensor:
    """Dual norms of the differences of gathered rows: the closed-form margin of a last layer z = W h + b.

        norm[n, j] = || rows[index[n, j]] - rows[target[n]] ||_q      q = p / (p - 1)

    Args:
        rows: [C, D], the weight of the last layer.
        index: [N, k] int64 in [0, C): competitors.
        target: [N] int64 in [0, C).
        p: the norm in which distances are measured, in [1, inf]; "inf" is infinity.
        backend: "auto", or the name of the one that must run.

    Returns:
        [N, k]. 0 with gradient 0 where index == target. Nothing of size [N, k, D] is allocated by the compiled
        kernels. On a GPU a pair with an index or target outside [0, C) is NaN and has no gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, p < 1; on the CPU also an index or target outside [0, C).
        BackendError: a backend named by the caller cannot run.

    Source: Elsayed et al., Large Margin Deep Networks for Classification, NeurIPS 2018, eq. 7, for the last layer.
    """
    p = checks.exponent(p)
    rows, index, target = gathered(rows, index, target)
    name, op = choose("row_distance", (rows,), backend)
    if name not in COMPILED:
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
    min_norm: Layerwise | None = None,
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
        gamma: one number, L numbers, or a tensor [L], each >= 0, in units of distance.
        cap: as gamma; None: no cap.
        eps: added to the norm, >= 0.
        aggregation: over the competitors: "max", "sum", "mean" or "mean_distance".
        layer_reduction: over the layers: "mean" or "sum".
        reduction: over the samples: "mean", "sum" or "none".
        layer_weights: one number, L numbers, or a tensor [L], each >= 0; None: 1.
        backend: "auto", or the name of the one that must run.
        min_norm: as layer_weights, in units of norm: a pair whose norm is at most min_norm_l is left out, for its
            distance means nothing. None: no pair is.

    Returns:
        the loss, [] or [N] for reduction="none". Equal distances: the competitor with the lowest j takes the gradient.

        pair                        distance  term and slope
        gap = -inf (masked competitor)   inf       left out
        norm <= min_norm_l          formula   left out
        gap = +inf (masked label)   -inf      cap (inf without cap), slope 0
        norm = +inf                 0         gamma, slope 0
        NaN                         NaN       NaN, NaN
        Left out: 0 in "sum" and "mean", whose denominator stays k; no candidate of "max"; not in the mean of
        "mean_distance". Where all are left out the term is 0.

    Raises:
        ValueError, TypeError: shapes, devices, unknown names, negative or NaN eps, gamma, cap, layer_weights or
            min_norm, and layer_weights that are all 0 with layer_reduction="mean". A tensor on a GPU is not read: there
            the loss is NaN instead.
        BackendError: a backend named by the caller cannot run.

    Source: Elsayed et al., Large Margin Deep Networks for Classification, NeurIPS 2018, eq. 7 and section 4.1.
    """
    if norm.dim() != 3:
        raise ValueError(f"norm must have shape [N, k, L], got {list(norm.shape)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of mean, sum, none, got {reduction}")
    for argument, value in (("gamma", gamma), ("cap", cap), ("min_norm", min_norm)):
        checks.check_layerwise(argument, value)
    checks.check_layer_weights(layer_weights, layer_reduction)
    wide = torch.float64 if torch.float64 in (gap.dtype, norm.dtype) else torch.float32
    gamma = per_layer(gamma, norm, wide)
    cap, weight, least = (
        None if value is None else per_layer(value, norm, wide) for value in (cap, layer_weights, min_norm)
    )
    loss, _ = hinge_of(gap, norm, gamma, cap, weight, least, eps, aggregation, layer_reduction, backend)
    return reduced(loss, reduction)


def hinge_of(
    gap: Tensor,
    norm: Tensor,
    gamma: Tensor,
    cap: Tensor | None,
    weight: Tensor | None,
    min_norm: Tensor | None,
    eps: float,
    aggregation: str,
    layer_reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op itself: loss [N] and distances [N, k, L]. gamma, cap, weight, min_norm [L], whose values the caller has
    checked, in the wider dtype of gap and norm."""
    gap, norm, gamma, cap, weight, min_norm = gathered(gap, norm, gamma, cap, weight, min_norm)
    name, op = choose("margin_hinge", (gap, norm), backend)
    if name not in COMPILED:
        checks.check_margin_hinge(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction)
    return op(gap, norm, gamma, cap, weight, min_norm, eps, aggregation, layer_reduction)


def flags_of(
    gap: Tensor,
    norm: Tensor,
    distance: Tensor,
    gamma: Tensor,
    cap: Tensor,
    min_norm: Tensor,
    valid: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """active = 0 < gamma - distance < cap, and degenerate = norm <= min_norm, whose terms are left out: bool [N, k, L].
    Both are False in rows that are not `valid` [N], degenerate where the gap is NaN, active where degenerate is True.
    Constants; arguments as in `hinge_of`."""
    readable = norm.device.type == "cpu" and is_plain(norm) and not tracing() and not is_functorch_wrapped(norm)
    if EXTENSION is not None and backend in ("auto", "cpu") and readable:
        active, degenerate = EXTENSION.margin_flags(gap, norm, distance, gamma, cap, min_norm, valid)
    else:
        degenerate = (norm <= min_norm) & (~gap.isnan() & valid.unsqueeze(1)).unsqueeze(-1)
        shortfall = gamma - distance
        active = (shortfall > 0) & (shortfall < cap) & ~degenerate & valid.view(-1, 1, 1)
    return active, degenerate


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
        reduction: over the samples: "mean", "sum" or "none".
        backend: "auto", or the name of the one that must run.

    Returns:
        the loss, [] or [N] for reduction="none". A batch of one class has no negatives: loss and gradient 0 (what
        remains with cross_entropy is logsumexp_k z[i, k] - a_i). A logit of -inf is a masked class: -delta as a
        negative, probability 0 in the softmax, and the loss is infinity where it is the label's (its slope stays
        finite). NaN or +inf gives NaN in every loss that it enters; on a GPU a target
        outside [0, C) makes its row of logits NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, delta, unknown names; on the CPU also a target outside [0, C).
        BackendError: a backend named by the caller cannot run.

    Source: Rocca Layza, Pedrini, Torres, 1-to-N Large Margin Classifier, SIBGRAPI 2020, eq. 8 and 14.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of mean, sum, none, got {reduction}")
    logits, target = gathered(logits, target)
    name, op = choose("one_to_n", (logits,), backend)
    if name in COMPILED:
        loss, _, _ = op(logits, target, delta, bound, cross_entropy)
    else:
        checks.check_one_to_n(logits, target, delta, bound)
        loss = op(logits, target, delta, bound, cross_entropy)
    return reduced(loss, reduction)


def deepfool_step(
    gap: Tensor, gradients: Tensor, active: Tensor | None = None, p: float | str = 2, backend: str = "auto"
) -> DeepFoolStep:
    """The step to the nearest linearised decision boundary: norms, choice of the boundary and step on the device.

        distance_j = |gap_j| / || w_j ||_q      w_j = gradients[n, j], q = p / (p - 1); infinity where w_j = 0
        choice     = argmin_j distance_j        equal distances: lowest j
        step       = distance u,   u = sign(w) (|w| / ||w||_q)^(q-1) of the chosen j;   || step ||_p = distance

    Args:
        gap: [N, k], k >= 1: scores of the candidates minus that of the reference class.
        gradients: [N, k, *], the gradient of each gap in the input.
        active: [N] bool or None for all. Where False: step, choice, distance and gradients 0.
        p: the norm in which distances are measured, in [1, inf]; "inf" is infinity. p = 1: the whole step goes on
            the first of the largest |w_i|.
        backend: "auto", or the name of the one that must run.

    Returns:
        DeepFoolStep(step [N, *] of the dtype of gradients, choice [N] int64, distance [N]); step and distance are
        differentiable twice in gap and gradients, through the chosen candidate. An infinite gap is that of a masked
        class: distance infinity, never chosen while a finite one is left. All distances infinite: step 0, choice 0.
        NaN in an active sample, or infinity in its gradients: step and distance NaN, choice 0.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices, p < 1.
        BackendError: a backend named by the caller cannot run.

    Source: Moosavi-Dezfooli, Fawzi, Frossard, DeepFool, CVPR 2016, eq. 8; Yan et al. 2019 (TPAMI) for any p.
    """
    p = checks.exponent(p)
    gap, gradients, active = gathered(gap, gradients, active)
    name, op = choose("deepfool_step", (gap, gradients), backend)
    if name in COMPILED:
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


def per_layer(value: Layerwise, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """[L] on the device of norm [N, k, L]: a tensor [L] as it is, a number for all layers, or L numbers."""
    if isinstance(value, Tensor) and value.dim() == 1:
        return value
    if isinstance(value, Tensor):
        return value.to(dtype).expand(norm.shape[2])
    if isinstance(value, (int, float)):
        return torch.full((norm.shape[2],), float(value), dtype=dtype, device=norm.device)
    if not norm.is_cuda:
        return torch.tensor(value, dtype=dtype, device=norm.device)
    # Each number travels as an argument of a kernel. A copy of the list from pageable memory would wait for the device.
    return torch.stack([torch.full((), float(number), dtype=dtype, device=norm.device) for number in value])

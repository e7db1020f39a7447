"""
norm_j     = || w_j ||_q,   q = p / (p - 1),   w_j = gradients[n, j] flattened,   g_j = gap[n, j]
distance_j = |g_j| / norm_j, infinity where norm_j = 0 or g_j is infinite (a masked class)
choice     = argmin_j distance_j, the lowest j of equals                                                          [N]
distance   = distance_choice                                                                                      [N]
step       = distance * u,   u = d norm / d w = sign(w) (|w| / norm)^(q-1)  of the chosen j                    [N, *]

the smallest step in the p norm that closes the gap of the linearised boundary g + <w, step> = 0 (g < 0).
q = inf (p = 1): u is the sign of the first of the largest |w_i|, at its place. Zero entries: u = 0, for q = 1 too.

All distances infinite: step 0, distance infinity, choice 0. NaN in gap, NaN or infinity in gradients: step and distance
NaN, choice 0.
A sample that is not active: step 0, distance 0, choice 0, gradient 0, whatever it holds.
"""

import math

import torch
from torch import Tensor

from .dual_norm import dual_exponent, row_norm


def deepfool_step(gap: Tensor, gradients: Tensor, active: Tensor | None, p: float) -> tuple[Tensor, Tensor, Tensor]:
    q = dual_exponent(p)
    acc = torch.float64 if torch.float64 in (gap.dtype, gradients.dtype) else torch.float32
    n, k = gap.shape
    shape = gradients.shape[2:]
    g, w = gap.to(acc), gradients.to(acc).reshape(n, k, math.prod(shape))
    if active is not None:
        g = torch.where(active[:, None], g, 0.0)
        w = torch.where(active[:, None, None], w, 0.0)

    with torch.no_grad():
        masked = g.abs() == math.inf
        usable = ~g.isnan().any(dim=1) & torch.isfinite(w).flatten(1).all(dim=1)
        norms = row_norm(w, q)
        distances = torch.where((norms == 0) | masked, math.inf, g.abs() / norms)
        choice = torch.where(usable, distances.argmin(dim=1), 0)
        # A factor, not a mask: the gradient of an unusable sample is NaN as well.
        factor = torch.where(usable, 1.0, math.nan).to(acc)

    sample = torch.arange(n, device=gap.device)
    # A masked class is chosen where all are: as if its gap and gradient were 0.
    g, w = torch.where(masked, 0.0, g), torch.where(masked[..., None], 0.0, w)
    g, w = g[sample, choice] * factor, w[sample, choice] * factor[:, None]
    norm, u = _norm_and_slope(w, q)
    flat = norm == 0
    closed = torch.where(flat, 0.0, g.abs() / torch.where(flat, 1.0, norm))
    step = closed[:, None] * u
    distance = torch.where(flat if active is None else flat & active, math.inf, closed)
    return step.to(gradients.dtype).reshape(n, *shape), distance, choice


def _norm_and_slope(w: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """|| w ||_q [N] of the rows w [N, D] and its derivative u [N, D]."""
    if w.shape[1] == 0:
        return w.sum(dim=1), w
    if math.isinf(q):
        first = w.detach().abs().argmax(dim=1, keepdim=True)
        largest = w.gather(1, first)
        return largest.abs().squeeze(1), torch.zeros_like(w).scatter(1, first, largest.sign())
    norm = row_norm(w, q)
    if q == 1:
        return norm, w.sign()
    ratio = w / torch.where(norm == 0, 1.0, norm)[:, None]
    if q == 2:
        return norm, ratio
    zero = ratio == 0
    magnitude = torch.where(zero, 1.0, ratio.abs())
    return norm, torch.where(zero, 0.0, ratio.sign() * magnitude.pow(q - 1))

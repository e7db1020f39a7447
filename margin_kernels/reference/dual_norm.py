"""
norms[..., l] = || G_l[..., :] ||_q,   q = p / (p - 1)        p = 1 -> q = inf, p = 2 -> q = 2, p = inf -> q = 1

G_l: [N, k, *] (batch_dims = 2) or [N, *] (batch_dims = 1), flattened behind the batch dimensions; L layers.
Each row is divided by its largest entry first, so that neither 1e20 nor 1e-23 leaves the range of the type.
Derivative: sign(G) |G|^(q-1) / norm^(q-1); 0 where the norm is 0; even split over the maxima for q = inf.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def dual_exponent(p: float) -> float:
    """q = p / (p - 1): the exponent of the norm dual to l_p, for p in [1, inf]."""
    if p == 1:
        return math.inf
    return 1.0 if math.isinf(p) else p / (p - 1)


def dual_norm(gradients: Sequence[Tensor], p: float, batch_dims: int) -> Tensor:
    q = dual_exponent(p)
    wide = any(g.dtype == torch.float64 for g in gradients)
    # The q-th power of a ratio in float32 is off by q of its roundings: in float64 where q is large.
    double = wide or 16 < q < math.inf
    norms = torch.stack([row_norm(_rows(g, batch_dims, double), q) for g in gradients], dim=-1)
    if wide or not double:
        return norms
    # Beyond float32: infinite, with derivative 0.
    beyond = (norms.detach().float() == math.inf) & norms.detach().isfinite()
    return torch.where(beyond, math.inf, norms).float()


def _rows(gradient: Tensor, batch_dims: int, double: bool) -> Tensor:
    g = gradient.double() if double else gradient.float()
    lead = g.shape[:batch_dims]
    return g.reshape(*lead, math.prod(g.shape[batch_dims:]))


def row_norm(g: Tensor, q: float) -> Tensor:
    """|| g ||_q over the last dimension."""
    if g.shape[-1] == 0:
        return g.sum(dim=-1)
    if q == 1:
        # The slope at NaN is NaN; that of abs is 0.
        poison = torch.where(g.isnan(), g, 0)
        return (g.abs() + poison * poison.detach()).sum(dim=-1)
    if math.isinf(q):
        return g.abs().amax(dim=-1)
    scale = g.detach().abs().amax(dim=-1, keepdim=True)
    # A zero or infinite row is not scaled (0/0 and inf/inf are NaN where 0 and inf are meant).
    scale = torch.where((scale > 0) & (scale < math.inf), scale, torch.ones_like(scale))
    ratio = g / scale
    zero = ratio == 0
    # |x|^q has an infinite second derivative at 0 for q < 2: there the entry is a constant 0 instead.
    magnitude = torch.where(zero, torch.ones_like(ratio), ratio.abs())
    power = ratio.square() if q == 2 else torch.where(zero, torch.zeros_like(ratio), magnitude.pow(q))
    total = power.sum(dim=-1)
    empty = total == 0
    root = torch.where(empty, torch.ones_like(total), total).pow(1 / q)
    norm = torch.where(empty, torch.zeros_like(total), root * scale.squeeze(-1))
    # Finite entries whose norm leaves the range: infinite, and the derivative that of an infinite norm, 0.
    beyond = (norm.detach() == math.inf) & (g.detach().abs().amax(dim=-1) < math.inf)
    return torch.where(beyond, math.inf, norm)

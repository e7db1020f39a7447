"""
distance d[n,j,l] = -gap[n,j] / (eps + norm[n,j,l]);  +inf for gap = -inf, -inf for gap = +inf     [N, k, L]
term(d)           = min(max(gamma_l - d, 0), cap_l)             slope -1 where 0 < gamma_l - d < cap_l, else 0
left out          = gap = -inf or norm <= min_norm_l (unless the gap is NaN): term 0, slope 0
over j            : max | sum | mean of the terms, or mean_distance = term(mean of d over the pairs not left out)
over l            : sum = sum_l w_l t_l | mean = sum_l w_l t_l / sum_l w_l                          [N]

A gamma, cap, min_norm or weight that is negative or NaN makes the loss NaN.
"""

import torch
from torch import Tensor

_INF = float("inf")
AGGREGATIONS = ("max", "sum", "mean", "mean_distance")


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
    dtype = torch.float64 if torch.float64 in (gap.dtype, norm.dtype) else torch.float32
    gap, norm = gap.to(dtype), norm.to(dtype)
    gamma = gamma.to(dtype)
    cap = torch.full_like(gamma, float("inf")) if cap is None else cap.to(dtype)
    weight = torch.ones_like(gamma) if weight is None else weight.to(dtype)
    legal = (gamma >= 0) & (cap >= 0) & (weight >= 0)
    if layer_reduction == "mean":
        weight = weight / weight.sum()
    # Entries that are infinite or left out are replaced before they are divided: no derivative is 0 * inf.
    raw = gap.detach().unsqueeze(-1)
    far, endless = raw.abs() == _INF, norm.detach() == _INF
    out = (raw == -_INF).expand_as(norm)
    if min_norm is not None:
        min_norm = min_norm.to(dtype)
        legal = legal & (min_norm >= 0)
        out = out | ((norm.detach() <= min_norm) & ~gap.detach().isnan().unsqueeze(-1))
    weight = torch.where(legal, weight, float("nan"))
    shown = torch.where(far, -raw, -raw / (eps + norm.detach()))
    numerator, inside = torch.where(far, 0.0, gap.unsqueeze(-1)), ~(out | far | endless)
    numerator = numerator.expand_as(norm)
    if aggregation == "max":
        # max of the terms = term of the smallest distance; argmin takes the first of equals, that is the lowest j.
        # Gathered before the division: a NaN that is not chosen has no part in the derivative.
        nearest = torch.where(out, _INF, shown).argmin(dim=1, keepdim=True)
        pairs = (numerator, norm, inside, shown, out)
        numerator, norm, inside, shown_nearest, out = (t.gather(1, nearest) for t in pairs)
    else:
        shown_nearest = shown
    distance = torch.where(inside, -numerator / torch.where(inside, eps + norm, 1.0), shown_nearest)
    if aggregation == "max":
        terms = torch.where(out, 0.0, _term(distance, gamma, cap)).squeeze(1)
    elif aggregation == "mean_distance":
        count = (~out).sum(dim=1)
        mean = torch.where(out, 0.0, distance).sum(dim=1) / count.clamp(min=1)
        terms = torch.where(count > 0, _term(mean, gamma, cap), 0.0)
    else:
        terms = torch.where(out, 0.0, _term(distance, gamma, cap))
        terms = terms.sum(dim=1) if aggregation == "sum" else terms.mean(dim=1)
    return (terms * weight).sum(dim=-1), shown


def _term(distance: Tensor, gamma: Tensor, cap: Tensor) -> Tensor:
    shortfall = gamma - distance
    # Strict at both kinks; written so that NaN counts as active and stays NaN in value and gradient.
    active = ~((shortfall <= 0) | (shortfall >= cap))
    return torch.where(active, shortfall, shortfall.detach().clamp(min=0).minimum(cap))

"""
distance d[n,j,l] = -gap[n,j] / (eps + norm[n,j,l])                                                [N, k, L]
term(d)           = min(max(gamma_l - d, 0), cap_l)             slope -1 where 0 < gamma_l - d < cap_l, else 0
over j            : max | sum | mean of the terms, or mean_distance = term(mean_j d)
over l            : sum = sum_l w_l t_l | mean = sum_l w_l t_l / sum_l w_l                          [N]
"""

import torch
from torch import Tensor

AGGREGATIONS = ("max", "sum", "mean", "mean_distance")


def margin_hinge(
    gap: Tensor,
    norm: Tensor,
    gamma: Tensor,
    cap: Tensor | None,
    weight: Tensor | None,
    eps: float,
    aggregation: str,
    layer_reduction: str,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if torch.float64 in (gap.dtype, norm.dtype) else torch.float32
    gap, norm = gap.to(dtype), norm.to(dtype)
    gamma = gamma.to(dtype)
    cap = torch.full_like(gamma, float("inf")) if cap is None else cap.to(dtype)
    weight = torch.ones_like(gamma) if weight is None else weight.to(dtype)
    if layer_reduction == "mean":
        weight = weight / weight.sum()
    distance = -gap.unsqueeze(-1) / (eps + norm)
    if aggregation == "max":
        # max of the terms = term of the smallest distance; argmin takes the first of equals, that is the lowest j.
        nearest = distance.detach().argmin(dim=1, keepdim=True)
        terms = _term(distance.gather(1, nearest).squeeze(1), gamma, cap)
    elif aggregation == "mean_distance":
        terms = _term(distance.mean(dim=1), gamma, cap)
    else:
        terms = _term(distance, gamma, cap)
        terms = terms.sum(dim=1) if aggregation == "sum" else terms.mean(dim=1)
    return (terms * weight).sum(dim=-1), distance.detach()


def _term(distance: Tensor, gamma: Tensor, cap: Tensor) -> Tensor:
    shortfall = gamma - distance
    # Strict at both kinks; written so that NaN counts as active and stays NaN in value and gradient.
    active = ~((shortfall <= 0) | (shortfall >= cap))
    return torch.where(active, shortfall, shortfall.detach().clamp(min=0).minimum(cap))

"""
norm[n, j] = || rows[index[n, j]] - rows[target[n]] ||_q,   q = p / (p - 1)                                    [N, k]

rows [C, D], index [N, k], target [N]. Differences are formed in float32 (float64 for float64). Derivative as in
dual_norm: 0 where index == target, even split over the largest entries for q = inf.

A pair with an index or a target outside [0, C) is NaN and sends no gradient to any row.
"""

import torch
from torch import Tensor

from .dual_norm import dual_exponent, row_norm


def row_distance(rows: Tensor, index: Tensor, target: Tensor, p: float) -> Tensor:
    classes = rows.shape[0]
    w = rows if rows.dtype == torch.float64 else rows.float()
    y = target.unsqueeze(1)
    valid = (index >= 0) & (index < classes) & (y >= 0) & (y < classes)
    if classes == 0:
        return w.new_full(index.shape, float("nan"))
    difference = w[torch.where(valid, index, 0)] - w[torch.where(valid, y, 0)]
    # The stand-in rows of an invalid pair are masked on both sides of the norm: no gradient, NaN or not, reaches them.
    difference = torch.where(valid.unsqueeze(-1), difference, 0.0)
    return torch.where(valid, row_norm(difference, dual_exponent(p)), float("nan"))

"""What LargeMarginLoss shows of one evaluation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Margins(NamedTuple):
    """What one evaluation of LargeMarginLoss shows; everything but `loss` is detached.

    loss [] or [N];  nll [N];  gap, competitor [N,k];  norm D, distance d, active 1[0 < gamma - d < cap] (bool) and
    degenerate (bool: D is at most min_norm, the term is left out) [N,k,L];  valid (bool) [N], 1[target != ignore_index]
    """

    loss: Tensor
    nll: Tensor
    gap: Tensor
    competitor: Tensor
    norm: Tensor
    distance: Tensor
    active: Tensor
    degenerate: Tensor
    valid: Tensor

"""Norms as literal code: what the ops and the losses are compared with."""

import math

import torch
from torch import Tensor


def dual_exponent(p: float) -> float:
    """q with 1/p + 1/q = 1."""
    return math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)


def norm(v: Tensor, p: float) -> Tensor:
    """The p-norm of all entries of v, differentiable."""
    if math.isinf(p):
        return v.abs().max()
    return v.abs().sum() if p == 1 else v.abs().pow(p).sum().pow(1 / p)


def dual_norm(g: Tensor, p: float) -> Tensor:
    """The norm that is dual to the p-norm."""
    return norm(g, dual_exponent(p))


def norm64(v: Tensor, q: float) -> Tensor:
    """The q-norm along the last dimension in float64, over the whole range of v: scaled by the largest entry."""
    magnitude = v.detach().double().abs()
    largest = magnitude.amax(-1) if magnitude.shape[-1] else magnitude.sum(-1)
    if math.isinf(q):
        return largest
    safe = torch.where(largest > 0, largest, 1.0)
    return ((magnitude / safe[..., None]) ** q).sum(-1) ** (1 / q) * largest

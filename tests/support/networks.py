"""Small networks of more than one test file."""

from itertools import pairwise

import torch
from torch import nn


def tanh_net(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers with tanh between them, in double precision: smooth, so that every derivative exists."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()

"""Small networks of more than one test file."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


def tanh_net(*widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers with tanh between them, in double precision: smooth, so that every derivative exists."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


class Tokens(nn.Module):
    """A small vision transformer of two blocks: taps [N,T,8], class token, residual branches."""

    def __init__(self, block: Callable[[], nn.Module], channels: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, 8, 2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])

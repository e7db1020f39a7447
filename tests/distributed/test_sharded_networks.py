"""Sharded tasks of other networks: attention, convolutions, a recurrent one, a layer used twice, frozen layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.many_processes import whole
from support.networks import Tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import margin_kernels as mk
from margin_kernels.distributed import fully_shard_task

Found = tuple[list[Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.mlp = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6).eval()
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.second(F.relu(self.norm(self.first(x))))).flatten(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x[:, 0])[0][:, -1])


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(16, 6), nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(F.relu(self.shared(F.relu(self.stem(x.flatten(1)))))))


tokens = partial(Tokens, Attention, channels=1, classes=5)
# name -> network, taps, units
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...]]] = {
    "attention": (tokens, ("input", "blocks.0", "output"), ("blocks.*", "blocks.*.mlp", "patches")),
    "convolutions": (
        Convolutions,
        ("input", "first", "second.0", "pool", "output"),
        ("first", "norm", "second", "head"),
    ),
    "recurrent": (Recurrent, ("input", "output"), ("cells",)),
    "layer used twice": (Twice, ("input", "stem"), ("shared", "head")),
}
LOSSES = ("hard", "soft", "second order", "sensitivity", "adversarial")


def loss_of(name: str) -> Any:
    return {
        "hard": mk.LargeMarginLoss(3.0, p="inf", cross_entropy_weight=0.5, auxiliary="pairwise"),
        "soft": mk.LargeMarginLoss(3.0, competitors="soft", cross_entropy_weight=1.0),
        "second order": mk.LargeMarginLoss(3.0, second_order=True, cross_entropy_weight=1.0),
        "sensitivity": mk.MarginSensitivityLoss(0.5),
        "adversarial": mk.AdversarialMarginLoss(2.0, process_group="world"),
    }[name]


def two_steps(rank: int, size: int, network: str, name: str, frozen: bool) -> Found:
    """The parameters after two steps of SGD, and the logits of this process's part."""
    make, taps, units = NETWORKS[network]
    torch.manual_seed(0)
    model = make().double()
    if frozen:
        next(iter(model.children())).requires_grad_(False)
    task = mk.MarginTask(model, loss_of(name), taps if name in ("hard", "soft", "second order") else None)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 1, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(5, (8,), generator=generator)
    if size > 1:
        fully_shard_task(task, units)
        x, y = x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4]
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        with sdpa_kernel(SDPBackend.MATH):
            task(x, y)["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        output = task(x, y)["output"]
    return [whole(parameter).detach().clone() for parameter in task.parameters()], output


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_networks(processes, network: str, name: str, frozen: bool) -> None:
    parameters, output = two_steps(0, 1, network, name, frozen)
    found = processes(2).run(two_steps, network, name, frozen)
    for others, _ in found:
        for a, b in zip(others, parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat([part for _, part in found]), output, rtol=1e-11, atol=1e-11)

"""Norms of row differences of a last layer with 1e5 classes.

Bytes: forward reads k + 1 rows per sample, k competitors and the label once for all of them (pairs are gathered from
all over the table, so none is in the cache); backward writes all of [C, D] and reads the rows of each pair twice.
"""

import math
from collections.abc import Callable

import compositions
import pytest
import torch

from margin_kernels import functional

CLASSES, FEATURES, SAMPLES, COMPETITORS = 100_000, 512, 256, 5


def forward(kind: str, p: float, rows: torch.Tensor) -> tuple[Callable[[], torch.Tensor], int]:
    """A function that measures the next 256 x 5 pairs of a permutation of all classes, and the bytes that it reads."""
    drawn = SAMPLES * (COMPETITORS + 1)
    batches = [
        (batch[SAMPLES:].view(SAMPLES, COMPETITORS), batch[:SAMPLES])
        for batch in torch.randperm(len(rows)).split(drawn)
        if len(batch) == drawn
    ]
    turn = 0

    def run():
        nonlocal turn
        turn = (turn + 1) % len(batches)
        op = functional.row_distance if kind == "ours" else compositions.row_differences
        return op(rows, *batches[turn], p)

    return run, SAMPLES * (COMPETITORS + 1) * FEATURES * rows.element_size()


@pytest.mark.parametrize("kind", ["ours", "eager"])
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_forward(benchmark, p, kind):
    call, size = forward(kind, p, torch.randn(CLASSES, FEATURES))
    norms = benchmark(call)
    if benchmark.stats:
        benchmark.extra_info["GB/s"] = size / benchmark.stats.stats.median / 1e9
    assert (norms > 0).all()


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_backward(benchmark, p):
    rows = torch.randn(10_000, FEATURES, requires_grad=True)
    order = torch.randperm(10_000)
    norms = functional.row_distance(rows, order[SAMPLES : SAMPLES * 6].view(SAMPLES, COMPETITORS), order[:SAMPLES], p)
    (slope,) = benchmark(torch.autograd.grad, norms, rows, torch.ones_like(norms), retain_graph=True)
    assert slope.abs().max() > 0


def test_call_at_8_by_8(benchmark):
    rows, index, target = torch.randn(8, 8), torch.arange(8)[:, None], torch.arange(8).roll(1)
    assert (benchmark(functional.row_distance, rows, index, target) > 0).all()

"""Dual norms of gradient rows: bytes = one read of the gradients; the copy beside it reads and writes them."""

import math

import compositions
import pytest
import torch

from margin_kernels import functional

ELEMENTS = 4_000_000


def rows(length: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(max(1, ELEMENTS // length), length).to(dtype)


@pytest.mark.parametrize("kind", ["ours", "vector_norm"])
@pytest.mark.parametrize("p", [1, 2, 3, 4, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1_000, 1_000_000])
def test_forward(benchmark, length, dtype, p, kind):
    g = rows(length, dtype)
    if kind == "ours":
        norms = benchmark(functional.dual_norm, [g], p, 1)
    else:
        norms = benchmark(compositions.vector_norms, [g], p)
    if benchmark.stats:
        benchmark.extra_info["GB/s"] = g.numel() * g.element_size() / benchmark.stats.stats.median / 1e9
    assert (norms > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_copy(benchmark, dtype):
    g = rows(1_000_000, dtype)
    to = torch.empty_like(g)
    benchmark(to.copy_, g)
    if benchmark.stats:
        benchmark.extra_info["GB/s"] = 2 * g.numel() * g.element_size() / benchmark.stats.stats.median / 1e9
    assert torch.equal(to, g)


@pytest.mark.parametrize("p", [1, 2, 3, 4, math.inf])
def test_backward(benchmark, p):
    g = rows(10_000, torch.float32).requires_grad_()
    norms = functional.dual_norm([g], p, 1)
    (slope,) = benchmark(torch.autograd.grad, norms, g, torch.ones_like(norms), retain_graph=True)
    assert slope.abs().max() > 0


def test_call_at_8_by_8(benchmark):
    g = torch.randn(8, 8)
    assert (benchmark(functional.dual_norm, [g], 2, 1) > 0).all()

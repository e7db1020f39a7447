"""Margin hinge: numbers per step, so what counts is the cost of a call."""

import compositions
import pytest
import torch

from margin_kernels import functional


@pytest.mark.parametrize("kind", ["ours", "eager"])
@pytest.mark.parametrize("n,k,layers", [(8, 8, 8), (128, 9, 5), (4096, 9, 5)])
def test_forward_backward(benchmark, n, k, layers, kind):
    gap = torch.randn(n, k, requires_grad=True)
    norm = 0.5 + torch.rand(n, k, layers)
    gamma = torch.ones(layers)

    def step():
        gap.grad = None
        if kind == "ours":
            loss = functional.margin_hinge(gap, norm, gamma)
        else:
            loss = compositions.hinge(gap, norm, 1.0).mean()
        loss.backward()

    benchmark(step)
    assert gap.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["ours", "eager"])
def test_call_at_8_by_8(benchmark, kind):
    gap, norm, gamma = torch.randn(8, 8), 0.5 + torch.rand(8, 8, 8), torch.ones(8)
    if kind == "ours":
        loss = benchmark(functional.margin_hinge, gap, norm, gamma, reduction="none")
    else:
        loss = benchmark(compositions.hinge, gap, norm, 1.0)
    assert (loss >= 0).all()

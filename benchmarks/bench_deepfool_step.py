"""One DeepFool step: forward reads every gradient once and the chosen one again from the cache, and writes N D.

Backward writes N k D, zeros but for the chosen candidate of each sample.
"""

import math

import compositions
import pytest
import torch

from margin_kernels import functional

SHAPES = [(128, 9, 784), (64, 9, 3072)]


@pytest.mark.parametrize("kind", ["ours", "eager"])
@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("n,k,length", SHAPES)
def test_forward(benchmark, n, k, length, p, kind):
    gap, gradients = torch.randn(n, k), torch.randn(n, k, length)
    if kind == "ours":
        distance = benchmark(functional.deepfool_step, gap, gradients, None, p).distance
    else:
        distance = benchmark(compositions.nearest_boundary, gap, gradients, p)[1]
    if benchmark.stats:
        bytes_moved = (gradients.numel() + n * length) * gradients.element_size()
        benchmark.extra_info["GB/s"] = bytes_moved / benchmark.stats.stats.median / 1e9
    assert (distance > 0).all()


@pytest.mark.parametrize("kind", ["ours", "eager"])
@pytest.mark.parametrize("p", [2, math.inf])
@pytest.mark.parametrize("n,k,length", SHAPES)
def test_forward_backward(benchmark, n, k, length, p, kind):
    gap, gradients = torch.randn(n, k, requires_grad=True), torch.randn(n, k, length, requires_grad=True)

    def run():
        gap.grad = gradients.grad = None
        if kind == "ours":
            step = functional.deepfool_step(gap, gradients, None, p).step
        else:
            step = compositions.nearest_boundary(gap, gradients, p)[0]
        step.square().sum().backward()

    benchmark(run)
    assert gap.grad is not None and gap.grad.abs().max() > 0

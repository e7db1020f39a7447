"""Forward + backward of the 1-to-N loss against cross_entropy and against the paper's N x N form.

Bytes: forward reads N C (twice with the cross-entropy term), backward reads N C and writes N C logits; everything else
is of size C for every 1024 rows.
"""

import compositions
import pytest
import torch
from torch.nn.functional import cross_entropy

from margin_kernels import functional

SHAPES = [(512, 1000), (4096, 1000)]
KINDS = ("ours", "ours with cross-entropy", "pairs", "cross_entropy")


def step(kind: str, logits: torch.Tensor, target: torch.Tensor):
    """A function that runs forward and backward once and leaves the gradient in logits.grad."""

    def loss():
        if kind == "cross_entropy":
            return cross_entropy(logits, target)
        if kind == "pairs":
            return compositions.one_to_n_pairs(logits, target, 1.0)
        return functional.one_to_n(logits, target, 1.0, cross_entropy=kind != "ours")

    def run():
        logits.grad = None
        loss().backward()

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n,classes", SHAPES)
def test_forward_backward(benchmark, n, classes, dtype, kind):
    logits = torch.randn(n, classes).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (n,))
    bytes_moved = (4 if kind == "ours with cross-entropy" else 3) * logits.numel() * logits.element_size()
    benchmark(step(kind, logits, target))
    benchmark.extra_info["GB/s"] = bytes_moved / benchmark.stats.stats.median / 1e9 if benchmark.stats else None
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad.abs().max() > 0


def test_call_at_8_by_8(benchmark):
    logits, target = torch.randn(8, 8), torch.arange(8)
    assert benchmark(functional.one_to_n, logits, target) > 0

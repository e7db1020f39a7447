"""Forward + backward of competitors, which includes the cross-entropy.

Bytes: forward reads N C, backward reads N C and writes N C logits; everything else is of size N k.
"""

import compositions
import pytest
import torch
from torch.nn.functional import cross_entropy

from margin_kernels import functional

SHAPES = [(32768, 256), (4096, 1000), (256, 100000)]


def step(kind: str, logits: torch.Tensor, target: torch.Tensor, k: int):
    """A function that runs forward and backward once and leaves the gradient in logits.grad."""

    def ours():
        logits.grad = None
        result = functional.competitors(logits, target, k)
        (result.nll.mean() + result.gap.mean()).backward()

    def eager():
        logits.grad = None
        _, gap, loss = compositions.masked_topk(logits, target, k)
        (loss + gap.mean()).backward()

    def cross_entropy_alone():
        logits.grad = None
        cross_entropy(logits, target).backward()

    return {"ours": ours, "eager": eager, "cross_entropy": cross_entropy_alone}[kind]


@pytest.mark.parametrize("kind,k", [("ours", 1), ("ours", 5), ("eager", 1), ("eager", 5), ("cross_entropy", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n,classes", SHAPES)
def test_forward_backward(benchmark, n, classes, dtype, kind, k):
    logits = torch.randn(n, classes).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (n,))
    bytes_moved = 3 * logits.numel() * logits.element_size()
    call = step(kind, logits, target, k)
    benchmark(call)
    benchmark.extra_info["GB/s"] = bytes_moved / benchmark.stats.stats.median / 1e9 if benchmark.stats else None
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["ours", "eager"])
def test_call_at_8_by_8(benchmark, kind):
    logits, target = torch.randn(8, 8), torch.randint(0, 8, (8,))
    if kind == "ours":
        index = benchmark(functional.competitors, logits, target).competitor
    else:
        index = benchmark(compositions.masked_topk, logits, target, 1)[0]
    assert (index.squeeze(1) != target).all()

"""Shared by tests and benchmarks: sample inputs away from kinks, the tolerance table, assertions on errors.

Truth is the reference in float64. A low-precision result passes when its error is at most twice the error of plain
PyTorch in the same dtype, plus the floor of FLOOR: a backend may not be worse than what it replaces.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .triton.interpreter import INTERPRETED

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Relative to the largest true value. Outputs leave as float32 (float64), so these are a few roundings of that type;
# gradients are rounded once to the dtype of the input.
FLOOR = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENT_FLOOR = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def interpreted(backend: str) -> bool:
    """Whether the kernels of `backend` run in Triton's interpreter, some thousand times slower than compiled.

    Tests then take smaller sizes that go through the same branches.
    """
    return backend == "triton" and INTERPRETED


def seeded(seed: int) -> torch.Generator:
    """Random numbers are drawn on the CPU and then moved to the default device: the same ones on every device."""
    return torch.Generator("cpu").manual_seed(seed)


def sample_logits(
    n: int, classes: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 3.0
) -> tuple[Tensor, Tensor]:
    """logits [n, classes] and target [n]; in float64 no two logits of a row are closer than about 1e-3 * scale / C."""
    generator = seeded(seed)
    ranks = torch.rand(n, classes, generator=generator, dtype=torch.float64, device="cpu").argsort(dim=1).double()
    noise = torch.rand(n, classes, generator=generator, dtype=torch.float64, device="cpu")
    logits = scale * (2 * (ranks + 0.8 * noise) / max(classes, 1) - 1)
    target = torch.randint(0, classes, (n,), generator=generator, device="cpu")
    device = torch.get_default_device()
    return logits.to(device, dtype), target.to(device)


def sample_gradients(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal entries bounded away from 0 and, in float64, without equal magnitudes: no kink of any norm is near."""
    values = torch.randn(*shape, generator=seeded(seed), dtype=torch.float64, device="cpu")
    return ((values.sign() + (values == 0)) * (0.05 + values.abs()) * scale).to(torch.get_default_device(), dtype)


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute error over the largest true magnitude; infinity where NaN or infinity stand in other places."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    if actual.shape != truth.shape:
        raise AssertionError(f"shape {list(actual.shape)} where {list(truth.shape)} is right")
    finite = torch.isfinite(truth)
    same_special = torch.equal(torch.nan_to_num(truth, nan=7.0)[~finite], torch.nan_to_num(actual, nan=7.0)[~finite])
    if not same_special or not bool(torch.isfinite(actual[finite]).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    scale = truth[finite].abs().max()
    return float((actual[finite] - truth[finite]).abs().max() / (scale if scale > 0 else 1.0))


def assert_as_good_as(actual: Tensor, truth: Tensor, same_dtype: Tensor, floor: float) -> None:
    """error(actual) <= 2 error(same_dtype) + floor, both against the float64 truth."""
    error, allowed = relative_error(actual, truth), 2 * relative_error(same_dtype, truth) + floor
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"


def assert_gradients_agree(actual: Tensor, truth: Tensor, tolerance: float) -> None:
    """Relative L2 error, cosine and signed bias: a small absolute tolerance cannot hide a missing gradient."""
    a, t = (tensor.detach().double().cpu().flatten() for tensor in (actual, truth))
    size = t.norm()
    assert size > 0, "the true gradient is zero: the test shows nothing"
    assert float((a - t).norm() / size) <= tolerance, f"relative L2 error {float((a - t).norm() / size):.3g}"
    assert float(1 - torch.dot(a, t) / (a.norm() * size)) <= tolerance, "the direction differs"
    assert abs(float((a - t).sum() / t.abs().sum())) <= tolerance, "the gradient is biased"


def assert_same_gradients(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], least: int = 1) -> None:
    """Equal to float64 rounding, None where None stands; at least `least` of the expected ones are not 0."""
    assert sum(gradient is not None and bool(gradient.any()) for gradient in expected) >= least
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


class _FlopCounter(TorchDispatchMode):
    """PyTorch's FlopCounterMode without its hooks on modules, which fail where a gradient is taken at a leaf."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions of one call."""
    with _FlopCounter() as counter:
        run()
    return counter.total

"""The op convolution_input_gradient: values, gradients of both factors to second order, layouts, threads, errors."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from margin_kernels.backends import EXTENSION

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the compiled extension is missing")


def input_gradient(gradient: Tensor, weight: Tensor, padding, dilation, size) -> Tensor:
    return torch.ops.margin_kernels.convolution_input_gradient(gradient, weight, padding, dilation, size)


def operands(n, outputs, inputs, size, kernel, padding, dilation, dtype=torch.float64) -> tuple[Tensor, Tensor]:
    """Gradient in the output and weight, from one generator."""
    generator = torch.Generator().manual_seed(3)
    out = [s + 2 * p - d * (k - 1) for s, k, p, d in zip(size, kernel, padding, dilation, strict=True)]
    gradient = torch.randn(n, outputs, *out, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, *kernel, generator=generator, dtype=torch.float64)
    return gradient.to(dtype), weight.to(dtype)


# (N, Co, Ci, (H, W'), kernel, padding, dilation)
SHAPES = [
    (3, 20, 1, (28, 28), (5, 5), (0, 0), (1, 1)),  # lenet
    (2, 32, 1, (28, 28), (5, 5), (2, 2), (1, 1)),  # mnist_cnn
    (2, 16, 3, (32, 32), (3, 3), (1, 1), (1, 1)),  # resnet20
    (2, 192, 3, (32, 32), (5, 5), (2, 2), (1, 1)),  # nin: several bands of rows
    (1, 64, 3, (75, 70), (3, 3), (1, 1), (1, 1)),  # bands of which the last is not full
    (2, 64, 1, (90, 60), (5, 3), (4, 1), (2, 1)),  # bands of a dilated kernel
    (1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 3, 2, (1, 40), (1, 3), (0, 1), (1, 1)),
    (4, 3, 2, (40, 1), (3, 1), (1, 0), (1, 1)),
    (0, 4, 1, (8, 8), (3, 3), (1, 1), (1, 1)),
    (2, 5, 4, (9, 33), (2, 4), (0, 1), (1, 1)),
    (2, 5, 1, (13, 17), (6, 7), (5, 6), (1, 1)),
    (2, 4, 3, (23, 37), (7, 6), (3, 2), (2, 3)),
    (2, 4, 2, (5, 9), (3, 3), (2, 5), (4, 3)),  # dilated beyond the input's rows
    (2, 4, 2, (6, 7), (2, 2), (3, 4), (1, 1)),  # padded beyond the kernel
    (2, 4, 1, (6, 50), (8, 8), (4, 4), (1, 1)),
    (2, 3, 1, (30, 30), (12, 1), (0, 0), (1, 1)),
]


def reference(gradient: Tensor, weight: Tensor, size, padding, dilation) -> Tensor:
    shape = (len(gradient), weight.shape[1], *size)
    return conv2d_input(shape, weight.double(), gradient.double(), 1, padding, dilation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_gives_the_gradient(shape, dtype) -> None:
    at = shape[3], *shape[5:]
    gradient, weight = operands(*shape, dtype=dtype)
    found = input_gradient(gradient, weight, *at[1:], at[0])
    assert found.dtype == dtype and found.is_contiguous()
    # A sum of n products is rounded n times, each time by less than an eps of the sum of the magnitudes.
    bound = weight[:, 0].numel() * torch.finfo(dtype).eps * reference(gradient.abs(), weight.abs(), *at)
    assert ((found - reference(gradient, weight, *at)).abs() <= bound).all()
    # Sums of small integers are exact.
    gradient, weight = gradient.round(), weight.round()
    expected = reference(gradient, weight, *at).to(dtype)
    for g in (gradient, gradient.to(memory_format=torch.channels_last), gradient.mT.contiguous().mT):
        for w in (weight, weight.to(memory_format=torch.channels_last)):
            assert torch.equal(input_gradient(g, w, *at[1:], at[0]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_bit_is_the_same_for_any_number_of_threads_and_samples(dtype) -> None:
    gradient, weight = operands(37, 20, 3, (28, 30), (5, 4), (1, 2), (1, 1), dtype=dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(input_gradient(gradient, weight, (1, 2), (1, 1), (28, 30)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)
    assert torch.equal(found[0][5:6], input_gradient(gradient[5:6], weight, (1, 2), (1, 1), (28, 30)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 3, 27, 27), (2, 1, 9, 26)])
def test_what_is_not_finite_reaches_what_it_is_summed_into(value, place) -> None:
    gradient, weight = operands(3, 4, 1, (28, 28), (5, 5), (2, 2), (1, 1))
    weight[:, :, 1, 2] = 0
    gradient[place] = value
    expected = conv2d_input((3, 1, 28, 28), weight, gradient, 1, 2)
    found = input_gradient(gradient, weight, (2, 2), (1, 1), (28, 28))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_what_does_not_fit_is_refused() -> None:
    g, w = torch.zeros(2, 4, 6, 7), torch.zeros(4, 1, 3, 3)
    assert input_gradient(g, w, (0, 1), (1, 1), (8, 7)).shape == (2, 1, 8, 7)
    with pytest.raises(ValueError, match=r"gradient must have shape \[N, 4, 6, 6\], got \[2, 4, 6, 7\]"):
        input_gradient(g, w, (0, 1), (1, 1), (8, 6))
    with pytest.raises(ValueError, match="gradient must have shape"):
        input_gradient(g[:, :3], w, (0, 1), (1, 1), (8, 7))
    with pytest.raises(ValueError, match="gradient must have shape"):
        input_gradient(g[0], w, (0, 1), (1, 1), (8, 7))
    with pytest.raises(ValueError, match="weight must have shape"):
        input_gradient(g, w[0], (0, 1), (1, 1), (8, 7))
    with pytest.raises(ValueError, match="gives no output"):
        input_gradient(g, w, (0, 0), (1, 1), (2, 7))
    with pytest.raises(ValueError, match="dilation must be at least 1, got 0"):
        input_gradient(g, w, (0, 1), (1, 0), (8, 7))
    with pytest.raises(ValueError, match="padding must not be negative, got -1"):
        input_gradient(g, w, (0, -1), (1, 1), (8, 7))
    with pytest.raises(TypeError, match="weight must be float32 like gradient, got float64"):
        input_gradient(g, w.double(), (0, 1), (1, 1), (8, 7))
    with pytest.raises(TypeError, match="gradient must be float32 or float64, got bfloat16"):
        input_gradient(g.bfloat16(), w.bfloat16(), (0, 1), (1, 1), (8, 7))


# (N, Co, Ci, (H, W'), kernel, padding, dilation)
SMALL = [(2, 3, 1, (5, 6), (3, 2), (1, 0), (1, 2)), (2, 2, 3, (4, 4), (1, 3), (0, 2), (1, 1))]


@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_it_is_differentiable_twice_in_both_factors(shape) -> None:
    g, w = (t.requires_grad_() for t in operands(*shape))
    at = shape[5], shape[6], shape[3]
    assert torch.autograd.gradcheck(lambda g, w: input_gradient(g, w, *at), (g, w))
    assert torch.autograd.gradgradcheck(lambda g, w: input_gradient(g, w, *at), (g, w))
    # <W^T g, v> = <g, conv(v, W)>
    v = torch.randn_like(input_gradient(g, w, *at))
    product = (input_gradient(g, w, *at) * v).sum()
    forward = F.conv2d(v, w, None, 1, at[0], at[1])
    torch.testing.assert_close(product, (g * forward).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(product, g, retain_graph=True)[0], forward, rtol=1e-12, atol=1e-12)


def test_it_compiles_into_one_graph_for_any_size() -> None:
    compiled = torch.compile(input_gradient, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, size in ((2, (5, 6)), (3, (7, 9))):
        g, w = operands(n, 3, 1, size, (3, 2), (1, 0), (1, 2))
        at = (1, 0), (1, 2), size
        assert torch.equal(compiled(g, w, *at), input_gradient(g, w, *at))

"""The input gradient of a first convolution, compiled and by col2im: where it is taken, and that it is autograd's."""

import pytest
import torch
from support import batches
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from margin_kernels import LargeMarginLoss, MarginSensitivityLoss, MarginTask
from margin_kernels.backends import EXTENSION
from margin_kernels.gradients import thin_convolution
from margin_kernels.gradients.loop import pair_gradient

CLASSES = 4
# Four norms, two orders, two competitors; and the pass by which the split backward, of first order, is tried out.
PASSES = 16
needs_kernel = pytest.mark.skipif(EXTENSION is None, reason="the compiled extension is missing")


def net(*first: nn.Module, channels: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *first, nn.Tanh(), nn.Conv2d(channels, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)
    ).double()


def images(channels: int) -> tuple[Tensor, Tensor]:
    return batches.normal(5, (channels, 8, 9), CLASSES)


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """The number of input gradients that were taken from autograd."""
    calls = [0]
    original = thin_convolution.ThinConvolution.input_gradient

    def spy(self, gradient):
        calls[0] += 1
        return original(self, gradient)

    monkeypatch.setattr(thin_convolution.ThinConvolution, "input_gradient", spy)
    return calls


def assert_as_by_autograd(monkeypatch, model: nn.Module, layers, x: Tensor, y: Tensor) -> None:
    """Norms and parameter gradients of first and second order, against those by autograd alone."""
    losses = [
        LargeMarginLoss(3.0, p, 2, "sum", second_order=order) for p in (1, 2, 3, "inf") for order in (False, True)
    ]
    found = []
    for few, thin in ((thin_convolution.FEW, thin_convolution.THIN), (10**9, 0)):
        monkeypatch.setattr(thin_convolution, "FEW", few)
        monkeypatch.setattr(thin_convolution, "THIN", thin)
        outs = [MarginTask(model, loss, layers)(x, y) for loss in losses]
        slopes = [torch.autograd.grad(out["loss"], list(model.parameters())) for out in outs]
        found.append(([out["norm"] for out in outs], slopes))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-13)


# One channel and three; even, wide and asymmetric kernels; with and without padding; dilated.
CONVOLUTIONS = [
    nn.Conv2d(1, 16, 5, padding=2),
    nn.Conv2d(1, 20, 3, padding="same", bias=False),
    nn.Conv2d(1, 16, (2, 4)),
    nn.Conv2d(3, 48, 3, padding=(0, 2), dilation=(2, 1)),
    nn.Conv2d(1, 17, 1),
    nn.Conv2d(1, 16, 3, padding="valid"),
]


@pytest.mark.parametrize("layers", [("input",), ("input", "0"), ("0", "1", "input", "output"), ("input", "2")], ids=str)
@pytest.mark.parametrize("first", CONVOLUTIONS, ids=str)
def test_the_gradients_are_those_of_autograd(monkeypatch, taken, first, layers) -> None:
    model = net(first, channels=first.out_channels)
    assert_as_by_autograd(monkeypatch, model, layers, *images(first.in_channels))
    assert taken == [PASSES]


# Too few outputs for col2im, and so for a pass that carries a graph.
@needs_kernel
@pytest.mark.parametrize("first", [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 5, (2, 3), dilation=(1, 2))], ids=str)
def test_with_few_outputs_too(monkeypatch, taken, first) -> None:
    model = net(first, channels=first.out_channels)
    assert_as_by_autograd(monkeypatch, model, ("input", "0"), *images(first.in_channels))
    assert taken == [PASSES]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_layout_and_both_wide_types(taken, dtype, layout) -> None:
    x, y = images(1)
    model = net(nn.Conv2d(1, 16, 5, padding=2), channels=16)
    expected = MarginTask(model, MarginSensitivityLoss())(x, y)["loss"].detach()
    task = MarginTask(model.to(dtype, memory_format=layout), MarginSensitivityLoss())
    actual = task(x.to(dtype).contiguous(memory_format=layout), y)["loss"].detach()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
    assert taken == [8]  # three competitors and the chosen pair, twice


class Twice(nn.Module):
    """The input is read by the convolution and beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


class Late(nn.Module):
    """The input is read again behind a tapped layer, where a walk that stops at taps would not look."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.tapped = nn.Conv2d(1, 16, 3, padding=1), nn.Sequential(nn.Conv2d(1, 16, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.tapped(x)


@pytest.mark.parametrize(
    ("first", "layers"),
    [
        (Twice(), ("input",)),
        (Late(), ("input", "0.tapped")),
        (nn.Conv2d(1, 16, 3, stride=2, padding=3), ("input",)),
        (nn.ConvTranspose2d(1, 16, 3), ("input",)),
        (nn.Conv2d(2, 32, 3, groups=2), ("input",)),
        (nn.Conv2d(5, 16, 3), ("input",)),
        (nn.Conv2d(1, 16, 9, padding=4), ("input",)),
        (nn.Sequential(nn.Tanh(), nn.Conv2d(1, 16, 3)), ("input",)),
    ],
    ids=["read twice", "read behind a tap", "stride", "transposed", "groups", "too few outputs", "large", "not first"],
)
def test_elsewhere_autograd_is_left_alone(monkeypatch, taken, first, layers) -> None:
    inputs = first.in_channels if isinstance(first, nn.Conv2d) else 1
    channels = 32 if isinstance(first, nn.Conv2d) and first.groups == 2 else 16
    assert_as_by_autograd(monkeypatch, net(first, channels=channels), layers, *images(inputs))
    assert taken == [0]


def test_half_precision_is_left_to_autograd(taken) -> None:
    x, y = images(1)
    model = net(nn.Conv2d(1, 16, 5, padding=2), channels=16)
    MarginTask(model.bfloat16(), LargeMarginLoss())(x.bfloat16(), y)
    with torch.autocast("cpu", torch.bfloat16):
        MarginTask(model.float(), LargeMarginLoss())(x.float(), y)
    assert taken == [0]


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_a_checkpointed_convolution_gives_the_same(monkeypatch) -> None:
    x, y = images(1)
    plain = net(nn.Conv2d(1, 16, 5, padding=2), channels=16)
    kept = nn.Sequential(Checkpointed(*plain[:2]), *plain[2:])
    for loss in (LargeMarginLoss(3.0, top_k=2), MarginSensitivityLoss()):
        outs = [MarginTask(model, loss)(x, y) for model in (plain, kept)]
        torch.testing.assert_close(outs[0]["norm"], outs[1]["norm"])
        slopes = [torch.autograd.grad(out["loss"], list(plain.parameters())) for out in outs]
        torch.testing.assert_close(slopes[0], slopes[1])


def test_the_weight_of_a_parametrised_convolution_is_differentiated(monkeypatch, taken) -> None:
    x, y = images(1)
    model = net(nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 16, 5, padding=2)), channels=16)
    assert_as_by_autograd(monkeypatch, model, ("input",), x, y)
    assert taken == [PASSES]


@pytest.mark.parametrize("second_order", [False, True])
def test_the_gradient_of_a_pair_carries_a_graph_only_where_it_is_asked_for(taken, second_order) -> None:
    x, y = images(1)
    x.requires_grad_()
    logits = net(nn.Conv2d(1, 16, 5, padding=2), channels=16)(x)
    gradient = pair_gradient(logits, (y + 1) % CLASSES, y, x, second_order)
    rows = torch.arange(len(y))
    (expected,) = torch.autograd.grad((logits[rows, (y + 1) % CLASSES] - logits[rows, y]).sum(), x)
    assert taken == [1] and gradient.requires_grad == second_order
    assert gradient.untyped_storage().nbytes() == gradient.nbytes
    torch.testing.assert_close(gradient.detach(), expected, rtol=1e-10, atol=1e-13)


@needs_kernel
@pytest.mark.parametrize("second_order", [False, True])
def test_the_kernel_runs_where_no_graph_is_asked_for(second_order) -> None:
    x, y = images(1)
    model = net(nn.Conv2d(1, 16, 5, padding=2), channels=16)
    with torch.profiler.profile() as profile:
        MarginTask(model, LargeMarginLoss(second_order=second_order), ("input",))(x, y)
    names = {event.key for event in profile.key_averages()}
    assert ("margin_kernels::convolution_input_gradient" in names) != second_order


@pytest.mark.parametrize("outputs", [16, 5])
def test_a_batch_of_gradients_does_without_the_kernel(outputs) -> None:
    weight, gradients = torch.randn(outputs, 1, 3, 3).double(), torch.randn(2, 4, outputs, 6, 7).double()
    conv = thin_convolution.ThinConvolution(None, weight, (0, 1), (1, 1), (8, 7))
    with torch.no_grad():
        found = torch.func.vmap(conv.input_gradient)(gradients)
        torch.testing.assert_close(found, torch.stack([conv.input_gradient(g) for g in gradients]))

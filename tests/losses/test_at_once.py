"""The loss and its gradient in the logits at once, on the CPU, against the ops and the graph that stand for them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from support.gradients import is_split
from torch import Tensor, nn

import margin_kernels as mk
from margin_kernels.backends import EXTENSION

pytestmark = pytest.mark.skipif(EXTENSION is None, reason="the compiled extension is missing")

FIELDS = ("loss", "nll", "gap", "competitor", "norm", "distance", "active", "degenerate", "valid")
N, CLASSES = 12, 6
IGNORED = -100


class Network(nn.Module):
    """Two hidden layers and logits of which a mask takes some away: `mask` [N,C], added to them."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 9), nn.Linear(9, 7), nn.Linear(7, CLASSES)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.last(torch.relu(self.second(torch.tanh(self.first(x)))))
        return z + self.mask


def masks(y: Tensor) -> dict[str, Tensor]:
    """What is added to the logits: nothing, masked rivals, all rivals but one, all rivals, masked labels."""
    rows = torch.arange(N)
    label = torch.where(y < 0, 0, y)
    other = (label + 1) % CLASSES
    found = {"none": torch.zeros(N, CLASSES, dtype=torch.float64)}
    for name in ("rivals", "one rival", "no rival", "label"):
        found[name] = found["none"].clone()
    found["rivals"][rows[::2], other[::2]] = -torch.inf
    found["one rival"][3:5] = -torch.inf
    found["one rival"][rows[3:5], label[3:5]] = found["one rival"][rows[3:5], other[3:5]] = 0
    found["no rival"][5:7] = -torch.inf
    found["no rival"][rows[5:7], label[5:7]] = 0
    found["label"][rows[1:3], label[1:3]] = -torch.inf
    return found


def step(task: mk.MarginTask, x: Tensor, y: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
    """What a step returns, and 3 times the gradients of the parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = task(x, y)
    assert is_split(out["loss"])
    return out, list(torch.autograd.grad(3 * out["loss"], list(task.model.parameters())))


def both(monkeypatch: pytest.MonkeyPatch, task: mk.MarginTask, x: Tensor, y: Tensor) -> tuple[Any, Any]:
    """A step at once and one op by op."""
    other = copy.deepcopy(task)
    at_once = step(task, x, y)
    assert at_once[0]["loss"].grad_fn.name() == "KnownGradientBackward"
    with monkeypatch.context() as patch:
        patch.setattr(mk.LargeMarginLoss, "_is_plain", lambda *_: False)
        one_by_one = step(other, x, y)
    assert one_by_one[0]["loss"].grad_fn.name() != "KnownGradientBackward"
    return at_once, one_by_one


def assert_same(at_once: Any, one_by_one: Any, tolerance: float) -> None:
    for name in FIELDS:
        torch.testing.assert_close(
            at_once[0][name], one_by_one[0][name], rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )
    for found, expected in zip(at_once[1], one_by_one[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


SOFT: dict[str, Any] = {"competitors": "soft", "cross_entropy_weight": 1.0}
OPTIONS: dict[str, dict[str, Any]] = {
    "soft": SOFT,
    "soft, margin alone": {"competitors": "soft"},
    "soft, weights": {"competitors": "soft", "cross_entropy_weight": 0.3, "margin_weight": 2.5},
    "soft, capped, layers weighed": {**SOFT, "alpha": 0.5, "layer_weights": [1.0, 3.0], "gamma": [0.5, 2.0]},
    "soft, summed": {**SOFT, "reduction": "sum", "layer_reduction": "sum"},
    "soft, nearly all degenerate": {**SOFT, "min_norm": 0.8},
    "soft, p = inf": {**SOFT, "p": "inf"},
    "soft, shifted": {**SOFT, "soft_shift": 0.5, "alpha": 1.0},
    "soft, no margin": {**SOFT, "margin_weight": 0.0},
    "hard": {},
    "hard, two": {"top_k": 2, "aggregation": "sum", "alpha": 0.9},
    "hard, two, mean of distances": {"top_k": 2, "aggregation": "mean_distance", "reduction": "sum"},
    "all, with cross-entropy": {"top_k": CLASSES - 1, "cross_entropy_weight": 0.7, "aggregation": "mean"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("mask", ["none", "rivals", "one rival", "no rival", "label"])
@pytest.mark.parametrize("options", OPTIONS)
def test_at_once_is_op_by_op(monkeypatch, options, mask, dtype) -> None:
    torch.manual_seed(3)
    y = torch.randint(CLASSES, (N,))
    y[[2, 9]] = IGNORED
    network = Network(masks(y)[mask]).to(dtype)
    loss = mk.LargeMarginLoss(**{"gamma": 1.3, **OPTIONS[options]})
    passes = "split" if loss.top_k > 2 else "auto"
    task = mk.MarginTask(network, loss, ("first", "second"), passes)
    x = torch.randn(N, 5, dtype=dtype)
    assert_same(*both(monkeypatch, task, x, y), 1e-11 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("options", ["soft", "hard"])
@pytest.mark.parametrize("row", ["nan", "inf", "nan, ignored", "all ignored"])
def test_rows_that_are_no_numbers_and_rows_that_do_not_count(monkeypatch, options, row) -> None:
    torch.manual_seed(4)
    y = torch.randint(CLASSES, (N,))
    mask = torch.zeros(N, CLASSES, dtype=torch.float64)
    if row == "all ignored":
        y[:] = IGNORED
    else:
        mask[4, 1] = torch.inf if row == "inf" else torch.nan
        y[4] = IGNORED if "ignored" in row else y[4]
    task = mk.MarginTask(Network(mask).double(), mk.LargeMarginLoss(1.0, **OPTIONS[options]), ("first", "second"))
    x = torch.randn(N, 5, dtype=torch.float64)
    at_once, one_by_one = both(monkeypatch, task, x, y)
    assert_same(at_once, one_by_one, 1e-11)
    assert at_once[0]["loss"].isnan() == (row != "nan, ignored")
    assert all(gradient.isfinite().all() for gradient in at_once[1]) == ("ignored" in row)


class Cast(nn.Module):
    """A network whose logits have another type than its layers."""

    def __init__(self, network: Network, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.network(x).to(self.dtype)
        return z


@pytest.mark.parametrize("options", ["soft", "hard"])
@pytest.mark.parametrize("layers", [torch.float32, torch.float64])
def test_logits_of_another_type_than_the_layers(monkeypatch, options, layers) -> None:
    torch.manual_seed(7)
    y = torch.randint(CLASSES, (N,))
    logits = torch.float64 if layers == torch.float32 else torch.float32
    network = Cast(Network(torch.zeros(N, CLASSES, dtype=torch.float64)).to(layers), logits)
    taps = ("network.first", "network.second")
    task = mk.MarginTask(network, mk.LargeMarginLoss(1.0, **OPTIONS[options]), taps)
    at_once, one_by_one = both(monkeypatch, task, torch.randn(N, 5, dtype=layers), y)
    for name in FIELDS:
        torch.testing.assert_close(at_once[0][name], one_by_one[0][name], rtol=2e-5, atol=2e-5, check_dtype=False)
    for found, expected in zip(at_once[1], one_by_one[1], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_medians_that_are_fixed_are_those_of_the_ops(monkeypatch, factor) -> None:
    torch.manual_seed(5)
    y = torch.randint(CLASSES, (N,))
    network = Network(torch.zeros(N, CLASSES, dtype=torch.float64)).double()
    task = mk.MarginTask(network, mk.presets.standard(gamma_factor=factor, warmup=3), ("first", "second"))
    x = torch.randn(N, 5, dtype=torch.float64)
    assert task.auto_gamma is not None
    task.auto_gamma.median.copy_(torch.tensor([0.7, 2.0]))
    task.auto_gamma.right.fill_(0.9)
    task.auto_gamma.fixed.fill_(True)
    task.auto_gamma._known_fixed = True
    assert_same(*both(monkeypatch, task, x, y), 1e-11)


@pytest.mark.parametrize("options", ["soft", "hard"])
def test_a_second_backward_asks_for_the_graph(options) -> None:
    torch.manual_seed(6)
    y = torch.randint(CLASSES, (N,))
    network = Network(torch.zeros(N, CLASSES, dtype=torch.float64)).double()
    task = mk.MarginTask(network, mk.LargeMarginLoss(1.0, **OPTIONS[options]), ("first",))
    out = task(torch.randn(N, 5, dtype=torch.float64), y)
    once = torch.autograd.grad(out["loss"], network.first.weight, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(out["loss"], network.first.weight)[0], once)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out["loss"], network.first.weight)
    out = task(torch.randn(N, 5, dtype=torch.float64), y)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out["loss"], network.first.weight, create_graph=True)


@pytest.mark.parametrize("options", ["soft", "hard"])
def test_a_term_may_be_added_to_the_loss_in_place(options) -> None:
    torch.manual_seed(6)
    y = torch.randint(CLASSES, (N,))
    network = Network(torch.zeros(N, CLASSES, dtype=torch.float64)).double()
    task = mk.MarginTask(network, mk.LargeMarginLoss(1.0, **OPTIONS[options]), ("first",))
    x = torch.randn(N, 5, dtype=torch.float64)
    weight = network.first.weight
    expected = 2 * torch.autograd.grad(task(x, y)["loss"], weight)[0] + 0.6 * weight.detach()
    loss = task(x, y)["loss"]
    before = loss.item()
    loss *= 2
    loss += 0.3 * weight.square().sum()
    torch.testing.assert_close(loss.item(), 2 * before + 0.3 * weight.square().sum().item())
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected)


class WithOffset(mk.LargeMarginLoss):
    """With a gap of each competitor that is larger by one."""

    def gaps(self, logits: Tensor, targets: Any) -> Any:
        found = super().gaps(logits, targets)
        return found._replace(gap=found.gap + 1)


@pytest.mark.parametrize("options", ["soft", "hard"])
def test_a_derived_loss_goes_op_by_op(options) -> None:
    torch.manual_seed(6)
    y = torch.randint(CLASSES, (N,))
    network = Network(torch.zeros(N, CLASSES, dtype=torch.float64)).double()
    x = torch.randn(N, 5, dtype=torch.float64)
    gaps = []
    for loss in (mk.LargeMarginLoss, WithOffset):
        out = mk.MarginTask(network, loss(1.0, **OPTIONS[options]), ("first",))(x, y)
        assert (out["loss"].grad_fn.name() == "KnownGradientBackward") == (loss is mk.LargeMarginLoss)
        torch.testing.assert_close(out["distance"], -out["gap"].unsqueeze(2) / (1e-6 + out["norm"]))
        gaps.append(out["gap"])
    torch.testing.assert_close(gaps[1], gaps[0] + 1)


def test_a_target_outside_the_classes_is_named_and_half_precision_goes_op_by_op() -> None:
    network = Network(torch.zeros(N, CLASSES, dtype=torch.float64)).double()
    task = mk.MarginTask(network, mk.LargeMarginLoss(1.0, **SOFT), ("first",))
    y = torch.full((N,), CLASSES)
    with pytest.raises((ValueError, IndexError), match=f"{CLASSES}"):
        task(torch.randn(N, 5, dtype=torch.float64), y)
    half = mk.MarginTask(network.bfloat16(), mk.LargeMarginLoss(1.0, **SOFT), ("first",))
    out = half(torch.randn(N, 5, dtype=torch.bfloat16), torch.zeros(N, dtype=torch.int64))
    assert is_split(out["loss"]) and out["loss"].grad_fn.name() != "KnownGradientBackward"

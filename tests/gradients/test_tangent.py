"""The split backward with differentiated norms: the gradients of differentiating twice, where networks are linear
piece by piece."""

import copy
import gc
from functools import partial

import pytest
import torch
from support import batches
from support.gradients import assert_split_is_as_exact_as_the_loop_under_autocast, is_split, step_gradients
from torch import Tensor, nn
from torch.nn import functional as F

from margin_kernels import LargeMarginLoss, MarginSensitivityLoss, MarginTask
from margin_kernels.experiments import models
from margin_kernels.gradients import autograd_graph
from margin_kernels.testing import assert_same_gradients, flops

pytestmark = pytest.mark.skipif(autograd_graph.refusal() is not None, reason="the compiled extension is missing")

CLASSES = 5


class Residual(nn.Module):
    """Shortcuts around and between the taps, in-place activations, a parameter that is added, one convolution twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.twice = nn.Conv2d(4, 4, 3, stride=2, padding=1, bias=False)
        self.bias, self.act = nn.Parameter(torch.randn(4, 1, 1)), nn.LeakyReLU(0.1, inplace=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.stem(x))
        h = self.act(self.block(h) + h + self.bias)
        return self.head(self.twice(self.act(self.twice(h))).mean((2, 3)))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden = nn.Conv2d(2, 4, 3), nn.Linear(16, 8, bias=False)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.max_pool2d(F.relu(self.conv(x)), 2).flatten(1), 0.3, self.training)
        return self.head(F.relu(self.normed(F.relu(self.hidden(h)))))


class Matrices(nn.Module):
    """Products with matrices [inputs, outputs] as they are stored, where nn.Linear transposes its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(72, 8) / 8), nn.Parameter(torch.randn(8, 8) / 3)
        self.bias, self.head = nn.Parameter(torch.randn(8)), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x.flatten(1) @ self.first)
        return self.head(F.relu(torch.addmm(self.bias, h, self.second)))


def plain() -> nn.Sequential:
    convolutions = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AvgPool2d(2), nn.Hardtanh(-2, 2), nn.Flatten()
    return nn.Sequential(*convolutions, nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def batchnorm() -> nn.Sequential:
    norm = nn.BatchNorm2d(4, affine=False).eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))


NETWORKS = {
    "plain": (plain, ("input", "0", "2", "6")),
    "late taps": (plain, ("2", "5")),
    "with taps of closed form": (plain, ("input", "7", "output")),
    "residual": (Residual, ("input", "stem", "block")),
    "around the tap": (Residual, ("block",)),
    "behind the shortcuts": (Residual, ("twice:0",)),
    "dropout and weight norm": (Dropping, ("input", "hidden")),
    "frozen batch norm": (batchnorm, ("input",)),
    "matrices": (Matrices, ("input",)),
}


batch = partial(batches.normal, shape=(2, 6, 6), classes=CLASSES)


def gradients_of(model: nn.Module, loss: nn.Module, layers, passes: str, n: int = 6) -> list[Tensor | None]:
    """Those of one step of a copy of `model`."""
    task = MarginTask(copy.deepcopy(model), loss, layers, passes)
    torch.manual_seed(3)
    return step_gradients(task, *batch(n=n))


assert_same = partial(assert_same_gradients, least=3)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name][0]().double()


LARGE = {
    "l2": {},
    "linf, clipped": {"p": "inf", "alpha": 2.0, "eps": 0.1},
    "l1, pairwise": {"p": 1, "cross_entropy_weight": 0.5, "auxiliary": "pairwise"},
    "l3, per sample": {"p": 3, "reduction": "none", "layer_reduction": "sum"},
}


@pytest.mark.parametrize("options", LARGE)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_large_margin_gradients_are_those_of_differentiating_twice(name, options) -> None:
    loss = LargeMarginLoss(5.0, second_order=True, **LARGE[options])
    layers = NETWORKS[name][1]
    split, loop = (gradients_of(build(name), loss, layers, passes) for passes in ("split", "loop"))
    assert_same(split, loop)


@pytest.mark.parametrize("options", [{}, {"p": "inf", "power": 1}, {"reduction": "none", "power": 1.5}], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_sensitivity_gradients_are_those_of_differentiating_twice(name, options) -> None:
    loss = MarginSensitivityLoss(0.7, top_k=1, **options)
    layers = NETWORKS[name][1][:1]
    split, loop = (gradients_of(build(name), loss, layers, passes) for passes in ("split", "loop"))
    assert_same(split, loop)


def test_values_and_statistics_are_those_of_the_loop_and_auto_takes_the_split() -> None:
    for loss in (LargeMarginLoss(3.0, second_order=True), MarginSensitivityLoss(top_k=1)):
        auto, loop = (MarginTask(build("plain"), loss, ("input",), passes)(*batch()) for passes in ("auto", "loop"))
        assert is_split(auto["loss"]) and auto.keys() == loop.keys()
        for name, value in auto.items():
            torch.testing.assert_close(value, loop[name], rtol=1e-12, atol=0)


def test_a_term_is_added_to_the_loss_in_place() -> None:
    model, found = build("plain"), []
    weight = next(model.parameters())
    for passes in ("split", "loop"):
        loss = MarginTask(model, LargeMarginLoss(3.0, second_order=True), ("input",), passes)(*batch())["loss"]
        loss += 0.3 * weight.square().sum()
        found.append((loss.detach(), torch.autograd.grad(loss, weight)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "matrices"])
def test_weight_gradients_are_laid_out_as_the_weights(name) -> None:
    """What is not would be copied into the parameter's .grad."""
    model = build(name)
    out = MarginTask(model, LargeMarginLoss(3.0, second_order=True), ("input",), "split")(*batch())
    for parameter, gradient in zip(
        model.parameters(), torch.autograd.grad(out["loss"], [*model.parameters()]), strict=True
    ):
        assert gradient.stride() == parameter.stride()


def test_a_step_does_four_thirds_of_the_work_of_cross_entropy() -> None:
    """4 F instead of 6 F; taps behind the first convolution, whose input gradient only a pass needs."""
    x, y = torch.rand(4, 1, 28, 28), torch.randint(10, (4,))
    model = models.build("mnist_cnn", (1, 28, 28), 10)

    def step(passes: str):
        task = MarginTask(model, LargeMarginLoss(1e3, second_order=True), ("pool1",), passes)
        task(x, y)["loss"].backward()  # tried out
        return lambda: task(x, y)["loss"].backward()

    cross_entropy = flops(lambda: F.cross_entropy(model(x), y).backward())
    split, loop = flops(step("split")), flops(step("loop"))
    first = 4 * 32 * 28 * 28 * 25 * 2
    one = (cross_entropy - 2 * first) / 3  # forward FLOPs behind the first convolution
    assert split - 2 * first == pytest.approx(4 * one, rel=0.01)
    assert loop - 2 * first == pytest.approx(6 * one, rel=0.01)


def test_hooks_accumulation_and_terms_of_the_users() -> None:
    x, y = batch()
    results = []
    for passes in ("split", "loop"):
        model, calls = build("residual"), []
        model.twice.weight.register_hook(lambda grad, calls=calls: calls.append(1) or 2 * grad)
        out = MarginTask(model, LargeMarginLoss(3.0, second_order=True), ("input", "block"), passes)(x, y)
        out["loss"].backward(retain_graph=True)
        (out["output"].square().sum() + out["loss"]).backward()
        assert calls == [1, 1]
        results.append([parameter.grad for parameter in model.parameters()])
    assert_same(*results)
    task = MarginTask(build("residual"), LargeMarginLoss(3.0, second_order=True), ("input",), "split")
    with pytest.raises(ValueError, match="the gradient in the tapped input is asked for as well"):
        task(x.requires_grad_(), y)


@pytest.mark.parametrize("n", [1, 5])
def test_frozen_parameters_and_odd_batches(n) -> None:
    model = build("plain")
    model[0].weight.requires_grad_(False)
    model[6].requires_grad_(False)
    model[8].bias.requires_grad_(False)
    loss = LargeMarginLoss(3.0, second_order=True)
    found = [gradients_of(model, loss, ("input", "2"), passes, n) for passes in ("split", "loop")]
    assert found[0][0] is None and found[0][4] is None and found[0][7] is None
    assert_same(*found)


@pytest.mark.parametrize("second_order", [False, True])
def test_a_step_leaves_nothing_to_the_garbage_collector(second_order) -> None:
    """Activations must go when the loss goes, not when Python next looks for cycles."""
    x, y = batch()
    task = MarginTask(build("plain"), LargeMarginLoss(3.0, second_order=second_order), ("input", "2"), "split")
    task(x, y)["loss"].backward()
    while gc.collect():  # what other tests left behind may leave more behind as it goes
        pass
    gc.disable()
    try:
        for _ in range(3):
            task(x, y)["loss"].backward()
        assert gc.collect() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype) -> None:
    x, y = batch(dtype=torch.float32)
    assert_split_is_as_exact_as_the_loop_under_autocast(
        lambda: build("plain").float(), LargeMarginLoss(3.0, second_order=True), ("input", "2"), x, y, dtype
    )


def test_nan_in_one_sample_reaches_the_loss() -> None:
    x, y = batch()
    x[2] = float("nan")
    task = MarginTask(build("plain"), LargeMarginLoss(3.0, second_order=True), ("input",), "split")
    loss = task(x, y)["loss"]
    loss.backward()
    assert loss.isnan() and task.model[0].weight.grad.isnan().any()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.scale = nn.Linear(72, 6), nn.Linear(6, CLASSES), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.first(x.flatten(1))) * self.scale)


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(72, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        return self.head(h * h)


def smooth() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def affine() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4).eval(), nn.Flatten(), nn.Linear(64, CLASSES))


def headless() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(72, CLASSES), nn.ReLU())


def tokens() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(1, 2), nn.Linear(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(96, CLASSES))


@pytest.mark.parametrize(
    ("model", "loss", "message"),
    [
        (smooth, {}, "TanhBackward0 is not known to be linear"),
        (Scaled, {}, "MulBackward0 is not known to be linear"),
        (Squared, {}, "MulBackward0 is not known to be linear"),
        (affine, {}, "BatchNormBackward0 is not known to be linear"),
        (headless, {}, "the logits do not come from a linear layer"),
        (plain, {"top_k": 2}, "it takes one competitor when norms are differentiated"),
        (plain, {"space": "probability"}, 'the passes of space="probability" do not hold the gradients of the logits'),
    ],
)
def test_what_is_not_exact_is_refused_by_name_and_avoided_by_auto(model, loss, message) -> None:
    torch.manual_seed(0)
    model = model().double()
    loss = LargeMarginLoss(3.0, second_order=True, **loss)
    with pytest.raises(ValueError, match=f'passes="split" is not possible: .*{message}'):
        MarginTask(model, loss, ("input",), "split")(*batch())
    found = [gradients_of(model, loss, ("input",), passes) for passes in ("auto", "loop")]
    assert_same(*found, least=2)


@pytest.mark.parametrize(
    "options", [{"top_k": 2}, {"top_k": None}, {"top_k": 1, "classification": "cross_entropy"}], ids=str
)
def test_sensitivity_takes_it_for_the_hinge_and_one_candidate(options) -> None:
    with pytest.raises(ValueError, match=r'takes classification="hinge" and top_k=1'):
        MarginTask(build("plain"), MarginSensitivityLoss(**options), passes="split")(*batch())


@pytest.mark.parametrize("passes", ["auto", "loop", "split"])
def test_what_the_loss_says_of_its_gradient_goes_before_the_passes(passes) -> None:
    losses = {how: MarginSensitivityLoss(top_k=1, gradient=how) for how in ("tangent", "double_backward")}
    outs = {how: MarginTask(build("plain"), loss, passes=passes)(*batch())["loss"] for how, loss in losses.items()}
    taken = {how: is_split(out) for how, out in outs.items()}
    assert taken == {"tangent": True, "double_backward": False}
    assert_same(*(gradients_of(build("plain"), loss, ("input",), passes) for loss in losses.values()))
    assert repr(losses["tangent"]) != repr(MarginSensitivityLoss(top_k=1))  # what compiled steps are told apart by


@pytest.mark.parametrize("name", ["plain", "residual"])
def test_tangents_in_fp32_agree_with_double_backward_to_1e_6(name) -> None:
    results = []
    for how in ("tangent", "double_backward"):
        model, (x, y) = build(name).float(), batch()
        MarginTask(model, MarginSensitivityLoss(top_k=1, gradient=how))(x.float(), y)["loss"].backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert results[1].abs().max() > 1e-3
    assert (results[0] - results[1]).norm() < 1e-6 * results[1].norm()


def test_a_tangent_of_activations_of_your_own_is_refused() -> None:
    x, y = batch()
    x.requires_grad_()
    with pytest.raises(ValueError, match='gradient="tangent" is not possible: the activations were kept by the caller'):
        MarginSensitivityLoss(top_k=1, gradient="tangent")(build("plain")(x), y, [x])


def test_a_tangent_that_is_not_exact_is_refused_by_the_name_of_the_operation() -> None:
    with pytest.raises(ValueError, match=r'gradient="tangent" is not possible: .*TanhBackward0 is not known to be'):
        MarginTask(smooth().double(), MarginSensitivityLoss(top_k=1, gradient="tangent"))(*batch())
    with pytest.raises(ValueError, match="gradient must be one of"):
        MarginSensitivityLoss(gradient="envelope")

"""Gradients that were once wrong without a word: each is now the loop's, or refused with the remedy."""

from __future__ import annotations

import copy
import math
import sys
import threading
from typing import Any

import pytest
import torch
from support import batches, gradients
from support.drawn_networks import Clamped
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from margin_kernels import (
    AdversarialMarginLoss,
    LargeMarginLoss,
    MarginSensitivityLoss,
    MarginTask,
    OneToNLoss,
    deepfool,
)
from margin_kernels.gradients import autograd_graph, register_row_local, structure
from margin_kernels.testing import assert_same_gradients

CLASSES = 5
batch = batches.normal
pytestmark = pytest.mark.skipif(autograd_graph.refusal() is not None, reason="the compiled extension is missing")


class Net(nn.Module):
    """Two linear layers with a function of the activations between them."""

    def __init__(self, between, activation=torch.tanh) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.between, self.activation = between, activation
        self.number = 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.between(self, self.activation(self.first(x)))
        return self.head(self.activation(self.second(h)))


def build(between=lambda self, h: h, activation=torch.tanh) -> Net:
    torch.manual_seed(0)
    return Net(between, activation).double()


def is_split(out: dict[str, Tensor]) -> bool:
    return gradients.is_split(out["loss"])


def run(between, passes: str, steps=(0.0,), loss=None, layers=("input", "first"), activation=torch.tanh, **options):
    """Gradients of all parameters over some steps, and which of them took the split."""
    model = build(between, activation)
    task = MarginTask(model, copy.deepcopy(loss or LargeMarginLoss(3.0)), layers, passes, **options)
    found, split = [], []
    for i, number in enumerate(steps):
        model.number = number
        model.zero_grad()
        out = task(*batch(seed=i))
        split.append(is_split(out))
        out["loss"].backward()
        found += [parameter.grad for parameter in model.parameters()]
    return found, split


def mixed(self: Net, h: Tensor) -> Tensor:
    return self.number * h + (1 - self.number) * h.flip(0)


def shifted(self: Net, h: Tensor) -> Tensor:
    return h + torch.roll(h, int(self.number), 0)


COUPLED = {
    "mean of the batch": (lambda self, h: h - h.mean(0), (0.0,)),
    "mixup whose lambda changes": (mixed, (1.0, 0.6, 0.6)),
    "a gate that opens": (lambda self, h: h + self.number * h.mean(0), (0.0, 0.5)),
    "a shift that begins at 0": (shifted, (0, 1)),
    "samples of equal parity": (lambda self, h: h + 0.5 * h.roll(len(h) // 2, 0), (0.0,)),
    "a permutation": (lambda self, h: h + h[torch.arange(len(h) - 1, -1, -1)], (0.0,)),
    "a product of samples": (lambda self, h: h + h @ h.t() @ h, (0.0,)),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_samples_take_the_loop_from_the_first_step_on(name) -> None:
    between, steps = COUPLED[name]
    auto, split = run(between, "auto", steps)
    assert not any(split)
    assert_same_gradients(auto, run(between, "loop", steps)[0], least=4)


def test_two_views_of_a_batch_are_refused_and_their_batch_can_be_named() -> None:
    def views(self: Net, h: Tensor) -> Tensor:
        return torch.cat([h, 2 * h])[: len(h)]

    for passes in ("auto", "loop"):
        with pytest.raises(
            ValueError, match=r'of tap \'input\' .* is not proven by the graph .*batch_dim=\{"input": d\}'
        ):
            run(views, passes)
    assert_same_gradients(run(views, "auto", batch_dim=0)[0], run(views, "loop", batch_dim=0)[0], least=4)


def test_one_loss_in_two_tasks_has_no_memory_of_the_other() -> None:
    loss = LargeMarginLoss(3.0)
    for between, taken in ((lambda self, h: h - h.mean(1, keepdim=True), True), (lambda self, h: h - h.mean(0), False)):
        found = []
        for passes in ("auto", "loop"):
            model = build(between)
            out = MarginTask(model, loss, ("input", "first"), passes)(*batch())
            assert passes == "loop" or is_split(out) == taken
            out["loss"].backward()
            found.append([parameter.grad for parameter in model.parameters()])
        assert_same_gradients(*found, least=4)


def hooked(hook):
    def between(self: Net, h: Tensor) -> Tensor:
        h = h * 1.0
        h.register_hook(hook)
        return h

    return between


@pytest.mark.parametrize("second_order", [False, True])
def test_hooks_on_activations_are_silent_in_the_passes_and_see_the_backward_of_the_loss(second_order) -> None:
    """The norms are those without the hook; the gradients those that the hook makes of one backward."""
    loss = LargeMarginLoss(3.0, second_order=second_order)
    seen: list[Tensor] = []
    clamp = hooked(lambda grad: (seen.append(grad), grad.clamp(-1e-3, 1e-3))[1])
    auto, split = run(clamp, "auto", loss=loss, activation=torch.relu)
    assert split == [False] and len(seen) == 1
    plain = MarginTask(build(activation=torch.relu), loss, ("input", "first"), "loop")(*batch(seed=0))
    with_hook = MarginTask(build(clamp, torch.relu), loss, ("input", "first"), "loop")(*batch(seed=0))
    assert torch.equal(plain["norm"], with_hook["norm"])
    assert_same_gradients(auto, run(clamp, "loop", loss=loss, activation=torch.relu)[0], least=4)
    with pytest.raises(ValueError, match=r"an activation has a hook .*register_hook, retain_grad"):
        run(clamp, "split", loss=loss, activation=torch.relu)


def test_retain_grad_holds_the_gradient_of_the_loss() -> None:
    def retaining(self: Net, h: Tensor) -> Tensor:
        self.kept = h * 1.0
        self.kept.retain_grad()
        return self.kept

    model = build(retaining)
    out = MarginTask(model, LargeMarginLoss(3.0), ("input", "first"))(*batch())
    out["loss"].backward()
    again = build(lambda self, h: (setattr(self, "kept", h * 1.0), self.kept)[1])
    loss = MarginTask(again, LargeMarginLoss(3.0), ("input", "first"), "loop")(*batch())["loss"]
    (expected,) = torch.autograd.grad(loss, again.kept)
    torch.testing.assert_close(model.kept.grad, expected, rtol=1e-10, atol=1e-13)


def test_a_hook_that_comes_after_the_forward_pass_is_an_error_and_not_forgotten() -> None:
    model = build(lambda self, h: (setattr(self, "kept", h * 1.0), self.kept)[1])
    out = MarginTask(model, LargeMarginLoss(3.0), ("input", "first"))(*batch())
    assert is_split(out)
    model.kept.register_hook(lambda grad: 2 * grad)
    with pytest.raises(RuntimeError, match="an activation got a hook after the forward pass"):
        out["loss"].backward()


def test_a_module_with_backward_hooks_sees_one_backward() -> None:
    calls: list[str] = []
    found = []
    for passes in ("auto", "loop"):
        model = build()
        model.second.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("full"))
        out = MarginTask(model, LargeMarginLoss(3.0, top_k=2), ("input", "first"), passes)(*batch())
        assert calls == []
        out["loss"].backward()
        assert calls == ["full"] and not is_split(out)
        calls.clear()
        found.append([parameter.grad for parameter in model.parameters()])
    assert_same_gradients(*found, least=4)


@pytest.mark.parametrize(
    "kind",
    ["register_hook", "retain_grad", "node", "node, before", "full", "pre", "all modules", "inside forward", "input"],
)
def test_without_the_extension_hooks_on_activations_are_refused(monkeypatch, request, kind) -> None:
    def between(self: Net, h: Tensor) -> Tensor:
        h = h * 1.0
        if kind == "register_hook" and h.requires_grad:
            h.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
        if kind == "retain_grad" and h.requires_grad:
            h.retain_grad()
        if kind == "node" and h.requires_grad:
            h.grad_fn.register_hook(
                lambda grad_input, grad_output: tuple(-g if g is not None else g for g in grad_input)
            )
        if kind == "node, before" and h.requires_grad:
            h.grad_fn.register_prehook(lambda grad_output: tuple(-g for g in grad_output))
        return h

    model = build(between)
    if kind == "all modules":
        handle = torch.nn.modules.module.register_module_full_backward_hook(lambda *args: None)
        request.addfinalizer(handle.remove)
    if kind == "full":
        model.second.register_full_backward_hook(lambda module, grad_input, grad_output: None)
    if kind == "pre":
        model.second.register_full_backward_pre_hook(lambda module, grad_output: None)
    if kind == "inside forward":
        model.second.register_forward_hook(lambda module, args, output: output.register_hook(torch.neg) and None)
    monkeypatch.setattr(autograd_graph, "EXTENSION", None)
    x, y = batch()
    if kind == "input":
        x.requires_grad_().register_hook(torch.neg)
    for loss in (LargeMarginLoss(3.0), MarginSensitivityLoss()):
        layers = ("input",) if isinstance(loss, MarginSensitivityLoss) else ("input", "first")
        with pytest.raises(ValueError, match=r"need the compiled extension.*install with a C\+\+ compiler, or remove"):
            MarginTask(model, loss, layers, "loop")(x, y)
    assert sys.getprofile() is None
    if kind in ("register_hook", "retain_grad", "node", "node, before"):
        with pytest.raises(ValueError, match="need the compiled extension"):
            deepfool(model, batch()[0])
        with pytest.raises(ValueError, match="need the compiled extension"):
            MarginTask(model, AdversarialMarginLoss(max_iter=2))(*batch())
    if kind == "all modules":
        handle.remove()
    plain = MarginTask(build(), LargeMarginLoss(3.0), ("input", "first"), "loop")(*batch())
    assert plain["norm"].gt(0).any() and deepfool(build(), batch()[0]).distance.gt(0).all()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return 2 * h

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_function_of_which_nothing_is_known_takes_the_loop_where_its_batch_is_named() -> None:
    between = lambda self, h: Clamped.apply(h, 0.01)  # noqa: E731
    with pytest.raises(ValueError, match=r"is not proven by the graph \(ClampedBackward: nothing is known"):
        run(between, "auto")
    auto, split = run(between, "auto", batch_dim=0)
    assert split == [False]
    assert_same_gradients(auto, run(between, "loop", batch_dim=0)[0], least=4)
    with pytest.raises(ValueError, match="the trial of step 1 shows; gradients may have been wrong since step 1"):
        run(between, "split", batch_dim=0)


def test_an_unknown_function_is_tried_out_where_the_split_is_asked_for_by_name() -> None:
    between = lambda self, h: Doubled.apply(h)  # noqa: E731
    found, split = run(between, "split", (0.0,) * 3, batch_dim=0)
    assert split == [True] * 3
    assert_same_gradients(found, run(between, "loop", (0.0,) * 3, batch_dim=0)[0], least=4)


def test_a_trial_that_fails_says_since_when() -> None:
    class Late(torch.autograd.Function):
        """Row-local in its first backwards."""

        calls = 0

        @staticmethod
        def forward(ctx, h):
            return h.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + grad.flip(0) if Late.calls else grad

    model = build(lambda self, h: Late.apply(h))
    task = MarginTask(model, LargeMarginLoss(3.0), ("first",), "split", batch_dim=0)
    for step in range(1, 8):
        if step == 5:
            Late.calls = 1
        task(*batch(seed=step))  # tried at steps 1, 2 and 4
    with pytest.raises(ValueError, match="as the trial of step 8 shows; gradients may have been wrong since step 5"):
        task(*batch())


def test_a_registered_function_is_part_of_the_proof() -> None:
    register_row_local(Doubled)
    try:
        found, split = run(lambda self, h: Doubled.apply(h), "auto")
        assert split == [True]
        assert_same_gradients(found, run(lambda self, h: Doubled.apply(h), "loop")[0], least=4)
    finally:
        structure._REGISTERED.clear()
    with pytest.raises(TypeError, match=r"function must be a torch\.autograd\.Function or a node's name"):
        register_row_local(3)


@pytest.mark.parametrize("loss", [LargeMarginLoss(3.0, second_order=True), MarginSensitivityLoss(top_k=1)], ids=repr)
@pytest.mark.parametrize(
    "between",
    [
        lambda self, h: torch.addmm(self.second.bias, h, self.second.weight.t(), beta=0.5),
        lambda self, h: torch.addmm(self.second.bias, h, self.second.weight.t(), alpha=1.5),
        lambda self, h: torch.addmm(self.second.bias, h, self.second.weight.t(), beta=0),
    ],
)
def test_the_factors_of_addmm_are_not_forgotten_by_tangents(between, loss) -> None:
    found, split = run(between, "auto", loss=loss, layers=("first",), activation=torch.relu)
    assert split == [False]
    assert_same_gradients(found, run(between, "loop", loss=loss, layers=("first",), activation=torch.relu)[0], least=4)


def test_a_thin_convolution_with_a_deeper_tap_behind_it() -> None:
    class Normalize(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - 0.1) / 0.3

    def network() -> nn.Sequential:
        torch.manual_seed(0)
        layers = Normalize(), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(128, CLASSES)).double()

    for layers in (("input", "0"), ("0", "input", "1"), ("input", "0", "2", "3")):
        found = []
        for passes in ("auto", "loop"):
            model = network()
            out = MarginTask(model, LargeMarginLoss(3.0, second_order=True), layers, passes)(*batch(6, (3, 8, 8)))
            assert is_split(out) == (passes == "auto")
            out["loss"].backward()
            found.append([parameter.grad for parameter in model.parameters()])
        assert_same_gradients(*found, least=6)


class TimeMajor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(self.norm(x.transpose(0, 1)))).mean(0))


@pytest.mark.parametrize("steps", [4, 6])
def test_a_time_major_tap_is_measured_along_its_batch_also_with_as_many_steps_as_samples(steps) -> None:
    torch.manual_seed(0)
    model = TimeMajor().double()
    x, y = batch(6, (steps, 6))
    layers = ("input", "norm", "layer")
    out = MarginTask(model, LargeMarginLoss(3.0), layers)(x, y)
    assert is_split(out)
    for n in range(6):
        alone = MarginTask(model, LargeMarginLoss(3.0), layers)(x[n : n + 1], y[n : n + 1])
        torch.testing.assert_close(out["norm"][n], alone["norm"][0], rtol=1e-10, atol=0)
    if steps == 6:
        with pytest.raises(ValueError, match="is given as 0, but the graph shows the batch elsewhere"):
            MarginTask(model, LargeMarginLoss(3.0), layers, batch_dim={"norm": 0})(x, y)


@pytest.mark.parametrize("passes", ["auto", "loop"])
def test_a_term_on_the_input_of_the_model_reaches_the_encoder_before_it(passes) -> None:
    torch.manual_seed(1)
    model, encoder = build(), nn.Linear(6, 6).double()
    x, y = batch()
    task = MarginTask(model, LargeMarginLoss(3.0), ("input", "first"), passes)
    h = torch.tanh(encoder(x))
    out = task(h, y)
    assert is_split(out) == (passes == "auto")
    (out["loss"] + h.square().mean()).backward()
    # As two backwards of two graphs.
    both = [encoder.weight.grad.clone(), model.first.weight.grad.clone()]
    model.zero_grad()
    encoder.zero_grad()
    h = torch.tanh(encoder(x))
    task.passes = "loop"
    task(h, y)["loss"].backward()
    torch.tanh(encoder(x)).square().mean().backward()
    assert_same_gradients(both, [encoder.weight.grad, model.first.weight.grad], least=2)


def test_terms_on_hidden_activations_and_on_the_logits_add_up() -> None:
    found = []
    for passes in ("auto", "loop"):
        model = build(lambda self, h: (setattr(self, "kept", h), h)[1])
        out = MarginTask(model, LargeMarginLoss(3.0), ("input", "first"), passes)(*batch())
        assert is_split(out) == (passes == "auto")
        (out["loss"] + model.kept.square().mean() + 0.1 * out["output"].square().sum()).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert_same_gradients(*found, least=6)


def test_parameters_with_a_graph_of_their_own_get_their_gradient() -> None:
    """functional_call with fast weights, as in meta-learning."""
    found = []
    x, y = batch()
    for passes in ("auto", "loop"):
        model = build()
        task = MarginTask(model, LargeMarginLoss(3.0), ("first",), passes)
        fast = {name: value - 0.1 * value.sin() for name, value in task.named_parameters()}
        out = functional_call(task, fast, (x, y))
        assert is_split(out) == (passes == "auto")
        inner = torch.autograd.grad(out["loss"], list(fast.values()), retain_graph=True)
        outer = torch.autograd.grad(out["loss"], list(model.parameters()))
        found.append([*inner, *outer])
    assert_same_gradients(*found, least=12)


def test_a_second_backward_over_the_split_needs_retain_graph_as_ever() -> None:
    model = build()
    loss = MarginTask(model, LargeMarginLoss(3.0), ("first",))(*batch())["loss"]
    loss.backward(retain_graph=True)
    once = model.first.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.first.weight.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("compiled", [False, True])
def test_options_of_the_loss_may_change_between_steps(compiled) -> None:
    loss = LargeMarginLoss(3.0, alpha=2.0, layer_weights=[1.0, 2.0])
    model = build()
    task = MarginTask(model, loss, ("input", "first"))
    if compiled:
        task.compile(backend="aot_eager")
    changes: list[dict[str, Any]] = [
        {},
        {"gamma": 10.0},
        {"alpha": 0.9},
        {"layer_weights": [5.0, 0.0]},
        {"margin_weight": 0.25},
        {"p": 1.0},
    ]
    options = {"gamma": 3.0, "alpha": 2.0, "layer_weights": [1.0, 2.0]}
    for change in changes:
        for name, value in change.items():
            setattr(loss, name, value)
        options |= change
        model.zero_grad()
        out = task(*batch())
        out["loss"].backward()
        found = [parameter.grad for parameter in model.parameters()]
        again = build()
        expected = MarginTask(again, LargeMarginLoss(**options), ("input", "first"))(*batch())
        expected["loss"].backward()
        torch.testing.assert_close(out["loss"], expected["loss"], rtol=1e-9, atol=0, check_dtype=False)
        assert_same_gradients(found, [parameter.grad for parameter in again.parameters()], least=4)
    with pytest.raises(ValueError, match="gamma must be finite and > 0, got -1"):
        loss.gamma = -1.0
    if compiled:  # numbers of the loss are inputs of the step, not a reason to compile anew
        assert len(task._compiled._steps) == 3  # another margin_weight than 1, another p


def test_a_compiled_step_sees_what_modules_keep() -> None:
    model = build(lambda self, h: h * self.number)
    model.number = 1.0
    task = MarginTask(model, LargeMarginLoss(3.0), ("first",))
    task.compile(backend="aot_eager")
    values = []
    for number in (1.0, 3.0):
        model.number = number
        values.append(task(*batch())["loss"].item())
        expected = MarginTask(model, LargeMarginLoss(3.0), ("first",))(*batch())["loss"].item()
        assert values[-1] == pytest.approx(expected, rel=1e-10)
    assert values[0] != values[1]


def degenerate_models() -> dict[str, nn.Module]:
    zero, dead, twins = build(), build(activation=torch.relu), build()
    nn.init.zeros_(zero.head.weight)
    nn.init.constant_(dead.second.bias, -100.0)
    with torch.no_grad():
        twins.head.weight.copy_(twins.head.weight[:1].expand(CLASSES, -1))
    return {"a head of zeros": zero, "dead units": dead, "equal rows": twins}


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("name", ["a head of zeros", "dead units", "equal rows"])
def test_a_start_without_directions_does_not_destroy_the_network(name, second_order) -> None:
    model = degenerate_models()[name]
    loss = LargeMarginLoss(1.0, second_order=second_order, cross_entropy_weight=1.0)
    out = MarginTask(model, loss, ("input", "first"))(*batch())
    out["loss"].backward()
    assert out["degenerate"].all() and not out["active"].any()
    norm = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    assert norm < 10
    torch.testing.assert_close(out["loss"], out["nll"].mean(), check_dtype=False)


def test_a_degenerate_sample_leaves_the_others_as_they_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    nn.init.constant_(model[0].bias, 0.0)
    x, y = batch()
    x[2] = 0  # every unit is at 0: no direction
    out = MarginTask(model, LargeMarginLoss(1.0, reduction="none"), ("input",), "loop")(x, y)
    others = [0, 1, 3, 4, 5]
    alone = MarginTask(model, LargeMarginLoss(1.0, reduction="none"), ("input",), "loop")(x[others], y[others])
    assert out["degenerate"][2].all() and out["loss"][2] == 0
    torch.testing.assert_close(out["loss"][others], alone["loss"])


def test_cross_entropy_pulls_at_a_confident_label_as_hard_as_its_others_push() -> None:
    z = torch.tensor([[20.0] + [0.0] * 9], requires_grad=True)
    loss = LargeMarginLoss(margin_weight=0.0, cross_entropy_weight=1.0)
    loss(z, torch.tensor([0]), [z]).backward()
    wide = torch.tensor([[20.0] + [0.0] * 9], dtype=torch.float64)
    truth = torch.softmax(wide, 1) - F.one_hot(torch.tensor([0]), 10)
    torch.testing.assert_close(z.grad.double(), truth, rtol=1e-6, atol=0)
    assert z.grad.sum().abs() < 1e-14


class Masked(nn.Module):
    """Every sample has classes of its own that it cannot take."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES + 2)
        self.mask = torch.zeros(CLASSES + 2, dtype=torch.bool)
        self.mask[CLASSES:] = True

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x))).masked_fill(self.mask, -math.inf)


LOSSES = [
    LargeMarginLoss(3.0, top_k=2, cross_entropy_weight=1.0),
    LargeMarginLoss(3.0, second_order=True),
    LargeMarginLoss(3.0, top_k=CLASSES + 1, aggregation="mean_distance"),
    MarginSensitivityLoss(top_k=2),
    MarginSensitivityLoss(classification="cross_entropy", top_k=1),
    OneToNLoss(1.0),
]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_masked_classes_change_nothing_for_the_others(loss) -> None:
    torch.manual_seed(0)
    model = Masked().double()
    out = MarginTask(model, loss)(*batch())
    out["loss"].backward()
    assert out["loss"].isfinite()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
    if isinstance(loss, LargeMarginLoss) and loss.top_k > CLASSES:
        return
    torch.manual_seed(0)
    plain = Masked().double()
    plain.mask[:] = False
    plain.head.weight = nn.Parameter(plain.head.weight[:CLASSES].detach().clone())
    plain.head.bias = nn.Parameter(plain.head.bias[:CLASSES].detach().clone())
    plain.mask = plain.mask[:CLASSES]
    if not isinstance(loss, OneToNLoss):  # there a masked class is a column of its own
        expected = MarginTask(plain, loss)(*batch())
        expected["loss"].backward()
        torch.testing.assert_close(out["loss"], expected["loss"], rtol=1e-10, atol=0)
        torch.testing.assert_close(model.body.weight.grad, plain.body.weight.grad, rtol=1e-9, atol=1e-12)


def test_two_threads_may_use_one_model_at_once() -> None:
    model = build()
    x, y = batch(64)
    tasks = [MarginTask(model, LargeMarginLoss(3.0, top_k=2), ("input", "first", "second"), "loop") for _ in range(2)]
    expected = tasks[0](x, y)["loss"].item()
    wrong: list[object] = []

    def work(task: MarginTask) -> None:
        for _ in range(60):
            try:
                value = task(x, y)["loss"].item()
            except Exception as error:
                wrong.append(error)
            else:
                if abs(value - expected) > 1e-12:
                    wrong.append(value)

    threads = [threading.Thread(target=work, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = kind(6, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.layer(x)
        return self.head(out[:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_tap_on_a_module_that_returns_several_tensors_is_its_first(kind) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind).double()
    x, y = batch(4, (3, 6))
    out = MarginTask(model, LargeMarginLoss(3.0), ("layer", "layer[0]"))(x, y)
    assert torch.equal(out["norm"][..., 0], out["norm"][..., 1])
    leaf = model.layer(x)[0].detach().requires_grad_()
    z = model.head(leaf[:, -1])
    gap = z.gather(1, out["competitor"])[:, 0] - z.gather(1, y[:, None])[:, 0]
    (g,) = torch.autograd.grad(gap.sum(), leaf)
    torch.testing.assert_close(out["norm"][:, 0, 0], g.flatten(1).norm(dim=1))
    with pytest.raises(ValueError, match=r"layer 'layer\[7\]': what the module returns has no item \[7\]"):
        MarginTask(model, LargeMarginLoss(3.0), ("layer[7]",))(x, y)


def test_the_second_output_of_a_module_can_be_tapped_by_its_place() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            return {"both": (torch.tanh(x), x.square())}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.pair, self.head = nn.Linear(6, 6), Pair(), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            one, other = self.pair(self.first(x))["both"]
            return self.head(one + 2 * other)

    torch.manual_seed(0)
    model = Model().double()
    out = MarginTask(model, LargeMarginLoss(3.0), ("pair[both][1]", "pair[both][0]"))(*batch())
    torch.testing.assert_close(out["norm"][..., 0], 2 * out["norm"][..., 1])


def test_an_operation_without_second_derivative_is_refused_with_advice() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Hardsigmoid(), nn.Linear(6, CLASSES)).double()
    for loss in (LargeMarginLoss(3.0, second_order=True), MarginSensitivityLoss()):
        with pytest.raises(ValueError, match=r"PyTorch has none of hardsigmoid: write it as .*, or take first order"):
            MarginTask(model, loss)(*batch())
    assert MarginTask(model, LargeMarginLoss(3.0))(*batch())["loss"].isfinite()


def test_a_network_that_changes_its_input_in_place_is_measured_at_its_input() -> None:
    """The in-place operation moved the tap behind itself: norms were those without the ReLU."""
    torch.manual_seed(0)
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
        x, y = batch()
        found.append(MarginTask(model, LargeMarginLoss(3.0))(x.clone(), y)["norm"])
    torch.testing.assert_close(*found)


def test_explain_says_what_a_step_does_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(), nn.Linear(8, CLASSES)).double()
    x, y = batch()
    task = MarginTask(model, LargeMarginLoss(3.0), ("input",))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    with pytest.warns(UserWarning, match="batch norm in training mode"):
        found = task.explain(x, y)
    assert found.strategy == "loop" and "batch norm in training mode couples the samples" in found.refused["split"]
    assert found.nodes == ("NativeBatchNormBackward0: batch norm in training mode couples the samples",)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    found = task.explain(x, y)
    assert (found.strategy, found.passes, found.nodes) == ("split", 3.0, ())
    assert found.recorded_bytes > 0 and "strategy: split" in repr(task)
    assert "3 F = F + 1 pass + F for the weights" in str(found)
    assert MarginTask(model, OneToNLoss()).explain(x, y).backends["one_to_n"] == "cpu"


def test_explain_names_every_reason_that_is_known() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    x, y = batch()
    smoothed = LargeMarginLoss(3.0, competitors="soft", cross_entropy_weight=1.0, label_smoothing=0.1)
    task = MarginTask(model, smoothed)
    hooked = model[2].register_full_backward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="batch norm in training mode"):
        found = task.explain(x, y)
    smoothing, hook, coupled = found.refused["split"].split("; ")
    assert smoothing.endswith("take label_smoothing=0") and hook.startswith("an activation has a hook")
    assert coupled.startswith("the samples are coupled: NativeBatchNormBackward0")
    # One after another they are mended, and what is left was named before.
    hooked.remove()
    assert task.explain(x, y).refused["split"] == f"{smoothing}; {coupled}"
    model.eval()
    assert task.explain(x, y).refused["split"] == smoothing
    task.loss.label_smoothing = 0.0
    assert task.explain(x, y).strategy == "split"
    found = MarginTask(model, LargeMarginLoss(3.0, second_order=True, top_k=2, space="probability")).explain(x, y)
    assert found.refused == {
        "split": "the norms are differentiated",
        "tangent": 'the passes of space="probability" do not hold the gradients of the logits; it takes one competitor '
        "when norms are differentiated; TanhBackward0, NativeBatchNormBackward0 are not known to be linear in the "
        "activations and additive in parameters",
    }
    many = MarginTask(model, LargeMarginLoss(3.0, top_k=3, cross_entropy_weight=1.0)).explain(x, y).refused["split"]
    assert 'competitors="soft"' in many and many.endswith("; slower than the loop from 3 competitors on")


def test_what_is_refused_is_not_remembered_as_proven() -> None:
    """A look for all reasons goes on behind the first, over graphs that are no proof."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    x, y = batch()
    found = []
    for asks in (True, False):
        task = MarginTask(model, LargeMarginLoss(3.0), passes="auto")
        with pytest.warns(UserWarning, match="batch norm in training mode"):
            for _ in range(3):
                if asks:
                    task.explain(x, y)
                found.append(torch.autograd.grad(task(x, y)["loss"], model[0].weight)[0])
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-12, atol=1e-15)


def test_explain_takes_sample_weights() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    x, y = batch()
    task = MarginTask(model, LargeMarginLoss(3.0))
    assert task.explain(x, y, sample_weight=torch.rand(len(x))) == task.explain(x, y)
    with pytest.raises(ValueError, match=rf"sample_weight must have shape \[{len(x)}\] to match logits, got \[1\]"):
        task.explain(x, y, sample_weight=torch.ones(1))


def test_explain_counts_what_a_step_with_tangents_records() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)).double()
    task = MarginTask(model, MarginSensitivityLoss(top_k=1))
    found = task.explain(*batch())
    assert (found.strategy, found.passes) == ("tangent", 4.0) and found.recorded_bytes > 0


class Folded(nn.Module):
    """Frames of a clip go through the convolution as samples of their own."""

    def __init__(self, conv: nn.Module, features: int) -> None:
        super().__init__()
        self.conv, self.head = conv, nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x.flatten(0, 1))).reshape(len(x), -1))


@pytest.mark.parametrize("dims", [1, 2])
def test_tangents_of_a_convolution_over_the_frames_of_a_clip(dims) -> None:
    found = []
    for passes in ("auto", "loop"):
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d)[dims - 1](2, 3, 3)
        model = Folded(conv, 4 * 3 * 3**dims).double()
        x, y = batch(3, (4, 2, *[5] * dims))
        out = MarginTask(model, LargeMarginLoss(3.0, second_order=True), ("input",), passes)(x, y)
        assert is_split(out) == (passes == "auto")
        out["loss"].backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert_same_gradients(*found, least=3)


def literal_norm(model: nn.Module, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    z = model(leaf)
    gap = z.gather(1, index)[:, 0] - z.gather(1, y[:, None])[:, 0]
    (g,) = torch.autograd.grad(gap.sum(), leaf)
    return g.flatten(1).norm(dim=1)


class MadeHead(nn.Module):
    """The head's weight is made from the samples."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.first, self.head = part, nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.maker = nn.Linear(6, 6 * CLASSES if part == "weight" else CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        made = self.maker(x.mean(0)).view(*([CLASSES, 6] if self.part == "weight" else [CLASSES]))
        return functional_call(self.head, {self.part: made}, torch.tanh(self.first(x)))


class MovedInput(nn.Module):
    """A frozen head whose input is changed in place behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.head.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.tanh(self.first(x)))
        z = self.head(h)
        h.mul_(2.0)
        return z


class PooledLines(nn.Module):
    """PyTorch takes [N,H,W] as one image of N channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.pool, self.head = nn.Linear(6, 6), nn.AdaptiveAvgPool2d(1), nn.Linear(1, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.layer(x)).flatten(1))


@pytest.mark.parametrize("passes", ["auto", "loop"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: MadeHead("weight"), (6,)), (lambda: MadeHead("bias"), (6,)), (MovedInput, (6,)), (PooledLines, (5, 6))],
)
def test_a_head_without_closed_form_gets_its_pass(make, shape, passes) -> None:
    torch.manual_seed(0)
    model = make().double()
    x, y = batch(4, shape or (6,))
    out = MarginTask(model, LargeMarginLoss(3.0), passes=passes)(x, y)
    torch.testing.assert_close(
        out["norm"][:, 0, 0], literal_norm(model, x, y, out["competitor"]), rtol=1e-9, atol=1e-12
    )
    out["loss"].backward()
    MarginTask(model, LargeMarginLoss(3.0), passes=passes)(x[:1], y[:1])["loss"].backward()


def test_a_tap_before_a_pooling_of_lines() -> None:
    torch.manual_seed(0)
    model = PooledLines().double()
    x, y = batch(4, (5, 6))
    out = MarginTask(model, LargeMarginLoss(3.0), ("layer",))(x, y)
    h = model.layer(x).detach()
    behind = nn.Sequential(model.pool, nn.Flatten(1), model.head)
    torch.testing.assert_close(out["norm"][:, 0, 0], literal_norm(behind, h, y, out["competitor"]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("where", ["hook", "function", "weight"])
def test_what_is_not_linear_behind_the_taps_takes_the_loop(where) -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            if where == "hook":
                h.register_hook(lambda grad: grad.clamp(-0.02, 0.02))
            if where == "function":
                h = Clamped.apply(h, 0.01)
            weight = Clamped.apply(self.second.weight, 0.01) if where == "weight" else self.second.weight
            return self.head(torch.tanh(F.linear(h, weight)))

    found = []
    for passes in ("auto", "loop"):
        torch.manual_seed(0)
        model = Behind().double()
        out = MarginTask(model, LargeMarginLoss(3.0), ("head",), passes, batch_dim=0)(*batch())
        (out["loss"] + F.cross_entropy(out["output"], batch()[1])).backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        assert not is_split(out)
    assert_same_gradients(*found, least=4)


def test_a_batch_that_is_spread_over_two_dimensions() -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act, self.head = nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES)
            self.added = nn.Parameter(torch.randn(2, 1, 6))

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.first(x).unflatten(0, (2, -1)))
            return self.head(torch.tanh(h + self.added).flatten(0, 1))

    found = []
    for passes in ("auto", "loop"):
        torch.manual_seed(0)
        model = Spread().double()
        x, y = batch(4)
        out = MarginTask(model, LargeMarginLoss(3.0), ("input", "act"), passes)(x, y)
        torch.testing.assert_close(
            out["norm"][:, 0, 0], literal_norm(model, x, y, out["competitor"]), rtol=1e-9, atol=0
        )
        out["loss"].backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert_same_gradients(*found, least=4)


def test_a_network_without_trained_parameters_has_a_loss_without_gradient() -> None:
    model = build()
    model.requires_grad_(False)
    MarginTask(model, LargeMarginLoss(3.0))(*batch())["loss"].backward()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("how", ["adversarial", "frozen"])
def test_a_step_that_changes_the_model_refuses_a_second_thread(how) -> None:
    class Waiting(nn.Module):
        """Lets a second thread try while the first is inside."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)).double()

        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is first:
                inside.set()
                tried.wait(10)
            return self.inner(x)

    loss, options = (
        (AdversarialMarginLoss(), {}) if how == "adversarial" else (LargeMarginLoss(), {"batchnorm": "frozen"})
    )
    model, inside, tried = Waiting(), threading.Event(), threading.Event()
    results: list[object] = []

    def step(done: threading.Event | None) -> None:
        try:
            results.append(MarginTask(model, loss, **options)(*batch(6))["loss"].item())
        except RuntimeError as error:
            results.append(error)
        if done is not None:
            done.set()

    first = threading.Thread(target=step, args=(None,))
    first.start()
    assert inside.wait(10)
    second = threading.Thread(target=step, args=(tried,))
    second.start()
    second.join()
    first.join()
    assert isinstance(results[0], RuntimeError) and "another thread is in a step of this model" in str(results[0])
    assert isinstance(results[1], float)

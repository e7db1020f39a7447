"""After a step with AdversarialMarginLoss the model looks as after one forward pass of the whole batch."""

import copy
from collections import Counter, deque
from functools import partial
from typing import Any

import pytest
import torch
from support import batches
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as spectral_norm_hook
from torch.utils.checkpoint import checkpoint

from margin_kernels import AdversarialMarginLoss, MarginTask
from margin_kernels.losses.adversarial import GRADIENTS
from margin_kernels.replay import ReplayedModel, untouched

CLASSES = 4
batch = partial(batches.normal, n=30, classes=CLASSES)


class Busy(nn.Module):
    """Keeps, counts and draws in every way that a forward pass can."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = parametrizations.spectral_norm(nn.Linear(6, 8))
        self.second = spectral_norm_hook(nn.Linear(8, 8))
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, CLASSES)
        self.dropout = dropout
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(8))
        self.calls = 0
        self.number = torch.zeros(2)  # a tensor that is no buffer
        self.features: Tensor | None = None
        self.sizes: list[int] = []
        self.nested: dict[str, Any] = {"counts": Counter(), "last": deque(maxlen=2), "seen": {0}}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.passes += 1
        self.number += 1
        self.sizes.append(len(x))
        self.nested["counts"][len(x)] += 1
        self.nested["last"].append(self.calls)
        self.nested["seen"].add(self.calls)
        h = self.norm(self.second(self.first(x).tanh())).tanh()
        self.mean.data.mul_(0.9).add_(0.1 * h.detach().mean(0))  # which no version counter shows
        self.features = h
        self.latest_of_this_pass = len(x)  # an attribute that there was not before
        return self.head(F.dropout(h, self.dropout, self.training))


def record(model: Busy) -> dict[str, Any]:
    """All that a forward pass leaves behind, copied."""
    found: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    found |= {name: getattr(model, name).detach().clone() for name in ("number", "features")}
    found |= {name: copy.deepcopy(getattr(model, name)) for name in ("calls", "sizes", "nested", "latest_of_this_pass")}
    return found | {"weight": model.second.weight.detach().clone(), "modes": [m.training for m in model.modules()]}


def assert_same_state(model: Busy, expected: dict[str, Any]) -> None:
    for name, value in record(model).items():
        same = torch.equal(value, expected[name]) if isinstance(value, Tensor) else value == expected[name]
        assert same, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_the_model_looks_as_after_one_forward_pass(gradient, training):
    model = Busy().double().train(training)
    ordinary = copy.deepcopy(model)
    x, y = batch()
    for _ in range(2):
        torch.manual_seed(5)
        out = MarginTask(model, AdversarialMarginLoss(gradient=gradient))(x, y)
        drawn = torch.rand(3)
        torch.manual_seed(5)
        expected = ordinary(x)
        assert torch.equal(drawn, torch.rand(3))
        assert torch.equal(out["output"], expected) and out["iterations"].max() > 1
        assert_same_state(model, record(ordinary))
        out["loss"].backward()
        assert all(w.grad is not None and w.grad.isfinite().all() for w in model.parameters())
        model.zero_grad()


def test_objects_keep_their_identity():
    model = Busy().double()
    x, y = batch()
    model(x)
    before = model.passes, model.mean, model.sizes, model.nested, model.nested["counts"], model.number
    MarginTask(model, AdversarialMarginLoss())(x, y)
    after = model.passes, model.mean, model.sizes, model.nested, model.nested["counts"], model.number
    assert all(a is b for a, b in zip(after, before, strict=True)) and model.sizes == [30, 30]


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_distances_are_those_of_the_function_that_gave_the_logits(gradient):
    """Spectral norm in training mode changes its weight in every pass; all passes of a step see one weight."""

    def normalised() -> nn.Sequential:
        first, second = parametrizations.spectral_norm(nn.Linear(6, 8)), spectral_norm_hook(nn.Linear(8, 8))
        return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(8, CLASSES)).double()

    torch.manual_seed(0)
    model, fixed = normalised(), normalised().eval()
    x, y = batch()
    loss = AdversarialMarginLoss(weight=3.0, gradient=gradient, aggregation="avg", d=0.1)
    task = MarginTask(model, loss)
    out = task(x, y)
    fixed.load_state_dict(model.state_dict())  # the vectors u and v of the one pass
    expected = loss.statistics(fixed(x), y, fixed, x)
    torch.testing.assert_close(out["output"], fixed(x), rtol=1e-12, atol=0)
    torch.testing.assert_close(out["distance"], expected.distance, rtol=1e-10, atol=0)
    torch.testing.assert_close(out["loss"], expected.loss, rtol=1e-10, atol=0)
    ours = torch.autograd.grad(out["loss"], list(model.parameters()))
    theirs = torch.autograd.grad(expected.loss, list(fixed.parameters()))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-7, atol=1e-9 * float(other.abs().max()))


def test_what_the_model_keeps_belongs_to_the_graph_of_the_logits():
    """A term on kept features has the gradient that it has after an ordinary forward pass."""
    model = Busy(dropout=0.0).double()
    ordinary = copy.deepcopy(model)
    x, y = batch()
    MarginTask(model, AdversarialMarginLoss())(x, y)
    ordinary(x)
    for kept in (model, ordinary):
        kept.features.square().mean().backward()
    assert torch.equal(
        model.first.parametrizations.weight.original.grad, ordinary.first.parametrizations.weight.original.grad
    )


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def test_hooks_that_look_on_see_one_pass():
    model, (x, y) = network(), batch()
    kept: dict[str, Tensor] = {}
    log: list[tuple[str, int]] = []
    model[1].register_forward_hook(lambda module, args, output: kept.update(features=output))
    model[2].register_forward_pre_hook(lambda module, args: log.append(("pre", len(args[0]))))
    model[2].register_forward_hook(
        lambda module, args, kwargs, output: log.append(("kwargs", len(output))), with_kwargs=True
    )
    once: Any = model[3].register_forward_hook(
        lambda module, args, output: (log.append(("once", len(output))), once.remove())[0]
    )
    expected = MarginTask(network(), AdversarialMarginLoss())(x, y)
    for step in range(2):
        log.clear()
        out = MarginTask(model, AdversarialMarginLoss())(x, y)
        assert log == [("pre", 30), ("kwargs", 30), *([("once", 30)] if step == 0 else [])]
        assert torch.equal(kept["features"], model[1](model[0](x))) and kept["features"].requires_grad
        for name, value in expected.items():
            torch.testing.assert_close(out[name], value, rtol=1e-12, atol=1e-14)
    assert len(model[2]._forward_hooks) == 1 and not model[3]._forward_hooks


def test_backward_hooks_see_one_pass():
    model, (x, y) = network(), batch()
    seen: list[int] = []
    model[2].register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(len(grad_output[0])))
    out = MarginTask(model, AdversarialMarginLoss())(x, y)
    assert seen == []
    out["loss"].backward()
    assert seen == [30]


@pytest.mark.parametrize("convolution", [False, True])
def test_hooks_on_activations_see_the_backward_of_the_loss_alone(convolution):
    class Watching(nn.Module):
        def __init__(self, watch: bool) -> None:
            super().__init__()
            self.body, self.watch, self.seen = network(), watch, []
            self.unused = nn.Conv1d(1, 1, 1) if convolution else None  # candidates are then taken one at a time

        def forward(self, x: Tensor) -> Tensor:
            h = self.body[1](self.body[0](x))
            if self.watch and h.requires_grad:
                h.retain_grad()
                h.register_hook(lambda grad: self.seen.append(len(grad)))
                self.h = h
            return self.body[4](self.body[3](self.body[2](h)))

    x, y = batch()
    for gradient in GRADIENTS:
        model, plain = Watching(True), Watching(False)
        loss = AdversarialMarginLoss(aggregation="avg", gradient=gradient)
        out = MarginTask(model, loss)(x, y)
        h = model.h
        assert h.grad is None and model.seen == []
        h_grad = torch.autograd.grad(F.cross_entropy(out["output"], y), h, retain_graph=True)[0]
        h.grad = None
        out["loss"].backward()
        torch.testing.assert_close(h.grad, h_grad, rtol=1e-12, atol=0)  # the graph of the logits has its share alone
        MarginTask(plain, loss)(x, y)["loss"].backward()
        for own, other in zip(model.body.parameters(), plain.body.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("where", ["hook", "pre-hook", "in place"])
def test_hooks_that_change_the_function_take_part_in_every_pass(where):
    model, plain, (x, y) = network(), network(), batch()
    if where == "hook":
        model[1].register_forward_hook(lambda module, args, output: output * output)
    elif where == "pre-hook":
        model[2].register_forward_pre_hook(lambda module, args: (args[0] * args[0],))
    else:

        def square(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            output.mul_(output.detach().clone())

        model[1] = nn.Identity()
        model[0].register_forward_hook(square)

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = plain

        def forward(self, x: Tensor) -> Tensor:
            h = self.body[0](x)
            h = h * h.detach() if where == "in place" else self.body[1](h).square()
            return self.body[4](self.body[3](self.body[2](h)))

    loss = AdversarialMarginLoss(aggregation="avg", gradient="envelope")
    out, expected = MarginTask(model, loss)(x, y), MarginTask(Written(), loss)(x, y)
    torch.testing.assert_close(out["distance"], expected["distance"], rtol=1e-10, atol=0)
    torch.testing.assert_close(out["loss"], expected["loss"], rtol=1e-10, atol=0)


def test_a_hook_that_keeps_what_the_model_reads_later_takes_part_in_every_pass():
    """A skip connection through a hook: by its returns it only looks on, the graph shows that it does not."""

    class Skip(nn.Module):
        def __init__(self, through_hook: bool) -> None:
            super().__init__()
            self.body = network()
            self.store: dict[str, Tensor] = {}
            self.read = self.store.__getitem__
            if through_hook:
                store = {}
                self.read = store.__getitem__
                self.body[1].register_forward_hook(lambda module, args, output: store.update(skip=output))

        def forward(self, x: Tensor) -> Tensor:
            h = self.body[1](self.body[0](x))
            self.store["skip"] = h
            h = self.body[3](self.body[2](h))
            return self.body[4](h + 2 * self.read("skip"))

    x, y = batch()
    for gradient in GRADIENTS:
        loss = AdversarialMarginLoss(aggregation="avg", gradient=gradient)
        hooked, written = Skip(True), Skip(False)
        out, expected = MarginTask(hooked, loss)(x, y), MarginTask(written, loss)(x, y)
        torch.testing.assert_close(out["distance"], expected["distance"], rtol=1e-10, atol=0)
        ours = torch.autograd.grad(out["loss"], list(hooked.parameters()))
        for own, other in zip(ours, torch.autograd.grad(expected["loss"], list(written.parameters())), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)


def test_without_a_task_the_model_is_left_as_it_was_before():
    model = Busy().double()
    x, y = batch()
    logits = model(x)
    before, features = record(model), model.features
    AdversarialMarginLoss().statistics(logits, y, model, x)
    assert_same_state(model, before)
    assert model.features is features


def test_a_failing_pass_restores_the_model():
    model = Busy().double()
    x, _ = batch()
    replayed = ReplayedModel(model, x)
    replayed.first(x)
    before = record(model)
    with pytest.raises(RuntimeError), replayed.replaying():
        replayed(torch.zeros(3, 5, dtype=torch.float64))
    assert_same_state(model, before)
    with pytest.raises(KeyError), untouched(model):  # noqa: PT012  # what fails is the body of `untouched`
        model(x)
        raise KeyError
    assert_same_state(model, before)


def test_recomputation_in_the_search_leaves_no_trace():
    """Checkpointed layers run again in every backward pass of the search."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()
            self.register_buffer("passes", torch.zeros(()))
            self.calls = 0

        def part(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.passes += 1
            return self.body[:4](x)

        def forward(self, x: Tensor) -> Tensor:
            return self.body[4](checkpoint(self.part, x, use_reentrant=False))

    model, (x, y) = Checkpointed(), batch()
    for gradient in GRADIENTS:
        model.calls = 0
        model.passes.zero_()
        loss = AdversarialMarginLoss(aggregation="avg", gradient=gradient)
        out = MarginTask(model, loss)(x, y)
        expected = MarginTask(network(), loss)(x, y)
        assert model.calls == float(model.passes) == 1
        torch.testing.assert_close(out["loss"], expected["loss"], rtol=1e-12, atol=0)


def test_tensors_that_two_modules_share_stay_shared():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.writer, self.reader = network(), nn.Module(), nn.Module()
            shared = torch.zeros((), dtype=torch.float64)
            self.writer.register_buffer("shared", shared)
            self.reader.register_buffer("shared", shared)

        def forward(self, x: Tensor) -> Tensor:
            self.writer.shared += 1  # scales by one, two, ...
            return self.body(x) * self.reader.shared

    model, (x, y) = Pair(), batch()
    out = MarginTask(model, AdversarialMarginLoss(aggregation="avg"))(x, y)
    assert float(model.writer.shared) == 1 and model.writer.shared is model.reader.shared
    expected = MarginTask(network(), AdversarialMarginLoss(aggregation="avg"))(x, y)
    torch.testing.assert_close(out["loss"], expected["loss"], rtol=1e-12, atol=0)


def test_a_scripted_model_is_refused_in_training_mode():
    x, y = batch()
    model = torch.jit.trace(network().eval(), x)
    out = MarginTask(model, AdversarialMarginLoss(aggregation="avg"))(x, y)
    expected = MarginTask(network(), AdversarialMarginLoss(aggregation="avg"))(x, y)
    torch.testing.assert_close(out["loss"], expected["loss"], rtol=1e-10, atol=0)
    with pytest.raises(ValueError, match="model must not be a ScriptModule in training mode"):
        MarginTask(model.train(), AdversarialMarginLoss())(x, y)

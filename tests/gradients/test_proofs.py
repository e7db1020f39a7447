"""A proof of an earlier step is taken again for a graph that looks the same in all that the proof has read, and for no
other."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from support.gradients import is_split
from torch import Tensor, nn

from margin_kernels import LargeMarginLoss, MarginTask
from margin_kernels.gradients import autograd_graph, structure
from margin_kernels.gradients.proofs import MANY

pytestmark = pytest.mark.skipif(autograd_graph.refusal() is not None, reason="the compiled extension is missing")
N, D, CLASSES = 5, 5, 3  # as many samples as features, so that a dimension is told by nothing but its number
LOSS = LargeMarginLoss(5.0, competitors="soft", cross_entropy_weight=0.7)


class Between(nn.Module):
    """Two layers, and what is done to the activation between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, CLASSES)
        self.change = torch.tanh
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(torch.tanh(self.first(x))))


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, D, dtype=torch.float64, generator=generator)
    return x, torch.randint(CLASSES, (n,), generator=generator)


def assert_as_loop(task: MarginTask, x: Tensor, y: Tensor) -> bool:
    """That a step has the gradients of the loop; whether it took the split."""
    loop = MarginTask(copy.deepcopy(task.model), task.loss, task.layers, "loop", batch_dim=task.batch_dim)
    found, expected = task(x, y)["loss"], loop(x, y)["loss"]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    split = is_split(found)
    for loss, model in ((found, task.model), (expected, loop.model)):
        model.zero_grad()
        loss.backward()
    for actual, wanted in zip(task.model.parameters(), loop.model.parameters(), strict=True):
        assert (actual.grad is None) == (wanted.grad is None)
        if wanted.grad is not None:
            torch.testing.assert_close(actual.grad, wanted.grad, rtol=1e-9, atol=1e-12)
    return split


@pytest.fixture
def proved(monkeypatch) -> list[int]:
    """One entry for each time that a graph is read."""
    read: list[int] = []
    original = structure.Structure.__init__

    def spy(self, *args) -> None:
        read.append(1)
        original(self, *args)

    monkeypatch.setattr(structure.Structure, "__init__", spy)
    return read


def test_a_graph_is_read_once_for_all_steps_that_look_alike(proved) -> None:
    task = MarginTask(Between(), LOSS, ("first",))
    for n, graphs in ((5, 1), (5, 1), (4, 2), (5, 2), (4, 2)):
        assert is_split(task(*batch(n))["loss"]) and len(proved) == graphs


# Pairs of changes of the same operation: the first is row-local, the second goes over the samples.
PAIRS = {
    "softmax": (lambda h: h.softmax(1), lambda h: h.softmax(0)),
    "cumsum": (lambda h: h.cumsum(1), lambda h: h.cumsum(0)),
    "flip": (lambda h: h.flip(1), lambda h: h.flip(0)),
    "roll": (lambda h: h.roll(1, 1), lambda h: h.roll(1, 0)),
    "mean": (lambda h: h + h.mean(1, keepdim=True).expand(N, D), lambda h: h + h.mean(0).expand(N, D)),
    "negative": (lambda h: h.softmax(-1), lambda h: h.softmax(-2)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_dimension_that_changes_between_steps_is_seen(name) -> None:
    alone, together = PAIRS[name]
    task = MarginTask(Between(), LOSS, ("first",))
    taken = []
    for change in (alone, alone, together, alone, together):
        task.model.change = change
        taken.append(assert_as_loop(task, *batch()))
    assert taken == [True, True, False, True, False]


def test_a_batch_that_moves_to_another_dimension_is_followed() -> None:
    task = MarginTask(Between(), LOSS, ("first",))
    for one, other in ((0, 0), (0, 0), (0, 1), (0, 0), (1, 0)):
        task.model.change = lambda h, one=one, other=other: h.transpose(one, other) + 0
        assert assert_as_loop(task, *batch())


def test_batch_norm_that_begins_to_train_is_seen() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Linear(D, CLASSES)).double().eval()
    task = MarginTask(model, LOSS, ("0",))
    taken = []
    for training in (False, False, True, False):
        model[1].train(training)
        with pytest.warns(UserWarning, match="couples") if training else nullcontext():
            taken.append(is_split(task(*batch())["loss"]))
    assert taken == [True, True, False, True]


def test_parameters_that_freeze_and_layers_that_are_shared_are_seen() -> None:
    task = MarginTask(Between(), LOSS, ("first",))
    for weight, bias in ((True, True), (False, True), (True, False), (True, True)):
        task.model.last.weight.requires_grad_(weight)
        task.model.first.bias.requires_grad_(bias)
        assert assert_as_loop(task, *batch())
    task.model.change = lambda h: task.model.first(h)
    task = MarginTask(task.model, LOSS, ("first:0",))
    assert all(is_split(task(*batch())["loss"]) for _ in range(2))


def test_hooks_are_looked_for_in_every_step() -> None:
    task = MarginTask(Between(), LOSS, ("first",))
    seen: list[Tensor] = []
    assert assert_as_loop(task, *batch())
    task.model.change = lambda h: (h.register_hook(seen.append), torch.tanh(h))[1]
    plain = [True, False, True]
    for hooked in plain:
        task.model.change = torch.tanh if hooked else lambda h: (h.register_hook(seen.append), torch.tanh(h))[1]
        assert assert_as_loop(task, *batch()) == hooked
    assert len(seen) == 2  # one backward of each task


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return 2 * grad


class Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x + x.sum(0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad + grad.sum(0)


def test_functions_of_the_user_are_told_apart_by_their_names(monkeypatch) -> None:
    monkeypatch.setattr(structure, "_REGISTERED", {"ScaledBackward"})
    task = MarginTask(Between(), LOSS, ("first",), batch_dim=0)
    taken = []
    for function in (Scaled, Scaled, Summed, Scaled):
        task.model.change = function.apply
        taken.append(assert_as_loop(task, *batch()))
    assert taken == [True, True, False, True]
    structure._REGISTERED.clear()
    assert not assert_as_loop(task, *batch())


def test_an_input_with_a_graph_of_its_own_is_told_from_one_made_in_the_model() -> None:
    task = MarginTask(Between(), LOSS, ("first",))
    x, y = batch()
    scale = torch.full((), 1.5, dtype=torch.float64, requires_grad=True)
    grads = []
    for passes in ("auto", "loop", "auto"):
        task.passes = passes
        (grad,) = torch.autograd.grad(task(x * scale, y)["loss"], scale)
        grads.append(grad)
    assert torch.equal(grads[0], grads[2])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


def test_copies_and_files_hold_no_proofs_and_new_kinds_of_graphs_push_out_old_ones() -> None:
    task = MarginTask(nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, CLASSES)).double(), LOSS, ("0",))
    for n in range(2, MANY + 10):
        task(*batch(n))
    assert 0 < len(task._taps._proofs._found) <= MANY
    for other in (copy.deepcopy(task), pickle.loads(pickle.dumps(task))):
        assert len(other._taps._proofs._found) == 0
        assert assert_as_loop(other, *batch())

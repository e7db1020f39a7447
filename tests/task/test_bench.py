"""mk.bench: a table of what steps cost on the user's own model, which is left as it was."""

import copy
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import margin_kernels as mk
from margin_kernels import bench as bench_function
from margin_kernels.bench import CROSS_ENTROPY, OWN, STANDARD, BenchRow, BenchTable, _Batch, _Step
from margin_kernels.testing import flops

LAYERS = ("input", "0", "2")


def network(norm=False, dropout=0.0):
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(32)] if norm else []
    return nn.Sequential(
        nn.Linear(20, 32), *between, nn.ReLU(), nn.Linear(32, 24), nn.Dropout(dropout), nn.ReLU(), nn.Linear(24, 5)
    )


def batch(n=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 20, generator=generator), torch.randint(5, (n,), generator=generator)


@pytest.fixture(autouse=True)
def no_profile(monkeypatch):
    """Memory is measured for `table` alone: it takes most of the time of so small networks."""
    monkeypatch.setattr(sys.modules["margin_kernels.bench"], "peak_bytes", lambda run, device: 1)


@pytest.fixture(scope="module")
def table():
    losses = {"1-to-N": mk.OneToNLoss(), "DeepFool": mk.AdversarialMarginLoss(top_k=2)}
    return mk.bench(network(), *batch(), losses, layers=LAYERS, rounds=3)


def test_every_loss_has_a_row_with_its_figures(table):
    names = [CROSS_ENTROPY, *STANDARD, "1-to-N", "DeepFool"]
    assert [row.loss for row in table.rows] == names and not any(row.refused for row in table.rows)
    for row in table.rows:
        low, high = row.spread
        assert 0 < low <= row.ratio <= high and row.milliseconds > 0 and row.peak_bytes > 0 and row.memory > 0
        assert (row.floor is None) == (row.loss == "DeepFool")  # its iterations are not counted
    first = table.rows[0]
    assert first.ratio == first.memory == 1 and first.spread == (1, 1) and not first.reason
    strategies = {row.loss: row.strategy for row in table.rows}
    assert list(strategies.values()) == ["", "loop", "split", "split", "loop", "logits", "model"]
    assert "proves that samples do not interact" in table.rows[3].reason


def test_the_table_is_printed_and_made_a_frame(table):
    assert repr(table) == str(table)
    lines = str(table).splitlines()
    assert "batch 16" in lines[0] and "3 rounds" in lines[0] and lines[1].split()[0] == "loss"
    assert lines[2].startswith("cross-entropy") and " 1.00 " in lines[2]
    assert f"soft margin + cross-entropy: {table.rows[3].reason}" in lines
    frame = table.to_frame()
    assert list(frame.index) == [row.loss for row in table.rows]
    assert frame.loc["margin, split", "ratio"] == table.rows[2].ratio
    assert frame.loc["margin, split", "spread_low"] == table.rows[2].spread[0]


def test_a_refused_row_says_why():
    found = mk.bench(network(norm=True), *batch(), layers=LAYERS, rounds=1)
    (row,) = (row for row in found.rows if row.refused)
    assert row.loss == "margin, split" and "batch norm in training mode couples the samples" in row.refused
    assert row.ratio is row.floor is row.peak_bytes is None
    soft = found.rows[3]
    assert soft.strategy == "loop" and "not split: " in soft.reason and "batch norm" in soft.reason
    assert f"refused: {row.refused}" in str(found) and found.to_frame().loc[row.loss, "refused"] == row.refused


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_random_numbers_stay_as_they_are(training):
    model = network(norm=True, dropout=0.5).train(training)
    model[0].eval()
    x, y = batch()
    F.cross_entropy(model(x), y).backward()
    model[3].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict()), [copy.deepcopy(p.grad) for p in model.parameters()]
    flags = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    random, given = torch.get_rng_state(), (x.clone(), y.clone())
    found = mk.bench(model, x, y, layers=LAYERS, rounds=1)
    assert sum(row.refused is None for row in found.rows) >= 4
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in model.parameters()], before[1], rtol=0, atol=0)
    assert flags == ([module.training for module in model.modules()], [p.requires_grad for p in model.parameters()])
    assert torch.equal(x, given[0]) and torch.equal(y, given[1]) and not x.requires_grad


class Tokens(nn.Module):
    """A recurrent network on tokens: layers that return tuples, and an input without a gradient."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(11, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0][:, -1])


def test_layers_of_any_kind_have_floors():
    torch.manual_seed(0)
    x, y = torch.randint(11, (4, 5)), torch.tensor([0, 1, 2, 0])
    found = mk.bench(Tokens(), x, y, layers=("embed",), rounds=1)
    assert not found.notes and all(row.floor > 0 for row in found.rows if not row.refused)
    assert {"forward", "backward", "weights", "pass to taps", "tangent", "optimizer"} <= found.passes.keys()


class Keywords(nn.Module):
    """Two inputs by name, and the logits in an object."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, image, scale):
        return {"logits": self.net(image * scale), "hidden": image}


def test_a_model_with_keywords_and_an_object_is_measured():
    x, y = batch()
    given = {"image": x, "scale": torch.tensor(2)}
    found = mk.bench(Keywords(), given, y, layers=("input", "net.0"), rounds=1, losses={"1-to-N": mk.OneToNLoss()})
    assert not found.notes and all(row.floor > 0 for row in found.rows) and not any(row.refused for row in found.rows)
    with pytest.raises(ValueError, match="model must return its logits as one tensor"):
        mk.bench(Keywords(), given, y, rounds=1, call=lambda model, image, scale: (image, scale))


@pytest.mark.parametrize("kind", ["soft", "ignored", "one logit", "positions"])
def test_targets_of_every_kind_are_measured(kind):
    model, (x, y) = network(), batch()
    options = {"positions": 1} if kind == "positions" else {}
    if kind == "soft":
        y = 0.9 * F.one_hot(y, 5) + 0.02
    elif kind == "ignored":
        y[::3] = -100
    elif kind == "one logit":
        model[-1], y = nn.Linear(24, 1), (y > 2).long()
    else:
        x, y = x.view(4, 4, 20), y.view(4, 4)
    prepared = _Batch(model, x, y, None, {"layers": ("0",), **options})
    step, z = _Step(prepared, None), model(x)
    if kind == "one logit":
        expected = F.binary_cross_entropy_with_logits(z[:, 0], y.float())
    else:
        expected = F.cross_entropy(z.flatten(0, -2), y if kind == "soft" else y.flatten())
    torch.testing.assert_close(step.run(), expected.detach())
    found = mk.bench(model, x, y, layers=("0",), rounds=1, **options)
    assert all(row.ratio > 0 for row in found.rows[:2])
    assert bool(found.notes) == (kind in ("one logit", "positions"))


class Stateful(nn.Module):
    """A layer that cannot be called twice in a forward pass."""

    def __init__(self):
        super().__init__()
        self.weight, self.left = nn.Parameter(torch.eye(20)), 0

    def forward(self, x):
        if self.left == 0:
            raise RuntimeError("called without a ticket")
        self.left -= 1
        return x @ self.weight


def test_passes_that_cannot_be_timed_leave_a_note():
    model = nn.Sequential(Stateful(), nn.Linear(20, 5))
    model.register_forward_pre_hook(lambda module, args: setattr(module[0], "left", 1))
    found = mk.bench(model, *batch(), layers=("0",), rounds=1)
    assert "called without a ticket" in found.notes[0] and found.notes[0] in str(found)
    assert all(row.floor is None for row in found.rows) and found.rows[1].ratio > 0


def test_steps_do_the_work_of_their_floors():
    """By FLOPs: every pass is counted as often as the step makes it."""
    prepared = _Batch(network().double(), batch(64)[0].double(), batch(64)[1], None, {"layers": LAYERS})
    parts = {"forward": prepared.forward, **prepared.passes(prepared.task(mk.LargeMarginLoss(), "auto"))}
    work = {name: flops(call) for name, call in parts.items()} | {"optimizer": 0}
    assert work[OWN] <= work["pass to taps"]
    work["pass to taps"] = work[OWN]
    work["pass to taps and layers"] = max(work["pass to taps"], work["pass to outputs"])
    losses = [(mk.LargeMarginLoss(**options), passes) for options, passes in STANDARD.values()]
    losses += [(mk.LargeMarginLoss(top_k=3), "loop"), (mk.LargeMarginLoss(top_k=2), "split")]
    losses += [(mk.LargeMarginLoss(second_order=True), "split"), (mk.OneToNLoss(), "auto")]
    for loss, passes in [(None, "auto"), *losses]:
        step = _Step(prepared, loss, passes)
        floor = sum(count * work[part] for part, count in step.floor(True).items())
        assert step.refused is None and 0.9 < flops(step.run) / floor < 1.1, (loss, step.explained)


def test_running_statistics_take_a_forward_pass_more():
    prepared = _Batch(network(norm=True), *batch(), None, {"layers": LAYERS, "batchnorm": "frozen"})
    assert _Step(prepared, mk.LargeMarginLoss()).floor(True)["forward"] == 2


def test_where_no_tap_needs_a_pass_the_floor_is_that_of_cross_entropy():
    found = mk.bench(network(), *batch(), layers=("output",), rounds=1)
    loop = found.rows[1]
    assert "pass to taps" not in found.passes and loop.floor == pytest.approx(found.rows[0].floor)


def test_autocast_is_around_the_steps():
    seen = []
    model = network()
    model[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    found = mk.bench(model, *batch(), layers=("input",), rounds=1, autocast=torch.bfloat16)
    assert set(seen) == {torch.bfloat16} and "bfloat16 autocast" in found.about


def test_wrong_arguments_are_told_by_name():
    model, (x, y) = network(), batch()
    with pytest.raises(ValueError, match=r"layers has 'nowhere'"):
        mk.bench(model, x, y, layers=("nowhere",))
    with pytest.raises(ValueError, match="rounds must be >= 1, got 0"):
        mk.bench(model, x, y, rounds=0)
    with pytest.raises(ValueError, match="losses must have names of their own, got 'margin, split'"):
        mk.bench(model, x, y, {"margin, split": mk.LargeMarginLoss()})
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got function"):
        mk.bench(lambda x: x, x, y)
    with pytest.raises(TypeError, match="y must be a tensor, got list"):
        mk.bench(model, x, [1, 2])
    with pytest.raises(ValueError, match="finite loss, got nan"):
        mk.bench(model, x * math.nan, y, rounds=1)


def test_names_are_public():
    assert mk.bench is bench_function
    assert mk.BenchRow is BenchRow and mk.BenchTable is BenchTable

"""MarginMonitor against a literal loop: for each sample the gradient of its log-odds at each layer, in float64."""

import copy
import math
import os
import pickle
from argparse import Namespace
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from support import batches
from support.networks import tanh_net
from support.norms import dual_norm
from torch import Tensor, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from margin_kernels import LargeMarginLoss, MarginMonitor, MarginTask, monitor

CLASSES, LAYERS = 5, ("input", "0", "2", "4", "output")
batch = partial(batches.normal, n=7, shape=(1, 6, 6), classes=CLASSES)


def net() -> nn.Sequential:
    """With an in-place operation behind a tap, a view, and taps at the logits and the head's input."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, CLASSES)
    ).double()


def literal(x: Tensor, y: Tensor, p: float | str = 2, eps: float = 1e-6, model: nn.Sequential | None = None) -> Tensor:
    """d [N,L] at LAYERS, one sample at a time."""
    model, rows = (net() if model is None else model), []
    for n in range(len(x)):
        h = [x[n : n + 1].clone().requires_grad_()]
        for layer in model:
            h.append(layer(h[-1].clone()))
        z, label = h[-1][0], int(y[n])
        phi = z[label] - torch.logsumexp(torch.cat([z[:label], z[label + 1 :]]), 0)
        found = torch.autograd.grad(phi, [h[0], h[1], h[3], h[5], h[6]])
        rows.append([float(phi) / (eps + float(dual_norm(g, float(p)))) for g in found])
    return torch.tensor(rows, dtype=x.dtype)


def measured(step, model: nn.Module | None = None, layers=LAYERS, **options) -> MarginMonitor:
    """A monitor that has watched one step(model)."""
    model = net() if model is None else model
    with MarginMonitor(model, layers, **options) as monitor:
        step(model)
    return monitor


def close(found: Tensor, expected: Tensor, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, "inf"])
def test_distances_are_those_of_the_literal_loop_and_gradients_what_they_were(p) -> None:
    x, y = batch()
    model, plain = net(), net()
    monitor = measured(lambda m: F.cross_entropy(m(x), y).backward(), model, p=p, eps=1e-3)
    close(monitor.distances(), literal(x, y, p, 1e-3))
    F.cross_entropy(plain(x), y).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def focal(nll: Tensor) -> Tensor:
    """A function of the nll of each sample is a factor like others."""
    return ((1 - torch.exp(-nll)).square() * nll).mean()


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        lambda z, y: F.cross_entropy(z, y, torch.arange(1.0, CLASSES + 1).double()),
        lambda z, y: 4096 * F.cross_entropy(z, y),
        lambda z, y: (F.cross_entropy(z, y, reduction="none") * torch.arange(1.0, 8.0)).sum(),
        lambda z, y: F.nll_loss(F.log_softmax(z, 1), y),
        lambda z, y: F.cross_entropy(z + 3.0, y),
        lambda z, y: focal(F.cross_entropy(z, y, reduction="none")),
    ],
)
def test_the_factor_of_a_sample_is_read_off_its_gradient(loss) -> None:
    x, y = batch()
    monitor = measured(lambda m: loss(m(x), y).backward())
    close(monitor.distances(), literal(x, y))
    assert monitor.summary().count.tolist() == [7] * 5


def sharpness_aware(model: nn.Module, x: Tensor, y: Tensor) -> None:
    """A step of SAM without the update: both passes are measured, the second at the ascended weights."""
    loss(model, x, y).backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * weight.grad
    loss(model, x, y).backward()


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def two_batches(model: nn.Module, x: Tensor, y: Tensor) -> None:
    first, second = loss(model, x, y), loss(model, x.flip(0), y.flip(0))
    second.backward()
    first.backward()


# What a step does -> the samples that it measures, by the literal loop.
SCHEMES = {
    "create_graph": (lambda m, x, y: loss(m, x, y).backward(create_graph=True), lambda x, y: literal(x, y)),
    "penalty of the weights": (
        lambda m, x, y: (loss(m, x, y) + sum(w.square().sum() for w in m.parameters())).backward(),
        lambda x, y: literal(x, y),
    ),
    "functional_call": (
        lambda m, x, y: F.cross_entropy(
            torch.func.functional_call(m, {k: v.clone() for k, v in m.named_parameters()}, (x,)), y
        ).backward(),
        lambda x, y: literal(x, y),
    ),
    "shuffled logits": (
        lambda m, x, y: F.cross_entropy(m(x).flip(0), y.flip(0)).backward(),
        lambda x, y: literal(x, y),
    ),
    "two batches": (two_batches, lambda x, y: torch.cat([literal(x, y), literal(x.flip(0), y.flip(0))])),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_ways_to_train(name) -> None:
    step, expected = SCHEMES[name]
    x, y = batch()
    close(measured(lambda m: step(m, x, y)).distances(), expected(x, y))


def test_sharpness_aware_minimisation_measures_both_passes() -> None:
    x, y = batch()
    model, ascended = net(), net()
    loss(ascended, x, y).backward()
    with torch.no_grad():
        for weight in ascended.parameters():
            weight += 0.1 * weight.grad
    monitor = measured(lambda m: sharpness_aware(m, x, y), model)
    close(monitor.distances(), torch.cat([literal(x, y), literal(x, y, model=ascended)]))


def test_what_part_of_the_logits_shows() -> None:
    x, y = batch()
    half = measured(lambda m: F.cross_entropy(m(x)[:4], y[:4]).backward()).distances()
    close(half[:4], literal(x, y)[:4])
    assert half[4:].isnan().all()
    with pytest.raises(ValueError, match="the loss is not the cross-entropy of the logits"):
        measured(lambda m: F.cross_entropy(m(x)[:, :3], y.clamp(max=2)).backward()).summary()

    grads = measured(lambda m: torch.autograd.grad(loss(m, x, y), list(m.parameters())), layers=("0", "2"))
    close(grads.distances(), literal(x, y)[:, 1:3])
    with pytest.raises(ValueError, match=r"no gradient arrived at layer .* every=K"):
        measured(lambda m: torch.autograd.grad(loss(m, x, y), [m[5].weight])).summary()


def test_ignored_samples_are_unknown() -> None:
    x, y = batch()
    some = y.clone()
    some[[1, 4]] = -100
    monitor = measured(lambda m: F.cross_entropy(m(x), some).backward())
    kept = some != -100
    close(monitor.distances()[kept], literal(x, y)[kept])
    assert monitor.distances()[~kept].isnan().all() and monitor.summary().unknown.tolist() == [2] * 5


def test_accumulation_in_either_order() -> None:
    x, y = batch()

    def step(model: nn.Module) -> None:
        first, second = F.cross_entropy(model(x[:3]), y[:3]), F.cross_entropy(model(x[3:]), y[3:])
        second.backward()
        first.backward()

    close(measured(step).distances(), literal(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_a_scaled_loss(dtype) -> None:
    x, y = batch(dtype=torch.float32)

    def step(model: nn.Module) -> None:
        optimiser = torch.optim.SGD(model.parameters(), 0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        with torch.autocast("cpu", dtype):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimiser)

    found = measured(step, net().float()).distances()
    close(found.double(), literal(x.double(), y), rtol=0.05 if dtype == torch.bfloat16 else 0.01)


def test_a_frozen_stem_and_a_model_in_eval_mode() -> None:
    x, y = batch()
    model = net().eval()
    model[0].requires_grad_(False)
    close(measured(lambda m: F.cross_entropy(m(x), y).backward(), model).distances(), literal(x, y))
    assert model[0].weight.grad is None


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net[5](checkpoint(self.net[:5], x, use_reentrant=False))}


def test_checkpointing_and_a_model_that_returns_a_dict() -> None:
    x, y = batch()
    layers = ("input", "net.0", "net.2", "net.4", "output")
    found = measured(lambda m: F.cross_entropy(m(x)["logits"], y).backward(), Checkpointed(), layers)
    close(found.distances(), literal(x, y))


Scores = namedtuple("Scores", "scores other")


@dataclass
class Out:
    scores: Tensor
    other: Tensor | None = None


# What a model makes of its logits, the name under which they are, and how a training loop reads them.
RETURNS = {
    "object": (lambda z: Namespace(logits=z), None, lambda made: made.logits),
    "key": (lambda z: {"other": 2 * z, "scores": z}, "scores", lambda made: made["scores"]),
    "tuple": (lambda z: (2 * z, z), 1, lambda made: made[1]),
    "last of a list": (lambda z: [2 * z, z], -1, lambda made: made[1]),
    "dataclass": (lambda z: Out(z, 2 * z), "scores", lambda made: made.scores),
    "named tuple": (lambda z: Scores(z, 2 * z), "scores", lambda made: made.scores),
    "named tuple, by position": (lambda z: Scores(z, 2 * z), 0, lambda made: made[0]),
}


class Returns(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.net, self.make = net(), make

    def forward(self, x: Tensor):
        return self.make(self.net(x))


RETURNED = ("input", "net.0", "net.2", "net.4", "output")


@pytest.mark.parametrize("kind", RETURNS)
def test_output_names_the_logits(kind) -> None:
    x, y = batch()
    make, output, read = RETURNS[kind]
    model, expected = Returns(make), literal(x, y)
    step = measured(lambda m: F.cross_entropy(read(m(x)), y).backward(), model, RETURNED, output=output)
    close(step.distances(), expected)
    with MarginMonitor(model, RETURNED, every=1, output=output) as monitor:
        z = read(model(x))
        monitor.labels(y)
        F.cross_entropy(z, y, label_smoothing=0.1).backward()
    with torch.no_grad():
        close(monitor.distances(), expected)


@pytest.mark.parametrize("kind", [kind for kind in RETURNS if kind != "object"])
def test_output_names_the_logits_of_a_compiled_model(kind) -> None:
    x, y = batch()
    make, output, read = RETURNS[kind]
    model = Returns(make)
    with MarginMonitor(model, RETURNED, batch_dim=0, batch_size=7, output=output) as monitor:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        F.cross_entropy(read(compiled(x)), y).backward()
    close(monitor.distances(), literal(x, y))


def test_logits_that_are_not_found_are_asked_for() -> None:
    x, _ = batch()
    for make, output, message in (
        (lambda z: (z, z), None, r'got a tuple of 2: name them, MarginMonitor\(..., output="name"\)$'),
        (lambda z: {"scores": z}, "z", "output must name a part of what the model returns, a dict with 'scores', got"),
        (lambda z: z, 0, "output must be None for a model that returns a tensor, got 0"),
        (lambda z: z[:, :, None], None, r"to a monitor, got \[7, 5, 1\]: what .* positions=1\).evaluate\(x, y\)$"),
        (lambda z: z.sum(), None, r"model must return logits \[N,C\], got a single number"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(lambda m: m(x), Returns(make), "net.0", output=output)


def one_logit_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def literal_of_one(x: Tensor, y: Tensor, p: float = 2, eps: float = 1e-6) -> Tensor:
    """d [N,3] at the input, behind the activation and at the logit f: the log-odds of the label are f or -f."""
    model, rows = one_logit_net(), []
    for n in range(len(x)):
        h = [x[n : n + 1].clone().requires_grad_()]
        h.append(model[1](model[0](h[0])))
        h.append(model[2](h[1]))
        phi = h[2].sum() * (1 if y[n] == 1 else -1)
        rows.append([float(phi) / (eps + float(dual_norm(g, p))) for g in torch.autograd.grad(phi, h)])
    return torch.tensor(rows, dtype=x.dtype)


ONE = ("input", "1", "output")
LOSSES_OF_ONE = {
    "cross-entropy": lambda f, y: F.binary_cross_entropy_with_logits(f, y),
    "weighted sum": lambda f, y: F.binary_cross_entropy_with_logits(
        f, y, torch.arange(1.0, 8).double(), reduction="sum", pos_weight=torch.tensor(3.0)
    ),
    "smoothed": lambda f, y: F.binary_cross_entropy_with_logits(f, 0.9 * y + 0.05),
    "squared": lambda f, y: F.mse_loss(f, 2 * y - 1),
}


@pytest.mark.parametrize("name", LOSSES_OF_ONE)
@pytest.mark.parametrize("column", [False, True])
def test_one_logit_and_its_labels(name, column) -> None:
    """Any loss of the logit has the same direction."""
    x, y = batch(shape=(4,), classes=2)
    model = one_logit_net()
    expected = literal_of_one(x, y, 3, 1e-3)
    for labels in (y, 2 * y - 1, y.double(), y.bool(), 0.2 + 0.6 * y, *([y[:, None]] if column else [])):
        with MarginMonitor(nn.Sequential(*model, *([] if column else [nn.Flatten(0)])), ONE, 3, 1e-3) as monitor:
            f = monitor.model(x)
            monitor.labels(labels)
            LOSSES_OF_ONE[name](f.flatten(), y.double()).backward()
        close(monitor.distances(), expected)
        assert monitor.summary().count.tolist() == [7, 7, 7]


def test_one_logit_is_that_of_a_task_and_of_every() -> None:
    x, y = batch(shape=(4,), classes=2)
    model = one_logit_net()
    expected = MarginTask(model, LargeMarginLoss(2.0), ONE)(x, y)["distance"][:, 0]
    with MarginMonitor(model, ONE) as each, MarginMonitor(model, ONE, every=1) as every:
        f = model(x)
        each.labels(y)
        every.labels(y)
        F.binary_cross_entropy_with_logits(f[:, 0], y.double()).backward()
    close(each.distances(), expected)
    close(every.distances(), expected)


def test_one_logit_without_labels_ignored_and_confident() -> None:
    x, y = batch(shape=(4,), classes=2)
    model = one_logit_net()
    monitor = measured(lambda m: F.binary_cross_entropy_with_logits(m(x)[:, 0], y.double()).backward(), model, ONE)
    with pytest.raises(ValueError, match=r"one logit, or of two classes, .* monitor.labels\(y\) between forward and"):
        monitor.summary()
    some = y.clone()
    some[2] = -100
    with MarginMonitor(model, ONE) as monitor:
        f = model(x)
        for wrong, message in ((y[:3], r"target must be \[N\] = \[7\]"), (y + 2, "target must be 0 or 1")):
            with pytest.raises(ValueError, match=message):
                monitor.labels(wrong)
        monitor.labels(some)
        F.binary_cross_entropy_with_logits(f[:, 0], y.double()).backward()
    found, rest = monitor.distances(), [0, 1, 3, 4, 5, 6]
    assert found[2].isnan().all()
    close(found[rest], literal_of_one(x, y)[rest])
    # What rounding leaves of 1 - p_y does not matter, where anything is left.
    model, x = one_logit_net(), 40 * x
    with torch.no_grad():
        model[2].weight *= -20
    y = (model(x)[:, 0] > 0).long()
    exact = MarginTask(model, LargeMarginLoss(2.0), ONE)(x, y)["distance"][:, 0]
    model = model.float()
    with MarginMonitor(model, ONE) as monitor:
        f = model(x.float())
        monitor.labels(y)
        F.binary_cross_entropy_with_logits(f[:, 0], y.float()).backward()
    found = monitor.distances().double()
    assert f.abs().max() > 14 and 0 < found[:, 1].isnan().sum() < 7
    torch.testing.assert_close(found, torch.where(found.isnan(), math.nan, exact), rtol=1e-3, atol=1e-5, equal_nan=True)


def test_one_logit_of_a_compiled_model_is_refused() -> None:
    x, _ = batch(shape=(4,), classes=2)
    model = one_logit_net()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    refused = pytest.raises(Exception, match="a compiled model must have more than two classes")
    with MarginMonitor(model, "1", batch_dim=0, batch_size=7), refused:
        compiled(x)


class Reused(nn.Module):
    """One activation for two layers, and a recurrent layer with the time first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.lstm = nn.Linear(6, 6), nn.Tanh(), nn.LSTM(6, 6)
        self.head = nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x)).unsqueeze(0).expand(len(x), -1, -1)  # as long as the batch
        return self.head(self.act(self.lstm(h)[0][-1]))


class Sequences(nn.Module):
    """[N,T,3] -> logits, by a layer that sees [T,N,*] or [N,T,*]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.last, self.time_major = nn.Linear(3, 4), nn.Linear(4, CLASSES), False
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.layer(x.transpose(0, 1))).transpose(0, 1) if self.time_major else self.layer(x).tanh()
        return self.last(h.cumsum(1)[:, -2])


def test_a_batch_that_moves_to_another_dimension_is_followed() -> None:
    """As many samples as times, so that no shape tells."""
    x, y = batch(shape=(7, 3))
    model = Sequences()
    h = (x @ model.layer.weight.mT + model.layer.bias).detach().requires_grad_()
    z = model.last(h.tanh().cumsum(1)[:, -2])
    own = z.gather(1, y[:, None])[:, 0]
    phi = own - torch.logsumexp(z.scatter(1, y[:, None], -math.inf), 1)
    truth = phi.detach() / (1e-6 + torch.autograd.grad(phi.sum(), h)[0].flatten(1).norm(dim=1))
    with MarginMonitor(model, ("layer",)) as monitor:
        for model.time_major in (False, True, True, False, True):
            F.cross_entropy(model(x), y).backward()
    close(monitor.distances()[:, 0], truth.repeat(5))


@pytest.mark.parametrize("coupling", [lambda h: h - h.mean(0), lambda h: h * h.amax(0)], ids=["mean", "maximum"])
def test_samples_that_are_coupled_are_warned_of_once(coupling) -> None:
    x, y = batch(shape=(6,))
    model = nn.Sequential(nn.Linear(6, 5), Changing(coupling), nn.Linear(5, CLASSES)).double()
    with MarginMonitor(model, ("0",)), pytest.warns(UserWarning, match="the samples of a batch are coupled") as told:
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
    assert len(told) == 1 and "Backward0" in str(told[0].message) and told[0].filename == __file__


def test_calls_of_a_reused_module_and_time_major_layers() -> None:
    x, y = batch(shape=(6,))
    found = measured(lambda m: F.cross_entropy(m(x), y).backward(), Reused(), ("act:1", "lstm[0]")).distances()
    model = Reused()
    for n in range(len(x)):
        h = model.act(model.first(x[n : n + 1])).unsqueeze(0).expand(len(x), -1, -1)
        a = model.lstm(h)[0]
        b = model.act(a[-1])
        z, label = model.head(b)[0], int(y[n])
        phi = z[label] - torch.logsumexp(torch.cat([z[:label], z[label + 1 :]]), 0)
        gradients = torch.autograd.grad(phi, [b, a])
        expected = [float(phi.detach()) / (1e-6 + float(g.norm())) for g in gradients]
        close(found[n], torch.tensor(expected, dtype=torch.float64))
    with pytest.raises(ValueError, match='called 2 times in one forward pass: name one of "act:0", "act:1"'):
        measured(lambda m: m(x), Reused(), ("act",))


def test_confident_samples_are_right_or_unknown_in_float32() -> None:
    """torch computes the label's entry as p_y - 1, which is rounded from gaps of about 10 on and 0 from 18 on."""
    x, _ = batch(n=200)
    truth, found = [], []
    for scale in (1.0, 3.0, 10.0, 30.0, 100.0):
        model = net()
        with torch.no_grad():
            model[5].weight *= scale
            model[5].bias *= scale
        confident = model(x).argmax(1)
        truth.append(literal(x, confident, model=model))
        monitor = measured(lambda m, c=confident: F.cross_entropy(m(x.float()), c).backward(), model.float())
        found.append(monitor.distances().double())
    truth_, found_ = torch.cat(truth), torch.cat(found)
    known = found_.isfinite()
    assert known.all(1).sum() > 300 and (~known).all(1).sum() > 100
    assert ((found_ - truth_).abs() / truth_)[known].max() < 0.02


LOSSES = {
    "label smoothing": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "mixup": lambda z, y: 0.7 * F.cross_entropy(z, y) + 0.3 * F.cross_entropy(z, y.roll(1)),
    "hinge": lambda z, y: F.multi_margin_loss(z, y),
    "a term on the logits": lambda z, y: F.cross_entropy(z, y) + 0.1 * z.square().mean(),
    "temperature": lambda z, y: F.cross_entropy(z / 3, y),
    "squares": lambda z, y: F.mse_loss(z, F.one_hot(y, CLASSES).double()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_another_loss_is_refused(name) -> None:
    x, y = batch()
    with pytest.raises(ValueError, match=r"the loss is not the cross-entropy of the logits.*every=K"):
        measured(lambda m: LOSSES[name](m(x), y).backward()).summary()


CHANGES = {
    "temperature": lambda z: z.div_(3),
    "a shift for each class": lambda z: z.add_(torch.linspace(0, 3, CLASSES)),
    "mask": lambda z: z.masked_fill_(torch.arange(CLASSES) == 1, -10.0),
}


@pytest.mark.parametrize("first", [True, False], ids=["tried", "not tried"])
@pytest.mark.parametrize("name", CHANGES)
def test_logits_that_are_changed_in_place_are_refused(name, first) -> None:
    """The gradient is that of a cross-entropy, but of other logits: a temperature would be a factor of the margins."""
    x, y = batch()
    y = torch.where(y == 1, 0, y)

    def step(model: nn.Module) -> None:
        for _ in range(0 if first else 2):
            F.cross_entropy(model(x), y).backward()
        monitored = model(x)
        F.cross_entropy(CHANGES[name](monitored), y).backward()

    with pytest.raises(ValueError, match="the logits were changed in place after the model returned them"):
        measured(step).summary()
    inside = nn.Sequential(*net()[:5], nn.Sequential(net()[5], Changing(CHANGES[name])))
    found = measured(lambda m: F.cross_entropy(m(x), y).backward(), inside, ("0",))
    outside = nn.Sequential(*net(), Changing(lambda z: CHANGES[name](z.clone())))
    close(found.distances(), measured(lambda m: F.cross_entropy(m(x), y).backward(), outside, ("0",)).distances())
    assert found.summary().count.tolist() == [len(y)]


class Changing(nn.Module):
    def __init__(self, change) -> None:
        super().__init__()
        self.change = change

    def forward(self, z: Tensor) -> Tensor:
        return self.change(z)


def test_every_measures_by_passes_of_its_own() -> None:
    x, y = batch()
    model = net()
    with MarginMonitor(model, LAYERS, every=2, samples=3) as monitor:
        for _ in range(5):
            z = model(x)
            monitor.labels(y)
            F.cross_entropy(z, y, label_smoothing=0.1).backward()
        close(monitor.distances(), literal(x[:3], y[:3]).repeat(2, 1))
        monitor.reset()
        F.cross_entropy(model(x), y, label_smoothing=0.1).backward()
        with pytest.raises(ValueError, match=r"every=K must be told the labels: monitor.labels\(y\)"):
            monitor.summary()


class Penalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.net[:5](x)
        return self.net[5](self.hidden)


def test_a_term_that_reaches_a_layer_around_the_logits_is_refused() -> None:
    x, y = batch()

    def step(model: nn.Module) -> None:
        (F.cross_entropy(model(x), y) + 0.1 * model.hidden.square().sum()).backward()

    with pytest.raises(ValueError, match=r"a term of the loss reaches layer 'net.4' by another way than the logits"):
        measured(step, Penalised(), ("net.4",)).summary()


def test_the_summary_is_that_of_its_numbers() -> None:
    x, y = batch(n=50)
    monitor = measured(lambda m: F.cross_entropy(m(x), y).backward())
    d = literal(x, y)
    found = monitor.summary(bins=8, quantiles=(0.1, 0.5))
    assert found.layers == LAYERS and found.count.tolist() == [50] * 5 and found.unknown.tolist() == [0] * 5
    close(found.mean, d.mean(0))
    close(found.right, (d > 0).double().mean(0))
    close(found.quantiles, torch.quantile(d, torch.tensor([0.1, 0.5], dtype=torch.float64), dim=0).T)
    for layer in range(5):
        edges = torch.linspace(float(d[:, layer].min()), float(d[:, layer].max()), 9, dtype=torch.float64)
        close(found.edges[layer], edges)
        assert int(found.histogram[layer].sum()) == 50
        inside = (d[:, layer] >= edges[2]) & (d[:, layer] < edges[3])
        assert found.histogram[layer, 2] == inside.sum()
    frame = found.frame()
    assert list(frame.index) == list(LAYERS)
    assert frame.loc["2", "q50"] == pytest.approx(float(torch.quantile(d[:, 2], 0.5)))
    assert frame.loc["input", "mean"] == pytest.approx(float(d[:, 0].mean()))


def test_reset_pause_and_detach() -> None:
    x, y = batch()
    model = net()
    with MarginMonitor(model, LAYERS) as monitor:
        F.cross_entropy(model(x), y).backward()
        with monitor.paused():
            F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            model(x)
        model(x)  # without a backward pass
        assert len(monitor.distances()) == 7
        monitor.reset()
        F.cross_entropy(model(x[:2]), y[:2]).backward()
        assert len(monitor.distances()) == 2
    F.cross_entropy(model(x), y).backward()
    assert len(monitor.distances()) == 2
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(twin(x), model(x))


def test_copies_of_a_watched_model_are_not_watched() -> None:
    x, y = batch()
    model = net()
    with MarginMonitor(model, LAYERS) as monitor:
        loss = F.cross_entropy(model(x), y)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            F.cross_entropy(twin(x), y).backward()
            (hook, *_) = twin._forward_hooks.values()
            assert hook.__self__ is not monitor and len(hook.__self__.distances()) == 0
        assert torch.equal(copy.deepcopy(monitor).distances(), torch.empty(0, len(LAYERS)))
        loss.backward()
    close(monitor.distances(), literal(x, y))
    kept = pickle.loads(pickle.dumps(monitor))
    close(kept.distances(), literal(x, y))
    with kept:
        F.cross_entropy(kept.model(x), y).backward()
    close(kept.distances(), literal(x, y).repeat(2, 1))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_models_in_one_graph(compiler) -> None:
    x, y = batch(dtype=torch.float32)
    model = net().float()
    with MarginMonitor(model, LAYERS, batch_dim=0, batch_size=8) as monitor:
        compiled = torch.compile(model, fullgraph=True, backend=compiler)
        for n in (7, 7, 4):
            F.cross_entropy(compiled(x[:n]), y[:n]).backward()
    d = literal(x.double(), y)
    torch.testing.assert_close(monitor.distances().double(), torch.cat([d, d, d[:4]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [2, CLASSES])
def test_given_labels_show_smoothing_and_negative_weights(classes) -> None:
    """A smoothed label pushes away from the label where the network is sure of it."""
    two = tanh_net(6, 5, 3, classes)
    with torch.no_grad():
        two[4].weight *= 8
    x, _ = batch(n=40, shape=(6,), classes=classes)
    y = two(x).argmax(1)
    signs = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)
    for loss in (
        lambda z: F.cross_entropy(z, y, label_smoothing=0.1),
        lambda z: (F.cross_entropy(z, y, reduction="none") * signs).mean(),
    ):
        with MarginMonitor(two, ("1",)) as monitor:
            z = two(x)
            monitor.labels(y)
            loss(z).backward()
        with pytest.raises(ValueError, match="the loss is not the cross-entropy of the logits"):
            monitor.summary()


def test_given_labels_ignore_and_are_checked() -> None:
    x, y = batch()
    some = y.clone()
    some[2] = -100
    model = net()
    with MarginMonitor(model, LAYERS) as monitor:
        z = model(x)
        monitor.labels(some)
        F.cross_entropy(z, some).backward()
        found = monitor.distances()
        assert found[2].isnan().all()
        close(found[[0, 1, 3, 4, 5, 6]], literal(x, y)[[0, 1, 3, 4, 5, 6]])
        model(x)
        with pytest.raises(ValueError, match="target must hold 7 integers, got"):
            monitor.labels(y[:3])
    with pytest.raises(ValueError, match="labels must follow a forward pass"):
        MarginMonitor(model, LAYERS).labels(y)


def test_wrong_uses_are_named() -> None:
    x, y = batch()
    with pytest.raises(ValueError, match="which names no module of Sequential"):
        MarginMonitor(net(), "conv")
    with pytest.raises(ValueError, match="eps must be finite and > 0, got 0"):
        MarginMonitor(net(), "0", eps=0)
    with pytest.raises(ValueError, match="model must not be compiled yet"):
        MarginMonitor(torch.compile(net()), "0")
    with pytest.raises(ValueError, match="batch_dim must name the batch dimension of '0'"):
        MarginMonitor(net(), "0", batch_size=4).attach()
    with pytest.raises(ValueError, match="no backward pass was seen"):
        measured(lambda m: m(x)).summary()
    with pytest.raises(ValueError, match="model must return logits"):
        measured(lambda m: m(x), net()[:2], "0")
    with pytest.raises(ValueError, match="all_processes must be False"):
        measured(lambda m: F.cross_entropy(m(x), y).backward()).summary(all_processes=True)
    with pytest.raises(ValueError, match="the monitor is attached already"):
        MarginMonitor(net(), "0").attach().attach()


def watch_one_of_two(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    x, y = batch()
    part = slice(0, 3) if rank == 0 else slice(3, 7)
    found = {}
    for name in ("ddp", "static graph", "fsdp", "fsdp, resharded"):
        model = net()
        # FSDP's own functions are in the graph, of which nothing is proven.
        monitor = MarginMonitor(model, LAYERS, batch_dim=0 if "fsdp" in name else None)
        if name.startswith("fsdp"):
            mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
            for layer in (model[0], model[3]):
                fully_shard(layer, mesh=mesh, reshard_after_forward="resharded" in name)
            wrapped = fully_shard(model, mesh=mesh, reshard_after_forward="resharded" in name)
        else:
            wrapped = DistributedDataParallel(model, static_graph=name == "static graph")
        with monitor:
            for _ in range(3):
                F.cross_entropy(wrapped(x[part]), y[part]).backward()
        whole = monitor.summary(all_processes=True)
        found[name] = monitor.distances(), whole.count, whole.mean
    torch.save(found, f"{file}.{rank}")
    torch.distributed.barrier()
    os._exit(0)  # as in test_task.py: gloo's threads must not meet an interpreter that is closing


def test_two_processes(tmp_path) -> None:
    file = str(tmp_path / "store")
    multiprocessing.spawn(watch_one_of_two, (file,), nprocs=2)
    x, y = batch()
    d = literal(x, y)
    for rank, part in enumerate((slice(0, 3), slice(3, 7))):
        for name, (distances, count, mean) in torch.load(f"{file}.{rank}").items():
            close(distances, d[part].repeat(3, 1))
            assert count.tolist() == [21] * 5, name
            close(mean, d.mean(0))


def test_small_batches_and_numbers() -> None:
    x, y = batch(n=1)
    close(measured(lambda m: F.cross_entropy(m(x), y).backward()).distances(), literal(x, y))
    x, y = batch(n=0)
    monitor = measured(lambda m: F.cross_entropy(m(x), y, reduction="sum").backward())
    assert monitor.distances().shape == (0, len(LAYERS))
    x, y = batch()
    x[2] = math.nan
    found = measured(lambda m: F.cross_entropy(m(x), y).backward()).distances()
    assert found[2].isnan().all()
    two = tanh_net(6, 5, 3, 2)
    x, y = batch(shape=(6,), classes=2)
    with MarginMonitor(two, ("1",)) as monitor:
        F.cross_entropy(two(x), y).backward()
        with pytest.raises(ValueError, match="one logit, or of two classes, do not show the labels"):
            monitor.summary()
        monitor.reset()
        z = two(x)
        monitor.labels(y)
        F.cross_entropy(z, y).backward()
    h = two[:2](x).detach().requires_grad_()
    z = two[2:](h)
    phi = z.gather(1, y[:, None])[:, 0] - z.gather(1, 1 - y[:, None])[:, 0]
    (g,) = torch.autograd.grad(phi.sum(), h)
    close(monitor.distances()[:, 0], phi.detach() / (1e-6 + g.norm(dim=1)))


def _logit_gradients(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients [N,C] of logits [N,C] under some loss, these logits, and labels where they must be given."""
    torch.manual_seed(11)
    n, classes = 24, 2 if kind == "two classes" else 7
    z, y = 4 * torch.randn(n, classes, dtype=torch.float64), torch.randint(classes, (n,))
    rows = torch.arange(n)
    if kind == "masked rivals":
        z[rows[::3], (y[::3] + 1) % classes] = -math.inf
    elif kind == "masked labels":
        z[rows[:4], y[:4]] = -math.inf
    elif kind == "no rival":
        z[2:4] = -math.inf
        z[rows[2:4], y[2:4]] = 1.0
    elif kind == "confident":
        z[rows, y] += 12
    p = torch.softmax(z, 1)
    g = (p - F.one_hot(y, classes)) / n
    given = None
    if kind == "two classes":
        given = y.clone()
        given[[0, 5]] = torch.tensor([-100, 2])
    elif kind == "ignored":
        g[5:9] = 0
    elif kind == "smoothed":
        g = (p - 0.9 * F.one_hot(y, classes) - 0.1 / classes) / n
    elif kind == "downhill":
        g = -g
    elif kind == "nan":
        z[3, 1], g[3] = math.nan, math.nan
        g[6, 2] = math.nan
    elif kind == "inf":
        z[3, 1] = math.inf
    return g.to(dtype), z.to(dtype), given


KINDS = ("plain", "masked rivals", "masked labels", "no rival", "confident", "two classes", "ignored", "smoothed")


@pytest.mark.skipif(monitor.EXTENSION is None, reason="the compiled extension is missing")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*KINDS, "nan", "inf", "downhill"])
@pytest.mark.parametrize("p", [2.0, math.inf])
def test_compiled_code_reads_a_gradient_as_the_formula_does(monkeypatch, kind, dtype, p) -> None:
    g, z, given = _logit_gradients(kind, dtype)
    found = monitor._read(g, z, p, given)
    norms, least = (
        [found[:, monitor.NORM], 2 * found[:, monitor.NORM]],
        [0.0, float(found[:, monitor.NORM].nanmedian())],
    )
    margins, others = monitor._margins(found, norms, least, 1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(monitor, "EXTENSION", None)
        expected = monitor._read(g, z, p, given)
        expected_margins, expected_others = monitor._margins(found, norms, least, 1e-3)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    usable = expected[:, monitor.KNOWS] > 0
    assert torch.equal(found[:, monitor.KNOWS], expected[:, monitor.KNOWS])
    assert torch.equal(found[:, monitor.OTHER_LOSS], expected[:, monitor.OTHER_LOSS])
    torch.testing.assert_close(found[usable], expected[usable], rtol=tolerance, atol=1e-30)
    torch.testing.assert_close(margins, expected_margins, rtol=tolerance, atol=0.0, equal_nan=True)
    assert int(others) == int(expected_others)
    if kind == "plain":
        assert usable.all() and torch.equal(found[:, monitor.KNOWS], torch.ones_like(found[:, 0]))
    if kind == "smoothed" or (kind == "downhill" and dtype in (torch.float32, torch.float64)):
        assert int(others) == len(g)

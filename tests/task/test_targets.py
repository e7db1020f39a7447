"""Targets of every kind, for every loss, against literal loops in fp64."""

import itertools
from typing import Any

import pytest
import torch
from support.gradients import gradients as grads_of
from torch import Tensor, nn
from torch.nn import functional as F

from margin_kernels import AdversarialMarginLoss, LargeMarginLoss, MarginSensitivityLoss, MarginTask, OneToNLoss
from margin_kernels.task import batch as task_batch

CLASSES, N = 4, 6
SMOOTHING = 0.2
WEIGHTS = [0.5, 2.0, 1.0, 0.25]


class Net(nn.Module):
    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.body, self.act, self.head = nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.body(x)))


def net(outputs: int = CLASSES) -> Net:
    torch.manual_seed(0)
    return Net(outputs).double()


def inputs() -> Tensor:
    return torch.randn(N, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


HARD = torch.tensor([0, 3, 1, 1, 2, 0])


def soft() -> Tensor:
    share = torch.tensor([0.9, 0.7, 0.55, 1.0, 0.8, 0.6], dtype=torch.float64)[:, None]
    return share * F.one_hot(HARD, CLASSES) + (1 - share) * F.one_hot(HARD.roll(1), CLASSES)


def sample_weights() -> Tensor:
    return torch.tensor([1.0, 0.5, 0.0, 2.0, 1.5, 1.0], dtype=torch.float64)


def margin_of(model: Net, x: Tensor, label: int, layers: tuple[str, ...], gamma: float, soft_rival: bool, order: int):
    """The margin term of one sample, sum over layers / L, by one gradient per layer."""
    x = x[None].clone().requires_grad_()
    hidden = model.act(model.body(x))
    z = model.head(hidden)[0]
    others = [j for j in range(len(z)) if j != label]
    gap = torch.logsumexp(z[others], 0) - z[label] if soft_rival else max(z[j] for j in others) - z[label]
    total = torch.zeros((), dtype=torch.float64)
    for layer in layers:
        at = {"input": x, "act": hidden}[layer]
        (g,) = torch.autograd.grad(gap, at, create_graph=True)
        norm = g.norm() if order == 2 else g.norm().detach()
        total = total + F.relu(gamma + gap / (1e-6 + norm))
    return total / len(layers)


def literal(
    model: Net,
    x: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    soft_rival: bool = False,
    order: int = 1,
    class_weight: list[float] | None = None,
    smoothing: float = 0.0,
    ignore: int = -100,
    weight: Tensor | None = None,
    layers: tuple[str, ...] = ("input", "act"),
) -> Tensor:
    """margin + cross-entropy, sample by sample."""
    total = torch.zeros((), dtype=torch.float64)
    count = torch.zeros((), dtype=torch.float64)
    w = torch.ones(CLASSES, dtype=torch.float64) if class_weight is None else torch.tensor(class_weight).double()
    for n in range(len(x)):
        own = 1.0 if weight is None else weight[n]
        hard = not target.is_floating_point()
        if hard and int(target[n]) == ignore:
            continue
        label = int(target[n]) if hard else int(target[n].argmax())
        log_p = torch.log_softmax(model(x[n : n + 1])[0], 0)
        entropy = -(w[label] * log_p[label]) if hard else -(w * target[n] * log_p).sum()
        entropy = (1 - smoothing) * entropy - smoothing * (w * log_p).sum() / CLASSES
        factor = w[label] if hard else (w * target[n]).sum()
        total = total + own * (factor * margin_of(model, x[n], label, layers, gamma, soft_rival, order) + entropy)
        count = count + own * (w[label] if hard else 1.0)
    return total / count


def assert_same(model: nn.Module, loss: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for found, wanted in zip(grads_of(loss, model), grads_of(expected, model), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


KINDS: dict[str, dict[str, Any]] = {
    "hard": {},
    "ignored": {"ignore_index": 1},
    "weighed": {"class_weight": WEIGHTS},
    "smoothed": {"label_smoothing": SMOOTHING},
    "all": {"ignore_index": 0, "class_weight": WEIGHTS, "label_smoothing": SMOOTHING},
}


def options_of(kind: str) -> dict:
    given = KINDS[kind]
    return {
        "ignore": given.get("ignore_index", -100),
        "class_weight": given.get("class_weight"),
        "smoothing": given.get("label_smoothing", 0.0),
    }


@pytest.mark.parametrize("weight", [None, sample_weights()], ids=["", "sample_weight"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [HARD, soft()], ids=["hard", "soft"])
@pytest.mark.parametrize("rival", ["hard", "soft"])
@pytest.mark.parametrize("order", [1, 2])
def test_large_margin_is_the_literal_loop(order, rival, target, kind, weight) -> None:
    model, x = net(), inputs()
    loss = LargeMarginLoss(2.0, competitors=rival, second_order=order == 2, cross_entropy_weight=1.0, **KINDS[kind])
    task = MarginTask(model, loss, ("input", "act"))
    given = options_of(kind) | ({"ignore": -100} if target.is_floating_point() else {})
    expected = literal(model, x, target, soft_rival=rival == "soft", order=order, weight=weight, **given)
    assert_same(model, task(x, target=target, sample_weight=weight)["loss"], expected)


@pytest.mark.parametrize("target", [HARD, soft()], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", ["hard", "all"])
def test_compiled_steps_are_those_of_eager(kind, target) -> None:
    model, x = net(), inputs()
    loss = LargeMarginLoss(2.0, competitors="soft", cross_entropy_weight=1.0, **KINDS[kind])
    eager, compiled = MarginTask(model, loss, ("input", "act")), MarginTask(model, loss, ("input", "act"))
    compiled.compile(backend="aot_eager")
    weight = sample_weights()
    expected = eager(x, target, sample_weight=weight)
    found = compiled(x, target, sample_weight=weight)
    assert_same(model, found["loss"], expected["loss"])
    assert torch.equal(found["target"], expected["target"])


def test_the_split_is_taken_for_class_indices_and_refused_for_a_mixture_beside_cross_entropy() -> None:
    model, x = net(), inputs()
    loss = LargeMarginLoss(2.0, competitors="soft", cross_entropy_weight=1.0, class_weight=WEIGHTS)
    task = MarginTask(model, loss, ("input", "act"))
    assert task.explain(x, HARD).strategy == "split"
    found = task.explain(x, soft())
    assert found.strategy == "loop"
    assert "a soft target leads the cross-entropy away" in found.refused["split"]
    with pytest.raises(ValueError, match="a soft target leads the cross-entropy away"):
        MarginTask(model, loss, ("input", "act"), passes="split")(x, soft())
    # Without a cross-entropy the margin of the largest class is all there is.
    alone = MarginTask(model, LargeMarginLoss(2.0), ("input",), passes="split")
    label = MarginTask(model, LargeMarginLoss(2.0), ("input",), passes="loop")
    assert_same(model, alone(x, soft())["loss"], label(x, soft().argmax(1))["loss"])


def test_a_soft_target_of_one_class_is_that_class_and_weights_are_as_in_torch() -> None:
    z = torch.randn(N, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    for target in (HARD, soft()):
        for smoothing in (0.0, SMOOTHING):
            loss = AdversarialMarginLoss(weight=0.0, class_weight=WEIGHTS, label_smoothing=smoothing)
            found = loss.logit_statistics(z, target)["loss"]
            expected = F.cross_entropy(z, target, torch.tensor(WEIGHTS).double(), label_smoothing=smoothing)
            torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    loss = LargeMarginLoss(2.0, cross_entropy_weight=1.0)
    task = MarginTask(net(), loss, ("input",))
    one_hot = F.one_hot(HARD, CLASSES).double()
    assert_same(task.model, task(inputs(), one_hot)["loss"], task(inputs(), HARD)["loss"])


def test_what_is_small_beside_one_stays_in_a_soft_target() -> None:
    z = torch.tensor([[30.0, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 0.0]])
    loss = LargeMarginLoss(1.0, cross_entropy_weight=1.0, margin_weight=0.0)
    (grad,) = torch.autograd.grad(loss(z, target, [z]), z)
    rest = 2 * torch.tensor(-30.0).exp()
    torch.testing.assert_close(grad, torch.stack([-rest, rest / 2, rest / 2])[None], rtol=1e-5, atol=0)


@pytest.mark.parametrize("weight", [None, sample_weights()], ids=["", "sample_weight"])
@pytest.mark.parametrize("target", [HARD, soft()], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", ["hard", "weighed", "all"])
def test_sensitivity_is_the_literal_loop(kind, target, weight) -> None:
    model, x = net(), inputs()
    loss = MarginSensitivityLoss(0.3, classification="cross_entropy", top_k=1, **KINDS[kind])
    given = options_of(kind) | ({"ignore": -100} if target.is_floating_point() else {})
    w = torch.ones(CLASSES).double() if given["class_weight"] is None else torch.tensor(WEIGHTS).double()
    total, count = torch.zeros(()).double(), torch.zeros(()).double()
    for n in range(N):
        hard, own = not target.is_floating_point(), 1.0 if weight is None else weight[n]
        if hard and int(target[n]) == given["ignore"]:
            continue
        label = int(target[n]) if hard else int(target[n].argmax())
        point = x[n : n + 1].clone().requires_grad_()
        z = model(point)[0]
        rival = max((j for j in range(CLASSES) if j != label), key=lambda j, z=z: float(z[j]))
        (g,) = torch.autograd.grad(z[label] - z[rival], point, create_graph=True)
        log_p = torch.log_softmax(z, 0)
        entropy = -(w[label] * log_p[label]) if hard else -(w * target[n] * log_p).sum()
        smoothing = given["smoothing"]
        entropy = (1 - smoothing) * entropy - smoothing * (w * log_p).sum() / CLASSES
        factor = w[label] if hard else (w * target[n]).sum()
        total = total + own * (entropy + factor * 0.3 * g.norm() ** 2)
        count = count + own * (w[label] if hard else 1.0)
    assert_same(model, MarginTask(model, loss)(x, target, sample_weight=weight)["loss"], total / count)


@pytest.mark.parametrize("aggregation", ["avg", "min"])
@pytest.mark.parametrize("target", [HARD, soft()], ids=["hard", "soft"])
def test_adversarial_margins_weigh_and_ignore_samples(target, aggregation) -> None:
    """The loss of a part of the batch is that of the whole with the others ignored, or of weight 0."""
    model, x, weight = net(), inputs(), sample_weights()
    loss = AdversarialMarginLoss(2.0, aggregation="avg", class_weight=WEIGHTS, label_smoothing=SMOOTHING)
    single = AdversarialMarginLoss(2.0, aggregation="avg", label_smoothing=0.0)
    out = MarginTask(model, loss)(x, target, sample_weight=weight)
    w = torch.tensor(WEIGHTS).double()
    total, count = torch.zeros(()).double(), torch.zeros(()).double()
    for n in range(N):
        hard = not target.is_floating_point()
        label = target[n : n + 1] if hard else target[n : n + 1].argmax(1)
        alone = MarginTask(model, single)(x[n : n + 1], label)["loss"]
        z = model(x[n : n + 1])
        term = alone - F.cross_entropy(z, label)
        given = target[n : n + 1]
        entropy = F.cross_entropy(z, given, w, label_smoothing=SMOOTHING, reduction="sum")
        factor = w[label] if hard else (w * given).sum()
        total = total + weight[n] * (entropy + factor.squeeze() * term)
        count = count + weight[n] * (w[label].squeeze() if hard else 1.0)
    assert_same(model, out["loss"], total / count)
    kept = torch.tensor([0, 1, 4, 5])
    ignored = HARD.clone()
    ignored[[2, 3]] = -100
    part = MarginTask(model, AdversarialMarginLoss(2.0, aggregation=aggregation))
    assert_same(model, part(x, ignored)["loss"], part(x[kept], HARD[kept])["loss"])


@pytest.mark.parametrize("cross_entropy", [False, True])
@pytest.mark.parametrize("bound", ["symmetric", "positive"])
def test_one_to_n_leaves_ignored_samples_out_of_the_negatives(bound, cross_entropy) -> None:
    model, x = net(), inputs()
    kept = torch.tensor([0, 1, 4, 5])
    ignored = HARD.clone()
    ignored[[2, 3]] = -1
    how = {"bound": bound, "cross_entropy": cross_entropy, "class_weight": WEIGHTS}
    weight = sample_weights()
    found = MarginTask(model, OneToNLoss(ignore_index=-1, **how))(x, ignored, sample_weight=weight)
    per_sample = OneToNLoss(bound=bound, cross_entropy=cross_entropy, reduction="none")(model(x[kept]), HARD[kept])
    factor = weight[kept] * torch.tensor(WEIGHTS).double()[HARD[kept]]
    assert_same(model, found["loss"], (per_sample * factor).sum() / factor.sum())
    assert found["valid"].tolist() == [True, True, False, False, True, True]


LOSSES_OF_ONE_LOGIT = {
    "large margin": LargeMarginLoss(1.0, cross_entropy_weight=1.0),
    "soft": LargeMarginLoss(1.0, competitors="soft", cross_entropy_weight=1.0),
    "second order": LargeMarginLoss(1.0, second_order=True, cross_entropy_weight=1.0),
    "sensitivity": MarginSensitivityLoss(0.2, top_k=1),
    "adversarial": AdversarialMarginLoss(2.0, aggregation="avg", top_k=1),
}


@pytest.mark.parametrize("passes", ["auto", "loop"])
@pytest.mark.parametrize("shape", [(N,), (N, 1)], ids=str)
@pytest.mark.parametrize("kind", LOSSES_OF_ONE_LOGIT)
def test_one_logit_is_two_classes(kind, shape, passes) -> None:
    loss, x = LOSSES_OF_ONE_LOGIT[kind], inputs()
    one = net(1)
    two = nn.Sequential(one, _WithZero()).double()
    labels = (HARD > 0).long()
    squeezed = _Shaped(one, shape)
    how = {} if loss.needs == "model" else {"passes": passes}
    expected = MarginTask(two, loss, **how)(x, labels)["loss"]
    wanted = grads_of(expected, one)
    for target in (labels, labels.bool(), 2 * labels - 1, labels.double(), (2 * labels - 1).double(), labels[:, None]):
        given = target if target.dim() == 1 or shape == (N, 1) else target[:, 0]
        found = MarginTask(squeezed, loss, **how)(x, given)["loss"]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(grads_of(found, one), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_distance_of_one_logit_is_that_to_its_zero_and_its_cross_entropy_is_binary() -> None:
    one, x = net(1), inputs()
    out = MarginTask(one, LargeMarginLoss(1.0, cross_entropy_weight=1.0), ("input", "act", "output"))(x, HARD > 0)
    point = x.clone().requires_grad_()
    f = one(point)[:, 0]
    (g,) = torch.autograd.grad(f.sum(), point)
    sign = torch.where(HARD > 0, 1.0, -1.0).double()
    torch.testing.assert_close(out["distance"][:, 0, 0], sign * f.detach() / (1e-6 + g.norm(dim=1)))
    torch.testing.assert_close(out["distance"][:, 0, 2], sign * f.detach() / (1e-6 + 1))
    torch.testing.assert_close(
        out["nll"], F.binary_cross_entropy_with_logits(f, (HARD > 0).double(), reduction="none").detach()
    )
    assert out["target"].tolist() == (HARD > 0).long().tolist()
    share = torch.tensor([0.1, 0.9, 0.5, 1.0, 0.0, 0.3]).double()
    mixed = MarginTask(one, LargeMarginLoss(1.0, cross_entropy_weight=1.0, margin_weight=0.0), ("input",))(x, share)
    torch.testing.assert_close(mixed["loss"], F.binary_cross_entropy_with_logits(f, share))


class _WithZero(nn.Module):
    def forward(self, f: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(f), f], 1)


class _Shaped(nn.Module):
    def __init__(self, one: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.one, self.ends = one, len(shape)

    def forward(self, x: Tensor) -> Tensor:
        f = self.one(x)
        return f if self.ends == 2 else f[:, 0]


class Dense(nn.Module):
    """Logits at T positions, [N,C,T], [N,C,2,T/2] or [N,T,C], in which positions of a sample interact."""

    def __init__(self, shape: str, outputs: int = CLASSES, positions: int = 4) -> None:
        super().__init__()
        self.shape, self.positions = shape, positions
        self.body, self.act = nn.Linear(5, 6), nn.Tanh()
        self.head = nn.Linear(6, positions * outputs)

    def forward(self, x: Tensor) -> Tensor:
        z = self.head(self.act(self.body(x))).unflatten(1, (self.positions, -1))
        if self.shape == "NTC":
            return z
        z = z.transpose(1, 2)
        return z if self.shape == "NCT" else z.unflatten(2, (2, -1))


def dense_target(outputs: int = CLASSES) -> Tensor:
    y = torch.randint(outputs, (N, 4), generator=torch.Generator().manual_seed(3))
    y[0, 1] = y[2, 3] = y[2, 0] = -100
    return y


class _At(nn.Module):
    """The logits of one position."""

    def __init__(self, dense: Dense, t: int) -> None:
        super().__init__()
        self.dense, self.t = dense, t

    def forward(self, x: Tensor) -> Tensor:
        made = self.dense(x)
        return made[:, self.t] if self.dense.shape == "NTC" else made.flatten(2)[:, :, self.t]


def per_position(model: Dense, loss: LargeMarginLoss | MarginSensitivityLoss, x: Tensor, y: Tensor, layers) -> Tensor:
    """The sum over positions of the losses of ordinary networks, over the number of targets that count."""
    total = torch.zeros((), dtype=torch.float64)
    loss.reduction = "sum"
    for t in range(y.shape[1]):
        names = [name if name == "input" else f"dense.{name}" for name in layers]
        total = total + MarginTask(_At(model, t), loss, names)(x, y[:, t])["loss"]
    loss.reduction = "mean"
    return total / (y != -100).sum()


DENSE_LOSSES = {
    "large margin": lambda: LargeMarginLoss(1.0, top_k=2, cross_entropy_weight=1.0),
    "soft, second order": lambda: LargeMarginLoss(
        1.0, competitors="soft", second_order=True, cross_entropy_weight=0.5, label_smoothing=SMOOTHING
    ),
    "sensitivity": lambda: MarginSensitivityLoss(0.1, top_k=2),
}


@pytest.mark.parametrize("shape", ["NCT", "NCHW", "NTC"])
@pytest.mark.parametrize("kind", DENSE_LOSSES)
def test_predictions_at_positions_are_those_of_single_networks(kind, shape) -> None:
    torch.manual_seed(0)
    model, x, y = Dense(shape, positions=4).double(), inputs(), dense_target()
    loss = DENSE_LOSSES[kind]()
    layers = ("input",) if kind == "sensitivity" else ("input", "act")
    given = y.unflatten(1, (2, -1)) if shape == "NCHW" else y
    how = {"class_dim": -1 if shape == "NTC" else 1}  # 4 positions, 4 classes
    out = MarginTask(model, loss, layers, positions=4, **how)(x, given)
    assert_same(model, out["loss"], per_position(model, loss, x, y, layers))
    assert out["nll"].shape == given.shape
    assert out["position"].tolist() == [[0, 1, 2, 3]] * N
    assert out["norm"].shape[:2] == (N, 4)


@pytest.mark.parametrize("shape", ["NCT", "NCHW", "NTC"])
@pytest.mark.parametrize("kind", DENSE_LOSSES)
def test_an_empty_batch_of_predictions_at_positions_has_an_empty_mean(kind, shape) -> None:
    model, loss = Dense(shape, positions=4).double(), DENSE_LOSSES[kind]()
    y = dense_target()[:0]
    given = y.unflatten(1, (2, -1)) if shape == "NCHW" else y
    task = MarginTask(model, loss, ("input",), positions=2, class_dim=-1 if shape == "NTC" else 1)
    assert task(inputs()[:0], given)["loss"].isnan()
    loss.reduction = "sum"
    out = task(inputs()[:0], given)
    assert out["loss"] == 0 and out["nll"].shape == given.shape
    gradients = torch.autograd.grad(out["loss"], list(model.parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", DENSE_LOSSES)
def test_the_mean_over_all_draws_is_the_loss_of_all_positions(kind, monkeypatch) -> None:
    torch.manual_seed(0)
    model, x = Dense("NTC", positions=4).double(), inputs()[:2]
    y = dense_target()[[0, 4]]
    loss = DENSE_LOSSES[kind]()
    layers = ("input",) if kind == "sensitivity" else ("input", "act")
    whole = MarginTask(model, loss, layers, positions=4, class_dim=-1)(x, y)["loss"]
    valid = [[t for t in range(4) if y[n, t] != -100] for n in range(2)]
    found = []
    for drawn in itertools.product(*valid):
        index = torch.tensor(drawn)[:, None]
        counts = torch.tensor([len(row) for row in valid])[:, None]
        monkeypatch.setattr(task_batch, "draw", lambda counted, p, index=index, counts=counts: (index, counts.double()))
        found.append(MarginTask(model, loss, layers, positions=1, class_dim=-1)(x, y)["loss"])
    assert_same(model, torch.stack(found).mean(), whole)


def test_draws_take_what_counts_without_repetition() -> None:
    counted = torch.tensor([[True, False, True, True], [False, False, True, False]])
    seen = set()
    for _ in range(50):
        index, stands_for = task_batch.draw(counted, 2)
        assert set(index[0].tolist()) <= {0, 2, 3} and len(set(index[0].tolist())) == 2
        assert stands_for[0].tolist() == [1.5, 1.5]
        assert index[1, 0] == 2 and stands_for[1].tolist() == [1.0, 0.0]
        seen.add(tuple(index[0].tolist()))
    assert len(seen) == 6


@pytest.mark.parametrize("shape", ["NCHW", "NTC"])
def test_one_to_n_takes_every_position_as_a_sample(shape) -> None:
    torch.manual_seed(0)
    model, x = Dense(shape, positions=4).double(), inputs()
    y = torch.randint(CLASSES, (N, 4), generator=torch.Generator().manual_seed(3))
    given = y.unflatten(1, (2, -1)) if shape == "NCHW" else y
    out = MarginTask(model, OneToNLoss(), class_dim=-1 if shape == "NTC" else 1)(x, given)
    rows = torch.cat([_At(model, t)(x) for t in range(4)])
    assert_same(model, out["loss"], OneToNLoss()(rows, y.t().flatten()))
    assert out["per_sample"].shape == given.shape


def test_one_logit_at_every_pixel() -> None:
    torch.manual_seed(0)
    model, x = Dense("NCHW", 1, positions=4).double(), inputs()
    y = torch.randint(2, (N, 2, 2), generator=torch.Generator().manual_seed(3))
    loss = LargeMarginLoss(1.0, cross_entropy_weight=1.0)
    out = MarginTask(model, loss, ("input",), positions=4)(x, y)
    loss.reduction = "sum"
    total = sum(MarginTask(_At(model, t), loss, ("input",))(x, y.flatten(1)[:, t])["loss"] for t in range(4))
    assert_same(model, out["loss"], total / (4 * N))
    loss.reduction = "mean"
    task = MarginTask(model, loss, ("input",), positions=4)
    for target in (y.double(), y[:, None], y[:, None].double()):
        torch.testing.assert_close(task(x, target)["loss"], out["loss"], rtol=1e-12, atol=1e-12)


def test_where_the_classes_are_is_asked_where_shapes_leave_it_open() -> None:
    torch.manual_seed(0)
    loss = LargeMarginLoss(1.0)
    square, x = Dense("NTC", positions=4).double(), inputs()
    y = torch.randint(CLASSES, (N, 4))
    with pytest.raises(ValueError, match=r"class_dim must say which dimension of the logits holds the classes"):
        MarginTask(square, loss, ("input",), positions=1)(x, y)
    task = MarginTask(square, loss, ("input",), positions=1)
    square.positions, square.head = 3, nn.Linear(6, 3 * CLASSES).double()
    task(x, y[:, :3])  # which shows it
    square.positions, square.head = 4, nn.Linear(6, 4 * CLASSES).double()
    expected = MarginTask(square, loss, ("input",), positions=4, class_dim=-1)(x, y)["nll"]
    assert torch.equal(task(x, y)["nll"], expected)
    with pytest.raises(ValueError, match=r"positions must be given for logits \[6, 4, 4\], 4 predictions a sample"):
        MarginTask(square, loss, ("input",), class_dim=-1)(x, y)
    with pytest.raises(ValueError, match=r"positions must be in \[1, 4\]"):
        MarginTask(square, loss, ("input",), class_dim=-1, positions=5)(x, y)
    with pytest.raises(
        ValueError, match=r"logits and target must have shapes .* got logits \[6, 4, 4\] and target \[6, 3\]"
    ):
        MarginTask(square, loss, ("input",), positions=1)(x, y[:, :3])
    with pytest.raises(ValueError, match="each position of a sample has passes of its own"):
        MarginTask(square, loss, ("input",), class_dim=-1, positions=1, passes="split")(x, y)
    with pytest.raises(ValueError, match='reduction must be "mean" or "sum" for predictions at positions'):
        MarginTask(square, LargeMarginLoss(1.0, reduction="none"), ("input",), class_dim=-1, positions=1)(x, y)
    with pytest.raises(ValueError, match="AdversarialMarginLoss takes one prediction a sample"):
        MarginTask(square, AdversarialMarginLoss(), class_dim=-1)(x, y)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.full((N, CLASSES), 0.5), r"target must hold probabilities >= 0 with sum 1 in each row"),
        (torch.eye(N, CLASSES) * -1 + 0.5, r"target must hold probabilities >= 0 with sum 1 in each row"),
        (torch.ones(N), r"target must be int64 classes \[N\], or soft targets of the shape \[6, 4\] of the logits"),
        (torch.ones(N, CLASSES + 1), r"target must be int64 classes \[N\], or soft targets of the shape \[6, 4\]"),
        (HARD.int(), "target must be int64 class indices, got int32"),
        (HARD.char(), "target must be int64 class indices, got int8"),
        (HARD.byte(), "target must be int64 class indices, got uint8"),
        (HARD[:, None], r"target must have shape \[6\] to match logits"),
    ],
    ids=["sum", "negative", "a number a sample", "classes", "int32", "int8", "uint8", "column"],
)
@pytest.mark.parametrize(
    "loss",
    [
        LargeMarginLoss(cross_entropy_weight=1.0),
        LargeMarginLoss(class_weight=[1.0, 2.0, 3.0, 4.0]),
        AdversarialMarginLoss(),
    ],
    ids=repr,
)
def test_targets_that_mean_nothing_are_refused(loss, target, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        MarginTask(net(), loss)(inputs(), target)


def test_options_that_a_target_rules_out_are_refused() -> None:
    model, x = net(), inputs()
    with pytest.raises(ValueError, match='classification must be "cross_entropy" for soft targets'):
        MarginTask(model, MarginSensitivityLoss())(x, soft())
    with pytest.raises(ValueError, match='auxiliary must be "cross_entropy" for soft targets'):
        MarginTask(model, LargeMarginLoss(cross_entropy_weight=1.0, auxiliary="pairwise"))(x, soft())
    with pytest.raises(ValueError, match=r"target must be int64 classes \[N\] for OneToNLoss"):
        MarginTask(model, OneToNLoss())(x, soft())
    with pytest.raises(ValueError, match=r"logits must be \[N,C\] with C >= 2 for OneToNLoss"):
        MarginTask(net(1), OneToNLoss())(x, HARD > 0)
    with pytest.raises(ValueError, match='label_smoothing must be 0 with classification="hinge"'):
        MarginSensitivityLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"class_weight must hold one weight for each of 4 classes, got 2"):
        MarginTask(model, MarginSensitivityLoss(class_weight=[1.0, 2.0]))(x, HARD)
    for weight, message in (
        (torch.ones(N + 1), r"sample_weight must have shape \[6\] to match logits, got \[7\]"),
        (-torch.ones(N), "sample_weight must be finite and >= 0, got -1"),
        ([1.0] * N, "sample_weight must be a tensor"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            MarginTask(model, LargeMarginLoss())(x, HARD, sample_weight=weight)
    with pytest.raises(ValueError, match="for one logit, got a batch with -1 and others"):
        MarginTask(net(1), LargeMarginLoss())(x, torch.tensor([0, 1, -1, 0, 1, 1]))


def test_floating_targets_of_one_logit_are_soft_whatever_their_values() -> None:
    """Their mean divides by the number of samples, as for soft targets, also where all are 0 or 1, and compiled."""
    model, x = net(1), inputs()
    labels = torch.tensor([0, 1, 1, 0, 1, 1])
    loss = LargeMarginLoss(1.0, cross_entropy_weight=1.0, class_weight=[0.5, 2.0])
    whole = MarginTask(model, loss)(x, labels.double())["loss"]
    nearly = MarginTask(model, loss)(x, torch.where(labels == 0, 1e-12, 1.0).double())["loss"]
    torch.testing.assert_close(whole, nearly, rtol=1e-9, atol=1e-9)
    two = nn.Sequential(model, _WithZero())
    soft_two = F.one_hot(labels, 2).double()
    assert_same(model, whole, MarginTask(two, loss)(x, soft_two)["loss"])
    compiled = MarginTask(model, loss)
    compiled.compile(backend="aot_eager")
    assert_same(model, compiled(x, labels.double())["loss"], whole)


def test_the_hinge_of_a_soft_target_of_two_classes_is_the_mean_of_both() -> None:
    model, x = net(1), inputs()
    share = torch.tensor([0.1, 0.9, 0.5, 1.0, 0.0, 0.3]).double()
    out = MarginTask(model, MarginSensitivityLoss(0.0))(x, share)
    f = model(x)[:, 0]
    assert_same(model, out["loss"], (share * F.relu(1 - f) + (1 - share) * F.relu(1 + f)).mean())


@pytest.mark.parametrize("ignored", [-100, 255, -1])
def test_one_logit_leaves_ignored_samples_out(ignored) -> None:
    model, x = net(1), inputs()
    y = torch.tensor([0, 1, ignored, 0, ignored, 1])
    kept = y != ignored
    loss = LargeMarginLoss(1.0, cross_entropy_weight=1.0, ignore_index=ignored)
    assert_same(model, MarginTask(model, loss)(x, y)["loss"], MarginTask(model, loss)(x[kept], y[kept])["loss"])


def test_one_logit_at_every_pixel_takes_the_targets_of_binary_cross_entropy_at_once() -> None:
    torch.manual_seed(0)
    model, x = Dense("NCHW", 1, positions=4).double(), inputs()
    y = torch.randint(2, (N, 1, 2, 2)).double()
    loss = LargeMarginLoss(1.0, cross_entropy_weight=1.0, margin_weight=0.0)
    found = MarginTask(model, loss, ("input",), positions=1)(x, y)["loss"]
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(model(x), y))


@pytest.mark.parametrize("loss", [LargeMarginLoss, MarginSensitivityLoss, AdversarialMarginLoss])
def test_weights_and_smoothing_keep_their_precision_under_autocast(loss) -> None:
    torch.manual_seed(0)
    model = Net().float()
    x, weights = inputs().float(), [0.123, 1.7, 0.31, 2.9]
    how = {"classification": "cross_entropy", "top_k": 1} if loss is MarginSensitivityLoss else {}
    how |= {"cross_entropy_weight": 1.0} if loss is LargeMarginLoss else {}
    task = MarginTask(model, loss(class_weight=weights, label_smoothing=0.1, **how))
    for target in (HARD, soft().float()):
        with torch.autocast("cpu", torch.bfloat16):
            z = model(x)
            found = task(x, target)
        expected = F.cross_entropy(z.float(), target, torch.tensor(weights), label_smoothing=0.1)
        with torch.no_grad():
            statistics = task.loss.logit_statistics(z, target)
        torch.testing.assert_close(statistics["loss"], expected, rtol=1e-4, atol=1e-5)
        assert torch.isfinite(found["loss"])


def test_targets_and_weights_that_want_a_gradient_are_refused() -> None:
    model, x = net(), inputs()
    with pytest.raises(ValueError, match="target must not require grad"):
        MarginTask(model, LargeMarginLoss(cross_entropy_weight=1.0))(x, soft().requires_grad_())
    with pytest.raises(ValueError, match="sample_weight must not require grad"):
        MarginTask(model, LargeMarginLoss())(x, HARD, sample_weight=torch.ones(N, requires_grad=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_ignored_rows_hold_does_not_matter(value) -> None:
    y = HARD.clone()
    y[2] = -100
    z = torch.randn(N, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for loss in (
        LargeMarginLoss(cross_entropy_weight=1.0, auxiliary="pairwise"),
        LargeMarginLoss(cross_entropy_weight=1.0, label_smoothing=0.1),
        MarginSensitivityLoss(0.0),
    ):
        bad = z.clone()
        bad[2] = value
        found = []
        for logits in (z, bad):
            leaf = logits.clone().requires_grad_()
            (grad,) = torch.autograd.grad(loss(leaf, y, [leaf]), leaf)
            found.append(grad)
        assert torch.equal(*found)

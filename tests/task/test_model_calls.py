"""Models with any arguments and outputs: what a task makes of them is what a plain model x -> logits gives."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.gradients import gradients
from torch import Tensor, nn
from torch.nn import functional as F

from margin_kernels import (
    AdversarialMarginLoss,
    LargeMarginLoss,
    MarginMonitor,
    MarginSensitivityLoss,
    MarginTask,
    OneToNLoss,
    deepfool,
    suggest_gamma,
)
from margin_kernels.outputs import logits_in

CLASSES, N = 4, 6
LOSSES = {
    "first order": lambda: LargeMarginLoss(2.0),
    "soft": lambda: LargeMarginLoss(2.0, competitors="soft", cross_entropy_weight=1.0),
    "second order": lambda: LargeMarginLoss(2.0, second_order=True, cross_entropy_weight=1.0),
    "sensitivity": lambda: MarginSensitivityLoss(0.2),
    "adversarial": lambda: AdversarialMarginLoss(2.0, aggregation="avg"),
    "one to n": lambda: OneToNLoss(),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, 5, dtype=torch.float64, generator=generator), torch.randint(
        CLASSES, (N,), generator=generator
    )


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor


Pair = namedtuple("Pair", "scores hidden")
RETURNS = {
    "object": (lambda z: Output(z, z), None),
    "dict": (lambda z: {"logits": z, "loss": z.sum()}, None),
    "key": (lambda z: {"a": z * 2, "b": z}, "b"),
    "attribute": (lambda z: Output(z * 2, z), "hidden"),
    "tuple": (lambda z: (z * 2, z), 1),
    "last": (lambda z: [z * 2, z], -1),
    "named tuple": (lambda z: Pair(z, z * 2), "scores"),
}


class Returns(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.make = net(), RETURNS[kind][0]

    def forward(self, x: Tensor) -> object:
        return self.make(self.net(x))


def assert_same(task: MarginTask, found: dict, expected: dict, model: nn.Module, net_: nn.Module) -> None:
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(found["loss"], model), gradients(expected["loss"], net_), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert torch.equal(found["output"], expected["output"])


@pytest.mark.parametrize("returns", RETURNS)
@pytest.mark.parametrize("kind", LOSSES)
def test_logits_are_found_in_what_a_model_returns(kind, returns) -> None:
    plain, model, (x, y) = net(), Returns(returns), batch()
    task = MarginTask(model, LOSSES[kind](), output=RETURNS[returns][1])
    assert_same(task, task(x, y), MarginTask(plain, LOSSES[kind]())(x, y), model, plain)
    with torch.no_grad():
        assert torch.equal(task(x, y)["output"], plain(x))
    assert torch.equal(task(x)["output"], plain(x))


@pytest.mark.parametrize("returns", ["object", "tuple"])
@pytest.mark.parametrize("kind", LOSSES)
def test_compiled_as_well(kind, returns) -> None:
    plain, model, (x, y) = net(), Returns(returns), batch()
    task = MarginTask(model, LOSSES[kind](), output=RETURNS[returns][1])
    task.compile(backend="aot_eager")
    assert_same(task, task(x, y), MarginTask(plain, LOSSES[kind]())(x, y), model, plain)


@pytest.mark.parametrize(
    ("made", "output", "message"),
    [
        (lambda z: (z, z), None, "got a tuple of 2: name them"),
        (lambda z: {"scores": z}, None, "got a dict with 'scores': name them"),
        (lambda z: Output(z, z), "missing", "output must name a part of what the model returns, Output, got 'missing'"),
        (lambda z: {"scores": z}, "logits", "output must name a part .* a dict with 'scores', got 'logits'"),
        (lambda z: (z, z), 2, "output must name a part .* a tuple of 2, got 2"),
        (lambda z: {"a": [z]}, "a", "model must return its logits as one tensor"),
        (lambda z: z.long(), None, "logits must be floating point, got torch.int64"),
    ],
)
def test_what_holds_no_logits_is_named(made, output, message) -> None:
    model = Returns("object")
    model.make = made
    with pytest.raises((ValueError, TypeError), match=message):
        MarginTask(model, OneToNLoss(), output=output)(*batch())


class Two(nn.Module):
    """An image and a table, by position or name, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.head = nn.Linear(5, 7), nn.Linear(3, 7), nn.Linear(7, CLASSES)

    def forward(self, image: Tensor, table: Tensor, ids: Tensor | None = None, twice: bool = False) -> Tensor:
        hidden = torch.tanh(self.image(image) + self.table(table))
        if ids is not None:
            hidden = hidden + ids[:, None]
        return self.head(hidden) * (2 if twice else 1)


def two() -> tuple[Two, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = batch()
    return Two().double(), x, torch.randn(N, 3, dtype=torch.float64), y


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in LOSSES if kind != "adversarial"])
def test_arguments_by_position_and_name_and_in_a_batch(kind, compiled) -> None:
    model, image, table, y = two()
    layers = None if kind == "one to n" else ("head",)
    loss = LOSSES[kind]()
    plain = MarginTask(nn.Sequential(_Closed(model, table)), loss, layers if layers is None else ("0.model.head",))
    expected = plain(image, y)
    task = MarginTask(model, loss, layers)
    by_call = MarginTask(model, loss, layers, call=lambda model, batch: model(batch["i"], table=batch["t"]))
    if compiled:
        task.compile(backend="aot_eager")
        by_call.compile(backend="aot_eager")
    for found in (
        task(image, table, y),
        task(image, table, target=y),
        task(image, table=table, target=y),
        task(image=image, table=table, twice=False, target=y),
        by_call({"i": image, "t": table}, y),
    ):
        assert_same(task, found, expected, model, model)
    doubled = task(image=image, table=table, twice=True, target=y)
    torch.testing.assert_close(doubled["output"], 2 * expected["output"])


class _Closed(nn.Module):
    def __init__(self, model: Two, table: Tensor) -> None:
        super().__init__()
        self.model, self.table = model, table

    def forward(self, image: Tensor) -> Tensor:
        return self.model(image, self.table)


def test_the_input_tap_is_the_one_that_is_named() -> None:
    model, image, table, y = two()
    loss = LargeMarginLoss(2.0)
    ids = torch.arange(N)
    with pytest.raises(ValueError, match='the tap "input" must be one tensor, got 2 floating-point inputs: name it'):
        MarginTask(model, loss)(image, table, y)
    task = MarginTask(model, loss, ("input[0]", "input[1]"))
    out = task(image, table, ids, target=y)
    leaves = image.clone().requires_grad_(), table.clone().requires_grad_()
    gap = -_gap(model(*leaves, ids), y)
    found = torch.autograd.grad(gap.sum(), leaves)
    for column, gradient in enumerate(found):
        torch.testing.assert_close(out["norm"][:, 0, column], gradient.norm(dim=1), rtol=1e-10, atol=1e-12)
    by_name = MarginTask(model, loss, ("input[image]", "input[table]"))(image=image, table=table, ids=ids, target=y)
    assert torch.equal(by_name["norm"], out["norm"])
    in_a_batch = MarginTask(model, loss, ("input[image]", "input[table]"), call=lambda model, batch: model(**batch))
    assert torch.equal(in_a_batch({"image": image, "table": table, "ids": ids}, y)["norm"], out["norm"])
    with pytest.raises(ValueError, match=r"layer 'input\[mask\]': the model's arguments have no item \[mask\]"):
        MarginTask(model, loss, ("input[mask]",))(image=image, table=table, target=y)
    with pytest.raises(ValueError, match=r"needs a floating-point input, got torch.int64"):
        MarginTask(model, loss, ("input[2]",))(image, table, ids, target=y)
    one_floating = MarginTask(_Embedded(model), loss)(ids, image, target=y)  # the only floating-point one
    assert one_floating["norm"].shape == (N, 1, 1)


class _Embedded(nn.Module):
    def __init__(self, model: Two) -> None:
        super().__init__()
        self.model, self.rows = model, nn.Embedding(N, 3).double()

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        return self.model(image, self.rows(ids))


def _gap(z: Tensor, y: Tensor) -> Tensor:
    own = z.gather(1, y[:, None])[:, 0]
    return own - z.scatter(1, y[:, None], float("-inf")).amax(1)


def test_adversarial_margins_hold_the_other_arguments() -> None:
    """They are searched in the one floating-point argument, as if the others were part of the model."""
    torch.manual_seed(0)
    x, y = batch()
    model, ids = _Embedded(Two().double()), torch.arange(N).flip(0)
    loss = AdversarialMarginLoss(2.0, aggregation="avg")
    found = MarginTask(model, loss)(ids, x, target=y)
    terms = [MarginTask(_Fixed(model, ids[n : n + 1]), loss)(x[n : n + 1], y[n : n + 1])["loss"] for n in range(N)]
    torch.testing.assert_close(found["loss"], torch.stack(terms).mean(), rtol=1e-10, atol=1e-12)
    expected = gradients(torch.stack(terms).mean(), model)
    for a, b in zip(gradients(found["loss"], model), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


class _Fixed(nn.Module):
    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        super().__init__()
        self.model, self.ids = model, ids

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.ids, x)


def test_what_asks_for_a_target_says_so() -> None:
    task = MarginTask(net(), LargeMarginLoss())
    with pytest.raises(ValueError, match="evaluate takes the model's arguments and a target"):
        task.evaluate(batch()[0])
    with pytest.raises(ValueError, match="explain takes the model's arguments and a target"):
        task.explain(batch()[0])
    for how, message in (({"output": 1.5}, "output must be a name or a position"), ({"call": 3}, "call must be")):
        with pytest.raises(TypeError, match=message):
            MarginTask(net(), LargeMarginLoss(), **how)
    with pytest.raises(ValueError, match="class_dim must be 1 or -1, got 2"):
        MarginTask(net(), LargeMarginLoss(), class_dim=2)
    with pytest.raises(ValueError, match="positions must be an integer >= 1, got 0"):
        MarginTask(net(), LargeMarginLoss(), positions=0)
    with pytest.raises(ValueError, match="positions must be None for OneToNLoss"):
        MarginTask(net(), OneToNLoss(), positions=1)


class WithTable(nn.Module):
    """Whose table could be a soft target by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.table, self.head = nn.Linear(5, 7), nn.Linear(CLASSES, 7), nn.Linear(7, CLASSES)

    def forward(self, image: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.tanh(self.image(image) + self.table(table)))


class TableOrNot(WithTable):
    def forward(self, image: Tensor, table: Tensor | None = None) -> Tensor:
        return super().forward(image, image.new_zeros(len(image), CLASSES) if table is None else table)


class AnyNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = WithTable()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.inner(*inputs)


@pytest.mark.parametrize("call", ["forward", "evaluate", "explain"])
def test_an_input_is_not_taken_for_the_target(call) -> None:
    _, image, _, y = two()
    table = torch.softmax(torch.randn(N, CLASSES), 1).double()
    models = {kind: kind().double() for kind in (WithTable, TableOrNot, AnyNumber)}
    remedy = "task.model(x, table) for the output alone"
    for kind, message in {
        WithTable: "the model does not take these arguments, missing a required argument: 'table': where",
        AnyNumber: "target must be given by name to a model that takes any number of inputs",
    }.items():
        with pytest.raises((TypeError, ValueError)) as raised:
            getattr(MarginTask(models[kind], LargeMarginLoss(), "**head"), call)(image, table)
        assert message in str(raised.value) and remedy in str(raised.value)
    task = MarginTask(models[TableOrNot], LargeMarginLoss(), ("head",))
    getattr(task, call)(image, table, target=y)
    with pytest.raises(ValueError, match="by name beside 2 positional arguments, which were all the model's in an ear"):
        getattr(task, call)(image, table)
    assert torch.equal(task(image, table, y)["output"], models[TableOrNot](image, table))
    task(image, target=y)
    assert torch.equal(task(image, y)["output"], models[TableOrNot](image))


def test_a_type_error_of_the_model_itself_stays_as_it_is() -> None:
    model = Returns("object")
    model.make = lambda z: z + None
    with pytest.raises(TypeError, match=r"^unsupported operand type"):
        MarginTask(model, OneToNLoss())(*batch())
    by_call = MarginTask(net(), OneToNLoss(), call=lambda model, x, table: model(x))
    with pytest.raises(TypeError, match=r"^call does not take these arguments, missing a required argument: 'table'"):
        by_call(*batch())


def test_suggested_margins_take_batches_of_any_form() -> None:
    model, image, table, _ = two()
    y = model(image, table).argmax(1)
    task = MarginTask(model, LargeMarginLoss(), ("head", "image"))
    expected = suggest_gamma(task, [(image, table, y)])
    assert suggest_gamma(task, [{"image": image, "table": table, "target": y}]) == expected
    norms = task(image, table, y)
    distance = norms["distance"][:, 0].median(0).values if N % 2 else norms["distance"][:, 0].sort(0).values[N // 2 - 1]
    torch.testing.assert_close(torch.tensor(expected.gamma), (1.5 * distance).float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r'loader must give tuples .* or dicts with the key "target"'):
        suggest_gamma(task, [{"image": image, "table": table}])


@pytest.mark.parametrize("returns", ["object", "dict"])
def test_deepfool_and_the_monitor_find_the_logits(returns) -> None:
    plain, model, (x, y) = net(), Returns(returns), batch()
    expected, found = deepfool(plain, x), deepfool(model, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    distances = []
    for network, name in ((plain, "0"), (model, "net.0")):
        with MarginMonitor(network, (name,)) as monitor:
            made = network(x)
            F.cross_entropy(made if isinstance(made, Tensor) else logits_in(made), y).backward()
        distances.append(monitor.distances())
    assert torch.equal(*distances)


def test_deepfool_takes_one_logit() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    x, _ = batch()
    found = deepfool(model, x, overshoot_mode="step")
    w, f = model.weight[0].detach(), model(x).detach()[:, 0]
    torch.testing.assert_close(found.distance, 1.02 * f.abs() / w.norm(), rtol=1e-10, atol=1e-12)
    assert found.label.tolist() == (f < 0).long().tolist()
    assert torch.equal(deepfool(lambda x: model(x)[:, 0], x, overshoot_mode="step").distance, found.distance)


def test_positions_are_drawn_anew_in_compiled_steps() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, 7).double(), nn.Linear(7, 8 * CLASSES).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x))).unflatten(1, (8, CLASSES))

    torch.manual_seed(0)
    model, x = Tagger(), batch()[0]
    y = torch.randint(CLASSES, (N, 8))
    y[:, 0] = -100
    loss = LargeMarginLoss(2.0, cross_entropy_weight=1.0)
    every = MarginTask(model, loss, ("input", "body"), positions=8)
    compiled = MarginTask(model, loss, ("input", "body"), positions=8)
    compiled.compile(backend="aot_eager")
    assert_same(compiled, compiled(x, y), every(x, y), model, model)
    one = MarginTask(model, loss, ("input", "body"), positions=1)
    one.compile(backend="aot_eager")
    drawn = torch.cat([one(x, y)["position"] for _ in range(30)], 1)
    assert sorted(set(drawn.flatten().tolist())) == [1, 2, 3, 4, 5, 6, 7]
    out = one(x, y)
    gap = every(x, y)["gap"].gather(1, out["position"][..., None])
    torch.testing.assert_close(out["gap"], gap, rtol=1e-12, atol=1e-12)


@dataclass
class Batch:
    image: Tensor
    table: Tensor
    name: str = "a batch"


class Encoding(UserDict):
    """As a tokenizer's: a mapping that is no dict, with attributes of its own."""

    def __init__(self, data: Any = None) -> None:
        super().__init__(data)
        self.encodings = object()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["user dict", "dataclass", "ordered dict", "in a list"])
def test_batches_of_any_container_are_looked_into(kind, compiled) -> None:
    model, image, table, y = two()
    makes: dict[str, Any] = {"user dict": Encoding, "ordered dict": OrderedDict, "dataclass": lambda d: Batch(**d)}
    make = makes.get(kind, lambda found: [Encoding(found), 3])
    given = make({"image": image, "table": table})
    loss = LargeMarginLoss(2.0)
    layers = ("head",) if kind == "in a list" else ("input[image]", "input[table]", "head")

    def call(model: nn.Module, batch: Any) -> Tensor:
        if kind == "dataclass":
            return model(batch.image, batch.table)
        batch = batch[0] if kind == "in a list" else batch
        return model(batch["image"], batch["table"])

    expected = MarginTask(model, loss, layers)(image=image, table=table, target=y)
    task = MarginTask(model, loss, layers, call=call)
    if compiled:
        task.compile(backend="aot_eager")
    found = task(given, y)
    assert_same(task, found, expected, model, model)
    torch.testing.assert_close(found["norm"], expected["norm"], rtol=1e-12, atol=1e-12)
    # Another batch of the same kind is another batch, compiled or not.
    other = make({"image": 2 * image, "table": table})
    again = MarginTask(model, loss, layers)(image=2 * image, table=table, target=y)
    assert_same(task, task(other, y), again, model, model)
    with torch.inference_mode():
        inside = make({"image": image.clone(), "table": table.clone()})
        assert torch.equal(task.evaluate(inside, y.clone())["norm"], expected["norm"])
    held = given[0] if kind == "in a list" else given
    assert (held.image if kind == "dataclass" else held["image"]) is image  # the caller's stays


def test_a_tensor_that_is_given_twice_is_one() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(5, CLASSES).double()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(a * b)

    torch.manual_seed(0)
    model, (x, y) = Product(), batch()
    eager, compiled = (MarginTask(model, LargeMarginLoss(2.0)) for _ in range(2))
    compiled.compile(backend="aot_eager")
    assert_same(compiled, compiled(x, x, target=y), eager(x, x, target=y), model, model)
    with pytest.raises(ValueError, match="got 2 floating-point inputs"):
        compiled(x, x.clone(), target=y)


def test_a_compiled_step_trains_no_tensor_from_elsewhere() -> None:
    model, (x, y) = net(), batch()
    scale = torch.ones((3,), requires_grad=True)
    task = MarginTask(model, LargeMarginLoss(2.0), call=lambda model, x: model(x) * scale.sum())
    task.compile(backend="aot_eager")
    with pytest.raises(ValueError, match=r"the loss depends on another tensor .* of shape \[3\]"):
        task(x, y)

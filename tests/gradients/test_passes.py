"""How the class-difference gradients are obtained: closed forms, the loop, and what is not computed."""

import copy
import weakref
from functools import partial

import pytest
import torch
from support import batches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from margin_kernels import LargeMarginLoss, MarginTask, functional
from margin_kernels.gradients import loop, plan
from margin_kernels.gradients.request import Request
from margin_kernels.task.capture import Taps
from margin_kernels.testing import flops

CLASSES = 5
LAYERS = ("input", "0", "1", "2", "3", "4", "output")
CLOSED = ("1", "2", "3", "4", "output")
batch = partial(batches.normal, shape=(1, 6, 6), classes=CLASSES)


class HiddenHead(nn.Linear):
    """Computes what nn.Linear does, but is not exactly nn.Linear: its model gets no closed form before the logits."""


def difference_norms(captured, target, index, p=2.0, space="logit", second_order=False) -> Tensor:
    request = Request(p, space, second_order=second_order, competitors=index.shape[1])
    return loop.difference_norms(captured, target, index, request, second_order)


def pooled_net(head: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)
    ).double()
    replaced = head(4, CLASSES).double()
    replaced.load_state_dict(net[4].state_dict())
    net[4] = replaced
    return net


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, "inf"])
@pytest.mark.parametrize("space", ["logit", "probability"])
@pytest.mark.parametrize("second_order", [False, True])
def test_closed_forms_equal_the_pass(p, space, second_order) -> None:
    x, y = batch()
    closed, passed = pooled_net(), pooled_net(HiddenHead)
    loss = LargeMarginLoss(3.0, p, top_k=3, aggregation="sum", space=space, second_order=second_order)
    actual, expected = MarginTask(closed, loss, LAYERS)(x, y), MarginTask(passed, loss, LAYERS)(x, y)
    torch.testing.assert_close(actual["norm"], expected["norm"], rtol=1e-12, atol=1e-14)
    actual["loss"].backward()
    expected["loss"].backward()
    for a, b in zip(closed.parameters(), passed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2, "inf"])
def test_the_closed_forms_are_those_of_the_formulas(p) -> None:
    x, y = batch()
    net = pooled_net()
    out = MarginTask(net, LargeMarginLoss(p=p, top_k=2), ("1", "3", "output"))(x, y)
    rows = net[4].weight[out["competitor"]] - net[4].weight[y][:, None]
    ord_ = {1: float("inf"), 2: 2, "inf": 1}[p]
    norm = torch.linalg.vector_norm(rows, ord_, dim=-1)
    positions = 16
    pooled = {1: 1 / positions, 2: positions**-0.5, "inf": 1.0}[p]
    output = {1: 1.0, 2: 2**0.5, "inf": 2.0}[p]
    torch.testing.assert_close(out["norm"], torch.stack([norm * pooled, norm, torch.full_like(norm, output)], -1))


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, "inf"])
@pytest.mark.parametrize("space", ["logit", "probability"])
@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("layers", [("3",), ("1", "3"), ("2", "output")])
def test_closed_forms_alone_equal_the_pass(p, space, second_order, layers) -> None:
    """No tap needs a pass: for logits the head's rows are then measured where they lie."""
    x, y = batch()
    closed, passed = pooled_net(), pooled_net(HiddenHead)
    loss = LargeMarginLoss(3.0, p, top_k=3, aggregation="sum", space=space, second_order=second_order)
    actual, expected = MarginTask(closed, loss, layers)(x, y), MarginTask(passed, loss, layers)(x, y)
    torch.testing.assert_close(actual["norm"], expected["norm"], rtol=1e-12, atol=1e-14)
    actual["loss"].backward()
    expected["loss"].backward()
    for a, b in zip(closed.parameters(), passed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("second_order", [False, True])
def test_rows_of_the_head_are_not_gathered_where_only_their_norm_is_needed(monkeypatch, second_order) -> None:
    called: list[str] = []
    for name in ("row_distance", "dual_norm"):
        original = getattr(functional, name)
        monkeypatch.setattr(
            loop.functional, name, lambda *a, n=name, f=original, **o: (called.append(n), f(*a, **o))[1]
        )
    for layers, space in ((CLOSED, "logit"), (("output",), "logit"), (CLOSED, "probability"), (LAYERS, "logit")):
        called.append("-")
        loss = LargeMarginLoss(top_k=2, space=space, second_order=second_order)
        assert MarginTask(pooled_net(), loss, layers)(*batch())["norm"].shape == (6, 2, len(layers))
    assert called == ["-", "row_distance", "-", "-", "dual_norm", "dual_norm", "-", "dual_norm", "dual_norm"]


@pytest.mark.parametrize("space", ["logit", "probability"])
def test_numel_divides_closed_forms_and_passes_alike(space) -> None:
    x, y = batch()
    plain = MarginTask(pooled_net(), LargeMarginLoss(space=space), LAYERS)(x, y)["norm"]
    scaled = MarginTask(pooled_net(), LargeMarginLoss(space=space, layer_scale="numel"), LAYERS)(x, y)["norm"]
    torch.testing.assert_close(scaled * torch.tensor([36, 64, 64, 4, 4, 5, 5]), plain)


@pytest.fixture
def calls(monkeypatch) -> list[dict]:
    """The arguments of every pass."""
    seen: list[dict] = []
    original, by_pytorch = loop.gradients_at, torch.autograd.grad

    def spy(ends, roots, seeds, *options):
        seen.append({"start": roots[0], "inputs": len(ends), "seed": seeds[0]})
        return original(ends, roots, seeds, *options)

    def other(*args, **options):
        seen.append({})
        return by_pytorch(*args, **options)

    monkeypatch.setattr(loop, "gradients_at", spy)
    monkeypatch.setattr(torch.autograd, "grad", other)
    return seen


@pytest.mark.parametrize("space", ["logit", "probability"])
def test_taps_with_a_closed_form_need_no_pass(calls, space) -> None:
    MarginTask(pooled_net(), LargeMarginLoss(top_k=4, space=space), CLOSED)(*batch())
    assert calls == []


@pytest.mark.parametrize("k", [1, 4])
def test_one_pass_for_each_competitor_gives_every_tap(calls, k) -> None:
    MarginTask(pooled_net(), LargeMarginLoss(top_k=k), LAYERS, "loop")(*batch())
    assert [call["inputs"] for call in calls] == [2] * k


def test_the_pass_starts_at_the_heads_input_with_the_rows(calls) -> None:
    x, y = batch()
    net = pooled_net()
    out = MarginTask(net, LargeMarginLoss(), LAYERS)(x, y)
    rows = net[4].weight[out["competitor"][:, 0]] - net[4].weight[y]
    assert torch.equal(calls[0]["seed"], rows)
    assert calls[0]["start"].shape == (6, 4)


def test_without_a_head_the_pass_starts_at_the_logits(calls) -> None:
    x, y = batch()
    out = MarginTask(pooled_net(HiddenHead), LargeMarginLoss(), LAYERS)(x, y)
    one_hot = nn.functional.one_hot
    expected = one_hot(out["competitor"][:, 0], CLASSES) - one_hot(y, CLASSES)
    assert torch.equal(calls[0]["seed"], expected.double())


class Products(TorchDispatchMode):
    """Counts matrix products, those of the backward passes included."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("layers", "products"), [(("input", "1"), 2), (("1",), 1), (("3",), 0)])
def test_a_pass_computes_no_weight_gradient_and_stops_at_the_lowest_tap(layers, products) -> None:
    """The gradient of a linear layer's input is one product, that of its weight would be another."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    with Products() as counted:
        MarginTask(model, LargeMarginLoss(top_k=2), layers, "loop")(torch.randn(7, 4), torch.randint(3, (7,)))
    assert counted.count == 2 * products


def test_passes_do_not_reach_the_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    reached: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda grad, name=name: reached.append(name))
    out = MarginTask(model, LargeMarginLoss(5.0, top_k=2), ("input", "1"))(torch.randn(7, 4), torch.randint(3, (7,)))
    assert reached == []
    out["loss"].backward()
    assert len(reached) == 6


def test_one_set_of_tap_gradients_is_alive(monkeypatch) -> None:
    alive: list[weakref.ref] = []
    original = functional.dual_norm

    def spy(gradients, *args, **options):
        assert not any(ref() is not None for ref in alive)
        alive[:] = [weakref.ref(g) for g in gradients]
        return original(gradients, *args, **options)

    monkeypatch.setattr(loop.functional, "dual_norm", spy)
    MarginTask(pooled_net(HiddenHead), LargeMarginLoss(top_k=4), LAYERS)(*batch())
    assert len(alive) == 5 and not any(ref() is not None for ref in alive)


def test_one_launch_of_dual_norm_measures_all_layers(monkeypatch) -> None:
    lengths: list[int] = []
    original = functional.dual_norm

    def spy(gradients, *args, **options):
        lengths.append(len(gradients))
        return original(gradients, *args, **options)

    monkeypatch.setattr(loop.functional, "dual_norm", spy)
    MarginTask(pooled_net(), LargeMarginLoss(top_k=3), LAYERS)(*batch())
    # The rows, which serve three taps, and two gradients; the logits' norm is a number.
    assert lengths == [3, 3, 3]


def test_second_order_norms_carry_a_graph_and_first_order_norms_do_not() -> None:
    x, y = batch()
    net = pooled_net()
    captured = Taps(net, LAYERS).capture(net, x)
    index = functional.competitors(captured.logits, y, 2).competitor
    assert difference_norms(captured, y, index, second_order=True).requires_grad
    assert not difference_norms(captured, y, index).requires_grad


def test_wide_and_narrow_taps_are_measured_together() -> None:
    """Autocast: the input is float32, what follows the convolution bfloat16."""
    x, y = batch()
    net = pooled_net().float()
    with torch.autocast("cpu", torch.bfloat16):
        captured = Taps(net, LAYERS).capture(net, x.float())
    index = functional.competitors(captured.logits, y, 2).competitor
    norm = difference_norms(captured, y, index)
    assert norm.dtype == torch.float32
    exact = Taps(net, LAYERS).capture(net, x.float())
    torch.testing.assert_close(norm, difference_norms(exact, y, index), rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("space", ["logit", "probability"])
@pytest.mark.parametrize("second_order", [False, True])
def test_small_gradients_do_not_vanish_in_float16(monkeypatch, second_order, space) -> None:
    x, y = batch()
    net = pooled_net().float()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 4:
                parameter.mul_(2**-12)
    errors = {}
    for scale in (plan.FLOAT16_SCALE, 1.0):
        monkeypatch.setattr(plan, "FLOAT16_SCALE", scale)
        with torch.autocast("cpu", torch.float16):
            captured = Taps(net, LAYERS).capture(net, x.float())
        index = functional.competitors(captured.logits, y, 2).competitor
        norm = difference_norms(captured, y, index, 1, space, second_order=second_order)
        exact = difference_norms(Taps(net, LAYERS).capture(net, x.float()), y, index, 1, space)
        errors[scale] = float(((norm - exact).abs() / exact).max().detach())
    assert errors[256.0] < 0.02 < errors[1.0]


@pytest.mark.skipif(
    not hasattr(loop.EXTENSION, "cut_gradients"), reason="the compiled extension is missing: nothing is cut"
)
@pytest.mark.parametrize("second_order", [False, True])
def test_the_loss_does_not_compute_the_gradient_of_the_input(monkeypatch, second_order) -> None:
    x, y = batch()
    net = pooled_net()
    task = MarginTask(net, LargeMarginLoss(5.0, top_k=2, second_order=second_order), ("input", "0"), "loop")

    def sources_reached() -> tuple[int, list[Tensor]]:
        loss = copy.copy(task)(x, y)["loss"]
        seen, open_, found = set(), [loss.grad_fn], 0
        while open_:
            node = open_.pop()
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    open_.append(following)
                    found += following.name() == "_InGraphBackward"
        return found, list(torch.autograd.grad(loss, list(net.parameters())))

    cut, gradients = sources_reached()
    monkeypatch.setattr(loop, "EXTENSION", None)
    uncut, expected = sources_reached()
    assert (cut, uncut) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.skipif(
    not hasattr(loop.EXTENSION, "cut_gradients"), reason="the compiled extension is missing: nothing is cut"
)
@pytest.mark.parametrize("second_order", [False, True])
def test_nor_that_of_what_is_only_a_view_of_the_input(second_order) -> None:
    """Flatten stands between the input and the first layer: its gradient leads to the input alone."""
    n, inputs, width = 6, 36, 8
    x, y = batch(n=n)
    net = nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, CLASSES)).double()
    loss = LargeMarginLoss(5.0, second_order=second_order, cross_entropy_weight=1.0)
    task = MarginTask(net, loss, ("input",), "loop")
    plain = flops(lambda: nn.functional.cross_entropy(net(x), y).backward())
    first = 2 * n * inputs * width
    # the pass; twice differentiated also its tangent and its gradient in the weight
    assert flops(lambda: task(x, y)["loss"].backward()) == plain + (3 if second_order else 1) * first


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match='passes must be one of "auto", "loop", "split", got \'both\''):
        MarginTask(pooled_net(), LargeMarginLoss(), passes="both")

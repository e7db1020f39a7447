"""LargeMarginLoss with the soft competitor, ignored samples, class weights and label smoothing, in double precision,
against a literal loop over samples and layers, and against torch's cross-entropy."""

import math
from functools import partial

import pytest
import torch
from support import batches
from support.gradients import gradients
from support.networks import tanh_net
from support.norms import dual_norm
from torch import Tensor, nn
from torch.nn import functional as F

from margin_kernels import LargeMarginLoss, MarginTask, functional
from margin_kernels.backends import EXTENSION
from margin_kernels.gradients.plan import soft_cotangent

CLASSES, LAYERS = 4, ("input", "1", "3", "output")
IGNORED = -100
batch = partial(batches.normal, n=6, classes=CLASSES)
WEIGHTS = [1.0, 2.0, 0.5, 0.0]


def small_net() -> nn.Sequential:
    return tanh_net(6, 5, 3, CLASSES)


def oracle(loss: LargeMarginLoss, net: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """Margin and cross-entropy, one sample, one layer and one class at a time."""
    margins, entropies, shares = [], [], []
    for n in range(len(y)):
        if y[n] == loss.ignore_index:
            continue
        hidden = [x[n : n + 1].detach().requires_grad_()]
        for layer in net:
            hidden.append(layer(hidden[-1]))
        taps, z = [hidden[i] for i in (0, 2, 4, 5)], hidden[-1][0]
        label = int(y[n])
        phi = z[label] - torch.stack([z[i].exp() for i in range(CLASSES) if i != label]).sum().log()
        phi = phi + loss.soft_shift * math.log(CLASSES - 1)
        terms = []
        for h in taps:
            (g,) = torch.autograd.grad(phi, h, create_graph=True)
            norm = dual_norm(g, loss.p) if loss.second_order else dual_norm(g, loss.p).detach()
            cap = math.inf if loss.alpha is None else loss.alpha * loss.gamma
            terms.append((loss.gamma - phi / (loss.eps + norm)).clamp(0, cap))
        weight = [1.0] * CLASSES if loss.class_weight is None else loss.class_weight
        log_p = z - z.exp().sum().log()
        smooth = sum(weight[c] * -log_p[c] for c in range(CLASSES)) / CLASSES
        entropies.append((1 - loss.label_smoothing) * weight[label] * -log_p[label] + loss.label_smoothing * smooth)
        margins.append(weight[label] * sum(terms) / len(terms))
        shares.append(weight[label])
    total = loss.margin_weight * torch.stack(margins) + loss.cross_entropy_weight * torch.stack(entropies)
    return total.sum() / (sum(shares) if loss.reduction == "mean" else 1.0)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("p", [1, 1.5, 2, "inf"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"alpha": 0.6, "margin_weight": 0.3},
        {"alpha": 0.6, "soft_shift": 0.5},
        {"class_weight": WEIGHTS},
        {"label_smoothing": 0.2},
        {"class_weight": WEIGHTS, "label_smoothing": 0.2, "reduction": "sum"},
        {"cross_entropy_weight": 0.0},
    ],
    ids=str,
)
def test_value_and_gradient_equal_the_literal_loop(options, p, second_order) -> None:
    loss = LargeMarginLoss(
        1.5, p, competitors="soft", second_order=second_order, **{"cross_entropy_weight": 0.7, **options}
    )
    net, (x, y) = small_net(), batch()
    y[2] = IGNORED
    expected = oracle(loss, net, x, y)
    for passes in ("loop", "auto"):
        actual = MarginTask(net, loss, LAYERS, passes)(x, y)["loss"]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        for g, e in zip(gradients(actual, net), gradients(expected, net), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"class_weight": WEIGHTS},
        {"label_smoothing": 0.1},
        {"class_weight": WEIGHTS, "label_smoothing": 0.1},
        {"ignore_index": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("competitors", ["hard", "soft"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_cross_entropy_is_that_of_torch(options, competitors, reduction) -> None:
    (z, y) = batch(shape=(CLASSES,), scale=3.0)
    y[1] = options.get("ignore_index", IGNORED)
    z.requires_grad_()
    given = dict(options)
    weight = given.pop("class_weight", None)
    expected = F.cross_entropy(
        z, y, None if weight is None else torch.tensor(weight).double(), reduction=reduction, **given
    )
    loss = LargeMarginLoss(
        competitors=competitors, margin_weight=0.0, cross_entropy_weight=1.0, reduction=reduction, **options
    )
    actual = loss(z, y, [z])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    (one,), (other,) = (torch.autograd.grad(value.sum(), z, retain_graph=True) for value in (actual, expected))
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_auto_takes_the_split_with_cross_entropy_and_the_loop_with_label_smoothing() -> None:
    net, (x, y) = small_net(), batch()
    for options, strategy, passes in (
        ({}, "split", 3.0),
        ({"class_weight": WEIGHTS}, "split", 3.0),
        ({"label_smoothing": 0.1}, "loop", 4.0),
    ):
        loss = LargeMarginLoss(1.5, competitors="soft", cross_entropy_weight=1.0, **options)
        found = MarginTask(net, loss, LAYERS).explain(x, y)
        assert (found.strategy, found.passes) == (strategy, passes)
    assert "label_smoothing=0" in found.refused["split"]
    hard = MarginTask(net, LargeMarginLoss(cross_entropy_weight=1.0), LAYERS).explain(x, y)
    assert hard.strategy == "loop" and 'competitors="soft"' in hard.refused["split"]


def test_label_smoothing_of_two_classes_stays_in_the_split() -> None:
    net, (x, y) = tanh_net(6, 5, 3, 2), batch(classes=2)
    loss = LargeMarginLoss(1.5, competitors="soft", cross_entropy_weight=1.0, label_smoothing=0.1)
    split, loop = (MarginTask(net, loss, ("input", "1"), passes)(x, y)["loss"] for passes in ("split", "loop"))
    for g, e in zip(gradients(split, net), gradients(loop, net), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-13)


def test_the_distance_is_a_lower_bound_of_the_hard_gap_within_log_of_the_rivals() -> None:
    net, (x, y) = small_net(), batch(scale=4.0)
    soft = MarginTask(net, LargeMarginLoss(competitors="soft"), LAYERS)(x, y)
    hard = MarginTask(net, LargeMarginLoss(), LAYERS)(x, y)
    assert torch.equal(soft["competitor"], hard["competitor"])
    excess = soft["gap"] - hard["gap"]
    assert (excess > 0).all() and (excess <= math.log(CLASSES - 1)).all()
    torch.testing.assert_close(soft["distance"], -soft["gap"][..., None] / (1e-6 + soft["norm"]))


def test_soft_shift_leads_from_the_lower_bound_to_the_upper_one() -> None:
    net, (x, y) = small_net(), batch(scale=4.0)
    hard = MarginTask(net, LargeMarginLoss(), LAYERS)(x, y)["gap"]
    rows = {
        s: MarginTask(net, LargeMarginLoss(competitors="soft", soft_shift=s), LAYERS)(x, y)["gap"] for s in (0, 0.5, 1)
    }
    assert (rows[0] > hard).all() and (rows[1] < hard).all()
    torch.testing.assert_close(rows[0.5], (rows[0] + rows[1]) / 2)
    assert ((rows[0.5] - hard).abs() <= math.log(CLASSES - 1) / 2).all()
    # On the right side from p_y = 1 / (1 + R^s) on.
    p = net(x).softmax(1).gather(1, y[:, None])
    assert torch.equal(rows[0.5] < 0, p > 1 / (1 + math.sqrt(CLASSES - 1)))


def test_soft_shift_is_refused_without_the_soft_competitor() -> None:
    with pytest.raises(ValueError, match=r'soft_shift must be 0 with competitors="hard".*got 0\.5'):
        LargeMarginLoss(soft_shift=0.5)
    with pytest.raises(ValueError, match=r"soft_shift must be in \[0, 1\], got 1.5"):
        LargeMarginLoss(competitors="soft", soft_shift=1.5)


class Masked(nn.Module):
    """The logit of one class is -inf."""

    def __init__(self, masked: int) -> None:
        super().__init__()
        self.net, self.masked = small_net(), masked

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        return z.masked_fill(torch.arange(CLASSES) == self.masked, -math.inf)


@pytest.mark.parametrize("shift", [0, 0.5])
@pytest.mark.parametrize("passes", ["loop", "split"])
def test_a_masked_class_counts_for_nothing(passes, shift) -> None:
    """As in the network whose head has no such class."""
    model, (x, y) = Masked(3), batch(classes=3)
    loss = LargeMarginLoss(1.5, competitors="soft", cross_entropy_weight=1.0, soft_shift=shift)
    found = MarginTask(model, loss, ("input", "net.3"), passes)(x, y)
    smaller = small_net()
    smaller[4] = nn.Linear(3, 3).double()
    with torch.no_grad():
        smaller[4].weight.copy_(model.net[4].weight[:3])
        smaller[4].bias.copy_(model.net[4].bias[:3])
    expected = MarginTask(smaller, loss, ("input", "3"), passes)(x, y)
    for name in ("gap", "norm", "loss"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-15)
    one, other = gradients(found["loss"], model), gradients(expected["loss"], smaller)
    for g, e in zip(one[:4], other[:4], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(one[4][:3], other[4])
    assert (one[4][3] == 0).all() and one[5][3] == 0


@pytest.mark.parametrize("shift", [0, 0.5])
def test_a_masked_label_has_the_gradient_of_its_cross_entropy_alone(shift) -> None:
    model, (x, _) = Masked(3), batch()
    y = torch.full((len(x),), 3)
    loss = LargeMarginLoss(1.5, competitors="soft", cross_entropy_weight=1.0, soft_shift=shift)
    found = {}
    for passes in ("loop", "split"):
        out = MarginTask(model, loss, ("input", "net.3"), passes)(x, y)
        assert out["loss"] == math.inf
        found[passes] = gradients(out["loss"], model)
    z = model.net(x)[:, :3]
    expected = gradients(torch.logsumexp(z, 1).mean(), model)
    for g, h, e in zip(found["loop"], found["split"], expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(h, e, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("passes", ["loop", "split"])
def test_confident_samples_keep_their_distance_in_float32(passes) -> None:
    """At a gap of 60 the probability of the label is 1 to float32, and 1 - p_y is not 0."""
    net, (x, y) = small_net(), batch()
    with torch.no_grad():
        scale = 60 / (net(x).gather(1, y[:, None])[:, 0] - net(x).amin(1)).abs().max()
        net[4].weight *= scale
        net[4].bias *= scale
    loss = LargeMarginLoss(100.0, competitors="soft", cross_entropy_weight=1.0)
    truth = MarginTask(net, loss, LAYERS, passes)(x, y)
    expected = gradients(truth["loss"], net)
    net.float()
    found = MarginTask(net, loss, LAYERS, passes)(x.float(), y)
    torch.testing.assert_close(found["distance"].double(), truth["distance"], rtol=2e-5, atol=1e-6)
    for g, e in zip(gradients(found["loss"], net), expected, strict=True):
        assert float((g - e).norm() / e.norm()) < 1e-5


def test_the_second_order_gradient_passes_gradcheck_in_the_parameters() -> None:
    net, (x, y) = small_net(), batch()
    y[0] = IGNORED
    task = MarginTask(net, LargeMarginLoss(50.0, competitors="soft", second_order=True), LAYERS)
    names = [name for name, _ in net.named_parameters()]

    def value(*values: Tensor) -> Tensor:
        state = dict(zip((f"model.{name}" for name in names), values, strict=True))
        return torch.func.functional_call(task, state, (x, y))["loss"]

    parameters = tuple(p.detach().clone().requires_grad_() for p in net.parameters())
    assert torch.autograd.gradcheck(value, parameters, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"competitors": "hard"}, {"competitors": "soft"}, {"competitors": "soft", "soft_shift": 0.5}],
    ids=["hard", "soft", "soft, shifted"],
)
def test_ignored_samples_are_as_if_they_were_not_there(options) -> None:
    net, (x, y) = small_net(), batch()
    loss = LargeMarginLoss(3.0, cross_entropy_weight=0.5, **options)
    some = y.clone()
    some[[1, 4]] = IGNORED
    kept = some != IGNORED
    found = MarginTask(net, loss, LAYERS)(x, some)
    expected = MarginTask(net, loss, LAYERS)(x[kept], y[kept])
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-12, atol=0)
    for g, e in zip(gradients(found["loss"], net), gradients(expected["loss"], net), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found["distance"][kept], expected["distance"], rtol=1e-12, atol=0)
    assert torch.equal(found["valid"], kept) and not found["active"][~kept].any()
    assert (found["distance"][~kept] == 0).all()


def test_a_batch_without_any_counted_sample_is_nan_as_in_torch() -> None:
    net, (x, y) = small_net(), batch()
    y[:] = IGNORED
    out = MarginTask(net, LargeMarginLoss(competitors="soft", cross_entropy_weight=1.0), LAYERS)(x, y)
    assert out["loss"].isnan() and F.cross_entropy(net(x), y).isnan()


def test_class_weights_for_another_number_of_classes_are_refused() -> None:
    net, (x, y) = small_net(), batch()
    task = MarginTask(net, LargeMarginLoss(class_weight=[1.0, 2.0]), LAYERS)
    with pytest.raises(ValueError, match="class_weight must hold one weight for each of 4 classes, got 2"):
        task(x, y)


def test_the_compiled_step_is_that_of_eager() -> None:
    found = []
    for compiled in (False, True):
        net, (x, y) = small_net(), batch()
        y[3] = IGNORED
        loss = LargeMarginLoss(3.0, competitors="soft", cross_entropy_weight=0.5, class_weight=WEIGHTS, soft_shift=0.5)
        task = MarginTask(net, loss, LAYERS)
        if compiled:
            task.compile(backend="aot_eager")
        out = task(x, y)
        out["loss"].backward()
        found.append([out["loss"].detach(), *(p.grad for p in net.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_backends_agree(name) -> None:
    net, (x, y) = small_net(), batch()
    loss = LargeMarginLoss(3.0, competitors="soft", cross_entropy_weight=0.5, soft_shift=0.5, backend=name)
    out = MarginTask(net, loss, LAYERS)(x, y)
    expected = oracle(loss, net, x, y)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-12, atol=1e-12)
    for g, e in zip(gradients(out["loss"], net), gradients(expected, net), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.skipif(EXTENSION is None, reason="the compiled extension is missing")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_direction_of_the_passes_is_the_gradient_of_the_log_odds(dtype) -> None:
    """Of the compiled call, bit by bit, with masked classes and labels, NaN and rows that do not count."""
    z = torch.randn(9, 5).to(dtype)
    z[1, 2] = z[2, 0] = z[3, 4] = -math.inf  # a rival, the label, and below both
    z[3, 0], z[4, 1], z[5, 3] = -math.inf, math.nan, math.inf
    z[6, 1:] = -math.inf
    y = torch.tensor([0, 0, 0, 0, 0, 1, 0, 4, 3])
    counted = torch.arange(9) != 7
    found = soft_cotangent(z, y, False, "auto", counted)
    assert found.dtype == dtype and not found.requires_grad and (found[7] == 0).all()
    by_autograd = soft_cotangent(z.requires_grad_(), y, True, "cpu", counted).detach()
    torch.testing.assert_close(found, by_autograd, rtol=0, atol=0, equal_nan=True)
    leaf = z.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(-functional.competitors(leaf, y, backend="reference").phi[0], leaf)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-2, atol=1e-2)

"""AdversarialMarginLoss against a literal loop over samples and DeepFool steps, in double precision."""

import copy
import itertools
import math
import sys

import pytest
import torch
from support import batches
from support.gradients import flat_gradients
from support.networks import tanh_net
from support.norms import dual_exponent, norm
from torch import Tensor, nn
from torch.nn import functional as F

from margin_kernels import AdversarialMarginLoss, MarginTask, deepfool
from margin_kernels.experiments.demo import plane
from margin_kernels.losses.adversarial import AGGREGATIONS, GRADIENTS, MIN_SHARE, SHRINKAGES

CLASSES = 4


def small_net(seed: int = 0) -> nn.Sequential:
    return tanh_net(6, 8, 8, CLASSES, seed=seed)


def mostly_right(net: nn.Module, n: int = 20) -> tuple[Tensor, Tensor]:
    """Two thirds of the samples are labelled as the net sees them, the others by chance."""
    x, y = batches.normal(n, classes=CLASSES)
    return x, torch.where(torch.arange(n) % 3 == 0, y, net(x).argmax(1))


def literal_step(gap: Tensor, w: Tensor, p: float) -> Tensor:
    """The smallest step in the p norm that closes the gap of the linearised boundary."""
    if p == 2:
        return gap.abs() * w / (w * w).sum()
    if math.isinf(p):
        return gap.abs() / w.abs().sum() * w.sign()
    if p == 1:
        i = int(w.detach().abs().argmax())
        return torch.stack([gap.abs() / w[i] if k == i else 0 * w[k] for k in range(len(w))])
    q = dual_exponent(p)
    return gap.abs() / norm(w, q) ** q * w.abs() ** (q - 1) * w.sign()


def literal_perturbation(
    loss: AdversarialMarginLoss, net: nn.Module, x: Tensor, y: int
) -> tuple[Tensor, bool, bool, int]:
    """Delta with its graph, whether x is in T, whether the boundary was crossed, and the class left behind in F."""
    z = net(x)
    order = sorted(range(CLASSES), key=lambda i: -float(z[i].detach()))[: loss.top_k + 1]
    prediction = order[0]
    right = prediction == y
    delta = torch.zeros_like(x)
    before = prediction
    for i in range(loss.max_iter + 1):
        point = (x + delta).requires_grad_()
        z = net(point)
        now = int(z.argmax())
        if (now != prediction) if right else (now == y):
            return delta, right, True, before
        if i == loss.max_iter:
            break
        before = now
        pairs = [(j, prediction) for j in order[1:]] if right else [(y, now)]
        found = []
        for upper, lower in pairs:
            gap = z[upper] - z[lower]
            (w,) = torch.autograd.grad(gap, point, create_graph=True)
            found.append((float((gap.abs() / norm(w, dual_exponent(loss.p))).detach()), gap, w))
        _, gap, w = min(found, key=lambda entry: entry[0])
        w = w.detach() if loss.gradient == "first_order" else w
        delta = delta + (1 + loss.overshoot) * literal_step(gap, w, loss.p)
    return delta, right, False, before


def literal_envelope(
    loss: AdversarialMarginLoss, net: nn.Module, x: Tensor, delta: Tensor, right: bool, y: int, before: int
):
    """A number that equals ||Delta|| and has the gradient of the envelope theorem."""
    point = (x + delta.detach()).requires_grad_()
    z = net(point)
    g = z[y] - z[int(z.argmax())] if right else z[before] - z[y]
    (w,) = torch.autograd.grad(g, point, retain_graph=True)
    return norm(delta.detach(), loss.p) + (g - g.detach()) / norm(w, dual_exponent(loss.p))


def literal_term(loss: AdversarialMarginLoss, m: Tensor, right: bool) -> Tensor:
    """lambda * shrink of one sample with the limits of [A]'s code."""
    weight, c, d = loss.weight, loss.c, loss.d
    if weight == 0:
        return 0 * m
    if loss.shrinkage == "lin":
        return -weight * c * m if right else weight * d * m
    if right:
        term = weight * torch.exp(-c * m) if loss.shrinkage == "exp" else weight / (1 + c * m)
        return term if float(term.detach()) < 50 else torch.tensor(50.0, dtype=m.dtype)
    largest = (math.log(50 / weight + 1) if loss.shrinkage == "exp" else max(0.0, 1 - weight / 50)) / d
    if float(m.detach()) > largest:
        m = torch.tensor(largest, dtype=m.dtype)
    if loss.shrinkage == "inv":
        return weight / (1 - d * m)
    term = weight * torch.exp(d * m)
    return term if float(term.detach()) < 50 else torch.tensor(50.0, dtype=m.dtype)


def literal(loss: AdversarialMarginLoss, net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, set[int]]:
    """The loss and the samples that take part."""
    m, group = {}, {}
    for n in range(len(x)):
        delta, right, crossed, before = literal_perturbation(loss, net, x[n], int(y[n]))
        if not crossed:
            continue
        m[n] = norm(delta, loss.p)
        if loss.gradient == "envelope":
            m[n] = literal_envelope(loss, net, x[n], delta, right, int(y[n]), before)
        if loss.normalize:
            m[n] = m[n] / norm(x[n], loss.p)
        group[n] = right
    chosen = set(m)
    if loss.aggregation == "min":
        kept = max(1, int(MIN_SHARE * len(x)))
        chosen = set()
        for right in (True, False):
            near = sorted(
                (n for n in m if group[n] == right), key=lambda n: float(m[n].detach()) * (1 if right else -1)
            )[:kept]
            for c in range(CLASSES):
                chosen |= set([n for n in near if int(y[n]) == c][:1])
    total = F.cross_entropy(net(x), y)
    for n in chosen:
        total = total + literal_term(loss, m[n], group[n]) / len(x)
    return total, chosen


def check(loss: AdversarialMarginLoss, net: nn.Module, x: Tensor, y: Tensor) -> None:
    expected, chosen = literal(loss, net, x, y)
    ours = loss.statistics(net(x), y, net, x)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-9, atol=0)
    assert set(ours.selected.nonzero().flatten().tolist()) == chosen
    grad = flat_gradients(expected, net)
    torch.testing.assert_close(flat_gradients(ours.loss, net), grad, rtol=1e-7, atol=1e-9 * float(grad.abs().max()))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    ("aggregation", "shrinkage", "normalize"), list(itertools.product(AGGREGATIONS, SHRINKAGES, [False, True]))
)
def test_value_and_gradient_equal_a_literal_loop(aggregation, shrinkage, normalize, gradient):
    net = small_net()
    loss = AdversarialMarginLoss(
        weight=3.0, aggregation=aggregation, shrinkage=shrinkage, normalize=normalize, gradient=gradient, c=1.5, d=0.4
    )
    check(loss, net, *mostly_right(net))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
def test_every_norm_equals_a_literal_loop(p, gradient):
    net = small_net(seed=2)
    check(AdversarialMarginLoss(p=p, aggregation="avg", gradient=gradient, c=1.0, d=0.2), net, *mostly_right(net))


@pytest.mark.parametrize(("max_iter", "top_k", "overshoot"), [(1, 3, 0.02), (2, 1, 0.1), (5, 2, 1e-3)])
def test_iterations_competitors_and_overshoot(max_iter, top_k, overshoot):
    net = small_net(seed=3)
    loss = AdversarialMarginLoss(
        aggregation="avg", max_iter=max_iter, top_k=top_k, overshoot=overshoot, shrinkage="lin"
    )
    check(loss, net, *mostly_right(net))


@pytest.fixture
def as_on_a_device(monkeypatch):
    """The way that never reads a mask, which a GPU takes."""
    # by their modules: the function margin_kernels.deepfool hides the module of that name
    for name in ("margin_kernels.deepfool", "margin_kernels.losses.adversarial"):
        monkeypatch.setattr(sys.modules[name], "host_sees", lambda x: False)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("max_iter", [5, 12])
def test_the_way_without_a_look_at_the_mask_gives_the_same(as_on_a_device, max_iter, aggregation, gradient):
    net = small_net()
    x, y = mostly_right(net)
    loss = AdversarialMarginLoss(weight=3.0, aggregation=aggregation, gradient=gradient, max_iter=max_iter, d=0.4)
    check(loss, net, x, y)
    # fewer samples take part than the slots that are kept for them
    check(loss, net, x[:12], torch.zeros_like(y[:12]))


def test_failed_attacks_are_left_out():
    net = small_net()
    x, y = mostly_right(net)
    out = AdversarialMarginLoss(aggregation="avg", max_iter=1, overshoot=0.0).statistics(net(x), y, net, x)
    assert 0 < out.success.sum() < len(x) and torch.equal(out.selected, out.success)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("weight", [0, 1, 15, 32, 60])
@pytest.mark.parametrize("shrinkage", SHRINKAGES)
def test_the_limit_is_on_weight_times_shrink(shrinkage, weight, gradient):
    """Slopes that put samples on both sides of every limit; values and gradients of a literal loop."""
    net = small_net()
    x, y = mostly_right(net)
    for c, d in ((1.5, 0.4), (0.01, 1.0), (2.0, 30.0)):
        loss = AdversarialMarginLoss(weight, c, d, aggregation="avg", shrinkage=shrinkage, gradient=gradient)
        check(loss, net, x, y)


@pytest.mark.parametrize(
    ("shrinkage", "weight", "value"),
    [("exp", 32.0, 50.0), ("exp", 60.0, 50.0), ("exp", 1.0, 50.0), ("inv", 32.0, 50.0), ("inv", 60.0, 60.0)],
)
def test_far_misclassified_samples_count_the_limit_and_have_no_gradient(shrinkage, weight, value):
    net = small_net()
    x, y = mostly_right(net)
    y = (net(x).argmax(1) + 1) % CLASSES
    loss = AdversarialMarginLoss(weight, d=1e4, aggregation="avg", shrinkage=shrinkage)
    out = loss.statistics(net(x), y, net, x)
    assert not out.correct.any() and out.selected.sum() > 10
    expected = out.nll.mean() + value * out.selected.sum() / len(x)
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-12, atol=0)
    entropy = flat_gradients(F.cross_entropy(net(x), y), net)
    torch.testing.assert_close(flat_gradients(out.loss, net), entropy, rtol=1e-9, atol=1e-12)


def test_with_weight_32_and_d_1_the_limit_of_exp_is_at_0446():
    """[A]'s values: a misclassified sample further than ln(50 / 32) from its label's region adds nothing to the
    gradient, a nearer one does."""
    loss = AdversarialMarginLoss()
    for m, slope in ((0.44, 32 * math.exp(0.44)), (0.45, 0.0)):
        t = torch.tensor([m], dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(loss._limited_wrong(t).sum(), t)
        assert float(grad) == pytest.approx(slope)


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
@pytest.mark.parametrize("weight", [1e-30, 1e30])
def test_extreme_weights_give_finite_terms_in_float32(shrinkage, weight):
    loss = AdversarialMarginLoss(weight, shrinkage=shrinkage)
    t = torch.tensor([0.0, 0.5, 0.999, 1.0, 2.0, 90.0, 800.0])
    for terms in (loss._limited_right(-t), loss._limited_wrong(t)):
        assert terms.isfinite().all()


def test_weight_zero_is_cross_entropy():
    net = small_net()
    x, y = mostly_right(net)
    for shrinkage in SHRINKAGES:
        out = AdversarialMarginLoss(0, aggregation="avg", d=1e6, shrinkage=shrinkage).statistics(net(x), y, net, x)
        expected = F.cross_entropy(net(x), y)
        torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(flat_gradients(out.loss, net), flat_gradients(expected, net), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_on_a_linear_classifier_the_distance_is_exact_and_all_gradients_are_the_analytic_one(p):
    torch.manual_seed(0)
    net = nn.Linear(6, CLASSES).double()
    x, y = mostly_right(net)
    y = net(x).argmax(1)
    z, q = net(x), dual_exponent(p)
    distances = []
    for n in range(len(x)):
        competitors = [j for j in range(CLASSES) if j != y[n]]
        distances.append(min((z[n, y[n]] - z[n, j]) / norm(net.weight[y[n]] - net.weight[j], q) for j in competitors))
    exact = torch.stack(distances)
    analytic = F.cross_entropy(z, y) + 2.0 / len(x) * (-exact).exp().sum()
    for gradient in ("unrolled", "envelope"):
        loss = AdversarialMarginLoss(2.0, c=1.0, aggregation="avg", gradient=gradient, overshoot=1e-9, p=p)
        out = loss.statistics(net(x), y, net, x)
        torch.testing.assert_close(out.distance, exact.detach(), rtol=1e-7, atol=0)
        assert out.success.all() and (out.iterations == 1).all()
        grad = flat_gradients(analytic, net)
        torch.testing.assert_close(flat_gradients(out.loss, net), grad, rtol=1e-6, atol=1e-7 * float(grad.abs().max()))


def test_the_envelope_is_the_derivative_of_the_deepfool_norm():
    """Moving the weights along a direction changes the norm of the perturbation as the envelope says, where DeepFool
    ends on the nearest boundary point."""
    net = small_net()
    x, _ = mostly_right(net)
    y = net(x).argmax(1)
    loss = AdversarialMarginLoss(
        aggregation="avg", gradient="envelope", shrinkage="lin", c=1.0, overshoot=1e-9, max_iter=50
    )
    torch.manual_seed(5)
    direction = [torch.randn_like(w) for w in net.parameters()]

    def norms(step: float) -> Tensor:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for w, d in zip(moved.parameters(), direction, strict=True):
                w += step * d
        return shortest(moved, x, y)

    slope = (norms(1e-5) - norms(-1e-5)) / 2e-5
    for n in range(len(x)):
        out = loss.statistics(net(x[n : n + 1]), y[n : n + 1], net, x[n : n + 1])
        nearest = shortest(net, x[n : n + 1], y[n : n + 1])[0]
        if float(out.distance[0]) > 1.001 * float(nearest):
            continue  # DeepFool missed the nearest point of the boundary
        m = -(out.loss - F.cross_entropy(net(x[n : n + 1]), y[n : n + 1])) / loss.weight
        grads = torch.autograd.grad(m, list(net.parameters()), allow_unused=True)
        along = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True) if g is not None)
        assert along == pytest.approx(float(slope[n]), rel=0.03, abs=0.01 * float(nearest))


def shortest(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Distance to the boundary of class y by projection: steps to the boundary and along it until the perturbation is
    parallel to its normal."""
    best = torch.full((len(x),), math.inf, dtype=x.dtype)
    for competitor in range(CLASSES):
        delta = torch.zeros_like(x)
        for _ in range(200):
            point = (x + delta).requires_grad_()
            z = net(point)
            g = z.gather(1, y[:, None])[:, 0] - z[:, competitor]
            (w,) = torch.autograd.grad(g.sum(), point)
            # the point of the linearised boundary nearest to x
            delta = w * ((delta * w).sum(1) - g.detach())[:, None] / (w * w).sum(1).clamp_min(1e-12)[:, None]
        z = net(x + delta).detach()
        on = (z.gather(1, y[:, None])[:, 0] - z[:, competitor]).abs() < 1e-8
        best = torch.where(on & (y != competitor), torch.minimum(best, delta.norm(dim=1)), best)
    return best


def test_distances_are_those_of_deepfool():
    net = small_net()
    x, y = mostly_right(net)
    out = AdversarialMarginLoss().statistics(net(x), y, net, x)
    found = deepfool(net, x, target=y, max_iter=5, overshoot_mode="step")
    torch.testing.assert_close(out.distance, found.distance, rtol=1e-12, atol=0)
    assert torch.equal(out.iterations, found.iterations) and torch.equal(out.label, found.label)


class Counted(nn.Module):
    """Notes the sizes of its batches in a list of the test's, which nothing takes back."""

    def __init__(self, net: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.net, self.note = net, sizes.append

    def forward(self, x: Tensor) -> Tensor:
        self.note(len(x))
        return self.net(x)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("wrong", [0, 1, 20])
def test_the_first_step_needs_no_forward_pass_of_its_own(gradient, wrong):
    """On the graph of the logits, where few samples move toward their target; the same either way."""
    net = small_net().eval()
    x, _ = mostly_right(net)
    y = net(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % CLASSES
    loss = AdversarialMarginLoss(weight=3.0, gradient=gradient, aggregation="avg")
    sizes: list[int] = []
    counted = Counted(net, sizes).eval()
    shared = MarginTask(counted, loss)(x, y)
    within = list(sizes)
    sizes.clear()
    alone = loss.statistics(counted(x), y, counted, x)
    saved = wrong < 20  # where all move toward their targets, a pass for the one candidate is cheaper on its own
    assert (sum(sizes) - sum(within), sizes[0], within[0]) == (20 * saved, 20, 20)
    for name, value in alone._asdict().items():
        if value.is_floating_point():
            torch.testing.assert_close(shared[name], value, rtol=1e-11, atol=1e-12)
        else:
            assert torch.equal(shared[name], value)
    expected = flat_gradients(alone.loss, net)
    torch.testing.assert_close(flat_gradients(shared["loss"], net), expected, rtol=1e-9, atol=1e-11)


class Dropping(nn.Module):
    """Dropout as a function, which no module tells of: 0.3 of 8 hidden units; the last column of x is the number of the
    sample, by which a model with `mask` [N, 8] finds the mask of each row."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.body = small_net()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[1](self.body[0](x[:, :6]))
        h = F.dropout(h, 0.3, self.training) if self.mask is None else h * self.mask[x[:, 6].long()]
        return self.body[4](self.body[3](self.body[2](h)))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_dropout_holds_the_masks_of_the_forward_pass(gradient, aggregation):
    model = Dropping()
    x, y = mostly_right(model.body)
    x = torch.cat([x, torch.arange(len(x))[:, None] + 0.5], 1)
    loss = AdversarialMarginLoss(weight=3.0, gradient=gradient, aggregation=aggregation, shrinkage="inv")
    torch.manual_seed(7)
    out = MarginTask(model, loss)(x, y)
    after = torch.rand(3)
    torch.manual_seed(7)
    mask = F.dropout(torch.ones(len(x), 8, dtype=x.dtype), 0.3)
    assert torch.equal(after, torch.rand(3))  # the loss drew nothing of its own
    fixed = Dropping(mask).eval()
    expected = loss.statistics(fixed(x), y, fixed, x)
    assert torch.equal(out["selected"], expected.selected) and expected.selected.any()
    torch.testing.assert_close(out["loss"], expected.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(out["distance"], expected.distance, rtol=1e-9, atol=0)
    grad = flat_gradients(expected.loss, fixed)
    torch.testing.assert_close(flat_gradients(out["loss"], model), grad, rtol=1e-7, atol=1e-9 * float(grad.abs().max()))


def test_without_a_task_dropout_holds_masks_drawn_once():
    model = Dropping()
    x, y = mostly_right(model.body)
    x = torch.cat([x, torch.arange(len(x))[:, None] + 0.5], 1)
    logits = model(x)
    torch.manual_seed(7)
    out = AdversarialMarginLoss().statistics(logits, y, model, x)
    torch.manual_seed(7)
    fixed = Dropping(F.dropout(torch.ones(len(x), 8, dtype=x.dtype), 0.3)).eval()
    expected = AdversarialMarginLoss().statistics(fixed(x), y, fixed, x)
    torch.testing.assert_close(out.distance, expected.distance, rtol=1e-9, atol=0)


def test_batch_norm_uses_running_statistics_and_keeps_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    x, y = mostly_right(net)
    net.train()
    loss = AdversarialMarginLoss(weight=3.0)
    with torch.no_grad():
        evaluated = copy.deepcopy(net)
        evaluated(x)  # the one update of the running statistics
    evaluated.eval()
    out = MarginTask(net, loss)(x, y)
    assert net.training and net[1].training and int(net[1].num_batches_tracked) == int(evaluated[1].num_batches_tracked)
    torch.testing.assert_close(net[1].running_mean, evaluated[1].running_mean)
    found = deepfool(evaluated, x, target=y, max_iter=5, overshoot_mode="step")
    torch.testing.assert_close(out["distance"], found.distance, rtol=1e-12, atol=0)
    out["loss"].backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in net.parameters())


@pytest.mark.parametrize("gradient", ["unrolled", "envelope"])
def test_the_toy_of_two_rectangles_reaches_the_maximal_margin(gradient):
    """[A]'s 2-D toy with its batches, optimiser and halved learning rates, in 40 epochs and with a linear classifier:
    the rectangles are 2 apart, so that no classifier keeps more than 1 from both."""
    x, y = plane.rectangles(200, seed=0)
    torch.manual_seed(0)
    model = plane.NETWORKS["linear"]()
    plane.train(model, plane.LOSSES[f"MIN EXP, {gradient}"], x, y, epochs=40, seed=1)
    (layer,) = model
    w, b = layer.weight[1] - layer.weight[0], layer.bias[1] - layer.bias[0]
    distances = ((2 * y - 1) * (x @ w + b) / w.norm()).detach()
    assert float(distances.min()) >= 0.98


def test_under_no_grad_the_task_returns_logit_statistics():
    net = small_net()
    x, y = mostly_right(net)
    with torch.no_grad():
        out = MarginTask(net, AdversarialMarginLoss())(x, y)
    assert set(out) == {"output", "nll", "gap", "competitor", "loss", "partial", "target", "valid"}
    torch.testing.assert_close(out["loss"], F.cross_entropy(net(x), y).detach())
    torch.testing.assert_close(out["nll"].mean(), F.cross_entropy(net(x), y).detach())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_without_gradients_the_loss_has_its_value(gradient, mode):
    net = small_net()
    x, y = mostly_right(net)
    loss = AdversarialMarginLoss(weight=3.0, gradient=gradient, aggregation="avg", normalize=True)
    expected = loss.statistics(net(x), y, net, x)
    with mode():
        own_x, own_y = x.clone(), y.clone()
        found = loss.statistics(net(own_x), own_y, net, own_x)
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other.detach(), rtol=1e-12, atol=0)
        assert not value.requires_grad


def test_an_image_that_is_zero_has_no_relative_distance_and_no_part():
    net = small_net()
    x, y = mostly_right(net)
    x[4] = 0
    y[4] = net(x[4:5]).argmax(1)[0]
    for shrinkage in SHRINKAGES:
        loss = AdversarialMarginLoss(weight=3.0, aggregation="avg", normalize=True, shrinkage=shrinkage)
        out = loss.statistics(net(x), y, net, x)
        assert math.isinf(out.distance[4]) and out.success[4] and not out.selected[4]
        others = torch.arange(len(x)) != 4
        part = loss.statistics(net(x[others]), y[others], net, x[others])
        share = (part.loss - part.nll.mean()) * (len(x) - 1) / len(x)
        torch.testing.assert_close(out.loss, share + F.cross_entropy(net(x), y), rtol=1e-10, atol=0)
        assert flat_gradients(out.loss, net).isfinite().all()


LAYERS = {
    "hardsigmoid": (nn.Hardsigmoid(), r"hardsigmoid: write it as torch.clamp\(x / 6 \+ 0.5, 0, 1\)"),
    "cdist": (None, "cdist: write the distances with basic operations"),
    "custom": (None, r"an operation of the model: take gradient.*once_differentiable"),
}


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Through(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.body, self.name = small_net(), name
        self.centres = nn.Parameter(torch.randn(8, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body[0](x)
        if self.name == "cdist":
            h = torch.cdist(h, self.centres)
        else:
            h = Twice.apply(h) if self.name == "custom" else F.hardsigmoid(h)
        return self.body[2:](h)


@pytest.mark.parametrize("name", list(LAYERS))
def test_an_operation_without_a_second_derivative_is_named_in_the_forward_pass(name):
    net = Through(name)
    x, y = mostly_right(net)
    for how in (lambda loss: MarginTask(net, loss)(x, y)["loss"], lambda loss: loss(net(x), y, net, x)):
        with pytest.raises(
            ValueError, match=f"a second derivative is needed, and PyTorch has none of {LAYERS[name][1]}"
        ):
            how(AdversarialMarginLoss())
        for gradient in ("envelope", "first_order"):
            value = how(AdversarialMarginLoss(gradient=gradient, aggregation="avg"))
            assert flat_gradients(value, net).isfinite().all()


def test_fused_attention_is_refused_for_unrolled_gradients():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(6, 12).double(), nn.Linear(12, CLASSES).double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x).view(-1, 1, 3, 4)
            return self.head(F.scaled_dot_product_attention(h, h, h).reshape(*x.shape[:-1], 12))

    torch.manual_seed(0)
    net = Attention()
    x, y = mostly_right(net)
    with pytest.raises(ValueError, match=r"attention.*SDPBackend.MATH"):
        MarginTask(net, AdversarialMarginLoss())(x, y)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        check(AdversarialMarginLoss(aggregation="avg"), net, x, y)


def test_nan_logits_give_a_nan_loss_and_distance():
    net = small_net()
    x, y = mostly_right(net)
    x[3, 2] = math.nan
    out = AdversarialMarginLoss(aggregation="avg").statistics(net(x), y, net, x)
    assert out.loss.isnan() and out.distance[3].isnan() and not out.selected[3]
    assert not out.distance[torch.arange(len(x)) != 3].isnan().any()


class Masked(nn.Module):
    """A net of CLASSES classes as one of two more, whose logits are -inf; class c is class KEPT[c] then."""

    KEPT = (0, 2, 3, 5)

    def __init__(self, net: nn.Module, alone: int | None = None) -> None:
        super().__init__()
        self.net, self.alone = net, alone

    def forward(self, x: Tensor) -> Tensor:
        z = self.net(x)
        wide = torch.full((len(z), CLASSES + 2), -math.inf, dtype=z.dtype).index_copy(1, torch.tensor(self.KEPT), z)
        if self.alone is None:
            return wide
        # samples far to the right have one class left
        only = (x[:, :1] > 5) & (torch.arange(CLASSES + 2) != self.alone)
        return wide.masked_fill(only, -math.inf)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_classes_change_nothing(request, aggregation, gradient, device):
    if device:
        request.getfixturevalue("as_on_a_device")
    net = small_net()
    x, y = mostly_right(net)
    loss = AdversarialMarginLoss(weight=3.0, aggregation=aggregation, gradient=gradient, d=0.4)
    expected = loss.statistics(net(x), y, net, x)
    wide = Masked(net)
    found = MarginTask(wide, loss)(x, torch.tensor(Masked.KEPT)[y])
    torch.testing.assert_close(found["distance"], expected.distance, rtol=1e-11, atol=0)
    assert torch.equal(found["selected"], expected.selected)
    torch.testing.assert_close(found["loss"], expected.loss, rtol=1e-11, atol=0)
    grad = flat_gradients(expected.loss, net)
    torch.testing.assert_close(flat_gradients(found["loss"], net), grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_sample_with_one_class_left_takes_no_part(request, gradient, device):
    if device:
        request.getfixturevalue("as_on_a_device")
    net = small_net()
    x, y = mostly_right(net)
    x[3, 0] = 10
    y = torch.tensor(Masked.KEPT)[y]
    y[3] = 2
    wide = Masked(net, alone=2)
    loss = AdversarialMarginLoss(weight=3.0, aggregation="avg", gradient=gradient, d=0.4)
    out = loss.statistics(wide(x), y, wide, x)
    assert math.isinf(out.distance[3]) and not out.success[3] and not out.selected[3] and out.iterations[3] == 0
    others = torch.arange(len(x)) != 3
    part = loss.statistics(wide(x[others]), y[others], wide, x[others])
    share = (part.loss - part.nll.mean()) * (len(x) - 1) / len(x)
    torch.testing.assert_close(out.loss - out.nll.mean(), share, rtol=1e-10, atol=0)
    assert flat_gradients(out.loss, net).isfinite().all()


def test_half_precision_measures_in_float32():
    net = small_net()
    x, y = mostly_right(net)
    exact = AdversarialMarginLoss(weight=3.0).statistics(net(x), y, net, x)
    half = copy.deepcopy(net).bfloat16()
    out = AdversarialMarginLoss(weight=3.0).statistics(half(x.bfloat16()), y, half, x.bfloat16())
    assert out.loss.dtype == out.distance.dtype == torch.float32
    both = exact.success & out.success
    assert both.sum() > 10
    torch.testing.assert_close(out.distance[both].double(), exact.distance[both], rtol=0.2, atol=0.05)
    flat_gradients(out.loss, half)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_distances_are_measured_outside_of_autocast(gradient):
    net = small_net().float()
    x, y = mostly_right(net.double())
    net, x = net.float(), x.float()
    task = MarginTask(net, AdversarialMarginLoss(weight=3.0, gradient=gradient))
    plain = task.loss.statistics(net(x), y, net, x)._asdict()  # as under autocast: forward passes of its own
    with torch.autocast("cpu", torch.bfloat16):
        mixed = task(x, y)
    assert mixed["output"].dtype == torch.bfloat16
    torch.testing.assert_close(mixed["distance"], plain["distance"], rtol=0, atol=0)
    share = plain["loss"] - plain["nll"].mean()
    torch.testing.assert_close(mixed["loss"] - mixed["nll"].mean(), share, rtol=1e-5, atol=1e-6)
    grad = flat_gradients(share, net)
    torch.testing.assert_close(flat_gradients(mixed["loss"] - mixed["nll"].mean(), net), grad, rtol=0.02, atol=0.05)


def test_an_empty_batch_and_a_batch_of_one():
    net = small_net()
    x, y = mostly_right(net)
    one = AdversarialMarginLoss().statistics(net(x[:1]), y[:1], net, x[:1])
    assert int(one.selected.sum()) == int(one.success.sum()) == 1
    none = AdversarialMarginLoss().statistics(net(x[:0]), y[:0], net, x[:0])
    assert none.distance.shape == (0,) and none.selected.shape == (0,)


def test_equal_margins_take_the_first_sample():
    net = small_net()
    x, y = mostly_right(net)
    x, y = x[1:2].repeat(10, 1), y[1:2].repeat(10)
    out = AdversarialMarginLoss().statistics(net(x), y, net, x)
    assert out.selected.nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1}, ValueError, "weight must be finite and >= 0, got -1"),
        ({"c": 0}, ValueError, "c must be finite and > 0, got 0"),
        ({"aggregation": "max"}, ValueError, "aggregation must be one of 'avg', 'min', got 'max'"),
        ({"shrinkage": "log"}, ValueError, "shrinkage must be one of 'lin', 'exp', 'inv', got 'log'"),
        ({"gradient": "second"}, ValueError, "gradient must be one of 'unrolled', 'envelope', 'first_order'"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1, got 0"),
        ({"max_iter": 0}, ValueError, "max_iter must be >= 1"),
        ({"p": 0.5}, ValueError, "p must be >= 1"),
        ({"normalize": 1}, TypeError, "normalize must be True or False, got int"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        AdversarialMarginLoss(**arguments)


def test_wrong_inputs_are_named():
    net = small_net()
    x, y = mostly_right(net)
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor \[N, \*\], got torch.int64"):
        AdversarialMarginLoss()(net(x), y, net, torch.zeros(20, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="layers must be None for AdversarialMarginLoss"):
        MarginTask(net, AdversarialMarginLoss(), layers=("input",))
    with pytest.raises(ValueError, match="target must be in"):
        AdversarialMarginLoss()(net(x), y + CLASSES, net, x)

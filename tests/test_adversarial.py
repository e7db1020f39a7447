"""AdversarialMarginLoss against a literal loop over samples and DeepFool steps, in double precision."""

import copy
import itertools
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from margin_kernels import AdversarialMarginLoss, MarginTask, deepfool
from margin_kernels.experiments import toy
from margin_kernels.losses.adversarial import AGGREGATIONS, GRADIENTS, MIN_SHARE, SHRINKAGES, TERM_LIMIT

CLASSES = 4


def small_net(seed: int = 0) -> nn.Sequential:
    """Smooth, so that second derivatives count."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


def batch(net: nn.Module, n: int = 20) -> tuple[Tensor, Tensor]:
    """Two thirds of the samples are labelled as the net sees them, the others by chance."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (n,), generator=generator)
    return x, torch.where(torch.arange(n) % 3 == 0, y, net(x).argmax(1))


def norm(v: Tensor, p: float) -> Tensor:
    if math.isinf(p):
        return v.abs().max()
    return v.abs().sum() if p == 1 else v.abs().pow(p).sum().pow(1 / p)


def dual(p: float) -> float:
    return {1: math.inf, math.inf: 1.0}.get(p) or p / (p - 1)


def literal_step(gap: Tensor, w: Tensor, p: float) -> Tensor:
    """The smallest step in the p norm that closes the gap of the linearised boundary."""
    if p == 2:
        return gap.abs() * w / (w * w).sum()
    if math.isinf(p):
        return gap.abs() / w.abs().sum() * w.sign()
    if p == 1:
        i = int(w.detach().abs().argmax())
        return torch.stack([gap.abs() / w[i] if k == i else 0 * w[k] for k in range(len(w))])
    q = dual(p)
    return gap.abs() / norm(w, q) ** q * w.abs() ** (q - 1) * w.sign()


def literal_perturbation(
    loss: AdversarialMarginLoss, net: nn.Module, x: Tensor, y: int
) -> tuple[Tensor, bool, bool, int]:
    """Delta with its graph, whether x is in T, whether the boundary was crossed, and the class left behind in F."""
    z = net(x)
    order = sorted(range(CLASSES), key=lambda i: -float(z[i].detach()))[: loss.candidates]
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
            found.append((float((gap.abs() / norm(w, dual(loss.p))).detach()), gap, w))
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
    return norm(delta.detach(), loss.p) + (g - g.detach()) / norm(w, dual(loss.p))


def literal_term(loss: AdversarialMarginLoss, m: Tensor, right: bool) -> Tensor:
    t = -loss.c * m if right else loss.d * m
    if loss.shrinkage == "exp":
        if not right and float(t.detach()) > math.log(50 / loss.weight + 1):
            t = torch.tensor(math.log(50 / loss.weight + 1), dtype=t.dtype)
        return t.exp()
    if loss.shrinkage == "inv":
        return torch.tensor(50.0, dtype=t.dtype) if float(t.detach()) >= 0.98 else 1 / (1 - t)
    return t if float(t.detach()) < 50 else torch.tensor(50.0, dtype=t.dtype)


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
        total = total + loss.weight / len(x) * literal_term(loss, m[n], group[n])
    return total, chosen


def gradients(value: Tensor, net: nn.Module, retain_graph: bool = False) -> Tensor:
    grads = torch.autograd.grad(value, list(net.parameters()), allow_unused=True, retain_graph=retain_graph)
    return torch.cat(
        [g.flatten() if g is not None else 0 * w.flatten() for g, w in zip(grads, net.parameters(), strict=True)]
    )


def check(loss: AdversarialMarginLoss, net: nn.Module, x: Tensor, y: Tensor) -> None:
    expected, chosen = literal(loss, net, x, y)
    ours = loss.margins(net(x), y, net, x)
    torch.testing.assert_close(ours.loss, expected, rtol=1e-9, atol=0)
    assert set(ours.selected.nonzero().flatten().tolist()) == chosen
    grad = gradients(expected, net)
    torch.testing.assert_close(gradients(ours.loss, net), grad, rtol=1e-7, atol=1e-9 * float(grad.abs().max()))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize(
    ("aggregation", "shrinkage", "normalize"), list(itertools.product(AGGREGATIONS, SHRINKAGES, [False, True]))
)
def test_value_and_gradient_equal_a_literal_loop(aggregation, shrinkage, normalize, gradient):
    net = small_net()
    loss = AdversarialMarginLoss(
        weight=3.0, aggregation=aggregation, shrinkage=shrinkage, normalize=normalize, gradient=gradient, c=1.5, d=0.4
    )
    check(loss, net, *batch(net))


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
def test_every_norm_equals_a_literal_loop(p, gradient):
    net = small_net(seed=2)
    check(AdversarialMarginLoss(p=p, aggregation="avg", gradient=gradient, c=1.0, d=0.2), net, *batch(net))


@pytest.mark.parametrize(("max_iter", "candidates", "overshoot"), [(1, 4, 0.02), (2, 2, 0.1), (5, 3, 1e-3)])
def test_iterations_candidates_and_overshoot(max_iter, candidates, overshoot):
    net = small_net(seed=3)
    loss = AdversarialMarginLoss(
        aggregation="avg", max_iter=max_iter, candidates=candidates, overshoot=overshoot, shrinkage="lin"
    )
    check(loss, net, *batch(net))


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
    x, y = batch(net)
    loss = AdversarialMarginLoss(weight=3.0, aggregation=aggregation, gradient=gradient, max_iter=max_iter, d=0.4)
    check(loss, net, x, y)
    # fewer samples take part than the slots that are kept for them
    check(loss, net, x[:12], torch.zeros_like(y[:12]))


def test_failed_attacks_are_left_out():
    net = small_net()
    x, y = batch(net)
    out = AdversarialMarginLoss(aggregation="avg", max_iter=1, overshoot=0.0).margins(net(x), y, net, x)
    assert 0 < out.success.sum() < len(x) and torch.equal(out.selected, out.success)


@pytest.mark.parametrize("shrinkage", SHRINKAGES)
def test_terms_are_cut_where_they_would_explode(shrinkage):
    net = small_net()
    x, y = batch(net)
    loss = AdversarialMarginLoss(aggregation="avg", shrinkage=shrinkage, d=1e4, weight=2.0)
    out = loss.margins(net(x), y, net, x)
    wrong = out.selected & ~out.correct
    right = out.selected & out.correct
    assert wrong.any()
    t = -loss.c * out.distance[right]
    ours = {"lin": t, "exp": t.exp(), "inv": 1 / (1 - t)}[shrinkage].sum()
    limit = {"lin": TERM_LIMIT, "exp": 50 / 2.0 + 1, "inv": TERM_LIMIT}[shrinkage]
    expected = out.nll.mean() + 2.0 / len(x) * (ours + limit * wrong.sum())
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_on_a_linear_classifier_the_distance_is_exact_and_all_gradients_are_the_analytic_one(p):
    torch.manual_seed(0)
    net = nn.Linear(6, CLASSES).double()
    x, y = batch(net)
    y = net(x).argmax(1)
    z, q = net(x), dual(p)
    distances = []
    for n in range(len(x)):
        rivals = [j for j in range(CLASSES) if j != y[n]]
        distances.append(min((z[n, y[n]] - z[n, j]) / norm(net.weight[y[n]] - net.weight[j], q) for j in rivals))
    exact = torch.stack(distances)
    analytic = F.cross_entropy(z, y) + 2.0 / len(x) * (-exact).exp().sum()
    for gradient in ("unrolled", "envelope"):
        loss = AdversarialMarginLoss(2.0, c=1.0, aggregation="avg", gradient=gradient, overshoot=1e-9, p=p)
        out = loss.margins(net(x), y, net, x)
        torch.testing.assert_close(out.distance, exact.detach(), rtol=1e-7, atol=0)
        assert out.success.all() and (out.iterations == 1).all()
        grad = gradients(analytic, net, retain_graph=True)
        torch.testing.assert_close(gradients(out.loss, net), grad, rtol=1e-6, atol=1e-7 * float(grad.abs().max()))


def test_the_envelope_is_the_derivative_of_the_deepfool_norm():
    """Moving the weights along a direction changes the norm of the perturbation as the envelope says, where DeepFool
    ends on the nearest boundary point."""
    net = small_net()
    x, _ = batch(net)
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
        out = loss.margins(net(x[n : n + 1]), y[n : n + 1], net, x[n : n + 1])
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
    for rival in range(CLASSES):
        delta = torch.zeros_like(x)
        for _ in range(200):
            point = (x + delta).requires_grad_()
            z = net(point)
            g = z.gather(1, y[:, None])[:, 0] - z[:, rival]
            (w,) = torch.autograd.grad(g.sum(), point)
            # the point of the linearised boundary nearest to x
            delta = w * ((delta * w).sum(1) - g.detach())[:, None] / (w * w).sum(1).clamp_min(1e-12)[:, None]
        z = net(x + delta).detach()
        on = (z.gather(1, y[:, None])[:, 0] - z[:, rival]).abs() < 1e-8
        best = torch.where(on & (y != rival), torch.minimum(best, delta.norm(dim=1)), best)
    return best


def test_distances_are_those_of_deepfool():
    net = small_net()
    x, y = batch(net)
    out = AdversarialMarginLoss().margins(net(x), y, net, x)
    found = deepfool(net, x, target=y, max_iter=5, overshoot_mode="step")
    torch.testing.assert_close(out.distance, found.distance, rtol=1e-12, atol=0)
    assert torch.equal(out.iterations, found.iterations) and torch.equal(out.label, found.label)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("wrong", [0, 1, 20])
def test_the_first_step_needs_no_forward_pass_of_its_own(gradient, wrong):
    """On the graph of the logits, where few samples move toward their target; the same either way."""
    net = small_net().eval()
    x, _ = batch(net)
    y = net(x).argmax(1)
    y[:wrong] = (y[:wrong] + 1) % CLASSES
    loss = AdversarialMarginLoss(weight=3.0, gradient=gradient, aggregation="avg")
    passes = []
    handle = net.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    shared = MarginTask(net, loss)(x, y)
    within = list(passes)
    passes.clear()
    alone = loss.margins(net(x), y, net, x)
    handle.remove()
    saved = wrong < 20  # where all move toward their targets, a pass for the one candidate is cheaper on its own
    assert (sum(passes) - sum(within), passes[0], within[0]) == (20 * saved, 20, 20)
    for name, value in alone._asdict().items():
        if value.is_floating_point():
            torch.testing.assert_close(shared[name], value, rtol=1e-11, atol=1e-12)
        else:
            assert torch.equal(shared[name], value)
    expected = gradients(alone.loss, net)
    torch.testing.assert_close(gradients(shared["loss"], net), expected, rtol=1e-9, atol=1e-11)


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
    x, y = batch(model.body)
    x = torch.cat([x, torch.arange(len(x))[:, None] + 0.5], 1)
    loss = AdversarialMarginLoss(weight=3.0, gradient=gradient, aggregation=aggregation, shrinkage="inv")
    torch.manual_seed(7)
    out = MarginTask(model, loss)(x, y)
    after = torch.rand(3)
    torch.manual_seed(7)
    mask = F.dropout(torch.ones(len(x), 8, dtype=x.dtype), 0.3)
    assert torch.equal(after, torch.rand(3))  # the loss drew nothing of its own
    fixed = Dropping(mask).eval()
    expected = loss.margins(fixed(x), y, fixed, x)
    assert torch.equal(out["selected"], expected.selected) and expected.selected.any()
    torch.testing.assert_close(out["loss"], expected.loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(out["distance"], expected.distance, rtol=1e-9, atol=0)
    grad = gradients(expected.loss, fixed)
    torch.testing.assert_close(gradients(out["loss"], model), grad, rtol=1e-7, atol=1e-9 * float(grad.abs().max()))


def test_without_a_task_dropout_holds_masks_drawn_once():
    model = Dropping()
    x, y = batch(model.body)
    x = torch.cat([x, torch.arange(len(x))[:, None] + 0.5], 1)
    logits = model(x)
    torch.manual_seed(7)
    out = AdversarialMarginLoss().margins(logits, y, model, x)
    torch.manual_seed(7)
    fixed = Dropping(F.dropout(torch.ones(len(x), 8, dtype=x.dtype), 0.3)).eval()
    expected = AdversarialMarginLoss().margins(fixed(x), y, fixed, x)
    torch.testing.assert_close(out.distance, expected.distance, rtol=1e-9, atol=0)


def test_batch_norm_uses_running_statistics_and_keeps_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    x, y = batch(net)
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
    x, y = toy.rectangles(200, seed=0)
    torch.manual_seed(0)
    model = toy.NETWORKS["linear"]()
    toy.train(model, toy.LOSSES[f"MIN EXP, {gradient}"], x, y, epochs=40, seed=1)
    (layer,) = model
    w, b = layer.weight[1] - layer.weight[0], layer.bias[1] - layer.bias[0]
    distances = ((2 * y - 1) * (x @ w + b) / w.norm()).detach()
    assert float(distances.min()) >= 0.98


def test_under_no_grad_the_task_returns_logit_statistics():
    net = small_net()
    x, y = batch(net)
    with torch.no_grad():
        out = MarginTask(net, AdversarialMarginLoss())(x, y)
    assert set(out) == {"output", "nll", "gap", "index"}
    torch.testing.assert_close(out["nll"].mean(), F.cross_entropy(net(x), y).detach())


def test_nan_logits_give_a_nan_loss_and_distance():
    net = small_net()
    x, y = batch(net)
    x[3, 2] = math.nan
    out = AdversarialMarginLoss(aggregation="avg").margins(net(x), y, net, x)
    assert out.loss.isnan() and out.distance[3].isnan() and not out.selected[3]
    assert not out.distance[torch.arange(len(x)) != 3].isnan().any()


def test_half_precision_measures_in_float32():
    net = small_net()
    x, y = batch(net)
    exact = AdversarialMarginLoss(weight=3.0).margins(net(x), y, net, x)
    half = copy.deepcopy(net).bfloat16()
    out = AdversarialMarginLoss(weight=3.0).margins(half(x.bfloat16()), y, half, x.bfloat16())
    assert out.loss.dtype == out.distance.dtype == torch.float32
    both = exact.success & out.success
    assert both.sum() > 10
    torch.testing.assert_close(out.distance[both].double(), exact.distance[both], rtol=0.2, atol=0.05)
    gradients(out.loss, half)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_distances_are_measured_outside_of_autocast(gradient):
    net = small_net().float()
    x, y = batch(net.double())
    net, x = net.float(), x.float()
    task = MarginTask(net, AdversarialMarginLoss(weight=3.0, gradient=gradient))
    plain = task.loss.margins(net(x), y, net, x)._asdict()  # as under autocast: forward passes of its own
    with torch.autocast("cpu", torch.bfloat16):
        mixed = task(x, y)
    assert mixed["output"].dtype == torch.bfloat16
    torch.testing.assert_close(mixed["distance"], plain["distance"], rtol=0, atol=0)
    share = plain["loss"] - plain["nll"].mean()
    torch.testing.assert_close(mixed["loss"] - mixed["nll"].mean(), share, rtol=1e-5, atol=1e-6)
    grad = gradients(share, net)
    torch.testing.assert_close(gradients(mixed["loss"] - mixed["nll"].mean(), net), grad, rtol=0.02, atol=0.05)


def test_an_empty_batch_and_a_batch_of_one():
    net = small_net()
    x, y = batch(net)
    one = AdversarialMarginLoss().margins(net(x[:1]), y[:1], net, x[:1])
    assert int(one.selected.sum()) == int(one.success.sum()) == 1
    none = AdversarialMarginLoss().margins(net(x[:0]), y[:0], net, x[:0])
    assert none.distance.shape == (0,) and none.selected.shape == (0,)


def test_equal_margins_take_the_first_sample():
    net = small_net()
    x, y = batch(net)
    x, y = x[1:2].repeat(10, 1), y[1:2].repeat(10)
    out = AdversarialMarginLoss().margins(net(x), y, net, x)
    assert out.selected.nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight": -1}, ValueError, "weight must be finite and >= 0, got -1"),
        ({"c": 0}, ValueError, "c must be finite and > 0, got 0"),
        ({"aggregation": "max"}, ValueError, "aggregation must be one of 'avg', 'min', got 'max'"),
        ({"shrinkage": "log"}, ValueError, "shrinkage must be one of 'lin', 'exp', 'inv', got 'log'"),
        ({"gradient": "second"}, ValueError, "gradient must be one of 'unrolled', 'envelope', 'first_order'"),
        ({"candidates": 1}, ValueError, "candidates is 1; allowed: at least 2"),
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
    x, y = batch(net)
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor \[N, \*\], got torch.int64"):
        AdversarialMarginLoss()(net(x), y, net, torch.zeros(20, 6, dtype=torch.long))
    with pytest.raises(ValueError, match="layers must be None for AdversarialMarginLoss"):
        MarginTask(net, AdversarialMarginLoss(), layers=("input",))
    with pytest.raises(ValueError, match="target must be in"):
        AdversarialMarginLoss()(net(x), y + CLASSES, net, x)

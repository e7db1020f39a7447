"""LargeMarginLoss against a literal loop over samples, competitors and layers, in double precision."""

import copy
import itertools
import math
import random
import re
from functools import partial

import pytest
import torch
from support import batches
from support.gradients import gradients
from support.networks import tanh_net
from support.norms import dual_norm
from torch import Tensor, nn

from margin_kernels import LargeMarginLoss, MarginTask, functional

CLASSES, LAYERS = 4, ("input", "1", "3", "output")
batch = partial(batches.normal, n=5, classes=CLASSES)


def small_net() -> nn.Sequential:
    """With taps at the input, a hidden layer, the head's input and the logits."""
    return tanh_net(6, 5, 3, CLASSES)


def activations_of(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    h1 = net[1](net[0](x))
    h2 = net[3](net[2](h1))
    return [x, h1, h2, net[4](h2)]


def oracle(loss: LargeMarginLoss, net: nn.Sequential, x: Tensor, y: Tensor) -> Tensor:
    """The definition of the loss, one sample, one competitor and one layer at a time."""
    per_sample = [oracle_sample(loss, net, x[n : n + 1], int(y[n])) for n in range(len(y))]
    total = torch.stack(per_sample)
    return {"mean": total.mean(), "sum": total.sum(), "none": total}[loss.reduction]


def oracle_sample(loss: LargeMarginLoss, net: nn.Sequential, x: Tensor, label: int) -> Tensor:
    hidden = activations_of(net, x)
    z = hidden[-1][0]
    scores = z if loss.space == "logit" else z.exp() / z.exp().sum()
    others = sorted((i for i in range(CLASSES) if i != label), key=lambda i: -float(z[i].detach()))[: loss.top_k]
    gammas = loss.gamma if isinstance(loss.gamma, list) else [loss.gamma] * len(hidden)
    weights = loss.layer_weights or [1.0] * len(hidden)
    layer_terms = []
    for h, gamma, weight in zip(hidden, gammas, weights, strict=True):
        distances = []
        for i in others:
            gap = scores[i] - scores[label]
            (g,) = torch.autograd.grad(gap, h, create_graph=True)
            norm = dual_norm(g, loss.p) if loss.second_order else dual_norm(g, loss.p).detach()
            if loss.layer_scale == "numel":
                norm = norm / h.numel()
            distances.append(-gap / (loss.eps + norm))
        layer_terms.append(weight * aggregate(loss, distances, gamma))
    margin = sum(layer_terms) / (sum(weights) if loss.layer_reduction == "mean" else 1.0)
    nll = torch.logsumexp(z, 0) - z[label]
    return loss.margin_weight * margin + loss.cross_entropy_weight * nll


def aggregate(loss: LargeMarginLoss, distances: list[Tensor], gamma: float) -> Tensor:
    cap = math.inf if loss.alpha is None else loss.alpha * gamma

    def term(d: Tensor) -> Tensor:
        return (gamma - d).clamp(0, cap)

    if loss.aggregation == "mean_distance":
        return term(torch.stack(distances).mean())
    terms = torch.stack([term(d) for d in distances])
    return {"max": terms.max(), "sum": terms.sum(), "mean": terms.mean()}[loss.aggregation]


GRID = list(
    itertools.product(
        ("max", "sum", "mean", "mean_distance"),
        ("logit", "probability"),
        (False, True),
        (None, 0.6),
        (1.5, [0.5, 2.0, 1.0, 1.5]),
        (1, CLASSES - 1),
        (1, 1.5, 2, 3, "inf"),
    )
)


# 160 of the 640 combinations, always the same; each value of each option occurs in at least 20 of them.
@pytest.mark.parametrize("case", random.Random(5).sample(GRID, 160), ids=lambda c: "-".join(map(str, c)))
def test_value_and_gradient_equal_the_literal_loop(case: tuple) -> None:
    aggregation, space, second_order, alpha, gamma, k, p = case
    loss = LargeMarginLoss(gamma, p, k, aggregation, alpha, space=space, second_order=second_order)
    net, (x, y) = small_net(), batch()
    expected = oracle(loss, net, x, y)
    expected_gradients = gradients(expected, net)

    hidden = activations_of(net, x)
    explicit = loss(hidden[-1], y, hidden)
    through_task = MarginTask(net, loss, LAYERS)(x, y)["loss"]
    for actual in (explicit, through_task):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        for g, e in zip(gradients(actual, net), expected_gradients, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


def test_the_grid_holds_active_satisfied_and_clipped_terms() -> None:
    x, y = batch()
    for space in ("logit", "probability"):
        out = MarginTask(small_net(), LargeMarginLoss(1.5, top_k=3, space=space), LAYERS)(x, y)
        d = out["distance"]
        assert (d > 1.5).any() and ((d > 0.6) & (d < 1.5)).any() and (d < 0.6).any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("layer_reduction", ["mean", "sum"])
@pytest.mark.parametrize("layer_scale", [None, "numel"])
def test_weights_scales_and_reductions_equal_the_literal_loop(reduction, layer_reduction, layer_scale) -> None:
    loss = LargeMarginLoss(
        2.0,
        float("inf"),
        2,
        layer_weights=[1.0, 0.0, 2.0, 0.5],
        layer_scale=layer_scale,
        margin_weight=0.3,
        cross_entropy_weight=0.7,
        layer_reduction=layer_reduction,
        reduction=reduction,
    )
    net, (x, y) = small_net(), batch()
    expected = oracle(loss, net, x, y)
    actual = MarginTask(net, loss, LAYERS)(x, y)["loss"]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for g, e in zip(gradients(actual.sum(), net), gradients(expected.sum(), net), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, "inf"])
def test_distance_of_a_linear_model_is_the_distance_to_its_hyperplane(p) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 2).double()
    x, y = batch()[0], torch.tensor([0, 1, 0, 1, 1])
    w, b = model.weight[1] - model.weight[0], model.bias[1] - model.bias[0]
    sign = 2.0 * y - 1
    expected = sign * (x @ w + b) / dual_norm(w, float(p))
    out = MarginTask(model, LargeMarginLoss(p=p, eps=0.0))(x, y)
    torch.testing.assert_close(out["distance"][:, 0, 0], expected, rtol=1e-13, atol=0)


def test_first_order_gradient_of_a_linear_model_is_that_of_an_svm_with_unit_normal() -> None:
    """With D constant, gamma - d = gamma - y (w x + b) / ||w||: the hinge of an SVM whose normal has length 1."""
    torch.manual_seed(0)
    model = nn.Linear(6, 2).double()
    x, y = batch()[0], torch.tensor([0, 1, 0, 1, 1])
    sign = 2.0 * y - 1
    w, b = model.weight[1] - model.weight[0], model.bias[1] - model.bias[0]
    hinge = (0.4 - sign * (x @ w + b) / w.detach().norm()).clamp(min=0).mean()
    loss = MarginTask(model, LargeMarginLoss(0.4, eps=0.0))(x, y)["loss"]
    torch.testing.assert_close(loss, hinge, rtol=1e-13, atol=0)
    for g, e in zip(gradients(loss, model), gradients(hinge, model), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-12, atol=1e-14)


def test_second_order_gradient_passes_gradcheck_in_the_parameters() -> None:
    net, (x, y) = small_net(), batch(n=3)
    task = MarginTask(net, LargeMarginLoss(3.0, top_k=2, aggregation="sum", second_order=True), LAYERS)
    names = [name for name, _ in task.named_parameters()]

    def loss(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(task, dict(zip(names, parameters, strict=True)), (x, y))["loss"]

    parameters = tuple(p.detach().clone().requires_grad_() for p in net.parameters())
    assert torch.autograd.gradcheck(loss, parameters)


def test_first_order_gradient_is_the_slope_with_the_norms_held_fixed() -> None:
    net, (x, y) = small_net(), batch()
    loss = LargeMarginLoss(3.0, top_k=2, aggregation="sum")
    out = MarginTask(net, loss, LAYERS)(x, y)
    slope = gradients(out["loss"], net)
    directions = [torch.randn_like(p) for p in net.parameters()]

    def at(step: float) -> float:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, v in zip(moved.parameters(), directions, strict=True):
                p += step * v
            z = moved(x)
            gap = z.gather(1, out["competitor"]) - z.gather(1, y[:, None])
            d = -gap[..., None] / (loss.eps + out["norm"])
            return float((3.0 - d).clamp(min=0).sum(1).mean())

    numeric = (at(1e-6) - at(-1e-6)) / 2e-6
    analytic = sum(float((g * v).sum()) for g, v in zip(slope, directions, strict=True))
    assert analytic == pytest.approx(numeric, rel=1e-7)


@pytest.mark.parametrize("p", [2, "inf"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_the_published_tensorflow_loss_is_this_one_minus_gamma(p, alpha) -> None:
    """Softmax scores, -clip(min over classes of d, gamma (1 - alpha), gamma), D / numel for l_inf distances."""
    gamma, eps, net, (x, y) = 2.0, 1e-6, small_net(), batch()
    hidden = activations_of(net, x)
    scores = hidden[-1].softmax(1)
    label = scores.gather(1, y[:, None]).squeeze(1)
    published = []
    for h in hidden:
        distances = []
        for i in range(CLASSES):
            difference = label - scores[:, i]
            (g,) = torch.autograd.grad(difference.sum(), h, retain_graph=True)
            norm = g.abs().sum(1) / g.shape[1] if p == "inf" else g.norm(dim=1)
            distances.append(torch.where(y == i, math.inf, difference / (eps + norm)))
        nearest = torch.stack(distances, 1).min(1).values
        published.append(-nearest.clamp(gamma * (1 - alpha), gamma))
    loss = LargeMarginLoss(
        gamma, p, CLASSES - 1, alpha=alpha, space="probability", layer_scale="numel" if p == "inf" else None, eps=eps
    )
    ours = MarginTask(net, loss, LAYERS)(x, y)["loss"]
    torch.testing.assert_close(ours - gamma, torch.stack(published, 1).mean(), rtol=1e-12, atol=1e-12)


def test_statistics_are_those_of_the_formulas_and_detached() -> None:
    net, (x, y) = small_net(), batch()
    loss = LargeMarginLoss([0.5, 2.0, 1.0, 1.5], top_k=2, alpha=0.6, cross_entropy_weight=1.0)
    out = MarginTask(net, loss, LAYERS)(x, y)
    z = net(x)
    masked = z.scatter(1, y[:, None], -math.inf)
    assert torch.equal(out["competitor"], masked.topk(2).indices)
    torch.testing.assert_close(out["gap"], z.gather(1, out["competitor"]) - z.gather(1, y[:, None]))
    torch.testing.assert_close(out["nll"], nn.functional.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(out["distance"], -out["gap"][..., None] / (1e-6 + out["norm"]))
    gamma = torch.tensor(loss.gamma, dtype=torch.float64)
    shortfall = gamma - out["distance"]
    assert torch.equal(out["active"], (shortfall > 0) & (shortfall < 0.6 * gamma))
    assert out["active"].any() and not out["active"].all()
    assert [name for name, value in out.items() if value.requires_grad] == ["output", "loss"]


def test_a_large_gamma_stays_exact_in_bfloat16() -> None:
    """bfloat16 has 8 bits: gamma = 1e4 would round to 9984, and gamma - d to gamma."""
    loss = LargeMarginLoss(1e4)
    task = MarginTask(small_net(), loss, LAYERS).bfloat16()
    x, y = batch()
    out = task(x.bfloat16(), y)
    assert loss.gamma == 1e4 and out["loss"].dtype == out["norm"].dtype == torch.float32
    expected = (1e4 - out["distance"].double()).mean()
    assert abs(out["distance"].mean()) > 0.05
    assert float(out["loss"].detach()) == pytest.approx(float(expected), abs=2e-3)


def test_norms_of_a_bfloat16_model_are_near_those_in_double() -> None:
    x, y = batch()
    task = MarginTask(small_net(), LargeMarginLoss(), LAYERS)
    expected = task(x, y)["norm"]
    actual = task.bfloat16()(x.bfloat16(), y)["norm"].double()
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.01)


def test_a_nan_sample_is_nan_and_leaves_the_others_alone() -> None:
    net, (x, y) = small_net(), batch()
    task = MarginTask(net, LargeMarginLoss(top_k=2, reduction="none"), LAYERS)
    clean = task(x, y)
    x[2, 0] = math.nan
    out = task(x, y)
    others = torch.tensor([0, 1, 3, 4])
    assert out["loss"][2].isnan() and out["distance"][2].isnan().all()
    assert torch.equal(out["loss"][others], clean["loss"][others])


def test_an_empty_batch_sums_to_zero() -> None:
    out = MarginTask(small_net(), LargeMarginLoss(reduction="sum"), LAYERS)(
        torch.empty(0, 6, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    )
    assert out["loss"] == 0 and out["norm"].shape == (0, 1, 4)
    out["loss"].backward()


def test_two_evaluations_agree_bit_for_bit() -> None:
    net, (x, y) = small_net(), batch()
    task = MarginTask(net, LargeMarginLoss(top_k=3), LAYERS)
    first, second = task(x, y), task(x, y)
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = gradients(first["loss"], net), gradients(second["loss"], net)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"gamma": 0}, ValueError, "gamma must be finite and > 0, got 0"),
        ({"gamma": math.inf}, ValueError, "gamma must be finite and > 0, got inf"),
        (
            {"gamma": "1"},
            TypeError,
            "gamma must be a number, a list of numbers, one .* or .auto., got '1'",
        ),
        ({"gamma": None}, TypeError, "gamma must be a number, a list .* or .auto., got NoneType"),
        ({"gamma": []}, ValueError, "gamma must hold one number for each layer, got an empty list"),
        ({"gamma": [1, -2]}, ValueError, r"gamma\[1\] must be finite and > 0, got -2"),
        ({"gamma": [1, None]}, TypeError, r"gamma\[1\] must be a number, got NoneType"),
        ({"p": 0.5}, ValueError, 'p must be >= 1 or "inf", got 0.5'),
        ({"p": math.nan}, ValueError, 'p must be >= 1 or "inf", got nan'),
        ({"p": "two"}, TypeError, "p must be a number >= 1 or \"inf\", got 'two'"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1"),
        ({"top_k": 1.0}, TypeError, "top_k must be an integer, got float"),
        ({"aggregation": "min"}, ValueError, "aggregation must be one of 'max', 'sum', 'mean', 'mean_distance', got"),
        ({"alpha": 0.0}, ValueError, "alpha must be finite and > 0, got 0.0"),
        ({"eps": -1e-6}, ValueError, "eps must be finite and >= 0, got -1e-06"),
        ({"layer_weights": [0, 0]}, ValueError, r"layer_weights must not all be 0, got \[0, 0\]"),
        ({"layer_weights": 2.0}, TypeError, "layer_weights must be a list of numbers, one for each layer, got float"),
        ({"layer_scale": "size"}, ValueError, "layer_scale must be one of None, 'numel', got 'size'"),
        ({"space": "softmax"}, ValueError, "space must be one of 'logit', 'probability', got 'softmax'"),
        ({"margin_weight": -1.0}, ValueError, "margin_weight must be finite and >= 0, got -1.0"),
        ({"cross_entropy_weight": math.nan}, ValueError, "cross_entropy_weight must be finite and >= 0, got nan"),
        ({"second_order": "no"}, TypeError, "second_order must be True or False, got str"),
        ({"layer_reduction": "max"}, ValueError, "layer_reduction must be one of 'mean', 'sum', got 'max'"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*, got 'gpu'"),
        ({"competitors": 2}, ValueError, "competitors must be one of 'hard', 'soft', got 2"),
        ({"competitors": "soft", "top_k": 2}, ValueError, 'top_k must be 1 with competitors="soft"'),
        ({"competitors": "soft", "space": "probability"}, ValueError, "space must be 'logit' with"),
        ({"competitors": "soft", "aggregation": "sum"}, ValueError, "aggregation must be 'max' with"),
        ({"competitors": "soft", "auxiliary": "pairwise"}, ValueError, "auxiliary must be 'cross_entropy' with"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an integer, got float"),
        ({"class_weight": [1.0, -1.0]}, ValueError, r"class_weight\[1\] must be finite and >= 0, got -1.0"),
        ({"class_weight": torch.zeros(3)}, ValueError, "class_weight must not all be 0"),
        ({"class_weight": 2.0}, TypeError, "class_weight must be a list of numbers, one for each class, got float"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": 0.1, "auxiliary": "pairwise"}, ValueError, "label_smoothing must be 0 with"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_with_its_value_and_what_is_allowed(arguments, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        LargeMarginLoss(**arguments)


def test_options_for_another_number_of_layers_are_refused() -> None:
    x, y = batch()
    with pytest.raises(ValueError, match="gamma must be one number or one for each of the 4 taps, got 3"):
        MarginTask(small_net(), LargeMarginLoss([1.0, 2.0, 3.0]), LAYERS)(x, y)
    with pytest.raises(ValueError, match="layer_weights must be one number or one for each of the 4 taps, got 1"):
        MarginTask(small_net(), LargeMarginLoss(layer_weights=[1.0]), LAYERS)(x, y)


def test_more_competitors_than_other_classes_are_refused() -> None:
    x, y = batch()
    with pytest.raises(
        ValueError, match=re.escape(f"top_k must be in [1, {CLASSES - 1}] for {CLASSES} classes, got {CLASSES}")
    ):
        MarginTask(small_net(), LargeMarginLoss(top_k=CLASSES), LAYERS)(x, y)


def test_activations_that_cannot_be_measured_are_named() -> None:
    net, (x, y) = small_net(), batch()
    loss, hidden = LargeMarginLoss(), activations_of(small_net(), x)
    with pytest.raises(TypeError, match="activations must be a list of tensors, got Tensor"):
        loss(hidden[-1], y, hidden[0])
    with pytest.raises(ValueError, match=r"activations\[1\] does not require grad"):
        loss(hidden[-1], y, [hidden[0], x])
    stranger = activations_of(net, x)[1]
    with pytest.raises(ValueError, match=r"tap 'activations\[1\]' is outside the graph of the logits"):
        loss(hidden[-1], y, [hidden[0], stranger])
    with pytest.raises(ValueError, match="activations must hold at least one tensor"):
        loss(hidden[-1], y, [])


def test_the_representation_names_what_differs_from_the_default() -> None:
    assert repr(LargeMarginLoss(2.0, "inf", alpha=0.5)) == (
        "LargeMarginLoss(gamma=2, p=inf, top_k=1, aggregation='max', alpha=0.5)"
    )


def test_gaps_need_no_activations() -> None:
    z = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    loss = LargeMarginLoss(top_k=2, space="probability")
    found = loss.gaps(z, loss.targets(z, torch.tensor([0])))
    assert isinstance(found, functional.Competitors)
    s = z.exp() / z.exp().sum()
    torch.testing.assert_close(found.gap, torch.stack([s[0, 1] - s[0, 0], s[0, 2] - s[0, 0]])[None])


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_active_and_degenerate_of_the_compiled_call_are_those_of_the_formula(wide) -> None:
    """With every pair of special numbers, for gaps and norms of one type or of two."""
    numbers = torch.tensor([0.0, 1e-5, 0.5, 1.0, 2.0, -1.0, math.inf, -math.inf, math.nan])
    gap = numbers.repeat_interleave(9).view(-1, 1).repeat(2, 2)
    norm = numbers.abs().repeat(9).view(-1, 1, 1).repeat(2, 2, 3).to(wide)
    distance = -gap.unsqueeze(-1) / (1e-6 + norm)
    gamma, cap, least = torch.tensor([[1.0, 0.5, 2.0], [math.inf, 0.25, 1.0], [1e-4, 0.0, 0.5]]).to(wide).unbind(0)
    valid = torch.arange(len(gap)) < 81
    found, formula = (
        functional.flags_of(gap, norm, distance, gamma, cap, least, valid, backend) for backend in ("auto", "reference")
    )
    for name, flags, expected in zip(("active", "degenerate"), found, formula, strict=True):
        assert flags.dtype == torch.bool and torch.equal(flags, expected), name
        assert expected[:81].any() and not expected[81:].any()

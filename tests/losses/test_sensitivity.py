"""MarginSensitivityLoss against a literal loop over samples and competitors, in double precision."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from support import batches
from support.gradients import assert_equal_with_gradients, gradients
from support.networks import tanh_net
from support.norms import dual_norm
from torch import Tensor, nn

from margin_kernels import MarginSensitivityLoss, MarginTask
from margin_kernels.gradients import loop
from margin_kernels.gradients.request import explicit
from margin_kernels.losses import SensitivityMargins

CLASSES = 5
NORMS = (1, 2, 3, "inf")
batch = partial(batches.normal, n=8, classes=CLASSES, scale=2.0)


def small_net(outputs: int = CLASSES) -> nn.Sequential:
    return tanh_net(6, 7, 4, outputs)


def signs(n: int = 8) -> Tensor:
    return torch.tensor([1, -1, -1, 1, 1, -1, 1, -1])[:n]


def oracle(loss: MarginSensitivityLoss, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[int]]:
    """Equations 18 and 19 one sample and one competitor at a time: the loss of each sample and its competitor."""
    losses, chosen = [], []
    for n in range(len(y)):
        h = x[n : n + 1].detach().clone().requires_grad_()
        z, label = model(h)[0], int(y[n])
        competitors = sorted((j for j in range(len(z)) if j != label), key=lambda j: -float(z[j].detach()))
        norms = {}
        for j in competitors[: loss.top_k]:
            (g,) = torch.autograd.grad(z[label] - z[j], h, create_graph=True)
            norms[j] = dual_norm(g, loss.p)
        widest = max(norms, key=lambda j: float(norms[j].detach()))
        if loss.classification == "hinge":
            term = torch.clamp(1 + z[competitors[0]] - z[label], min=0)
        else:
            term = torch.logsumexp(z, 0) - z[label]
        losses.append(term + loss.weight * norms[widest] ** loss.power)
        chosen.append(widest)
    return torch.stack(losses), chosen


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("classification", ["hinge", "cross_entropy"])
@pytest.mark.parametrize("power", [1, 1.5, 2])
@pytest.mark.parametrize("p", NORMS)
def test_value_and_gradient_equal_the_literal_loop(p, power, classification, top_k) -> None:
    loss = MarginSensitivityLoss(0.7, p, power, classification, top_k)
    net, (x, y) = small_net(), batch()
    expected, chosen = oracle(loss, net, x, y)
    expected = expected.mean()
    out = MarginTask(net, loss)(x, y)
    assert out["competitor"].tolist() == chosen
    leaf = x.clone().requires_grad_()
    for actual in (out["loss"], loss(net(leaf), y, [leaf])):
        assert_equal_with_gradients(actual, expected, net)


def test_the_batch_holds_what_the_loop_is_compared_on() -> None:
    """Satisfied and violated hinges; the largest norm is not that of the strongest competitor, nor of the first two."""
    net, (x, y) = small_net(), batch()
    first, two, every = (MarginTask(net, MarginSensitivityLoss(top_k=c))(x, y) for c in (1, 2, None))
    assert (first["competitor"] != two["competitor"]).any() and (two["competitor"] != every["competitor"]).any()
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled[4].weight *= 6
    hinge = MarginTask(scaled, MarginSensitivityLoss())(x, y)["classification"]
    assert (hinge == 0).any() and (hinge > 0).any()
    expected = oracle(MarginSensitivityLoss(), scaled, x, y)[0].mean()
    assert_equal_with_gradients(MarginTask(scaled, MarginSensitivityLoss())(x, y)["loss"], expected, scaled)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction) -> None:
    net, (x, y) = small_net(), batch()
    loss = MarginSensitivityLoss(0.3, reduction=reduction)
    per_sample = oracle(loss, net, x, y)[0]
    expected = {"mean": per_sample.mean(), "sum": per_sample.sum(), "none": per_sample}[reduction]
    actual = MarginTask(net, loss)(x, y)["loss"]
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert_equal_with_gradients(actual.sum(), expected.sum(), net)


@pytest.mark.parametrize("p", NORMS)
def test_the_gradient_passes_gradcheck_in_the_parameters(p) -> None:
    net, (x, y) = small_net(), batch(n=4)
    task = MarginTask(net, MarginSensitivityLoss(0.5, p, classification="cross_entropy"))
    names = [name for name, _ in task.named_parameters()]

    def loss(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(task, dict(zip(names, parameters, strict=True)), (x, y))["loss"]

    assert torch.autograd.gradcheck(loss, tuple(p.detach().clone().requires_grad_() for p in net.parameters()))


@pytest.mark.parametrize("layer", ["1", "3", "output"])
def test_at_a_hidden_tap_the_norm_is_that_of_its_gradient(layer) -> None:
    net, (x, y) = small_net(), batch()
    out = MarginTask(net, MarginSensitivityLoss(0.7), layer)(x, y)
    hidden, rest = (net[:2], net[2:]) if layer == "1" else (net[:4], net[4:])
    if layer == "output":
        hidden, rest = net, nn.Identity()
    # The definition for the rest of the net with the activations as its input, in the graph of all parameters.
    losses = []
    for n in range(len(y)):
        h = hidden(x[n : n + 1])
        z, label = rest(h)[0], int(y[n])
        competitors = [j for j in range(CLASSES) if j != label]
        norms = [torch.autograd.grad(z[label] - z[j], h, create_graph=True)[0].norm() for j in competitors]
        hinge = torch.clamp(1 + max(z[j] for j in competitors) - z[label], min=0)
        losses.append(hinge + 0.7 * max(norms) ** 2)
    assert_equal_with_gradients(out["loss"], torch.stack(losses).mean(), net)


@pytest.mark.parametrize("p", NORMS)
def test_of_a_linear_model_it_is_the_hinge_and_the_widest_row_difference(p) -> None:
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(6, CLASSES).double(), batch()
    w = model.weight
    widest = torch.stack([max(dual_norm(w[i] - w[j], float(p)) for j in range(CLASSES) if j != i) for i in y.tolist()])
    z = model(x)
    competitor = z.masked_fill(nn.functional.one_hot(y, CLASSES).bool(), -math.inf).amax(1)
    hinge = torch.relu(1 + competitor - z.gather(1, y[:, None])[:, 0])
    expected = hinge.mean() + 0.2 * (widest**2).mean()
    assert_equal_with_gradients(MarginTask(model, MarginSensitivityLoss(0.2, p))(x, y)["loss"], expected, model)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("p", NORMS)
def test_one_logit_of_a_linear_model_is_the_primal_svm(p, power) -> None:
    """C || w ||_q ** power + max(0, 1 - y (w x + b))."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 1).double(), batch()[0], signs()
    f = (x @ model.weight.T + model.bias)[:, 0]
    expected = 0.3 * dual_norm(model.weight[0], float(p)) ** power + torch.relu(1 - y * f).mean()
    assert_equal_with_gradients(MarginTask(model, MarginSensitivityLoss(0.3, p, power))(x, y)["loss"], expected, model)


@pytest.mark.parametrize("classification", ["hinge", "cross_entropy"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("p", NORMS)
def test_one_logit_equals_the_literal_loop(p, flat, classification) -> None:
    net, x, y = small_net(1), batch()[0], signs()
    model = nn.Sequential(net, nn.Flatten(0)) if flat else net
    loss = MarginSensitivityLoss(0.4, p, classification=classification)
    losses = []
    for n in range(len(y)):
        h = x[n].clone().requires_grad_()
        f = net(h[None])[0, 0]
        (g,) = torch.autograd.grad(f, h, create_graph=True)
        term = torch.relu(1 - y[n] * f) if classification == "hinge" else torch.log1p(torch.exp(-y[n] * f))
        losses.append(0.4 * dual_norm(g, loss.p) ** 2 + term)
    expected = torch.stack(losses).mean()
    out = MarginTask(model, loss)(x, y)
    assert_equal_with_gradients(out["loss"], expected, net)
    torch.testing.assert_close(out["gap"], -(y * net(x)[:, 0]).detach())
    leaf = x.clone().requires_grad_()
    assert_equal_with_gradients(loss(model(leaf), y.double(), [leaf]), expected, net)


def test_one_logit_is_two_classes_at_half_its_value() -> None:
    """z = (-f / 2, f / 2): the gap of the classes is f, its gradient that of f, and cross-entropy softplus(-y f)."""
    net, x, y = small_net(1), batch()[0], signs()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            f = self.net(x)
            return torch.cat([-f / 2, f / 2], 1)

    for classification in ("hinge", "cross_entropy"):
        loss = MarginSensitivityLoss(0.4, classification=classification)
        one = MarginTask(net, loss)(x, y)
        two = MarginTask(Two(), loss)(x, (y + 1) // 2)
        assert_equal_with_gradients(one["loss"], two["loss"], net)
        for name in ("classification", "nll", "gap", "norm"):
            torch.testing.assert_close(one[name], two[name])


def test_all_top_k_are_no_top_k() -> None:
    net, (x, y) = small_net(), batch()
    every = MarginTask(net, MarginSensitivityLoss())(x, y)
    named = MarginTask(net, MarginSensitivityLoss(top_k=CLASSES - 1))(x, y)
    assert all(torch.equal(every[name], named[name]) for name in every)
    pairs = zip(gradients(every["loss"], net), gradients(named["loss"], net), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_of_equal_norms_the_stronger_other_is_differentiated() -> None:
    """Rows 1 and 2 differ from row 0 by vectors of the same norm; the bias makes class 2 the stronger competitor."""
    model = nn.Linear(2, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]]))
        model.bias.copy_(torch.tensor([0.0, 0.0, 0.5]))
    out = MarginTask(model, MarginSensitivityLoss(1.0, power=1))(
        torch.tensor([[0.01, 0.01]], dtype=torch.float64), torch.tensor([0])
    )
    assert out["competitor"].tolist() == [2] and out["norm"].tolist() == [3.0]
    slope = gradients(out["loss"], model)[0]
    # hinge: x on row 2 and -x on row 0; norm: the unit vector (0, 1) on row 2 and against it on row 0.
    expected = torch.tensor([[-0.01, -1.01], [0, 0], [0.01, 1.01]], dtype=torch.float64)
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("power", [1, 1.5, 2])
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("outputs", [1, CLASSES])
def test_a_zero_gradient_has_a_finite_derivative(p, power, outputs) -> None:
    """The last layer is 0, so are all gradients in the input; the classification loss alone remains."""
    net, (x, y) = small_net(outputs), batch()
    y = signs() if outputs == 1 else y
    with torch.no_grad():
        net[4].weight.zero_()
        net[4].bias.zero_()
    out = MarginTask(net, MarginSensitivityLoss(5.0, p, power))(x, y)
    assert torch.equal(out["norm"], torch.zeros(8, dtype=torch.float64)) and out["loss"] == 1
    plain = MarginTask(net, MarginSensitivityLoss(0.0, p, power))(x, y)
    for g, e in zip(gradients(out["loss"], net), gradients(plain["loss"], net), strict=True):
        assert torch.isfinite(g).all()
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("classification", ["hinge", "cross_entropy"])
@pytest.mark.parametrize("outputs", [1, CLASSES])
def test_a_sample_without_finite_logits_is_nan_and_leaves_the_others_alone(outputs, classification, bad) -> None:
    net, (x, y) = small_net(outputs), batch()
    y = signs() if outputs == 1 else y
    loss = MarginSensitivityLoss(classification=classification, reduction="none")
    leaf = x.clone().requires_grad_()
    clean = loss(net(leaf), y, [leaf])
    hole = torch.zeros(8, outputs, dtype=torch.float64)
    hole[2, 0] = bad
    spoilt = loss(net(leaf) + hole, y, [leaf])
    assert spoilt[2].isnan()
    others = torch.arange(8) != 2
    torch.testing.assert_close(spoilt[others], clean[others], rtol=0, atol=0)


def test_statistics_are_those_of_the_formulas_and_detached() -> None:
    net, (x, y) = small_net(), batch()
    loss = MarginSensitivityLoss(0.5, power=1)
    out = MarginTask(net, loss)(x, y)
    z = net(x).detach()
    competitor = z.masked_fill(nn.functional.one_hot(y, CLASSES).bool(), -math.inf).amax(1)
    torch.testing.assert_close(out["gap"], competitor - z.gather(1, y[:, None])[:, 0])
    torch.testing.assert_close(out["classification"], (1 + out["gap"]).clamp(min=0))
    torch.testing.assert_close(out["nll"], nn.functional.cross_entropy(z, y, reduction="none"))
    torch.testing.assert_close(out["loss"], (out["classification"] + 0.5 * out["norm"]).mean())
    assert [name for name, value in out.items() if value.requires_grad] == ["output", "loss"]
    leaf = x.clone().requires_grad_()
    direct = loss.statistics(net(leaf), y, explicit(net(leaf), [leaf], None))
    assert isinstance(direct, SensitivityMargins) and torch.equal(direct.norm, out["norm"])


def test_without_gradients_there_are_only_the_logits_statistics() -> None:
    for outputs, (x, y) in ((CLASSES, batch()), (1, (batch()[0], signs()))):
        task = MarginTask(small_net(outputs), MarginSensitivityLoss())
        full = task(x, y)
        with torch.no_grad():
            out = task(x, y)
        assert sorted(out) == ["classification", "gap", "loss", "nll", "output", "partial", "target", "valid"]
        assert all(torch.equal(out[name], full[name]) for name in out if name not in ("loss", "partial"))
        assert out["partial"] is True
        assert torch.equal(out["loss"], full["classification"].mean())


@pytest.mark.parametrize("top_k", [1, 3])
def test_only_the_chosen_pair_is_differentiated(monkeypatch, top_k) -> None:
    seen: list[bool] = []
    original = loop.gradients_at

    def spy(ends, roots, seeds, keep_graph, create_graph):
        seen.append(create_graph)
        return original(ends, roots, seeds, keep_graph, create_graph)

    monkeypatch.setattr(loop, "gradients_at", spy)
    MarginTask(small_net(), MarginSensitivityLoss(top_k=top_k))(*batch())
    assert seen == ([True] if top_k == 1 else [False] * top_k + [True])


@pytest.mark.parametrize("top_k", [None, 1])
def test_cutting_the_gradient_of_the_input_changes_no_other(monkeypatch, top_k) -> None:
    net, (x, y) = small_net(), batch()
    task = MarginTask(net, MarginSensitivityLoss(top_k=top_k))
    cut = gradients(task(x, y)["loss"], net)
    monkeypatch.setattr(loop, "EXTENSION", None)
    uncut = gradients(task(x, y)["loss"], net)
    assert all(torch.equal(a, b) for a, b in zip(cut, uncut, strict=True))


def test_the_gradient_in_an_input_that_requires_one_is_not_cut() -> None:
    net, (x, y) = small_net(), batch()
    loss = MarginSensitivityLoss(0.7, classification="cross_entropy", reduction="sum")
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(MarginTask(net, loss)(leaf, y)["loss"], leaf)
    step, direction = 1e-6, torch.randn(8, 6, dtype=torch.float64)
    ends = [MarginTask(net, loss)(x + s * step * direction, y)["loss"].detach() for s in (1, -1)]
    assert float((slope * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-6)


def batchnorm_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Dropout(0.3), nn.Linear(7, CLASSES)).double()
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2)
    return net


def test_frozen_batch_norm_measures_norms_with_running_statistics_and_gaps_with_the_batch() -> None:
    net, (x, y) = batchnorm_net(), batch()
    net[3].p = 0.0
    loss = MarginSensitivityLoss(0.7, top_k=CLASSES - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = MarginTask(net, loss, batchnorm="frozen")(x, y)
    trained, evaluated = copy.deepcopy(net), copy.deepcopy(net).eval()
    trained.load_state_dict(batchnorm_net().state_dict())
    evaluated.load_state_dict(batchnorm_net().state_dict())
    z = trained(x)
    competitor = z.masked_fill(nn.functional.one_hot(y, CLASSES).bool(), -math.inf).amax(1)
    hinge = torch.relu(1 + competitor - z.gather(1, y[:, None])[:, 0])
    norms = []
    for n in range(len(y)):
        h = x[n : n + 1].clone().requires_grad_()
        s = evaluated(h)[0]
        found = [torch.autograd.grad(s[y[n]] - s[j], h, create_graph=True)[0].norm() for j in range(CLASSES)]
        norms.append(max(found, key=lambda norm: float(norm.detach())))
    torch.testing.assert_close(out["norm"], torch.stack(norms).detach())
    torch.testing.assert_close(out["loss"], hinge.mean() + 0.7 * torch.stack(norms).square().mean())
    parts = gradients(hinge.mean(), trained), gradients(0.7 * torch.stack(norms).square().mean(), evaluated)
    expected = [a + b for a, b in zip(*parts, strict=True)]
    for g, e in zip(gradients(out["loss"], net), expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-11)


def test_frozen_batch_norm_keeps_the_dropout_masks() -> None:
    net, (x, y) = batchnorm_net(), batch()
    masks: list[Tensor] = []
    net[3].register_forward_hook(lambda module, args, output: masks.append(output == 0))
    MarginTask(net, MarginSensitivityLoss(), batchnorm="frozen")(x, y)["loss"].backward()
    assert len(masks) == 2 and torch.equal(masks[0], masks[1]) and masks[0].any()


def test_synchronised_batch_norm_is_refused() -> None:
    task = MarginTask(nn.SyncBatchNorm.convert_sync_batchnorm(batchnorm_net()), MarginSensitivityLoss())
    with pytest.raises(ValueError, match="SyncBatchNorm in training mode cannot be differentiated twice"):
        task(*batch())


def test_autocast_keeps_norm_and_loss_in_float32() -> None:
    net, (x, y) = small_net().float(), batch()
    expected = MarginTask(net, MarginSensitivityLoss(top_k=1))(x.float(), y)
    with torch.autocast("cpu", torch.bfloat16):
        out = MarginTask(net, MarginSensitivityLoss(top_k=1))(x.float(), y)
    assert out["output"].dtype == torch.bfloat16 and out["loss"].dtype == out["norm"].dtype == torch.float32
    torch.testing.assert_close(out["loss"], expected["loss"], rtol=0.05, atol=0.01)
    out["loss"].backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in net.parameters())


def test_a_bfloat16_model_is_near_the_one_in_double() -> None:
    x, y = batch()
    for outputs, target in ((CLASSES, y), (1, signs())):
        task = MarginTask(small_net(outputs), MarginSensitivityLoss(top_k=1 if outputs > 1 else None))
        expected = task(x, target)["loss"]
        actual = task.bfloat16()(x.bfloat16(), target)["loss"]
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=0.05, atol=0.01)


def test_an_empty_batch_sums_to_zero() -> None:
    for outputs in (1, CLASSES):
        out = MarginTask(small_net(outputs), MarginSensitivityLoss(reduction="sum"))(
            torch.empty(0, 6, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
        )
        assert out["loss"] == 0 and out["competitor"].shape == (0,)
        out["loss"].backward()


def test_training_lowers_the_loss_and_the_norms() -> None:
    net, (x, y) = small_net(), batch()
    x = x + 3 * nn.functional.one_hot(y, 6)
    task = MarginTask(net, MarginSensitivityLoss(0.02))
    optimiser = torch.optim.Adam(task.parameters(), 0.01)
    history = []
    for _ in range(150):
        optimiser.zero_grad()
        out = task(x, y)
        out["loss"].backward()
        optimiser.step()
        history.append(out)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert (history[-1]["gap"] < 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"weight": -0.1}, ValueError, "weight must be finite and >= 0, got -0.1"),
        ({"weight": "0.1"}, TypeError, "weight must be a number, got str"),
        ({"p": 0.5}, ValueError, 'p must be >= 1 or "inf", got 0.5'),
        ({"power": 0.5}, ValueError, "power must be finite and >= 1, got 0.5"),
        ({"power": math.inf}, ValueError, "power must be finite and >= 1, got inf"),
        ({"classification": "ce"}, ValueError, "classification must be one of 'hinge', 'cross_entropy', got 'ce'"),
        ({"top_k": 0}, ValueError, "top_k must be >= 1"),
        ({"top_k": 1.0}, TypeError, "top_k must be an integer, got float"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*, got 'gpu'"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_with_its_value_and_what_is_allowed(arguments, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        MarginSensitivityLoss(**arguments)


def test_what_cannot_be_measured_is_named() -> None:
    net, (x, y) = small_net(), batch()
    with pytest.raises(ValueError, match="MarginSensitivityLoss measures at one tap, got 2: input, 1"):
        MarginTask(net, MarginSensitivityLoss(), ("input", "1"))(x, y)
    with pytest.raises(ValueError, match="top_k must be at most the number of classes - 1 = 4, got 5"):
        MarginTask(net, MarginSensitivityLoss(top_k=5))(x, y)
    with pytest.raises(ValueError, match=r"target must be in \[0, 5\)"):
        MarginTask(net, MarginSensitivityLoss())(x, y + CLASSES)
    with pytest.raises(ValueError, match="target must be 0 or 1, or -1 or \\+1, for one logit, got 2"):
        MarginTask(small_net(1), MarginSensitivityLoss())(x, torch.full((8,), 2))
    with pytest.raises(ValueError, match=r"target must be \[N\] = \[8\] for one logit, got \[8, 2\]"):
        MarginTask(small_net(1), MarginSensitivityLoss())(x, signs()[:, None].expand(8, 2))
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"tap 'activations\[0\]' is outside the graph of the logits"):
        MarginSensitivityLoss()(net(x), y, [leaf])
    with pytest.raises(ValueError, match=r"tap 'activations\[0\]' is outside the graph of the logits"):
        MarginSensitivityLoss()(small_net(1)(leaf), signs(), [leaf.T])


def test_the_representation_names_what_differs_from_the_default() -> None:
    assert repr(MarginSensitivityLoss(0.01, "inf", 1, top_k=3)) == (
        "MarginSensitivityLoss(weight=0.01, p=inf, power=1, top_k=3)"
    )


def test_two_evaluations_agree_bit_for_bit() -> None:
    net, (x, y) = small_net(), batch()
    task = MarginTask(net, MarginSensitivityLoss())
    first, second = task(x, y), task(x, y)
    assert all(torch.equal(first[name], second[name]) for name in first)
    one, two = gradients(first["loss"], net), gradients(second["loss"], net)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_plain_pytorch_ops_give_the_same() -> None:
    net, (x, y) = small_net(), batch()
    expected = oracle(MarginSensitivityLoss(), net, x, y)[0].mean()
    task = MarginTask(net, MarginSensitivityLoss(backend="reference"))
    assert_equal_with_gradients(task(x, y)["loss"], expected, net)

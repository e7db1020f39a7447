"""OneToNLoss against equations 8 and 14 with their N x N sums, and the squared hinge against a loop."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from support import batches
from support.gradients import assert_equal_with_gradients, gradients
from torch import Tensor, nn

from margin_kernels import MarginTask, OneToNLoss
from margin_kernels.experiments import config, objectives
from margin_kernels.losses import OneToNMargins

CLASSES = 4
FORMS = [(bound, ce) for bound in ("symmetric", "positive") for ce in (False, True)]
batch = partial(batches.normal, n=9, classes=CLASSES, scale=2.0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, CLASSES)
        with torch.no_grad():
            self.head.weight *= torch.tensor([1.0, 3.0, 0.5, 2.0])[:, None]
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def oracle(z: Tensor, y: Tensor, delta: float, bound: str, cross_entropy: bool) -> Tensor:
    """-log of the ratio of equation 8, with cross_entropy of 14, for each sample: exponentials summed as printed."""
    low = 0.0 if bound == "positive" else -delta
    losses = []
    for i, c in enumerate(y.tolist()):
        own = torch.exp(delta - torch.relu(delta - z[i, c]))
        total = sum(torch.exp(z[i, k]) for k in range(z.shape[1])) if cross_entropy else own
        for j, other in enumerate(y.tolist()):
            if other != c:
                total = total + torch.exp(low + torch.relu(delta + z[j, c]))
        losses.append(-torch.log(own / total))
    return torch.stack(losses)


@pytest.mark.parametrize("delta", [0.3, 1.0, 5.0])
@pytest.mark.parametrize(("bound", "cross_entropy"), FORMS)
def test_value_and_gradient_equal_the_equations_term_by_term(bound, cross_entropy, delta) -> None:
    net, (x, y) = Net(), batch()
    loss = OneToNLoss(delta, bound, cross_entropy)
    expected = oracle(net(x), y, delta, bound, cross_entropy).mean()
    for actual in (loss(net(x), y), MarginTask(net, loss)(x, y)["loss"]):
        assert_equal_with_gradients(actual, expected, net)


def test_the_batch_has_logits_on_both_sides_of_the_bounds() -> None:
    net, (x, y) = Net(), batch()
    z = net(x).detach()
    own = z.gather(1, y[:, None])
    assert (own > 0.3).any() and (own < 0.3).any() and (z < -0.3).any() and (z > -0.3).any()
    assert len(y.unique()) == CLASSES


@pytest.mark.parametrize(("bound", "cross_entropy"), FORMS)
def test_weight_norm_divides_the_logits_by_the_norms_of_their_rows(bound, cross_entropy) -> None:
    net, (x, y) = Net(), batch()
    loss = OneToNLoss(0.4, bound, cross_entropy, weight_norm=net.head)
    scores = net(x) / net.head.weight.norm(dim=1)
    expected = oracle(scores, y, 0.4, bound, cross_entropy).mean()
    assert_equal_with_gradients(MarginTask(net, loss)(x, y)["loss"], expected, net)


def test_with_weight_norm_the_scale_of_a_row_and_its_bias_does_not_matter() -> None:
    net, (x, y) = Net(), batch()
    task = MarginTask(net, OneToNLoss(weight_norm=net.head))
    before = task(x, y)
    with torch.no_grad():
        net.head.weight[1] *= 7
        net.head.bias[1] *= 7
    after = task(x, y)
    assert not torch.allclose(before["output"], after["output"])
    torch.testing.assert_close(before["per_sample"], after["per_sample"])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction) -> None:
    net, (x, y) = Net(), batch()
    per_sample = oracle(net(x), y, 1.0, "symmetric", False)
    expected = {"mean": per_sample.mean(), "sum": per_sample.sum(), "none": per_sample}[reduction]
    loss = OneToNLoss(reduction=reduction)
    torch.testing.assert_close(loss(net(x), y), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss.statistics(net(x), y).loss, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_norm", [False, True])
def test_a_batch_of_one_class_has_no_loss_and_no_gradient(weight_norm) -> None:
    net, x = Net(), batch()[0]
    y = torch.full((9,), 2)
    head = net.head if weight_norm else None
    out = MarginTask(net, OneToNLoss(weight_norm=head))(x, y)
    assert out["loss"] == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients(out["loss"], net))
    with_cross_entropy = OneToNLoss(cross_entropy=True, weight_norm=head)
    scores = net(x) / net.head.weight.norm(dim=1) if weight_norm else net(x)
    expected = (scores.logsumexp(1) - scores[:, 2].clamp(max=1.0)).mean()
    assert_equal_with_gradients(MarginTask(net, with_cross_entropy)(x, y)["loss"], expected, net)


def test_statistics_are_those_of_the_formulas_and_detached() -> None:
    net, (x, y) = Net(), batch()
    loss = OneToNLoss(0.5)
    out = MarginTask(net, loss)(x, y)
    z = net(x).detach()
    torch.testing.assert_close(out["per_sample"], oracle(z, y, 0.5, "symmetric", False))
    torch.testing.assert_close(out["nll"], nn.functional.cross_entropy(z, y, reduction="none"))
    competitor = z.masked_fill(nn.functional.one_hot(y, CLASSES).bool(), -math.inf).amax(1)
    torch.testing.assert_close(out["gap"], competitor - z.gather(1, y[:, None])[:, 0])
    assert [name for name, value in out.items() if value.requires_grad] == ["output", "loss"]
    assert isinstance(loss.statistics(z, y), OneToNMargins)


def test_without_gradients_there_are_the_same_loss_and_statistics() -> None:
    net, (x, y) = Net(), batch()
    task = MarginTask(net, OneToNLoss(weight_norm=net.head))
    full = task(x, y)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = task(x, y)
        assert sorted(out) == ["gap", "loss", "nll", "output", "per_sample", "target", "valid"]
        assert all(torch.equal(out[name], full[name]) for name in out)


def test_the_layer_of_weight_norm_stays_the_models() -> None:
    net = Net()
    loss = OneToNLoss(weight_norm=net.head)
    task = MarginTask(net, loss)
    assert loss.weight_norm is net.head and list(loss.parameters()) == [] and loss.state_dict() == {}
    assert list(task.state_dict()) == [f"model.{name}" for name in net.state_dict()]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_copy_divides_by_the_rows_of_the_copied_layer(duplicate) -> None:
    net, (x, y) = Net(), batch()
    task = MarginTask(net, OneToNLoss(weight_norm=net.head))
    other = duplicate(task)
    assert other.loss.weight_norm is other.model.head and other.model.head is not net.head
    with torch.no_grad():
        other.model.head.weight += 1
    scores = other.model(x) / other.model.head.weight.norm(dim=1)
    expected = oracle(scores, y, 1.0, "symmetric", False).mean()
    assert_equal_with_gradients(other(x, y)["loss"], expected, other.model)
    assert task(x, y)["loss"] != other(x, y)["loss"]


@pytest.mark.parametrize("weight_norm", [False, True])
def test_a_masked_class_counts_as_a_score_at_the_lower_bound(weight_norm) -> None:
    z, y = torch.randn(4, CLASSES, dtype=torch.float64), torch.tensor([0, 0, 1, 2])
    loss = OneToNLoss(weight_norm=Net().head if weight_norm else None, reduction="none")
    z[0, 1] = -math.inf
    masked = loss(z, y)
    z[0, 1] = -1e6
    assert torch.equal(masked, loss(z, y)) and masked.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("weight_norm", [False, True])
def test_a_non_finite_logit_gives_nan_in_every_loss_that_it_enters(weight_norm, bad) -> None:
    z, y = torch.randn(4, CLASSES, dtype=torch.float64), torch.tensor([0, 0, 1, 2])
    z[0, 1] = bad  # a negative of class 1, of which sample 2 is
    loss = OneToNLoss(weight_norm=Net().head if weight_norm else None, reduction="none")(z, y)
    assert loss.isnan().tolist() == [False, False, True, False]


def test_half_precision_is_computed_in_float32() -> None:
    net, (x, y) = Net().bfloat16(), batch()
    wide = copy.deepcopy(net).float()
    loss = OneToNLoss(delta=100.25, weight_norm=net.head)
    out = MarginTask(net, loss)(x.bfloat16(), y)
    assert out["output"].dtype == torch.bfloat16 and out["loss"].dtype == torch.float32
    expected = OneToNLoss(delta=100.25, weight_norm=wide.head)(out["output"].float(), y)
    torch.testing.assert_close(out["loss"], expected, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        out = MarginTask(wide, OneToNLoss(weight_norm=wide.head))(x.float(), y)
    assert out["output"].dtype == torch.bfloat16 and out["loss"].dtype == torch.float32
    out["loss"].backward()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in wide.parameters())


@pytest.mark.parametrize("weight_norm", [False, True])
def test_the_task_compiles_as_one_graph_with_the_gradients_of_eager(weight_norm) -> None:
    net, (x, y) = Net(), batch()
    task = MarginTask(net, OneToNLoss(cross_entropy=True, weight_norm=net.head if weight_norm else None))
    compiled = torch.compile(task, fullgraph=True, backend="aot_eager")
    assert_equal_with_gradients(compiled(x, y)["loss"], task(x, y)["loss"], net)


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"delta": 0.0}, ValueError, "delta must be finite and > 0, got 0.0"),
        ({"delta": math.inf}, ValueError, "delta must be finite and > 0, got inf"),
        ({"bound": "negative"}, ValueError, "bound must be one of 'symmetric', 'positive', got 'negative'"),
        ({"cross_entropy": 1}, TypeError, "cross_entropy must be True or False, got int"),
        ({"weight_norm": True}, TypeError, r"weight_norm must be None or the model's final nn\.Linear, got bool"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"backend": "gpu"}, ValueError, "backend must be one of .*, got 'gpu'"),
    ],
    ids=str,
)
def test_a_wrong_option_is_named_with_its_value_and_what_is_allowed(arguments, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        OneToNLoss(**arguments)


def test_what_cannot_be_measured_is_named() -> None:
    net, (x, y) = Net(), batch()
    with pytest.raises(ValueError, match=r"one of 5 outputs for logits \[9, 4\]"):
        MarginTask(net, OneToNLoss(weight_norm=net.body))(x, y)
    with pytest.raises(ValueError, match=r"target must be in \[0, 4\)"):
        MarginTask(net, OneToNLoss())(x, y + CLASSES)


def test_the_representation_names_what_differs_from_the_default() -> None:
    assert repr(OneToNLoss(10.0, "positive", True)) == "OneToNLoss(delta=10, bound='positive', cross_entropy=True)"


@pytest.mark.parametrize("delta", [0.5, 2.0])
def test_the_squared_hinge_is_the_literal_sum_over_classes(delta) -> None:
    net, (x, y) = Net(), batch()
    z = net(x)
    terms = []
    for n, label in enumerate(y.tolist()):
        for c in range(CLASSES):
            shortfall = delta - z[n, c] if c == label else delta + z[n, c]
            terms.append(torch.relu(shortfall) ** 2)
    expected = torch.stack(terms).sum() / len(y)
    options = config.LossConfig(kind="squared_hinge", one_to_n=config.OneToNConfig(delta=delta))
    task = objectives.build(net, options, ())
    out = task.loss(z, y)
    assert_equal_with_gradients(out, expected, net)
    out = task(x, y)
    torch.testing.assert_close(out["loss"], expected.float())

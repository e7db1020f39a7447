"""Hinge on signed distances: the formula as a literal loop, kinks, clipping, aggregation, derivatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from margin_kernels import functional
from margin_kernels.testing import interpreted, seeded

AGGREGATIONS = ["max", "sum", "mean", "mean_distance"]


def sample(n=5, k=3, layers=2, dtype=torch.float64, seed=0):
    generator, device = seeded(seed), torch.get_default_device()
    gap = torch.randn(n, k, generator=generator, dtype=torch.float64, device="cpu")
    norm = 0.5 + torch.rand(n, k, layers, generator=generator, dtype=torch.float64, device="cpu")
    return gap.to(device, dtype), norm.to(device, dtype)


def loop(gap, norm, gamma, cap, weights, eps, aggregation, layer_reduction):
    """MATH of the loss as loops over samples, layers and competitors."""

    def term(d, layer):
        return min(max(gamma[layer] - d, 0.0), cap[layer])

    n, k, layers = norm.shape
    losses = []
    for i in range(n):
        per_layer = []
        for layer in range(layers):
            d = [-gap[i, j].item() / (eps + norm[i, j, layer].item()) for j in range(k)]
            terms = [term(x, layer) for x in d]
            per_layer.append(
                {
                    "max": max(terms),
                    "sum": sum(terms),
                    "mean": sum(terms) / k,
                    "mean_distance": term(sum(d) / k, layer),
                }[aggregation]
            )
        total = sum(w * t for w, t in zip(weights, per_layer, strict=True))
        losses.append(total / sum(weights) if layer_reduction == "mean" else total)
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("layer_reduction", ["mean", "sum"])
@pytest.mark.parametrize("cap", [None, [0.3, 0.9]])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_are_those_of_a_literal_loop(backend, aggregation, layer_reduction, cap, weights, dtype):
    gap, norm = sample(dtype=dtype)
    gamma = [0.5, 1.25]
    loss, distance = functional.margin_hinge_with_distance(
        gap, norm, gamma, cap, 1e-3, aggregation, layer_reduction, "none", weights, backend
    )
    expected = loop(
        gap.double(),
        norm.double(),
        gamma,
        cap or [math.inf] * 2,
        weights or [1.0, 1.0],
        1e-3,
        aggregation,
        layer_reduction,
    )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert loss.dtype == distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(loss.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.allclose(distance.double(), -gap.double()[..., None] / (1e-3 + norm.double()), rtol=tolerance)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("cap", [None, 0.7])
def test_first_and_second_derivatives(backend, aggregation, cap):
    gap, norm = sample(3, 2) if interpreted(backend) else sample()
    gap.requires_grad_()
    norm.requires_grad_()

    def f(gap, norm):
        return functional.margin_hinge(
            gap,
            norm,
            [0.5, 1.0],
            cap,
            aggregation=aggregation,
            reduction="none",
            layer_weights=[1.0, 3.0],
            backend=backend,
        )

    assert f(gap, norm).count_nonzero() > 0
    assert torch.autograd.gradcheck(f, (gap, norm))
    assert torch.autograd.gradgradcheck(f, (gap, norm))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_backend_has_the_gradient_of_the_reference(backend, aggregation):
    gap, norm = sample(50, 4, 3, torch.float32)
    gap.requires_grad_()
    norm.requires_grad_()
    grads = [
        torch.autograd.grad(
            functional.margin_hinge(gap, norm, 0.8, 0.9, aggregation=aggregation, backend=b), (gap, norm)
        )
        for b in (backend, "reference")
    ]
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 0 and torch.allclose(ours, theirs, rtol=1e-5, atol=1e-8)


def test_only_the_nearest_boundary_pulls_and_the_first_of_equals_wins(backend):
    gap = torch.tensor([[-1.0, -0.5, -0.5]], requires_grad=True)
    loss = functional.margin_hinge(gap, torch.ones(1, 3, 1), 1.0, eps=0.0, backend=backend)
    assert loss.item() == 0.5
    assert torch.autograd.grad(loss, gap)[0].tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_slope_is_zero_on_both_kinks(backend, aggregation):
    """gamma - d = 0 and gamma - d = cap exactly: neither counts as active."""
    for gap_value in (-1.0, 1.0):  # d = 1 = gamma and d = -1 = gamma - cap
        gap = torch.full((1, 1), gap_value, requires_grad=True)
        loss = functional.margin_hinge(
            gap, torch.ones(1, 1, 1), 1.0, 2.0, eps=0.0, aggregation=aggregation, backend=backend
        )
        assert loss.item() == (0.0 if gap_value < 0 else 2.0)
        assert torch.autograd.grad(loss, gap)[0].item() == 0.0


def test_a_norm_of_zero_gives_a_large_finite_distance(backend):
    gap = torch.tensor([[-2.0], [2.0]], requires_grad=True)
    loss, distance = functional.margin_hinge_with_distance(gap, torch.zeros(2, 1, 1), 1.0, backend=backend)
    assert torch.allclose(distance.flatten(), torch.tensor([2e6, -2e6]))
    assert torch.allclose(torch.autograd.grad(loss, gap)[0].flatten(), torch.tensor([0.0, 5e5]))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nan_shows_in_value_and_gradient_of_its_row_only(backend, aggregation):
    gap, norm = sample(3, 2, 2, torch.float32)
    gap[1, 1] = math.nan
    gap.requires_grad_()
    loss = functional.margin_hinge(gap, norm, 5.0, aggregation=aggregation, reduction="none", backend=backend)
    assert loss[1].isnan() and loss[[0, 2]].isfinite().all()
    (grad,) = torch.autograd.grad(loss.nan_to_num().sum() + loss.sum(), gap)
    assert grad[[0, 2]].isfinite().all() and grad[[0, 2]].abs().max() > 0


def test_a_large_gamma_keeps_its_digits_in_half_precision(backend):
    """relu(gamma - d) with gamma = 1e4 in bfloat16 would round the distance away."""
    gap = torch.tensor([[-1.5]], dtype=torch.bfloat16)
    loss = functional.margin_hinge(gap, torch.ones(1, 1, 1, dtype=torch.bfloat16), 1e4, eps=0.0, backend=backend)
    assert loss.item() == 9998.5


def test_reductions(backend):
    gap, norm = sample(6)
    none = functional.margin_hinge(gap, norm, 1.0, reduction="none", backend=backend)
    assert functional.margin_hinge(gap, norm, 1.0, backend=backend) == none.mean()
    assert functional.margin_hinge(gap, norm, 1.0, reduction="sum", backend=backend) == none.sum()


def test_gamma_as_number_list_or_tensor(backend):
    gap, norm = sample()
    a, b, c = (
        functional.margin_hinge(gap, norm, gamma, backend=backend)
        for gamma in (0.7, [0.7, 0.7], torch.tensor([0.7, 0.7], dtype=torch.float64))
    )
    assert a == b == c


def test_strided_inputs_and_an_empty_batch(backend):
    gap, norm = sample(4, 3, 2)
    plain = functional.margin_hinge(gap, norm, 1.0, reduction="none", backend=backend)
    strided = functional.margin_hinge(
        gap.t().contiguous().t(),
        norm.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        1.0,
        reduction="none",
        backend=backend,
    )
    assert torch.equal(plain, strided)
    assert functional.margin_hinge(gap[:0], norm[:0], 1.0, reduction="none", backend=backend).shape == (0,)


WRONG = [
    (dict(gap=torch.zeros(4)), ValueError, "gap must have shape [N, k] with k >= 1, got [4]"),
    (dict(norm=torch.zeros(4, 3)), ValueError, "norm must have shape [N, k, L], got [4, 3]"),
    (dict(norm=torch.zeros(3, 3, 2)), ValueError, "norm must have shape [4, 3, L] to match gap, got [3, 3, 2]"),
    (dict(gamma=[1.0]), ValueError, "gamma must have shape [2], one entry per layer, got [1]"),
    (dict(cap=[1.0, 2.0, 3.0]), ValueError, "cap must have shape [2], one entry per layer, got [3]"),
    (dict(layer_weights=[1.0]), ValueError, "weight must have shape [2], one entry per layer, got [1]"),
    (dict(eps=-1.0), ValueError, "eps must be finite and >= 0, got -1"),
    (dict(aggregation="median"), ValueError, "aggregation must be one of max, sum, mean, mean_distance, got median"),
    (dict(layer_reduction="max"), ValueError, "layer_reduction must be one of mean, sum, got max"),
    (dict(reduction="max"), ValueError, "reduction must be one of mean, sum, none, got max"),
    (dict(gap=torch.zeros(4, 3).long()), TypeError, "gap must be float64, float32, bfloat16 or float16, got int64"),
    (dict(gamma=torch.ones(2, requires_grad=True)), ValueError, "gamma must not require grad: it is a hyper-parameter"),
]


@pytest.mark.parametrize("change,error,words", WRONG, ids=[words[:40] for _, _, words in WRONG])
def test_a_wrong_argument_is_named_in_the_same_words_on_every_backend(backend, change, error, words):
    arguments = dict(gap=torch.zeros(4, 3), norm=torch.ones(4, 3, 2), gamma=1.0) | change
    device = torch.get_default_device()  # the tensors of WRONG were made before it was set
    arguments = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    with pytest.raises(error) as caught:
        functional.margin_hinge(**arguments, backend=backend)
    assert words in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    gap=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=6),
    norm=st.floats(0.01, 10),
    gamma=st.floats(0.125, 4, width=32),
    alpha=st.floats(0.125, 1, width=32),
)
def test_property_loss_lies_between_zero_and_its_cap_and_max_bounds_mean(gap, norm, gamma, alpha):
    gaps, norms = torch.tensor([gap]), torch.full((1, len(gap), 1), norm)
    values = {a: functional.margin_hinge(gaps, norms, gamma, alpha * gamma, aggregation=a).item() for a in AGGREGATIONS}
    for name in ("max", "mean", "mean_distance"):
        assert 0 <= values[name] <= alpha * gamma * (1 + 1e-6)
    assert values["mean"] <= values["max"] * (1 + 1e-5) + 1e-7
    assert values["sum"] == pytest.approx(values["mean"] * len(gap), rel=1e-5, abs=1e-7)

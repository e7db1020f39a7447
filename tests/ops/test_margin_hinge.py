"""Hinge on signed distances: the formula as a literal loop, kinks, clipping, aggregation, derivatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from margin_kernels import backends, functional
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


def distances(gap, norm, eps, backend):
    """The second output of the op, of which the public function returns the loss alone."""
    gamma = torch.ones(norm.shape[2], dtype=torch.promote_types(torch.float32, norm.dtype), device=norm.device)
    return functional.hinge_of(gap, norm, gamma, None, None, None, eps, "max", "mean", backend)[1]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("layer_reduction", ["mean", "sum"])
@pytest.mark.parametrize("cap", [None, [0.3, 0.9]])
@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_values_are_those_of_a_literal_loop(backend, aggregation, layer_reduction, cap, weights, dtype):
    gap, norm = sample(dtype=dtype)
    gamma = [0.5, 1.25]
    loss = functional.margin_hinge(gap, norm, gamma, cap, 1e-3, aggregation, layer_reduction, "none", weights, backend)
    distance = distances(gap, norm, 1e-3, backend)
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
    norm = torch.zeros(2, 1, 1)
    loss = functional.margin_hinge(gap, norm, 1.0, backend=backend)
    distance = distances(gap, norm, 1e-6, backend)
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


# What a pair is: gap, norm; and whether it is left out under min_norm = 0.25.
KINDS = {
    "ordinary": (-0.5, 1.0, False),
    "wrong side": (0.75, 0.5, False),
    "masked competitor": (-math.inf, 1.0, True),
    "masked competitor, infinite norm": (-math.inf, math.inf, True),
    "masked label": (math.inf, 1.0, False),
    "no gradient": (0.3, 0.0, True),
    "norm at the bound": (0.3, 0.25, True),
    "infinite norm": (0.5, math.inf, False),
    "nan gap": (math.nan, 1.0, False),
    "nan norm": (0.5, math.nan, False),
}


def pair(gap, norm, eps, gamma, cap):
    """(distance, term, d term / d gap, d term / d norm) of one pair that counts."""
    if math.isinf(gap):
        d = -gap
    elif math.isinf(norm):
        d = 0.0
    else:
        d = -gap / (eps + norm)
    shortfall = gamma - d
    if shortfall <= 0 or shortfall >= cap:
        return d, min(max(shortfall, 0.0), cap), 0.0, 0.0
    if math.isinf(norm):
        return d, shortfall, 0.0, 0.0
    return d, shortfall, 1 / (eps + norm), -gap / (eps + norm) ** 2


def literal(kinds, aggregation, gamma, cap, eps):
    """loss of one sample with one layer and its gradients in gap and norm, [k] each."""
    k = len(kinds)
    counted = [j for j in range(k) if not KINDS[kinds[j]][2]]
    d_gap, d_norm = [0.0] * k, [0.0] * k
    pairs = {j: pair(*KINDS[kinds[j]][:2], eps, gamma, cap) for j in counted}
    if not counted:
        return 0.0, d_gap, d_norm
    if aggregation == "max":
        j = min(counted, key=lambda j: (not math.isnan(pairs[j][0]), pairs[j][0], j))
        d_gap[j], d_norm[j] = pairs[j][2:]
        return pairs[j][1], d_gap, d_norm
    if aggregation == "mean_distance":
        mean = sum(pairs[j][0] for j in counted) / len(counted)
        shortfall = gamma - mean
        if shortfall <= 0 or shortfall >= cap:
            return min(max(shortfall, 0.0), cap), d_gap, d_norm
        for j in counted:
            gap, norm, _ = KINDS[kinds[j]]
            if not math.isinf(norm) and not math.isinf(gap):
                d_gap[j], d_norm[j] = 1 / (eps + norm) / len(counted), -gap / (eps + norm) ** 2 / len(counted)
        return shortfall, d_gap, d_norm
    share = 1 if aggregation == "sum" else 1 / k
    for j in counted:
        d_gap[j], d_norm[j] = (share * slope for slope in pairs[j][2:])
    return share * sum(pairs[j][1] for j in counted), d_gap, d_norm


@pytest.mark.parametrize("cap", [None, 1.25])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_pairs_that_are_left_out_infinite_or_nan(backend, aggregation, cap):
    """Every pair of kinds, and all of one kind, against literal loops: value, first derivatives; second ones finite."""
    names = list(KINDS)
    rows = [(a, b) for a in names for b in names]
    gap = torch.tensor([[KINDS[name][0] for name in row] for row in rows], dtype=torch.float64)
    norm = torch.tensor([[[KINDS[name][1]] for name in row] for row in rows], dtype=torch.float64)
    leaves = gap.requires_grad_(), norm.requires_grad_()
    loss = functional.margin_hinge(
        *leaves, 1.0, cap, 0.5, aggregation, reduction="none", backend=backend, min_norm=0.25
    )
    truth = [literal(row, aggregation, 1.0, math.inf if cap is None else cap, 0.5) for row in rows]
    torch.testing.assert_close(loss, torch.tensor([t[0] for t in truth], dtype=torch.float64), equal_nan=True)
    firsts = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    for ours, which in zip(firsts, (1, 2), strict=True):
        expected = torch.tensor([t[which] for t in truth], dtype=torch.float64).view(ours.shape)
        torch.testing.assert_close(ours, expected, equal_nan=True)
    usable = torch.tensor([not any("nan" in name for name in row) for row in rows])
    seconds = torch.autograd.grad([g[usable].square().sum() for g in firsts], leaves)
    assert all(second[usable].isfinite().all() for second in seconds) and seconds[1][usable].abs().sum() > 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_derivatives_with_pairs_left_out(backend, aggregation):
    gap, norm = sample(3, 3, 2)
    least = norm.flatten().sort().values[4:6].mean().item()  # five of eighteen, none at the bound itself
    gap, norm = gap.requires_grad_(), norm.requires_grad_()

    def f(gap, norm):
        return functional.margin_hinge(
            gap, norm, 1.5, aggregation=aggregation, reduction="none", backend=backend, min_norm=[least, least / 2]
        )

    assert torch.autograd.gradcheck(f, (gap, norm))
    assert torch.autograd.gradgradcheck(f, (gap, norm))


@pytest.mark.parametrize("types", [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_mixed_types_are_computed_in_float64(backend, types, aggregation):
    gap, norm = sample(5, 3, 2)
    gap, norm = gap.to(types[0]).requires_grad_(), norm.to(types[1]).requires_grad_()
    bounds = ([0.7, 1.1], 0.9, 1e-3, aggregation, "mean", "none", [0.3, 0.1])
    loss = functional.margin_hinge(gap, norm, *bounds, backend=backend, min_norm=0.6)
    wide = gap.detach().double().requires_grad_(), norm.detach().double().requires_grad_()
    truth = functional.margin_hinge(*wide, *bounds, backend="reference", min_norm=0.6)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, truth, rtol=1e-13, atol=1e-14)
    ours = torch.autograd.grad(loss.sum(), (gap, norm), create_graph=True)
    exact = torch.autograd.grad(truth.sum(), wide, create_graph=True)
    for a, b, dtype in zip(ours, exact, types, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype), rtol=1e-6, atol=1e-9)
    again = torch.autograd.grad(sum(g.double().square().sum() for g in ours), (gap, norm))
    exact = torch.autograd.grad(sum(g.square().sum() for g in exact), wide)
    for a, b, dtype in zip(again, exact, types, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b.to(dtype), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("change", [dict(gamma=-1.0), dict(cap=math.nan), dict(weight=-0.5), dict(min_norm=-1.0)])
def test_a_wrong_bound_that_nobody_reads_makes_the_loss_nan(backend, change):
    """As a tensor on a GPU is: below the checks of `functional`."""
    gap, norm = sample(3, 2, 2)
    bounds = {"gamma": 1.0, "cap": 2.0, "weight": 1.0, "min_norm": 0.1}
    gamma, cap, weight, least = (torch.tensor([value, change.get(name, value)]) for name, value in bounds.items())
    _, op = backends.choose("margin_hinge", (gap, norm), backend)
    for aggregation in AGGREGATIONS:
        loss, _ = op(gap, norm, gamma, cap, weight, least, 1e-6, aggregation, "sum")
        assert loss.isnan().all()
        loss, _ = op(gap, norm, gamma[:1].expand(2), None, torch.zeros(2), None, 1e-6, aggregation, "mean")
        assert loss.isnan().all()


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
    (dict(gamma=-1.0), ValueError, "gamma must be >= 0, got -1"),
    (dict(gamma=[1.0, math.nan]), ValueError, "gamma must be >= 0, got nan"),
    (dict(gamma=torch.tensor([1.0, -2.0])), ValueError, "gamma must be >= 0, got -2"),
    (dict(cap=-0.5), ValueError, "cap must be >= 0, got -0.5"),
    (dict(cap=[math.nan, 1.0]), ValueError, "cap must be >= 0, got nan"),
    (dict(layer_weights=[1.0, -1.0]), ValueError, "layer_weights must be >= 0, got -1"),
    (dict(layer_weights=[0.0, 0.0]), ValueError, "layer_weights must not all be 0 with layer_reduction=mean"),
    (dict(min_norm=-1.0), ValueError, "min_norm must be >= 0, got -1"),
    (dict(min_norm=[1.0]), ValueError, "min_norm must have shape [2], one entry per layer, got [1]"),
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


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_nan_gap_whose_norm_is_left_out_is_nan_in_the_derivatives(backend, aggregation):
    """min_norm leaves out a direction that means nothing; it does not hide a NaN."""

    def derivatives(name):
        gap, norm = sample(3, 2, 2, torch.float32)
        gap[1, 0], norm[1] = math.nan, 0.1
        gap.requires_grad_()
        norm.requires_grad_()
        loss = functional.margin_hinge(
            gap, norm, 5.0, aggregation=aggregation, reduction="none", backend=name, min_norm=0.2
        )
        first = torch.autograd.grad(loss.sum(), (gap, norm), create_graph=True)
        return [*first, *torch.autograd.grad(sum(d.square().sum() for d in first), (gap, norm))]

    found = derivatives(backend)
    assert all(d[1, 0].isnan().all() for d in found[1:]) and all(d[[0, 2]].isfinite().all() for d in found)
    for ours, theirs in zip(found, derivatives("reference"), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)

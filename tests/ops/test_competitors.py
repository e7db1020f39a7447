"""Competitors, gaps and cross-entropy: values, gradients, order, and what happens to bad input."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gradients import third_derivative
from torch.nn.functional import cross_entropy

from margin_kernels import functional
from margin_kernels.testing import (
    DTYPES,
    FLOOR,
    GRADIENT_FLOOR,
    assert_as_good_as,
    assert_gradients_agree,
    interpreted,
    sample_logits,
)

INF = math.inf

# (N, C, k): one row; C = 2; one vector minus one, exactly, plus one; several vectors with a rest; k = 1, C-1, a sorted
# list (up to 32) and a partial sort (above); enough rows for two threads.
SIZES = [(1, 2, 1), (3, 15, 2), (3, 16, 15), (5, 17, 1), (7, 100, 5), (4, 129, 33), (2, 1000, 999), (300, 257, 3)]


def smaller(backend, n, classes, k):
    """For the interpreter: k = C - 1 = 99, two tiles of rows."""
    if not interpreted(backend):
        return n, classes, k
    return min(n, 5), *((100, 99) if k == 999 else (classes, k))


class Truth(NamedTuple):
    """What one row has, as Python numbers, and the gradients of nll, phi and uniform."""

    competitor: list
    gap: list
    nll: float
    phi: float
    uniform: float
    grad_nll: list
    grad_phi: list
    grad_uniform: list


def row_of(z, y, k, ignore_index=-100):
    """The definition for one row of Python floats, as literal loops; sums over j != y from the smallest term up."""
    classes = range(len(z))
    if y == ignore_index:
        return Truth(list(classes[:k]), [0.0] * k, 0.0, 0.0, 0.0, *[[0.0 for _ in z]] * 3)
    finite = [c for c in classes if z[c] > -INF]
    if any(math.isnan(v) or v == INF for v in z) or not finite or not 0 <= y < len(z):
        nothing = [math.nan for _ in z]
        skipped = y if 0 <= y < len(z) else 0
        index = [c for c in classes if c != skipped][:k]
        return Truth(index, [math.nan] * k, math.nan, math.nan, math.nan, nothing, nothing, nothing)
    competitors = [c for c in finite if c != y]
    index = sorted((c for c in classes if c != y), key=lambda c: (-z[c], c))[:k]
    gap = [-INF if z[c] == -INF else z[c] - z[y] for c in index]
    if not competitors:
        return Truth(index, gap, 0.0, INF, 0.0, *[[0.0 for _ in z]] * 3)
    largest = max(z[c] for c in competitors)
    total = math.fsum(math.exp(z[c] - largest) for c in competitors)
    q = [math.exp(v - largest) / total if c != y else 0.0 for c, v in enumerate(z)]
    top = max(z)
    log_all = math.log(math.fsum(math.exp(v - top) for v in z))
    uniform = math.fsum(top - z[c] for c in finite) / len(finite) + log_all
    if z[y] == -INF:
        nll, phi, label, rest = INF, -INF, 0.0, 1.0
    else:
        s = total * math.exp(largest - z[y])
        nll, phi, label, rest = math.log1p(s), z[y] - largest - math.log(total), 1 / (1 + s), s / (1 + s)
    unit = [float(c == y) for c in classes]
    grad_nll = [rest * (a - b) for a, b in zip(q, unit, strict=True)]
    grad_phi = [b - a if z[y] > -INF else 0.0 for a, b in zip(q, unit, strict=True)]
    grad_uniform = [
        (label * b + rest * a) - (1 / len(finite) if z[c] > -INF else 0.0)
        for c, (a, b) in enumerate(zip(q, unit, strict=True))
    ]
    return Truth(index, gap, nll, phi, uniform, grad_nll, grad_phi, grad_uniform)


def truth(logits, target, k, ignore_index=-100):
    """`row_of` for a batch, as a Truth of tensors: index int64, the others float64."""
    rows = [row_of(z, y, k, ignore_index) for z, y in zip(logits.double().tolist(), target.tolist(), strict=True)]
    columns = list(zip(*rows, strict=True))
    index = torch.tensor(columns[0], dtype=torch.int64).reshape(len(rows), k)
    gap = torch.tensor(columns[1], dtype=torch.float64).reshape(len(rows), k)
    return Truth(index, gap, *(torch.tensor(column, dtype=torch.float64) for column in columns[2:]))


def loop(logits, target, k):
    return truth(logits, target, k)[:3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,classes,k", SIZES)
def test_values_are_those_of_a_literal_loop(backend, dtype, n, classes, k):
    n, classes, k = smaller(backend, n, classes, k)
    logits, target = sample_logits(n, classes, dtype)
    index, gap, nll = loop(logits, target, k)
    result = functional.competitors(logits, target, k, backend=backend)
    assert result.gap.dtype == result.nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(result.competitor, index)
    assert_as_good_as(result.gap, gap, logits.gather(1, index) - logits.gather(1, target[:, None]), FLOOR[dtype])
    assert_as_good_as(result.nll, nll, cross_entropy(logits, target, reduction="none"), FLOOR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,classes,k", SIZES)
def test_gradient_is_softmax_and_differences_of_unit_vectors(backend, dtype, n, classes, k):
    n, classes, k = smaller(backend, n, classes, k)
    logits, target = sample_logits(n, classes, dtype)
    logits.requires_grad_()
    result = functional.competitors(logits, target, k, backend=backend)
    grad_gap, grad_nll = torch.randn(n, k), torch.randn(n)
    (grad,) = torch.autograd.grad((result.gap * grad_gap).sum() + (result.nll * grad_nll).sum(), logits)
    truth = grad_nll.double()[:, None] * logits.detach().double().softmax(1)
    truth.scatter_add_(1, result.competitor, grad_gap.double())
    truth.scatter_add_(1, target[:, None], -(grad_nll.double() + grad_gap.double().sum(1))[:, None])
    assert grad.dtype == dtype
    assert_gradients_agree(grad, truth, GRADIENT_FLOOR[dtype])


def test_gradient_of_the_gap_alone_is_zero_elsewhere(backend):
    logits, target = sample_logits(4, 50)
    logits.requires_grad_()
    result = functional.competitors(logits, target, 2, backend=backend)
    (grad,) = torch.autograd.grad(result.gap.sum(), logits)
    expected = torch.zeros(4, 50).scatter(1, result.competitor, 1.0).scatter(1, target[:, None], -2.0)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_first_and_second_derivatives(backend, k):
    logits, target = sample_logits(2 if interpreted(backend) else 4, 6, torch.float64)
    logits.requires_grad_()

    def f(z):
        result = functional.competitors(z, target, k, uniform=True, backend=backend)
        return result.gap, result.nll, result.phi, result.uniform

    assert torch.autograd.gradcheck(f, (logits,))
    assert torch.autograd.gradgradcheck(f, (logits,))


def test_third_derivative_is_that_of_cross_entropy(backend):
    logits, target = sample_logits(3, 5, torch.float64)

    ours = third_derivative(lambda z: functional.competitors(z, target, 1, backend=backend).nll, logits)
    expected = third_derivative(lambda z: cross_entropy(z, target, reduction="none"), logits)
    assert_gradients_agree(ours, expected, 1e-10)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_ties_go_to_the_lowest_class(backend, k):
    logits = torch.zeros(3, 70)
    logits[1, 20::7] = 1.0
    target = torch.tensor([0, 27, 69])
    result = functional.competitors(logits, target, k, backend=backend)
    assert torch.equal(result.competitor, loop(logits, target, k)[0])


def test_label_is_left_out_even_where_every_other_logit_is_very_low(backend):
    logits = torch.full((2, 40), torch.finfo(torch.float32).min / 4)
    logits[:, 3] = 5.0
    result = functional.competitors(logits, torch.tensor([3, 3]), 2, backend=backend)
    assert result.competitor.tolist() == [[0, 1], [0, 1]]
    assert result.nll.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("classes,k,place", [(5, 1, 0), (40, 1, 39), (40, 3, 17), (100, 40, 99)])
def test_a_row_with_a_non_finite_logit_gives_nan_and_leaves_the_others_alone(backend, bad, classes, k, place):
    logits, target = sample_logits(3, classes)
    clean = functional.competitors(logits, target, k, backend=backend)
    logits[1, place] = bad
    logits.requires_grad_()
    result = functional.competitors(logits, target, k, backend=backend)
    assert result.gap[1].isnan().all() and result.nll[1].isnan()
    assert result.competitor[1].tolist() == [i for i in range(classes) if i != target[1]][:k]
    for row in (0, 2):
        assert torch.equal(result.gap[row], clean.gap[row]) and torch.equal(
            result.competitor[row], clean.competitor[row]
        )
    (grad,) = torch.autograd.grad(result.gap.sum() + result.nll.sum(), logits)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


# (classes, k, what it covers): a lane or two, one vector with a rest, a warp, and k beyond a sorted list.
TABLE = [(2, 1), (5, 3), (17, 5), (40, 39), (200, 4), (200, 60)]


def special_rows(classes, dtype):
    """Logits and targets of every row of the table in `functional.competitors`; ignore_index is 1."""
    rows, target = sample_logits(12, classes, dtype, seed=3)
    target[target == 1] = 0
    rows[1, (target[1] + 1) % classes] = -INF  # a masked class (C = 2: no competitor)
    rows[2, :] = -INF  # no competitor
    rows[2, target[2]] = 2.0
    rows[3, target[3]] = -INF  # the label
    rows[4, :] = -INF  # every class
    rows[5, :] = -INF  # fewer than k finite competitors
    rows[5, [classes // 2, int(target[5]), classes - 1]] = torch.tensor([1.0, 2.0, 3.0]).to(rows)
    target[6] = 1  # ignored
    rows[7, classes - 1] = math.nan
    target[8], rows[8, 0] = 1, math.nan  # ignored, whatever it holds
    rows[9, classes // 2] = INF
    rows[10, :] = -INF  # the label, and all but one of the others
    rows[10, (target[10] + 1) % classes] = 0.5
    rows[11, target[11]] = 60.0 if dtype != torch.float16 else 30.0  # sure
    return rows, target


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes,k", TABLE)
def test_what_leaves_every_kind_of_row(backend, classes, k, dtype):
    if interpreted(backend) and classes == 200 and dtype != torch.float32:
        classes, k = 17, 16
    logits, target = special_rows(classes, dtype)
    logits.requires_grad_()
    expected = truth(logits.detach(), target, k, ignore_index=1)
    result = functional.competitors(logits, target, k, ignore_index=1, uniform=True, backend=backend)
    assert torch.equal(result.competitor, expected.competitor)
    assert result.valid.tolist() == [y != 1 for y in target.tolist()]
    for name in ("gap", "nll", "phi", "uniform"):
        ours, true = getattr(result, name), getattr(expected, name)
        torch.testing.assert_close(ours.double(), true, rtol=2e-6, atol=2e-6, equal_nan=True, msg=name)
    rounding = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    for name in ("nll", "phi", "uniform"):
        (grad,) = torch.autograd.grad(getattr(result, name).nansum(), logits, retain_graph=True)
        true = getattr(expected, f"grad_{name}")
        torch.testing.assert_close(grad.double(), true, rtol=rounding, atol=1e-7, equal_nan=True, msg=name)
    # Gaps that are not finite have no slope; those of a row with NaN have NaN.
    weight = torch.linspace(1, 2, k).to(result.gap)
    (grad,) = torch.autograd.grad(result.gap, logits, weight.expand(len(target), k), retain_graph=True)
    true = torch.zeros(len(target), classes, dtype=torch.float64)
    for n in range(len(target)):
        for j, i in enumerate(expected.competitor[n].tolist()):
            if math.isfinite(expected.gap[n, j]) and target[n] != 1:
                true[n, i] += weight[j].double()
                true[n, target[n]] -= weight[j].double()
    true[expected.nll.isnan()] = math.nan
    torch.testing.assert_close(grad.double(), true, rtol=rounding, atol=1e-6, equal_nan=True)


def test_second_derivatives_in_masked_and_ignored_rows(backend):
    """Away from the masked entries, which have no derivative, gradgradcheck holds; in them all derivatives are 0."""
    logits = torch.tensor(
        [[0.5, -INF, 1.5, -0.5, 0.25], [0.5, 1.0, -INF, -INF, 0.1], [-INF, 2.0, -INF, -INF, -INF], [1.0, 2, 3, 4, 5]],
        dtype=torch.float64,
    )
    target = torch.tensor([0, 1, 1, -100])
    finite = (logits > -INF).nonzero(as_tuple=True)
    values = logits[finite].clone().requires_grad_()

    def f(values, k=3):
        z = logits.index_put(finite, values)
        result = functional.competitors(z, target, k, uniform=True, backend=backend)
        gap = torch.where(result.gap.isfinite(), result.gap, 0.0)
        return gap, result.nll, torch.where(result.phi.isfinite(), result.phi, 0.0), result.uniform

    assert torch.autograd.gradcheck(f, (values,))
    assert torch.autograd.gradgradcheck(f, (values,))
    z = logits.clone().requires_grad_()
    result = functional.competitors(z, target, 3, uniform=True, backend=backend)
    (first,) = torch.autograd.grad(
        (result.gap.sum() + result.phi[:2].sum() + result.uniform.sum()) + result.nll.square().sum(),
        z,
        create_graph=True,
    )
    (second,) = torch.autograd.grad(first.square().sum(), z)
    assert (first[logits == -INF] == 0).all() and (second[logits == -INF] == 0).all()
    assert (first[2:] == 0).all() and (second[2:] == 0).all() and second[:2].abs().sum() > 0


def test_the_second_derivative_of_a_masked_label_is_that_of_cross_entropy(backend):
    logits = torch.tensor([[0.5, -INF, 1.5, -0.5]], dtype=torch.float64)

    def second(nll):
        z = logits.clone().requires_grad_()
        (first,) = torch.autograd.grad(nll(z).sum(), z, create_graph=True)
        return first.detach(), torch.autograd.grad((first * torch.arange(1.0, 5.0)).sum(), z)[0]

    label = torch.tensor([1])
    ours = second(lambda z: functional.competitors(z, label, 2, backend=backend).nll)
    theirs = second(lambda z: cross_entropy(z, label, reduction="none"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("classes", [2, 10, 100, 1000])
def test_float32_is_right_where_the_label_is_sure(backend, classes):
    """Against float64, for gaps from 0 to 80: phi, nll and every entry of both gradients, relative to the entry."""
    gaps = torch.arange(0.0, 80.5, 2.0 if interpreted(backend) else 0.5, device="cpu")
    generator = torch.Generator("cpu").manual_seed(1)
    logits = torch.rand(len(gaps), classes, generator=generator, device="cpu") * -5
    target = torch.randint(0, classes, (len(gaps),), generator=generator, device="cpu")
    logits.scatter_(1, target[:, None], -INF)
    logits.scatter_(1, target[:, None], logits.amax(1, keepdim=True) + gaps[:, None])
    logits += 3.0  # not exactly representable differences
    logits, target = (t.to(torch.get_default_device()) for t in (logits, target))
    expected = truth(logits, target, 1)
    logits.requires_grad_()
    result = functional.competitors(logits, target, 1, uniform=True, backend=backend)
    error = (result.phi.double() - expected.phi).abs()
    assert (error <= 1e-6 * expected.phi.abs().clamp(min=1)).all()
    spread = (logits.detach().amax(1) - logits.detach().amin(1)).double()
    allowed = 1e-6 + 6e-8 * spread
    assert ((result.nll.double() - expected.nll).abs() <= allowed * expected.nll).all()
    assert ((result.uniform.double() - expected.uniform).abs() <= 1e-6 * expected.uniform).all()
    for name in ("nll", "phi", "uniform"):
        (grad,) = torch.autograd.grad(getattr(result, name).sum(), logits, retain_graph=True)
        true = getattr(expected, f"grad_{name}")
        # An entry of `uniform` is the difference p - 1 / C of two numbers that are right to rounding.
        size = true + 2 / classes if name == "uniform" else true.abs()
        assert ((grad.double() - true).abs() <= allowed[:, None] * size).all(), name
        sums = grad.double().sum(1).abs()
        assert (sums <= 2e-7 * grad.double().abs().sum(1) * max(1, classes**0.5)).all(), name


def test_float32_is_right_over_long_rows(backend):
    """33000 summands of one size: sums kept in float32 would be off in the seventh digit, and grow with C."""
    classes = 33000
    generator = torch.Generator("cpu").manual_seed(2)
    logits = torch.randn(6, classes, generator=generator, device="cpu")
    logits[1] = 0.0
    logits[2] = torch.linspace(-1, 0, classes, device="cpu")
    logits[3] *= 3
    logits[4, ::2] = -INF
    logits[5] = 0.1 * logits[5] + 100
    target = torch.tensor([0, classes - 1, 16400, 5, 777, 32768], device="cpu")
    logits[3, 5] = 30.0
    expected = truth(logits, target, 1)
    logits, target = (t.to(torch.get_default_device()) for t in (logits, target))
    logits.requires_grad_()
    result = functional.competitors(logits, target, 1, uniform=True, backend=backend)
    assert torch.equal(result.competitor, expected.competitor)
    assert ((result.phi.double() - expected.phi).abs() <= 1e-6 * expected.phi.abs().clamp(min=1)).all()
    spread = torch.tensor([15.0, 1, 1, 50, 15, 2])  # of the finite logits
    assert ((result.nll.double() - expected.nll).abs() <= (1e-6 + 6e-8 * spread) * expected.nll).all()
    assert ((result.uniform.double() - expected.uniform).abs() <= 1e-6 * expected.uniform).all()
    for name in ("nll", "phi"):
        (grad,) = torch.autograd.grad(getattr(result, name).sum(), logits, retain_graph=True)
        true = getattr(expected, f"grad_{name}")
        assert ((grad.double() - true).abs() <= (1e-6 + 6e-8 * spread[:, None]) * true.abs()).all(), name


def test_a_sum_of_all_gradients_is_the_gradient_of_the_sum(backend):
    logits, target = sample_logits(6, 33, torch.float64)
    logits.requires_grad_()
    result = functional.competitors(logits, target, 3, uniform=True, backend=backend)
    outputs = (result.gap, result.nll, result.phi, result.uniform)
    weights = [torch.randn_like(o) for o in outputs]
    (whole,) = torch.autograd.grad(outputs, logits, weights, retain_graph=True)
    parts = sum(torch.autograd.grad(o, logits, w, retain_graph=True)[0] for o, w in zip(outputs, weights, strict=True))
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("classes", [5, 200])
def test_no_competitor_is_asked_for(backend, classes):
    logits, target = sample_logits(4, classes)
    logits.requires_grad_()
    none = functional.competitors(logits, target, 0, uniform=True, backend=backend)
    one = functional.competitors(logits, target, 1, uniform=True, backend=backend)
    assert none.competitor.shape == none.gap.shape == (4, 0) and none.competitor.dtype == torch.int64
    for name in ("nll", "phi", "uniform"):
        assert torch.equal(getattr(none, name), getattr(one, name))
        a, b = (torch.autograd.grad(getattr(r, name).sum(), logits, retain_graph=True)[0] for r in (none, one))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_ignored_rows_leave_the_others_as_they_are(backend):
    logits, target = sample_logits(6, 9)
    clean = functional.competitors(logits, target, 2, uniform=True, backend=backend)
    hidden = target.clone()
    hidden[[1, 4]] = -100
    result = functional.competitors(logits, hidden, 2, uniform=True, backend=backend)
    for ours, before in zip(result[:5], clean[:5], strict=True):
        assert torch.equal(ours[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
        assert (ours[[1, 4]] == 0).all() or ours.dtype == torch.int64
    assert result.competitor[[1, 4]].tolist() == [[0, 1], [0, 1]]
    assert result.valid.tolist() == [True, False, True, True, False, True]


@pytest.mark.parametrize("seed", range(8))
def test_drawn_rows_agree_with_the_definition(backend, seed):
    """Every shape, k and special value that the generator draws, in float64: no kind of row is left to luck alone."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator, device="cpu"))

    n, classes = draw(1, 7), draw(2, 40)
    k = draw(0, classes)
    logits = (torch.randn(n, classes, generator=generator, dtype=torch.float64, device="cpu") * 4).round() / 2
    kinds = torch.rand(n, classes, generator=generator, device="cpu")
    logits[kinds < 0.3 * (seed % 3)] = -INF
    logits[kinds > 0.99] = INF if seed % 2 else math.nan
    target = torch.randint(0, classes, (n,), generator=generator, device="cpu")
    target[kinds[:, 0] > 0.8] = -100
    expected = truth(logits, target, k)
    logits, target = (t.to(torch.get_default_device()) for t in (logits, target))
    logits.requires_grad_()
    result = functional.competitors(logits, target, k, uniform=True, backend=backend)
    assert torch.equal(result.competitor, expected.competitor)
    for name in ("gap", "nll", "phi", "uniform"):
        ours = getattr(result, name)
        torch.testing.assert_close(ours, getattr(expected, name), rtol=1e-12, atol=1e-13, equal_nan=True, msg=name)
        if name != "gap":
            (grad,) = torch.autograd.grad(ours.sum(), logits, retain_graph=True)
            true = getattr(expected, f"grad_{name}")
            torch.testing.assert_close(grad, true, rtol=1e-11, atol=1e-13, equal_nan=True, msg=name)


def test_large_offsets_cost_no_precision(backend):
    """Softmax does not change when 10000 is added to every logit: neither do nll and gradient."""
    logits, target = sample_logits(6, 30)
    logits = logits.mul(64).round().div(64)  # on a grid, so that adding 10000 is exact
    values = []
    for offset in (0.0, 10000.0):
        z = (logits + offset).requires_grad_()
        nll = functional.competitors(z, target, 1, backend=backend).nll
        values.append((nll, torch.autograd.grad(nll.sum(), z)[0]))
    assert torch.allclose(values[0][0], values[1][0], rtol=1e-6, atol=1e-6)
    assert_gradients_agree(values[1][1], values[0][1], 1e-5)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "misaligned"])
def test_any_strides(backend, layout):
    base, target = sample_logits(6, 37)
    logits = {
        "transposed": base.t().contiguous().t(),
        "expanded": base[:1].expand(6, 37),
        "strided": torch.stack([base, base * 2], dim=2)[..., 0],
        "misaligned": torch.cat([torch.zeros(1), base.flatten()])[1:].view(6, 37),
    }[layout]
    a = functional.competitors(logits, target, 4, backend=backend)
    b = functional.competitors(logits.clone(memory_format=torch.contiguous_format), target, 4, backend=backend)
    assert torch.equal(a.competitor, b.competitor) and torch.equal(a.gap, b.gap)
    assert torch.allclose(a.nll, b.nll, rtol=1e-6)


def test_strided_targets(backend):
    logits, target = sample_logits(6, 9)
    spread = torch.stack([target, torch.full_like(target, 99)], dim=1)[:, 0]
    assert torch.equal(
        functional.competitors(logits, spread, 2, backend=backend).gap,
        functional.competitors(logits, target, 2, backend=backend).gap,
    )


def test_an_empty_batch_gives_empty_results_and_gradients(backend):
    logits = torch.zeros(0, 5, requires_grad=True)
    result = functional.competitors(logits, torch.zeros(0, dtype=torch.int64), 2, backend=backend)
    shapes = [list(t.shape) for t in result if t is not None]
    assert shapes == [[0, 2], [0, 2], [0], [0], [0]] and result.uniform is None
    (grad,) = torch.autograd.grad(result.gap.sum() + result.nll.sum(), logits)
    assert list(grad.shape) == [0, 5]


def test_results_repeat_and_do_not_depend_on_the_batch(backend):
    logits, target = sample_logits(40, 1003)
    whole = functional.competitors(logits, target, 5, uniform=True, backend=backend)
    again = functional.competitors(logits, target, 5, uniform=True, backend=backend)
    alone = functional.competitors(logits[7:8], target[7:8], 5, uniform=True, backend=backend)
    for a, b, c in zip(whole, again, alone, strict=True):
        assert torch.equal(a, b)
        # The reference adds with ATen's kernels, whose order of summation may follow the shape.
        assert torch.equal(a[7:8], c) if backend != "reference" else torch.allclose(a[7:8], c, rtol=1e-6)


WRONG = [
    (lambda z, y: (z.long(), y, 1), TypeError, "logits must be float64, float32, bfloat16 or float16, got int64"),
    (lambda z, y: (z[0], y, 1), ValueError, "logits must have shape [N, C], got [5]"),
    (lambda z, y: (z, y.int(), 1), TypeError, "target must be int64 class indices, got int32"),
    (lambda z, y: (z, y[:2], 1), ValueError, "target must have shape [4] to match logits, got [2]"),
    (lambda z, y: (z[:, :1], y * 0, 1), ValueError, "logits must have at least 2 classes, got 1"),
    (lambda z, y: (z, y, -1), ValueError, "k must be in [0, 4] for 5 classes, got -1"),
    (lambda z, y: (z, y, 5), ValueError, "k must be in [0, 4] for 5 classes, got 5"),
]


@pytest.mark.parametrize("arguments,error,words", WRONG, ids=[words[:40] for _, _, words in WRONG])
def test_a_wrong_argument_is_named_in_the_same_words_on_every_backend(backend, arguments, error, words):
    with pytest.raises(error) as caught:
        functional.competitors(*arguments(*sample_logits(4, 5)), backend=backend)
    assert words in str(caught.value)


@pytest.mark.parametrize("bad", [-9, -1, 5])
def test_a_target_outside_the_classes_is_an_error_on_the_cpu_and_nan_on_a_gpu(backend, bad):
    logits, target = sample_logits(4, 5)
    clean = functional.competitors(logits, target, 1, backend=backend)
    target[1] = bad
    if not logits.is_cuda:
        with pytest.raises(ValueError, match=rf"target must be in \[0, 5\), got {bad} at row 1"):
            functional.competitors(logits, target, 1, backend=backend)
        return
    result = functional.competitors(logits, target, 1, backend=backend)
    assert result.nll.isnan().tolist() == result.gap[:, 0].isnan().tolist() == [False, True, False, False]
    assert torch.equal(result.nll[2:], clean.nll[2:])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_gaps_decrease_and_nll_bounds_the_first(data):
    """gap_1 >= gap_2 >= ..., and max(0, gap_1) <= nll <= max(0, gap_1) + log C."""
    n, classes = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 40))
    k = data.draw(st.integers(1, classes - 1))
    values = st.floats(-50, 50, width=32)
    logits = torch.tensor(
        data.draw(st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=n, max_size=n)),
        dtype=torch.float32,
    )
    target = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    result = functional.competitors(logits, target, k)
    assert torch.equal(result.competitor, loop(logits, target, k)[0])
    assert (result.gap[:, :-1] >= result.gap[:, 1:]).all()
    low = result.gap[:, 0].clamp(min=0)
    assert (result.nll >= low - 1e-4).all()
    assert (result.nll <= low + torch.log(torch.tensor(float(classes))) + 1e-4).all()


def positions(dtype: torch.dtype = torch.float64, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2,C,5,9], more positions than a tile has, and targets with ignored ones; masked classes, NaN."""
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, classes, 5, 9, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (2, 5, 9), generator=generator)
    y[0, 0, :3] = -100
    z[0, 2, 1, :4] = -math.inf
    z[1, 3, 4, 8] = math.nan
    return z.to(dtype), y


@pytest.mark.parametrize("memory", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [0, 1, 3])
def test_predictions_at_positions_are_rows(k, dtype, memory, backend) -> None:
    z, y = positions(dtype)
    if memory == "channels_last":
        z = z.contiguous(memory_format=torch.channels_last)
    if memory == "sliced":
        z = torch.stack([z, z], -1)[..., 0]
    z = z.requires_grad_()
    rows = z.detach().movedim(1, -1).flatten(0, 2).requires_grad_()
    found = functional.competitors(z, y, k, uniform=True, backend=backend)
    expected = functional.competitors(rows, y.flatten(), k, uniform=True, backend=backend)
    weight = torch.linspace(0.5, 2, y.numel(), dtype=found.nll.dtype)
    for a, b in zip(found, expected, strict=True):
        assert a.shape[:3] == y.shape
        torch.testing.assert_close(a.flatten(0, 2), b, rtol=0, atol=0, equal_nan=True)

    def total(f, shape) -> torch.Tensor:
        terms = f.nll + 0.3 * f.uniform + 0.7 * f.phi.nan_to_num(posinf=0, neginf=0)
        terms = terms + (f.gap.nan_to_num(posinf=0, neginf=0).sum(-1) if k else 0)
        return (terms * weight.view(shape)).sum()

    (dz,) = torch.autograd.grad(total(found, y.shape), z)
    (drows,) = torch.autograd.grad(total(expected, (-1,)), rows)
    torch.testing.assert_close(dz.movedim(1, -1).flatten(0, 2), drows, rtol=0, atol=0, equal_nan=True)


def test_positions_are_differentiated_twice(backend) -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randint(4, (2, 3), generator=generator)
    y[0, 1] = -100

    def of(z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = functional.competitors(z, y, 2, uniform=True, backend=backend)
        return found.gap, found.nll, found.phi, found.uniform

    assert torch.autograd.gradcheck(of, (z,))
    assert torch.autograd.gradgradcheck(of, (z,))


def test_positions_need_targets_of_their_shape(backend) -> None:
    z, y = positions()
    with pytest.raises(ValueError, match=r"target must have shape \[2, 5, 9\] to match logits, got \[2, 45\]"):
        functional.competitors(z, y.flatten(1), 1, backend=backend)
    y[1, 2, 3] = 7
    with pytest.raises(ValueError, match=r"target must be in \[0, 7\), got 7 at row 66"):
        functional.competitors(z, y, 1, backend=backend)

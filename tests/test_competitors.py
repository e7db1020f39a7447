"""Competitors, gaps and cross-entropy: values, gradients, order, and what happens to bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

# (N, C, k): one row; C = 2; one vector minus one, exactly, plus one; several vectors with a rest; k = 1, C-1, a sorted
# list (up to 32) and a partial sort (above); enough rows for two threads.
SIZES = [(1, 2, 1), (3, 15, 2), (3, 16, 15), (5, 17, 1), (7, 100, 5), (4, 129, 33), (2, 1000, 999), (300, 257, 3)]


def smaller(backend, n, classes, k):
    """For the interpreter: k = C - 1 = 99, two tiles of rows."""
    if not interpreted(backend):
        return n, classes, k
    return min(n, 5), *((100, 99) if k == 999 else (classes, k))


def loop(logits, target, k):
    """The definition as a literal loop over samples and classes, in float64."""
    index, gap, nll = [], [], []
    for z, y in zip(logits.double().tolist(), target.tolist(), strict=True):
        order = sorted((i for i in range(len(z)) if i != y), key=lambda i: (-z[i], i))[:k]
        index.append(order)
        gap.append([z[i] - z[y] for i in order])
        nll.append(torch.logsumexp(torch.tensor(z, dtype=torch.float64), 0).item() - z[y])
    return torch.tensor(index), torch.tensor(gap, dtype=torch.float64), torch.tensor(nll, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n,classes,k", SIZES)
def test_values_are_those_of_a_literal_loop(backend, dtype, n, classes, k):
    n, classes, k = smaller(backend, n, classes, k)
    logits, target = sample_logits(n, classes, dtype)
    index, gap, nll = loop(logits, target, k)
    result = functional.competitors(logits, target, k, backend=backend)
    assert result.gap.dtype == result.nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(result.index, index)
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
    truth.scatter_add_(1, result.index, grad_gap.double())
    truth.scatter_add_(1, target[:, None], -(grad_nll.double() + grad_gap.double().sum(1))[:, None])
    assert grad.dtype == dtype
    assert_gradients_agree(grad, truth, GRADIENT_FLOOR[dtype])


def test_gradient_of_the_gap_alone_is_zero_elsewhere(backend):
    logits, target = sample_logits(4, 50)
    logits.requires_grad_()
    result = functional.competitors(logits, target, 2, backend=backend)
    (grad,) = torch.autograd.grad(result.gap.sum(), logits)
    expected = torch.zeros(4, 50).scatter(1, result.index, 1.0).scatter(1, target[:, None], -2.0)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_first_and_second_derivatives(backend, k):
    logits, target = sample_logits(2 if interpreted(backend) else 4, 6, torch.float64)
    logits.requires_grad_()

    def f(z):
        return functional.competitors(z, target, k, backend=backend)[1:]

    assert torch.autograd.gradcheck(f, (logits,))
    assert torch.autograd.gradgradcheck(f, (logits,))


def test_third_derivative_is_that_of_cross_entropy(backend):
    logits, target = sample_logits(3, 5, torch.float64)

    def third(nll):
        z = logits.clone().requires_grad_()
        value = nll(z)
        for _ in range(3):
            (value,) = torch.autograd.grad(
                (value * torch.arange(1.0, value.numel() + 1).view_as(value)).sum(), z, create_graph=True
            )
        return value

    ours = third(lambda z: functional.competitors(z, target, 1, backend=backend).nll)
    assert_gradients_agree(ours, third(lambda z: cross_entropy(z, target, reduction="none")), 1e-10)


@pytest.mark.parametrize("k", [1, 3, 40])
def test_ties_go_to_the_lowest_class(backend, k):
    logits = torch.zeros(3, 70)
    logits[1, 20::7] = 1.0
    target = torch.tensor([0, 27, 69])
    result = functional.competitors(logits, target, k, backend=backend)
    assert torch.equal(result.index, loop(logits, target, k)[0])


def test_label_is_left_out_even_where_every_other_logit_is_very_low(backend):
    logits = torch.full((2, 40), torch.finfo(torch.float32).min / 4)
    logits[:, 3] = 5.0
    result = functional.competitors(logits, torch.tensor([3, 3]), 2, backend=backend)
    assert result.index.tolist() == [[0, 1], [0, 1]]
    assert result.nll.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("classes,k,place", [(5, 1, 0), (40, 1, 39), (40, 3, 17), (100, 40, 99)])
def test_a_row_with_a_non_finite_logit_gives_nan_and_leaves_the_others_alone(backend, bad, classes, k, place):
    logits, target = sample_logits(3, classes)
    clean = functional.competitors(logits, target, k, backend=backend)
    logits[1, place] = bad
    logits.requires_grad_()
    result = functional.competitors(logits, target, k, backend=backend)
    assert result.gap[1].isnan().all() and result.nll[1].isnan()
    assert result.index[1].tolist() == [i for i in range(classes) if i != target[1]][:k]
    for row in (0, 2):
        assert torch.equal(result.gap[row], clean.gap[row]) and torch.equal(result.index[row], clean.index[row])
    (grad,) = torch.autograd.grad(result.gap.sum() + result.nll.sum(), logits)
    assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


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
    assert torch.equal(a.index, b.index) and torch.equal(a.gap, b.gap)
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
    assert [list(t.shape) for t in result] == [[0, 2], [0, 2], [0]]
    (grad,) = torch.autograd.grad(result.gap.sum() + result.nll.sum(), logits)
    assert list(grad.shape) == [0, 5]


def test_results_repeat_and_do_not_depend_on_the_batch(backend):
    logits, target = sample_logits(40, 1003)
    whole = functional.competitors(logits, target, 5, backend=backend)
    again = functional.competitors(logits, target, 5, backend=backend)
    alone = functional.competitors(logits[7:8], target[7:8], 5, backend=backend)
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
    (lambda z, y: (z, y, 0), ValueError, "k must be in [1, 4] for 5 classes, got 0"),
    (lambda z, y: (z, y, 5), ValueError, "k must be in [1, 4] for 5 classes, got 5"),
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
    assert torch.equal(result.index, loop(logits, target, k)[0])
    assert (result.gap[:, :-1] >= result.gap[:, 1:]).all()
    low = result.gap[:, 0].clamp(min=0)
    assert (result.nll >= low - 1e-4).all()
    assert (result.nll <= low + torch.log(torch.tensor(float(classes))) + 1e-4).all()

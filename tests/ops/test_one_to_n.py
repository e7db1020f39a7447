"""1-to-N loss: eq. 8 and eq. 14 of the paper term by term, gradients, bounds, batches of one class, bad logits."""

import math
from functools import partial

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

FORMS = [(bound, ce) for bound in ("symmetric", "positive") for ce in (False, True)]
# (N, C): C = 2; one vector minus one, exactly, plus one; rows around a tile of 16 and around a chunk of 1024; more than
# one block of 256 columns.
DELTA = 1.4567  # no bfloat16 or float16 number: no logit lies on a kink
SIZES = [(1, 2), (3, 15), (16, 16), (17, 17), (100, 5), (40, 300), (1025, 33), (2100, 3)]


def sizes(backend):
    """For the interpreter: a chunk of 256 rows and some, three of them."""
    return [*SIZES[:4], (30, 5), (20, 150), (270, 3), (520, 2)] if interpreted(backend) else SIZES


def literal(logits, target, delta, bound, ce):
    """-log of eq. 8 (eq. 14 with ce) as printed: N x N terms, the bounds as hinges, in the dtype of the logits.

    numerator    exp(f_y),                        f_y = delta - [delta - z_iy]_+
    denominator  numerator + sum over j with y_j != y_i of exp(-delta + [delta + z_j,y_i]_+)     (0 + for "positive")
                 eq. 14: the row's own softmax denominator in place of the numerator there
    """
    losses = []
    low = 0.0 if bound == "positive" else -delta
    for i, y in enumerate(target.tolist()):
        own = torch.exp(delta - torch.relu(delta - logits[i, y]))
        others = [
            torch.exp(low + torch.relu(delta + logits[j, y])) for j, other in enumerate(target.tolist()) if other != y
        ]
        negatives = torch.stack(others).sum() if others else logits.new_zeros(())
        losses.append(-torch.log(own / ((logits[i].exp().sum() if ce else own) + negatives)))
    return torch.stack(losses)


def closed(logits, target, delta, bound, ce):
    """The same without the loop, for large batches: [N, N] negatives in the dtype of the logits."""
    z_label = logits.gather(1, target[:, None]).squeeze(1)
    a = z_label.clamp(max=delta)
    pairs = logits[:, target].t().clamp(min=-delta)  # [i, j]: z[j, y_i]
    pairs = pairs.masked_fill(target[:, None] == target[None, :], -math.inf)
    lift = delta if bound == "positive" else 0.0
    positive = logits.logsumexp(1) if ce else a
    return torch.logsumexp(torch.cat([pairs + lift, positive[:, None]], 1), 1) - a


@pytest.mark.parametrize("bound,ce", FORMS)
def test_value_and_gradient_are_those_of_the_papers_equation_term_by_term(backend, bound, ce):
    for n, classes, delta in ((6, 3, 1.0), (9, 5, 0.3), (5, 2, 2.5), (4, 6, 10.0)):
        logits, target = sample_logits(n, classes, torch.float64)
        logits.requires_grad_()
        loss = functional.one_to_n(logits, target, delta, bound, ce, "none", backend=backend)
        truth = literal(logits, target, delta, bound, ce)
        assert torch.allclose(loss, truth, rtol=1e-12, atol=1e-13)
        weight = torch.randn(n, dtype=torch.float64)
        (ours,) = torch.autograd.grad((loss * weight).sum(), logits)
        (theirs,) = torch.autograd.grad((truth * weight).sum(), logits)
        assert_gradients_agree(ours, theirs, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bound,ce", FORMS)
def test_values_and_gradients_in_every_dtype(backend, dtype, bound, ce):
    for n, classes in sizes(backend):
        logits, target = sample_logits(n, classes, dtype)
        logits.requires_grad_()
        loss = functional.one_to_n(logits, target, DELTA, bound, ce, "none", backend=backend)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        wide = logits.detach().double().requires_grad_()
        truth = closed(wide, target, DELTA, bound, ce)
        assert_as_good_as(loss, truth, closed(logits.detach(), target, DELTA, bound, ce), FLOOR[dtype])
        weight = 0.5 + torch.rand(n)
        (grad,) = torch.autograd.grad((loss * weight).sum(), logits)
        (slope,) = torch.autograd.grad((truth * weight.double()).sum(), wide)
        assert grad.dtype == dtype
        if slope.abs().max() > 0:
            assert_gradients_agree(grad, slope, GRADIENT_FLOOR[dtype] * 2)
        else:
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("bound,ce", FORMS)
@pytest.mark.parametrize("single", [False, True], ids=["mixed", "one class"])
def test_first_and_second_derivatives(backend, bound, ce, single):
    logits, target = sample_logits(*((4, 3) if interpreted(backend) else (6, 4)), torch.float64)
    target = torch.full_like(target, 2) if single else target
    logits.requires_grad_()

    def f(z):
        return functional.one_to_n(z, target, 1.0, bound, ce, "none", backend=backend)

    assert torch.autograd.gradcheck(f, (logits,))
    assert torch.autograd.gradgradcheck(f, (logits,))


def test_third_derivative(backend):
    logits, target = sample_logits(4, 3, torch.float64)

    for bound, ce in FORMS:
        own = partial(
            functional.one_to_n, target=target, bound=bound, cross_entropy=ce, reduction="none", backend=backend
        )
        expected = third_derivative(lambda z, b=bound, c=ce: closed(z, target, 1.0, b, c), logits)
        assert_gradients_agree(third_derivative(own, logits), expected, 1e-10)


def test_no_gradient_beyond_the_bounds_and_at_them(backend):
    """a = min(z, delta) and b = max(z, -delta) are flat at their kinks too."""
    logits = torch.tensor([[1.0, -1.0, -3.0], [0.5, 2.0, -0.999], [-2.0, 0.0, 0.999]], requires_grad=True)
    loss = functional.one_to_n(logits, torch.tensor([0, 1, 2]), 1.0, backend=backend)
    (grad,) = torch.autograd.grad(loss, logits)
    expected = torch.tensor([[0, 0, 0], [1, 0, 1], [0, 1, -1]])  # the sign of each entry
    assert torch.equal(grad.sign().int(), expected.int())


@pytest.mark.parametrize("bound,ce", FORMS)
def test_a_batch_of_one_class_has_no_negatives(backend, bound, ce):
    logits, _ = sample_logits(5, 4)
    logits.requires_grad_()
    target = torch.full((5,), 3)
    loss = functional.one_to_n(logits, target, 1.0, bound, ce, "none", backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    if not ce:
        assert torch.equal(loss, torch.zeros(5)) and torch.equal(grad, torch.zeros(5, 4))
        return
    label_excess = (logits[:, 3] - 1.0).clamp(min=0)
    truth = cross_entropy(logits, target, reduction="none") + label_excess
    assert torch.allclose(loss, truth, atol=1e-6)
    assert torch.allclose(grad, torch.autograd.grad(truth.sum(), logits)[0], atol=1e-6)


def test_a_class_without_negatives_leaves_the_others_alone(backend):
    """One sample only: its class has no negative, the others have no sample."""
    logits = torch.tensor([[0.3, -0.2, 0.5]], requires_grad=True)
    loss = functional.one_to_n(logits, torch.tensor([1]), backend=backend)
    assert loss == 0 and torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(1, 3))


def test_reductions(backend):
    logits, target = sample_logits(7, 5)
    each = functional.one_to_n(logits, target, reduction="none", backend=backend)
    assert torch.allclose(functional.one_to_n(logits, target, backend=backend), each.mean())
    assert torch.allclose(functional.one_to_n(logits, target, reduction="sum", backend=backend), each.sum())


@pytest.mark.parametrize("ce", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n,classes", [(6, 4), (20, 40)])
def test_a_non_finite_logit_gives_nan_in_every_loss_that_it_enters(backend, bad, n, classes, ce):
    logits, target = sample_logits(n, classes)
    target[:4] = torch.tensor([0, 1, 1, 2])
    clean = functional.one_to_n(logits, target, 1.0, "symmetric", ce, "none", backend=backend)
    for row, column in ((0, 1), (0, 0), (3, 3)):  # a negative of class 1; the label of sample 0; a negative of class 3
        z = logits.clone()
        z[row, column] = bad
        z.requires_grad_()
        loss = functional.one_to_n(z, target, 1.0, "symmetric", ce, "none", backend=backend)
        own = target[row] == column
        touched = torch.arange(n) == row if own else target == column
        if ce:
            touched[row] = True
        assert torch.equal(loss.isnan(), touched) and torch.equal(loss[~touched], clean[~touched])
        (grad,) = torch.autograd.grad(loss.sum(), z)
        assert grad[row, column].isnan()
        # A column has NaN where a loss that is NaN sends its gradient; with cross-entropy so have the rows of those.
        columns = torch.ones(classes, dtype=torch.bool)
        columns[[column, int(target[row])]] = False
        assert grad[~touched if ce else torch.arange(n) != row][:, columns].isfinite().all()


def test_all_gradients_agree_with_the_reference_around_a_nan(backend):
    logits, target = sample_logits(20, 18)
    logits[3, 5], logits[4, int(target[4])], logits[6, 17] = math.nan, math.inf, math.nan
    for bound, ce in FORMS:
        grads = []
        for name in (backend, "reference"):
            z = logits.clone().requires_grad_()
            loss = functional.one_to_n(z, target, 1.0, bound, ce, "none", backend=name)
            grads.append(torch.autograd.grad(loss.sum(), z)[0])
        assert torch.equal(grads[0].isnan(), grads[1].isnan()) and grads[0].isnan().any()
        assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("bound,ce", FORMS)
@pytest.mark.parametrize("n,classes", [(6, 4), (20, 40)])
def test_a_masked_negative_counts_as_one_far_below_the_bound(backend, n, classes, bound, ce):
    """max(-inf, -delta) = -delta; in a softmax its probability is 0, as it is at -1e4."""
    logits, target = sample_logits(n, classes, torch.float64)
    target[:4] = torch.tensor([0, 1, 1, 2])
    results = []
    for low in (-math.inf, -1e4):
        z = logits.clone()
        z[0, 1], z[3, 3], z[3, 0] = low, low, low
        z.requires_grad_()
        loss = functional.one_to_n(z, target, 1.0, bound, ce, "none", backend=backend)
        (first,) = torch.autograd.grad(loss.square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), z)
        results.append((loss, first, second))
    for masked, far in zip(*results, strict=True):
        assert masked.isfinite().all() and masked.abs().sum() > 0
        torch.testing.assert_close(masked, far, rtol=1e-10, atol=1e-12)
    assert results[0][1][0, 1] == 0 and results[0][2][3, 3] == 0


@pytest.mark.parametrize("ce", [False, True])
def test_a_masked_label_has_loss_infinity_and_a_finite_gradient(backend, ce):
    """L = softplus(A - a) with a = -inf: s = 1; with cross-entropy the label's slope is -1 as well."""
    logits, target = sample_logits(6, 4, torch.float64)
    target[:4] = torch.tensor([0, 1, 1, 2])
    logits[1, 1] = -math.inf
    logits[3] = -math.inf  # the label and all the others
    logits.requires_grad_()
    loss = functional.one_to_n(logits, target, 1.0, "symmetric", ce, "none", backend=backend)
    assert loss.isinf().tolist() == [False, True, False, True, False, False] and (loss > 0).all()
    (first,) = torch.autograd.grad(loss[[1, 3]].sum(), logits, create_graph=True)
    assert first.isfinite().all() and first[1, 1] == first[3, 2] == -1
    assert first[3, [0, 1, 3]].eq(0).all()
    (second,) = torch.autograd.grad(first.square().sum(), logits)
    assert second.isfinite().all()


@pytest.mark.parametrize("scale", [1e20, 1e-23, 50.0])
def test_large_and_small_logits(backend, scale):
    logits, target = sample_logits(9, 6, scale=scale)
    for ce in (False, True):
        z, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
        loss = functional.one_to_n(z, target, 1.0, "symmetric", ce, "none", backend=backend)
        truth = closed(wide, target, 1.0, "symmetric", ce)
        assert torch.allclose(loss.double(), truth, rtol=1e-5, atol=1e-6)
        (grad,) = torch.autograd.grad(loss.sum(), z)
        assert torch.allclose(grad.double(), torch.autograd.grad(truth.sum(), wide)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "misaligned"])
def test_any_strides(backend, layout):
    base, target = sample_logits(18, 37)
    logits = {
        "transposed": base.t().contiguous().t(),
        "expanded": base[:1].expand(18, 37),
        "strided": torch.stack([base, base * 2], dim=2)[..., 0],
        "misaligned": torch.cat([torch.zeros(1), base.flatten()])[1:].view(18, 37),
    }[layout]
    spread = torch.stack([target, torch.full_like(target, 99)], dim=1)[:, 0]
    plain = logits.clone(memory_format=torch.contiguous_format).requires_grad_()
    leaf = logits.detach().requires_grad_()
    a = functional.one_to_n(leaf, spread, reduction="none", backend=backend)
    b = functional.one_to_n(plain, target, reduction="none", backend=backend)
    assert torch.allclose(a, b, rtol=1e-6)
    weight = torch.randn(18)
    (grad,) = torch.autograd.grad(a, leaf, weight.expand(18))
    assert torch.allclose(grad, torch.autograd.grad(b, plain, weight)[0], rtol=1e-5, atol=1e-6)


def test_an_empty_batch_gives_empty_results_and_gradients(backend):
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = functional.one_to_n(logits, torch.zeros(0, dtype=torch.int64), reduction="none", backend=backend)
    assert list(loss.shape) == [0]
    assert list(torch.autograd.grad(loss.sum(), logits)[0].shape) == [0, 5]


@pytest.mark.parametrize("ce", [False, True])
def test_results_repeat_bit_by_bit_for_any_number_of_threads(backend, ce):
    logits, target = sample_logits(*((300, 30) if interpreted(backend) else (1500, 301)))
    logits.requires_grad_()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            loss = functional.one_to_n(logits, target, 1.0, "symmetric", ce, "none", backend=backend)
            results.append((loss, torch.autograd.grad((loss * loss.detach()).sum(), logits)[0]))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        if backend == "reference":  # ATen's sums may follow the number of threads
            assert torch.allclose(loss, results[0][0], rtol=1e-5) and torch.allclose(grad, results[0][1], rtol=1e-4)
        else:
            assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


WRONG = [
    (lambda z, y: (z.long(), y), TypeError, "logits must be float64, float32, bfloat16 or float16, got int64"),
    (lambda z, y: (z[0], y), ValueError, "logits must have shape [N, C], got [5]"),
    (lambda z, y: (z, y.int()), TypeError, "target must be int64 class indices, got int32"),
    (lambda z, y: (z, y[:2]), ValueError, "target must have shape [4] to match logits, got [2]"),
    (lambda z, y: (z[:, :1], y * 0), ValueError, "logits must have at least 2 classes, got 1"),
    (lambda z, y: (z, y, 0.0), ValueError, "delta must be finite and > 0, got 0"),
    (lambda z, y: (z, y, math.inf), ValueError, "delta must be finite and > 0, got inf"),
    (lambda z, y: (z, y, 1.0, "wide"), ValueError, "bound must be one of symmetric, positive, got wide"),
    (
        lambda z, y: (z, y, 1.0, "positive", True, "max"),
        ValueError,
        "reduction must be one of mean, sum, none, got max",
    ),
]


@pytest.mark.parametrize("arguments,error,words", WRONG, ids=[words[:40] for _, _, words in WRONG])
def test_a_wrong_argument_is_named_in_the_same_words_on_every_backend(backend, arguments, error, words):
    with pytest.raises(error) as caught:
        functional.one_to_n(*arguments(*sample_logits(4, 5)), backend=backend)
    assert words in str(caught.value)


@pytest.mark.parametrize("bad", [-1, 5])
def test_a_target_outside_the_classes_is_an_error_on_the_cpu_and_nan_on_a_gpu(backend, bad):
    logits, target = sample_logits(4, 5)
    target[3] = bad
    if not logits.is_cuda:
        with pytest.raises(ValueError, match=rf"target must be in \[0, 5\), got {bad} at row 3"):
            functional.one_to_n(logits, target, backend=backend)
        return
    loss = functional.one_to_n(logits, target, reduction="none", backend=backend)
    assert loss.isnan().all()  # whose negatives the row holds is unknown


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_the_loss_lies_between_the_bounds_that_delta_sets(data):
    """a <= delta and b >= -delta, so with m negatives L >= log(1 + m exp(-2 delta)); eq. 14 is never below eq. 8's
    negatives, and no order of the batch changes anything."""
    n, classes = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 20))
    delta = data.draw(st.sampled_from([0.25, 1.0, 4.0]))
    values = st.floats(-30, 30, width=32)
    logits = torch.tensor(
        data.draw(st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=n, max_size=n)),
        dtype=torch.float32,
    )
    target = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)))
    loss = functional.one_to_n(logits, target, delta, reduction="none")
    negatives = (target[:, None] != target[None, :]).sum(1)
    lowest = torch.log1p(negatives * math.exp(-2 * delta))
    assert (loss >= lowest * (1 - 1e-5) - 1e-6).all()
    order = torch.randperm(n)
    shuffled = functional.one_to_n(logits[order], target[order], delta, reduction="none")
    assert torch.allclose(shuffled, loss[order], rtol=1e-5, atol=1e-5)

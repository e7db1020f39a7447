"""One DeepFool step: choice, distance and step against a literal loop, derivatives, masks, ties, bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.norms import dual_exponent, norm64

from margin_kernels import functional
from margin_kernels.testing import (
    DTYPES,
    FLOOR,
    GRADIENT_FLOOR,
    assert_as_good_as,
    assert_gradients_agree,
    interpreted,
    relative_error,
    sample_gradients,
)

P = [1, 1.25, 2, 3, 7, math.inf]
# [N, k, *]: one number per row; no row at all beyond [N, k]; less than a vector; a vector and a rest, C-1 = 9
# candidates; a block of 4096 with a rest.
SHAPES = [(2, 3, 1), (4, 2), (3, 1, 5), (5, 9, 17), (4, 3, 2, 3, 4), (2, 2, 4103)]


def sample(*shape, dtype=torch.float32, scale=1.0):
    """gap [N, k] and gradients [N, k, *], normal, no two distances close in float64."""
    gap = sample_gradients(*shape[:2], dtype=dtype, seed=5)
    return gap, sample_gradients(*shape, dtype=dtype, scale=scale)


def loop(gap, gradients, p):
    """The definition as a literal loop, in float64: for each sample the nearest boundary and the step to it."""
    q = dual_exponent(p)
    steps, choices, distances = [], [], []
    for g, rows in zip(gap.detach().double(), gradients.detach().double(), strict=True):
        norms = [norm64(w.flatten(), q) for w in rows]
        all_distances = [abs(float(a)) / float(n) if n > 0 else math.inf for a, n in zip(g, norms, strict=True)]
        j = min(range(len(g)), key=lambda i: all_distances[i])
        w, d = rows[j], all_distances[j]
        slope = torch.zeros_like(w)
        if norms[j] > 0 and math.isinf(q):
            first = int(w.abs().flatten().argmax())
            slope.view(-1)[first] = w.flatten()[first].sign()
        elif norms[j] > 0:
            slope = torch.where(w == 0, 0.0, w.sign() * (w.abs() / norms[j]) ** (q - 1))
        steps.append(slope * d if norms[j] > 0 else slope)
        choices.append(j)
        distances.append(d)
    return torch.stack(steps), torch.tensor(choices), torch.tensor(distances, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", P)
def test_values_are_those_of_a_literal_loop(backend, dtype, p):
    for shape in SHAPES:
        gap, gradients = sample(*shape, dtype=dtype)
        result = functional.deepfool_step(gap, gradients, None, p, backend=backend)
        step, choice, distance = loop(gap, gradients, p)
        assert result.distance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert result.step.dtype == dtype and result.step.shape == (shape[0], *shape[2:])
        assert torch.equal(result.choice, choice)
        assert_as_good_as(result.distance, distance, distance.to(result.distance.dtype), FLOOR[dtype])
        assert_as_good_as(result.step, step, step.to(dtype), GRADIENT_FLOOR[dtype])


@pytest.mark.parametrize("p", P)
def test_the_step_closes_the_gap_and_is_as_long_as_the_distance(backend, p):
    gap, gradients = sample(6, 4, 31, dtype=torch.float64)
    result = functional.deepfool_step(gap, gradients, None, p, backend=backend)
    w = gradients[torch.arange(6), result.choice]
    closed = (w * result.step).sum(1)
    assert torch.allclose(closed, gap.gather(1, result.choice[:, None]).squeeze(1).abs(), rtol=1e-12)
    assert torch.allclose(torch.linalg.vector_norm(result.step, p, dim=1), result.distance, rtol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", P)
def test_gradients_in_every_dtype(backend, dtype, p):
    for shape in SHAPES:
        gap, gradients = sample(*shape, dtype=dtype)
        # In float16 the derivatives of long rows would be subnormal without the factor.
        length = math.prod(shape[2:])
        weights = torch.randn(shape[0], *shape[2:]) * length, torch.randn(shape[0]) * length
        wide = gap.double(), gradients.double()
        leaves = [t.requires_grad_() for t in (gap, gradients, *wide)]
        ours = functional.deepfool_step(gap, gradients, None, p, backend=backend)
        truth = functional.deepfool_step(*wide, None, p, backend="reference")
        grads = [
            torch.autograd.grad((r.step.double() * weights[0]).sum() + (r.distance * weights[1]).sum(), pair)
            for r, pair in ((ours, leaves[:2]), (truth, leaves[2:]))
        ]
        for a, b in zip(*grads, strict=True):
            assert a.dtype == dtype
            assert_gradients_agree(a, b, GRADIENT_FLOOR[dtype] * 4)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives(backend, p, masked):
    gap, gradients = sample(*((2, 2, 2) if interpreted(backend) else (4, 3, 2, 3)), dtype=torch.float64)
    leaves = gap.requires_grad_(), gradients.requires_grad_()
    active = torch.tensor([True, False, True, True])[: len(gap)] if masked else None

    def both(g, w):
        return functional.deepfool_step(g, w, active, p, backend=backend)[::2]

    assert torch.autograd.gradcheck(both, leaves)
    assert torch.autograd.gradgradcheck(both, leaves)
    for output in (0, 2):  # the other one has no gradient then
        assert torch.autograd.gradgradcheck(
            lambda g, w, i=output: functional.deepfool_step(g, w, active, p, backend=backend)[i], leaves
        )


@pytest.mark.parametrize("p", [1.25, 2, 3, math.inf])
def test_third_derivative_is_that_of_the_reference(backend, p):
    def third(name):
        leaves = [t.requires_grad_() for t in sample(2, 2, 3, dtype=torch.float64)]
        result = functional.deepfool_step(*leaves, None, p, backend=name)
        value = (result.step.sum(1) * torch.tensor([1.0, 2.0])).sum() + result.distance.sum()
        for _ in range(3):
            grads = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
            value = sum((g * torch.arange(1.0, g.numel() + 1).view_as(g)).sum() for g in grads)
        return torch.cat([g.flatten() for g in grads])

    assert_gradients_agree(third(backend), third("reference"), 1e-9)


def test_equal_distances_go_to_the_lowest_candidate(backend):
    gap = torch.tensor([[-2.0, 1.0, -1.0], [3.0, 2.0, -1.0]])
    gradients = torch.tensor([[[4.0, 0.0], [2.0, 0.0], [0.0, 2.0]], [[0.0, 3.0], [2.0, 0.0], [0.0, 1.0]]])
    for p in P:
        assert functional.deepfool_step(gap, gradients, None, p, backend=backend).choice.tolist() == [0, 0]


def test_the_whole_step_goes_on_the_first_of_the_largest_entries_for_p_1(backend):
    gap = torch.tensor([[-6.0]], requires_grad=True)
    gradients = torch.tensor([[[1.0, -3.0, 3.0, -3.0]]], requires_grad=True)
    result = functional.deepfool_step(gap, gradients, None, 1, backend=backend)
    assert result.step.tolist() == [[0.0, -2.0, 0.0, 0.0]] and result.distance.item() == 2
    (slope,) = torch.autograd.grad(result.distance.sum(), gradients)
    assert torch.allclose(slope, torch.tensor([[[0.0, 2 / 3, 0.0, 0.0]]]))  # -d / n at the same place


@pytest.mark.parametrize("p", P)
def test_zero_gradients_have_no_boundary(backend, p):
    gap, gradients = sample(3, 2, 7)
    gradients[0] = 0
    gradients[1, 0] = 0
    leaves = gap.requires_grad_(), gradients.requires_grad_()
    result = functional.deepfool_step(*leaves, None, p, backend=backend)
    assert result.distance[0] == math.inf and result.choice.tolist()[:2] == [0, 1]
    assert torch.equal(result.step[0], torch.zeros(7)) and result.distance[1:].isfinite().all()
    grads = torch.autograd.grad(result.step.sum() + result.distance.sum(), leaves, create_graph=True)
    assert all(torch.equal(g[0], torch.zeros_like(g[0])) and g[1:].isfinite().all() for g in grads)
    again = torch.autograd.grad(sum((g * g.detach()).sum() for g in grads), leaves, allow_unused=True)
    assert all(g is None or (g[0].eq(0).all() and g.isfinite().all()) for g in again)


@pytest.mark.parametrize("p", P)
def test_zero_entries_are_not_moved_and_have_finite_derivatives(backend, p):
    gap, gradients = sample(2, 2, 9)
    gradients[:, :, 3:6] = 0
    leaves = gap.requires_grad_(), gradients.requires_grad_()
    result = functional.deepfool_step(*leaves, None, p, backend=backend)
    assert torch.equal(result.step[:, 3:6], torch.zeros(2, 3)) and result.step.abs().amax(1).gt(0).all()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    weight = torch.randn(2, 9)
    grads = []
    for name, pair in ((backend, leaves), ("reference", wide)):
        step = functional.deepfool_step(*pair, None, p, backend=name).step
        grads.append(torch.autograd.grad((step * weight).sum(), pair))
    for a, b in zip(*grads, strict=True):
        assert_gradients_agree(a, b, 1e-5)


@pytest.mark.parametrize("p", P)
def test_a_sample_that_is_not_active_gives_zeros_whatever_it_holds(backend, p):
    gap, gradients = sample(4, 3, 19)
    clean = functional.deepfool_step(gap, gradients, None, p, backend=backend)
    gap[1], gradients[3, 2, 7] = math.nan, math.inf
    active = torch.tensor([True, False, True, False])
    leaves = gap.requires_grad_(), gradients.requires_grad_()
    result = functional.deepfool_step(*leaves, active, p, backend=backend)
    assert result.step[~active].eq(0).all() and result.distance[~active].eq(0).all()
    assert result.choice[~active].eq(0).all()
    for a, b in zip(result, clean, strict=True):
        assert torch.equal(a[active], b[active])
    grads = torch.autograd.grad(result.step.sum() + 2 * result.distance.sum(), leaves, create_graph=True)
    assert all(g[~active].eq(0).all() and g.isfinite().all() and g[active].abs().sum() > 0 for g in grads)
    again = torch.autograd.grad(sum((g * g.detach()).sum() for g in grads), leaves)
    assert all(g[~active].eq(0).all() and g.isfinite().all() for g in again)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gives_nan_and_leaves_the_other_samples_alone(backend, p, bad):
    gap, gradients = sample(4, 3, 19)
    clean = functional.deepfool_step(gap, gradients, None, p, backend=backend)
    # An infinite gap is that of a masked class: the next test.
    gap[1, 2], gradients[3, 1, 18] = math.nan, bad
    leaves = gap.requires_grad_(), gradients.requires_grad_()
    result = functional.deepfool_step(*leaves, None, p, backend=backend)
    assert result.step[[1, 3]].isnan().all() and result.distance[[1, 3]].isnan().all()
    assert result.choice[[1, 3]].tolist() == [0, 0]
    for a, b in zip(result, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    grads = torch.autograd.grad(result.step.sum() + result.distance.sum(), leaves)
    for g in grads:
        assert g[[1, 3], 0].isnan().all() and g[[1, 3], 1:].eq(0).all() and g[[0, 2]].isfinite().all()


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("masked", [math.inf, -math.inf])
def test_a_masked_class_is_never_chosen_while_another_is_left(backend, p, masked):
    gap, gradients = sample(4, 3, 19, dtype=torch.float64)
    gap[1, 0] = masked
    gap[2, 1:] = masked
    gap[3] = masked
    leaves = gap.requires_grad_(), gradients.requires_grad_()
    result = functional.deepfool_step(*leaves, None, p, backend=backend)
    one = functional.deepfool_step(gap[1:2, 1:], gradients[1:2, 1:], None, p, backend=backend)
    two = functional.deepfool_step(gap[2:3, :1], gradients[2:3, :1], None, p, backend=backend)
    assert result.choice[1] == one.choice + 1 and result.choice[2] == 0
    assert torch.equal(result.step[1], one.step[0]) and torch.equal(result.distance[2], two.distance[0])
    # Nothing left: step 0, distance infinity, choice 0.
    assert result.step[3].eq(0).all() and result.distance[3] == math.inf and result.choice[3] == 0
    outputs = result.step.square().sum() + result.distance[:3].sum() + result.distance[3]
    firsts = torch.autograd.grad(outputs, leaves, create_graph=True)
    seconds = torch.autograd.grad(sum((g * g.detach()).sum() for g in firsts), leaves)
    for g in (*firsts, *seconds):
        assert g.isfinite().all() and g[3].eq(0).all() and g[1, 0].eq(0).all() and g[2, 1:].eq(0).all()
    assert all(g[1:3].abs().sum() > 0 for g in firsts)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("scale", [1e20, 1e-23])
def test_neither_overflows_nor_flushes_to_zero(backend, p, scale):
    for dtype in (torch.float32, torch.bfloat16):
        gap, gradients = sample(3, 2, 50, dtype=dtype, scale=scale)
        step, choice, distance = loop(gap, gradients, p)
        result = functional.deepfool_step(gap, gradients, None, p, backend=backend)
        assert torch.equal(result.choice, choice)
        assert relative_error(result.distance.double() * scale, distance * scale) < 3e-6
        assert relative_error(result.step.double() * scale, step * scale) < GRADIENT_FLOOR[dtype]
        gap.requires_grad_()
        (slope,) = torch.autograd.grad(
            functional.deepfool_step(gap, gradients, None, p, backend=backend).step.float().sum(), gap
        )
        assert slope.isfinite().all() and slope.abs().amax(1).gt(0).all()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "channels_last", "misaligned"])
def test_any_strides(backend, layout):
    gap, base = sample(3, 4, 2, 5, 7)
    gradients = {
        "transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": base[:, :1].expand(3, 4, 2, 5, 7),
        "channels_last": base.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (3, 4)),
        "misaligned": torch.cat([torch.zeros(1), base.flatten()])[1:].view(3, 4, 2, 5, 7),
    }[layout]
    gaps = torch.stack([gap, gap * 9], dim=2)[..., 0]
    for p in (1, 2, 3):
        results = []
        for g, w in ((gaps, gradients), (gap, gradients.clone(memory_format=torch.contiguous_format))):
            leaves = g.detach().requires_grad_(), w.detach().requires_grad_()
            result = functional.deepfool_step(*leaves, None, p, backend=backend)
            weight = torch.arange(70.0).view(2, 5, 7)
            results.append((*result, *torch.autograd.grad((result.step * weight).sum(), leaves)))
        assert results[0][0].is_contiguous()
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_a_strided_mask(backend):
    gap, gradients = sample(4, 2, 6)
    active = torch.tensor([[True, False], [False, True], [True, True], [False, False]])[:, 0]
    result = functional.deepfool_step(gap, gradients, active, backend=backend)
    assert result.distance.gt(0).tolist() == [True, False, True, False]


def test_the_result_is_float64_where_one_input_is(backend):
    gap, gradients = sample(3, 2, 6)
    for g, w in ((gap.double(), gradients), (gap, gradients.double())):
        leaves = g.requires_grad_(), w.requires_grad_()
        result = functional.deepfool_step(*leaves, backend=backend)
        assert result.distance.dtype == torch.float64 and result.step.dtype == w.dtype
        truth = loop(g, w, 2)
        assert torch.allclose(result.distance, truth[2], rtol=1e-13)
        grads = torch.autograd.grad(result.step.sum() + result.distance.sum(), leaves)
        assert [x.dtype for x in grads] == [g.dtype, w.dtype] and all(x.abs().max() > 0 for x in grads)


def test_an_empty_batch_gives_empty_results_and_gradients(backend):
    gap, gradients = torch.zeros(0, 2, requires_grad=True), torch.zeros(0, 2, 3, 4, requires_grad=True)
    for p in P:
        result = functional.deepfool_step(gap, gradients, torch.zeros(0, dtype=torch.bool), p, backend=backend)
        assert [list(t.shape) for t in result] == [[0, 3, 4], [0], [0]]
        grads = torch.autograd.grad(result.step.sum() + result.distance.sum(), (gap, gradients))
        assert [list(g.shape) for g in grads] == [[0, 2], [0, 2, 3, 4]]


def test_results_repeat_and_do_not_depend_on_the_batch_or_the_threads(backend):
    gap, gradients = sample(9 if interpreted(backend) else 60, 3, 1003)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(functional.deepfool_step(gap, gradients, None, 3, backend=backend))
    finally:
        torch.set_num_threads(threads)
    results.append(functional.deepfool_step(gap[7:8], gradients[7:8], None, 3, backend=backend))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            a = a if len(a) == len(b) else a[7:8]
            # The reference adds with ATen's kernels, whose order of summation may follow the shape.
            assert torch.equal(a, b) if backend != "reference" else torch.allclose(a, b, rtol=1e-5)


WRONG = [
    (lambda g, w: (g.long(), w), TypeError, "gap must be float64, float32, bfloat16 or float16, got int64"),
    (lambda g, w: (g, w.int()), TypeError, "gradients must be float64, float32, bfloat16 or float16, got int32"),
    (lambda g, w: (g[0], w), ValueError, "gap must have shape [N, k] with k >= 1, got [2]"),
    (lambda g, w: (g[:, :0], w), ValueError, "gap must have shape [N, k] with k >= 1, got [4, 0]"),
    (lambda g, w: (g, w[:, :1]), ValueError, "gradients must begin with [4, 2] like gap, got [4, 1, 5]"),
    (lambda g, w: (g, w[0, 0]), ValueError, "gradients must begin with [4, 2] like gap, got [5]"),
    (lambda g, w: (g, w, torch.ones(4)), TypeError, "active must be bool, got float32"),
    (lambda g, w: (g, w, torch.ones(3).bool()), ValueError, "active must have shape [4] to match gap, got [3]"),
    (lambda g, w: (g, w, None, 0.5), ValueError, "p must be >= 1 (or inf), got 0.5"),
]


@pytest.mark.parametrize("arguments,error,words", WRONG, ids=[words[:40] for _, _, words in WRONG])
def test_a_wrong_argument_is_named_in_the_same_words_on_every_backend(backend, arguments, error, words):
    with pytest.raises(error) as caught:
        functional.deepfool_step(*arguments(*sample(4, 2, 5)), backend=backend)
    assert words in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_no_candidate_is_nearer_and_the_step_reaches_its_boundary(data):
    n, k, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 30))
    p = data.draw(st.sampled_from(P))
    values = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
    numbers = data.draw(st.lists(values, min_size=n * k * (length + 1), max_size=n * k * (length + 1)))
    gap = torch.tensor(numbers[: n * k], dtype=torch.float32).view(n, k)
    gradients = torch.tensor(numbers[n * k :], dtype=torch.float32).view(n, k, length)
    result = functional.deepfool_step(gap, gradients, None, p)
    norms = functional.dual_norm([gradients], p)[..., 0]
    distances = torch.where(norms > 0, gap.abs() / norms, math.inf)
    assert torch.allclose(result.distance, distances.amin(1), rtol=1e-5)
    finite = result.distance.isfinite()
    w = gradients[torch.arange(n), result.choice]
    reached = gap.gather(1, result.choice[:, None]).squeeze(1).abs()
    assert torch.allclose((w * result.step).sum(1)[finite], reached[finite], rtol=1e-4, atol=1e-4)
    assert result.step[~finite].eq(0).all()

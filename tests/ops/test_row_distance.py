"""Norms of differences of gathered rows: values over the range of the type, derivatives, repeated rows, bad indices."""

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
    seeded,
)

P = [1, 1.25, 2, 3, 7, math.inf]
# (C, D, N, k): one element; less than a vector; a vector and a rest; a block of 4096 with a rest; two threads.
SIZES = [(2, 1, 1, 1), (3, 5, 4, 2), (10, 17, 6, 9), (4, 4101, 3, 3), (50, 300, 200, 5)]


def sizes(backend):
    """For the interpreter: two tiles of pairs in the last one."""
    return [*SIZES[:-1], (50, 300, 2, 5)] if interpreted(backend) else SIZES


def sample(classes, length, n, k, dtype=torch.float32, scale=1.0):
    """rows, and pairs of different classes where there are enough."""
    rows = sample_gradients(classes, length, dtype=dtype, scale=scale)
    target = torch.randint(0, classes, (n,), generator=seeded(n), device="cpu").to(rows.device)
    index = (target[:, None] + 1 + torch.arange(k)) % classes
    return rows, index, target


def loop(rows, index, target, p):
    """The definition as a literal loop over pairs, in float64."""
    wide, q = rows.detach().double(), dual_exponent(p)
    norms = torch.zeros(index.shape, dtype=torch.float64)
    for n, y in enumerate(target.tolist()):
        for j, i in enumerate(index[n].tolist()):
            norms[n, j] = norm64(wide[i] - wide[y], q)
    return norms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", P)
def test_values_are_those_of_a_literal_loop(backend, dtype, p):
    for size in sizes(backend):
        rows, index, target = sample(*size, dtype=dtype)
        norms = functional.row_distance(rows, index, target, p, backend=backend)
        assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        same = torch.linalg.vector_norm(rows[index] - rows[target][:, None], dual_exponent(p), dim=-1)
        assert_as_good_as(norms, loop(rows, index, target, p), same, FLOOR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", P)
def test_gradient_adds_the_slopes_of_every_pair_and_is_rounded_once(backend, dtype, p):
    for size in sizes(backend):
        rows, index, target = sample(*size, dtype=dtype)
        rows.requires_grad_()
        weight = 0.5 + torch.rand(index.shape)
        norms = functional.row_distance(rows, index, target, p, backend=backend)
        (grad,) = torch.autograd.grad((norms * weight).sum(), rows)
        truth = torch.zeros(rows.shape, dtype=torch.float64)
        wide = rows.detach().double()
        for n, y in enumerate(target.tolist()):
            for j, i in enumerate(index[n].tolist()):
                difference = (wide[i] - wide[y]).requires_grad_()
                norm = torch.linalg.vector_norm(difference, dual_exponent(p))
                (slope,) = torch.autograd.grad(norm * weight[n, j].double(), difference)
                truth[i] += slope
                truth[y] -= slope
        assert grad.dtype == dtype
        assert_gradients_agree(grad, truth, GRADIENT_FLOOR[dtype] * 2)


@pytest.mark.parametrize("p", P)
def test_first_and_second_derivatives(backend, p):
    rows, index, target = sample(*((3, 3, 3, 2) if interpreted(backend) else (5, 4, 6, 3)), torch.float64)
    rows.requires_grad_()

    def f(w):
        return functional.row_distance(w, index, target, p, backend=backend)

    assert torch.autograd.gradcheck(f, (rows,))
    assert torch.autograd.gradgradcheck(f, (rows,))


@pytest.mark.parametrize("p", P)
def test_a_row_against_itself_is_zero_with_gradients_zero(backend, p):
    rows = sample_gradients(4, 9).requires_grad_()
    index, target = torch.tensor([[1, 2], [3, 3]]), torch.tensor([1, 3])
    norms = functional.row_distance(rows, index, target, p, backend=backend)
    assert norms[0, 0] == 0 and norms[1].eq(0).all() and norms[0, 1] > 0
    (alone,) = torch.autograd.grad(norms[0, 0] + norms[1].sum(), rows, create_graph=True)
    assert torch.equal(alone, torch.zeros(4, 9))
    (again,) = torch.autograd.grad((alone * torch.randn(4, 9)).sum(), rows, allow_unused=True)
    assert again is None or torch.equal(again, torch.zeros(4, 9))


def test_equal_largest_entries_share_the_gradient_for_p_1(backend):
    rows = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, -2.0, 1.0, 2.0]], requires_grad=True)
    norms = functional.row_distance(rows, torch.tensor([[1]]), torch.tensor([0]), 1, backend=backend)
    (grad,) = torch.autograd.grad(norms.sum(), rows)
    expected = torch.tensor([1.0, -1.0, 0.0, 1.0]) / 3
    assert torch.allclose(grad, torch.stack([-expected, expected]), rtol=1e-6)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("scale", [1e20, 1e-23])
def test_neither_overflows_nor_flushes_to_zero(backend, p, scale):
    for dtype in (torch.float32, torch.bfloat16):
        rows, index, target = sample(6, 50, 4, 3, dtype, scale)
        rows.requires_grad_()
        norms = functional.row_distance(rows, index, target, p, backend=backend)
        assert relative_error(norms / scale, loop(rows, index, target, p) / scale) < 3e-6
        (slope,) = torch.autograd.grad(norms.sum(), rows)
        wide = (rows.detach().double() / scale).requires_grad_()
        (truth,) = torch.autograd.grad(functional.row_distance(wide, index, target, p, backend="reference").sum(), wide)
        assert_gradients_agree(slope, truth, GRADIENT_FLOOR[dtype] * 4)


@pytest.mark.parametrize("p", P)
def test_differences_of_large_half_precision_rows_are_formed_in_float32(backend, p):
    rows = torch.tensor([[60000.0, -60000.0], [-60000.0, 60000.0]], dtype=torch.float16)
    norms = functional.row_distance(rows, torch.tensor([[1]]), torch.tensor([0]), p, backend=backend)
    assert norms.item() == pytest.approx(120000 * 2 ** (1 / dual_exponent(p)), rel=1e-6)


@pytest.mark.parametrize("p", P)
def test_nan_stays_with_the_pairs_of_its_row(backend, p):
    rows, index, target = sample(5, 40, 5, 2)
    clean = functional.row_distance(rows, index, target, p, backend=backend)
    rows[2, 17] = math.nan
    rows.requires_grad_()
    norms = functional.row_distance(rows, index, target, p, backend=backend)
    touched = (index == 2) | (target[:, None] == 2)
    assert touched.any() and norms[touched].isnan().all() and torch.equal(norms[~touched], clean[~touched])
    (grad,) = torch.autograd.grad(norms.sum(), rows)
    # The derivative of abs in ATen is 0 at NaN.
    assert grad[2, 17].isnan() or (backend == "reference" and math.isinf(p))


def test_an_infinite_row_is_not_a_finite_distance(backend):
    rows, index, target = sample(4, 20, 3, 2)
    rows[1, 3] = math.inf
    for p in P:
        norms = functional.row_distance(rows, index, target, p, backend=backend)
        touched = (index == 1) | (target[:, None] == 1)
        assert touched.any() and not norms[touched].isfinite().any() and norms[~touched].isfinite().all()


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided", "misaligned"])
def test_any_strides(backend, layout):
    base, index, target = sample(6, 37, 5, 4)
    rows = {
        "transposed": base.t().contiguous().t(),
        "expanded": base[:1].expand(6, 37),
        "strided": torch.stack([base, base * 2], dim=2)[..., 0],
        "misaligned": torch.cat([torch.zeros(1), base.flatten()])[1:].view(6, 37),
    }[layout]
    spread = torch.stack([index, index + 99], dim=2)[..., 0], torch.stack([target, target + 99], dim=1)[:, 0]
    plain = rows.clone(memory_format=torch.contiguous_format)
    a = functional.row_distance(rows, *spread, 3, backend=backend)
    b = functional.row_distance(plain, index, target, 3, backend=backend)
    assert torch.allclose(a, b, rtol=1e-6)
    leaf = rows.detach().requires_grad_()
    (grad,) = torch.autograd.grad(functional.row_distance(leaf, *spread, 3, backend=backend).sum(), leaf)
    plain.requires_grad_()
    (truth,) = torch.autograd.grad(functional.row_distance(plain, index, target, 3, backend=backend).sum(), plain)
    assert torch.allclose(grad, truth, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_gives_empty_results_and_a_zero_gradient(backend):
    rows = torch.randn(4, 7, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    norms = functional.row_distance(rows, none.view(0, 3), none, backend=backend)
    assert list(norms.shape) == [0, 3]
    (grad,) = torch.autograd.grad(norms.sum(), rows)
    assert torch.equal(grad, torch.zeros(4, 7))


def test_results_repeat_and_do_not_depend_on_the_batch_or_the_threads(backend):
    rows, index, target = sample(*((6, 515, 9, 3) if interpreted(backend) else (60, 515, 90, 7)))
    rows.requires_grad_()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            norms = functional.row_distance(rows, index, target, 3, backend=backend)
            results.append((norms, torch.autograd.grad((norms * norms.detach()).sum(), rows)[0]))
    finally:
        torch.set_num_threads(threads)
    for norms, grad in results[1:]:
        if backend == "reference":  # ATen's sums may follow the number of threads
            assert torch.allclose(norms, results[0][0], rtol=1e-5)
            assert torch.allclose(grad, results[0][1], rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(norms, results[0][0]) and torch.equal(grad, results[0][1])
    alone = functional.row_distance(rows, index[7:8], target[7:8], 3, backend=backend)
    assert torch.allclose(alone, results[0][0][7:8], rtol=0 if backend != "reference" else 1e-6, atol=0)


WRONG = [
    (lambda w, i, y: (w.long(), i, y), TypeError, "rows must be float64, float32, bfloat16 or float16, got int64"),
    (lambda w, i, y: (w[0], i, y), ValueError, "rows must have shape [C, D], got [7]"),
    (lambda w, i, y: (w, i.int(), y), TypeError, "index must be int64 class indices, got int32"),
    (lambda w, i, y: (w, i, y.int()), TypeError, "target must be int64 class indices, got int32"),
    (lambda w, i, y: (w, i[0], y), ValueError, "index must have shape [N, k] with k >= 1, got [2]"),
    (lambda w, i, y: (w, i[:, :0], y), ValueError, "index must have shape [N, k] with k >= 1, got [3, 0]"),
    (lambda w, i, y: (w, i, y[:2]), ValueError, "target must have shape [3] to match index, got [2]"),
    (lambda w, i, y: (w, i, y, 0.5), ValueError, "p must be >= 1 (or inf), got 0.5"),
]


@pytest.mark.parametrize("arguments,error,words", WRONG, ids=[words[:40] for _, _, words in WRONG])
def test_a_wrong_argument_is_named_in_the_same_words_on_every_backend(backend, arguments, error, words):
    with pytest.raises(error) as caught:
        functional.row_distance(*arguments(*sample(5, 7, 3, 2)), backend=backend)
    assert words in str(caught.value)


@pytest.mark.parametrize("bad", [-1, 5])
@pytest.mark.parametrize("which", ["index", "target"])
def test_a_class_outside_the_rows_is_an_error_on_the_cpu_and_nan_on_a_gpu(backend, which, bad):
    rows, index, target = sample(5, 7, 3, 2)
    if which == "index":
        index[1, 0] = bad
    else:
        target[1] = bad
    if not rows.is_cuda:
        with pytest.raises(ValueError, match=rf"{which} must be in \[0, 5\), got {bad} at row 1"):
            functional.row_distance(rows, index, target, backend=backend)
        return
    norms = functional.row_distance(rows.requires_grad_(), index, target, backend=backend)
    assert norms.isnan().tolist() == [[False, False], [True, which == "target"], [False, False]]
    assert torch.autograd.grad(norms.nansum(), rows)[0].isfinite().all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_property_distances_are_symmetric_and_obey_the_triangle_inequality(data):
    classes, length = data.draw(st.integers(3, 8)), data.draw(st.integers(1, 40))
    p = data.draw(st.sampled_from(P))
    values = st.floats(-1e3, 1e3, width=32)
    rows = torch.tensor(
        data.draw(st.lists(st.lists(values, min_size=length, max_size=length), min_size=classes, max_size=classes)),
        dtype=torch.float32,
    )
    everyone = torch.arange(classes)
    table = functional.row_distance(rows, everyone.expand(classes, classes), everyone, p)
    assert torch.equal(table, table.t()) and table.diagonal().eq(0).all()
    through = (table[:, :, None] + table[None, :, :]).amin(dim=1)
    assert (table <= through * (1 + 1e-5) + 1e-30).all()

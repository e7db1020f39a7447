"""Dual norms of gradient rows: values over the whole range of the type, derivatives, layouts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.norms import dual_exponent, norm64

from margin_kernels import backends, functional
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

P = [1, 1.25, 4 / 3, 1.5, 2, 3, 4, 7, math.inf]  # q = inf, 5, 4, 3, 2, 3/2, 4/3, 7/6, 1

# One element; less than a vector; a vector and a rest; no multiple of 16 bytes; several blocks of 4096 with a rest.
SHAPES = [(2, 3, 1), (2, 2, 5), (3, 1, 17), (2, 3, 7, 11, 5), (1, 2, 4096), (2, 1, 9001)]


def norms64(g, p):
    return norm64(g.flatten(2), dual_exponent(p))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", P)
def test_values(backend, dtype, p):
    for shape in SHAPES:
        g = sample_gradients(*shape, dtype=dtype)
        norms = functional.dual_norm([g], p, backend=backend)
        assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        same = torch.linalg.vector_norm(g.flatten(2), dual_exponent(p), dim=-1)
        assert_as_good_as(norms[..., 0], norms64(g, p), same, FLOOR[dtype])


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("scale", [1e20, 1e-23, 1e36, 1e-37])
def test_neither_overflows_nor_flushes_to_zero(backend, p, scale):
    for dtype in (torch.float32, torch.bfloat16):
        g = sample_gradients(2, 1, 50, dtype=dtype, scale=scale)
        truth = norms64(g, p)
        norms = functional.dual_norm([g], p, backend=backend)[..., 0]
        representable = truth < torch.finfo(torch.float32).max
        assert representable.any()
        assert relative_error(norms[representable] / scale, truth[representable] / scale) < 3e-6
        g.requires_grad_()
        (slope,) = torch.autograd.grad(functional.dual_norm([g], p, backend=backend).sum(), g)
        wide = (g.detach().double() / scale).requires_grad_()
        (truth,) = torch.autograd.grad(functional.dual_norm([wide], p, backend="reference").sum(), wide)
        assert_gradients_agree(slope, truth, GRADIENT_FLOOR[dtype] * 4)


@pytest.mark.parametrize("p", P)
def test_one_large_and_many_small_entries(backend, p):
    g = torch.full((1, 1, 5000), 1e-23)
    g[0, 0, 4321] = 1e20
    norms = functional.dual_norm([g], p, backend=backend)
    assert relative_error(norms[..., 0], norms64(g, p)) < 1e-6


def drawn_row(seed, kind, length, exponent, dtype):
    """A row of one kind, in the scale 2^exponent: the smallest entries are subnormal, the largest that of the type."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(length, generator=generator, dtype=torch.float64)
    uniform = torch.rand(length + 2, generator=generator, dtype=torch.float64)
    a, b, uniform = 1 + uniform[0], 0.1 + uniform[1], uniform[2:]
    place = torch.arange(length)
    row = {
        "normal": normal,
        "equal": a.expand(length),
        "two values": torch.where(place % 2 == 0, a, b),
        "two values, 16 of each": torch.where(place // 16 % 2 == 0, a, b),
        "many magnitudes": normal * torch.exp2(-60 * uniform),
        "one large entry": torch.where(place == length // 2, 1.0, b / 1000),
        "large entries at the end": torch.where(place >= length - 3, torch.exp2(40 * uniform), normal * 1e-6),
        "mostly zeros": torch.where(uniform < 0.9, 0.0, normal),
        "zeros first": torch.where(place < length // 2, 0.0, normal),
    }[kind]
    largest = torch.finfo(dtype).max
    return (row * 2.0**exponent).clamp(-largest, largest).to(dtype)


KINDS = [
    "normal",
    "equal",
    "two values",
    "two values, 16 of each",
    "many magnitudes",
    "one large entry",
    "large entries at the end",
    "mostly zeros",
    "zeros first",
]


def units(actual, truth):
    """|actual - truth| in units in the last place of the float32 that is next to the truth."""
    exponent = torch.frexp(truth).exponent.clamp(min=-125)
    return (actual.double() - truth).abs() / torch.exp2(exponent.double() - 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    p=st.one_of(st.sampled_from([1.002, 1.02, *P, 5 / 3, 1.75, 5, 11, 101, 1e6]), st.floats(1.003, 50)),
    length=st.one_of(st.integers(1, 200), st.sampled_from([784, 4095, 4096, 9001])),
    exponent=st.integers(-140, 100),
)
def test_norms_are_within_two_units_in_the_last_place_of_float32(dtype, seed, kind, p, length, exponent):
    if backends.why_not("cpu", "competitors", (torch.zeros(1, 2),)):
        pytest.skip("the bound is the compiled kernels'")
    exponent = exponent // 12 if dtype == torch.float16 else exponent
    g = drawn_row(seed, kind, length, exponent, dtype).view(1, -1)
    truth = norm64(g, dual_exponent(p))
    norm = functional.dual_norm([g], p, 1, backend="cpu")[:, 0]
    assert truth.isfinite().all()
    # A sum of a million magnitudes may lie beyond float32: infinite then.
    beyond = truth > torch.finfo(torch.float32).max
    assert (units(norm, truth)[~beyond] <= 2).all() and norm[beyond].eq(math.inf).all()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    p=st.one_of(st.sampled_from([*P[1:-1], 5 / 3, 5, 11, 1e6]), st.floats(17 / 16, 50)),
    length=st.integers(1, 200),
    exponent=st.integers(-120, 80),
    weight=st.floats(-(2.0**66), 2.0**66, width=32),
)
def test_each_slope_is_right_to_a_few_roundings(seed, kind, p, length, exponent, weight):
    """Entry by entry, against the slope at the norm that is returned: 3 + q roundings of float32."""
    if backends.why_not("cpu", "competitors", (torch.zeros(1, 2),)):
        pytest.skip("the bound is the compiled kernels'")
    g = drawn_row(seed, kind, length, exponent, torch.float32).view(1, -1).requires_grad_()
    norm = functional.dual_norm([g], p, 1, backend="cpu")
    (slope,) = torch.autograd.grad(norm, g, torch.full_like(norm, weight))
    q, rows = dual_exponent(p), g.detach().double()
    if norm.item() == 0:
        assert (slope == 0).all()
        return
    truth = rows.sign() * (rows.abs() / norm.item()) ** (q - 1) * weight
    error = (slope.double() - truth).abs()
    assert (error <= (3 + q) * 2.0**-24 * truth.abs() + 2.0**-148).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", P)
def test_slopes(backend, dtype, p):
    for shape in SHAPES:
        g = sample_gradients(*shape, dtype=dtype).requires_grad_()
        weight = torch.rand(*shape[:2], 1)
        (slope,) = torch.autograd.grad((functional.dual_norm([g], p, backend=backend) * weight).sum(), g)
        rows, q, norm = g.detach().double().flatten(2), dual_exponent(p), norms64(g, p)[..., None]
        if math.isinf(q):
            at_max = rows.abs() == norm
            truth = rows.sign() * at_max / at_max.sum(-1, keepdim=True)
        else:
            truth = rows.sign() * (rows.abs() / norm) ** (q - 1)
        assert_gradients_agree(slope, (truth * weight.double()).view_as(g), GRADIENT_FLOOR[dtype])


@pytest.mark.parametrize("p", P)
def test_first_and_second_derivatives(backend, p):
    lead = (1, 2) if interpreted(backend) else (2, 3)
    a = sample_gradients(*lead, 3 if interpreted(backend) else 5, dtype=torch.float64, seed=1).requires_grad_()
    b = sample_gradients(
        *lead, *((2,) if interpreted(backend) else (2, 2)), dtype=torch.float64, seed=2
    ).requires_grad_()

    def f(a, b):
        return functional.dual_norm([a, b], p, backend=backend)

    assert torch.autograd.gradcheck(f, (a, b))
    assert torch.autograd.gradgradcheck(f, (a, b))


@pytest.mark.parametrize("p", P)
def test_a_zero_row_has_norm_slope_and_curvature_zero(backend, p):
    g = torch.zeros(2, 1, 6, dtype=torch.float64)
    g[1] = torch.randn(6)
    g.requires_grad_()
    norms = functional.dual_norm([g], p, backend=backend)
    (slope,) = torch.autograd.grad(norms.sum(), g, create_graph=True)
    assert norms[0].item() == 0 and (slope[0] == 0).all()
    if p not in (1, math.inf):
        (curvature,) = torch.autograd.grad((slope * torch.randn_like(slope)).sum(), g)
        assert (curvature[0] == 0).all() and curvature[1].isfinite().all() and curvature[1].abs().max() > 0


def test_slope_at_zero_entries_is_zero_for_the_sum_norm(backend):
    g = torch.tensor([[[0.0, -2.0, 0.0, 3.0]]], requires_grad=True)
    (slope,) = torch.autograd.grad(functional.dual_norm([g], math.inf, backend=backend).sum(), g)
    assert slope.flatten().tolist() == [0.0, -1.0, 0.0, 1.0]


def test_slope_of_the_maximum_is_split_evenly_over_ties(backend):
    g = torch.tensor([[[1.0, -4.0, 4.0, 0.0, 4.0]]], requires_grad=True)
    (slope,) = torch.autograd.grad(functional.dual_norm([g], 1, backend=backend).sum(), g)
    assert torch.allclose(slope.flatten(), torch.tensor([0.0, -1 / 3, 1 / 3, 0.0, 1 / 3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1 + 1e-9, 1 + 1e-7, 1 + 1e-5, 1.001, 1.05, 1e3, 1e9, 1e15])
def test_p_very_near_one_and_very_large(backend, dtype, p):
    """q from 1e9 down to 1 + 1e-15: value and slope against float64, with ties and near ties at the maximum."""
    g = sample_gradients(2, 2, 33, dtype=dtype)
    g[0, 0, 3] = g[0, 0, 7] = 5.0
    g[0, 1, 5], g[0, 1, 6] = 4.0, 4.0 * (1 - 2 * torch.finfo(dtype).eps)
    g.requires_grad_()
    norms = functional.dual_norm([g], p, backend=backend)
    (slope,) = torch.autograd.grad(norms.sum(), g)
    q = p / (p - 1)
    wide = g.detach().double()
    largest = wide.abs().amax(-1, keepdim=True)
    # log of the ratio from the difference, which is exact: the q-th power of a rounded ratio is not.
    logs = torch.log1p((wide.abs() - largest) / largest)
    total = (q * logs).exp().sum(-1, keepdim=True)
    truth = largest * (total.log() / q).exp()
    assert relative_error(norms, truth) < (1e-12 if dtype == torch.float64 else 3e-6)
    exact = wide.sign() * ((q - 1) * logs - total.log() * (q - 1) / q).exp()
    assert slope.isfinite().all()
    assert_gradients_agree(slope, exact, max(GRADIENT_FLOOR[dtype], 4e-16 * q))


@pytest.mark.parametrize("p", [1.05, 4 / 3, 1.5, 2, 3, 4, 7, 1e9])
def test_a_norm_beyond_float32_is_infinite_with_slope_zero(backend, p):
    g = torch.tensor([[[3e38, -3e38, 1.0]], [[3.0, -4.0, 1.0]]], requires_grad=True)
    norms = functional.dual_norm([g], p, backend=backend)
    (slope,) = torch.autograd.grad(norms.sum(), g, create_graph=True)
    expected = math.inf if p != 1.05 else norms64(g, p)[0].item()
    assert norms[0].item() == pytest.approx(expected) and norms[1].isfinite().all()
    assert (slope[0] == 0).all() if expected == math.inf else slope[0].isfinite().all()
    assert slope[1].abs().sum() > 0


def test_a_sum_beyond_float32_is_infinite_with_slope_one(backend):
    g = torch.tensor([[[3e38, -3e38, 1.0]]], requires_grad=True)
    norms = functional.dual_norm([g], math.inf, backend=backend)
    assert norms.item() == math.inf
    assert torch.autograd.grad(norms.sum(), g)[0].flatten().tolist() == [1.0, -1.0, 1.0]


@pytest.mark.parametrize("p", P)
def test_the_slope_at_nan_is_nan(backend, p):
    g = torch.tensor([[[1.0, math.nan, -2.0]]], requires_grad=True)
    norms = functional.dual_norm([g], p, backend=backend)
    slope = torch.autograd.grad(norms.sum(), g)[0].flatten()
    assert norms.isnan().all() and slope[1].isnan()
    if p == math.inf:
        assert slope[[0, 2]].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("p", [1.25, 4 / 3, 1.5, 2, 3, 4, 7])
def test_the_norm_of_one_bfloat16_is_itself_in_rows_of_any_length(backend, p):
    """Every positive normal number, alone and before zeros: within 2 units in the last place of float32."""
    every = torch.arange(0x0080, 0x7F80, 1 if backend in ("cpu", "reference") else 97, dtype=torch.int32)
    numbers = every.to(torch.int16).view(torch.bfloat16)
    for length in (1, 33, 65):
        rows = torch.zeros(len(numbers), length, dtype=torch.bfloat16)
        rows[:, length // 2] = -numbers
        norms = functional.dual_norm([rows], p, 1, backend=backend)[:, 0].double()
        truth = numbers.double()
        assert ((norms - truth).abs() <= 2 * torch.exp2(truth.log2().floor() - 23)).all()


@pytest.mark.parametrize("p", P)
def test_rows_that_overlap(backend, p):
    g = sample_gradients(20).unfold(0, 9, 1).detach().requires_grad_()
    assert g.stride() == (1, 1)
    plain = g.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    slopes = [
        torch.autograd.grad(functional.dual_norm([rows], p, 1, backend=backend).square().sum(), rows)[0]
        for rows in (g, plain)
    ]
    assert torch.equal(slopes[0], slopes[1]) and slopes[0].abs().sum() > 0


def test_infinity_may_be_spelled(backend):
    g = sample_gradients(2, 3, 7)
    named = functional.dual_norm([g], "inf", backend=backend)
    assert torch.equal(named, functional.dual_norm([g], math.inf, backend=backend)) and named.min() > 0
    with pytest.raises(ValueError, match=r"p must be >= 1 \(or inf\), got two"):
        functional.dual_norm([g], "two", backend=backend)


@pytest.mark.parametrize("p", [1.5, 3])
def test_second_derivative_at_a_zero_entry_is_zero_and_not_nan(backend, p):
    g = torch.tensor([[[0.0, -2.0, 1.0]]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(functional.dual_norm([g], p, backend=backend).sum(), g, create_graph=True)
    (curvature,) = torch.autograd.grad(slope[..., 0].sum(), g)
    assert curvature.isfinite().all() and curvature[0, 0, 0] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("place", [0, 40, 99])
def test_nan_and_infinity_show(backend, dtype, p, place):
    g = sample_gradients(3, 1, 100, dtype=dtype)
    clean = functional.dual_norm([g], p, backend=backend)
    g[1, 0, place] = math.nan
    g[2, 0, place] = -math.inf
    norms = functional.dual_norm([g], p, backend=backend).flatten().tolist()
    assert norms[0] == clean[0].item() and math.isnan(norms[1]) and norms[2] == math.inf


@pytest.mark.parametrize("p", [1, 2, 3, 5, math.inf])
@pytest.mark.parametrize(
    "layout", ["channels_last", "transposed", "expanded", "gaps", "misaligned", "batch_transposed"]
)
def test_any_strides(backend, p, layout):
    base = sample_gradients(4, 6, 5, 7)
    g = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": base[..., :1].expand(4, 6, 5, 7),
        "gaps": torch.stack([base, base], 4)[..., 0],
        "misaligned": torch.cat([torch.zeros(3), base.flatten()])[3:].view(4, 6, 5, 7),
        "batch_transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
    }[layout]
    plain = g.clone(memory_format=torch.contiguous_format).requires_grad_()
    for batch_dims in (1, 2):
        h = g.detach().requires_grad_()
        norms = functional.dual_norm([h], p, batch_dims=batch_dims, backend=backend)
        truth = functional.dual_norm([plain], p, batch_dims=batch_dims, backend=backend)
        assert torch.allclose(norms, truth, rtol=1e-6)
        weight = torch.rand_like(norms)
        (slope,) = torch.autograd.grad((norms * weight).sum(), h)
        (expected,) = torch.autograd.grad((truth * weight).sum(), plain)
        assert torch.allclose(slope, expected, rtol=1e-5, atol=1e-7)


def test_layers_of_different_sizes_and_dtypes_share_one_result(backend):
    layers = [sample_gradients(3, 2, 5), sample_gradients(3, 2, 4, 4, dtype=torch.bfloat16), sample_gradients(3, 2, 1)]
    norms = functional.dual_norm(layers, 2, backend=backend)
    for layer, g in enumerate(layers):
        assert torch.allclose(norms[..., layer], norms64(g, 2).float(), rtol=1e-6)
    mixed = functional.dual_norm([layers[0], layers[1].double()], 3, backend=backend)
    assert mixed.dtype == torch.float64
    assert relative_error(mixed[..., 1], norms64(layers[1], 3)) < 1e-12


def test_empty_rows_and_empty_batches(backend):
    assert functional.dual_norm([torch.zeros(2, 3, 0)], 2, backend=backend).tolist() == [[[0.0]] * 3] * 2
    g = torch.zeros(0, 3, 4, requires_grad=True)
    norms = functional.dual_norm([g, g], 3, backend=backend)
    assert list(norms.shape) == [0, 3, 2]
    assert list(torch.autograd.grad(norms.sum(), g)[0].shape) == [0, 3, 4]


@pytest.mark.parametrize("p", P)
def test_results_repeat_and_do_not_depend_on_the_batch(backend, p):
    g = sample_gradients(8 if interpreted(backend) else 40, 2, 5003)
    whole, again = functional.dual_norm([g], p, backend=backend), functional.dual_norm([g], p, backend=backend)
    assert torch.equal(whole, again)
    alone = functional.dual_norm([g[7:8, 1:]], p, backend=backend)
    # The reference adds with ATen's kernels, whose order of summation may follow the shape.
    assert torch.equal(alone[0, 0], whole[7, 1]) or (
        backend == "reference" and torch.allclose(alone[0, 0], whole[7, 1])
    )


WRONG = [
    (lambda g: (g, 2, 2), TypeError, "gradients must be a list of tensors, one per layer, got a single tensor"),
    (lambda g: ([], 2, 2), ValueError, "gradients must hold at least one tensor, got an empty list"),
    (lambda g: ([g], 0.5, 2), ValueError, "p must be >= 1 (or inf), got 0.5"),
    (lambda g: ([g], math.nan, 2), ValueError, "p must be >= 1 (or inf), got nan"),
    (lambda g: ([g], 2, 3), ValueError, "batch_dims must be 1 ([N, *]) or 2 ([N, k, *]), got 3"),
    (
        lambda g: ([g, g.long()], 2, 2),
        TypeError,
        "gradients[1] must be float64, float32, bfloat16 or float16, got int64",
    ),
    (lambda g: ([g, g[:1]], 2, 2), ValueError, "gradients[1] must begin with [2, 3] like gradients[0], got [1, 3, 4]"),
    (lambda g: ([g[0, 0]], 2, 2), ValueError, "gradients[0] must have at least 2 dimensions, got shape [4]"),
]


@pytest.mark.parametrize("arguments,error,words", WRONG, ids=[words[:40] for _, _, words in WRONG])
def test_a_wrong_argument_is_named_in_the_same_words_on_every_backend(backend, arguments, error, words):
    with pytest.raises(error) as caught:
        functional.dual_norm(*arguments(torch.ones(2, 3, 4)), backend=backend)
    assert words in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=70),
    p=st.sampled_from([1, 1.1, 2, 3, 4, math.inf]),
    scale=st.sampled_from([-3.0, 0.5, 2.0]),
)
def test_property_norms_are_homogeneous_and_between_maximum_and_sum(values, p, scale):
    g = torch.tensor(values).view(1, 1, -1)
    norm = functional.dual_norm([g], p).item()
    scaled = functional.dual_norm([g * scale], p).item()
    largest, total = g.abs().max().item(), g.double().abs().sum().item()
    assert largest * (1 - 1e-5) <= norm <= total * (1 + 1e-5)
    assert scaled == pytest.approx(abs(scale) * norm, rel=1e-5, abs=1e-44)

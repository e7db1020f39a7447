"""Shapes and values that reach each path of each kernel, compared with margin_kernels.reference in float64.

A case is a function of a device. It raises AssertionError where a value is wrong, Fault where an access is.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from margin_kernels import reference

from . import launches
from .device import Array, Device
from .launches import Candidates, Hinge, Layer

Case = Callable[[Device], None]
MISALIGNED = 1  # elements behind a multiple of 16 bytes
# One rounding of what is stored, with room for that of the sums.
ROUNDING = {"float64": 1e-12, "float32": 4e-6, "float16": 2e-3, "bfloat16": 1e-2}
WIDE_ROUNDING = {"float64": 1e-12, "float32": 3e-6}
INF, NAN = math.inf, math.nan


def close(what: str, actual: Array, expected: torch.Tensor, rounding: float, scale: float = 1) -> None:
    """|actual - expected| <= rounding (|expected| + scale); NaN and infinity in the same places."""
    a, e = actual.read().astype(np.float64), expected.detach().double().numpy().reshape(actual.shape)
    with np.errstate(invalid="ignore"):
        same = (a == e) | (np.isnan(a) & np.isnan(e)) | (np.abs(a - e) <= rounding * (np.abs(e) + scale))
    if not same.all():
        at = tuple(np.argwhere(~same)[0])
        raise AssertionError(f"{what}{list(map(int, at))} is {a[at]:.9g}, expected {e[at]:.9g}")


def rounded(device: Device, values: torch.Tensor) -> torch.Tensor:
    """What is left of values in the type of the device, as float64."""
    return values.to(getattr(torch, device.dtype)).double()


def random(*sizes: int) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(sizes, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------- competitors


def special_rows(z: torch.Tensor, y: torch.Tensor, what: str) -> None:
    """Changes logits [N, C] and targets in place."""
    classes = z.shape[1]
    if what == "ties":
        z.mul_(0.4).round_()
        z[0] = 0
        z[1] = 0
        z[1, ::2] *= -1
    elif what == "masked":  # few, all but a few, all, the label, every other class; and ignored rows
        z[0, (y[0] + 1) % classes] = -INF
        z[1:3] = -INF
        z[1, classes // 2], z[1, classes - 1] = 1, 2
        z[2, y[2]] = 3
        z[3, y[3]] = -INF
        y[4] = y[5] = -100
        z[5, 0] = NAN
        z[6, ::2] = -INF
        z[6, y[6]] = 20
        z[7] = -INF
    elif what == "not finite":
        z[0, classes - 1] = NAN
        z[1, classes // 2] = INF
        z[2, y[2]] = 60
        y[3], y[4] = classes, -1
    elif what == "large":  # whose products with log2(e) are rounded by much
        z[0] += 1e3
        z[1] += 3e6


def competitors(device: Device, n: int, classes: int, k: int, what: str = "", shift: int = 0) -> None:
    """Both directions, with all gradients and with that of nll alone."""
    z, y = 3 * random(n, classes), torch.randint(classes, (n,))
    special_rows(z, y, what)
    z = rounded(device, z).requires_grad_()
    logits, target = device.array(z.detach(), device.dtype, shift), device.array(y, np.int64)
    gap, nll, phi, uniform, index = reference.competitors(z, y, k, uniform=True)
    out = launches.competitors(device, logits, target, k, uniform=True)
    rounding = WIDE_ROUNDING[device.wide]
    assert np.array_equal(out.index.read(), index.numpy()), f"index is {out.index.read()}, expected {index.numpy()}"
    for name, expected in zip(("gap", "nll", "phi", "uniform"), (gap, nll, phi, uniform), strict=True):
        close(name, getattr(out, name), expected, rounding)
    out.normalizer.read()
    for given in ((1, 1, 1, 1), (0, 1, 0, 0)):
        grads = [g * random(*e.shape) for g, e in zip(given, (gap, nll, phi, uniform), strict=True)]
        arrays = [device.array(g, device.wide) if used else None for g, used in zip(grads, given, strict=True)]
        arguments = (logits, target, out.index, out.normalizer, arrays)
        slopes = launches.competitors_backward(device, *arguments, MISALIGNED if shift else 0)
        close("dlogits", slopes, competitors_slopes(z, y, k, grads, given), ROUNDING[device.dtype], 0.1)


def competitors_slopes(
    z: torch.Tensor, y: torch.Tensor, k: int, grads: list[torch.Tensor], given: tuple[int, ...]
) -> torch.Tensor:
    """d / d logits of the outputs that are given."""
    outputs = reference.competitors(z, y, k, uniform=True)[:4]
    used = [(output, grad) for output, grad, use in zip(outputs, grads, given, strict=True) if use]
    return torch.autograd.grad([o for o, _ in used], z, [g for _, g in used])[0]


def without_uniform(device: Device) -> None:
    """No label smoothing: one output less, and k = 0."""
    z, y = rounded(device, 3 * random(3, 200)), torch.randint(200, (3,))
    logits, target = device.array(z, device.dtype), device.array(y, np.int64)
    out = launches.competitors(device, logits, target, 0, uniform=False)
    close("nll", out.nll, reference.competitors(z, y, 0)[1], WIDE_ROUNDING[device.wide])


# ------------------------------------------------------------------------------------------------------ dual_norm


def special_gradients(g: torch.Tensor, dtype: str) -> None:
    """Changes [N, 8, D] in place: zeros, ties, NaN, infinity, and numbers whose squares leave float32."""
    large = {"float64": 1e200, "float16": 1e3}.get(dtype, 1e20)
    small = {"float64": 1e-200, "float16": 1e-3}.get(dtype, 1e-23)
    g[:, 0] = 0
    g[:, 1] = -3
    g[:, 2, -1] = NAN
    g[:, 3, 0] = INF
    g[:, 4] *= large
    g[:, 5] *= small
    g[:, 6] = small
    g[:, 6, -1] = large


def dual_norm(
    device: Device, row_bytes: list[int], p: float, n: int = 2, k: int = 2, shift: int = 0, gap: int = 0, what: str = ""
) -> None:
    """A layer for each length of a row, with `gap` elements between rows."""
    values = [random(n, k, max(1, size // launches.element_bytes(device))) for size in row_bytes]
    if what == "special":
        for g in values:
            special_gradients(g, device.dtype)
    values = [rounded(device, g) for g in values]
    layers = []
    for g in values:
        padded = torch.cat([g, torch.full((n, k, gap), 1e3, dtype=torch.float64)], dim=2)
        rows = device.array(padded, device.dtype, shift)
        layers.append(Layer(rows, g.shape[2], g.shape[2] + gap, device.empty(g.shape, device.dtype, shift)))
    leaves = [g.requires_grad_() for g in values]
    expected = reference.dual_norm(leaves, p, 2)
    norms = launches.dual_norm(device, layers, p)
    close("norm", norms, beyond(device, expected), WIDE_ROUNDING[device.wide], 0)
    grads = random(*expected.shape)
    launches.dual_norm_backward(device, layers, p, norms, device.array(grads, device.wide))
    slopes = torch.autograd.grad(expected, leaves, grads)
    # The derivative of |NaN| is NaN on the device, where PyTorch says 0.
    slopes = [torch.where(g.isnan(), NAN, slope) for g, slope in zip(leaves, slopes, strict=True)]
    for number, (layer, slope) in enumerate(zip(layers, slopes, strict=True)):
        close(f"slope of layer {number}", layer.slopes, slope, ROUNDING[device.dtype], 1e-2 if p != 1 else 1e-6)


def beyond(device: Device, norms: torch.Tensor) -> torch.Tensor:
    """Norms as the device keeps them: infinite beyond the range of float32."""
    return norms if device.wide == "float64" else norms.float().double()


# --------------------------------------------------------------------------------------------------- row_distance


def row_distance(device: Device, classes: int, row_bytes: int, n: int, k: int, p: float, shift: int = 0) -> None:
    """With a pair of equal rows, ties, and an index outside of the classes."""
    w = random(classes, row_bytes // launches.element_bytes(device))
    w[1] = w[0]
    w[2], w[0] = 1, 0
    w[2, 0] = -1
    w = rounded(device, w).requires_grad_()
    index, target = torch.randint(classes, (n, k)), torch.randint(classes, (n,))
    index[0, 0], target[1], index[1, 0], index[n - 1, k - 1] = target[0], 0, 2, classes
    rows = device.array(w.detach(), device.dtype, shift)
    i, y = device.array(index, np.int64), device.array(target, np.int64)
    expected = reference.row_distance(w, index, target, p)
    norms = launches.row_distance(device, rows, i, y, p)
    close("norm", norms, expected, WIDE_ROUNDING[device.wide], 0)
    grads = random(n, k)
    slopes = launches.row_distance_backward(device, rows, i, y, p, norms, device.array(grads, device.wide))
    close("drows", slopes, torch.autograd.grad(expected, w, grads)[0], ROUNDING[device.dtype])


# --------------------------------------------------------------------------------------------------- margin_hinge


def margin_hinge(device: Device, n: int, k: int, layers: int, aggregation: str, optional: bool = False) -> None:
    """Gaps and norms with masked pairs, ties, zeros and infinity."""
    gap, norm = random(n, k), torch.rand(n, k, layers, dtype=torch.float64) + 0.1
    gap[0, k - 1] = NAN
    gap[1], norm[1] = gap[1, 0].item(), 1
    gap[2, 0] = -INF
    gap[3] = -INF
    gap[4, k - 1] = INF
    norm[5, k // 2] = INF
    gamma = torch.rand(layers, dtype=torch.float64) + 0.5
    cap = weight = least = None
    if optional:
        cap = torch.rand(layers, dtype=torch.float64) + 0.2
        weight = torch.rand(layers, dtype=torch.float64)
        least = 0.8 * torch.rand(layers, dtype=torch.float64)
    wide = getattr(torch, device.wide)
    values = [None if v is None else v.to(wide).double() for v in (gap, norm, gamma, cap, weight, least)]
    hinge = Hinge(*(None if v is None else device.array(v, device.wide) for v in values), 1e-6, aggregation, optional)
    gap, norm = values[0].requires_grad_(), values[1].requires_grad_()
    reduction = "mean" if optional else "sum"
    loss, distance = reference.margin_hinge(gap, norm, *values[2:], 1e-6, aggregation, reduction)
    rounding = WIDE_ROUNDING[device.wide]
    loss_, distance_ = launches.margin_hinge(device, hinge)
    close("loss", loss_, loss, rounding)
    close("distance", distance_, distance, rounding)
    grad = random(n)
    dgap, dnorm = torch.autograd.grad(loss, (gap, norm), grad)
    dgap_, dnorm_ = launches.margin_hinge_backward(device, hinge, device.array(grad, device.wide))
    close("dgap", dgap_, dgap, 3 * rounding)
    close("dnorm", dnorm_, dnorm, 3 * rounding)


# ------------------------------------------------------------------------------------------------------- one_to_n


def one_to_n(
    device: Device,
    n: int,
    classes: int,
    positive: bool,
    cross_entropy: bool,
    what: str = "",
    shift: int = 0,
) -> None:
    """Both directions."""
    z, y = 1.5 * random(n, classes), torch.randint(classes, (n,))
    if what == "one class":
        y[:] = classes - 1
    elif what == "bounds":
        z[0], z[1] = 1, -1
    elif what == "not finite":
        z[0, 0], z[1, 1] = NAN, INF
        y[3] = classes
    elif what == "masked":
        z[0, 0], z[1, 1], z[2, y[2]] = -INF, -INF, -INF
    z = rounded(device, z).requires_grad_()
    logits, target = device.array(z.detach(), device.dtype, shift), device.array(y, np.int64)
    expected = reference.one_to_n(z, y, 1.0, "positive" if positive else "symmetric", cross_entropy)
    out = launches.one_to_n(device, logits, target, 1.0, positive, cross_entropy)
    close("loss", out.loss, expected, WIDE_ROUNDING[device.wide])
    grad = random(n)
    arguments = (logits, target, 1.0, positive, device.array(grad, device.wide), out, shift)
    slopes = launches.one_to_n_backward(device, *arguments)
    close("dlogits", slopes, torch.autograd.grad(expected, z, grad)[0], 2 * ROUNDING[device.dtype], 0.1)


# -------------------------------------------------------------------------------------------------- deepfool_step


def deepfool_step(device: Device, n: int, k: int, length: int, p: float, what: str = "", shift: int = 0) -> None:
    """Both directions, with each of the gradients and with both."""
    gap, w = -torch.rand(n, k, dtype=torch.float64) - 0.1, random(n, k, length)
    active = None
    if what == "special":
        active = torch.ones(n, dtype=torch.bool)
        active[0], gap[0, 0] = False, NAN
        gap[1, k - 1] = INF
        w[2, 0, length // 2] = NAN
        w[3, k - 1, 0] = INF
        w[4] = 0
        w[5], gap[5] = 1, -0.5  # equal distances, equal entries
    gap, w = gap.to(getattr(torch, device.wide)).double().requires_grad_(), rounded(device, w).requires_grad_()
    gradients = device.array(w.detach(), device.dtype, shift)
    norms = launches.dual_norm(device, [Layer(gradients, length, length)], p)
    given = Candidates(
        device.array(gap.detach(), device.wide),
        gradients,
        None if active is None else device.array(active, np.bool_),
        norms,
    )
    step, distance, choice = reference.deepfool_step(gap, w, active, p)
    step_, distance_, choice_, norm_ = launches.deepfool_step(device, given, p, shift)
    rounding = ROUNDING[device.dtype]
    assert np.array_equal(choice_.read(), choice.numpy()), f"choice is {choice_.read()}, expected {choice.numpy()}"
    close("distance", distance_, distance, WIDE_ROUNDING[device.wide])
    close("step", step_, step, rounding, 1e-2)
    for use in ((True, True), (True, False), (False, True)):
        grads = [rounded(device, random(*step.shape)), random(n)]
        arrays = [
            device.array(g, t) if u else None for g, t, u in zip(grads, (device.dtype, device.wide), use, strict=True)
        ]
        outputs = [o for o, u in zip((step, distance), use, strict=True) if u]
        slopes = torch.autograd.grad(
            outputs, (gap, w), [g for g, u in zip(grads, use, strict=True) if u], retain_graph=True
        )
        dgap_, dw_ = launches.deepfool_step_backward(device, given, p, choice_, norm_, *arrays)
        close("dgap", dgap_, slopes[0], 2 * rounding, 0.1)
        close("dgradients", dw_, slopes[1], 2 * rounding, 0.1)


# ---------------------------------------------------------------------------------------------------------- lists

PS = (1, 2, 3, 4, INF)  # each kernel of a norm once: MAX, SQUARE, THREE_HALVES, GENERAL, SUM

CASES: dict[str, Case] = {
    # By the number of classes: 1, 4, 8, 16 and 32 lanes a row; a block a row, and with more than 32 competitors the
    # row once more; several blocks and a second stage.
    "competitors-10": partial(competitors, n=9, classes=10, k=3),
    "competitors-3-every-class": partial(competitors, n=2, classes=3, k=2),
    "competitors-16-not-finite": partial(competitors, n=5, classes=16, k=1, what="not finite"),
    "competitors-30-masked": partial(competitors, n=8, classes=30, k=2, what="masked"),
    "competitors-50-not-finite": partial(competitors, n=5, classes=50, k=4, what="not finite"),
    "competitors-101-ties": partial(competitors, n=3, classes=101, k=5, what="ties", shift=MISALIGNED),
    "competitors-150-ties": partial(competitors, n=3, classes=150, k=40, what="ties"),
    "competitors-200-not-finite": partial(competitors, n=5, classes=200, k=2, what="not finite"),
    "competitors-300-masked": partial(competitors, n=8, classes=300, k=4, what="masked", shift=MISALIGNED),
    "competitors-400": partial(competitors, n=5, classes=400, k=6),
    "competitors-700-large": partial(competitors, n=3, classes=700, k=1, what="large"),
    "competitors-1001": partial(competitors, n=3, classes=1001, k=5),
    "competitors-1101": partial(competitors, n=2, classes=1101, k=7),
    "competitors-without-uniform": without_uniform,
    "competitors-2100-ties": partial(competitors, n=2, classes=2100, k=3, what="ties"),
    "competitors-2600-many": partial(competitors, n=1, classes=2600, k=40, shift=MISALIGNED),
    "competitors-2052-masked": partial(competitors, n=8, classes=2052, k=2, what="masked"),
    "competitors-33000-parts": partial(competitors, n=1, classes=33000, k=4),
    # A warp a row, a block, two blocks and a second stage.
    **{f"dual_norm-warp-{p}": partial(dual_norm, row_bytes=[20, 148], p=p, n=1, k=7, what="special") for p in PS},
    **{f"dual_norm-block-{p}": partial(dual_norm, row_bytes=[24, 4400], p=p, n=1, k=1, shift=1, gap=3) for p in PS},
    **{f"dual_norm-parts-{p}": partial(dual_norm, row_bytes=[65600], p=p, n=1, k=1) for p in PS},
    # A warp a pair, a block a pair.
    **{f"row_distance-warp-{p}": partial(row_distance, classes=5, row_bytes=148, n=3, k=2, p=p) for p in PS},
    **{f"row_distance-block-{p}": partial(row_distance, classes=4, row_bytes=8216, n=2, k=1, p=p, shift=1) for p in PS},
    # Classes that go on from one segment of uses to the next, to those behind it, and over more than are added at once.
    "row_distance-segments": partial(row_distance, classes=4, row_bytes=24, n=41, k=3, p=2),
    "row_distance-many-segments": partial(row_distance, classes=3, row_bytes=8, n=150, k=3, p=1),
    # 1, 4 and 32 lanes a sample.
    **{f"margin_hinge-{a}": partial(margin_hinge, n=7, k=9, layers=3, aggregation=a) for a in launches.AGGREGATIONS},
    **{
        f"margin_hinge-{a}-options": partial(margin_hinge, n=7, k=3, layers=2, aggregation=a, optional=True)
        for a in launches.AGGREGATIONS
    },
    "margin_hinge-one-lane": partial(margin_hinge, n=6, k=1, layers=1, aggregation="max"),
    "margin_hinge-warp": partial(margin_hinge, n=6, k=130, layers=1, aggregation="max"),
    # Few lanes a row and 32, one tile of columns and several, single rows and eight at once, one chunk and two, rows of
    # a warp and of a block, one segment of samples and two.
    "one_to_n": partial(one_to_n, n=7, classes=5, positive=False, cross_entropy=False, what="bounds"),
    "one_to_n-positive": partial(one_to_n, n=5, classes=6, positive=True, cross_entropy=True, what="masked"),
    "one_to_n-one-class": partial(one_to_n, n=3, classes=4, positive=False, cross_entropy=True, what="one class"),
    "one_to_n-not-finite": partial(one_to_n, n=6, classes=9, positive=True, cross_entropy=True, what="not finite"),
    "one_to_n-lanes": partial(one_to_n, n=9, classes=40, positive=False, cross_entropy=True, what="masked"),
    "one_to_n-tiles": partial(one_to_n, n=9, classes=259, positive=False, cross_entropy=True),
    "one_to_n-rows": partial(one_to_n, n=67, classes=132, positive=True, cross_entropy=True, what="not finite"),
    "one_to_n-misaligned": partial(one_to_n, n=72, classes=131, positive=False, cross_entropy=False, shift=MISALIGNED),
    "one_to_n-long-rows": partial(one_to_n, n=2, classes=4100, positive=False, cross_entropy=True),
    "one_to_n-segments": partial(one_to_n, n=259, classes=3, positive=False, cross_entropy=False),
    "one_to_n-chunks": partial(one_to_n, n=2060, classes=3, positive=False, cross_entropy=True),
    # One part and two, fewer candidates than lanes and more.
    **{f"deepfool_step-{p}": partial(deepfool_step, n=6, k=2, length=37, p=p, what="special") for p in PS},
    **{f"deepfool_step-parts-{p}": partial(deepfool_step, n=1, k=1, length=8193, p=p) for p in PS},
    "deepfool_step-candidates": partial(deepfool_step, n=1, k=34, length=5, p=2, shift=MISALIGNED),
}

# The main path of every op: what is executed for bfloat16 in each run.
MAIN = (
    "competitors-10",
    "competitors-101-ties",
    "competitors-1001",
    "competitors-2100-ties",
    "dual_norm-warp-2",
    "dual_norm-block-2",
    "row_distance-warp-2",
    "row_distance-block-2",
    "one_to_n-positive",
    "one_to_n-tiles",
    "deepfool_step-2",
    "deepfool_step-candidates",
)

# Minutes each: what only many elements show.
NIGHTLY: dict[str, Case] = {
    "one_to_n-stages": partial(one_to_n, n=17000, classes=10, positive=False, cross_entropy=False),
    "competitors-70001-parts": partial(competitors, n=1, classes=70001, k=4, shift=MISALIGNED),
    "dual_norm-20-layers": partial(dual_norm, row_bytes=[4 * layer + 8 for layer in range(20)], p=2, n=3, k=3),
}

"""The ops on a device: outputs and workspaces as their launchers allocate them, grids as csrc/cuda/*.cuh chooses them.

What stands here once more is what the host does: a path that is chosen otherwise in csrc/cuda/ is to be chosen so
here.
"""

import math
from typing import NamedTuple

import numpy as np

from .device import Array, Device, struct

Int, Long = np.int32, np.int64
BLOCK = 256  # threads, but for margin_hinge
WARPS = BLOCK // 32
# What csrc/cuda/*.cuh names so; a test reads it there.
CONSTANTS = {
    "kShortClasses": 128,
    "kBackwardWarp": 2048,
    "kBackwardClasses": 32768,
    "kListed": 32,
    "kRowThreads": 256,
    "kNormThreads": 256,
    "kMarginHingeThreads": 128,
    "kWarpRowBytes": 4096,
    "kPartBytes": 65536,
    "kNormLayers": 40,
    "kWarpPairBytes": 8192,
    "kUses": 32,
    "kUseThreads": 128,
    "kStepPart": 8192,
    "kBlockBits": 8,
    "kForwardRows": 8,
    "kBackwardRows": 4,
    "kRowPacks": 4,
    "kWarpScoreBytes": 8192,
    "kMostChunks": 256,
    "kMostTiles": 4096,
}
SHORT_CLASSES, WARP_CLASSES, BACKWARD_CLASSES = (
    CONSTANTS[name] for name in ("kShortClasses", "kBackwardWarp", "kBackwardClasses")
)


def pieces(size: int, piece: int) -> int:
    """How many pieces hold `size`."""
    return -(-size // piece)


def element_bytes(device: Device) -> int:
    """Of logits and gradients."""
    return {"float64": 8, "float32": 4}.get(device.dtype, 2)


# ---------------------------------------------------------------------------------------------------- competitors


class Competitors(NamedTuple):
    """What the forward pass leaves."""

    index: Array
    gap: Array
    nll: Array
    phi: Array
    uniform: Array | None
    normalizer: Array


def warp_classes(device: Device) -> int:
    """Up to so many, lanes of a warp hold a row."""
    return 1024 if device.dtype == "float64" else 2048


def lanes_of(device: Device, classes: int) -> tuple[int, int, int]:
    """Lanes a row, logits a lane, and how many classes are too few for them."""
    width, held, more_than = 1, 16, 0
    while width * held < classes:
        more_than = width * held
        if width == 1:
            width = 4
        elif held == 256 // element_bytes(device):
            width *= 2
        else:
            held *= 2
    return width, held, more_than


def part_classes(device: Device) -> int:
    """Of a row that takes a block or several."""
    return BLOCK * (64 if element_bytes(device) == 2 else 32)


def short_width(classes: int) -> int:
    """Lanes a row for up to 128 classes, in the backward pass."""
    width = 4
    while width * 4 < classes:
        width *= 2
    return width


def length_of_part(classes: int, parts: int) -> int:
    """Equal parts, multiples of any pack."""
    return pieces(pieces(classes, parts), 16) * 16


def competitors(device: Device, logits: Array, target: Array, k: int, uniform: bool) -> Competitors:
    """logits [N, C], target [N]; -100 is ignored."""
    n, classes = logits.shape
    wide = device.wide
    out = Competitors(
        device.empty((n, k), Long),
        device.empty((n, k), wide),
        device.empty((n,), wide),
        device.empty((n,), wide),
        device.empty((n,), wide) if uniform else None,
        device.empty((n, 3), wide),
    )
    one = Long(1)
    taken = (logits, Long(classes), target, one, Long(-100), Long(n), Int(classes), Int(k), *out)
    if classes <= warp_classes(device):
        width, held, more_than = lanes_of(device, classes)
        tags = (f"Li{width}ELi{held}ELi{more_than}E",)
        device.launch("competitors_row_kernel", tags, pieces(n, BLOCK // width), BLOCK, taken)
        return out
    parts, many = pieces(classes, part_classes(device)), k > CONSTANTS["kListed"]
    first = (*taken[:7], Int(0), *taken[8:]) if many else taken
    lists, sums = (0 if many else n * parts * k, n * parts * 4) if parts > 1 else (0, 0)
    work = (device.empty((lists,), wide), device.empty((lists,), Int), device.empty((sums,), wide))
    device.launch("competitors_part_kernel", (), (n, parts), BLOCK, first, Int(parts), work)
    if parts > 1:
        device.launch("competitors_merge_kernel", (), pieces(n, WARPS), BLOCK, first, Int(parts), work)
    if many:
        device.launch("competitors_many_kernel", (), n, BLOCK, taken)
    return out


def competitors_backward(
    device: Device, logits: Array, target: Array, index: Array, normalizer: Array, grads: list[Array | None], shift: int
) -> Array:
    """grads: of gap [N, k], nll, phi and uniform [N], None where there is none."""
    n, classes = logits.shape
    k = index.shape[1]
    one = Long(1)
    slopes = device.empty((n, classes), device.dtype, shift)
    per_sample = [item for grad in grads[1:] for item in (grad, one)]
    taken = (logits, Long(classes), target, one, Long(n), Int(classes), Int(k), index, normalizer)
    taken += (grads[0], Long(k), one, *per_sample, slopes)
    if classes <= SHORT_CLASSES:
        width = short_width(classes)
        device.launch("competitors_backward_short_kernel", (f"Li{width}E",), pieces(n, BLOCK // width), BLOCK, taken)
    elif classes <= WARP_CLASSES:
        device.launch("competitors_backward_kernel", ("Li32E",), pieces(n, WARPS), BLOCK, taken, Int(classes))
    else:
        parts = pieces(classes, BACKWARD_CLASSES)
        length = Int(length_of_part(classes, parts))
        device.launch("competitors_backward_kernel", ("Li256E",), (n, parts), BLOCK, taken, length)
    return slopes


# ------------------------------------------------------------------------------------------------------ dual_norm

NORMS = {1: "LNS_4math4NormE0E", math.inf: "LNS_4math4NormE1E", 2: "LNS_4math4NormE2E", 3: "LNS_4math4NormE3E"}


def norm_tag(p: float) -> str:
    """The template argument of the norm that is dual to l_p."""
    return NORMS.get(p, "LNS_4math4NormE4E")


def exponent(p: float) -> np.float64:
    """q"""
    return np.float64(math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1))


class Layer(NamedTuple):
    """Rows [n, k, length] of a layer, `gap` elements between one row and the next, and their derivatives."""

    rows: Array
    length: int
    row_stride: int
    slopes: Array | None = None


class NormPlan(NamedTuple):
    """The tables of one launch over at most 40 layers, as bytes, and their blocks."""

    table: bytes
    blocks: int
    split: bytes
    split_blocks: int
    partials: int


def norm_plan(device: Device, layers: list[Layer]) -> NormPlan:
    """Layers with the same n and k."""
    n, k = layers[0].rows.shape[:2]
    rows, blocks, split_blocks, partials = n * k, 0, 0, 0
    entries, split_entries = [], []
    for column, layer in enumerate(layers):
        size = layer.length * element_bytes(device)
        parts = 0 if size <= CONSTANTS["kWarpRowBytes"] else pieces(size, CONSTANTS["kPartBytes"])
        strides = (Long(k * layer.row_stride), Long(layer.row_stride), Long(k * layer.length), Long(layer.length))
        start = (layer.rows, layer.slopes, *strides, Long(layer.length))
        end = (Long(partials), Int(parts), Int(column))
        entries.append(struct(*start, Long(blocks), *end))
        blocks += rows * parts if parts else pieces(rows, WARPS)
        if parts > 1:
            split_entries.append(struct(*start, Long(split_blocks), *end))
            partials += rows * parts
            split_blocks += pieces(rows, WARPS)
    tail = (Long(rows), Long(k))
    tables = []
    for chosen in (entries, split_entries):
        room = b"".join(chosen).ljust(CONSTANTS["kNormLayers"] * len(entries[0]), b"\0")
        tables.append(struct(room, *tail, Int(len(chosen)), Int(len(layers))))
    return NormPlan(tables[0], blocks, tables[1], split_blocks, partials)


def dual_norm(device: Device, layers: list[Layer], p: float) -> Array:
    """Norms [n, k, layers]."""
    plan = norm_plan(device, layers)
    n, k = layers[0].rows.shape[:2]
    norms = device.empty((n, k, len(layers)), device.wide)
    partials = device.empty((2 * plan.partials,), np.float64)
    tag, q = (norm_tag(p),), exponent(p)
    device.launch("dual_norm_kernel", tag, plan.blocks, BLOCK, plan.table, q, norms, partials)
    if plan.split_blocks:
        device.launch("dual_norm_finish_kernel", tag, plan.split_blocks, BLOCK, plan.split, q, norms, partials)
    return norms


def dual_norm_backward(device: Device, layers: list[Layer], p: float, norms: Array, grads: Array) -> None:
    """Writes the slopes of the layers."""
    plan = norm_plan(device, layers)
    ties = device.empty((2 * plan.partials,), Long)
    if p == 1 and plan.split_blocks:
        device.launch("dual_norm_ties_kernel", (), plan.blocks, BLOCK, plan.table, norms, ties)
    tag, q = (norm_tag(p),), exponent(p)
    device.launch("dual_norm_backward_kernel", tag, plan.blocks, BLOCK, plan.table, q, norms, grads, ties)


# --------------------------------------------------------------------------------------------------- row_distance


def pairs_of(rows: Array, index: Array, target: Array) -> tuple:
    """RowPairs"""
    classes, length = rows.shape
    n, k = index.shape
    return (rows, Long(length), Long(classes), Long(length), index, target, Long(n), Long(k))


def row_distance(device: Device, rows: Array, index: Array, target: Array, p: float) -> Array:
    """Norms [n, k] of rows[index] - rows[target]."""
    n, k = index.shape
    norms = device.empty((n, k), device.wide)
    a_warp = rows.shape[1] * element_bytes(device) <= CONSTANTS["kWarpPairBytes"]
    tags = (norm_tag(p), "Li32E" if a_warp else "Li256E")
    blocks = pieces(n * k, WARPS) if a_warp else n * k
    device.launch("row_distance_kernel", tags, blocks, BLOCK, pairs_of(rows, index, target), exponent(p), norms)
    return norms


def row_distance_backward(
    device: Device, rows: Array, index: Array, target: Array, p: float, norms: Array, grads: Array
) -> Array:
    """Derivatives [C, D]; uses of a row sorted by its class, as the launcher sorts them."""
    n, k = index.shape
    length = rows.shape[1]
    uses = np.concatenate([index.read().reshape(-1), np.repeat(target.read(), k)])
    order = np.argsort(uses, kind="stable")
    segments = pieces(len(uses), CONSTANTS["kUses"])
    ties = device.empty((n * k if p == 1 else 0,), Long)
    sums = device.empty((segments, 2, length), device.wide)
    slopes = device.array(np.zeros(rows.shape), device.dtype)
    taken = pairs_of(rows, index, target)
    if p == 1:
        device.launch("row_distance_ties_kernel", (), n * k, BLOCK, taken, norms, ties)
    listed = (device.array(uses[order], Long), device.array(order, Long), Long(len(uses)), sums, slopes)
    threads = CONSTANTS["kUseThreads"]
    tiles = pieces(length, threads * 16 // element_bytes(device))
    arguments = (taken, exponent(p), listed, norms, grads, ties)
    device.launch("row_distance_backward_kernel", (norm_tag(p),), (segments, tiles), threads, *arguments)
    if segments > 1:
        arguments = (listed, Long(rows.shape[0]), Long(length), Long(segments))
        device.launch("row_distance_join_kernel", (), (segments, pieces(length, threads)), threads, *arguments)
    return slopes


# --------------------------------------------------------------------------------------------------- margin_hinge

AGGREGATIONS = ("max", "sum", "mean", "mean_distance")


class Hinge(NamedTuple):
    """Arguments of margin_hinge; gamma, cap, weight and min_norm are [L]."""

    gap: Array
    norm: Array
    gamma: Array
    cap: Array | None
    weight: Array | None
    min_norm: Array | None
    eps: float
    aggregation: str
    mean_over_layers: bool


def hinge_launch(device: Device, kernel: str, hinge: Hinge, *out: object) -> None:
    """Lanes a sample by the number of competitors."""
    n, k, layers = hinge.norm.shape
    width = 1
    while width < 32 and 4 * width < k:
        width *= 2
    scalars = (Long(n), Int(k), Int(layers), (np.float64 if device.wide == "float64" else np.float32)(hinge.eps))
    taken = (*hinge[:6], *scalars, Int(AGGREGATIONS.index(hinge.aggregation)), np.bool_(hinge.mean_over_layers))
    device.launch(kernel, (), pieces(n * width, 128), 128, taken, Int(width), *out)


def margin_hinge(device: Device, hinge: Hinge) -> tuple[Array, Array]:
    """loss [N], distance [N, k, L]"""
    loss, distance = device.empty(hinge.gap.shape[:1], device.wide), device.empty(hinge.norm.shape, device.wide)
    hinge_launch(device, "margin_hinge_kernel", hinge, loss, distance)
    return loss, distance


def margin_hinge_backward(device: Device, hinge: Hinge, grad: Array) -> tuple[Array, Array]:
    """dgap [N, k], dnorm [N, k, L]"""
    dgap, dnorm = device.empty(hinge.gap.shape, device.wide), device.empty(hinge.norm.shape, device.wide)
    hinge_launch(device, "margin_hinge_backward_kernel", hinge, grad, dgap, dnorm)
    return dgap, dnorm


# ------------------------------------------------------------------------------------------------------- one_to_n


class OneToN(NamedTuple):
    """What the forward pass leaves."""

    loss: Array
    column: Array
    normalizer: Array | None


def scores(device: Device, logits: Array, target: Array, delta: float) -> tuple:
    """OneToN of csrc/cuda/one_to_n.cuh"""
    n, classes = logits.shape
    wide = np.float64 if device.wide == "float64" else np.float32
    return (logits, Long(classes), Long(n), Long(classes), target, wide(delta))


class Tiles(NamedTuple):
    """How logits are cut: lanes by rows, `rows` of them a chunk."""

    lane_bits: int
    columns: int
    chunks: int
    rows: int


def lanes_for(classes: int, each: int) -> int:
    """The exponent of 2 of the lanes that take `each` classes, up to a warp."""
    bits = 0
    while bits < 5 and each << bits < classes:
        bits += 1
    return bits


def tiles_of(device: Device, n: int, classes: int, rows_at_once: int) -> Tiles:
    """The tiles of a kernel whose threads take so many rows at once."""
    pack = 16 // element_bytes(device)
    lane_bits = lanes_for(classes, pack)
    columns = pieces(classes, pack << lane_bits)
    least = (BLOCK >> lane_bits) * rows_at_once
    most = min(max(CONSTANTS["kMostTiles"] // columns, 1), CONSTANTS["kMostChunks"])
    rows = pieces(pieces(n, most), least) * least
    return Tiles(lane_bits, columns, pieces(n, rows), rows)


def row_width_bits(device: Device, classes: int) -> int:
    """Threads of a row."""
    if classes * element_bytes(device) > CONSTANTS["kWarpScoreBytes"]:
        return CONSTANTS["kBlockBits"]
    return lanes_for(classes, CONSTANTS["kRowPacks"] * 16 // element_bytes(device))


def one_to_n(device: Device, logits: Array, target: Array, delta: float, positive: bool, cross_entropy: bool) -> OneToN:
    """logits [N, C], N > 0"""
    n, classes = logits.shape
    wide = np.float64 if device.wide == "float64" else np.float32
    tiles = tiles_of(device, n, classes, CONSTANTS["kForwardRows"])
    taken = scores(device, logits, target, delta)
    partials = device.empty((tiles.chunks, classes, 2), device.wide)
    column, loss = device.empty((classes,), device.wide), device.empty((n,), device.wide)
    normalizer = device.empty((n,), device.wide) if cross_entropy else None
    cut = (Int(tiles.lane_bits), Long(tiles.rows))
    device.launch("one_to_n_columns_kernel", (), (tiles.columns, tiles.chunks), BLOCK, taken, *cut, partials)
    shift = wide(delta if positive else 0)
    finish = (partials, Long(tiles.chunks), Long(classes), shift, column)
    device.launch("one_to_n_finish_kernel", (), pieces(classes, 32), BLOCK, *finish)
    if cross_entropy:
        bits = row_width_bits(device, classes)
        device.launch("one_to_n_rows_kernel", (), pieces(n, BLOCK >> bits), BLOCK, taken, Int(bits), normalizer)
    device.launch("one_to_n_loss_kernel", (), pieces(n, BLOCK), BLOCK, taken, column, normalizer, loss)
    return OneToN(loss, column, normalizer)


def one_to_n_backward(
    device: Device,
    logits: Array,
    target: Array,
    delta: float,
    positive: bool,
    grad: Array,
    out: OneToN,
    shift: int,
) -> Array:
    """dlogits [N, C]"""
    n, classes = logits.shape
    taken = scores(device, logits, target, delta)
    samples, totals = device.empty((n, 4), device.wide), device.empty((classes, 2), device.wide)
    count = pieces(n, BLOCK)
    segments = device.empty((count, classes), np.float64)
    slopes = device.empty((n, classes), device.dtype, shift)
    arguments = (taken, out.column, out.normalizer, grad, samples, segments)
    device.launch("one_to_n_samples_kernel", (), count, BLOCK, *arguments)
    wide = np.float64 if device.wide == "float64" else np.float32
    summed = (segments, out.column, Long(count), Long(classes), wide(delta if positive else 0), totals)
    device.launch("one_to_n_totals_kernel", (), pieces(classes, 32), BLOCK, *summed)
    tiles, cross_entropy = tiles_of(device, n, classes, CONSTANTS["kBackwardRows"]), out.normalizer is not None
    cut = (Int(tiles.lane_bits), Long(tiles.rows))
    arguments = (taken, *cut, (totals, samples, np.bool_(cross_entropy), slopes))
    device.launch("one_to_n_backward_kernel", (), (tiles.chunks, tiles.columns), BLOCK, *arguments)
    return slopes


# -------------------------------------------------------------------------------------------------- deepfool_step

STEP_PART = CONSTANTS["kStepPart"]


class Candidates(NamedTuple):
    """gap [N, k], gradients [N, k, D], active [N] or none, norms [N, k]"""

    gap: Array
    gradients: Array
    active: Array | None
    norms: Array


def candidates_of(given: Candidates) -> tuple:
    """DeepFool of csrc/cuda/deepfool_step.cuh"""
    n, k, length = given.gradients.shape
    strides = (Long(k * length), Long(length))
    return (given.gap, given.gradients, *strides, given.active, given.norms, Long(n), Long(k), Long(length))


def deepfool_step(device: Device, given: Candidates, p: float, shift: int) -> tuple[Array, Array, Array, Array]:
    """step [N, D], distance, choice and norm [N]"""
    n, _, length = given.gradients.shape
    parts = max(1, pieces(length, STEP_PART))
    step, choice = device.empty((n, length), device.dtype, shift), device.empty((n,), Long)
    distance, norm = device.empty((n,), device.wide), device.empty((n,), device.wide)
    firsts = device.empty((n if p == 1 else 0, parts), Long)
    one_each = (distance, choice, norm)
    if p == 1:
        arguments = (candidates_of(given), Long(parts), *one_each, firsts)
        device.launch("deepfool_choose_kernel", (), n * parts, BLOCK, *arguments)
    arguments = (candidates_of(given), exponent(p), Long(parts), step, *one_each, firsts)
    device.launch("deepfool_step_kernel", (norm_tag(p),), n * parts, BLOCK, *arguments)
    return step, distance, choice, norm


def deepfool_step_backward(
    device: Device,
    given: Candidates,
    p: float,
    choice: Array,
    norm: Array,
    grad_step: Array | None,
    grad_distance: Array | None,
) -> tuple[Array, Array]:
    """dgap [N, k], dgradients [N, k, D]"""
    n, k, length = given.gradients.shape
    parts = max(1, pieces(length, STEP_PART))
    products, firsts = device.empty((n, parts), np.float64), device.empty((n if p == 1 else 0, parts), Long)
    dgap, slopes = device.empty((n, k), device.wide), device.empty((n, k, length), device.dtype)
    taken = (candidates_of(given), exponent(p), Long(parts), choice, norm)
    if p == 1:
        arguments = (candidates_of(given), Long(parts), choice, norm, firsts)
        device.launch("deepfool_first_kernel", (), n * parts, BLOCK, *arguments)
    if grad_step is not None:
        arguments = (*taken, grad_step, firsts, products)
        device.launch("deepfool_product_kernel", (norm_tag(p),), n * parts, BLOCK, *arguments)
    arguments = (*taken, grad_step, grad_distance, products, firsts, dgap, slopes)
    device.launch("deepfool_backward_kernel", (norm_tag(p),), n * k * parts, BLOCK, *arguments)
    return dgap, slopes

"""Functions of tiles that several kernels share: exact division, rows of a matrix, and the sum behind a dual norm.

The kind of a norm is a compile-time name, the cases with a formula cheaper than a power: "max" (q = inf), "sum"
(q = 1), "square" (q = 2), "three_halves" (q = 3/2), "general". Exponents are compile-time constants as well: a Python
float that is passed at run time reaches a kernel as float32.
"""

import math

import triton
import triton.language as tl

from .interpreter import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_UP = tl.constexpr(2.0**64)
_DOWN = tl.constexpr(2.0**-64)
_INF = tl.constexpr(float("inf"))


def dual(p: float) -> tuple[str, float]:
    """(kind, q) of the norm dual to l_p; q is 0 where no formula reads it."""
    if p == 1:
        return "max", 0.0
    if math.isinf(p):
        return "sum", 1.0
    q = p / (p - 1)
    return {2.0: "square", 3.0: "three_halves"}.get(float(p), "general"), q


def needs_float64(p: float) -> bool:
    """As csrc/math/dual_norm.h: the q-th power of a ratio in float32 is off by q of its roundings."""
    kind, q = dual(p)
    return kind == "general" and q > 16


@triton.jit
def divide(a, b):
    """a / b, correctly rounded (the operator is off by two units in float32, and 0 for b above 2^126)."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def reciprocal(x):
    return divide(tl.full(x.shape, 1.0, x.dtype), x)


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def log1p(e):
    """log(1 + e) for e >= 0, right where e is tiny: the rounding of 1 + e is divided out."""
    u = 1.0 + e
    low = u - 1.0
    return tl.where(low == 0, e, tl.log(u) * divide(e, tl.where(low == 0, 1.0, low)))


@triton.jit
def exact_exp(x):
    """exp(x) for x <= 0, within two units of float32 for any x: tl.exp, which rounds x log2(e), is off by |x| units."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # Below -110 the result is 0; the bound keeps -inf out of the differences.
        x = tl.where(x > -110.0, x, tl.where(x == x, -110.0, x))
        n = tl.floor(x * 1.4426950408889634 + 0.5)
        r = (x - n * 0.693359375) + n * 2.12194440e-4
        return tl.exp(r) * tl.exp2(n)


@triton.jit
def widen(x, ACC: tl.constexpr):
    """x in the type of the sums. The interpreter gets bfloat16 below 1e-38 wrong, so there it is done on the bits."""
    if _INTERPRETED and x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True).to(ACC)
    else:
        return x.to(ACC)


@triton.jit
def narrow(x, TYPE: tl.constexpr):
    """x rounded to nearest even. The interpreter truncates to bfloat16, so there it is done on the bits."""
    if _INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def address(row, column, VEC: tl.constexpr):
    """Addresses [ROWS, BLOCK] from those of rows [ROWS, 1] and columns [1, BLOCK], multiples of 16 bytes if VEC > 1.

    Else nothing is claimed, whatever Triton knows of them: members of a tuple are specialised all the same.
    """
    place = row + column
    if VEC > 1:
        place = tl.multiple_of(place, [16, 16])
    else:
        place = tl.multiple_of(place, [1, 1])
    return place


@triton.jit
def whole_vectors(length, VEC: tl.constexpr):
    """`length`, seen by the compiler to be a multiple of VEC: a mask then never splits 16 bytes."""
    return length // VEC * VEC


@triton.jit
def power(m, KIND: tl.constexpr, Q: tl.constexpr):
    """m^q for m >= 0 (not for "max")."""
    if KIND == "square":
        return m * m
    elif KIND == "three_halves":
        return m * square_root(m)
    elif KIND == "general":
        return tl.exp2(tl.log2(m) * Q)
    else:
        return m


@triton.jit
def slope_power(m, KIND: tl.constexpr, Q: tl.constexpr):
    """m^(q-1) for m >= 0: 1 for "sum"."""
    if KIND == "square":
        return m
    elif KIND == "three_halves":
        return square_root(m)
    elif KIND == "general":
        return tl.where(m == 0, 0.0, tl.exp2(tl.log2(m) * (Q - 1)))
    else:
        return tl.where(m == m, 1.0, m)


@triton.jit
def scale_down(m):
    """(a, b) with m a b = 1 for m in (0, inf), in two factors as 1 / m may leave the range; b = 1 for 0 and inf."""
    a = tl.where(m > _UP, _DOWN, tl.where(m < _DOWN, _UP, 1.0)).to(m.dtype)
    b = tl.where((m > 0) & (m < _INF), reciprocal(m * a), 1.0)
    return a, b


@triton.jit
def add_magnitudes(largest, total, m, KIND: tl.constexpr, Q: tl.constexpr):
    """Adds a tile m [ROWS, BLOCK] of magnitudes, 0 where masked, to (largest, total), [ROWS] each.

    total is the sum of (m / largest)^q, so that neither 1e20 nor 1e-23 leaves the range; for "sum" the plain sum, and
    for "max" 0, or NaN once a NaN was seen. NaN never enters `largest`: it shows in total.
    """
    if KIND == "sum":
        total += tl.sum(m, 1)
    else:
        larger = tl.maximum(largest, tl.max(tl.where(m == m, m, 0.0), 1))
        if KIND == "max":
            total += tl.sum(tl.where(m == m, 0.0, m), 1)
        else:
            a, b = scale_down(larger)
            shrunk = total * power(largest * a * b, KIND, Q)
            total = tl.where(larger == largest, total, shrunk)
            ratio = m * a[:, None] * b[:, None]
            # Rounding may leave it above 1, which a large q would make infinite. NaN stays.
            total += tl.sum(power(tl.where(ratio > 1, 1.0, ratio).to(m.dtype), KIND, Q), 1)
        largest = larger
    return largest, total


@triton.jit
def add_totals(largest, total, m, t, KIND: tl.constexpr, Q: tl.constexpr):
    """Adds a tile of such pairs, (m, t) [ROWS, BLOCK], to the pair (largest, total)."""
    if KIND == "sum":
        total += tl.sum(t, 1)
    else:
        larger = tl.maximum(largest, tl.max(m, 1))
        if KIND == "max":
            total += tl.sum(t, 1)
        else:
            a, b = scale_down(larger)
            total = tl.where(larger == largest, total, total * power(largest * a * b, KIND, Q))
            shrunk = t * power(m * a[:, None] * b[:, None], KIND, Q)
            total += tl.sum(tl.where(m == larger[:, None], t, shrunk), 1)
        largest = larger
    return largest, total


@triton.jit
def norm_of(largest, total, KIND: tl.constexpr, Q: tl.constexpr):
    """The norm behind (largest, total)."""
    if KIND == "sum":
        return total
    elif KIND == "max":
        return largest + total
    elif KIND == "square":
        return square_root(total) * largest
    else:
        root = tl.exp2(tl.log2(total) * (1.0 / Q))
        return root * largest


@triton.jit
def slope(g, norm, ties, KIND: tl.constexpr, Q: tl.constexpr):
    """d norm / d g of entries g [ROWS, BLOCK] with norm and ties [ROWS, 1]: sign(g) (|g| / norm)^(q-1).

    0 where the norm is 0. "max": sign(g) / ties where |g| is the norm, ties being the number of such entries.
    """
    sign = tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, g)).to(g.dtype)  # keeps 0 and NaN
    if KIND == "max":
        share = reciprocal(ties)
        u = tl.where(tl.abs(g) == norm, sign * share, tl.where(norm == norm, 0.0, norm))
    elif KIND == "sum":
        u = sign
    else:
        a, _ = scale_down(norm)
        b = reciprocal(norm * a)
        u = sign * slope_power(tl.abs(g) * a * b, KIND, Q)
    return tl.where(norm == 0, 0.0, u)

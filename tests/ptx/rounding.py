"""Roundings that numpy does not have, on arrays. Correctly rounded but for cases named below."""

from collections.abc import Callable

import numpy as np

Long = np.longdouble  # 64 bits of mantissa and 15 of exponent on x86
assert np.finfo(Long).nmant == 63, "the exact fma needs the 80-bit numbers of x86"


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c before its rounding to float32: off by one rounding at the 64th bit."""
    return (a.astype(np.float64) * b.astype(np.float64)).astype(Long) + c.astype(Long)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded to float64 from a sum of exact products, in which no cancellation loses a bit."""
    a, b, c = a.astype(Long), b.astype(Long), c.astype(Long)
    a_low, b_low = low_bits(a), low_bits(b)
    a_high, b_high = a - a_low, b - b_low
    total, lost = a_high * b_high, np.zeros_like(a)  # 64 bits: exact, and so are the other products
    for term in (c, a_high * b_low, a_low * b_high, a_low * b_low):
        total, error = exact_sum(total, term)
        lost = lost + error
    result = total + lost
    # Beyond the finite numbers nothing is lost that could be added.
    return np.where(np.isfinite(result), result, a * b + c).astype(np.float64)


def exact_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b, and what its rounding has lost."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def low_bits(x: np.ndarray) -> np.ndarray:
    """The last 21 of 53 bits of numbers of float64."""
    shifted = x * Long(2**32 + 1)
    return x - (shifted - (shifted - x))


def toward(direction: str) -> Callable[[np.ndarray, type], np.ndarray]:
    """Rounding to a type by PTX's name: "rn" to nearest, "rz" to zero, "rm" down, "rp" up."""

    def rounded(x: np.ndarray, kind: type) -> np.ndarray:
        nearest = x.astype(kind)
        if direction == "rn":
            return nearest
        wide = nearest.astype(x.dtype)
        too_high, too_low = wide > x, wide < x
        if direction == "rz":
            too_high, too_low = too_high & (x > 0), too_low & (x < 0)
        down = too_high & (direction != "rp")
        up = too_low & (direction != "rm")
        infinity = kind(np.inf)
        return np.where(down, np.nextafter(nearest, -infinity), np.where(up, np.nextafter(nearest, infinity), nearest))

    return rounded


def flushed(x: np.ndarray) -> np.ndarray:
    """Denormal numbers as zeros, as instructions with .ftz take and give them."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """float32 -> bits of the nearest bfloat16, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bfloat16_bits(bits: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)

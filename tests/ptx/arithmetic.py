"""What an opcode computes of its operands, lane by lane: `operation(("add", "f32"))` is a function and the types it
takes.

A modifier or a type without a rule is an error that names the instruction.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .parser import UnknownPtx
from .rounding import Long, bfloat16_bits, flushed, fma32, fma64, from_bfloat16_bits, toward

PAIRS = ("f16x2", "bf16x2")  # two numbers in a register, the first in its lower half

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
ROUNDINGS = ("rn", "rz", "rm", "rp")


def type_of(name: str) -> type:
    """numpy's type for "u32", "s64", "b16", "f32", "pred"; bfloat16 is its 16 bits."""
    if name == "pred":
        return np.bool_
    if name == "bf16":
        return np.uint16
    return {"u": UNSIGNED, "b": UNSIGNED, "s": SIGNED, "f": FLOAT}[name[0]][int(name[1:])]


class Operation(NamedTuple):
    """A function on arrays of one element for each lane, and the types that it takes."""

    function: Callable[..., np.ndarray]
    takes: tuple[type, ...]
    divides: bool = False  # the second operand must not be 0


def operation(opcode: tuple[str, ...]) -> Operation:
    """The rule for an opcode."""
    name, *modifiers, kind = opcode
    rule = RULES.get(name)
    found = rule(tuple(modifiers), kind) if rule else None
    if found is None:
        raise UnknownPtx(f"the instruction {'.'.join(opcode)} has no rule in tests/ptx/arithmetic.py")
    return found


Rule = Callable[[tuple[str, ...], str], Operation | None]


def plain(
    function: Callable[..., np.ndarray], count: int, types: str = "sufbp", modifiers: tuple[str, ...] = ()
) -> Rule:
    """A rule for a function of numpy that does the same for `types` (first letters); `modifiers` change nothing."""

    def rule(given: tuple[str, ...], kind: str) -> Operation | None:
        if kind[0] not in types or not set(given) <= set(modifiers):
            return None
        return Operation(function, (type_of(kind),) * count)

    return rule


def sum_or_difference(function: Callable[..., np.ndarray]) -> Rule:
    """add and sub: integers wrap, floats are rounded in any direction."""

    def rule(modifiers: tuple[str, ...], kind: str) -> Operation | None:
        dtype = type_of(kind)
        if modifiers in ((), ("rn",)):
            return Operation(function, (dtype, dtype))
        if kind != "f32" or modifiers[0] not in ROUNDINGS or len(modifiers) > 1:
            return None
        rounded = toward(modifiers[0])
        return Operation(lambda a, b: rounded(function(a.astype(Long), b.astype(Long)), dtype), (dtype, dtype))

    return rule


def product(modifiers: tuple[str, ...], kind: str) -> Operation | None:
    """mul"""
    dtype = type_of(kind)
    if modifiers in (((), ("rn",)) if kind[0] == "f" else (("lo",),)):
        return Operation(np.multiply, (dtype, dtype))
    if modifiers == ("wide",):
        wide = type_of(kind[0] + str(2 * int(kind[1:])))
        return Operation(lambda a, b: a.astype(wide) * b.astype(wide), (dtype, dtype))
    return None


def multiply_add(modifiers: tuple[str, ...], kind: str) -> Operation | None:
    """fma, and mad of integers"""
    dtype = type_of(kind)
    if kind[0] in "us" and modifiers == ("lo",):
        return Operation(lambda a, b, c: a * b + c, (dtype,) * 3)
    if kind == "f64" and modifiers == ("rn",):
        return Operation(fma64, (dtype,) * 3)
    if kind == "f32" and len(modifiers) == 1 and modifiers[0] in ROUNDINGS:
        rounded = toward(modifiers[0])
        return Operation(lambda a, b, c: rounded(fma32(a, b, c), dtype), (dtype,) * 3)
    return None


def truncating(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Quotient or remainder of magnitudes with the sign that C gives it; x / 0, which is a fault, counts as x / 1."""

    def signed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        b = np.where(b == 0, b.dtype.type(1), b)
        if a.dtype.kind == "u":
            return function(a, b)
        magnitude = function(np.abs(a), np.abs(b))
        negative = a < 0 if function is np.remainder else (a < 0) != (b < 0)
        return np.where(negative, -magnitude, magnitude)

    return signed


def quotient(modifiers: tuple[str, ...], kind: str) -> Operation | None:
    """div"""
    dtype = type_of(kind)
    if kind[0] == "f":
        return Operation(np.divide, (dtype, dtype)) if modifiers == ("rn",) else None
    return None if modifiers else Operation(truncating(np.floor_divide), (dtype, dtype), divides=True)


def remainder(modifiers: tuple[str, ...], kind: str) -> Operation | None:
    """rem"""
    dtype = type_of(kind)
    return None if modifiers else Operation(truncating(np.remainder), (dtype, dtype), divides=True)


def halves(pairs: np.ndarray, kind: str) -> np.ndarray:
    """[32] registers -> [32, 2] float32"""
    parts = np.ascontiguousarray(pairs).view(np.uint16).reshape(-1, 2)
    return from_bfloat16_bits(parts) if kind == "bf16x2" else parts.view(np.float16).astype(np.float32)


def extreme_of_pairs(function: np.ufunc, kind: str) -> Operation:
    """min and max of two pairs: no rounding, as each is one of the operands."""

    def pairs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = function(halves(a, kind), halves(b, kind))
        parts = bfloat16_bits(result) if kind == "bf16x2" else result.astype(np.float16).view(np.uint16)
        return np.ascontiguousarray(parts).view(np.uint32).reshape(-1)

    return Operation(pairs, (np.uint32, np.uint32))


def mask_of_pairs(modifiers: tuple[str, ...], kind: str) -> Operation | None:
    """set.compare.u32.f16x2: all bits of a half where the comparison holds."""
    if kind not in PAIRS or len(modifiers) != 2 or modifiers[0] not in COMPARISONS or modifiers[1] != "u32":
        return None
    compare = COMPARISONS[modifiers[0]]

    def mask(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        holds = compare(halves(a, kind), halves(b, kind))
        return np.where(holds, np.uint16(0xFFFF), np.uint16(0)).view(np.uint32).reshape(-1)

    return Operation(mask, (np.uint32, np.uint32))


def extreme(of_floats: np.ufunc, of_integers: np.ufunc) -> Rule:
    """min and max: the number where one is NaN; with .NaN that is NaN."""

    def rule(modifiers: tuple[str, ...], kind: str) -> Operation | None:
        if kind in PAIRS:
            return None if modifiers else extreme_of_pairs(of_floats, kind)
        dtype = type_of(kind)
        if modifiers == ("NaN",) and kind == "f32":
            return Operation(of_integers, (dtype, dtype))  # numpy's minimum and maximum keep NaN
        return None if modifiers else Operation(of_floats if kind[0] == "f" else of_integers, (dtype, dtype))

    return rule


def approximation(function: Callable[[np.ndarray], np.ndarray]) -> Rule:
    """ex2, lg2, rcp with .approx, and perhaps .ftz: the rounded result, where hardware is off by up to 2 ulp."""

    def rule(modifiers: tuple[str, ...], kind: str) -> Operation | None:
        dtype = type_of(kind)
        if modifiers == ("approx",):
            return Operation(lambda a: function(a.astype(np.float64)).astype(dtype), (dtype,))
        if modifiers == ("approx", "ftz"):
            return Operation(lambda a: flushed(function(flushed(a).astype(np.float64)).astype(dtype)), (dtype,))
        return None

    return rule


def reciprocal(modifiers: tuple[str, ...], kind: str) -> Operation | None:
    """rcp. rcp.approx.ftz.f64 has the upper half of a float64 alone: a start for iterations."""
    dtype = type_of(kind)
    if modifiers == ("rn",):
        return Operation(lambda a: dtype(1) / a, (dtype,))
    if kind == "f64" and modifiers == ("approx", "ftz"):
        upper = np.uint64(0xFFFFFFFF00000000)
        return Operation(lambda a: ((1 / flushed(a)).view(np.uint64) & upper).view(np.float64), (dtype,))
    return approximation(lambda a: 1 / a)(modifiers, kind) if kind == "f32" else None


def shift(left: bool) -> Rule:
    """shl and shr: by 32 or 64 and more there is nothing left but the sign."""

    def rule(modifiers: tuple[str, ...], kind: str) -> Operation | None:
        dtype, bits = type_of(kind), int(kind[1:])
        if modifiers:
            return None

        def shifted(a: np.ndarray, by: np.ndarray) -> np.ndarray:
            most = a.dtype.type(bits - 1)
            within = np.minimum(by, np.uint32(bits - 1)).astype(a.dtype)
            nothing = np.right_shift(a, most) if kind[0] == "s" and not left else a.dtype.type(0)
            return np.where(by < bits, np.left_shift(a, within) if left else np.right_shift(a, within), nothing)

        return Operation(shifted, (dtype, np.uint32))

    return rule


COMPARISONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),  # false for NaN, as all without u
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: (a == a) & (b == b),
    "nan": lambda a, b: (a != a) | (b != b),
}


def comparison(modifiers: tuple[str, ...], kind: str) -> Operation | None:
    """setp"""
    if len(modifiers) != 1 or modifiers[0] not in COMPARISONS or (len(modifiers[0]) > 2 and kind[0] != "f"):
        return None
    return Operation(COMPARISONS[modifiers[0]], (type_of(kind),) * 2)


def selection(modifiers: tuple[str, ...], kind: str) -> Operation | None:
    """selp"""
    dtype = type_of(kind)
    return None if modifiers else Operation(lambda a, b, p: np.where(p, a, b), (dtype, dtype, np.bool_))


TO_INTEGERS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def conversion(modifiers: tuple[str, ...], source: str) -> Operation | None:
    """cvt.how.to.from"""
    *how, target = modifiers
    to, taken = type_of(target), type_of(source)
    if source == "bf16":
        return Operation(from_bfloat16_bits, (taken,)) if target == "f32" and not how else None
    if target == "bf16":
        return Operation(bfloat16_bits, (taken,)) if source == "f32" and how == ["rn"] else None
    if how in ([], ["rn"]) and not (source[0] == "f" and target[0] != "f"):
        return Operation(lambda a: a.astype(to), (taken,))
    if how == ["sat"] and target[0] == source[0] == "f":
        return Operation(lambda a: np.where(a == a, np.clip(a, 0, 1), 0).astype(to), (taken,))
    if len(how) == 1 and how[0] in TO_INTEGERS and source[0] == "f":
        integer = TO_INTEGERS[how[0]]
        if target[0] == "f":
            return Operation(lambda a: integer(a).astype(to), (taken,))
        least, most = np.iinfo(to).min, np.iinfo(to).max

        def saturated(a: np.ndarray) -> np.ndarray:
            x = integer(np.where(a == a, a, 0).astype(Long))  # exact for every integer of 64 bits
            return np.clip(x, Long(least), Long(most)).astype(to)

        return Operation(saturated, (taken,))
    return None


def bits_of(count: Callable[[int, int], int]) -> Rule:
    """A function of an integer and its number of bits, one lane after the other."""

    def rule(modifiers: tuple[str, ...], kind: str) -> Operation | None:
        width = int(kind[1:])
        if modifiers not in ((), ("shiftamt",)):
            return None
        return Operation(lambda a: np.array([count(int(x), width) for x in a], np.uint32), (type_of(f"u{width}"),))

    return rule


def byte_permutation(modifiers: tuple[str, ...], kind: str) -> Operation | None:
    """prmt: each byte of the result is one of the eight of a and b; no use of the signs of bytes."""
    if modifiers or kind != "b32":
        return None

    def permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        if (selector & 0x8888).any():
            raise UnknownPtx("prmt with the sign of a byte has no rule in tests/ptx/arithmetic.py")
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.zeros_like(a)
        for place in range(4):
            byte = (selector >> np.uint32(4 * place) & np.uint32(7)).astype(np.uint64)
            result |= (both >> (np.uint64(8) * byte) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * place)
        return result

    return Operation(permuted, (np.uint32,) * 3)


def find_leading_one(modifiers: tuple[str, ...], kind: str) -> Operation | None:
    """bfind of unsigned integers: the place of the leading 1, or by how much to shift it to the top."""
    if kind[0] != "u":
        return None
    if modifiers == ("shiftamt",):
        return bits_of(lambda x, width: width - x.bit_length() if x else 0xFFFFFFFF)(modifiers, kind)
    return bits_of(lambda x, width: x.bit_length() - 1 if x else 0xFFFFFFFF)(modifiers, kind)


RULES: dict[str, Rule] = {
    "add": sum_or_difference(np.add),
    "sub": sum_or_difference(np.subtract),
    "mul": product,
    "mad": multiply_add,
    "fma": multiply_add,
    "div": quotient,
    "rem": remainder,
    "min": extreme(np.fmin, np.minimum),
    "max": extreme(np.fmax, np.maximum),
    "abs": plain(np.abs, 1, "fs"),
    "neg": plain(np.negative, 1, "fs"),
    "copysign": plain(lambda sign, a: np.copysign(a, sign), 2, "f"),
    "sqrt": plain(np.sqrt, 1, "f", ("rn",)),
    "rcp": reciprocal,
    "ex2": approximation(np.exp2),
    "lg2": approximation(np.log2),
    "and": plain(np.bitwise_and, 2, "bp"),
    "or": plain(np.bitwise_or, 2, "bp"),
    "xor": plain(np.bitwise_xor, 2, "bp"),
    "not": plain(np.invert, 1, "bp"),
    "shl": shift(left=True),
    "shr": shift(left=False),
    "setp": comparison,
    "set": mask_of_pairs,
    "selp": selection,
    "cvt": conversion,
    "popc": bits_of(lambda x, width: x.bit_count()),
    "brev": bits_of(lambda x, width: int(f"{x:0{width}b}"[::-1], 2)),
    "bfind": find_leading_one,
    "prmt": byte_permutation,
}

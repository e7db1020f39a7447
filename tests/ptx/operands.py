"""What instructions read and write: registers, numbers, places of variables.

Values are arrays of 32 lanes that nobody changes once they are made: a register gets another array. `lanes` is a
mask, or None for all 32.

nvcc moves registers that were not written, and computes with them, where nobody looks at the result: that is no
fault. So what a step reads of them makes its result unwritten too, in those lanes, and a fault is what depends on
it: an address, a stored value, a branch, a vote.
"""

import re
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import UNSIGNED
from .memory import Fault
from .parser import Kernel, UnknownPtx

if TYPE_CHECKING:
    from .instructions import Program
    from .warp import Warp

LANES = 32
ALL, NONE = np.ones(LANES, bool), np.zeros(LANES, bool)
LANE = np.arange(LANES)

Lanes = np.ndarray | None
Source = Callable[["Warp", Lanes], np.ndarray]
Target = Callable[["Warp", np.ndarray, Lanes], None]


def same_bits(value: np.ndarray, dtype: type) -> np.ndarray:
    """A value as another type: its bits; integers of another size are cut, or extended by their own sign."""
    if value.dtype == dtype:
        return value
    size = np.dtype(dtype).itemsize
    if value.dtype.itemsize != size:
        value = value.astype(UNSIGNED[8 * size])
    return value.view(dtype)


def source(program: "Program", operand: str, dtype: type) -> Source:
    """Reads an operand: a register, a special register, a number, the place of a shared variable or of a parameter."""
    kernel = program.kernel
    if operand.startswith("!"):
        positive = source(program, operand[1:], dtype)
        return lambda warp, lanes: ~positive(warp, lanes)
    if operand in SPECIAL:
        return lambda warp, lanes: same_bits(SPECIAL[operand](warp), dtype)
    if operand.startswith("%"):
        return register_source(program.slot(operand), operand, kernel.register_type(operand), dtype)
    constant = np.full(LANES, number(kernel, operand, dtype))
    return lambda warp, lanes: constant


def register_source(slot: int, name: str, kept: type, dtype: type) -> Source:
    """Reads a register that is kept as `kept`."""
    same = np.dtype(kept) == np.dtype(dtype)

    def read(warp: "Warp", lanes: Lanes) -> np.ndarray:
        if slot in warp.unwritten:
            warp.spoil(warp.unwritten[slot])
        value = warp.registers[slot]
        return value if same else same_bits(value, dtype)

    return read


def certain(read: Source, what: str) -> Source:
    """Reads what must not depend on a register that was not written."""

    def checked(warp: "Warp", lanes: Lanes) -> np.ndarray:
        value = read(warp, lanes)
        if warp.spoiled is not None and (warp.spoiled if lanes is None else warp.spoiled & lanes).any():
            raise Fault(f"{what} depends on a register that nobody wrote")
        return value

    return checked


def number(kernel: Kernel, operand: str, dtype: type) -> np.generic:
    """The value of an immediate operand."""
    if operand in kernel.shared:
        return dtype(kernel.shared[operand])
    if operand in kernel.parameters:
        return dtype(kernel.parameters[operand][0])
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", operand):
        return np.array(struct.unpack(">f", bytes.fromhex(match[1]))[0], np.float32)[()].astype(dtype)
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", operand):
        return np.array(struct.unpack(">d", bytes.fromhex(match[1]))[0], np.float64)[()].astype(dtype)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
        value = int(operand.rstrip("U"), 0)
        if np.dtype(dtype).kind in "fb":
            return dtype(value)
        size = np.dtype(dtype).itemsize
        return np.array(value % (1 << 8 * size), UNSIGNED[8 * size]).view(dtype)[()]
    raise UnknownPtx(f"{kernel.name}: operand {operand!r}")


SPECIAL: dict[str, Callable[["Warp"], np.ndarray]] = {
    "%tid.x": lambda warp: warp.threads,
    "%ctaid.x": lambda warp: np.full(LANES, warp.block.index[0], np.uint32),
    "%ctaid.y": lambda warp: np.full(LANES, warp.block.index[1], np.uint32),
    "%ntid.x": lambda warp: np.full(LANES, warp.block.size, np.uint32),
}


def target(program: "Program", operand: str) -> Target:
    """Writes a register, in some lanes or in all."""
    if operand == "_":
        return lambda warp, value, lanes: None
    slot, dtype = program.slot(operand), np.dtype(program.kernel.register_type(operand))

    def write(warp: "Warp", value: np.ndarray, lanes: Lanes) -> None:
        if value.dtype != dtype:
            value = same_bits(value, dtype.type)
        warp.registers[slot] = value if lanes is None else np.where(lanes, value, warp.registers[slot])
        if warp.spoiled is None and slot not in warp.unwritten:
            return
        here = ALL if lanes is None else lanes
        missing = warp.unwritten.pop(slot, NONE) & ~here
        if warp.spoiled is not None:
            missing = missing | (warp.spoiled & here)
        if missing.any():
            warp.unwritten[slot] = missing

    return write


def listed(operand: str) -> list[str]:
    """ "{%r1, %r2}" -> ["%r1", "%r2"]"""
    return [part.strip() for part in operand.strip("{}").split(",")]

"""A device as the launches see it: arrays in its memory, kernels by name, arguments as bytes."""

import functools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .compiler import ptx
from .grid import Counts, Launch, packed
from .instructions import Program
from .memory import Memory
from .parser import Kernel, Module
from .rounding import bfloat16_bits, from_bfloat16_bits

MEMORY_BYTES, MEMORY_BASE = 1 << 21, 1 << 32
STORED = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": np.uint16}


def stored(dtype: str | type) -> np.dtype:
    """What numpy keeps numbers of a type in."""
    return np.dtype(STORED[dtype] if isinstance(dtype, str) else dtype)


@functools.cache
def module(dtype: str) -> Module:
    """The kernels for one type."""
    return Module(ptx(dtype))


@functools.cache
def program(kernel: Kernel) -> Program:
    """A kernel decoded, once."""
    return Program(kernel)


@dataclass(frozen=True)
class Array:
    """An array in the memory of a device; `dtype` is a key of STORED or a type of numpy."""

    device: "Device"
    address: int
    shape: tuple[int, ...]
    dtype: str | type

    @property
    def size(self) -> int:
        """Bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * stored(self.dtype).itemsize

    def read(self) -> np.ndarray:
        """Its values, all of which must have been written; numbers of 16 bits as float32."""
        raw = np.frombuffer(self.device.memory.read(self.address, self.size), stored(self.dtype))
        values = from_bfloat16_bits(raw) if self.dtype == "bfloat16" else raw
        return (values.astype(np.float32) if self.dtype == "float16" else values).reshape(self.shape)


class Device:
    """Memory, the kernels for logits or gradients of `dtype`, and how often each of their instructions ran."""

    def __init__(self, dtype: str, chance: random.Random | None = None, kernels: Module | None = None):
        self.dtype, self.chance = dtype, chance
        self.wide = "float64" if dtype == "float64" else "float32"  # of sums, norms and losses
        self.kernels = kernels or module(dtype)
        self.memory = Memory("global", MEMORY_BYTES, MEMORY_BASE)
        self.counts: dict[str, Counts] = {}

    def array(self, values: ArrayLike, dtype: str | type, shift: int = 0) -> Array:
        """A copy of `values`, rounded to `dtype`, `shift` elements behind a multiple of 256 bytes."""
        values = np.asarray(values)
        raw = bfloat16_bits(values.astype(np.float32)) if dtype == "bfloat16" else values.astype(stored(dtype))
        array = self.empty(values.shape, dtype, shift)
        self.memory.write(array.address, raw.tobytes())
        return array

    def empty(self, shape: tuple[int, ...], dtype: str | type, shift: int = 0) -> Array:
        """Memory that nobody has written."""
        array = Array(self, 0, tuple(shape), dtype)
        step = shift * stored(dtype).itemsize
        return Array(self, self.memory.allocate(array.size, step), tuple(shape), dtype)

    def launch(
        self, stem: str, tags: tuple[str, ...], grid: int | tuple[int, int], block: int, *arguments: Any
    ) -> None:
        """Runs the kernel `stem` whose mangled name has `tags`. An argument is one value, or a tuple: a struct."""
        run = program(self.kernels.kernel(self.kernels.find(stem, *tags)))
        counts = self.counts.setdefault(stem, Counts(run, [0] * len(run.steps)))
        if counts.program is not run:
            raise ValueError(f"{stem} was launched on one device with different template arguments")
        blocks = (grid, 1) if isinstance(grid, int) else grid
        parameters = packed(run, [struct(*a) if isinstance(a, tuple) else struct(a) for a in arguments])
        Launch(run, self.memory, blocks, block, parameters, counts).run(self.chance)


def struct(*values: Any) -> bytes:
    """Values as C lays them out: arrays are pointers, None is a null pointer, bytes are a struct aligned to 8."""
    content, widest = b"", 1
    for value in values:
        if isinstance(value, bytes):
            raw, step = value, 8
        else:
            scalar = np.int64(value.address if isinstance(value, Array) else value or 0) if is_pointer(value) else value
            raw = scalar.tobytes()
            step = len(raw)
        content = content.ljust(-(-len(content) // step) * step, b"\0") + raw
        widest = max(widest, step)
    return content.ljust(-(-len(content) // widest) * widest, b"\0")


def is_pointer(value: Any) -> bool:
    """An array, or none."""
    return value is None or isinstance(value, Array)

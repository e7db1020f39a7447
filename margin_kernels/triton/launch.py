"""What every launch needs: tiles that depend on the row length alone, rows that a kernel can read, the right device.

A tile is [ROWS, BLOCK] elements: BLOCK columns of ROWS rows, at most 2048 elements (1024 of float64), 16 for each of
the 128 threads. Both numbers, and with them the order of every sum, follow from the row length and the dtype, never
from the number of rows. For the same reason no argument is specialised: Triton's own guess from the values of strides
and addresses, whether 16 bytes may be read at once, would choose the layout of a tile, and a slice would then be summed
in another order than the whole. VEC says it instead: the number of elements in 16 bytes where the row length is a
multiple of it, else 1.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements, and half as many of float64; tiles of short rows hold half of it


def kernel(function: Callable[..., None]) -> Any:
    """@triton.jit without specialisation; every argument that is not a tl.constexpr is a run-time argument.

    A Python float would arrive as float32. One that a schedule may change (eps, delta) is annotated tl.float64, and the
    kernel rounds it to the type of its sums before anything is computed with it: tl.full(shape, eps, ACC).
    """
    parameters = inspect.signature(function).parameters.values()
    run_time = [p.name for p in parameters if p.annotation is not tl.constexpr]
    return triton.jit(do_not_specialize=run_time, do_not_specialize_on_alignment=run_time)(function)


def launch(function: Any, grid: tuple[int, ...], tensor: Tensor, *args: Any, **constants: Any) -> None:
    """Runs `function` on the device of `tensor` and the current stream; an empty grid is no launch."""
    if math.prod(grid) == 0:
        return
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            function[grid](*args, **constants, num_warps=4, enable_fp_fusion=True)
    else:
        function[grid](*args, **constants, num_warps=4, enable_fp_fusion=True)


class Tile(NamedTuple):
    rows: int
    block: int
    vec: int

    @property
    def constants(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK": self.block, "VEC": self.vec}


def tile_for(length: int, dtype: torch.dtype) -> Tile:
    """The tile for rows of `length` elements."""
    largest = TILE // 2 if dtype == torch.float64 else TILE
    block = min(triton.next_power_of_2(max(length, 16)), largest)
    elements = 16 // dtype.itemsize
    return Tile(max(1, largest // 2 // block), block, elements if length % elements == 0 and length > 0 else 1)


def aligned(rows: Tensor, vec: int, batch_dims: int = 1) -> bool:
    """Does every row begin at a multiple of 16 bytes (where the tile counts on it)?"""
    return vec == 1 or (rows.data_ptr() % 16 == 0 and all(s % vec == 0 for s in rows.stride()[:batch_dims]))


def readable(matrix: Tensor, vec: int) -> Tensor:
    """[N, C] with unit stride inside the rows and aligned rows: itself, else a copy."""
    if (matrix.stride(1) == 1 or matrix.shape[1] == 1) and aligned(matrix, vec):
        return matrix
    # not .contiguous(), which returns a misaligned matrix as it is
    return matrix.clone(memory_format=torch.contiguous_format)


def accumulate(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of sums and results: float64 if any input is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cdiv(a: int, b: int) -> int:
    return -(-a // b)

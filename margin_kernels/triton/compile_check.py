"""`python -m margin_kernels.triton.compile_check`: every Triton kernel compiled for sm_90, without a GPU.

Runs each op forward and backward on small CPU tensors, up to the launch itself, which only compiles; prints registers,
spills and shared memory of each kernel, and how many instructions compute in float64. A spill is an error, and so is
float64 in a kernel of another dtype (exit status 1). A process of its own: nothing can be launched in it afterwards.
"""

import contextlib
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ..reference.margin_hinge import AGGREGATIONS
from ..testing import sample_gradients
from . import ops
from .interpreter import INTERPRETED

CAPABILITY = 90
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Row(NamedTuple):
    """What one kernel needs: registers and bytes of spills for each thread, bytes of shared memory; float64 in it."""

    op: str
    kernel: str
    dtype: str
    case: str
    registers: int
    spills: int
    shared: int
    float64: int


class _NoDevice:
    """What Triton asks of a driver before a launch, answered for a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) for each thread: what does not fit in registers is spilled there."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"{name}:(\d+)", said) for name in ("REG", "STACK", "LOCAL"))
    assert registers is not None and stack is not None and local is not None, said
    return int(registers[1]), int(stack[1]) + int(local[1])


def _float64(ptx: str) -> int:
    """Instructions on float64; not those that round an argument (eps, delta) to float32."""
    code = re.findall(r"^\s*(?:@\S+ )?([a-z][\w.]*\.f64[\w.]*)", ptx, re.MULTILINE)
    return sum(not name.startswith(("ld.param.", "cvt.rn.f32.f64")) for name in code)


def cases() -> Iterator[tuple[str, torch.dtype, str, tuple[Any, ...]]]:
    """(op, dtype, what is special, arguments)."""
    index, target, active = torch.tensor([[1, 2], [0, 3]]), torch.tensor([0, 1]), torch.ones(2, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):

        def sample(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return sample_gradients(*shape, dtype=dtype).requires_grad_()

        for classes in (10, 1000, 50257, 128000):
            yield "competitors", dtype, f"C = {classes}", (sample(2, classes), target, 2)
            yield "competitors", dtype, f"C = {classes}, uniform", (sample(2, classes), target, 2, -100, True)
        for p in (1, math.inf, 2, 3, 4):
            for shape in ((2, 3, 10), (2, 3, 1024), (1, 1, 9001), (1, 1, 150528)):
                yield "dual_norm", dtype, f"D = {shape[2]}, p = {p}", ([sample(*shape)], p, 2)
            yield "row_distance", dtype, f"D = 512, p = {p}", (sample(4, 512), index, target, p)
            for length in (784, 9001):
                gradients = sample(2, 3, length)
                yield "deepfool_step", dtype, f"D = {length}, p = {p}", (sample(2, 3), gradients, active, p)
        yield "dual_norm", dtype, "five layers, p = 2", ([sample(2, 3, d) for d in (784, 4096, 2048, 512, 10)], 2, 2)
        for aggregation in AGGREGATIONS:
            bounds = (torch.ones(5), torch.ones(5), torch.ones(5), torch.ones(5))
            arguments = (sample(2, 3), sample(2, 3, 5), *bounds, 1e-6, aggregation, "mean")
            yield "margin_hinge", dtype, aggregation, arguments
        for classes in (10, 1000):
            for cross_entropy in (False, True):
                name = f"C = {classes}" + ", cross-entropy" * cross_entropy
                yield "one_to_n", dtype, name, (sample(2, classes), target, 1.0, "positive", cross_entropy)


@contextlib.contextmanager
def compile_only() -> Iterator[list[tuple[Any, Any]]]:
    """Inside, launches only compile: for a GPU that is not there. The list is of (kernel, what it was compiled to)."""
    assert not INTERPRETED, "TRITON_INTERPRET=1 replaces the compiler: unset it"
    run = triton.runtime.JITFunction.run
    launched: list[tuple[Any, Any]] = []

    def compiled(function: Any, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> None:
        launched.append((function, run(function, *arguments, grid=grid, warmup=True, **constants)))

    driver.set_active(_NoDevice())
    triton.runtime.JITFunction.run = compiled
    try:
        yield launched
    finally:
        triton.runtime.JITFunction.run = run


def forward_and_backward(op: str, arguments: tuple[Any, ...]) -> None:
    results = getattr(ops, op)(*arguments)
    found = results if isinstance(results, tuple) else (results,)
    outputs = [out for out in found if out is not None and out.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])


def check(chosen: str | None = None) -> Iterator[Row]:
    """A row for each kernel of each case, as it is compiled; of one op only where `chosen` names it."""
    with compile_only() as launched:
        for op, dtype, name, arguments in cases():
            if chosen not in (None, op):
                continue
            forward_and_backward(op, arguments)
            while launched:
                kernel, compiled = launched.pop(0)
                registers, spills = _resources(compiled.asm["cubin"])
                shared, float64 = compiled.metadata.shared, _float64(compiled.asm["ptx"])
                type_ = str(dtype).removeprefix("torch.")
                yield Row(op, kernel.__name__, type_, name, registers, spills, shared, float64)


def main(arguments: list[str]) -> int:
    print(f"triton {triton.__version__}, sm_{CAPABILITY}")
    print(
        f"{'op':14} {'kernel':16} {'dtype':8} {'case':24} {'registers':>9} {'spills':>6} {'shared':>6} {'float64':>7}"
    )
    wrong = 0
    for row in check(*arguments[:1]):
        wrong += row.spills > 0 or (row.float64 > 0 and row.dtype != "float64")
        needs = f"{row.registers:9} {row.spills:6} {row.shared:6} {row.float64:7}"
        print(f"{row.op:14} {row.kernel:16} {row.dtype:8} {row.case:24} {needs}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

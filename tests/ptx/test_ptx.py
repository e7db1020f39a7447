"""Every CUDA kernel, as nvcc made it, executed without a GPU: its values in float64, every access, every barrier.

One file, so that one process compiles the kernels (`pytest --dist loadfile`). MARGIN_KERNELS_NIGHTLY=1 runs every
case in every type.
"""

import os
import random

import pytest

from ptx import cases, compiler
from ptx.device import Device, module
from ptx.memory import Fault
from ptx.mutants import MUTANTS

NIGHTLY = bool(os.environ.get("MARGIN_KERNELS_NIGHTLY"))
ALL_CASES = cases.CASES | (cases.NIGHTLY if NIGHTLY else {})
RUNS = [("float32", name) for name in ALL_CASES]
RUNS += [(dtype, name) for dtype in ("bfloat16", "float16", "float64") for name in ALL_CASES if NIGHTLY]
RUNS += [("bfloat16", name) for name in cases.MAIN if not NIGHTLY]

pytestmark = pytest.mark.skipif(compiler.nvcc() is None, reason="nvcc is not on PATH: no PTX to execute")


REACHED: dict[str, set[str]] = {}  # type -> mangled names that ran


@pytest.mark.parametrize("dtype, name", RUNS)
def test_a_kernel_computes_what_the_reference_does_and_accesses_what_it_may(dtype, name):
    device = Device(dtype, random.Random(1))
    ALL_CASES[name](device)
    REACHED.setdefault(dtype, set()).update(counts.program.kernel.name for counts in device.counts.values())


def test_every_kernel_is_reached(request):
    chosen = sum(item.name.startswith("test_a_kernel_computes") for item in request.session.items)
    if chosen < len(RUNS):
        pytest.skip(f"{chosen} of {len(RUNS)} cases were chosen")
    for dtype in REACHED if NIGHTLY else ("float32",):
        assert set(module(dtype).entries) == REACHED[dtype]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mistake_in_a_kernel_is_found(mutant, monkeypatch):
    """The same case passes on the kernel as it is."""
    monkeypatch.setattr("ptx.warp.MOST_STEPS", 40_000)  # three times what a warp takes without a mistake
    with pytest.raises((Fault, AssertionError)):
        cases.CASES[mutant.case](Device("float32", random.Random(1), mutant.applied(module("float32"))))

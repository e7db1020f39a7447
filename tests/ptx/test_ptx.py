"""Every CUDA kernel, as nvcc made it, executed without a GPU: its values in float64, every access, every barrier.

One file, so that one process compiles the kernels (`pytest --dist loadfile`). MARGIN_KERNELS_NIGHTLY=1 runs every
case in every type.
"""

import functools
import json
import os
import random
import re

import pytest

from ptx import cases, compiler, counts, launches
from ptx.device import Device, module
from ptx.memory import Fault
from ptx.mutants import MUTANTS

NIGHTLY = bool(os.environ.get("MARGIN_KERNELS_NIGHTLY"))
ALL_CASES = cases.CASES | (cases.NIGHTLY if NIGHTLY else {})
RUNS = [("float32", name) for name in ALL_CASES]
RUNS += [(dtype, name) for dtype in ("bfloat16", "float16", "float64") for name in ALL_CASES if NIGHTLY]
RUNS += [("bfloat16", name) for name in cases.MAIN if not NIGHTLY]

pytestmark = pytest.mark.skipif(compiler.nvcc() is None, reason="nvcc is not on PATH: no PTX to execute")


HEADERS = "".join(path.read_text() for path in (compiler.ROOT / "csrc/cuda").glob("*.cuh"))


@pytest.mark.parametrize("constant", launches.CONSTANTS)
def test_paths_are_chosen_as_the_launchers_choose_them(constant):
    assert re.search(rf"\b{constant} = {launches.CONSTANTS[constant]}[,;]", HEADERS)


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
    monkeypatch.setattr("ptx.warp.MOST_STEPS", 40_000)  # no warp takes as many in these cases without a mistake
    with pytest.raises((Fault, AssertionError)):
        cases.CASES[mutant.case](Device("float32", random.Random(1), mutant.applied(module("float32"))))


DTYPES = counts.DTYPES if NIGHTLY else ("float32",)


@functools.cache
def quoted() -> dict:
    """The committed file."""
    return json.loads(counts.FILE.read_text())


def test_the_quoted_counts_are_those_of_the_kernels():
    if compiler.nvcc_version() != quoted()["nvcc"]:
        pytest.skip(f"the file is of nvcc {quoted()['nvcc']}, and this is {compiler.nvcc_version()}")
    rows = [row for row in quoted()["kernels"] if row["dtype"] in DTYPES]
    changed = [(new, old) for new, old in zip(counts.measured(DTYPES), rows, strict=True) if new != old]
    assert not changed, "python -m ptx.counts writes the file"


# Where every row is aligned, as rows of 10 logits are not, and packs are most of what a kernel stores: in rows of 256
# the label and five competitors, which are stored again, are not few.
@pytest.mark.parametrize("kernel", ["competitors_backward", "dual_norm_backward", "one_to_n_backward", "deepfool_step"])
def test_packs_are_stored_in_16_bytes(kernel):
    rows = [row for row in quoted()["kernels"] if row["kernel"] == f"{kernel}_kernel"]
    rows = [row for row in rows if not any(name in row["shape"] for name in (", 10]", "256], k = 5"))]
    assert {row["dtype"] for row in rows} == set(counts.DTYPES)
    for row in rows:
        narrow = sum(n for name, n in row["sectors"].items() if name in ("st 2", "st 4"))
        assert narrow <= 0.2 * row["sectors"]["st 16"], row["shape"]

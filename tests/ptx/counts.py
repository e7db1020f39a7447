"""What the kernels execute and move at quoted shapes. `PYTHONPATH=tests python -m ptx.counts` writes the file.

PTX is counted, not what ptxas makes of it: a division is one instruction here. Inputs and order of execution are
fixed, so that one version of nvcc gives one file. Per kernel:

    elements            of the op's large input
    lane_instructions   32 times the instructions that a warp issued, per element
    classes             instructions that a warp issued, by class
    sectors             of 32 bytes, by "ld" and "st" and the bytes that one lane moves at a time
    spread              bytes of these sectors per byte that was asked for, loads and stores: 1 is ideal
"""

import argparse
import json
import math
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from support import ROOT

from . import compiler, launches
from .device import Device
from .grid import Counts
from .launches import Candidates, Hinge, Layer
from .memory import SECTOR

FILE = ROOT / "benchmarks/results/ptx_counts.json"
Run = Callable[[Device, np.random.Generator], int]  # launches, and says how many elements there are


def competitors(device: Device, rng: np.random.Generator, n: int, classes: int, k: int) -> int:
    """Gradients of gap and nll."""
    logits = device.array(rng.standard_normal((n, classes)), device.dtype)
    target = device.array(rng.integers(classes, size=n), np.int64)
    out = launches.competitors(device, logits, target, k, uniform=False)
    grads = [device.array(rng.standard_normal((n, k)), device.wide), device.array(np.ones(n), device.wide), None, None]
    launches.competitors_backward(device, logits, target, out.index, out.normalizer, grads, 0)
    return n * classes


def dual_norm(device: Device, rng: np.random.Generator, n: int, length: int, p: float) -> int:
    """One layer, one competitor."""
    rows = device.array(rng.standard_normal((n, 1, length)), device.dtype)
    layers = [Layer(rows, length, length, device.empty((n, 1, length), device.dtype))]
    norms = launches.dual_norm(device, layers, p)
    launches.dual_norm_backward(device, layers, p, norms, device.array(np.ones((n, 1, 1)), device.wide))
    return n * length


def row_distance(device: Device, rng: np.random.Generator, classes: int, length: int, n: int) -> int:
    """p = 2, one competitor."""
    rows = device.array(rng.standard_normal((classes, length)), device.dtype)
    target = rng.integers(classes, size=n)
    index = device.array(((target + 1) % classes)[:, None], np.int64)
    arguments = (device, rows, index, device.array(target, np.int64), 2)
    norms = launches.row_distance(*arguments)
    launches.row_distance_backward(*arguments, norms, device.array(np.ones((n, 1)), device.wide))
    return n * length


def margin_hinge(device: Device, rng: np.random.Generator, n: int, k: int, layers: int) -> int:
    """The largest of the terms."""
    gap = device.array(-rng.random((n, k)), device.wide)
    norm = device.array(rng.random((n, k, layers)) + 0.1, device.wide)
    hinge = Hinge(gap, norm, device.array(np.ones(layers), device.wide), None, None, None, 1e-6, "max", True)
    launches.margin_hinge(device, hinge)
    launches.margin_hinge_backward(device, hinge, device.array(np.ones(n), device.wide))
    return n * k * layers


def one_to_n(device: Device, rng: np.random.Generator, n: int, classes: int, cross_entropy: bool = False) -> int:
    """The symmetric bound."""
    logits = device.array(rng.standard_normal((n, classes)), device.dtype)
    target = device.array(rng.integers(classes, size=n), np.int64)
    out = launches.one_to_n(device, logits, target, 1.0, False, cross_entropy)
    launches.one_to_n_backward(device, logits, target, 1.0, False, device.array(np.ones(n), device.wide), out, 0)
    return n * classes


def deepfool_step(device: Device, rng: np.random.Generator, n: int, k: int, length: int) -> int:
    """p = 2, gradients of step and distance."""
    gradients = device.array(rng.standard_normal((n, k, length)), device.dtype)
    norms = launches.dual_norm(device, [Layer(gradients, length, length)], 2)
    given = Candidates(device.array(-rng.random((n, k)), device.wide), gradients, None, norms)
    step, distance, choice, norm = launches.deepfool_step(device, given, 2, 0)
    grads = (device.array(np.ones(step.shape), device.dtype), device.array(np.ones(distance.shape), device.wide))
    launches.deepfool_step_backward(device, given, 2, choice, norm, *grads)
    return n * k * length


PS = (1, 2, 3, math.inf)
SHAPES: dict[str, Run] = {
    "competitors [64, 10], k = 1": partial(competitors, n=64, classes=10, k=1),
    "competitors [64, 10], k = 5": partial(competitors, n=64, classes=10, k=5),
    "competitors [8, 256], k = 1": partial(competitors, n=8, classes=256, k=1),
    "competitors [8, 256], k = 5": partial(competitors, n=8, classes=256, k=5),
    "competitors [8, 1000], k = 1": partial(competitors, n=8, classes=1000, k=1),
    "competitors [8, 1000], k = 5": partial(competitors, n=8, classes=1000, k=5),
    "competitors [1, 32000], k = 1": partial(competitors, n=1, classes=32000, k=1),
    "competitors [1, 32000], k = 5": partial(competitors, n=1, classes=32000, k=5),
    "dual_norm [8, 784], p = 2": partial(dual_norm, n=8, length=784, p=2),
    **{f"dual_norm [8, 1000], p = {p}": partial(dual_norm, n=8, length=1000, p=p) for p in PS},
    **{f"dual_norm [2, 8192], p = {p}": partial(dual_norm, n=2, length=8192, p=p) for p in PS},
    "row_distance [10, 512], 8 pairs, p = 2": partial(row_distance, classes=10, length=512, n=8),
    "margin_hinge [128, 9, 3], max": partial(margin_hinge, n=128, k=9, layers=3),
    "one_to_n [64, 1000]": partial(one_to_n, n=64, classes=1000),
    "one_to_n [64, 1000], cross-entropy": partial(one_to_n, n=64, classes=1000, cross_entropy=True),
    "one_to_n [1024, 10], cross-entropy": partial(one_to_n, n=1024, classes=10, cross_entropy=True),
    "deepfool_step [2, 2, 4096], p = 2": partial(deepfool_step, n=2, k=2, length=4096),
}


def row(shape: str, dtype: str, kernel: str, elements: int, counts: Counts) -> dict:
    """The figures of one kernel."""
    traffic = counts.traffic
    spread = {}
    for kind in ("ld", "st"):
        asked = sum(size for (way, _), size in traffic.bytes.items() if way == kind)
        moved = SECTOR * sum(number for (way, _), number in traffic.sectors.items() if way == kind)
        spread[kind] = round(moved / asked, 2) if asked else None
    return {
        "shape": shape,
        "dtype": dtype,
        "kernel": kernel,
        "elements": elements,
        "lane_instructions": round(32 * counts.warp_instructions / elements, 2),
        "classes": counts.by_class(),
        "sectors": {f"{way} {width}": number for (way, width), number in sorted(traffic.sectors.items())},
        "spread": spread,
    }


DTYPES = ("float32", "bfloat16")


def measured(dtypes: tuple[str, ...] = DTYPES) -> list[dict]:
    """A row for every kernel, shape and type; margin_hinge works on float32 in either type."""
    rows = []
    for dtype in dtypes:
        for shape, run in SHAPES.items():
            if dtype == "bfloat16" and shape.startswith("margin_hinge"):
                continue
            device = Device(dtype)
            elements = run(device, np.random.default_rng(0))
            rows += [row(shape, dtype, kernel, elements, counts) for kernel, counts in device.counts.items()]
    return rows


def commit() -> str:
    """The last commit that changed csrc/, with a mark where csrc/ has changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments, "--", "csrc"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("log", "-1", "--format=%h", "--abbrev=12") + ("-dirty" if git("status", "--porcelain") else "")


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    out = parser.parse_args().out
    if compiler.nvcc() is None:
        parser.error("nvcc must be on PATH, got none")
    head = {"nvcc": compiler.nvcc_version(), "architecture": compiler.ARCHITECTURE, "commit": commit()}
    rows = ",\n".join(f"    {json.dumps(figures)}" for figures in measured())
    out.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "kernels": [\n{rows}\n  ]\n}}\n')


if __name__ == "__main__":
    main()

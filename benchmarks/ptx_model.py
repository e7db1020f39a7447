"""What an H200 would take for the cases of kernels_gpu.py, predicted from counts. Nothing here has run on a GPU.

python benchmarks/ptx_model.py        writes benchmarks/results/ptx_model.json

A kernel takes the longest of

    memory    bytes that it must read and write, at 4.3 TB/s
    issue     its instructions (results/ptx_counts.json; without copies of registers, which ptxas takes out) at 60 % of
              what 132 multiprocessors of 4 schedulers issue at 1.98 GHz
    latency   its bytes, as fast as those that are under way at a time arrive after 600 ns: the threads that registers
              and shared memory leave room for (results/registers_cuda.txt) times their loads; 600 ns at least

and a case the sum of its kernels. "share" is what the floor of kernels_gpu.py would take at 4.3 TB/s, relative to that.
Not in it: launches, the last blocks of a grid, caches, the throughput of single units (ex2, float64), what else ptxas
makes of the PTX. Instructions are those of a smaller case on the same path, scaled by what a kernel's work grows with.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"
FILE = RESULTS / "ptx_model.json"
BANDWIDTH, LATENCY = 4.3e12, 600e-9  # bytes a second, seconds
MULTIPROCESSORS, SCHEDULERS, CLOCK, ISSUE = 132, 4, 1.98e9, 0.6
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 233472  # of a multiprocessor
WANTED = 0.85

Sizes = dict[str, float]


class Kernel(NamedTuple):
    """What a kernel's instructions grow with, its bytes, and the loads of 16 bytes that a thread has under way."""

    work: Callable[[Sizes], float]
    bytes: Callable[[Sizes], float]
    loads: float | Callable[[Sizes], float]
    threads: int = 256


def elements(s: Sizes) -> float:
    """Logits, or all elements of gradients or pairs."""
    return s["n"] * s.get("k", 1) * s["length"]


def chosen(s: Sizes) -> float:
    """One row a sample."""
    return s["n"] * s["length"]


def segments(s: Sizes) -> float:
    """Sums of classes by 256 samples."""
    return math.ceil(s["n"] / 256) * s["length"]


def chunks(s: Sizes) -> float:
    """Partial results of the columns: a chunk of 64 rows at least, 4096 tiles at most."""
    tiles = math.ceil(s["length"] / (512 / s["bytes"]))
    return min(256, max(1, 4096 // tiles), math.ceil(s["n"] / 64)) * s["length"]


def held(s: Sizes) -> float:
    """A lane's share of a row that as many lanes hold as have room for it, 256 bytes each."""
    row = s["length"] * s["bytes"]
    return row / 16 / next(lanes for lanes in (1, 4, 8, 16, 32) if row <= 256 * lanes)


# Lengths are those of rows: of logits C.
KERNELS = {
    "competitors_row_kernel": Kernel(chosen, lambda s: chosen(s) * s["bytes"], held),
    "competitors_part_kernel": Kernel(chosen, lambda s: chosen(s) * s["bytes"], 8),
    "competitors_merge_kernel": Kernel(lambda s: s["n"], lambda s: s["n"] * 100 * s["taken"], 1),
    "competitors_backward_kernel": Kernel(chosen, lambda s: 2 * chosen(s) * s["bytes"], 4),
    "competitors_backward_short_kernel": Kernel(chosen, lambda s: 2 * chosen(s) * s["bytes"], 1),
    "dual_norm_kernel": Kernel(elements, lambda s: elements(s) * s["bytes"], 4),
    "dual_norm_finish_kernel": Kernel(lambda s: s["n"] * s.get("k", 1), lambda s: elements(s) * s["bytes"] / 4096, 1),
    "row_distance_kernel": Kernel(elements, lambda s: (s["k"] + 1) * chosen(s) * s["bytes"], 4),
    "deepfool_step_kernel": Kernel(chosen, lambda s: 2 * chosen(s) * s["bytes"], 4),
    "one_to_n_columns_kernel": Kernel(chosen, lambda s: chosen(s) * s["bytes"] + 8 * chunks(s), 8),
    "one_to_n_finish_kernel": Kernel(lambda s: s["length"], lambda s: 8 * chunks(s), 4),
    "one_to_n_loss_kernel": Kernel(lambda s: s["n"], lambda s: 50 * s["n"], 1),
    "one_to_n_samples_kernel": Kernel(lambda s: s["n"], lambda s: 50 * s["n"] + 8 * segments(s), 1),
    "one_to_n_totals_kernel": Kernel(lambda s: s["length"], lambda s: 8 * segments(s) + 12 * s["length"], 4),
    "one_to_n_backward_kernel": Kernel(chosen, lambda s: 2 * chosen(s) * s["bytes"], 4),
}
NORMS = {"1": 0, "inf": 1, "2": 2, "3": 3}
TYPES = {"float32": "float", "bfloat16": "__nv_bfloat16"}


class Case(NamedTuple):
    """A case of kernels_gpu.py and the counted one in its place."""

    op: str
    sizes: Sizes
    counted: str
    counted_sizes: Sizes
    floor: float  # bytes, as multiples of those of an element
    p: str = ""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


def cases() -> list[Case]:
    """In the order of the ops of kernels_gpu.py."""
    found = []
    for length in (1_000, 10_000, 100_000, 1_000_000):
        for p in ("1", "2", "3", "inf"):
            small = {"n": 8, "length": 1000} if length == 1_000 else {"n": 2, "length": 8192}
            counted = f"dual_norm [{small['n']}, {small['length']}], p = {p}"
            n = 256_000_000 // length
            found.append(Case("dual_norm", {"n": n, "length": length}, counted, small, n * length, p))
    for n, classes in ((65536, 10), (32768, 256), (8192, 1000), (8192, 32000), (4096, 128256)):
        for k in (1, 5):
            small = {"n": {10: 64, 256: 8, 1000: 8}.get(classes, 1), "length": min(classes, 32000)}
            counted = f"competitors [{small['n']}, {small['length']}], k = {k}"
            sizes = {"n": n, "length": classes, "taken": k}
            found.append(Case("competitors", sizes, counted, {**small, "taken": k}, 3 * n * classes))
    for n, classes in ((512, 1000), (4096, 1000), (4096, 32000)):
        small = {"n": 64, "length": 1000}
        found.append(Case("one_to_n", {"n": n, "length": classes}, "one_to_n [64, 1000]", small, 3 * n * classes))
    for length, n, k in ((512, 256, 5), (4096, 2048, 9)):
        sizes, small = {"n": n, "k": k, "length": length}, {"n": 8, "k": 1, "length": 512}
        counted = "row_distance [10, 512], 8 pairs, p = 2"
        found.append(Case("row_distance", sizes, counted, small, n * (k + 1) * length, "2", ("float32",)))
    sizes, small = {"n": 128, "k": 9, "length": 3 * 224 * 224}, {"n": 2, "k": 2, "length": 4096}
    floor = sizes["n"] * (sizes["k"] + 2) * sizes["length"]
    found.append(Case("deepfool_step", sizes, "deepfool_step [2, 2, 4096], p = 2", small, floor, "2", ("float32",)))
    return found


# What the counted cases run as well: kernels_gpu.py times these ops forward.
BACKWARD = {
    "dual_norm_backward_kernel", "dual_norm_ties_kernel", "row_distance_backward_kernel", "row_distance_ties_kernel",
    "row_distance_join_kernel", "deepfool_product_kernel", "deepfool_backward_kernel",
}  # fmt: skip


def registers() -> dict[str, tuple[int, int]]:
    """Registers and shared bytes on sm_90, by "kernel<arguments>"."""
    lines = (RESULTS / "registers_cuda.txt").read_text().splitlines()
    found = [re.fullmatch(r"  sm_90 (\d+) (\d+) \d+  (.*)", line) for line in lines]
    return {match[3]: (int(match[1]), int(match[2])) for match in found if match}


def resident(kernel: str, p: str, dtype: str, known: dict[str, tuple[int, int]]) -> int:
    """Threads of a multiprocessor, by the largest needs of the instances that may be meant."""
    norm = rf"(norm {NORMS[p]}, )?" if p else ""
    meant = re.compile(rf"{kernel}<{norm}({TYPES[dtype]}|float)(, \d+)*>")
    instances = {name: need for name, need in known.items() if meant.fullmatch(name)}
    own = {name: need for name, need in instances.items() if TYPES[dtype] in name} or instances
    if not own:
        raise KeyError(f"registers_cuda.txt must have {kernel}: make cpptest CUDA_CHECK=ON prints its lines")
    used, shared = (max(need[i] for need in own.values()) for i in range(2))
    threads = KERNELS[kernel].threads
    blocks = (REGISTERS // (math.ceil(used / 8) * 8 * threads), SHARED // (shared + 1024), THREADS // threads, BLOCKS)
    return threads * min(blocks)


def kernel_time(row: dict[str, Any], sizes: Sizes, small: Sizes, threads: int) -> dict[str, Any]:
    """Microseconds of a kernel, and what they are bound by."""
    kernel = KERNELS[row["kernel"]]
    instructions = 32 * sum(number for name, number in row["classes"].items() if name != "move")
    instructions *= kernel.work(sizes) / kernel.work(small)
    moved = kernel.bytes(sizes)
    loads = kernel.loads(sizes) if callable(kernel.loads) else kernel.loads
    under_way = MULTIPROCESSORS * threads * loads * 16
    seconds = {
        "memory": moved / BANDWIDTH,
        "issue": instructions / 32 / (ISSUE * MULTIPROCESSORS * SCHEDULERS * CLOCK),
        "latency": max(1, moved / under_way) * LATENCY,
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        "kernel": row["kernel"],
        "bytes": round(moved),
        "lane_instructions": round(instructions),
        "threads": threads,
        "bound": bound,
        "microseconds": round(seconds[bound] * 1e6, 3),
    }


def reason(kernels: list[dict[str, Any]], floor: float) -> str:
    """What keeps a case from its floor."""
    lost = sum(kernel["microseconds"] for kernel in kernels) - floor / BANDWIDTH * 1e6
    waiting = [kernel["microseconds"] for kernel in kernels if kernel["bound"] == "latency"]
    if sum(waiting) > lost / 2:
        return f"{len(waiting)} of {len(kernels)} kernels wait for one latency each"
    worst = max(kernels, key=lambda kernel: kernel["microseconds"] - kernel["bytes"] / BANDWIDTH * 1e6)
    return f"{worst['bound']}: {worst['kernel'].removesuffix('_kernel')}"


def predicted() -> list[dict[str, Any]]:
    """A row for each case and type."""
    counts = json.loads((RESULTS / "ptx_counts.json").read_text())["kernels"]
    known, rows = registers(), []
    for case in cases():
        for dtype in case.dtypes:
            size = 4 if dtype == "float32" else 2
            sizes, small = {**case.sizes, "bytes": size}, {**case.counted_sizes, "bytes": size}
            kernels = []
            for row in counts:
                if (row["shape"], row["dtype"]) == (case.counted, dtype) and row["kernel"] not in BACKWARD:
                    if row["kernel"] not in KERNELS:
                        raise KeyError(f"KERNELS of benchmarks/ptx_model.py must have {row['kernel']}")
                    kernels.append(kernel_time(row, sizes, small, resident(row["kernel"], case.p, dtype, known)))
            if not kernels:
                raise KeyError(f"ptx_counts.json must have {case.counted!r}: tests/ptx/counts.py names the shapes")
            microseconds = sum(kernel["microseconds"] for kernel in kernels)
            floor = case.floor * size
            share = floor / BANDWIDTH / microseconds * 1e6
            shown = {**case.sizes, **({"p": case.p} if case.p else {}), "dtype": dtype}
            found = {"op": case.op, **shown, "microseconds": round(microseconds, 2), "share": round(share, 3)}
            why = reason(kernels, floor) if share < WANTED else ""
            rows.append({**found, "reason": why, "kernels": kernels})
    return rows


def main() -> None:
    """Writes the file."""
    counts = json.loads((RESULTS / "ptx_counts.json").read_text())
    head = {"gpu": "H200, predicted: nothing has run on a GPU", "nvcc": counts["nvcc"], "commit": counts["commit"]}
    rows = ",\n".join(f"    {json.dumps(row)}" for row in predicted())
    FILE.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "predicted": [\n{rows}\n  ]\n}}\n')


if __name__ == "__main__":
    main()

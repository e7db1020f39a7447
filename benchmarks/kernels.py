"""The quoted figures of the ops on the CPU: interleaved rounds, ratios, shares of the copy bandwidth.

python benchmarks/kernels.py --out benchmarks/results/kernels_cpu.json
python benchmarks/kernels.py --only dual_norm_exponents --out benchmarks/results/dual_norm_cpu.json
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import compositions
import torch
from bench_competitors import SHAPES, step
from bench_deepfool_step import SHAPES as STEP_SHAPES
from bench_one_to_n import SHAPES as BATCHES
from bench_one_to_n import step as one_to_n_step
from bench_row_distance import CLASSES, COMPETITORS, FEATURES, SAMPLES
from bench_row_distance import forward as row_distance_forward
from timing import environment
from torch import Tensor

from margin_kernels import functional
from margin_kernels.timing import interleaved


def long_rows(
    lengths: tuple[int, ...], megabytes: int
) -> Iterator[tuple[dict[str, Any], Tensor, Callable[[], Tensor]]]:
    """The cell of a table, its rows, and a copy of them, for each length and dtype."""
    for length in lengths:
        for dtype in (torch.float32, torch.bfloat16):
            g = torch.randn(max(1, megabytes * 1_000_000 // (length * dtype.itemsize)), length).to(dtype)
            to = torch.empty_like(g)
            yield {"length": length, "dtype": str(dtype).removeprefix("torch.")}, g, partial(to.copy_, g)


def dual_norm(rounds: int, megabytes: int) -> list[dict[str, Any]]:
    """One core. Share = (bytes read / time) / (bytes read and written / time of a copy of the same tensor)."""
    torch.set_num_threads(1)
    table = []
    for cell, g, copy in long_rows((1_000, 10_000, 100_000, 1_000_000), megabytes):
        runs: dict[str, Any] = {"copy": copy}
        for p in (1, 2, 3, 4, math.inf):
            runs[f"ours {p}"] = lambda g=g, p=p: functional.dual_norm([g], p, 1)
        times = interleaved(runs, rounds)
        # PyTorch's are up to 25 times slower: fewer rounds, beside a copy of their own.
        slow: dict[str, Any] = {"copy": copy}
        for p in (1, 2, 3, 4, math.inf):
            slow[f"torch {p}"] = lambda g=g, p=p: compositions.vector_norms([g], p)
        slow_times = interleaved(slow, max(3, rounds // 4), warmup=1)
        size = g.numel() * g.element_size()
        for p in (1, 2, 3, 4, math.inf):
            table.append(
                {
                    **cell,
                    "p": "inf" if math.isinf(p) else p,
                    "copy_GB_per_s": 2 * size / times["copy"] / 1e9,
                    "GB_per_s": size / times[f"ours {p}"] / 1e9,
                    "share": times["copy"] / (2 * times[f"ours {p}"]),
                    "torch_share": slow_times["copy"] / (2 * slow_times[f"torch {p}"]),
                }
            )
            print(table[-1], flush=True)
    return table


# q -> p with 1/p + 1/q = 1: those with formulas of their own, and others
EXPONENTS = {
    "3/2": 3,
    "3": 1.5,
    "4": 4 / 3,
    "4/3": 4,
    "11/10": 11,
    "7/3": 1.75,
    "5/2": 5 / 3,
    "5": 1.25,
    "10": 10 / 9,
    "20": 20 / 19,
}


def dual_norm_exponents(rounds: int, megabytes: int) -> list[dict[str, Any]]:
    """One core, the share as in `dual_norm`, forward and backward (which reads and writes, as the copy does)."""
    torch.set_num_threads(1)
    table = []
    backward = torch.ops.margin_kernels.dual_norm_backward
    for cell, g, copy in long_rows((784, 3072, 100_000, 1_000_000), megabytes):
        runs: dict[str, Any] = {"copy": copy}
        slopes: dict[str, Any] = {"copy": copy}
        for q, p in EXPONENTS.items():
            norms = functional.dual_norm([g], p, 1)
            weight = torch.ones_like(norms)
            runs[q] = lambda g=g, p=p: functional.dual_norm([g], p, 1)
            slopes[q] = lambda g=g, p=p, w=weight, n=norms: backward(w, [g], n, p, 1)
        times = interleaved(runs, rounds)
        # That of q > 16 goes through float64: fewer rounds, beside a copy of their own.
        slope_times = interleaved(slopes, max(3, rounds // 4), warmup=1)
        for q in EXPONENTS:
            table.append(
                {
                    **cell,
                    "q": q,
                    "copy_GB_per_s": 2 * g.numel() * g.element_size() / times["copy"] / 1e9,
                    "share": times["copy"] / (2 * times[q]),
                    "backward_share": slope_times["copy"] / slope_times[q],
                }
            )
            print(table[-1], flush=True)
    return table


def labelled_logits(shapes: list[tuple[int, int]]) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
    """(what the row of a table says of them, logits [N, C], target [N]), each on the threads that it names."""
    for threads, dtype in ((1, torch.float32), (2, torch.float32), (2, torch.bfloat16)):
        torch.set_num_threads(threads)
        for n, classes in shapes:
            case = {"n": n, "classes": classes, "dtype": str(dtype).removeprefix("torch."), "threads": threads}
            yield case, torch.randn(n, classes).to(dtype).requires_grad_(), torch.randint(0, classes, (n,))


def competitors(rounds: int, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Forward + backward against F.cross_entropy's and against the eager composition."""
    table = []
    for case, logits, target in labelled_logits(shapes):
        runs = {"cross_entropy": step("cross_entropy", logits, target, 0)}
        for k in (1, 5):
            runs[f"ours {k}"] = step("ours", logits, target, k)
            runs[f"eager {k}"] = step("eager", logits, target, k)
        times = interleaved(runs, rounds, warmup=1)
        for k in (1, 5):
            table.append(
                {
                    **case,
                    "k": k,
                    "milliseconds": times[f"ours {k}"] * 1e3,
                    "to_cross_entropy": times[f"ours {k}"] / times["cross_entropy"],
                    "to_eager": times[f"ours {k}"] / times[f"eager {k}"],
                }
            )
            print(table[-1], flush=True)
    return table


def row_distance(rounds: int, classes: int) -> list[dict[str, Any]]:
    """One core. Share = (bytes of k + 1 rows per sample / time) / (bytes read and written / time of a copy)."""
    torch.set_num_threads(1)
    rows, g = torch.randn(classes, FEATURES), torch.randn(8_000_000)
    to = torch.empty_like(g)
    runs: dict[str, Any] = {"copy": lambda: to.copy_(g)}
    size = 0
    for p in (1, 2, 3, 4, math.inf):
        runs[f"ours {p}"], size = row_distance_forward("ours", p, rows)
    times = interleaved(runs, rounds)
    slow = {f"eager {p}": row_distance_forward("eager", p, rows)[0] for p in (1, 2, 3, 4, math.inf)}
    slow |= {f"ours {p}": runs[f"ours {p}"] for p in (1, 2, 3, 4, math.inf)}
    slow_times = interleaved(slow, max(3, rounds // 2), warmup=1)
    copy = 2 * g.numel() * g.element_size() / times["copy"]
    table = []
    for p in (1, 2, 3, 4, math.inf):
        table.append(
            {
                "classes": classes,
                "features": FEATURES,
                "pairs": [SAMPLES, COMPETITORS],
                "p": "inf" if math.isinf(p) else p,
                "microseconds": times[f"ours {p}"] * 1e6,
                "copy_GB_per_s": copy / 1e9,
                "GB_per_s": size / times[f"ours {p}"] / 1e9,
                "share": size / times[f"ours {p}"] / copy,
                "to_eager": slow_times[f"ours {p}"] / slow_times[f"eager {p}"],
            }
        )
        print(table[-1], flush=True)
    return table


def one_to_n(rounds: int, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Forward + backward against F.cross_entropy's and against the paper's N x N form."""
    table = []
    for case, logits, target in labelled_logits(shapes):
        kinds = ("cross_entropy", "ours", "ours with cross-entropy")
        times = interleaved({kind: one_to_n_step(kind, logits, target) for kind in kinds}, rounds)
        # The N x N form takes a hundred times as long: fewer rounds, beside one of ours.
        slow = interleaved({kind: one_to_n_step(kind, logits, target) for kind in ("ours", "pairs")}, 3, warmup=1)
        table.append(
            {
                **case,
                "milliseconds": times["ours"] * 1e3,
                "to_cross_entropy": times["ours"] / times["cross_entropy"],
                "with_cross_entropy_to_cross_entropy": times["ours with cross-entropy"] / times["cross_entropy"],
                "to_pairs": slow["ours"] / slow["pairs"],
            }
        )
        print(table[-1], flush=True)
    return table


def deepfool_step(rounds: int, shapes: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """Forward on one core against the composition of norms, argmin and gather."""
    torch.set_num_threads(1)
    table = []
    for n, k, length in shapes:
        gap, gradients = torch.randn(n, k), torch.randn(n, k, length)
        for p in (2, math.inf):
            runs = {
                "ours": lambda g=gap, w=gradients, p=p: functional.deepfool_step(g, w, None, p),
                "eager": lambda g=gap, w=gradients, p=p: compositions.nearest_boundary(g, w, p),
            }
            times = interleaved(runs, rounds, inner=3)
            table.append(
                {
                    "n": n,
                    "k": k,
                    "length": length,
                    "p": "inf" if math.isinf(p) else p,
                    "microseconds": times["ours"] * 1e6,
                    "GB_per_s": 4 * (gradients.numel() + n * length) / times["ours"] / 1e9,
                    "to_eager": times["ours"] / times["eager"],
                }
            )
            print(table[-1], flush=True)
    return table


def overhead(rounds: int) -> dict[str, float]:
    """Microseconds of one call at 8 x 8, one thread."""
    torch.set_num_threads(1)
    logits, target, g = torch.randn(8, 8), torch.randint(0, 8, (8,)), torch.randn(8, 8)
    gap, norm, gamma = torch.randn(8, 8), 0.5 + torch.rand(8, 8, 8), torch.ones(8)
    with_grad = logits.clone().requires_grad_()
    runs = {
        "competitors": lambda: functional.competitors(logits, target),
        "competitors, gradient recorded": lambda: functional.competitors(with_grad, target),
        "dual_norm": lambda: functional.dual_norm([g], 2, 1),
        "margin_hinge, reduction none": lambda: functional.margin_hinge(gap, norm, gamma, reduction="none"),
        "margin_hinge, reduction mean": lambda: functional.margin_hinge(gap, norm, gamma),
        "row_distance": lambda: functional.row_distance(g, target[:, None], target),
        "one_to_n": lambda: functional.one_to_n(logits, target),
        "deepfool_step": lambda: functional.deepfool_step(gap, norm),
        "torch.nn.functional.cross_entropy": lambda: torch.nn.functional.cross_entropy(logits, target),
    }
    times = interleaved(runs, rounds, inner=100, warmup=200)
    result = {name: seconds * 1e6 for name, seconds in times.items()}
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: shows that it runs")
    parser.add_argument("--only", choices=["dual_norm_exponents"], help="a table that has a file of its own")
    arguments = parser.parse_args()
    quick = arguments.quick
    result: dict[str, Any] = {"environment": environment()}
    if arguments.only:
        result["dual_norm_exponents"] = dual_norm_exponents(3 if quick else 25, 4 if quick else 64)
    else:
        result |= {
            "dual_norm": dual_norm(3 if quick else 25, 4 if quick else 64),
            "competitors": competitors(3 if quick else 15, [(256, 256)] if quick else SHAPES),
            "row_distance": row_distance(3 if quick else 81, 10_000 if quick else CLASSES),
            "one_to_n": one_to_n(3 if quick else 15, [(128, 100)] if quick else BATCHES),
            "deepfool_step": deepfool_step(3 if quick else 25, STEP_SHAPES),
            "overhead_microseconds": overhead(5 if quick else 50),
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()

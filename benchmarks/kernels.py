"""The quoted figures of the ops on the CPU: interleaved rounds, ratios, shares of the copy bandwidth.

python benchmarks/kernels.py --out benchmarks/results/kernels_cpu.json
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import compositions
import torch
from bench_competitors import SHAPES, step
from timing import environment, interleaved

from margin_kernels import functional


def dual_norm(rounds: int, megabytes: int) -> list[dict[str, Any]]:
    """One core. Share = (bytes read / time) / (bytes read and written / time of a copy of the same tensor)."""
    torch.set_num_threads(1)
    table = []
    for length in (1_000, 10_000, 100_000, 1_000_000):
        for dtype in (torch.float32, torch.bfloat16):
            g = torch.randn(max(1, megabytes * 1_000_000 // (length * dtype.itemsize)), length).to(dtype)
            to = torch.empty_like(g)
            runs = {"copy": lambda g=g, to=to: to.copy_(g)}
            for p in (1, 2, 3, 4, math.inf):
                runs[f"ours {p}"] = lambda g=g, p=p: functional.dual_norm([g], p, 1)
            times = interleaved(runs, rounds)
            # PyTorch's are up to 25 times slower: fewer rounds, beside a copy of their own.
            slow = {"copy": runs["copy"]}
            for p in (1, 2, 3, 4, math.inf):
                slow[f"torch {p}"] = lambda g=g, p=p: compositions.vector_norms([g], p)
            slow_times = interleaved(slow, max(3, rounds // 4), warmup=1)
            size = g.numel() * g.element_size()
            for p in (1, 2, 3, 4, math.inf):
                table.append(
                    {
                        "length": length,
                        "dtype": str(dtype).removeprefix("torch."),
                        "p": "inf" if math.isinf(p) else p,
                        "copy_GB_per_s": 2 * size / times["copy"] / 1e9,
                        "GB_per_s": size / times[f"ours {p}"] / 1e9,
                        "share": times["copy"] / (2 * times[f"ours {p}"]),
                        "torch_share": slow_times["copy"] / (2 * slow_times[f"torch {p}"]),
                    }
                )
                print(table[-1], flush=True)
    return table


def competitors(rounds: int, shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Forward + backward against F.cross_entropy's and against the eager composition."""
    table = []
    for threads, dtype in ((1, torch.float32), (2, torch.float32), (2, torch.bfloat16)):
        torch.set_num_threads(threads)
        for n, classes in shapes:
            logits = torch.randn(n, classes).to(dtype).requires_grad_()
            target = torch.randint(0, classes, (n,))
            runs = {"cross_entropy": step("cross_entropy", logits, target, 0)}
            for k in (1, 5):
                runs[f"ours {k}"] = step("ours", logits, target, k)
                runs[f"eager {k}"] = step("eager", logits, target, k)
            times = interleaved(runs, rounds, warmup=1)
            for k in (1, 5):
                table.append(
                    {
                        "n": n,
                        "classes": classes,
                        "k": k,
                        "dtype": str(dtype).removeprefix("torch."),
                        "threads": threads,
                        "milliseconds": times[f"ours {k}"] * 1e3,
                        "to_cross_entropy": times[f"ours {k}"] / times["cross_entropy"],
                        "to_eager": times[f"ours {k}"] / times[f"eager {k}"],
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
    arguments = parser.parse_args()
    quick = arguments.quick
    result = {
        "environment": environment(),
        "dual_norm": dual_norm(3 if quick else 25, 4 if quick else 64),
        "competitors": competitors(3 if quick else 15, [(256, 256)] if quick else SHAPES),
        "overhead_microseconds": overhead(5 if quick else 50),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()

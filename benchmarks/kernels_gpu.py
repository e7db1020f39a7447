"""The ops on a GPU: time, share of the copy bandwidth, ratio to eager and compiled PyTorch, interleaved in one run.

python benchmarks/kernels_gpu.py --out benchmarks/results/kernels_gpu.json

--compiled adds torch.compile of the eager compositions.

Every case rotates among as many input sets as fill four times the L2 cache, so that nothing is found there. The copy
that a share refers to reads and writes 1 GB in the same run. Floors in bytes, of size N C or N D only:

    dual_norm       one read of the gradients
    competitors     forward reads the logits, backward reads them and writes dlogits
    one_to_n        as competitors
    row_distance    one read of the k + 1 rows of each sample
    deepfool_step   one read of the gradients, one more of the chosen one, one write of the step

--device cpu --quick runs every case in small on the CPU: it shows that this file works, and its figures mean nothing.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import compositions
import torch
from timing import environment
from torch import Tensor
from torch.nn.functional import cross_entropy

from margin_kernels import backends, functional
from margin_kernels.timing import interleaved

Call = Callable[[], Any]
NORMS = (1, 2, 3, math.inf)


class Bench:
    """Where and how long to measure, and the rows that came out."""

    def __init__(self, device: str, quick: bool, compiled: bool = False) -> None:
        self.device, self.quick, self.compiled = device, quick, compiled
        self.rounds, self.inner = (2, 1) if quick else (11, 5)
        self.rows: list[dict[str, Any]] = []
        cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 1_000_000
        self.cold_bytes = 4 * cache
        self.copy_bandwidth = self._copy_bandwidth()

    def _copy_bandwidth(self) -> float:
        """Bytes read and written per second by a copy of 1 GB."""
        source = torch.randn(1_000_000 if self.quick else 250_000_000)
        to = torch.empty_like(source)
        seconds = interleaved({"copy": lambda: to.copy_(source)}, self.rounds, self.inner, 2, self.device)["copy"]
        return 2 * source.numel() * 4 / seconds

    def backends(self, op: str) -> list[str]:
        """The compiled ones that run here; on the CPU what "auto" takes, to show that the file works."""
        if self.device == "cpu":
            return ["cpu"]
        return [name for name in ("cuda", "triton") if backends.why_not(name, op, (torch.zeros(1, 2),)) is None]

    def rotate(self, make: Callable[[], Call], size: int) -> Call:
        """A call that goes round sets of inputs of `size` bytes each, four times the cache in all."""
        calls = [make() for _ in range(1 if self.quick else max(1, math.ceil(self.cold_bytes / size)))]
        turn = -1

        def call() -> Any:
            nonlocal turn
            turn = (turn + 1) % len(calls)
            return calls[turn]()

        return call

    def measure(self, case: dict[str, Any], calls: dict[str, Call], floor_bytes: int | None, inner: int = 0) -> None:
        """One row per call: microseconds, share of the copy bandwidth at `floor_bytes`, ratio to every baseline."""
        times = interleaved(calls, self.rounds, inner or self.inner, 3, self.device)
        ours = ("cuda", "triton", "cpu")
        baselines = [name for name in calls if not name.startswith(ours)]
        for name, seconds in times.items():
            row: dict[str, Any] = {**case, "what": name, "microseconds": seconds * 1e6}
            if floor_bytes is not None:
                row["share_of_copy"] = floor_bytes / seconds / self.copy_bandwidth
            if name.startswith(ours):
                row.update({f"to_{baseline}": seconds / times[baseline] for baseline in baselines})
            self.rows.append(row)
            print(
                {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}, flush=True
            )

    def free(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()


def forward_backward(loss: Callable[[Tensor], Tensor], make: Callable[[], Tensor]) -> Callable[[], Call]:
    """Makes calls that run loss(x) forward and backward on an x of their own, whose gradient stays until the next."""

    def new() -> Call:
        x = make().requires_grad_()

        def call() -> None:
            x.grad = None
            loss(x).backward()

        return call

    return new


def replayed(call: Call, device: str) -> Call:
    """The call as a captured CUDA graph: what the device takes, without the host. On the CPU the call itself."""
    if device == "cpu":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def launches(call: Call, device: str) -> int | None:
    """Kernels that one call starts."""
    if device == "cpu":
        return None
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as run:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.profiler.DeviceType.CUDA for event in run.events())


def dual_norm(bench: Bench) -> None:
    total = 100_000 if bench.quick else 256_000_000
    for length in (1_000, 10_000, 100_000, 1_000_000):
        for dtype in (torch.float32, torch.bfloat16):
            g = torch.randn(max(1, total // length), length).to(dtype)
            size = g.numel() * g.element_size()
            for p in NORMS:
                calls: dict[str, Call] = {}
                for name in bench.backends("dual_norm"):
                    calls[name] = lambda g=g, p=p, name=name: functional.dual_norm([g], p, 1, backend=name)
                calls["eager"] = lambda g=g, p=p: compositions.vector_norms([g], p)
                if length in (1_000, 1_000_000) and bench.compiled:
                    torch._dynamo.reset()
                    compiled = torch.compile(compositions.vector_norms, dynamic=False)
                    calls["compiled"] = lambda g=g, p=p, compiled=compiled: compiled([g], p)
                bench.measure({"op": "dual_norm", "length": length, "dtype": _name(dtype), "p": _p(p)}, calls, size)
            del g, calls
            bench.free()


def dual_norm_layers(bench: Bench) -> None:
    """All taps of a network at once, k = 9: as MarginTask measures them after stacking, and their backward."""
    shapes = [(784,), (64, 12, 12), (128, 6, 6), (1024,), (1024,)]
    n = 4 if bench.quick else 128
    layers = [torch.randn(n, 9, *shape) for shape in shapes]
    size = sum(g.numel() * 4 for g in layers)
    calls: dict[str, Call] = {}
    for name in bench.backends("dual_norm"):
        calls[name] = lambda name=name: functional.dual_norm(layers, 2, backend=name)
    calls["eager"] = lambda: compositions.vector_norms([g.flatten(0, 1) for g in layers], 2)
    bench.measure({"op": "dual_norm", "layers": len(shapes), "k": 9, "n": n}, calls, size)
    for g in layers:
        g.requires_grad_()
    for name in bench.backends("dual_norm"):
        norms = functional.dual_norm(layers, 2, backend=name)
        ones = torch.ones_like(norms)
        calls[name] = lambda norms=norms, ones=ones: torch.autograd.grad(norms, layers, ones, retain_graph=True)
    eager = compositions.vector_norms([g.flatten(0, 1) for g in layers], 2)
    calls["eager"] = lambda: torch.autograd.grad(eager, layers, torch.ones_like(eager), retain_graph=True)
    bench.measure({"op": "dual_norm_backward", "layers": len(shapes), "k": 9, "n": n}, calls, 2 * size)
    bench.free()


def competitors(bench: Bench) -> None:
    shapes = [(65536, 10), (32768, 256), (8192, 1000), (8192, 32000), (4096, 128256)]
    if bench.quick:
        shapes = [(64, 10), (32, 1000)]
    for n, classes in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            target = torch.randint(0, classes, (n,))

            def make(n: int = n, classes: int = classes, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(n, classes).to(dtype)

            size = n * classes * dtype.itemsize
            for k in (1, 5):

                def eager(z: Tensor, target: Tensor = target, k: int = k) -> Tensor:
                    _, gap, loss = compositions.masked_topk(z, target, k)
                    return loss + gap.float().mean()

                losses: dict[str, Callable[[Tensor], Tensor]] = {}
                for name in bench.backends("competitors"):

                    def ours(z: Tensor, target: Tensor = target, k: int = k, name: str = name) -> Tensor:
                        result = functional.competitors(z, target, k, backend=name)
                        return result.nll.mean() + result.gap.mean()

                    losses[name] = ours
                losses["cross_entropy"] = lambda z, target=target: cross_entropy(z, target)
                losses["eager"] = eager
                if bench.compiled:
                    torch._dynamo.reset()
                    losses["compiled"] = torch.compile(eager, dynamic=False)
                calls = {name: bench.rotate(forward_backward(loss, make), 2 * size) for name, loss in losses.items()}
                case = {"op": "competitors", "n": n, "classes": classes, "dtype": _name(dtype), "k": k}
                bench.measure(case, calls, 3 * size)
                del calls, losses
                bench.free()


def margin_hinge(bench: Bench) -> None:
    """Small: microseconds with the host, microseconds of a replayed graph, launches forward and backward."""
    gap, norm = -torch.rand(128, 9), 0.5 + torch.rand(128, 9, 6)
    gamma = torch.ones(6)
    names = [*bench.backends("margin_hinge"), "reference"]
    forward: dict[str, Call] = {}
    both: dict[str, Call] = {}
    for name in names:
        leaf = gap.clone().requires_grad_()

        def run(leaf: Tensor = leaf, name: str = name) -> Tensor:
            return functional.margin_hinge(leaf, norm, gamma, reduction="none", backend=name)

        ones = torch.ones(128)
        forward[name] = run
        both[name] = lambda run=run, leaf=leaf, ones=ones: torch.autograd.grad(run(), leaf, ones)
    case: dict[str, Any] = {"op": "margin_hinge", "n": 128, "k": 9, "layers": 6}
    inner = 2 if bench.quick else 100
    bench.measure({**case, "part": "forward"}, forward, None, inner)
    bench.measure({**case, "part": "forward + backward"}, both, None, inner)
    bench.measure(
        {**case, "part": "forward + backward, replayed"},
        {name: replayed(call, bench.device) for name, call in both.items()},
        None,
        inner,
    )
    for name in names:
        bench.rows.append(
            {**case, "what": name, "launches_forward": launches(forward[name], bench.device),
             "launches_forward_backward": launches(both[name], bench.device)}
        )  # fmt: skip
        print(bench.rows[-1], flush=True)


def one_to_n(bench: Bench) -> None:
    for n, classes in [(64, 10)] if bench.quick else [(512, 1000), (4096, 1000), (4096, 32000)]:
        for dtype in (torch.float32, torch.bfloat16):
            target = torch.randint(0, classes, (n,))

            def make(n: int = n, classes: int = classes, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(n, classes).to(dtype)

            losses: dict[str, Callable[[Tensor], Tensor]] = {}
            for name in [*bench.backends("one_to_n"), "reference"]:
                losses[name] = lambda z, target=target, name=name: functional.one_to_n(z, target, backend=name)
            losses["cross_entropy"] = lambda z, target=target: cross_entropy(z, target)
            size = n * classes * dtype.itemsize
            calls = {name: bench.rotate(forward_backward(loss, make), 2 * size) for name, loss in losses.items()}
            bench.measure({"op": "one_to_n", "n": n, "classes": classes, "dtype": _name(dtype)}, calls, 3 * size)
            bench.free()


def row_distance(bench: Bench) -> None:
    shapes = [(100, 16, 8, 3)] if bench.quick else [(100_000, 512, 256, 5), (100_000, 4096, 2048, 9)]
    for classes, features, n, k in shapes:
        rows = torch.randn(classes, features)
        target, index = torch.randint(0, classes, (n,)), torch.randint(0, classes, (n, k))
        for p in NORMS:
            calls: dict[str, Call] = {}
            for name in bench.backends("row_distance"):
                calls[name] = partial(functional.row_distance, rows, index, target, p, backend=name)
            calls["eager"] = partial(compositions.row_differences, rows, index, target, p)
            case = {"op": "row_distance", "classes": classes, "features": features, "n": n, "k": k, "p": _p(p)}
            bench.measure(case, calls, n * (k + 1) * features * 4)
        bench.free()


def deepfool_step(bench: Bench) -> None:
    n, k, pixels = (4, 3, 50) if bench.quick else (128, 9, 3 * 224 * 224)
    gap, gradients = -torch.rand(n, k), torch.randn(n, k, pixels)
    for p in (1, 2, math.inf):
        calls: dict[str, Call] = {}
        for name in [*bench.backends("deepfool_step"), "reference"]:
            calls[name] = lambda p=p, name=name: functional.deepfool_step(gap, gradients, None, p, backend=name)
        bench.measure(
            {"op": "deepfool_step", "n": n, "k": k, "elements": pixels, "p": _p(p)}, calls, n * (k + 2) * pixels * 4
        )
    bench.free()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _p(p: float) -> float | str:
    return "inf" if math.isinf(p) else p


# What is cheap comes first: a run that is stopped has most of the ops.
CASES = (margin_hinge, dual_norm_layers, deepfool_step, one_to_n, row_distance, competitors, dual_norm)


def write(path: Path, bench: Bench, failures: dict[str, str]) -> None:
    result = {
        "environment": environment(),
        "copy_GB_per_s": bench.copy_bandwidth / 1e9,
        "failures": failures,
        "rows": bench.rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def run(bench: Bench, path: Path, cases: Iterable[Callable[[Bench], None]]) -> int:
    """Every case; what fails is recorded and does not stop the others, and all is written after each case."""
    failures: dict[str, str] = {}
    for case in cases:
        try:
            case(bench)
        except Exception as error:
            failures[case.__name__] = f"{type(error).__name__}: {error}"
            print(f"{case.__name__} FAILED: {failures[case.__name__]}", flush=True)
        write(path, bench, failures)
    print(f"wrote {path}")
    return 1 if failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: shows that it runs")
    parser.add_argument("--compiled", action="store_true", help="also beside torch.compile, which takes minutes")
    parser.add_argument("--only", nargs="+", choices=[case.__name__ for case in CASES])
    arguments = parser.parse_args()
    torch.set_default_device(arguments.device)
    bench = Bench(arguments.device, arguments.quick, arguments.compiled)
    print(f"copy: {bench.copy_bandwidth / 1e9:.0f} GB/s", flush=True)
    chosen = [case for case in CASES if not arguments.only or case.__name__ in arguments.only]
    return run(bench, arguments.out, chosen)


if __name__ == "__main__":
    raise SystemExit(main())

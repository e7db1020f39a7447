"""The same training steps with two checkouts, in one run: what a change costs.

    python benchmarks/compare.py --before ../before --networks mnist_cnn mlp800 --out build/compare.json

Each checkout, with its extension built, runs in a process of its own. A round is a step of cross-entropy and one of the
large margin loss (k = 1, no cross-entropy, passes="auto") in one process, then in the other; the order alternates.
before, after  median of (milliseconds of the margin's step / those of cross-entropy's in the same round)
ratio          median over the rounds of (ratio after / ratio before)
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


def serve(name: str, taps: str, threads: int) -> None:
    """Answers each line of the input with the milliseconds of both steps."""
    import torch
    from networks import NETWORKS
    from torch.nn.functional import cross_entropy

    from margin_kernels import LargeMarginLoss, MarginTask
    from margin_kernels.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    network = NETWORKS[name]
    model = network.build()
    x, y = torch.rand(network.cpu_batch, *network.shape), torch.randint(network.classes, (network.cpu_batch,))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    task = MarginTask(
        model, LargeMarginLoss(gamma=1.0, top_k=1), (*(["input"] if taps == "input" else []), *network.hidden)
    )

    def step(loss: Any) -> float:
        start = time.perf_counter()
        loss().backward()
        optimiser.step()
        optimiser.zero_grad()
        return 1000 * (time.perf_counter() - start)

    for _ in sys.stdin:
        pair = step(lambda: cross_entropy(model(x), y)), step(lambda: task(x, y)["loss"])
        print(json.dumps(pair), flush=True)


def ask(worker: subprocess.Popen[str]) -> tuple[float, float]:
    assert worker.stdin is not None and worker.stdout is not None
    time.sleep(0.02)  # threads of the other process still wait for work, and keep a core busy with it
    worker.stdin.write("\n")
    worker.stdin.flush()
    return tuple(json.loads(worker.stdout.readline()))


def start(tree: Path, name: str, taps: str, threads: int) -> subprocess.Popen[str]:
    path = os.pathsep.join((str(tree), str(tree / "benchmarks")))
    command = [sys.executable, "-P", __file__, "--serve", name, "--taps", taps, "--threads", str(threads)]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def compare(trees: list[Path], name: str, taps: str, threads: int, rounds: int) -> dict[str, Any]:
    workers = [start(tree, name, taps, threads) for tree in trees]
    for worker in workers:  # allocations, the optimiser's buffers, what is captured once
        for _ in range(3):
            ask(worker)
    times: list[list[tuple[float, float]]] = [[] for _ in workers]
    for turn in range(rounds):
        for place in range(len(workers)):
            which = (place + turn) % len(workers)
            times[which].append(ask(workers[which]))
    for worker in workers:
        worker.communicate()
    ratios = [[margin / cross_entropy for cross_entropy, margin in of_tree] for of_tree in times]
    middle = [statistics.median(of_tree) for of_tree in ratios]
    cell: dict[str, Any] = {
        "network": name,
        "taps": "hidden" if taps == "hidden" else "input + hidden",
        "threads": threads,
        "cross_entropy_milliseconds": statistics.median(pair[0] for pair in times[-1]),
        "before": middle[0],
        "after": middle[-1],
        "ratio": statistics.median(after / before for before, after in zip(ratios[0], ratios[-1], strict=True)),
    }
    print(
        "{network}, {taps}, {threads} threads: {before:.3f} -> {after:.3f} of cross-entropy, {ratio:.3f}".format(
            **cell
        ),
        flush=True,
    )
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the other checkout; without it this one alone is measured")
    parser.add_argument("--networks", nargs="+", default=["mnist_cnn", "mlp800"])
    parser.add_argument("--taps", nargs="+", choices=["hidden", "input"], default=["hidden", "input"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", metavar="NETWORK", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.taps[0], options.threads[0])
        return
    from timing import environment

    trees = [path.resolve() for path in (options.before, HERE) if path is not None]
    cells = [
        compare(trees, name, taps, threads, options.rounds)
        for name in options.networks
        for taps in options.taps
        for threads in options.threads
    ]
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"environment": environment(), "rounds": options.rounds, "steps": cells}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()

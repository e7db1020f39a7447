"""What MarginMonitor costs: a cross-entropy step with it beside one without, in turn.

step     forward, cross-entropy, backward, SGD with momentum on one fixed batch; learning rate 0; a network of each kind
ratio    median over the rounds of (step with the monitor) / (the plain step beside it); they change places every round
plain    the same ratio of two plain networks: what the machine's noise makes of 1

python benchmarks/monitor.py --out benchmarks/results/monitor_cpu.json
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS, Network
from timing import environment
from torch import nn
from torch.nn import functional as F

import margin_kernels as mk

STAGES = ("maxpool", "stage1_2", "stage2_3", "stage3_5", "stage4_2")  # the five stage outputs of ResNet-50
ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("mnist_cnn", "hidden", NETWORKS["mnist_cnn"].hidden),
    ("mnist_cnn", "input", ("input",)),
    ("mlp800", "hidden", NETWORKS["mlp800"].hidden),
    ("resnet50_bn", "five stage outputs", STAGES),
    ("resnet50_gn", "five stage outputs", STAGES),
    ("vit_b16", "twelve blocks", NETWORKS["vit_b16"].hidden),
)


class Steps:
    """Cross-entropy steps of one network on one batch, with a monitor where layers are given."""

    def __init__(self, network: Network, batch: int, layers: Sequence[str] = ()) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = network.build()
        self.x, self.y = torch.rand(batch, *network.shape), torch.randint(network.classes, (batch,))
        self.optimiser = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)
        self.monitor = mk.MarginMonitor(self.model, layers).attach() if layers else None

    def seconds(self) -> float:
        start = time.perf_counter()
        F.cross_entropy(self.model(self.x), self.y).backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return time.perf_counter() - start


def ratio(first: Callable[[], float], second: Callable[[], float], rounds: int) -> float:
    """Median of first / second over rounds in which each comes first in turn."""
    found = []
    for number in range(rounds):
        pair = (first(), second()) if number % 2 else (second(), first())[::-1]
        found.append(pair[0] / pair[1])
    return statistics.median(found)


def measure(name: str, taps: str, layers: Sequence[str], threads: int, rounds: int, batch: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    plain, other = (Steps(NETWORKS[name], batch) for _ in range(2))
    watched = Steps(NETWORKS[name], batch, layers)
    for _ in range(3):
        plain.seconds(), other.seconds(), watched.seconds()
    assert watched.monitor is not None and watched.monitor.distances().isfinite().any()
    return {
        "network": name,
        "taps": taps,
        "layers": len(watched.monitor.layers),
        "batch": batch,
        "threads": threads,
        "ratio": ratio(watched.seconds, plain.seconds, rounds),
        "plain": ratio(other.seconds, plain.seconds, rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--networks", nargs="+", default=sorted({row[0] for row in ROWS}))
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--quick", action="store_true", help="a small batch and few rounds: shows that it runs")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="batch norm in training mode")
    mk.keep_freed_memory()
    rounds = 2 if arguments.quick else arguments.rounds
    rows = []
    for name, taps, layers in (row for row in ROWS if row[0] in arguments.networks):
        batch = NETWORKS[name].cpu_batch
        for threads in arguments.threads:
            rows.append(measure(name, taps, layers, threads, rounds, max(2, batch // 8) if arguments.quick else batch))
            print(rows[-1], flush=True)
            result = {"environment": environment(), "rounds": rounds, "monitor": rows}
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

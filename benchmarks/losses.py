"""Training steps of every loss, in time and peak memory, as ratios to cross-entropy on the same network and batch.

step      forward, loss, backward, SGD with momentum and weight decay; batch 100; networks of [A] and [M]
weights   of a short training with cross-entropy on scikit-learn's digits, enlarged to 28 x 28: what DeepFool costs
          depends on where the samples lie, and in a fresh network none lies anywhere
passes    forward passes F by FLOPs, cross-entropy 3F; DeepFool as often as its iterations ask

python benchmarks/losses.py --out benchmarks/results/losses_cpu.json
"""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import environment
from torch import Tensor, nn
from torch.nn import functional as F

import margin_kernels as mk
from margin_kernels.experiments import data, models
from margin_kernels.timing import interleaved, peak_bytes

try:
    import sklearn.datasets  # noqa: F401
except ImportError:
    WITH_DIGITS = False
else:
    WITH_DIGITS = True
NETWORKS = ("mlp800", "mlp1000", "lenet", "lenet5")
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "large margin, k = 1": lambda: mk.LargeMarginLoss(cross_entropy_weight=1.0),
    "large margin, k = 1, second order": lambda: mk.LargeMarginLoss(second_order=True, cross_entropy_weight=1.0),
    "large margin, k = 1, pairwise": lambda: mk.LargeMarginLoss(cross_entropy_weight=1.0, auxiliary="pairwise"),
    "large margin, k = 1, second order, pairwise": lambda: mk.LargeMarginLoss(
        second_order=True, cross_entropy_weight=1.0, auxiliary="pairwise"
    ),
    "sensitivity l2, 1 candidate": lambda: mk.MarginSensitivityLoss(top_k=1),
    "sensitivity l2, all classes": lambda: mk.MarginSensitivityLoss(),
    "sensitivity l1, all classes": lambda: mk.MarginSensitivityLoss(0.01, "inf", 1),
    "adversarial MIN, envelope": lambda: mk.AdversarialMarginLoss(gradient="envelope"),
    "adversarial MIN, first order": lambda: mk.AdversarialMarginLoss(gradient="first_order"),
    "adversarial MIN, unrolled": lambda: mk.AdversarialMarginLoss(),
    "adversarial MIN, envelope, 3 candidates": lambda: mk.AdversarialMarginLoss(gradient="envelope", top_k=2),
    "adversarial MIN, unrolled, 3 candidates": lambda: mk.AdversarialMarginLoss(top_k=2),
    "adversarial AVG, envelope": lambda: mk.AdversarialMarginLoss(aggregation="avg", gradient="envelope"),
    "adversarial AVG, unrolled": lambda: mk.AdversarialMarginLoss(aggregation="avg"),
    "1-to-N": lambda: mk.OneToNLoss(),
    "1-to-N + cross-entropy": lambda: mk.OneToNLoss(cross_entropy=True),
}


def prototypes(count: int) -> tuple[Tensor, Tensor]:
    """Ten drawn 8 x 8 images with noise, where scikit-learn is not installed: [count, 1, 8, 8], [count]."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(10, 1, 8, 8, generator=generator), torch.arange(count) % 10
    return (images[labels] + 0.2 * torch.randn(count, 1, 8, 8, generator=generator)).clamp(0, 1), labels


def digits(count: int) -> tuple[Tensor, Tensor]:
    """`count` training digits enlarged to [count, 1, 28, 28], and their labels."""
    device = torch.get_default_device()
    with torch.device("cpu"):
        x, y = data.load("digits").train.batch(torch.arange(count)) if WITH_DIGITS else prototypes(count)
    images = F.interpolate(x.to(device), size=(28, 28), mode="bilinear")
    # The strides of image files: those of interpolate are channels-last, which a single channel hides.
    return torch.empty(images.shape, device=device).copy_(images), y.to(device)


def trained(name: str, batch: int, steps: int) -> nn.Module:
    """The network after `steps` steps of cross-entropy."""
    torch.manual_seed(0)
    model = models.build(name, (1, 28, 28), 10)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = digits(10 * batch)
    for i in range(steps):
        part = slice(i % 10 * batch, (i % 10 + 1) * batch)
        optimiser.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimiser.step()
    return model


def step(model: nn.Module, batch: int, loss: nn.Module | None) -> Callable[[], None]:
    """A training step on one fixed batch that hardly moves the weights; cross-entropy for None."""
    model = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, weight_decay=1e-4)
    x, y = digits(batch)
    task = None if loss is None else mk.MarginTask(model, loss)

    def run() -> None:
        optimiser.zero_grad()
        value = F.cross_entropy(model(x), y) if task is None else task(x, y)["loss"]
        value.backward()
        optimiser.step()

    return run


def measure(network: str, batch: int, rounds: int, steps: int, threads: list[int]) -> list[dict[str, Any]]:
    model = trained(network, batch, steps)
    runs = {"cross-entropy": step(model, batch, None)}
    runs |= {name: step(model, batch, make()) for name, make in LOSSES.items()}
    for run in runs.values():
        run()
    peaks = {name: peak_bytes(run) for name, run in runs.items()}
    rows = []
    device = torch.get_default_device().type
    for count in threads:
        torch.set_num_threads(count)
        times = interleaved(runs, rounds, warmup=1, inner=5 if device == "cuda" else 1, device=device)
        for name in runs:
            rows.append(
                {
                    "network": network,
                    "loss": name,
                    "threads": count,
                    "milliseconds": times[name] * 1e3,
                    "time_to_cross_entropy": times[name] / times["cross-entropy"],
                    "peak_bytes": peaks[name],
                    "memory_to_cross_entropy": peaks[name] / peaks["cross-entropy"],
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="a small batch and few rounds: shows that it runs")
    arguments = parser.parse_args()
    batch, rounds, steps = (10, 3, 5) if arguments.quick else (100, 11, 300)
    torch.set_default_device(arguments.device)
    images = "digits" if WITH_DIGITS else "prototypes"
    result: dict[str, Any] = {"environment": environment(), "batch": batch, "images": images, "steps": []}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for network in arguments.networks:
        result["steps"] += measure(network, batch, rounds, steps, arguments.threads)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")  # as far as it has come
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()

"""The table of several processes: losses and strategies, and what one process makes of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import margin_kernels as mk

ROWS, WIDTH, CLASSES, LAYERS = 12, 6, 5, ("input", "blocks.0", "blocks.1", "output")


class Block(nn.Module):
    def __init__(self, smooth: bool, recomputed: bool) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 7), nn.Linear(7, WIDTH)
        self.between: nn.Module = nn.Tanh() if smooth else nn.ReLU()
        self.recomputed = recomputed

    def branch(self, x: Tensor) -> Tensor:
        return self.outer(self.between(self.inner(x)))

    def forward(self, x: Tensor) -> Tensor:
        return x + (checkpoint(self.branch, x, use_reentrant=False) if self.recomputed else self.branch(x))


class Net(nn.Module):
    """Stem, residual blocks and head; with `smooth` second derivatives are not 0."""

    def __init__(self, smooth: bool = False, recomputed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block(smooth, recomputed) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (ROWS,), generator=generator)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def losses(group: str | None = None) -> dict[str, tuple[nn.Module, dict[str, Any]]]:
    """Name of a row -> its loss and the options of MarginTask. group: the process_group of losses that are exact for
    equal parts without one."""
    large = mk.LargeMarginLoss
    taps = {"layers": LAYERS}
    loop = {**taps, "passes": "loop"}
    world = {"process_group": group}
    shared = {"cross_entropy_weight": 1.0, "process_group": "world"}
    entropy = {"cross_entropy_weight": 1.0, **world}
    return {
        "hard": (large([3.0, 2.0, 2.0, 4.0], **world), taps),
        "hard, loop": (large([3.0, 2.0, 2.0, 4.0], **world), loop),
        "hard, split": (large([3.0, 2.0, 2.0, 4.0], top_k=2, **world), {**taps, "passes": "split"}),
        "hard and cross-entropy": (large(4.0, **entropy), taps),
        "all competitors": (large(4.0, top_k=CLASSES - 1, aggregation="sum", **world), taps),
        "probability": (large(9.0, space="probability", **world), taps),
        "soft": (large(4.0, competitors="soft", **entropy), taps),
        "weighed classes": (large(4.0, competitors="soft", class_weight=[1, 2, 3, 1, 0.5], **shared), taps),
        "ignored rows": (large(4.0, ignore_index=2, **shared), taps),
        "auto": (large("auto", warmup=1, **entropy), taps),
        "second order": (large(4.0, second_order=True, **world), taps),
        "second order, loop": (large(4.0, second_order=True, **entropy), loop),
        "second order, soft": (large(4.0, second_order=True, competitors="soft", **entropy), taps),
        "sensitivity": (mk.MarginSensitivityLoss(0.5, **world), {}),
        "sensitivity, tangent": (mk.MarginSensitivityLoss(0.5, top_k=1, **world), {}),
        "adversarial, avg": (mk.AdversarialMarginLoss(2.0, aggregation="avg", **world), {}),
        "adversarial, min": (mk.AdversarialMarginLoss(2.0, process_group="world"), {}),
        "adversarial, envelope": (mk.AdversarialMarginLoss(2.0, gradient="envelope", process_group="world"), {}),
        "adversarial, first order": (mk.AdversarialMarginLoss(2.0, gradient="first_order", process_group="world"), {}),
        "1-to-N": (mk.OneToNLoss(0.5, cross_entropy=True, process_group="world"), {}),
        "1-to-N, positive": (mk.OneToNLoss(0.5, bound="positive", process_group="world"), {}),
    }


# Which strategy "auto" takes in these networks.
TAKEN = {
    "hard": "split",
    "hard and cross-entropy": "loop",
    "all competitors": "loop",
    "soft": "split",
    "second order": "tangent",
    "sensitivity, tangent": "tangent",
}


def smooth(name: str) -> bool:
    """Whether a row has a network with second derivatives, which no tangent follows."""
    return name in ("second order, loop", "second order, soft", "sensitivity", "probability", "adversarial, avg")


def task_of(name: str, group: str | None = None, recomputed: bool = False) -> mk.MarginTask:
    loss, options = losses(group)[name]
    return mk.MarginTask(Net(smooth(name), recomputed), loss, **options)


def parts(counts: Sequence[int], rank: int) -> slice:
    """The rows of one process where each has so many."""
    return slice(sum(counts[:rank]), sum(counts[: rank + 1]))


def steps(
    task: nn.Module, rows: slice, count: int = 3, before: Callable[[nn.Module], Any] | None = None
) -> tuple[list[Tensor], list[float]]:
    """The parameters after steps of SGD on a part of the batch, and the losses; `before` each step of the optimizer."""
    x, y = batch()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.05, momentum=0.9)
    values = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = task(x[rows], y[rows])["loss"]
        loss.backward()
        if before is not None:
            before(task)
        optimizer.step()
        values.append(loss.item())
    return [whole(parameter).detach().clone() for parameter in task.parameters()], values


def expected(name: str, **options: Any) -> tuple[list[Tensor], list[float]]:
    """What one process makes of the whole batch."""
    return steps(task_of(name), slice(None), **options)


def compare(found: list[Any], wanted: tuple[list[Tensor], list[float]], tolerance: float = 1e-12) -> None:
    """Every process has the parameters of the one process, and the mean of the losses is its loss."""
    for parameters, _ in found:
        for a, b in zip(parameters, wanted[0], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)
    mean = torch.tensor([values for _, values in found], dtype=torch.float64).mean(0)
    target = torch.tensor(wanted[1], dtype=torch.float64)
    torch.testing.assert_close(mean, target, rtol=tolerance, atol=tolerance)

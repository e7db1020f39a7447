"""The table of several processes: losses by ways to train them, each cell exact or refused.

A cell is exact where the parameters after three steps of SGD with momentum, and the losses, are those of one process
that has the whole batch, in float64 to 1e-12. tests/distributed/test_*_table.py run every cell; docs/processes.md shows
them.

    PYTHONPATH=tests python -m support.many_processes     writes the table into docs/processes.md
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import margin_kernels as mk
from margin_kernels.distributed import fully_shard_task

from .processes import NIGHTLY

DOCS = Path(__file__).parents[2] / "docs" / "processes.md"
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


def optimizer_of(task: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(task.parameters(), lr=0.05, momentum=0.9)


def steps(
    task: nn.Module,
    *rows: slice | Tensor,
    before: Callable[[nn.Module], Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[list[Tensor], list[float]]:
    """The parameters after three steps of SGD on a part of the batch, or on several whose gradients are added, and the
    losses; `before` each step of the optimizer."""
    x, y = batch()
    optimizer = optimizer or optimizer_of(task)
    values = []
    for _ in range(3):
        optimizer.zero_grad()
        value = 0.0
        for number, part in enumerate(rows):
            last = number == len(rows) - 1
            if hasattr(task, "set_requires_gradient_sync"):
                task.set_requires_gradient_sync(last)
            with nullcontext() if last or not hasattr(task, "no_sync") else task.no_sync():
                loss = task(x[part], y[part])["loss"] / len(rows)
                loss.backward()
            value += loss.item()
        if before is not None:
            before(task)
        optimizer.step()
        values.append(value)
    task.state_dict()  # shards what a forward without backward has left gathered
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


@dataclass(frozen=True)
class Way:
    """A column of the table: how a task is trained on several processes.

    counts: the rows of the batch that each process has.  sharded: by fully_shard_task, else DistributedDataParallel.
    options: of either.  group: the process_group of losses that are exact for equal parts without one.
    compiled: by task.compile.  micro: steps of so many parts, whose gradients are added before they are exchanged.
    recomputed: with activation checkpointing.  mesh: of HSDP.
    """

    counts: tuple[int, ...] = (6, 6)
    sharded: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    compiled: bool = False
    micro: int = 1
    recomputed: bool = False
    mesh: tuple[int, int] | None = None


UNITS = {"units": ("blocks.*", "head")}
WAYS = {
    "DDP": Way(),
    "DDP, static graph": Way(options={"static_graph": True}),
    "DDP, no_sync": Way(micro=2),
    "DDP, unequal parts": Way((7, 4, 1), group="world"),
    "DDP, an empty part": Way((8, 0, 4), group="world"),
    "DDP, compiled": Way((8, 4), group="world", compiled=True),
    "FSDP2": Way(sharded=True, options=UNITS),
    "FSDP2, root alone": Way((4, 4, 4), sharded=True),
    "FSDP2, not resharded": Way(sharded=True, options={**UNITS, "reshard_after_forward": False}),
    "FSDP2, no sync": Way(sharded=True, options=UNITS, micro=2),
    "FSDP2, an empty part": Way((8, 0, 4), sharded=True, options=UNITS, group="world"),
    "FSDP2, checkpointing": Way(sharded=True, options=UNITS, recomputed=True),
    "HSDP": Way((3, 3, 3, 3), sharded=True, options=UNITS, mesh=(2, 2)),
}
EMPTY = 'passes="split" is not possible: the batch is empty'
FIXED = 'gamma="auto" must be fixed before a step is compiled where several processes train'
# Cells that are not exact -> the beginning of the error.
REFUSED = {
    ("hard, split", "DDP, an empty part"): EMPTY,
    ("hard, split", "FSDP2, an empty part"): EMPTY,
    ("auto", "DDP, compiled"): FIXED,
}
# Terms over a batch, which is here a part of one: what one process makes of the same parts in turn is compared.
OVER_THE_BATCH = ("weighed classes", "ignored rows", "auto", "adversarial, min", "adversarial, envelope",
                  "adversarial, first order", "1-to-N", "1-to-N, positive")  # fmt: skip


# What `make test` runs: all rows of these columns, and all columns of these rows.
COLUMNS = ("DDP, unequal parts", "FSDP2", "FSDP2, an empty part")
ROWS_OF_ALL = ("hard", "soft", "second order, loop", "sensitivity, tangent", "adversarial, min", "1-to-N")


def often(row: str, way: str) -> bool:
    """Whether a cell runs at every change; the others repeat it in another combination."""
    return way in COLUMNS or row in ROWS_OF_ALL or (row, way) in REFUSED


def cells() -> list[tuple[str, str]]:
    """Every row with every column."""
    return [(row, way) for row in losses() for way in WAYS]


def cells_of(sharded: bool) -> list[Any]:
    """The cells of the columns that are sharded, or those of the others, as parameters of a test; by the number of
    processes, which are started once for each."""
    own = [cell for cell in cells() if WAYS[cell[1]].sharded == sharded]
    own.sort(key=lambda cell: len(WAYS[cell[1]].counts))
    return [pytest.param(*cell, marks=() if often(*cell) else NIGHTLY) for cell in own]


def check_cell(processes: Callable[[int], Any], name: str, column: str) -> None:
    """Trains in the processes of the fixture of that name, and beside them in this one."""
    way = WAYS[column]
    group = processes(len(way.counts))
    if (name, column) in REFUSED:
        errors = [error for _, error in group.outcomes(train, name, column)]
        assert all(error is not None for error in errors)
        assert any(REFUSED[name, column] in error for error in errors if error is not None), errors
        return
    found = group.run(train, name, column)
    if way.micro > 1 and name in OVER_THE_BATCH:
        # The joint batch of a micro-step is that of all processes: rows 0 to 2 and 6 to 8, then the others.
        x = [torch.cat([torch.arange(12)[rows_of(rank, column)[i]] for rank in range(2)]) for i in range(way.micro)]
        compare(found, steps(task_of(name), *x))
        return
    compare(found, expected(name))


def train(rank: int, size: int, name: str, column: str) -> tuple[list[Tensor], list[float]]:
    way = WAYS[column]
    task = task_of(name, way.group, way.recomputed)
    if way.compiled:
        task.compile(backend="eager")
    options = dict(way.options)
    if way.mesh is not None:
        options["mesh"] = init_device_mesh("cpu", way.mesh, mesh_dim_names=("replicate", "shard"))
    wrapped = fully_shard_task(task, **options) if way.sharded else DistributedDataParallel(task, **options)
    return steps(wrapped, *rows_of(rank, column))


def rows_of(rank: int, column: str) -> list[slice]:
    """The parts of the batch that one process takes in turn."""
    way = WAYS[column]
    rows = parts(way.counts, rank)
    each = (rows.stop - rows.start) // way.micro
    return [slice(rows.start + i * each, rows.start + (i + 1) * each) for i in range(way.micro)]


def table() -> str:
    """The table as Markdown, with the errors below."""
    notes = list(dict.fromkeys(REFUSED.values()))
    lines = ["| loss | " + " | ".join(WAYS) + " |", "| --- " * (len(WAYS) + 1) + "|"]
    for row in losses():
        found = [
            f"refused ({notes.index(REFUSED[row, way]) + 1})" if (row, way) in REFUSED else "exact" for way in WAYS
        ]
        lines.append(f"| {row} | " + " | ".join(found) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def filled(page: str) -> str:
    """A page with the table in its place."""
    return re.sub(
        r"(<!-- table processes -->\n).*?(<!-- /table -->)",
        lambda m: f"{m[1]}\n{table()}\n\n{m[2]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    DOCS.write_text(filled(DOCS.read_text()))

"""Every cell of the table of losses and ways to train them on several processes: exact, or refused as it says."""

from __future__ import annotations

import pytest
import torch
from support.many_processes import (
    DOCS,
    OVER_THE_BATCH,
    REFUSED,
    WAYS,
    cells,
    compare,
    expected,
    filled,
    often,
    parts,
    steps,
    table,
    task_of,
)
from support.processes import NIGHTLY
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from margin_kernels.distributed import fully_shard_task

Found = tuple[list[Tensor], list[float]]


def train(rank: int, size: int, name: str, column: str) -> Found:
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


# By the number of processes, which are started once for each.
CELLS = sorted(cells(), key=lambda cell: len(WAYS[cell[1]].counts))


@pytest.mark.parametrize(
    ("name", "column"), [pytest.param(*cell, marks=() if often(*cell) else NIGHTLY) for cell in CELLS]
)
def test_a_cell(processes, name: str, column: str) -> None:
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


def test_the_page_shows_the_table() -> None:
    page = DOCS.read_text()
    assert filled(page) == page, "PYTHONPATH=tests python -m support.many_processes"
    assert table() in page

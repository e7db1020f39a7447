"""Checkpoints of sharded tasks, by torch.distributed.checkpoint: to any number of processes, with plain-model keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.many_processes import ROWS, Net, batch, optimizer_of, parts, task_of, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import margin_kernels as mk
from margin_kernels.distributed import fully_shard_task

UNITS = ("blocks.*", "head")
NAMES = ["soft", "second order, loop"]


def train(task: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, steps: int) -> None:
    x, y = batch()
    for _ in range(steps):
        optimizer.zero_grad()
        task(x[rows], y[rows])["loss"].backward()
        optimizer.step()


def state_of(task: mk.MarginTask, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": task.model.state_dict(), "optimizer": get_optimizer_state_dict(task.model, optimizer)}


def save(rank: int, size: int, name: str, folder: str) -> list[Tensor]:
    """Two steps, a checkpoint, two more; the parameters after these."""
    task = fully_shard_task(task_of(name), UNITS)
    optimizer, rows = optimizer_of(task), parts([ROWS // size] * size, rank)
    train(task, optimizer, rows, 2)
    dcp.save(state_of(task, optimizer), checkpoint_id=folder)
    train(task, optimizer, rows, 2)
    return [whole(parameter).detach().clone() for parameter in task.parameters()]


def resume(rank: int, size: int, name: str, folder: str) -> list[Tensor]:
    """Two steps from the checkpoint on."""
    task = task_of(name)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.zero_()
    fully_shard_task(task, UNITS)
    optimizer = optimizer_of(task)
    state = state_of(task, optimizer)
    dcp.load(state, checkpoint_id=folder)
    task.model.load_state_dict(state["model"])
    set_optimizer_state_dict(task.model, optimizer, state["optimizer"])
    train(task, optimizer, parts([ROWS // size] * size, rank), 2)
    return [whole(parameter).detach().clone() for parameter in task.parameters()]


@pytest.mark.parametrize("name", NAMES)
def test_saved_on_three_loaded_on_three_two_and_one(processes, tmp_path, name: str) -> None:
    folder = str(tmp_path / "checkpoint")
    saved = processes(3).run(save, name, folder)
    for size in (3, 2, 1):
        for found in processes(size).run(resume, name, folder):
            for a, b in zip(found, saved[0], strict=True):
                # Bit for bit on as many processes: others add up in another order.
                torch.testing.assert_close(a, b, rtol=0 if size == 3 else 1e-12, atol=0 if size == 3 else 1e-12)
    plain = Net(smooth=name != "soft")
    state = {"model": plain.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    plain.load_state_dict(state["model"])
    task = task_of(name)
    train(task, optimizer_of(task), slice(None), 2)
    for a, b in zip(plain.parameters(), task.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Nested(nn.Module):
    """Whose own names begin as those of a task do."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.head = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.model(x).relu())


@pytest.mark.parametrize("make", [Net, Nested])
def test_a_task_takes_the_checkpoint_of_a_plain_model_and_gives_one(make: type[nn.Module]) -> None:
    torch.manual_seed(5)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    loss = mk.LargeMarginLoss("auto", cross_entropy_weight=1.0)
    task = mk.MarginTask(make().to(next(model.parameters()).dtype), loss)
    assert task.load_state_dict(model.state_dict()).missing_keys == []
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), model.parameters(), strict=True))
    assert list(task.model.state_dict()) == list(model.state_dict())
    again = mk.MarginTask(make().to(next(model.parameters()).dtype), loss)
    again.load_state_dict(task.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*model\.head\.bias"):
        again.load_state_dict({name: value for name, value in model.state_dict().items() if name != "head.bias"})
    with pytest.raises(RuntimeError, match=r"(?s)Unexpected key.*nowhere"):
        again.load_state_dict({**model.state_dict(), "nowhere": torch.zeros(1)})

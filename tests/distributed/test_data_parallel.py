"""DistributedDataParallel(task) takes the same steps as one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.many_processes import ROWS, batch, compare, expected, losses, parts, steps, task_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import margin_kernels as mk

Found = tuple[list[Tensor], list[float]]
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "static graph": {"static_graph": True},
    "find unused": {"find_unused_parameters": True},
    "views of buckets": {"gradient_as_bucket_view": True},
}
COMPILED = ("hard", "hard, split", "soft", "second order", "adversarial, avg", "1-to-N")
# Rows without compiled steps on several processes, and what is said.
NOT_COMPILED = {
    "auto": 'gamma="auto" must be fixed before a step is compiled',
    "adversarial, min": "the selection of samples by .* cannot be compiled with several processes",
    "adversarial, envelope": "the selection of samples by .* cannot be compiled with several processes",
    "adversarial, first order": "the selection of samples by .* cannot be compiled with several processes",
}


def data_parallel(
    rank: int, size: int, name: str, options: dict[str, Any], counts: list[int] | None, group: str | None, backend: str
) -> Found:
    task = task_of(name, group)
    if backend:
        task.compile(backend=backend)
    wrapped = DistributedDataParallel(task, **options)
    return steps(wrapped, parts(counts or [ROWS // size] * size, rank))


@pytest.mark.parametrize(
    ("name", "way"),
    [(name, way) for name in losses() for way in WAYS if name in COMPILED or way in ("default", "static graph")],
)
def test_steps_are_those_of_one_process(processes, name: str, way: str) -> None:
    compare(processes(2).run(data_parallel, name, WAYS[way], None, None, ""), expected(name))


def test_inductor_compiles_what_processes_exchange(processes) -> None:
    compare(processes(2).run(data_parallel, "1-to-N", {}, [8, 4], "world", "inductor"), expected("1-to-N"))


def reductions(rank: int, size: int) -> list[Tensor]:
    """Gradients of losses called by hand, of all parts, averaged."""
    x, y = batch()
    rows = parts([7, 5], rank)
    found = []
    for loss in summed():
        layer = linear()
        loss(layer(x[rows]), y[rows]).backward()
        torch.distributed.all_reduce(layer.weight.grad)
        found.append(layer.weight.grad / size)
    return found


def summed() -> list[nn.Module]:
    return [mk.OneToNLoss(0.5, reduction=reduction, process_group="world") for reduction in ("mean", "sum")]


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 5).double()


def test_means_and_sums_are_those_of_the_whole_batch(processes) -> None:
    x, y = batch()
    for found in processes(2).run(reductions):
        for loss, gradient in zip(summed(), found, strict=True):
            layer = linear()
            loss(layer(x), y).backward()
            torch.testing.assert_close(gradient, layer.weight.grad, rtol=1e-12, atol=1e-12)


def test_a_group_is_checked() -> None:
    for loss in (mk.LargeMarginLoss, mk.MarginSensitivityLoss, mk.AdversarialMarginLoss, mk.OneToNLoss):
        with pytest.raises(
            TypeError, match='process_group must be None, "world", a ProcessGroup or a DeviceMesh of one'
        ):
            loss(process_group=3)
    with pytest.warns(DeprecationWarning, match="across_processes is now process_group"):
        loss = mk.OneToNLoss(across_processes=True)
    assert loss.process_group == "world"
    assert "process_group='world'" in repr(loss)

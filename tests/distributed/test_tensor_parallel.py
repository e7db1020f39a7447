"""Margin losses on models that several processes share: the large margin loss of first order in every cell of the
table, losses without a task, what else is measured, and further meshes."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from support.tensor_parallel import (
    EXACT,
    FIRST_ORDER,
    OTHERS,
    PART,
    PART_OF_LOGITS,
    SECOND_ORDER,
    TOLERANCE,
    cells_of,
    check_cell,
    full,
    losses,
    models,
    trained,
    verdict,
)
from torch import Tensor, nn
from torch.nn import functional as F

import margin_kernels as mk

CELL = ("size", "layout", "taps", "loss", "passes", "what")


@pytest.mark.parametrize(CELL, cells_of(*FIRST_ORDER))
def test_a_shared_model_trains_as_in_one_process_or_is_refused(
    processes, size, layout, taps, loss, passes, what
) -> None:
    check_cell(processes, size, layout, taps, loss, passes, what)


def test_every_loss_is_in_one_of_the_two_files() -> None:
    assert sorted([*FIRST_ORDER, *OTHERS]) == sorted(losses())


def by_hand(rank: int, size: int, layout: str, loss: str, tap: str) -> str:
    """A loop of the user's own: the loss on logits and one activation, or on the model."""
    from torch.distributed.tensor import init_device_mesh

    shared, alone, x, y, given = models(init_device_mesh("cpu", (size,)), layout)

    def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        handle = model.get_submodule(tap).register_forward_hook(lambda module, args, output: kept.append(output))
        logits = model(x)
        handle.remove()
        chosen = losses()[loss]()
        rest = {"taps": (kept,), "logits": (), "model": (model, x)}[chosen.needs]
        value = chosen(logits, y, *rest)
        value.backward()
        return [full(value), *(full(p.grad) for p in model.parameters())]

    try:
        found = gradients(shared, given)
    except ValueError as error:
        return str(error)
    return verdict(found, gradients(alone, x))


BY_HAND = [
    *(("sharded head", loss, "l2", EXACT) for loss in ("hard", "hard and cross-entropy", "soft", "1-to-N", "envelope")),
    *(("DTensors", loss, "l1", EXACT) for loss in ("soft", "two competitors", "second order", "sensitivity")),
    ("DTensors, samples sharded", "sensitivity", "l1", EXACT),
    ("plain head", "soft", "l1", f"tap 'activations[0]' holds {PART}"),
    ("sharded head", "sensitivity", "l2", SECOND_ORDER),
    *(("head of parts", loss, "l2", PART_OF_LOGITS) for loss in ("hard", "envelope", "1-to-N")),
]


@pytest.mark.parametrize(("layout", "loss", "tap", "what"), BY_HAND)
def test_losses_without_a_task(processes, layout, loss, tap, what) -> None:
    for found in processes(2).run(by_hand, layout, loss, tap):
        assert found == EXACT if what == EXACT else what in found


def beside_training(rank: int, size: int, layout: str, tap: str) -> dict[str, str]:
    """What else is measured on a model."""
    from torch.distributed.tensor import init_device_mesh

    warnings.simplefilter("ignore")
    shared, alone, x, y, _ = models(init_device_mesh("cpu", (size,)), layout)
    pair = [mk.MarginTask(model, losses()["soft"]()) for model in (shared, alone)]
    y = y % 3  # in the range of a part of the logits

    def logits(model: nn.Module) -> Tensor:
        z = model(x)
        return z.full_tensor() if hasattr(z, "full_tensor") else z

    def monitored(model: nn.Module) -> list[Tensor]:
        with mk.MarginMonitor(model, (tap, "output")) as monitor:
            F.cross_entropy(logits(model), y).backward()
        return [monitor.distances()]

    def without_gradients(guard: Any) -> str:
        with guard():
            found, expected = (task(x, y) for task in pair)
        partial = [out.pop("partial") for out in (found, expected)]
        assert partial == [True, True]
        return verdict([found[key] for key in expected], list(expected.values()))

    def compiled() -> str:
        pair[0].compile(backend="eager")
        return verdict([pair[0](x, y)["loss"].detach()], [pair[1](x, y)["loss"].detach()])

    searched = ("perturbation", "distance", "label")
    asked = {
        "no_grad": lambda: without_gradients(torch.no_grad),
        "no_grad again": lambda: without_gradients(torch.no_grad),
        "inference_mode": lambda: without_gradients(torch.inference_mode),
        "explain": lambda: pair[0].explain(x, y).strategy,
        "monitor": lambda: verdict(monitored(shared), monitored(alone)),
        "deepfool": lambda: verdict(
            *([getattr(mk.deepfool(m, x, max_iter=3), f) for f in searched] for m in (shared, alone))
        ),
        "compile": compiled,
    }
    said = {}
    for name, ask in asked.items():
        try:
            said[name] = ask()
        except ValueError as error:
            said[name] = str(error)
    return said


@pytest.mark.parametrize(
    ("layout", "tap"),
    [("plain head", "l2"), ("sharded head", "a2"), ("gathered head", "l2"), ("DTensors", "l1"), ("sequence", "act")],
)
def test_what_else_is_measured_is_exact_but_steps_are_not_compiled(processes, layout, tap) -> None:
    for said in processes(2).run(beside_training, layout, tap):
        assert said.pop("explain") == "loop"
        assert "do not compile" in said.pop("compile")
        assert set(said.values()) == {EXACT}, said


def test_parts_are_refused_whatever_is_measured(processes) -> None:
    for said in processes(2).run(beside_training, "head of parts", "l2"):
        assert all(PART_OF_LOGITS in sentence for sentence in said.values()), said
    for said in processes(2).run(beside_training, "plain head", "l1"):
        assert PART in said["monitor"]


def of_all_processes(rank: int, size: int, loss: str, task: bool) -> str:
    from torch.distributed.tensor import init_device_mesh

    shared, _, x, y, _ = models(init_device_mesh("cpu", (size,)), "sharded head")
    chosen = losses()[loss]()
    chosen.process_group = "world"
    if task:
        call: Any = partial(mk.MarginTask(shared, chosen), x, y)
    else:
        x = x.requires_grad_()
        rest = {"taps": ([x],), "logits": (), "model": (shared, x)}[chosen.needs]
        call = partial(chosen, shared(x), y, *rest)
    with pytest.raises(ValueError, match="process_group must not hold processes that share the model") as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("task", [True, False])
@pytest.mark.parametrize("loss", ["soft", "sensitivity", "envelope", "1-to-N"])
def test_one_batch_is_not_counted_by_every_process_that_shares_the_model(processes, loss, task) -> None:
    assert all('mesh["data"]' in said for said in processes(2).run(of_all_processes, loss, task))


def parts_of_a_batch(rank: int, size: int, loss: str) -> float:
    """The processes divide the batch, and the model is shared by one process."""
    from torch import distributed
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("data", "tensor"))
    shared, alone, x, y, _ = models(mesh["tensor"], "DTensors")
    chosen = losses()[loss]()
    chosen.process_group = mesh["data"]
    part = slice(0, 2) if rank == 0 else slice(2, None)
    found = mk.MarginTask(shared, chosen)(x[part], y[part])["loss"].detach()
    distributed.all_reduce(found)
    return float(found / size - mk.MarginTask(alone, losses()[loss]())(x, y)["loss"].detach())


@pytest.mark.parametrize("loss", ["soft", "envelope", "1-to-N"])
def test_the_batch_may_be_divided_along_another_dimension(processes, loss) -> None:
    assert all(abs(difference) <= TOLERANCE for difference in processes(2).run(parts_of_a_batch, loss))


def on_a_part_of_the_mesh(rank: int, size: int) -> str:
    """Tensor parallelism along the second dimension of a mesh [1, processes]."""
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))["tensor"]
    shared, alone, x, y, given = models(mesh, "DTensors")
    taps = ("input", "l1")
    found = trained(mk.MarginTask(shared, losses()["soft"](), taps), given, y)
    return verdict(found, trained(mk.MarginTask(alone, losses()["soft"](), taps), x, y))


def test_a_mesh_of_two_dimensions(processes) -> None:
    assert set(processes(2).run(on_a_part_of_the_mesh)) == {EXACT}


def sharded_along_the_other_dimension(rank: int, size: int, layout: str) -> str:
    """FSDP2 along the first dimension of the mesh, tensor parallelism along the second."""
    from torch.distributed.tensor import init_device_mesh

    from margin_kernels.distributed import fully_shard_task

    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))
    shared, alone, x, y, given = models(mesh["tensor"], layout)
    task = fully_shard_task(mk.MarginTask(shared, losses()["soft"]()), mesh=mesh["data"])
    return verdict(trained(task, given, y), trained(mk.MarginTask(alone, losses()["soft"]()), x, y))


@pytest.mark.parametrize("layout", ["sharded head", "DTensors"])
def test_a_shared_model_may_be_sharded_too(processes, layout) -> None:
    assert set(processes(2).run(sharded_along_the_other_dimension, layout)) == {EXACT}

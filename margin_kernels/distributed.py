"""A task on several processes: parameters sharded by FSDP2.

    task = fully_shard_task(MarginTask(model, loss), units=("blocks.*",))
    task(x, y)["loss"].backward()

What DistributedDataParallel does needs no function of ours: DistributedDataParallel(task). Losses with terms over the
whole batch take `process_group`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .sharding import is_sharded
from .task import MarginTask
from .task.capture import resolve


def fully_shard_task(
    task: MarginTask,
    units: Sequence[str] | str = (),
    mesh: Any = None,
    mp_policy: Any = None,
    reshard_after_forward: bool | int | None = None,
    **options: Any,
) -> MarginTask:
    """Shards the parameters of a task over the processes of a mesh with torch.distributed.fsdp.fully_shard, in place.

    Losses and gradients are those of DistributedDataParallel(task). Memory is that of FSDP in the loop of first order
    (`passes`). Split and tangent keep the parameters of a unit gathered from its margin pass to the end of the
    backward, and until then the gradients of all of them; second order in the loop and AdversarialMarginLoss keep the
    parameters.

    Args:
        task: a MarginTask that is not compiled; its optimizer is made afterwards, from task.parameters().
        units: names of modules of the model, or glob patterns as for `layers`: each is gathered and sharded by itself.
            All other parameters form one more unit, gathered for the whole step.
        mesh: a DeviceMesh: one dimension to shard over, or two, (replicate, shard). None: all processes.
        mp_policy: torch.distributed.fsdp.MixedPrecisionPolicy, of every unit. None: the dtype of the parameters.
        reshard_after_forward: as fully_shard has it, for the units.
        options: further arguments of fully_shard (shard_placement_fn, offload_policy).

    Returns:
        The task.

    Raises:
        TypeError: for anything but a MarginTask.
        ValueError: a task that is sharded already, a unit that the model has not, ignored_params, whose gradients
            nobody would average.
    """
    if not isinstance(task, MarginTask):
        raise TypeError(f"task must be a MarginTask, got {type(task).__name__}")
    if is_sharded(task):
        raise ValueError("task must not be sharded yet: fully_shard was applied to it")
    if options.get("ignored_params"):
        raise ValueError("ignored_params must be empty: FSDP2 does not average their gradients; freeze them instead")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # takes seconds

    names = resolve(task.model, units) if units else ()
    for name in names:
        if name not in dict(task.model.named_modules()):
            raise ValueError(f"units must name modules of the model, got {name!r}")
    shared: dict[str, Any] = {"mesh": mesh, "mp_policy": mp_policy or MixedPrecisionPolicy(), **options}
    if reshard_after_forward is not None:
        shared["reshard_after_forward"] = reshard_after_forward
    # Inner modules before those around them.
    modules: list[nn.Module] = [task.model.get_submodule(name) for name in sorted(names, key=_depth, reverse=True)]
    for module in dict.fromkeys(modules):
        fully_shard(module, **shared)
    shared.pop("reshard_after_forward", None)
    fully_shard(task, **shared)
    task.prepare_sharded()
    return task


def _depth(name: str) -> int:
    return name.count(".")

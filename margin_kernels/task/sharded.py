"""Steps of a task whose parameters are sharded by torch.distributed.fsdp.fully_shard (FSDP2).

A margin step takes backward passes before the backward of its loss, inside the forward of the task. To FSDP each of
them ends a step: it would shard parameters that the forward still reads, and reduce gradients that are not complete.
`passes` says otherwise while they run:

    what FSDP does at the end of a backward     in passes
    shards the parameters of the root           not: the forward of the task goes on
    shards the parameters of a unit             as ever in the loop of first order. Else they are gathered until the
                                                backward of the loss ends, which reads them in another order
    reduces gradients                           not: there are none
    frees what it prefetches by                 not: the backward of the loss is to come

All processes must take the same passes, for each of them gathers parameters. So they agree on the strategy before the
first one, and an error of one process is an error of all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..process_group import Agreement, Group
from ..sharding import is_sharded

REMEDY = "margin_kernels.distributed.fully_shard_task(task)"
# What `passes` changes in a group of parameters and puts back.
SETTINGS = ("reshard_after_backward", "post_forward_mesh_info", "reduce_grads", "all_reduce_grads", "_training_state")


def plain_type(module: nn.Module) -> type:
    """The class of a module, without what fully_shard made of it."""
    if not is_sharded(module):
        return type(module)
    fsdp = sys.modules["torch.distributed.fsdp"].FSDPModule
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, fsdp))


def check_model(model: nn.Module, where: str = "model") -> None:
    """Raises ValueError for a model with sharded modules outside a sharded task."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    for name, module in model.named_modules():
        if is_sharded(module):
            what = f"its module {name!r}" if name else "it"
            raise ValueError(
                f"{where} must not be sharded by fully_shard, but {what} is: make the task from the plain model and "
                f"shard the task, {REMEDY}"
            )


class Sharded:
    """What a sharded task does around its passes.

    Args:
        task: to which fully_shard was applied, the root of the sharded modules
    """

    def __init__(self, task: nn.Module) -> None:
        modules: list[tuple[str, Any]] = [(name, module) for name, module in task.named_modules() if is_sharded(module)]
        self._states = {name: module._get_fsdp_state() for name, module in modules}
        self._root = self._states[""]
        self._groups = [group for state in self._states.values() for group in _groups(state)]
        self._units = [group for group in self._groups if group not in _groups(self._root)]
        mesh = self._groups[0].mesh_info.mesh
        self.agreement = Agreement([Group(mesh.get_group(d)) for d in range(mesh.ndim)])
        self._versions: list[list[int]] = []
        task.register_forward_pre_hook(self._refresh, prepend=True)
        self._kept: list[Any] = []

    def _refresh(self, task: nn.Module, args: Any) -> None:
        """Before FSDP's own hook: a forward whose backward never came has left parameters gathered, and FSDP would take
        them as they are, whatever an optimizer or a checkpoint has made of the shards since."""
        now = [[param.sharded_param._version for param in group.fsdp_params] for group in self._groups]
        for group, versions, before in zip(self._groups, now, self._versions or now, strict=True):
            if group.is_unsharded and versions != before:
                group.reshard()
        self._versions = now

    def begin(self) -> None:
        """Before a forward: parameters that wait for the backward of an earlier step are gathered anew."""
        for group in self._kept:
            group.reshard()
        self._kept = []

    @contextmanager
    def passes(self, keep: bool, agreeing: bool, head: str | None = None) -> Iterator[None]:
        """Around the passes of a step.

        keep: parameters that a pass has gathered stay until the backward of the loss.  agreeing: `agree` is called
        inside, by every process.  head: the name in the task of the final layer, whose weight is read outside its
        forward; gathered now.
        """
        saved = [{name: getattr(group, name) for name in SETTINGS} for group in self._groups]
        context = self._root._state_ctx
        forward = self._root._training_state, context.iter_forward_root, context.is_last_backward
        staying = list(_groups(self._root))
        if head is not None:
            unit = self._states[self._unit_of(head)]
            staying += _groups(unit)
            for group in _groups(unit):
                group.unshard()
                group.wait_for_unshard()
        context.is_last_backward = False
        for group in self._groups:
            group.reduce_grads = group.all_reduce_grads = False
            if keep or group in staying:
                group.reshard_after_backward = False
            if keep and not agreeing:  # forwards come inside
                group.post_forward_mesh_info = None
        self._kept = self._units if keep else []
        try:
            with self.agreement.step() if agreeing else nullcontext():
                yield
        finally:
            self._root._training_state, context.iter_forward_root, context.is_last_backward = forward
            for group, settings in zip(self._groups, saved, strict=True):
                for name, value in settings.items():
                    setattr(group, name, value)

    def attach(self, loss: Tensor) -> Tensor:
        """The loss after the passes, whose backward finds the parameters that it reads, from its begin to its end."""
        kept = self._kept
        loss = loss if loss._base is None else loss.clone()  # FSDP warns of views
        if not kept or not loss.requires_grad:
            return loss

        def begun(grad: Tensor) -> None:
            shards = [group.reshard_after_backward for group in kept]
            for group in kept:
                group.unshard()
                group.wait_for_unshard()
                group.reshard_after_backward = False

            def ended() -> None:
                for group, shard in zip(kept, shards, strict=True):
                    group.reshard_after_backward = shard
                    if shard:
                        group.reshard()
                if self._kept is kept:
                    self._kept = []

            # Of the whole backward; FSDP's own follows, for its hook on the loss comes after this one.
            torch.autograd.Variable._execution_engine.queue_callback(ended)

        loss.register_hook(begun)
        return loss

    def agree(self, strategy: str) -> bool:
        """Whether all processes take this strategy. Raises RuntimeError where one has an error."""
        agreed = self.agreement.agree(strategy)
        if agreed and strategy != "loop":  # its backward runs parts of the graph, without what FSDP does before them
            self._kept = self._units
            for group in self._units:
                group.reshard_after_backward = False
        return agreed

    def _unit_of(self, name: str) -> str:
        parts = name.split(".")
        return next(unit for n in range(len(parts), -1, -1) if (unit := ".".join(parts[:n])) in self._states)


def _groups(state: Any) -> list[Any]:
    """The groups of parameters that one call of fully_shard made."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]

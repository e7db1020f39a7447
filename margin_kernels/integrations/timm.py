"""MarginTrainingTask: a margin loss as a training task of timm."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..task import MarginTask
from . import missing

try:
    from timm.task import TrainingTask
except ModuleNotFoundError as error:
    raise missing("timm", error) from error


class MarginTrainingTask(TrainingTask):
    """A classifier and its margin loss as timm.task.TrainingTask, for loops and tools that take one.

        task = MarginTrainingTask(model, LargeMarginLoss(...), layers=("input", "blocks.*"))
        task.setup_ema(decay=0.999)
        out = task(input, target)  # what MarginTask gives: loss, output and the margins; target [N], or [N,C] of mixup
        out["loss"].backward()

    The trained module, the one that is averaged, evaluated, clipped and saved, is the plain model, so that checkpoints
    have its keys. The medians of gamma="auto" are the task's own state ("task_state" of a checkpoint).

    Args:
        model: the classifier, on its device; not compiled and not wrapped
        loss: a loss of margin_kernels.losses
        layers: taps, as of MarginTask
        device: of the task, where the model is
        dtype: as of TrainingTask
        verbose: as of TrainingTask
        options: of MarginTask: passes, batchnorm, ...
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        layers: Sequence[str] | str | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(device=device, dtype=dtype, verbose=verbose)
        # What is called: the task, or DistributedDataParallel around it.
        self.margins: nn.Module = MarginTask(model, loss, layers, **options)
        auto, some = self.margin_task.auto_gamma, next(model.parameters(), None)
        if auto is not None and some is not None:
            auto.to(some.device)

    @property
    def margin_task(self) -> MarginTask:
        """The MarginTask, also where DistributedDataParallel is around it."""
        found = self.margins.module if isinstance(self.margins, DistributedDataParallel) else self.margins
        assert isinstance(found, MarginTask)
        return found

    def get_trainable_module(self, ema: bool = False) -> nn.Module | None:
        """The plain model, or timm's average of it."""
        if ema:
            average: nn.Module | None = super().get_trainable_module(ema=True)
            return average
        return self.margin_task.model

    def prepare_distributed(self, device_ids: list[Any] | None = None, **ddp_kwargs: Any) -> MarginTrainingTask:
        """Wraps the task, not the model: its gradients of activations are taken inside its forward pass."""
        self.margins = DistributedDataParallel(self.margin_task, device_ids=device_ids, **ddp_kwargs)
        return self

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, gradients are accumulated and not exchanged."""
        return self.margins.no_sync() if isinstance(self.margins, DistributedDataParallel) else nullcontext()

    def compile(self, backend: str = "inductor", mode: str | None = None, **options: Any) -> nn.Module:
        """Compiles training steps, MarginTask.compile; evaluation goes through the plain model, which is returned."""
        self.margin_task.compile(backend=backend, mode=mode, **options)
        return self.margin_task.model

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """The medians of gamma="auto"; nothing for an average, and without "auto"."""
        auto = self.margin_task.auto_gamma
        return {} if auto is None or ema else {"auto_gamma": auto.state_dict()}

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,
        module: nn.Module | None = None,
        ema: bool = False,
    ) -> None:
        """Loads what `get_task_state` gave. With a checkpoint that has none, the medians are measured anew."""
        auto = self.margin_task.auto_gamma
        if auto is not None and not ema and state:
            auto.load_state_dict(state["auto_gamma"], strict=strict)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The dict of MarginTask: loss, output and what was measured."""
        found: dict[str, Tensor] = self.margins(input, target)
        return found

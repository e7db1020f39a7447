"""MarginModule: a margin loss as a LightningModule. MonitorCallback: the margins of an ordinary training, per epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, distributed, nn

from ..monitor import MarginMonitor
from ..task import MarginTask
from . import missing

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise missing("lightning", error) from error

# Names of the target in batches that are mappings, as the common libraries have them.
TARGETS = ("labels", "label", "target", "targets", "y")


class MarginModule(LightningModule):
    """A MarginTask as a LightningModule; the loss and the scalars of `task.log` are logged as "train/NAME", "val/NAME"
    and "test/NAME".

        task = MarginTask(model, LargeMarginLoss(...), layers=("input", "layer3"))
        module = MarginModule(task, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
        lightning.Trainer(...).fit(module, train_loader, val_loader)

    A batch is (x, y), or a mapping with the target as "labels", "label", "target", "targets" or "y" and the rest as
    keywords of the model: override `unpacked` for others. Validation runs without gradients: "val/loss" is the part of
    the loss that the logits and the last layer show. Testing measures everything, task.evaluate.

    Args:
        task: the MarginTask; the plain model's weights are module.task.model.state_dict()
        optimizer: of the parameters -> what configure_optimizers may return: an optimizer, or a dict with a scheduler
    """

    def __init__(self, task: MarginTask, optimizer: Callable[[Iterable[nn.Parameter]], Any]) -> None:
        super().__init__()
        if not isinstance(task, MarginTask):
            raise TypeError(f"task must be a MarginTask, got {type(task).__name__}")
        self.task, self._optimizer = task, optimizer

    def setup(self, stage: str) -> None:
        if self._compiler_ctx is not None:
            raise ValueError("the module must not be compiled: compile its task, module.task.compile()")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the plain model."""
        return self.task.model(*args, **kwargs)

    def unpacked(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
        """Positional arguments and keywords of the model, and the target, of a batch."""
        if isinstance(batch, Mapping):
            names = [name for name in TARGETS if name in batch]
            if len(names) == 1:
                return (), {key: value for key, value in batch.items() if key != names[0]}, batch[names[0]]
            raise ValueError(f"batch must hold one of {', '.join(TARGETS)}, got {list(batch)}: override `unpacked`")
        if not isinstance(batch, Sequence) or len(batch) < 2:
            raise ValueError(f"batch must be (x, y) or a mapping, got {type(batch).__name__}: override `unpacked`")
        *args, target = batch
        return tuple(args), {}, target

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        args, kwargs, target = self.unpacked(batch)
        return self._logged("train", self.task(*args, target=target, **kwargs), len(target))

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        args, kwargs, target = self.unpacked(batch)
        return self._logged("val", self.task(*args, target=target, **kwargs), len(target))

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        args, kwargs, target = self.unpacked(batch)
        return self._logged("test", self.task.evaluate(*args, target=target, **kwargs), len(target))

    def configure_optimizers(self) -> Any:
        return self._optimizer(self.task.parameters())

    def _logged(self, stage: str, out: dict[str, Tensor], samples: int) -> Tensor:
        """The loss, after its scalars are logged: those of a step in training, else means over the epoch, of all
        processes."""
        values = {f"{stage}/{name}": value for name, value in self.task.log(out).items()}
        self.log_dict(values, batch_size=samples, sync_dist=stage != "train")
        return out["loss"]


class MonitorCallback(Callback):
    """Logs, once an epoch, the margins of layers in a training whose loss is cross-entropy: mk.MarginMonitor.

        lightning.Trainer(callbacks=[MonitorCallback(("layer1", "layer4"))])

    Logged are "margin/LAYER/mean", "margin/LAYER/right" (the share with d > 0) and "margin/LAYER/q50" for each
    quantile, over the samples of all processes.

    Args:
        layers: as of MarginMonitor, of the network
        network: of the LightningModule -> the nn.Module that gives the logits; by default its attribute `model`
        quantiles: in [0, 1]
        options: of MarginMonitor: p, eps, batch_dim, every, samples, output
    """

    def __init__(
        self,
        layers: Sequence[str] | str,
        network: Callable[[LightningModule], nn.Module] | None = None,
        quantiles: Sequence[float] = (0.05, 0.5, 0.95),
        **options: Any,
    ) -> None:
        self.layers, self.network, self.quantiles, self.options = layers, network, tuple(quantiles), options
        self.monitor: MarginMonitor | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        network = getattr(pl_module, "model", None) if self.network is None else self.network(pl_module)
        if not isinstance(network, nn.Module):
            raise ValueError(
                f"network must give the module with the logits: {type(pl_module).__name__} has no attribute `model`"
            )
        self.monitor = MarginMonitor(network, self.layers, **self.options).attach()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.monitor is not None
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        found = self.monitor.summary(quantiles=self.quantiles, all_processes=several)
        self.monitor.reset()
        values: dict[str, float] = {}
        for row, layer in enumerate(found.layers):
            values[f"margin/{layer}/mean"], values[f"margin/{layer}/right"] = (
                float(found.mean[row]),
                float(found.right[row]),
            )
            for q, value in zip(self.quantiles, found.quantiles[row].tolist(), strict=True):
                values[f"margin/{layer}/q{100 * q:g}"] = value
        pl_module.log_dict(values)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._detach()

    def _detach(self) -> None:
        if self.monitor is not None:
            self.monitor.detach()

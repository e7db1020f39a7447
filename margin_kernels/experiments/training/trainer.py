"""The training loop: seeded, resumable, recorded.

Each epoch: all training images once in an order drawn from a seeded generator, the validation accuracy, and the mean
signed distance to the decision boundary at every tap on a fixed part of the validation split (measured for every
loss, also those that do not use it). After each epoch the state is written atomically; `Trainer.resume` continues
from it, on the CPU bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import margin_kernels as mk
from margin_kernels.task.auto_gamma import positive_median
from margin_kernels.task.suggest_gamma import nearest_distances

from .. import models, objectives
from ..config import Config, LossConfig, check, complete, exponent, to_dict, to_yaml
from ..data import Dataset, augmented
from ..evaluation import accuracy, signed_distance, tap_names
from ..results import Run, differing, flatten, machine, shape, versions, write_csv, write_json, write_text
from .checkpoint import check_optimiser, load_state, save_state

MEDIAN_SAMPLES = 1000  # training images by which loss.gamma_unit "median" goes
# What may differ between a run and its resumption without changing what is computed up to the epoch reached.
RESUMABLE = ("training.device", "training.threads", "training.tensorboard", "data.dir", "data.verify")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and what to change."""


# Mistakes of the caller: their message is the whole answer, a traceback would hide it. ConfigError, DataError and
# CheckpointError are ValueErrors.
EXPECTED = (TrainingError, ValueError)


def learning_rate(config: Config, epoch: float) -> float:
    """Learning rate at `epoch` (fractions count: cosine and warm-up move with every step)."""
    schedule, total = config.schedule, config.training.epochs
    rate = config.optimiser.lr
    if schedule.warmup > 0 and epoch < schedule.warmup:
        return rate * epoch / schedule.warmup
    if schedule.name == "cosine":
        done = (epoch - schedule.warmup) / max(total - schedule.warmup, 1e-9)
        return rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    if schedule.name == "step":
        return rate * schedule.factor ** sum(epoch >= milestone for milestone in schedule.milestones)
    if schedule.name == "exponential":
        return rate * schedule.factor ** math.floor(epoch)
    return rate


def build_optimiser(config: Config, parameters: Any) -> torch.optim.Optimizer:
    """One kernel for all of a step where PyTorch has one: on the CPU Adam then takes a fifth of the time."""
    settings = config.optimiser
    if settings.name == "sgd":
        return torch.optim.SGD(
            parameters, settings.lr, settings.momentum, weight_decay=settings.weight_decay, fused=True
        )
    if settings.name == "rmsprop":
        return torch.optim.RMSprop(
            parameters, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
    if settings.name == "adam":
        return torch.optim.Adam(parameters, settings.lr, weight_decay=settings.weight_decay, fused=True)
    raise ValueError(f"optimiser.name must be one of sgd, adam, rmsprop, got {settings.name!r}")


def resolve_device(name: str) -> torch.device:
    """torch.device, after a look at whether it exists here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index is not None):
        raise ValueError(f"training.device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"training.device must be cpu, got {name!r}: this torch {torch.__version__} sees no CUDA device"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"training.device must be one of {torch.cuda.device_count()} CUDA devices, got {name!r}")
    return device


class Trainer:
    """One run: Trainer(config, dataset, folder).run(); `folder` None keeps nothing on disk."""

    def __init__(self, config: Config, dataset: Dataset, folder: Path | None = None) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        settings = config.training
        check(config)
        self.device = resolve_device(settings.device)
        if settings.precision == "fp16" and self.device.type != "cuda":
            raise ValueError("training.precision must be bf16 or fp32 on the CPU, got fp16, which needs a CUDA device")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.hidden = models.hidden_taps(config.model.name)
        options: dict[str, Any] = {"dropout": config.model.dropout}
        if models.has_norm(config.model.name):
            options["norm"] = config.model.norm
        if config.model.center:
            options["center"] = True
        self.description = {
            "name": config.model.name,
            "shape": list(dataset.shape),
            "classes": dataset.num_classes,
            "options": options,
        }
        if dataset.train.preprocess != "none":
            self.description["preprocess"] = dataset.train.preprocess
        torch.manual_seed(settings.seed)
        try:
            self.model = models.build(
                config.model.name, dataset.shape, dataset.num_classes, init=config.model.init, **options
            ).to(self.device)
            with torch.no_grad():
                self.model.eval()(torch.zeros(1, *dataset.shape, device=self.device))
        except RuntimeError as error:
            raise ValueError(
                f"model.name must be a network for images of shape {list(dataset.shape)}, got {config.model.name!r}: "
                f"{error}"
            ) from None
        self.model.train()
        if config.model.center:
            mean: Any = self.model.get_buffer("center.mean")
            mean.copy_(dataset.train.mean_image())
        if settings.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stubs
        if config.model.initial is not None:
            self._start_from(Path(config.model.initial))
        self.optimiser = build_optimiser(config, self.model.parameters())
        self.scaler = torch.amp.GradScaler("cuda", enabled=settings.precision == "fp16")
        self.order = torch.Generator().manual_seed(settings.seed)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.measured: dict[str, Any] = {}  # gamma and layer_weights in medians
        self.loss: LossConfig | None = None
        self._prepare()
        self.writer = self._tensorboard()

    def _prepare(self) -> None:
        """The task of the epoch that comes: cross-entropy at first where that is asked for, then the loss."""
        loss = self.config.loss
        if self.epoch < loss.cross_entropy_epochs:
            loss = LossConfig()
        elif loss.kind == "large_margin" and loss.gamma_unit == "median":
            if loss.gamma == "auto":
                raise ValueError("loss.gamma_unit must be absolute with loss.gamma auto, which measures by itself")
            self.measured = self.measured or self._measured()
            loss = replace(loss, **self.measured, gamma_unit="absolute")
        if loss == self.loss:
            return
        task = objectives.build(self.model, loss, self.hidden, self.dataset.train.bounds)
        self.loss, self.task = loss, task.to(self.device)  # the medians of gamma auto too
        self.step_module: Any = self.task
        if self.config.training.compile:
            self._compile(loss)

    def _measured(self) -> dict[str, Any]:
        loss = self.config.loss
        if self.epoch == 0 and self.config.model.initial is None:
            raise ValueError(
                "loss.gamma_unit is 'median', but random weights have no distances to go by: "
                "set loss.cross_entropy_epochs, or model.initial"
            )
        unscaled = replace(loss, gamma=1.0, gamma_unit="absolute", layer_weights=None)
        task: Any = objectives.build(self.model, unscaled, self.hidden)
        batches = self.dataset.train.head(MEDIAN_SAMPLES).batches(500, self.device)
        medians = positive_median(nearest_distances(task, batches)).tolist()
        if not all(median > 0 for median in medians):
            raise ValueError(
                f"loss.gamma_unit is 'median', but the network is right about none of the first {MEDIAN_SAMPLES} "
                "training images: set loss.cross_entropy_epochs higher"
            )
        return objectives.in_medians(loss, objectives.layers(loss.layers, self.hidden), medians)

    @property
    def _auto_gamma(self) -> nn.Module | None:
        """The running medians of gamma auto, where the loss has them."""
        return self.task.auto_gamma if isinstance(self.task, mk.MarginTask) else None

    def _compile(self, loss: LossConfig) -> None:
        if isinstance(self.task, mk.MarginTask):
            self.task.compile()
        elif isinstance(self.task, objectives.LogitTask):
            self.step_module = torch.compile(self.task)
        else:
            raise ValueError(
                "training.compile is set, but torch.compile cannot follow the gradients of loss.kind "
                f"{loss.kind} (a backward pass inside the forward): leave it off"
            )

    def _start_from(self, folder: Path) -> None:
        """The weights of another run, which must have trained the same network."""
        model, description = models.load_model(folder)
        if description != self.description:
            raise ValueError(f"model.initial: {folder} holds {description}, and this run trains {self.description}")
        self.model.load_state_dict(model.state_dict())

    @property
    def steps_per_epoch(self) -> int:
        settings = self.config.training
        return settings.repeat * math.ceil(len(self.dataset.train) / settings.batch_size)

    @property
    def stopped(self) -> bool:
        """Whether the last epoch reached training.stop_at_train_accuracy."""
        goal = self.config.training.stop_at_train_accuracy
        return goal is not None and bool(self.history) and self.history[-1]["train_accuracy"] >= goal

    def run(
        self,
        until: int | None = None,
        tick: Callable[[int], None] = lambda steps: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> list[dict[str, Any]]:
        """Trains up to epoch `until` (default: all) and returns one record per epoch; `tick` is told of every step and
        `say` of every epoch."""
        last = self.config.training.epochs if until is None else min(until, self.config.training.epochs)
        if self.folder is not None:
            write_text(self.folder / "config.yaml", to_yaml(self.config))
        while self.epoch < last and not self.stopped:
            self._prepare()
            record = self._epoch(tick)
            self._check_weights(record)
            self.epoch += 1
            self.history.append(record)
            self._keep(record)
            say(describe(record, self.config.training.epochs))
        if self.writer is not None:
            self.writer.flush()
        if self.folder is not None:
            self._check_weights()
            models.save_model(self.folder, self.model, self.description)
        return self.history

    def _batches(self) -> Iterator[Tensor]:
        """The samples of each step of an epoch: every pass in an order of its own, its last batch the shorter one."""
        for _ in range(self.config.training.repeat):
            order = torch.randperm(len(self.dataset.train), generator=self.order)
            yield from order.split(self.config.training.batch_size)

    def _epoch(self, tick: Callable[[int], None]) -> dict[str, Any]:
        start = time.perf_counter()
        self.task.train()
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for step, index in enumerate(self._batches()):
            rate = learning_rate(self.config, self.epoch + step / self.steps_per_epoch)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            loss, hits = self.step(index, step)
            loss_sum += loss
            correct += hits
            tick(1)
        seconds = time.perf_counter() - start
        count = len(self.dataset.train) * self.config.training.repeat
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "lr": rate,
            "train_loss": float(loss_sum) / count,
            "train_accuracy": float(correct) / count,
            "validation_accuracy": accuracy(self.model, self.dataset.validation, self.device),
            "seconds": seconds,
            "ms_per_step": 1000 * seconds / self.steps_per_epoch,
        }
        if self.config.training.distance_samples:
            record["distance"] = self.mean_distance()
        return record

    def step(self, index: Tensor, number: int = 0) -> tuple[Tensor, Tensor]:
        """One optimiser step on the samples `index`: (loss summed over them, number classified correctly)."""
        settings = self.config.training
        self.optimiser.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision)
        for part in index.chunk(settings.accumulate):
            x, y = self.dataset.train.batch(part, self.device)
            x = augmented(x, settings.augment, self.order)
            if settings.channels_last:
                x = x.to(memory_format=torch.channels_last)
            with torch.autocast(self.device.type, half, enabled=half is not None):
                out = self.step_module(x, y)
            # the task's loss is a mean over its part: weigh parts by their size, so that a shorter last one counts
            # as its samples do
            self.scaler.scale(out["loss"] * (len(part) / len(index))).backward()
            loss_sum += out["loss"].detach() * len(part)
            correct += (out["output"].argmax(1) == y).sum()
        if not math.isfinite(float(loss_sum)):
            raise TrainingError(
                self._diverged(f"the loss is {float(loss_sum)} at epoch {self.epoch + 1}, step {number + 1}")
            )
        if settings.clip_norm is not None:
            self.scaler.unscale_(self.optimiser)
            nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return loss_sum, correct

    def _check_weights(self, record: dict[str, Any] | None = None) -> None:
        """Raises TrainingError where a weight, a buffer, or a logit of the first validation images is not finite: such
        a network is never saved. `record`: of the epoch that has just ended."""
        where = "as they were given" if record is None else f"after epoch {record['epoch']}"
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise TrainingError(self._diverged(f"the weights of {name} {where} are not finite"))
        first = torch.arange(min(len(self.dataset.validation), self.config.training.batch_size))
        images, _ = self.dataset.validation.batch(first, self.device)
        training = self.model.training
        with torch.no_grad():
            logits = self.model.eval()(images)
        self.model.train(training)
        if not bool(logits.isfinite().all()):
            raise TrainingError(self._diverged(f"the weights {where} give logits that are not finite"))

    def _diverged(self, what: str) -> str:
        kept = f" The last checkpoint (epoch {self.epoch}) is kept." if self.folder is not None and self.epoch else ""
        return (
            f"{self.config.name}: {what}.{kept} "
            f"Lower --optimiser.lr (now {self.optimiser.param_groups[0]['lr']:g}), set --training.clip_norm 10, "
            "lower --loss.gamma, or train in fp32 where a half precision was used."
        )

    def mean_distance(self) -> dict[str, float]:
        """Mean signed distance per tap on the first `distance_samples` validation images."""
        settings = self.config.training
        p = exponent(settings.distance_p)
        part = self.dataset.validation.head(settings.distance_samples)
        mean = signed_distance(self.model, part, self.hidden, p, device=self.device).mean(0)
        return dict(zip(tap_names(self.hidden), mean.tolist(), strict=True))

    def _keep(self, record: dict[str, Any]) -> None:
        if self.writer is not None:
            for key, value in row(record).items():
                self.writer.add_scalar(key.replace(".", "/"), value, record["epoch"])
        if self.folder is None:
            return
        write_csv(self.folder / "metrics.csv", [row(item) for item in self.history])
        write_json(self.folder / "run.json", self.summary().to_dict())
        save_state(self.folder, self.state())

    def summary(self) -> Run:
        """Everything about the run but its weights."""
        return Run(
            config=self.config,
            network=self.description,
            parameters=sum(p.numel() for p in self.model.parameters()),
            versions=versions(),
            machine=machine(self.device),
            history=self.history,
            measured=self.measured or self._gamma_found(),
        )

    def _gamma_found(self) -> dict[str, Any]:
        """gamma of each tap where gamma auto has found it."""
        found: Any = self._auto_gamma
        if found is None or not bool(found.fixed):
            return {}
        return {"gamma": [float(f"{self.config.loss.gamma_factor * value:.4g}") for value in found.median.tolist()]}

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on as if nothing had happened."""
        return {
            "config": to_dict(self.config),
            "epoch": self.epoch,
            "measured": self.measured,
            "auto_gamma": {} if self._auto_gamma is None else self._auto_gamma.state_dict(),
            "history": self.history,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def resume(self) -> None:
        """Continues from the folder's checkpoint; the config must be the one it was written with, but for where it
        runs."""
        if self.folder is None:
            raise ValueError("resume needs the folder of the run")
        state = load_state(self.folder)
        try:
            self._restore(state)
        except models.CheckpointError:
            raise
        except Exception as error:  # right keys and wrong contents: torch raises several types
            raise models.CheckpointError(
                f"{self.folder / 'checkpoint.pt'}: not a checkpoint of this run ({type(error).__name__}: {error}); "
                "start anew with --overwrite."
            ) from error
        self._prepare()
        if self._auto_gamma is not None and self.epoch > self.config.loss.cross_entropy_epochs:
            try:
                self._auto_gamma.load_state_dict(state["auto_gamma"])
            except Exception as error:
                raise models.CheckpointError(
                    f"{self.folder / 'checkpoint.pt'}: it lacks the medians of gamma auto ({type(error).__name__}); "
                    "start anew with --overwrite."
                ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        resumable = set(RESUMABLE)
        if self.config.schedule.name != "cosine" and self.config.training.epochs >= state["epoch"]:
            resumable.add("training.epochs")  # a longer run is the same up to here
        changed = [key for key in differing(complete(state["config"]), to_dict(self.config)) if key not in resumable]
        if changed:
            raise models.CheckpointError(
                f"{self.folder}: the checkpoint was written with other settings ({', '.join(changed)}); "
                "resume with the same config, or start anew with --overwrite."
            )
        models.check_weights(state["model"], self.model.state_dict())
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        check_optimiser(self.optimiser, self._fresh_optimiser())
        self.scaler.load_state_dict(state["scaler"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["cuda_random"]:
            torch.cuda.set_rng_state_all(state["cuda_random"])
        self.epoch, self.history = state["epoch"], state["history"]
        shape.check(self.history, [shape.EPOCH], "history")
        if type(self.epoch) is not int or self.epoch != len(self.history):
            raise ValueError(f"{self.epoch} epochs, but the history of {len(self.history)}")
        self.measured = state.get("measured", {})
        shape.check(self.measured, {"gamma?": [shape.NUMBER], "layer_weights?": [shape.NUMBER]}, "measured")
        if not set(self.measured) <= {"gamma", "layer_weights"}:
            raise ValueError(f"measured must be gamma and layer_weights, got {', '.join(self.measured)}")

    def _fresh_optimiser(self) -> torch.optim.Optimizer:
        """One of the same kind that has taken a step."""
        weight = nn.Parameter(torch.zeros(1, device=self.device))
        weight.grad = torch.zeros_like(weight)
        optimiser = build_optimiser(self.config, [weight])
        optimiser.step()
        return optimiser

    def _tensorboard(self) -> Any:
        if not self.config.training.tensorboard or self.folder is None:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "training.tensorboard is set, but tensorboard is not installed: pip install tensorboard"
            ) from error
        return SummaryWriter(str(self.folder / "tensorboard"))


def row(record: dict[str, Any]) -> dict[str, float]:
    """An epoch's record as flat CSV columns."""
    flat = {key: value for key, value in record.items() if key != "distance"}
    return {**flat, **flatten("distance", record.get("distance", {}))}


def describe(record: dict[str, Any], epochs: int) -> str:
    """An epoch in one line."""
    text = (
        f"epoch {record['epoch']}/{epochs}  loss {record['train_loss']:.4f}  train {record['train_accuracy']:.2%}  "
        f"validation {record['validation_accuracy']:.2%}  {record['ms_per_step']:.1f} ms/step"
    )
    distances = ", ".join(f"{tap} {value:.3g}" for tap, value in record.get("distance", {}).items())
    return f"{text}  distance {distances}" if distances else text

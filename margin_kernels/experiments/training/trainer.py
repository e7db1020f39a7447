"""The training loop: seeded, resumable, recorded.

Each epoch: all training images once in an order drawn from a seeded generator, the validation accuracy, and the mean
signed distance to the decision boundary at every tap on a fixed part of the validation split (measured for every
loss, also those that do not use it). After each epoch the state is written atomically; `Trainer.resume` continues
from it, on the CPU bit for bit.

Several processes (processes.py) take parts of the batches of the one process, and their records are those of all
samples. Each has random numbers and batch norm's statistics of its own.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import margin_kernels as mk
from margin_kernels.task.auto_gamma import positive_median
from margin_kernels.task.suggest_gamma import nearest_distances

from .. import models, objectives
from ..config import Config, LossConfig, check, complete, exponent, is_code, text_digest, to_dict, to_yaml, told
from ..data import Dataset, augmented
from ..evaluation import hits, signed_distance, tap_names
from ..results import Run, differing, flatten, machine, shape, versions, write_csv, write_json, write_text
from .checkpoint import check_optimiser, load_state, save_state
from .optimiser import build_optimiser, fresh_optimiser, learning_rate
from .processes import ALONE, Processes, ProcessesError

MEDIAN_SAMPLES = 1000  # training images by which loss.gamma_unit "median" goes
# What may differ between a run and its resumption without changing what is computed up to the epoch reached.
RESUMABLE = ("training.device", "training.threads", "training.tensorboard", "data.dir", "data.verify")


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, and what to change."""


# Mistakes of the caller: their message is the whole answer, a traceback would hide it. ConfigError, DataError and
# CheckpointError are ValueErrors.
EXPECTED = (TrainingError, ProcessesError, ValueError)


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
    """One run: Trainer(config, dataset, folder).run(); `folder` None keeps nothing on disk. Several `processes` each
    call the same methods."""

    def __init__(
        self, config: Config, dataset: Dataset, folder: Path | None = None, processes: Processes = ALONE
    ) -> None:
        self.config, self.dataset, self.folder, self.processes = config, dataset, folder, processes
        settings = config.training
        check(config)
        processes.together("the start", self._build)
        self.optimiser = build_optimiser(config, self.model.parameters())
        self.scaler = torch.amp.GradScaler("cuda", enabled=settings.precision == "fp16")
        self.order = torch.Generator().manual_seed(settings.seed)
        self.epoch = 0
        self.history: list[dict[str, Any]] = []
        self.whole = False  # whether the loss is that of the batch of all processes
        self.measured: dict[str, Any] = {}  # gamma and layer_weights in medians
        self.loss: LossConfig | None = None
        self._prepare()
        self.writer: Any = None
        processes.first("the start", self._tensorboard)
        processes.seed(settings.seed)

    def _build(self) -> None:
        """The device, and the network with its first weights."""
        config, dataset, settings = self.config, self.dataset, self.config.training
        self.device = self.processes.check_device(resolve_device(settings.device))
        if settings.precision == "fp16" and self.device.type != "cuda":
            raise ValueError("training.precision must be bf16 or fp32 on the CPU, got fp16, which needs a CUDA device")
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        own = is_code(config.model.name)
        options: dict[str, Any] = {"args": config.model.args} if own else {"dropout": config.model.dropout}
        if own and config.model.dropout:
            options["dropout"] = config.model.dropout  # which `build` refuses
        if models.has_norm(config.model.name) or (own and config.model.norm != "batch"):
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
        if own:
            self.description["code"] = text_digest("model", config.model.name)
        torch.manual_seed(settings.seed)
        try:
            self.model = models.build(
                config.model.name, dataset.shape, dataset.num_classes, init=config.model.init, **options
            ).to(self.device)
            with told(f"model.name {config.model.name}") if own else nullcontext(), torch.no_grad():
                logits = self.model.eval()(torch.zeros(1, *dataset.shape, device=self.device))
        except RuntimeError as error:
            raise ValueError(
                f"model.name must be a network for images of shape {list(dataset.shape)}, got {config.model.name!r}: "
                f"{error}"
            ) from None
        if not isinstance(logits, Tensor) or logits.shape != (1, dataset.num_classes):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"model.name must be a network that returns logits [N, {dataset.num_classes}], got {got} of "
                f"{config.model.name} for one image"
            )
        self.hidden = models.hidden_of(self.model, config)
        self.model.train()
        if settings.channels_last and len(dataset.shape) != 3:
            raise ValueError(f"training.channels_last must be false for data of shape {list(dataset.shape)}")
        if config.model.center:
            mean: Any = self.model.get_buffer("center.mean")
            mean.copy_(dataset.train.mean_image())
        if settings.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in its stubs
        if config.model.initial is not None:
            self._start_from(Path(config.model.initial))

    def _prepare(self) -> None:
        """The task of the epoch that comes: cross-entropy at first where that is asked for, then the loss."""
        loss = self.config.loss
        if self.epoch < loss.cross_entropy_epochs:
            loss = LossConfig()
        elif loss.kind == "large_margin" and loss.gamma_unit == "median":
            if loss.gamma == "auto":
                raise ValueError("loss.gamma_unit must be absolute with loss.gamma auto, which measures by itself")
            self.measured = self.measured or self.processes.first("the measurement of gamma", self._measured)
            loss = replace(loss, **self.measured, gamma_unit="absolute")
        if loss == self.loss:
            return
        task = objectives.build(self.model, loss, self.hidden, self.dataset.train.bounds)
        self.whole = self.processes.several and objectives.of_the_whole_batch(task)
        self.loss, self.task = loss, task.to(self.device)  # the medians of gamma auto too
        self.step_module: Any = self.task
        if self.config.training.compile:
            self._compile(loss)
        self.step_module = self.processes.wrapped(self.step_module, self.device)

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
        if {**description, "code": None} != {**self.description, "code": None}:
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
        self.processes.first("the writing of config.yaml", self._begin)
        while self.epoch < last and not self.stopped:
            self._prepare()
            record = self._epoch(tick)
            self._check_weights(record)
            self.epoch += 1
            self.history.append(record)
            self._keep(record)
            say(describe(record, self.config.training.epochs))
        if self.folder is not None:
            self._check_weights()
        self.processes.first("the writing of the network", self._end)
        return self.history

    def _begin(self) -> None:
        if self.folder is not None:
            write_text(self.folder / "config.yaml", to_yaml(self.config))

    def _end(self) -> None:
        if self.writer is not None:
            self.writer.flush()
        if self.folder is not None:
            models.save_model(self.folder, self.model, self.description)

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
            with self.processes.phase(f"step {step + 1} of epoch {self.epoch + 1}"):
                loss, right = self.step(index, step)
            loss_sum += loss
            correct += right
            tick(1)
        self.processes.share_buffers(self.model)
        seconds = time.perf_counter() - start
        count = len(self.dataset.train) * self.config.training.repeat
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "lr": rate,
            "train_loss": float(loss_sum) / count,
            "train_accuracy": float(correct) / count,
            "validation_accuracy": math.nan,
            "seconds": seconds,
            "ms_per_step": 1000 * seconds / self.steps_per_epoch,
        }
        with self.processes.phase(f"the validation after epoch {self.epoch + 1}"):
            record["validation_accuracy"] = self.validation_accuracy()
            if self.config.training.distance_samples:
                record["distance"] = self.mean_distance()
        return record

    def step(self, index: Tensor, number: int = 0) -> tuple[Tensor, Tensor]:
        """One optimiser step on the samples `index`, a part of them on each process: (loss summed over all of them,
        number classified correctly)."""
        settings = self.config.training
        self.optimiser.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.precision)
        processes, parts = self.processes, index.chunk(settings.accumulate)
        for number_of_part, part in enumerate(parts, 1):
            own = processes.part(len(part))
            count = own.stop - own.start
            if count == 0 and not self.whole:
                own = slice(0, 1)  # of weight 0: every process takes part in every step
            x, y = self.dataset.train.batch(part[own], self.device)
            x = augmented(x, settings.augment, self.order, own.start, len(part))
            if settings.channels_last:
                x = x.to(memory_format=torch.channels_last)
            with processes.exchanged(self.step_module, number_of_part == len(parts)):
                with torch.autocast(self.device.type, half, enabled=half is not None):
                    out = self.step_module(x, y)
                # the task's loss is a mean over its samples: weigh them by their number, so that a shorter last part
                # counts as its samples do
                mean_over = len(part) if self.whole else count * processes.size
                self.scaler.scale(out["loss"] * (mean_over / len(index))).backward()
            if count or self.whole:
                loss_sum += out["loss"].detach() * mean_over / processes.size
                correct += (out["output"].argmax(1) == y).sum()
        if processes.several:
            loss_sum, correct = processes.sum(torch.stack([loss_sum, correct])).unbind(0)
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

    def validation_accuracy(self) -> float:
        """Share of the validation images that are classified correctly; each process counts a part of them."""
        split = self.dataset.validation
        own = split.part(self.processes.part(len(split)))
        return sum(self.processes.gathered(hits(self.model, own, self.device))) / len(split)

    def mean_distance(self) -> dict[str, float]:
        """Mean signed distance per tap on the first `distance_samples` validation images, of which each process
        measures a part."""
        settings, taps = self.config.training, tap_names(self.hidden)
        p = exponent(settings.distance_p)
        split = self.dataset.validation.head(settings.distance_samples)
        own = split.part(self.processes.part(len(split)))
        found = signed_distance(self.model, own, self.hidden, p, device=self.device) if len(own) else None
        rows = [part for part in self.processes.gathered(found) if part is not None]
        return dict(zip(taps, torch.cat(rows).mean(0).tolist(), strict=True))

    def _keep(self, record: dict[str, Any]) -> None:
        state = None if self.folder is None else self.state()
        self.processes.first(f"the writing of epoch {record['epoch']}", lambda: self._write(record, state))

    def _write(self, record: dict[str, Any], state: dict[str, Any] | None) -> None:
        if self.writer is not None:
            for key, value in row(record).items():
                self.writer.add_scalar(key.replace(".", "/"), value, record["epoch"])
        if self.folder is None or state is None:
            return
        write_csv(self.folder / "metrics.csv", [row(item) for item in self.history])
        write_json(self.folder / "run.json", self.summary().to_dict())
        save_state(self.folder, state)

    def summary(self) -> Run:
        """Everything about the run but its weights."""
        return Run(
            config=self.config,
            network=self.description,
            parameters=sum(p.numel() for p in self.model.parameters()),
            versions=versions(),
            machine=machine(self.device) | ({"processes": self.processes.size} if self.processes.several else {}),
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
        """What `resume` needs to go on as if nothing had happened: "others" holds the random numbers of the processes
        but the first."""
        cuda = self.device.type == "cuda"
        own = {"random": torch.get_rng_state(), "cuda_random": []}
        if cuda:
            several = self.processes.several
            own["cuda_random"] = [torch.cuda.get_rng_state(self.device)] if several else torch.cuda.get_rng_state_all()
        with self.processes.phase("the gathering of the random states"):
            first, *others = self.processes.gathered(own)
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
            "code": self.description.get("code"),
            **first,
            **({"others": others} if others else {}),
        }

    def differs(self) -> str:
        """In what several processes are not one, in words: "" where they are."""
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())
        coupled = "batch norm over the part of a batch that each has, saved with the statistics of process 0"
        ways = [*([coupled] if norms else []), *([f"{self.drawn} of their own"] if self.drawn else [])]
        return f": {', '.join(ways)}" if ways else ""

    @property
    def drawn(self) -> str | None:
        """What each process draws by itself in training, in words."""
        config = self.config
        if is_code(config.model.name):
            return "random numbers of the network"
        if config.model.dropout > 0:
            return "dropout masks"
        if config.loss.kind == "vat":
            return "directions of vat"
        attacked = config.loss.kind == "fgsm_training" and config.loss.adversarial_training.steps > 1
        return "starts of the attack" if attacked else None

    def resume(self) -> int:
        """Continues from the folder's checkpoint; the config must be the one it was written with, but for where it
        runs. Returns the number of processes that wrote it."""
        folder = self.folder
        if folder is None:
            raise ValueError("resume needs the folder of the run")
        state = self.processes.first("the reading of the checkpoint", lambda: load_state(folder))
        self.processes.together("the reading of the checkpoint", lambda: self._take(state))
        self._prepare()
        if self._auto_gamma is not None and self.epoch > self.config.loss.cross_entropy_epochs:
            try:
                self._auto_gamma.load_state_dict(state["auto_gamma"])
            except Exception as error:
                raise models.CheckpointError(
                    f"{folder / 'checkpoint.pt'}: it lacks the medians of gamma auto ({type(error).__name__}); "
                    "start anew with --overwrite."
                ) from error
        return 1 + len(state.get("others", []))

    def _take(self, state: dict[str, Any]) -> None:
        assert self.folder is not None
        try:
            self._restore(state)
        except models.CheckpointError:
            raise
        except Exception as error:  # right keys and wrong contents: torch raises several types
            raise models.CheckpointError(
                f"{self.folder / 'checkpoint.pt'}: not a checkpoint of this run ({type(error).__name__}: {error}); "
                "start anew with --overwrite."
            ) from error

    def _restore(self, state: dict[str, Any]) -> None:
        resumable = set(RESUMABLE)
        if self.config.schedule.name != "cosine" and self.config.training.epochs >= state["epoch"]:
            resumable.add("training.epochs")  # a longer run is the same up to here
        changed = [key for key in differing(complete(state["config"]), to_dict(self.config)) if key not in resumable]
        if changed == ["training.epochs"]:
            raise models.CheckpointError(self._other_epochs(state["config"]["training"]["epochs"], state["epoch"]))
        if changed:
            raise models.CheckpointError(
                f"{self.folder}: the checkpoint was written with other settings ({', '.join(changed)}); "
                "resume with the same config, or start anew with --overwrite."
            )
        if state.get("code") != self.description.get("code"):
            warnings.warn(
                f"{self.folder}: the file of {self.config.model.name} has another text than when the checkpoint was "
                "written: this may be another network from here on",
                stacklevel=2,
            )
        models.check_weights(state["model"], self.model.state_dict())
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        check_optimiser(self.optimiser, fresh_optimiser(self.config, self.device))
        self.scaler.load_state_dict(state["scaler"])
        self.order.set_state(state["order"])
        self._restore_random([state, *state.get("others", [])])
        self.epoch, self.history = state["epoch"], state["history"]
        shape.check(self.history, [shape.EPOCH], "history")
        if type(self.epoch) is not int or self.epoch != len(self.history):
            raise ValueError(f"{self.epoch} epochs, but the history of {len(self.history)}")
        self.measured = state.get("measured", {})
        shape.check(self.measured, {"gamma?": [shape.NUMBER], "layer_weights?": [shape.NUMBER]}, "measured")
        if not set(self.measured) <= {"gamma", "layer_weights"}:
            raise ValueError(f"measured must be gamma and layer_weights, got {', '.join(self.measured)}")

    def _other_epochs(self, before: int, reached: int) -> str:
        """Why the run cannot go on to the epochs that are asked for, and what can be done."""
        asked = self.config.training.epochs
        if asked < reached:
            return f"{self.folder}: training.epochs must be at least {reached}, which are trained already, got {asked}"
        return (
            f"{self.folder}: training.epochs must be {before}, got {asked}: the learning rate of a cosine schedule is "
            f"0 after {before} epochs, and a run of {asked} has other rates from the first step on. Start anew with "
            f"--overwrite, or train on from these weights with a cosine of its own: --model.initial {self.folder} in "
            "another --out. Schedules constant, step and exponential can be extended, bit for bit"
        )

    def _restore_random(self, states: list[dict[str, Any]]) -> None:
        """The random numbers of this process, of `states` that stand for one process each."""
        if len(states) != self.processes.size:
            if self.drawn is None:
                return
            raise models.CheckpointError(
                f"{self.folder}: the checkpoint is of {len(states)} processes, which draw {self.drawn} of their own; "
                f"resume with --nproc-per-node {len(states)} instead of {self.processes.size}, or start anew with "
                "--overwrite."
            )
        own = states[self.processes.rank]
        torch.set_rng_state(own["random"])
        if self.device.type == "cuda" and own["cuda_random"]:
            if self.processes.several:
                torch.cuda.set_rng_state(own["cuda_random"][0], self.device)
            else:
                torch.cuda.set_rng_state_all(own["cuda_random"])

    def _tensorboard(self) -> None:
        if not self.config.training.tensorboard or self.folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                'training.tensorboard needs a package: pip install "margin_kernels[tensorboard]"'
            ) from error
        self.writer = SummaryWriter(str(self.folder / "tensorboard"))


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

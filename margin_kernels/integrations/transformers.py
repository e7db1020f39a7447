"""MarginTrainer: transformers.Trainer with a margin loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..task import MarginTask
from . import missing

try:
    import transformers
    from safetensors.torch import load_file, save_file  # transformers needs it too
except ModuleNotFoundError as error:
    raise missing("transformers", error) from error

# Beside the weights of a checkpoint: the medians of gamma="auto".
STATE = "margin_task.safetensors"
# What transformers counts as no label.
IGNORED = -100


class MarginTrainer(transformers.Trainer):
    """transformers.Trainer for classifiers, whose loss is a margin loss.

        trainer = MarginTrainer(model, args, loss=LargeMarginLoss(...), layers=("vit.encoder.layer.*",), ...)
        trainer.train()

    The model that is saved and evaluated is the plain one: checkpoints have its keys. Gradient accumulation and several
    processes give the mean over all labels of a step that are not -100, as transformers counts them. `evaluate` runs
    without gradients: eval_loss is then the part of the loss that the logits and the last layer show, or with
    measure=True all of it, for the passes of the norms.

    Args:
        args: positional arguments of Trainer: model, args, ...
        loss: a loss of margin_kernels.losses with reduction="mean" and ignore_index=-100; "sum" is left as it is
        layers: taps, as of MarginTask. Models of tokens need a module that returns an activation, the embedding, say.
        task_options: of MarginTask: passes, batchnorm, batch_dim, output, ...
        measure: whether `evaluate` measures everything
        options: of Trainer

    Raises:
        ValueError: options that cannot hold together: FSDP, DeepSpeed, DataParallel, torch_compile, compute_loss_func,
            label smoothing here and in the loss, class weights with gradient accumulation, causal language models.
    """

    def __init__(
        self,
        *args: Any,
        loss: nn.Module,
        layers: Sequence[str] | str | None = None,
        task_options: dict[str, Any] | None = None,
        measure: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.margin_loss: Any = loss
        self.layers, self.task_options = layers, dict(task_options or {})
        self.measure = measure
        self._check_options()
        # num_items_in_batch is counted, and the loss is scaled by it here, whatever the model's forward takes.
        self.model_accepts_loss_kwargs = True
        self._task: MarginTask | None = None
        self._measured: dict[str, Tensor] = {}
        self._loading: str | None = None  # the folder of the checkpoint that is loaded
        _ = self.task  # wrong layers are told now

    @property
    def task(self) -> MarginTask:
        """The MarginTask of the model."""
        if self._task is None or self._task.model is not self.model:
            self._task = MarginTask(self.model, self.margin_loss, self.layers, **self.task_options)
            if self._task.auto_gamma is not None:
                self._task.auto_gamma.to(next(self.model.parameters()).device)
        return self._task

    def _check_options(self) -> None:
        loss = self.margin_loss
        smoothing = self.args.label_smoothing_factor
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("args must be without FSDP and DeepSpeed: a MarginTask is sharded by fully_shard_task")
        if self.args.n_gpu > 1:
            raise ValueError("DataParallel is not supported: start one process for each GPU with torchrun")
        if self.args.torch_compile:
            raise ValueError("torch_compile must be False: call trainer.task.compile()")
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func must be None: the loss is `loss`")
        if self._loss_shifts_labels:
            raise ValueError(f"model must be a classifier, got {type(self.model).__name__}, which predicts next tokens")
        if getattr(loss, "reduction", "mean") == "none":
            raise ValueError('the reduction of the loss must be "mean" or "sum", got "none"')
        if getattr(loss, "ignore_index", IGNORED) != IGNORED:
            raise ValueError(f"ignore_index must be {IGNORED}, which transformers counts by, got {loss.ignore_index}")
        if getattr(loss, "class_weight", None) is not None:
            # Its mean is over the weights, of which transformers counts nothing.
            if self.args.gradient_accumulation_steps > 1:
                raise ValueError("gradient_accumulation_steps must be 1 with class_weight")
            if self.accelerator.num_processes > 1 and getattr(loss, "process_group", None) is None:
                raise ValueError('process_group must be "world" with class_weight and several processes, got None')
        if smoothing:
            if getattr(loss, "label_smoothing", None) != 0:
                raise ValueError(
                    f"label_smoothing_factor must be 0, got {smoothing}: "
                    f"{type(loss).__name__} has {getattr(loss, 'label_smoothing', 'none')} of its own"
                )
            self.margin_loss = copy.deepcopy(loss)  # that of the caller stays as it is
            self.margin_loss.label_smoothing = smoothing

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        """In training the task is what is called and, with several processes, wrapped."""
        if not training or self.accelerator.unwrap_model(model) is self.task:
            return super()._wrap_model(model, training, *args, **kwargs)
        return self.accelerator.prepare_model(self.task)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch, its share of the mean over the labels of the whole step, and {"logits": [N,C]}."""
        given = dict(inputs)
        name = self.label_names[0] if self.label_names else "labels"
        if given.get(name) is None:
            raise ValueError(f"inputs must hold {name!r} for a margin loss, got {sorted(given)}")
        labels = given.pop(name)
        if torch.is_grad_enabled():
            task = model if isinstance(self.accelerator.unwrap_model(model), MarginTask) else self.task
            out = task(**given, target=labels)
            self._measured = self.task.log(out)
        elif self.measure:
            with self.accelerator.autocast():
                out = self.task.evaluate(**given, target=labels)
        else:
            out = self.task(**given, target=labels)
        loss = out["loss"]
        if num_items_in_batch is not None and getattr(self.margin_loss, "reduction", "mean") == "mean":
            loss = loss * self._share(labels, num_items_in_batch).to(loss)
        return (loss, {"logits": out["output"]}) if return_outputs else loss

    def _share(self, labels: Tensor, items: Tensor | int) -> Tensor:
        """What the mean over a batch counts in the mean over `items` labels. These are those of all processes, or of
        this one without average_tokens_across_devices; DistributedDataParallel takes the mean over the processes."""
        own = labels.ne(IGNORED).sum().double()
        if not self.args.average_tokens_across_devices or self.accelerator.num_processes == 1:
            return own / items
        if getattr(self.margin_loss, "process_group", None) is not None and torch.is_grad_enabled():
            # The mean is that of all processes already; without gradients each has its own.
            return self.accelerator.reduce(own, "sum") / items
        return own * self.accelerator.num_processes / items

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As Trainer's, with what the last training step measured beside its loss, as "margin/NAME"."""
        if "loss" in logs:
            logs = {**logs, **{f"margin/{name}": float(v) for name, v in self._measured.items() if name != "loss"}}
        super().log(logs, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The plain model, as Trainer saves it, and beside it the medians of gamma="auto"."""
        super().save_model(output_dir, _internal_call)
        if self.task.auto_gamma is not None and self.args.should_save:
            save_file(self.task.auto_gamma.state_dict(), Path(output_dir or self.args.output_dir) / STATE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._loading = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / STATE
        if self.task.auto_gamma is not None and path.is_file():
            self.task.auto_gamma.load_state_dict(load_file(path))

    def _load_best_model(self) -> None:
        self._loading = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Trainer has loaded the weights whose names it knows. transformers 5 saves some models, ViT for one, under the
        names of the hub, which from_pretrained translates and Trainer does not: it goes on with drawn weights."""
        if load_result.missing_keys and isinstance(self.model, transformers.PreTrainedModel) and self._loading:
            saved = type(self.model).from_pretrained(self._loading, config=self.model.config, dtype=self.model.dtype)
            self.model.load_state_dict(saved.state_dict())
        else:
            super()._issue_warnings_after_load(load_result)

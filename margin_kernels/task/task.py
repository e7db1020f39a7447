"""Model and loss as one module: what is trained, wrapped by DDP and saved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..batchnorm import running_statistics, training_batchnorms
from ..gradients.choose import check_passes
from ..gradients.loop import cut_sources
from ..gradients.request import Captured
from ..gradients.split import Trials
from ..process_group import WORLD, Agreement, Group, alone, several
from ..random_state import RandomState
from ..replay import ReplayedModel
from ..sharding import check_holders, is_sharded, logits_without_graph, whole, whole_logits
from ..tracing import tracing
from .arguments import Arguments
from .auto_gamma import AutoGamma, Held
from .batch import Batch, Batches, ignored_by, usable
from .capture import Taps, in_graph
from .exclusive import check_unchanged, exclusive
from .explain import Explanation, explained
from .layout import Layout, seen_from
from .log import flat
from .reading import Inputs, Reading, check_not_transformed
from .sharded import Sharded
from .sharded import check_model as check_sharding
from .without_gradients import End, watching_the_end

BATCHNORM = ("batch", "frozen")
# What a loss is given besides logits and targets: the taps of the forward pass, nothing, or the model and its input.
NEEDS = ("taps", "logits", "model")
# Modules that make several processes train one model -> what to do with a task instead.
WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel(task)",
    "FullyShardedDataParallel": "margin_kernels.distributed.fully_shard_task(task), or DistributedDataParallel(task)",
}
# What torch.compile(task) does.
COMPILE = "torch.compile cannot follow the gradients that a step takes, and runs it as it is; task.compile() can"


class MarginTask(nn.Module):
    """A classifier together with its margin loss: one forward gives loss, logits and margin statistics.

        task = MarginTask(model, LargeMarginLoss(gamma=1.0), layers=("input", "layer3.*", "output"))
        task(x, y)["loss"].backward()

    Args:
        model: nn.Module, model(x) -> logits [N,C]. Not compiled and not wrapped: compile or wrap the task. Logits of
            other shapes, as of one logit or of many positions: see `forward`.
        loss: a loss of margin_kernels.losses.
        layers: the taps: names of modules as in model.named_modules(), glob patterns (`*` stays within one part of a
            dotted name, `**` crosses dots), "input" (the model's input, "input[1]" or "input[image]" where it has
            several floating-point ones), "output" (the logits), "name:index" for one call of a module called several
            times. Default: the input alone, the margin that input perturbations meet.
            Only for losses that measure at taps.
            `task.layers` holds the resolved names, in the order of the last dimension of distance and norm.
        passes: how losses that measure at taps come to their gradients (margin_kernels.gradients). `explain` says what
            a step does and why.
            "loop": one activation-only backward pass for each competitor, and the ordinary backward of the loss.
            "split": the gradients of the parameters from those that the passes found, half a backward pass less, for
            top_k = 1 the cost of cross-entropy. The loss can then be differentiated in the parameters and in tensors
            that enter the model with a graph of their own, and not in activations. Needs no cross-entropy term (but
            with competitors="soft", auxiliary="pairwise" or all competitors), samples that do not interact between taps
            and logits, no hooks on activations, and the compiled extension; with second_order=True, as with
            MarginSensitivityLoss, also one competitor and a network that is linear piece by piece, 4 F instead of 6 F.
            By name it also takes operations of which nothing is known: at steps 1, 2, 4, 8, ... and every 1024th a
            random half of the batch is set to zero, on all processes alike, and where the other half notices it
            ValueError is raised.
            "auto": split where the graph of the forward pass proves it exact and top_k is at most 2, beyond which
            it is not faster; else loop.
        batchnorm: for models with batch norm in training mode, where samples are coupled and the gradient of a summed
            gap is not the gradient of each gap. "batch": as the papers, ignore it (a warning, once); "frozen": norms
            are measured on a second forward pass with running statistics and the same dropout masks.
        batch_dim: which dimension of a tap is the batch, where the graph does not show it: a number for all taps, or
            {"name": number}. Time-major layers, windows and heads are found by themselves.
        output: where the logits are in what the model returns: a key, an attribute or a position. None: it returns
            them, or something with `.logits` or the key "logits".
        call: `call(model, *args, **kwargs)` in the place of `model(*args, **kwargs)`, for what a batch is to become.
        class_dim: 1 or -1, where logits of more than two dimensions have their classes; None: as the shape of the
            targets shows, and where a batch does not show it, as an earlier one did.
        positions: of models that predict at many positions, how many of each sample the margin is measured at; they are
            drawn anew in each step, and each costs the passes of one prediction.

    Hooks of yours on activations and modules run once, in the backward of the loss, not in the passes (with the
    compiled extension). One model may be used by several threads at once, each with a task of its own; not with
    AdversarialMarginLoss or batchnorm="frozen", which change it meanwhile and say so.

    Raises:
        ValueError: unknown layers or options, a compiled model, DataParallel; in forward, taps that cannot be measured,
            passes="split" where it is not possible, with the reason.

    The state dict holds the model under "model."; load_state_dict also takes that of the plain model, which
    task.model.state_dict() gives. Hooks exist during a forward only.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        layers: Sequence[str] | str | None = None,
        passes: str = "auto",
        batchnorm: str = "batch",
        batch_dim: int | Mapping[str, int] | None = None,
        output: str | int | None = None,
        call: Callable[..., Any] | None = None,
        class_dim: int | None = None,
        positions: int | None = None,
    ) -> None:
        super().__init__()
        if class_dim not in (None, 1, -1):
            raise ValueError(f"class_dim must be 1 or -1, got {class_dim!r}")
        if positions is not None and (not isinstance(positions, int) or isinstance(positions, bool) or positions < 1):
            raise ValueError(f"positions must be an integer >= 1, got {positions!r}")
        if batchnorm not in BATCHNORM:
            raise ValueError(f'batchnorm must be one of "batch", "frozen", got {batchnorm!r}')
        _check_model(model)
        if getattr(loss, "needs", None) not in NEEDS:
            raise TypeError(f"loss must be a loss of margin_kernels.losses, got {type(loss).__name__}")
        check_passes(passes)
        if loss.needs != "taps":
            without: dict[str, Any] = {
                "layers": (layers, None),
                "passes": (passes, "auto"),
                "positions": (positions, None),
            }
            without |= {"batchnorm": (batchnorm, "batch"), "batch_dim": (batch_dim, None)}
            for name, (given, default) in without.items():
                if given != default:
                    raise ValueError(
                        f"{name} must be {default!r} for {type(loss).__name__}, which measures at no tap, got {given!r}"
                    )
        self.model = model
        self.loss: Any = loss
        self.passes = passes
        self.batchnorm = batchnorm
        self._reading = Reading(output, call)
        self._arguments = Arguments(self._reading)
        self._batches = Batches(class_dim, positions)
        self._taps = Taps(model, ("input",) if layers is None else layers, batch_dim)
        # With gamma="auto", in the state dict.
        self.auto_gamma = AutoGamma(len(self.layers)) if getattr(loss, "gamma", None) == "auto" else None
        self._trials = Trials()
        self._explained: Explanation | None = None
        self._warned = False
        self._told = False  # that a loss without gradients has nothing to measure
        self._checked = False  # whether logits without a graph are known to be whole
        self._compiled: Any = None
        # The class of the task when it was last looked at, which fully_shard changes, and what its steps do then.
        self._shards: tuple[type, Sharded | None] | None = None
        self.register_load_state_dict_pre_hook(_from_plain_model)

    @property
    def batch_dim(self) -> dict[str, int] | None:
        """Name of a tap -> its batch dimension, of those that were given."""
        return self._taps.batch_dim or None

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the taps, in the order of the last dimension of distance and norm; () where the loss has none."""
        return self._taps.names if self.loss.needs == "taps" else ()

    def forward(
        self, *args: Any, target: Tensor | None = None, sample_weight: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Loss and statistics of a batch: task(x, y), or task(*args, target=y, **kwargs) with the model's arguments.
        Of several positional arguments the last is the target, where it has no name: name it beside several inputs.

            logits             target
            [N,C]              [N] int64, or soft targets [N,C] >= 0 that sum to 1 (mixup, distillation)
            [N] or [N,1]       one logit f, classes z = (0, f): [N] or [N,1], 0/1, -1/+1, or floating in [0, 1]
            [N,C,*S], [N,T,C]  [N,*S], [N,T], or soft targets of the shape of the logits: a prediction at each position

        sample_weight [N] >= 0, for predictions at positions also of the shape of the target, multiplies the terms of a
        sample, and is what it counts in a mean.

        Returns a dict: loss [] ([N] for reduction="none") and output (the model's logits) with gradient, target (the
        label [N], of soft targets the largest class) and the other fields that the loss measured, detached. For
        LargeMarginLoss: distance, norm, active (bool) [N,k,L], gap and competitor [N,k], nll and valid [N]; for every
        loss the fields of what its `statistics` returns. At positions: [N,P] in the place of [N], `position` [N,P] says
        which, nll, valid and `all_targets`, the labels, have the shape of the target. `log` makes scalars of them.

        Under no_grad and inference_mode: output, what the logits alone show, and loss, of its terms those that need no
        backward pass: cross-entropy, and margins at the output, the final layer's input and the pooling before it,
        relative to the weights of these layers. Where others are missing, `partial` is True; `evaluate` measures all.
        Without a target: the output alone.
        """
        if getattr(self, "_is_replica", False):
            raise ValueError("DataParallel is not supported: wrap the task in DistributedDataParallel")
        inputs, target = self._arguments.split(self.model, args, kwargs, target)
        if target is None:
            return {"output": self._reading(self.model, inputs)}
        if torch.compiler.is_exporting():
            raise ValueError("a training step cannot be exported: torch.export.export(task.model, (x,)) has the logits")
        if torch.compiler.is_dynamo_compiling() and self.loss.needs != "logits":
            return self._without_torch_compile(inputs, target, sample_weight)
        if not tracing():
            check_not_transformed()
        if not torch.is_grad_enabled():
            return self._without_gradients(inputs, whole(target), whole(sample_weight))
        if self._compiled is not None and not tracing():
            if is_sharded(self):
                raise ValueError(
                    "a sharded task cannot be compiled: use DistributedDataParallel(task), or do not compile"
                )
            return self._compiled(self, inputs, target, sample_weight)
        return self.uncompiled(inputs, target, sample_weight)

    def _without_torch_compile(self, inputs: Inputs, y: Tensor, sample_weight: Tensor | None) -> dict[str, Any]:
        """`forward` under torch.compile(task), which cannot follow gradients that are taken inside it: as it is."""
        torch._dynamo.graph_break(msg=COMPILE)  # what fullgraph=True is refused with
        plain = torch.compiler.disable(self._told_to_compile, reason=COMPILE)
        found: dict[str, Any] = plain(inputs, y, sample_weight)
        return found

    def _told_to_compile(self, inputs: Inputs, y: Tensor, sample_weight: Tensor | None) -> dict[str, Any]:
        warnings.warn(COMPILE, stacklevel=3)
        return self.forward(*inputs.args, target=y, sample_weight=sample_weight, **inputs.kwargs)

    def uncompiled(self, inputs: Inputs, y: Tensor, sample_weight: Tensor | None = None) -> dict[str, Any]:
        """`forward` with gradients, as it is without `compile`."""
        sharded = None
        if not tracing():
            check_unchanged(self.model)
            sharded = self.prepare_sharded()
        if sharded is not None:
            sharded.begin()
        y, sample_weight = whole(y), whole(sample_weight)
        if self.loss.needs == "logits":
            made = whole_logits(self._reading(self.model, inputs))
            batch = self._batches.of(self.loss, made, y, sample_weight)
            self._check_together(batch, sharded)
            measured = self.loss.statistics(*batch.given, **batch.weights)
        elif self.loss.needs == "model":
            made, batch, measured = self._around_model(inputs, y, sample_weight, sharded)
        else:
            try:
                made, captured = self._forward(inputs)
                batch, captured = self._batches.at_taps(self.loss, made, captured, y, sample_weight)
            except Exception as error:
                self._tell(error, y, sharded)
                raise
            how = {"medians": self.auto_gamma} if self.auto_gamma is not None else {}
            with self._agreeing(sharded, captured):
                self._check_together(batch, sharded)
                measured = self._measured(batch, captured, self.passes, trials=self._trials, **how)
        if sharded is not None:
            measured = measured._replace(loss=sharded.attach(measured.loss))
        return batch.fields(made, measured._asdict())

    def _measured(self, batch: Batch, captured: Captured, passes: str, **how: Any) -> Any:
        """What a loss on taps says of a batch and its forward pass."""
        if batch.position is not None:
            how["everywhere"] = batch.all_rows
        return self.loss.statistics(*batch.given, captured, passes, **batch.weights, **how)

    def _around_model(
        self, inputs: Inputs, y: Tensor, sample_weight: Tensor | None, sharded: Sharded | None
    ) -> tuple[Tensor, Batch, Any]:
        """A step of a loss that runs the model itself: logits, the batch, and what the loss measured."""
        x = inputs.floating()
        # As many forwards on every process; and what stands beside x is of the whole batch.
        everyone = sharded is not None or len({id(tensor) for tensor in inputs.tensors()}) > 1
        batches: list[Batch] = []

        def function(point: Tensor) -> Tensor:
            made = whole_logits(self._reading(self.model, inputs.with_tensor(x, point)))
            if not batches:
                batches.append(self._batches.of(self.loss, made, y, sample_weight))
                outputs.append(made)
                return batches[0].rows.logits
            return Layout(batches[0].layout.class_dim, made.shape).classes(made)

        outputs: list[Tensor] = []
        with exclusive(self.model), nullcontext() if sharded is None else sharded.passes(True, False):
            replayed = ReplayedModel(self.model, x, function)
            source, sources = in_graph(x)
            logits = replayed.first(source)
            (batch,), (made,) = batches, outputs
            self._check_together(batch, sharded)
            how = {"whole_batch": True} if everyone else {}
            measured = self.loss.statistics(*batch.given, self.model, x, replayed, source, **how, **batch.weights)
            if measured.loss.requires_grad:
                cut_sources(measured.loss, Captured(logits, [], sources=sources))
        return made, batch, measured

    def _without_gradients(self, inputs: Inputs, y: Tensor, sample_weight: Tensor | None) -> dict[str, Any]:
        """`forward` under no_grad."""
        # Tensors of inference mode have no versions, by which the end of the network is found.
        with torch.inference_mode(False), torch.no_grad():
            inputs, y, sample_weight = usable((inputs, y, sample_weight))
            looking = self.loss.needs == "taps"
            with watching_the_end(self.model, self._taps) if looking else nullcontext() as end:

                def run() -> Tensor:
                    return self._reading(self.model, inputs)

                made = whole(run()) if self._checked else logits_without_graph(self.model, run)
            self._checked = True
            layout = self._batches.layout(made, y)
            batch = Batch(layout, rows := layout.rows(made, y, sample_weight, ignored_by(self.loss)), rows)
            found = self.loss.logit_statistics(*batch.given, **batch.weights)
            partial = self.loss.needs != "logits"
            if end is not None and not layout.dense:
                loss, partial = self._near_the_end(batch, made, end)
                found |= {} if loss is None else {"loss": loss}
            found |= {"partial": True} if partial else {}
            return batch.fields(made, found)

    def _near_the_end(self, batch: Batch, made: Tensor, end: End) -> tuple[Tensor | None, bool]:
        """The loss with the margins that need no backward pass, and whether others are missing."""
        captured = end.captured(made)
        if captured is None:
            if getattr(self.loss, "cross_entropy_weight", 1) == 0 and not self._told:
                self._told = True
                warnings.warn(
                    "the loss without gradients is 0: it has no cross-entropy, and no tap near the logits, where "
                    "margins need no backward pass; evaluate() measures all",
                    stacklevel=5,
                )
            return None, True
        if batch.rows.logits is not made:
            with torch.enable_grad():
                captured = seen_from(captured, (), batch.layout.classes(captured.logits))
        how = {"medians": Held(self.auto_gamma)} if self.auto_gamma is not None else {}
        with alone():
            measured = self._measured(batch, captured, "loop", **how)
        return measured.loss.detach(), len(captured.taps) < len(self.layers)

    def evaluate(
        self, *args: Any, target: Tensor | None = None, sample_weight: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What `forward` returns, with every margin measured, under no_grad and inference_mode too; all detached.

        The passes to the taps run with gradients enabled inside. No graph is left, parameters get no gradient, and
        gamma="auto" learns nothing; with a process_group the loss is that of this process's batch. The model runs in
        the mode in which it is: call task.eval() before, and task.train() after.

        Raises:
            ValueError: as forward, and for a task that is sharded.
        """
        inputs, y = self._arguments.split(self.model, args, kwargs, target)
        if y is None:
            raise ValueError("evaluate takes the model's arguments and a target: evaluate(x, y), evaluate(x, target=y)")
        if is_sharded(self):
            raise ValueError(
                "evaluate takes a task that is not sharded: load its state dict into a plain one, or take task(x, y) "
                "under torch.no_grad()"
            )
        with torch.inference_mode(False), alone():
            inputs, y, sample_weight = usable((inputs, whole(y), whole(sample_weight)))
            if self.loss.needs != "taps":
                with torch.no_grad():
                    if self.loss.needs == "model":
                        made, batch, measured = self._around_model(inputs, y, sample_weight, None)
                    else:
                        made = whole(self._reading(self.model, inputs))
                        batch = self._batches.of(self.loss, made, y, sample_weight)
                        measured = self.loss.statistics(*batch.given, **batch.weights)
            else:
                with torch.enable_grad():
                    made, captured = self._forward(inputs)
                    batch, captured = self._batches.at_taps(self.loss, made, captured, y, sample_weight)
                    how = {"medians": Held(self.auto_gamma)} if self.auto_gamma is not None else {}
                    captured.measuring = True
                    measured = self._measured(batch, captured, "loop", **how)
            found = batch.fields(made, measured._asdict())
        return {name: value.detach() if isinstance(value, Tensor) else value for name, value in found.items()}

    def log(self, out: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scalars of what a step or `evaluate` returned, for a logger: each a tensor [] in float32 without a graph, on
        its device, so that nothing waits until it is read.

        loss, or with reduction="none" its mean;  nll and accuracy, over the samples, or predictions at positions, that
        count;  for each tap
        "distance/NAME", the mean distance to the nearest competitor, and "active/NAME", the share of samples with an
        active term, over those that are not degenerate;  degenerate, their number;  the loss's other fields as means
        """
        return flat(out, self.layers, self._batches.class_dim)

    def with_loss(self, loss: nn.Module) -> MarginTask:
        """A task of the same model, layers and options with another loss at taps; not compiled."""
        reading, batches = self._reading, self._batches
        return MarginTask(
            self.model,
            loss,
            self.layers,
            self.passes,
            self.batchnorm,
            self.batch_dim,
            reading.output,
            reading.call,
            batches.class_dim,
            batches.positions,
        )

    def compile(self, **options: Any) -> None:
        """From now on a training step is one compiled graph, gradients of the parameters included; in place, as
        nn.Module.compile. Before it is saved, copied or wrapped in DistributedDataParallel, or after.

            task.compile(mode="max-autotune")
            task(x, y)["loss"].backward()

        The first step of each kind (shapes, train or eval, options of the loss, autocast) is compiled, others run. The
        gradients are computed with the loss: they are those of `loss` alone, and a term of your own on `output` raises
        an error in backward. What a module reads from Python, and is none of these, stays as it was at the first step.

        Args:
            options: of torch.compile: mode, backend, dynamic, options.

        Raises:
            ValueError: in forward, for a step that reads values of tensors, dropout under AdversarialMarginLoss or
                batchnorm="frozen", reduction="none".
        """
        from .compiled import CompiledStep  # what it imports takes a second

        self._compiled = CompiledStep(options)

    def explain(
        self, *args: Any, target: Tensor | None = None, sample_weight: Tensor | None = None, **kwargs: Any
    ) -> Explanation:
        """Which strategy a step on this batch takes, its reason, all that is known against the others, its cost in
        passes, the backend of every op and the memory that the strategy records. Arguments as those of `forward`. Runs
        one forward pass and the passes of the loss; gradients, buffers and random numbers stay as they are."""
        if is_sharded(self):
            raise ValueError("explain takes a task that is not sharded: ask before fully_shard_task")
        inputs, y = self._arguments.split(self.model, args, kwargs, target)
        if y is None:
            raise ValueError("explain takes the model's arguments and a target: explain(x, y), explain(x, target=y)")
        random = RandomState.now(inputs.tensors())
        buffers = [(buffer, buffer.clone()) for buffer in self.buffers()]
        try:
            with torch.enable_grad(), random.replayed():
                self._explained = explained(self, inputs, whole(y), whole(sample_weight))
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
        return self._explained

    def extra_repr(self) -> str:
        if self.loss.needs != "taps":
            return ""
        found = self._explained
        strategy = "explain(x, y) says" if found is None else f"{found.strategy}, as explain(x, y) found"
        return f"layers={self.layers}, passes={self.passes!r}, batchnorm={self.batchnorm!r}, strategy: {strategy}"

    def __getstate__(self) -> dict[str, Any]:
        """Without compiled code, which is made again, and without what was tried out on this model."""
        state = dict(super().__getstate__())
        state["_trials"], state["_shards"] = Trials(), None
        if self._compiled is not None:
            state["_compiled"] = type(self._compiled)(self._compiled.options)
        return state

    def _forward(self, inputs: Inputs) -> tuple[Tensor, Captured]:
        """The logits of the ordinary forward pass, and the forward pass whose taps are measured."""
        with exclusive(self.model) if self.batchnorm == "frozen" else nullcontext():
            training = training_batchnorms(self.model)
            if training and self.batchnorm == "frozen":
                with running_statistics(training), RandomState.now(inputs.tensors()).replayed():
                    captured = self._taps.capture(self.model, inputs, self._reading)
                return whole_logits(self._reading(self.model, inputs)), captured
            if training:
                self._check_coupling(training)
            captured = self._taps.capture(self.model, inputs, self._reading)
            return captured.logits, captured

    def prepare_sharded(self) -> Sharded | None:
        """What a step does for fully_shard, where the task is sharded; made when it is, or in the first forward."""
        if self._shards is None or self._shards[0] is not type(self):
            if is_sharded(self):
                self._shards = type(self), Sharded(self)
            else:
                check_sharding(self.model)
                self._shards = type(self), None
        return self._shards[1]

    def _agreeing(self, sharded: Sharded | None, captured: Captured) -> AbstractContextManager[None]:
        """Around the passes of a step that several processes take alike: what refuses it on one is an error on all."""
        if sharded is None:
            group = Group(self.loss.process_group if self.passes == "split" and not tracing() else None)
            if group.size == 1:
                return nullcontext()
            agreement = Agreement([group])
            captured.agree = agreement.agree
            return agreement.step()
        captured.agree = sharded.agree
        head = None if captured.head is None else f"model.{self._taps.head}".rstrip(".")
        return sharded.passes(self.loss.second_order, True, head)

    def _check_together(self, batch: Batch, sharded: Sharded | None) -> None:
        """The errors that a loss has with its options and these targets, before other processes wait for this one.
        Values are read on the CPU alone, so that a GPU has none."""
        if sharded is None and not several():
            return
        logits, target = batch.given

        def check() -> None:
            with torch.no_grad():
                self.loss.numbers(len(self.layers))
                self.loss.logit_statistics(logits.detach(), target, **batch.weights)

        check_holders(logits, self.loss.group())
        for group in self._waiting(target, sharded):
            group.checked(check)

    def _tell(self, error: Exception, y: Tensor, sharded: Sharded | None) -> None:
        """An error of the forward pass, where the other processes are at `_check_together`."""

        def failed() -> None:
            raise error

        for group in self._waiting(y, sharded):
            group.checked(failed)

    def _waiting(self, y: Tensor, sharded: Sharded | None) -> list[Group]:
        """The processes that wait for this one's check of a batch."""
        groups = [] if sharded is None else sharded.agreement.groups
        if not groups and not tracing():
            groups = [Group(self.loss.process_group or (None if self.auto_gamma is None else WORLD))]
        return groups if y.device.type == "cpu" and any(group.size > 1 for group in groups) else []

    def _check_coupling(self, training: list[_BatchNorm]) -> None:
        if self.loss.second_order and any(isinstance(module, nn.SyncBatchNorm) for module in training):
            raise ValueError(
                "SyncBatchNorm in training mode cannot be differentiated twice: use second_order=False, or "
                'batchnorm="frozen"'
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                "batch norm in training mode couples the samples of a batch, so the gradients of the margins are not "
                'those of single samples; batchnorm="frozen" measures them with running statistics in a second forward',
                stacklevel=4,
            )


def _from_plain_model(task: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Makes the keys of a plain model those of a task; the medians of gamma="auto" then stay as they are."""
    assert isinstance(task, MarginTask)
    plain = [prefix + name for name in task.model.state_dict()]
    own = {name: f"{prefix}model.{name.removeprefix(prefix)}" for name in plain}
    # A model whose own names begin with "model." has both: then most decide.
    if sum(name in state for name in own) <= sum(name in state for name in own.values()):
        return
    found = {own[name]: state.pop(name) for name in plain if name in state}
    if task.auto_gamma is not None:
        found |= {f"{prefix}auto_gamma.{name}": value for name, value in task.auto_gamma.state_dict().items()}
    state.update(found)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise ValueError("DataParallel is not supported: wrap the task in DistributedDataParallel")
    check_sharding(model)
    for name, module in model.named_modules():
        where = f"its module {name!r}" if name else "it"
        wrapper = type(module).__name__
        # By name: importing torch._dynamo for the class, or the distributed packages, would take seconds.
        if wrapper in WRAPPERS:
            raise ValueError(
                f"model must not be wrapped in {wrapper}, whose hooks take the margin's backward passes for those of a "
                f"step, but {where} is: wrap the task, {WRAPPERS[wrapper]}"
            )
        if wrapper == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(f"model must not be compiled, but {where} is: compile the task, not the model")

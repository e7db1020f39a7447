"""Model and loss as one module: what is trained, wrapped by DDP and saved."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import functional
from ..backends import choose as backend_of
from ..batchnorm import running_statistics, training_batchnorms
from ..gradients.choose import check_passes, choose, reasons
from ..gradients.loop import cut_sources
from ..gradients.plan import make_plan
from ..gradients.request import Captured
from ..gradients.split import Split, Trials
from ..process_group import WORLD, Agreement, Group
from ..random_state import RandomState
from ..replay import ReplayedModel
from ..sharding import check_holders, is_sharded, logits_without_graph, whole, whole_logits
from ..tracing import tracing
from .auto_gamma import AutoGamma
from .capture import Taps, in_graph
from .exclusive import check_unchanged, exclusive
from .explain import Explanation
from .sharded import Sharded
from .sharded import check_model as check_sharding

BATCHNORM = ("batch", "frozen")
# What a loss is given besides logits and targets: the taps of the forward pass, nothing, or the model and its input.
NEEDS = ("taps", "logits", "model")
# The ops that a loss calls, by what it needs.
OPS_OF = {
    "taps": ("competitors", "dual_norm", "row_distance", "margin_hinge"),
    "logits": ("competitors", "one_to_n"),
    "model": ("competitors", "dual_norm", "deepfool_step"),
}


# Modules that make several processes train one model -> what to do with a task instead.
WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel(task)",
    "FullyShardedDataParallel": "margin_kernels.distributed.fully_shard_task(task), or DistributedDataParallel(task)",
}


class MarginTask(nn.Module):
    """A classifier together with its margin loss: one forward gives loss, logits and margin statistics.

        task = MarginTask(model, LargeMarginLoss(gamma=1.0), layers=("input", "layer3.*", "output"))
        task(x, y)["loss"].backward()

    Args:
        model: nn.Module, model(x) -> logits [N,C]. Not compiled and not wrapped: compile or wrap the task.
        loss: a loss of margin_kernels.losses.
        layers: the taps: names of modules as in model.named_modules(), glob patterns (`*` stays within one part of a
            dotted name, `**` crosses dots), "input" (the model's input), "output" (the logits), "name:index" for one
            call of a module called several times. Default: the input alone, the margin that input perturbations meet.
            Only for losses that measure at taps.
            `task.layers` holds the resolved names, in the order of the last dimension of distance and norm.
        passes: how losses that measure at taps come to their gradients (margin_kernels.gradients). `explain` says what
            a step does and why.
            "loop": one activation-only backward pass for each competitor, and the ordinary backward of the loss.
            "split": the gradients of the parameters from those that the passes found, half a backward pass less, for
            top_k = 1 the cost of cross-entropy. The loss is then a function of the parameters and of tensors that enter
            the model with a graph of their own; it is not connected to the activations in between. Needs no
            cross-entropy term (or auxiliary="pairwise", or all competitors), samples that do not interact between taps
            and logits, no hooks on activations, and the compiled extension; with second_order=True, as with
            MarginSensitivityLoss, also one competitor and a network that is linear piece by piece, 4 F instead of 6 F.
            An operation of which nothing is known is tried out at steps 1, 2, 4, 8, ... and every 1024th, on all
            processes alike; a trial that fails raises ValueError.
            "auto": split where the graph of the forward pass proves it exact and top_k is at most 2, beyond which
            it is not faster; else loop.
        batchnorm: for models with batch norm in training mode, where samples are coupled and the gradient of a summed
            gap is not the gradient of each gap. "batch": as the papers, ignore it (a warning, once); "frozen": norms
            are measured on a second forward pass with running statistics and the same dropout masks.
        batch_dim: which dimension of a tap is the batch, where the graph does not show it: a number for all taps, or
            {"name": number}. Time-major layers, windows and heads are found by themselves.

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
    ) -> None:
        super().__init__()
        if batchnorm not in BATCHNORM:
            raise ValueError(f'batchnorm must be one of "batch", "frozen", got {batchnorm!r}')
        _check_model(model)
        if getattr(loss, "needs", None) not in NEEDS:
            raise TypeError(f"loss must be a loss of margin_kernels.losses, got {type(loss).__name__}")
        check_passes(passes)
        if loss.needs != "taps":
            without = {"layers": (layers, None), "passes": (passes, "auto"), "batchnorm": (batchnorm, "batch")}
            for name, (given, default) in {**without, "batch_dim": (batch_dim, None)}.items():
                if given != default:
                    raise ValueError(
                        f"{name} must be {default!r} for {type(loss).__name__}, which measures at no tap, got {given!r}"
                    )
        self.model = model
        self.loss: Any = loss
        self.passes = passes
        self.batchnorm = batchnorm
        self._taps = Taps(model, ("input",) if layers is None else layers, batch_dim)
        # With gamma="auto", in the state dict.
        self.auto_gamma = AutoGamma(len(self.layers)) if getattr(loss, "gamma", None) == "auto" else None
        self._trials = Trials()
        self._explained: Explanation | None = None
        self._warned = False
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

    def forward(self, x: Any, y: Tensor) -> dict[str, Tensor]:
        """Loss and statistics of inputs x [N,*] with targets y [N] int64.

        Returns a dict: loss [] ([N] for reduction="none") and output (logits [N,C]) with gradient, and the other fields
        that the loss measured, detached. For LargeMarginLoss: distance, norm, active (bool) [N,k,L], gap and competitor
        [N,k], nll [N]; for every loss the fields of what its `statistics` returns. Under no_grad: output and what the
        logits alone show.
        """
        if getattr(self, "_is_replica", False):
            raise ValueError("DataParallel is not supported: wrap the task in DistributedDataParallel")
        if not torch.is_grad_enabled():
            logits = whole(self.model(x)) if self._checked else logits_without_graph(self.model, x)
            y, self._checked = whole(y), True
            return {"output": logits, **self.loss.logit_statistics(logits, y)}
        if self._compiled is not None and not tracing():
            if is_sharded(self):
                raise ValueError(
                    "a sharded task cannot be compiled: use DistributedDataParallel(task), or do not compile"
                )
            return self._compiled(self, x, y)
        return self.uncompiled(x, y)

    def uncompiled(self, x: Any, y: Tensor) -> dict[str, Tensor]:
        """`forward` with gradients, as it is without `compile`."""
        sharded = None
        if not tracing():
            check_unchanged(self.model)
            sharded = self.prepare_sharded()
        if sharded is not None:
            sharded.begin()
        y = whole(y)
        if self.loss.needs == "logits":
            logits = whole_logits(self.model(x))
            self._check_together(logits, y, sharded)
            measured = self.loss.statistics(logits, y)
        elif self.loss.needs == "model":
            # As many forwards on every process.
            alike = {} if sharded is None else {"whole_batch": True}
            with exclusive(self.model), nullcontext() if sharded is None else sharded.passes(True, False):
                replayed = ReplayedModel(self.model, x)
                source, sources = in_graph(x)
                logits = replayed.first(source)
                self._check_together(logits, y, sharded)
                measured = self.loss.statistics(logits, y, self.model, x, replayed, source, **alike)
                cut_sources(measured.loss, Captured(logits, [], sources=sources))
        else:
            try:
                logits, captured = self._forward(x)
            except Exception as error:
                self._tell(error, y, sharded)
                raise
            how = {"medians": self.auto_gamma} if self.auto_gamma is not None else {}
            with self._agreeing(sharded, captured):
                self._check_together(logits, y, sharded)
                measured = self.loss.statistics(logits, y, captured, self.passes, trials=self._trials, **how)
        if sharded is not None:
            measured = measured._replace(loss=sharded.attach(measured.loss))
        return {"output": logits, **measured._asdict()}

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

    def explain(self, x: Any, y: Tensor) -> Explanation:
        """Which strategy a step on this batch takes, its reason, why the others are refused, its cost in passes, the
        backend of every op and the memory that the strategy records. Runs one forward pass and the passes of the loss;
        gradients, buffers and random numbers stay as they are."""
        if is_sharded(self):
            raise ValueError("explain takes a task that is not sharded: ask before fully_shard_task")
        random = RandomState.now(x)
        buffers = [(buffer, buffer.clone()) for buffer in self.buffers()]
        try:
            with torch.enable_grad(), random.replayed():
                self._explained = self._explain(x, y)
        finally:
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)
        return self._explained

    def _explain(self, x: Any, y: Tensor) -> Explanation:
        name = type(self.loss).__name__
        ops = {op: _backend_of(op, y.device, self.loss.backend) for op in OPS_OF[self.loss.needs]}
        if self.loss.needs == "logits":
            return Explanation("logits", f"{name} reads the logits alone", {}, (), (), 3.0, "F + 2 F", ops, 0)
        if self.loss.needs == "model":
            cost = f"F + 2 F, and up to {self.loss.max_iter} steps of DeepFool with their gradients"
            return Explanation("model", f"{name} searches the nearest boundary", {}, (), (), None, cost, ops, 0)
        logits, captured = self._forward(x)
        passes = self.loss.passes(self.passes)
        request = self.loss.request(1 if logits.dim() == 1 else logits.shape[-1])
        found = reasons(request, captured, logits)
        gradients = choose(passes, request, captured, logits, Trials(alone=True))
        why = {key: reason for key, reason in found.items() if reason is not None and key != gradients.name}
        plan = make_plan(captured, request)
        count = self.loss.count(logits) if plan.taps else 0
        runs = "1 pass" if count == 1 else f"{count} passes"
        cost, total = {
            "loop": (f"F + {runs} + 2 F", 3.0 + count),
            "split": (f"F + {runs} + F for the weights", 2.0 + count),
            "tangent": ("F + 1 pass + tangents F + F for the weights", 4.0),
        }[gradients.name]
        if gradients.name == "loop" and request.second_order and plan.taps:
            cost, total = (
                f"{cost} + {2 * request.competitors} F to differentiate the norms",
                total + 2.0 * request.competitors,
            )
        if captured.logits is not logits:
            cost, total = f"{cost} + F with running statistics", total + 1
        recorded = 0
        if isinstance(gradients, Split):
            label = y.clamp(0, logits.shape[1] - 1)
            rivals = functional.competitors(logits.detach(), label, request.competitors, backend=self.loss.backend)
            gradients.norms(label, rivals.competitor)
            recorded = gradients.recorded_bytes
        reason = {
            "loop": "exact for every network",
            "split": "the graph proves that samples do not interact between the taps and the logits",
            "tangent": "the graph proves that samples do not interact, and the network is linear piece by piece",
        }[gradients.name]
        if passes != "auto":
            reason = f"asked for by passes={passes!r}"
        nodes = tuple(str(finding) for finding in captured.structure(plan.taps).findings) if plan.taps else ()
        return Explanation(gradients.name, reason, why, nodes, self.layers, total, cost, ops, recorded)

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

    def _forward(self, x: Any) -> tuple[Tensor, Captured]:
        """The logits of the ordinary forward pass, and the forward pass whose taps are measured."""
        with exclusive(self.model) if self.batchnorm == "frozen" else nullcontext():
            training = training_batchnorms(self.model)
            if training and self.batchnorm == "frozen":
                with running_statistics(training), RandomState.now(x).replayed():
                    captured = self._taps.capture(self.model, x)
                return whole_logits(self.model(x)), captured
            if training:
                self._check_coupling(training)
            captured = self._taps.capture(self.model, x)
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

    def _check_together(self, logits: Tensor, y: Tensor, sharded: Sharded | None) -> None:
        """The errors that a loss has with its options and these targets, before other processes wait for this one.
        Values are read on the CPU alone, so that a GPU has none."""

        def check() -> None:
            with torch.no_grad():
                self.loss.numbers(len(self.layers))
                self.loss.logit_statistics(logits.detach(), y)

        check_holders(logits, self.loss.group())
        for group in self._waiting(y, sharded):
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


def _backend_of(op: str, device: torch.device, backend: str) -> str:
    """The backend that computes an op on tensors of that device."""
    return backend_of(op, (torch.empty(1, device=device),), backend)[0]

"""A training step as one graph: forward pass, gradients of the margins, loss and gradients of the parameters.

torch.compile cannot follow a gradient that is taken inside a forward pass and differentiated after it. So the step is
recorded as a whole: the task runs once on tensors without values, with the backward of its loss, and every operation
below autograd goes into one graph without a gradient in it, which torch.compile then turns into kernels. Loop and split
backward, first and second order are all recorded alike.

The gradients come with the loss. `loss.backward()` hands them on, times the gradient of the loss, to parameters that
are inputs of one autograd Function: accumulation, hooks, GradScaler and DDP see ordinary gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..batchnorm import training_batchnorms
from ..gradients.plan import FLOAT16_SCALE
from ..losses.base import MarginLoss
from ..process_group import alone
from ..random_state import RandomState
from ..sharding import crossed
from ..tracing import recorded
from .auto_gamma import AutoGamma
from .reading import Inputs, leaves_of, mapped, structure_of

# Kinds of steps that are recorded before a warning says that each costs a compilation.
MANY = 8
# Modes of torch.compile in which a step is a CUDA graph with memory of its own.
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
# Largest factor of the loss under float16 autocast.
LARGEST_SCALE = 2.0**16
UNRECORDABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
    UnsupportedOperatorException,
)


class Task(Protocol):
    """What a compiled step needs of a MarginTask."""

    model: nn.Module
    loss: MarginLoss
    batchnorm: str
    layers: tuple[str, ...]
    auto_gamma: AutoGamma | None

    def uncompiled(self, inputs: Inputs, y: Tensor, sample_weight: Tensor | None = None) -> dict[str, Any]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...
    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...
    def buffers(self) -> Iterator[Tensor]: ...
    def modules(self) -> Iterator[nn.Module]: ...


class CompiledStep:
    """The recorded and compiled steps of one task, one for each kind of call.

    Recorded anew for other shapes, dtypes, strides or devices of inputs and parameters, another mode of a module
    (train, eval), other parameters that require grad, other options of the loss, another autocast, other plain values
    (numbers, words, flags) that a module keeps. Numbers of the loss in `loss.live`, as gamma, are inputs of the step.
    Not seen: plain values that the model itself changes in its forward pass, as counters, and what it reads from
    elsewhere.

    options: of torch.compile, as backend, mode, dynamic
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self._steps: dict[Any, Callable[..., Any]] = {}
        # Places (module, attribute) of plain values that a forward pass was seen to change: not part of the key.
        self._changing: set[tuple[int, str]] = set()

    def __call__(self, task: Task, inputs: Inputs, y: Tensor, sample_weight: Tensor | None = None) -> dict[str, Any]:
        """As MarginTask.forward. The logits carry no gradient: a backward pass through them raises RuntimeError."""
        leaves = list(leaves_of((inputs, sample_weight)))
        # Numbers, words and flags are part of what is compiled.
        plain = tuple(... if isinstance(leaf, Tensor) else _frozen(leaf) for leaf in leaves)
        if any(isinstance(value, type) for value in plain):
            raise ValueError(
                "a compiled task takes tensors, numbers, words and flags, alone or in tuples, lists, mappings and "
                "dataclasses, as the model's arguments, got "
                f"{next(value.__name__ for value in plain if isinstance(value, type))}"
            )
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        state = {**dict(task.named_parameters()), **dict(task.named_buffers())}
        tensors = [*state.values(), *given]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        if not wanted:
            raise ValueError("no parameter and no input requires grad: there is nothing to train")
        device = y.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        modes = tuple(module.training for module in task.modules())
        names_of = [id(leaf) for leaf in leaves]
        same = tuple(map(names_of.index, names_of))
        kinds = (structure_of(inputs), plain, same, tuple(map(_kind, (*tensors, y))), modes, autocast, task.loss.key())
        step = self._find(kinds, task)
        if step is None:
            step = self._compile(task, inputs, y, sample_weight, list(state), tensors, autocast)
            self._steps[*kinds, self._values(task), not _has_fixed_medians(task)] = step
            if len(self._steps) == MANY:
                warnings.warn(
                    f"{MANY} kinds of steps were compiled, each takes a while: keep batch size and options of the loss",
                    stacklevel=3,
                )
        numbers = torch.tensor(task.loss.numbers(len(task.layers)), dtype=torch.float64)
        with torch.no_grad(), torch.autocast(device, enabled=False):  # its casts are in the graph
            fields, gradients = step(
                [tensor.detach() for tensor in tensors], y, numbers.to(y.device, non_blocking=True)
            )
        if self.options.get("mode") in CUDA_GRAPHS:  # the next step writes into the same memory
            fields = {name: value.clone() for name, value in fields.items()}
        loss, output = _Handed.apply(fields["loss"], fields["output"], gradients, *wanted)
        return {**fields, "loss": loss, "output": output}

    def _find(self, kinds: tuple[Any, ...], task: Task) -> Callable[..., Any] | None:
        """The step of that kind. One whose medians run is right for fixed ones too, but not the other way round."""
        key = (*kinds, self._values(task))
        step = self._steps.get((*key, True))
        return self._steps.get((*key, False)) if step is None and _has_fixed_medians(task) else step

    def _plain(self, task: Task) -> dict[tuple[int, str], Any]:
        """The plain values that the modules of the model keep, by the module's number and the attribute's name."""
        found = {}
        for i, module in enumerate(task.model.modules()):
            for name, value in vars(module).items():
                if not name.startswith("_") and not isinstance(value, (nn.Module, Tensor)):
                    found[i, name] = _frozen(value)
        return found

    def _values(self, task: Task) -> tuple[Any, ...]:
        return tuple(item for item in self._plain(task).items() if item[0] not in self._changing)

    def _compile(
        self,
        task: Task,
        inputs: Inputs,
        y: Tensor,
        sample_weight: Tensor | None,
        names: list[str],
        tensors: list[Tensor],
        autocast: tuple[bool, torch.dtype],
    ) -> Callable[..., Any]:
        before = self._plain(task)
        _rehearse(task, inputs, y, sample_weight, tensors)
        leaves = list(leaves_of((inputs, sample_weight)))
        places = {id(leaf): i for i, leaf in reversed(list(enumerate(leaves)))}
        after = self._plain(task)
        self._changing |= {place for place in after if before.get(place) != after[place]}
        enabled, dtype = autocast
        # A GradScaler's factor comes after the gradients: in float16 the step needs one of its own.
        scale = min(FLOAT16_SCALE * len(y), LARGEST_SCALE) if enabled and dtype == torch.float16 else 1.0

        def step(tensors: list[Tensor], y: Tensor, numbers: Tensor) -> tuple[dict[str, Tensor], list[Tensor | None]]:
            state = dict(zip(names, tensors, strict=False))
            given = iter(tensors[len(names) :])
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            # A tensor that is given twice is one.
            called, weight = mapped(lambda leaf: filled[places[id(leaf)]], (inputs, sample_weight))
            # No cache: its half-precision weights would outlive the recording.
            live = task.loss.recorded(numbers)
            with live, torch.autocast(y.device.type, dtype, enabled, cache_enabled=False):
                how = {**called.kwargs, "target": y, "sample_weight": weight}
                found = torch.func.functional_call(cast(nn.Module, task), state, called.args, how)
            wanted = [tensor for tensor in tensors if tensor.requires_grad]
            gradients = torch.autograd.grad(scale * found["loss"], wanted, allow_unused=True)
            fields = {name: value.detach() for name, value in found.items()}
            return fields, [gradient if gradient is None or scale == 1 else gradient / scale for gradient in gradients]

        arguments = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        try:
            with recorded():
                numbers = torch.tensor(task.loss.numbers(len(task.layers)), dtype=torch.float64, device=y.device)
                graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(arguments, y, numbers)
        except UNRECORDABLE as error:
            raise ValueError(
                f"the step cannot be compiled, for it reads a value of a tensor: {str(error).splitlines()[0]}"
            ) from error
        return torch.compile(graph.forward, fullgraph=True, **self.options)


def _has_fixed_medians(task: Task) -> bool:
    """Whether gamma="auto" is known to have fixed medians, which a recorded step then does not follow any more."""
    return task.auto_gamma is not None and task.auto_gamma.is_known_to_be_fixed()


def _frozen(value: Any) -> Any:
    """A plain value that can be compared: numbers, words, flags, and tuples and lists of them; else its type."""
    if isinstance(value, (bool, int, float)):
        return type(value).__name__, value  # 1, 1.0 and True are equal, and make other types of tensors
    if isinstance(value, (str, type(None))):
        return value
    return tuple(map(_frozen, value)) if isinstance(value, (tuple, list)) else type(value)


def _kind(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad


def _rehearse(task: Task, inputs: Inputs, y: Tensor, sample_weight: Tensor | None, tensors: Sequence[Tensor]) -> None:
    """One step as it is without a compiler: raises its errors, tries out what recordings cannot, and leaves the model's
    buffers and the random numbers as they were. Raises ValueError for what has no compiled form."""
    random = RandomState.now(inputs.tensors())
    buffers = [(buffer, buffer.clone()) for buffer in task.buffers()]
    with random.replayed(), alone():  # other processes may have compiled theirs
        found = task.uncompiled(inputs, y, sample_weight)
        loss, shared, leaves = found["loss"], crossed(found["output"]), _leaves(found["output"])
        drew = random.changed()
    known = {id(tensor) for tensor in tensors}
    # The marks of inputs without gradient are empty.
    unknown = [leaf for leaf in leaves if id(leaf) not in known and leaf.numel()]
    if unknown:
        raise ValueError(
            "a compiled task trains its own parameters alone, and the loss depends on another tensor that requires "
            f"grad, of shape {list(unknown[0].shape)}: make it a parameter of the model, detach it, or do not compile"
        )
    with torch.no_grad():
        for buffer, saved in buffers:
            buffer.copy_(saved)
    if shared:
        raise ValueError("a compiled task has no tensors that several processes share (DTensor): do not compile it")
    if loss.dim() > 0:
        raise ValueError('a compiled task gives the gradients of one number: reduction="none" has a loss per sample')
    replays = task.loss.needs == "model" or (task.batchnorm == "frozen" and training_batchnorms(task.model))
    if drew and replays:
        raise ValueError(
            f"{type(task.loss).__name__} runs the model several times with the same dropout masks, which a compiled "
            "step cannot: train without dropout, or do not compile"
        )


def _leaves(logits: Tensor) -> list[Tensor]:
    """The leaves in the graph of the logits."""
    found, seen, waiting = [], {logits.grad_fn}, [logits.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if hasattr(node, "variable"):
            found.append(node.variable)
        for following, _ in node.next_functions:
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


class _Handed(torch.autograd.Function):
    """Loss and logits whose gradients in `wanted` are known."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, output: Tensor, gradients: Sequence[Tensor | None], *wanted: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.missing = [gradient is None for gradient in gradients]
        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        return loss.clone(), output.view_as(output)  # the loss is no view, so that a user may add to it in place

    @staticmethod
    def backward(ctx: Any, loss: Tensor | None, output: Tensor | None) -> tuple[Any, ...]:
        if output is not None:
            raise RuntimeError("a compiled task gives the gradients of its loss alone: no other term on its output")
        if torch.is_grad_enabled():
            raise RuntimeError("a compiled task has no second derivative (create_graph=True): do not compile it")
        if loss is None:
            return (None, None, None, *(None for _ in ctx.missing))
        found = iter(torch._foreach_mul(list(ctx.saved_tensors), loss))
        return (None, None, None, *(None if missing else next(found) for missing in ctx.missing))

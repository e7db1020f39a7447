"""How a model is called, and its logits read from what it returns.

model(*args, **kwargs), or call(model, *args, **kwargs)     ->  what it returns  ->  its logits: itself, or the part
                                                                that `output` names, or `.logits`
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..outputs import described, logits_in

Output = str | int | None


def leaves_of(value: Any) -> Iterator[Any]:
    """What stands in tuples, lists, mappings and dataclasses, nested."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from leaves_of(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from leaves_of(getattr(value, field.name))
    else:
        yield value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same with change(leaf) in the place of every leaf; containers of the same types, themselves where nothing in
    them has changed."""
    if isinstance(value, (Mapping, tuple, list)):
        items: list[tuple[Any, Any]] = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    else:
        return change(value)
    found = [(key, item, mapped(change, item)) for key, item in items]
    if all(item is new for _, item, new in found):
        return value
    if isinstance(value, tuple):
        entries = [new for _, _, new in found]
        return type(value)(*entries) if hasattr(value, "_fields") else type(value)(entries)
    changed = copy.copy(value)
    for key, _, new in found:
        if is_dataclass(changed):
            object.__setattr__(changed, key, new)
        else:
            changed[key] = new
    return changed


def structure_of(value: Any) -> Any:
    """The containers of a value with their keys, without its leaves; two are equal where `mapped` makes one of the
    other's leaves."""
    if isinstance(value, Mapping):
        return type(value), tuple((key, structure_of(item)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(structure_of, value))
    if is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(structure_of(getattr(value, field.name)) for field in fields(value))
    return None


class Inputs(NamedTuple):
    """The arguments of one forward pass of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def floating(self, items: tuple[int | str, ...] = ()) -> Tensor:
        """The floating-point tensor among the arguments, or the one that `items` leads to: the number of an argument or
        its name, then what it holds. Raises ValueError where there is none, or several and no items."""
        if items:
            found = self._at(items)
        else:
            leaves = list(leaves_of(self))
            several = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            if len({id(leaf) for leaf in several}) > 1:
                raise ValueError(
                    f'the tap "input" must be one tensor, got {len(several)} floating-point inputs: name it, '
                    '"input[0]" for an argument by its number, "input[image]" by its name'
                )
            found = several[0] if several else next((leaf for leaf in leaves if leaf is not None), None)
        if not isinstance(found, Tensor):
            raise ValueError(f'the tap "input" needs a tensor as the model\'s input, got {type(found).__name__}')
        if not found.is_floating_point():
            raise ValueError(
                f'the tap "input" needs a floating-point input, got {found.dtype}: tap the embedding of the tokens '
                "instead"
            )
        return found

    def _at(self, items: tuple[int | str, ...]) -> Any:
        first, *rest = items
        # An only argument that holds tensors is looked into.
        only = self.args[0] if len(self.args) == 1 and not self.kwargs else None
        named = isinstance(first, str)
        found: Any = self.kwargs if named else self.args
        if isinstance(only, Mapping if named else (list, tuple)) or (named and is_dataclass(only)):
            found = only
        for item in (first, *rest):
            try:
                found = getattr(found, str(item)) if is_dataclass(found) else found[item]
            except (AttributeError, TypeError, KeyError, IndexError) as error:
                name = "input" + "".join(f"[{part}]" for part in items)
                raise ValueError(f"layer {name!r}: the model's arguments have no item [{item}] ({error})") from error
        return found

    def with_tensor(self, old: Tensor, new: Tensor) -> Inputs:
        """The arguments with another tensor wherever they hold `old`."""
        if not self.kwargs and len(self.args) == 1 and self.args[0] is old:
            return Inputs((new,), {})
        changed: Inputs = mapped(lambda leaf: new if leaf is old else leaf, self)
        return changed

    def tensors(self) -> list[Tensor]:
        if not self.kwargs and all(isinstance(argument, Tensor) for argument in self.args):
            return list(self.args)
        return [leaf for leaf in leaves_of(self) if isinstance(leaf, Tensor)]


class Reading:
    """Calls a model and reads its logits.

    Args:
        output: what names the logits in what the model returns: a key, an attribute, or a position; None: a tensor, or
            what has `.logits` or the key "logits"
        call: call(model, *args, **kwargs) in the place of model(*args, **kwargs)
        remedy: how the user names the logits
    """

    def __init__(
        self,
        output: Output = None,
        call: Callable[..., Any] | None = None,
        remedy: str = 'MarginTask(..., output="name"), or give a function, MarginTask(..., call=...)',
    ) -> None:
        if output is not None and (not isinstance(output, (str, int)) or isinstance(output, bool)):
            raise TypeError(f"output must be a name or a position, got {type(output).__name__}")
        if call is not None and not callable(call):
            raise TypeError(f"call must be a function call(model, *args, **kwargs), got {type(call).__name__}")
        self.output, self.call, self._remedy = output, call, remedy

    def __call__(self, model: nn.Module, inputs: Inputs) -> Any:
        """The logits, a floating-point tensor, or a DTensor. Raises ValueError for anything else."""
        try:
            if self.call is None:
                made = model(*inputs.args, **inputs.kwargs)
            else:
                made = self.call(model, *inputs.args, **inputs.kwargs)
        except TypeError as error:
            unbound = self._unbound(model, inputs)
            if unbound is None:
                raise
            raise TypeError(
                f"{'the model' if self.call is None else 'call'} does not take these arguments, {unbound}: where no "
                "target= is given, the last positional argument of a task is the target. Name it, task(x, table, "
                "target=y), or take task.model(x, table) for the output alone"
            ) from error
        return self.logits(made)

    def function(self, model: nn.Module) -> Callable[..., Any]:
        """What the model's arguments are given to."""
        return model.forward if self.call is None else self.call

    def _unbound(self, model: nn.Module, inputs: Inputs) -> str | None:
        """Why the arguments are not those of the function that takes them; None where they are, or nothing says it."""
        try:
            signature = inspect.signature(self.function(model))
        except (TypeError, ValueError):  # it has none
            return None
        try:
            signature.bind(*(() if self.call is None else (model,)), *inputs.args, **inputs.kwargs)
        except TypeError as error:
            return str(error)
        return None

    def logits(self, made: Any) -> Tensor:
        """The logits in what a model has returned."""
        found = logits_in(made) if self.output is None else _part(made, self.output)
        if not isinstance(found, Tensor):
            raise ValueError(
                f"model must return its logits as one tensor [N,C], got {described(made)}: name them, {self._remedy}"
            )
        if not found.is_floating_point():
            raise TypeError(f"logits must be floating point, got {found.dtype}")
        return found


def _part(made: Any, output: str | int) -> Any:
    """The part of what a model returned that a key, attribute or position names."""
    if isinstance(made, Tensor):
        raise ValueError(f"output must be None for a model that returns a tensor, got {output!r}")
    if isinstance(output, str) and not isinstance(made, Mapping):
        if hasattr(made, output):
            return getattr(made, output)
    else:
        try:
            return made[output]
        except (KeyError, IndexError, TypeError):
            pass
    raise ValueError(f"output must name a part of what the model returns, {described(made)}, got {output!r}")


def shape_of_targets(logits: Tensor, target: Any) -> str:
    """The shapes of logits and targets, in words."""
    shape = list(target.shape) if isinstance(target, Tensor) else type(target).__name__
    return f"logits {list(logits.shape)} and target {shape}"


def check_not_transformed() -> None:
    """Raises ValueError under a transform of torch.func, which cannot follow gradients taken inside a forward pass."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            "torch.func transforms (grad, vmap, jvp) cannot go through a task, whose forward pass takes gradients "
            'itself: take torch.autograd.grad(task(x, y)["loss"], parameters)'
        )

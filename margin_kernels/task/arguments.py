"""Which of a task's arguments are the model's, and which is the target.

    task(x, target=y), task(x, table, target=y)     as it says
    task(x, y), task(x, table, y)                   the last of several positional arguments is the target
    task(x)                                         no target: the output alone

So task(x, table) would take an input for the target. That is refused where it shows: a forward(*inputs) takes any
number of inputs, and a task that was given as many inputs beside a named target has no target among them.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..tracing import tracing
from .reading import Inputs, Reading

REMEDY = "name it, task(x, table, target=y), or take task.model(x, table) for the output alone"


class Arguments:
    """Tells the arguments of one task's model from the target."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._beside_target = 0  # how many positional arguments the last named target had beside it
        self._any_number: bool | None = None

    def split(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[Inputs, Any]:
        """The model's arguments, and the target or None. Raises ValueError where the last argument may be either."""
        if target is not None:
            if self._beside_target != len(args) and not tracing():
                self._beside_target = len(args)
        elif len(args) > 1:
            if self._any_number is not False or len(args) == self._beside_target:
                self._check(model, len(args))
            args, target = args[:-1], args[-1]
        return Inputs(args, kwargs), target

    def _check(self, model: nn.Module, count: int) -> None:
        if tracing():
            return
        if self._any_number is None:
            self._any_number = _takes_any_number(self._reading.function(model))
        if self._any_number:
            raise ValueError(f"target must be given by name to a model that takes any number of inputs: {REMEDY}")
        if count == self._beside_target:
            raise ValueError(
                f"target must be given by name beside {count} positional arguments, which were all the model's in an "
                f"earlier call with target=: {REMEDY}"
            )


def _takes_any_number(function: Any) -> bool:
    """Whether a function is f(*inputs); f(*args, **kwargs) hands on what it is given, and says nothing."""
    try:
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    except (TypeError, ValueError):  # it has no signature
        return False
    return inspect.Parameter.VAR_POSITIONAL in kinds and inspect.Parameter.VAR_KEYWORD not in kinds

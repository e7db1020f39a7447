"""What every loss is made of: its options, checked whenever they are set.

A check takes the name of an option and a value, and returns the value as it is stored, or raises an error with the
argument, its value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..gradients.request import Captured, Request, explicit
from ..outputs import is_one_logit
from ..process_group import Group
from ..process_group import check as group_exists
from ..sharding import check_holders, whole, whole_logits
from . import targets as of_targets
from .targets import Targets, two_classes

COMPETITORS = " (and at most the number of classes - 1)"
REDUCTIONS = ("mean", "sum", "none")
# What a compiled step may depend on and compare.
PLAIN = (bool, int, float, str, tuple, list, type(None))


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(name: str, value: Any, least: float | None = None, above: float | None = None) -> float:
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if above is not None and not (math.isfinite(value) and value > above):
        raise ValueError(f"{name} must be finite and > {above:g}, got {value}")
    if least is not None and not (math.isfinite(value) and value >= least):
        raise ValueError(f"{name} must be finite and >= {least:g}, got {value}")
    return float(value)


def numbers(
    name: str, values: Any, least: float | None = None, above: float | None = None, each: str = "layer"
) -> list[float]:
    if isinstance(values, (str, bytes, Tensor)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list of numbers, one for each {each}, got {type(values).__name__}")
    if len(values) == 0:
        raise ValueError(f"{name} must hold one number for each {each}, got an empty list")
    return [number(f"{name}[{i}]", value, least, above) for i, value in enumerate(values)]


def norm_exponent(p: Any) -> float:
    if p == "inf":
        return math.inf
    if not is_number(p):
        raise TypeError(f'p must be a number >= 1 or "inf", got {p!r}')
    if not p >= 1:
        raise ValueError(f'p must be >= 1 or "inf", got {p}')
    return float(p)


def count(name: str, value: Any, bound: str = "") -> int:
    """`bound`: words for an upper bound that is checked elsewhere."""
    if integer(name, value) < 1:
        raise ValueError(f"{name} must be >= 1{bound}, got {value}")
    return value


def integer(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def optional(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """A check that lets None through."""
    return lambda name, value: None if value is None else check(name, value)


def positive(name: str, value: Any) -> float:
    return number(name, value, above=0)


def non_negative(name: str, value: Any) -> float:
    return number(name, value, least=0)


def positive_of_layers(name: str, value: Any) -> float | list[float]:
    """One number > 0, or one for each layer."""
    return positive(name, value) if is_number(value) else numbers(name, value, above=0)


def weights_of_layers(name: str, value: Any, each: str = "layer") -> list[float]:
    """One number >= 0 for each layer, not all 0."""
    weights = numbers(name, value, least=0, each=each)
    if sum(weights) == 0:
        raise ValueError(f"{name} must not all be 0, got {value}")
    return weights


def weights_of_classes(name: str, value: Any) -> list[float]:
    """One number >= 0 for each class, not all 0: a list or a tensor [C]."""
    return weights_of_layers(name, value.tolist() if isinstance(value, Tensor) and value.dim() == 1 else value, "class")


def fraction(name: str, value: Any) -> float:
    if number(name, value, least=0) > 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return float(value)


def one_of(*allowed: Any) -> Callable[[str, Any], Any]:
    """A check for one of these values."""
    return lambda name, value: choice(name, value, allowed)


def exponent(name: str, value: Any) -> float:
    return norm_exponent(value)


class _SameInCopies:
    """Holds an object that copies of a loss share."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: Any) -> _SameInCopies:
        return self

    def __reduce__(self) -> Any:
        if self.value is not None and not isinstance(self.value, str):
            raise TypeError(
                f'process_group must be None or "world" in a loss that is saved, got {type(self.value).__name__}'
            )
        return type(self), (self.value,)


class MarginLoss(nn.Module):
    """What every loss of this library is: options that a step reads anew, and the loss of one forward pass.

    A subclass names its options as arguments of `__init__`, keeps each under its name, and says in `checks` what each
    may be. From that come

        loss.gamma = 10.0    an option may change between steps; the value is checked as in the constructor
        loss.options()       the options as they are now: an instance of the dataclass `type(loss).Options`
        repr(loss)           the options that are not at their default
        loss.key()           everything that a compiled step depends on

    Attributes:
        needs: what MarginTask gives it: "taps" of one forward pass, the "logits", or the "model" and its input
        second_order: whether norms are differentiated
    """

    needs: ClassVar[str] = "logits"
    # Whether a model with one logit f stands for the classes (0, f).
    takes_one_logit: ClassVar[bool] = True
    second_order: bool = False
    # name -> (name, value) to the value as it is stored. Raises ValueError and TypeError.
    checks: ClassVar[dict[str, Callable[[str, Any], Any]]] = {}
    # Made from the signature of __init__.
    Options: ClassVar[type]
    # Options that repr always shows, and those whose numbers a compiled step reads anew.
    shown: ClassVar[tuple[str, ...]] = ()
    live: ClassVar[tuple[str, ...]] = ()
    # The numbers of a step that is being recorded, as a tensor; None: as the options say.
    _live: Tensor | None = None
    # The process_group, of losses that have the option.
    _group: _SameInCopies = _SameInCopies(None)

    if TYPE_CHECKING:  # the options, which __init__ sets by their names

        def __getattr__(self, name: str) -> Any: ...

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        named = [p for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        fields = [(p.name, p.annotation, dataclasses.field(default=p.default)) for p in named]
        cls.Options = dataclasses.make_dataclass(f"{cls.__name__}Options", fields, frozen=True)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "process_group":
            name, value = "_group", _SameInCopies(group_exists(name, value))
        check = self.checks.get(name)
        super().__setattr__(name, value if check is None else check(name, value))

    def keep(self, given: dict[str, Any]) -> None:
        """Sets every option from the arguments of __init__, its `locals()`."""
        for name in self.checks:
            setattr(self, name, given[name])

    @property
    def process_group(self) -> Any:
        """The processes that have parts of one batch."""
        return self._group.value

    def group(self) -> Group:
        """The same, to exchange numbers with: in training steps, which all processes take together."""
        return Group(self.process_group if torch.is_grad_enabled() else None)

    def whole(self, logits: Tensor) -> Tensor:
        """The logits of a model that several processes share as one tensor, see `sharding`. Raises ValueError where
        they cannot be had, and where these processes are in `process_group`."""
        logits = whole_logits(logits)
        check_holders(logits, self.group())
        return logits

    def targets(self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None) -> Targets:
        """What target [N] int64 or [N,C] and sample_weight [N] say of the rows of logits [N,C]."""
        return of_targets.read(logits, target, self.ignore_index, self.class_weight, sample_weight)

    @property
    def smoothed(self) -> bool:
        """Whether the term of label smoothing comes with the competitors."""
        return bool(self.label_smoothing > 0 and self.class_weight is None)

    def reduced(self, values: Tensor, share: Tensor | None = None) -> Tensor:
        """values [N] as `reduction` says: as they are, their sum, or their sum over that of `share` [N], 1 each where
        None is given; with a process_group over the samples of all its processes, for processes that average."""
        if self.reduction == "none":
            return values
        group = self.group()
        if self.reduction == "sum":
            return values.sum() * group.size
        if share is None and group.size == 1:
            return values.mean()
        return group.whole(values.sum(), len(values) if share is None else share.sum())

    def options(self) -> Any:
        """The options with their current values; two losses are the same function where these are equal."""
        return self.Options(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self.Options)})

    def numbers(self, layers: int) -> list[float]:
        """The numbers of the `live` options, for so many layers."""
        return []

    def key(self) -> tuple[Any, ...]:
        """What a compiled step depends on: the options and every other plain value that the loss keeps. Of `live`
        options only whether they are None, 0 or 1, which decides what is computed."""
        without = ("training", "_live")
        options = {
            name: value for name, value in vars(self).items() if isinstance(value, PLAIN) and name not in without
        }
        for name in self.live:
            value = options[name]
            fixed = isinstance(value, str) or (not isinstance(value, list) and value in (None, 0, 1))
            options[name] = value if fixed else "live"
        group = self.process_group
        return type(self), repr(sorted(options.items())), group if isinstance(group, str) else id(group)

    @contextmanager
    def recorded(self, numbers: Tensor) -> Iterator[None]:
        """Inside, `numbers` stands for the live options."""
        object.__setattr__(self, "_live", numbers)
        try:
            yield
        finally:
            object.__setattr__(self, "_live", None)

    def extra_repr(self) -> str:
        parts = []
        for field in dataclasses.fields(self.Options):
            value = getattr(self, field.name)
            default = self.checks[field.name](field.name, field.default) if field.name in self.checks else field.default
            if field.name in self.shown or value != default:
                parts.append(f"{field.name}={value:g}" if isinstance(value, float) else f"{field.name}={value!r}")
        return ", ".join(parts)

    def margins(self, *args: Any, **kwargs: Any) -> Any:
        """The former name of `statistics`."""
        warnings.warn("margins() is now statistics(); margins() goes in 0.2", DeprecationWarning, stacklevel=2)
        return self.statistics(*args, **kwargs)

    def logit_statistics(
        self, logits: Tensor, target: Tensor, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the logits alone show, detached."""
        raise NotImplementedError


class TapLoss(MarginLoss):
    """A loss on distances at the taps of one forward pass.

    A subclass says in `request` what it asks of that pass, and in `statistics` what it makes of the answer.
    """

    needs = "taps"

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        activations: Sequence[Tensor],
        batch_dim: int | Sequence[int | None] | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The loss, [] or [N], of logits [N,C] and target [N] int64, or soft targets [N,C] that sum to 1; or of one
        logit [N] or [N,1] and target 0 or 1, or -1 or +1.

        activations are the h_l of the same forward: they require grad and are in the graph of the logits. batch_dim
        names their batch dimension where that graph does not show it. sample_weight [N] >= 0 multiplies the terms of
        a sample, and is what it counts in a mean.
        """
        logits, target = self.whole(logits), whole(target)
        if is_one_logit(logits):
            logits, target = two_classes(logits, target, getattr(self, "ignore_index", None))
        captured = explicit(logits, activations, batch_dim)
        loss: Tensor = self.statistics(logits, target, captured, sample_weight=whole(sample_weight)).loss
        return loss

    def statistics(self, logits: Tensor, target: Tensor, captured: Captured, *args: Any, **kwargs: Any) -> Any:
        """The loss and what it measured."""
        raise NotImplementedError

    def request(self, classes: int, soft_targets: bool = False) -> Request:
        """What this loss asks of a forward pass with so many classes."""
        raise NotImplementedError

    def count(self, logits: Tensor) -> int:
        """Backward passes to the taps in one step."""
        competitors: int = self.top_k
        return competitors

    def passes(self, asked: str) -> str:
        """The mode of `passes` that holds, where a task asks for one and the loss may know better."""
        return asked

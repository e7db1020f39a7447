"""Checks of hyper-parameters: the value as it is kept, or an error with the argument, its value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

RIVALS = " (and at most the number of classes - 1)"
REDUCTIONS = ("mean", "sum", "none")


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


def numbers(name: str, values: Any, least: float | None = None, above: float | None = None) -> list[float]:
    if isinstance(values, (str, bytes, Tensor)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list of numbers, one for each layer, got {type(values).__name__}")
    if len(values) == 0:
        raise ValueError(f"{name} must hold one number for each layer, got an empty list")
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
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be >= 1{bound}, got {value}")
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value

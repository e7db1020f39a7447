"""Arguments under their former names: accepted for one release, with a DeprecationWarning that names the new one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed(old: str, new: str, less: int = 0) -> Callable[[Function], Function]:
    """A decorator: the keyword `old` is taken as `new`, an integer less by `less`. Both at once are a TypeError."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{new} and its former name {old} are both given: give {new} alone")
                _warn(old, new, less, stacklevel=3)
                kwargs[new] = _moved(kwargs.pop(old), -less)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def former(old: str, new: str, less: int = 0) -> Any:
    """A property: the attribute `new` under its former name."""

    def get(self: Any) -> Any:
        _warn(old, new, less, stacklevel=3)
        return _moved(getattr(self, new), less)

    def put(self: Any, value: Any) -> None:
        _warn(old, new, less, stacklevel=3)
        setattr(self, new, _moved(value, -less))

    return property(get, put)


def _moved(value: Any, by: int) -> Any:
    return value + by if isinstance(value, int) and not isinstance(value, bool) else value


def _warn(old: str, new: str, less: int, stacklevel: int) -> None:
    change = f", which counts {less} less" if less else ""
    warnings.warn(f"{old} is now {new}{change}; {old} goes in 0.2", DeprecationWarning, stacklevel + 1)

"""The parser of the commands: each number has a bound, each text can be written."""

from __future__ import annotations

import argparse
from typing import Any

from ..config.bounds import TEXT, WAIT, Range, is_text
from ..training import TIMEOUT


class Parser(argparse.ArgumentParser):
    """argparse's, with numbers that are told where they make no sense."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.allowed: dict[str, Range] = {}

    def number(self, flag: str, allowed: Range, default: float | None, about: str, whole: bool = False) -> None:
        """Adds an option `flag` for a number within `allowed`: an integer where `default` is one, or for `whole`."""
        kind = int if whole or isinstance(default, int) else float
        self.allowed[flag] = allowed
        self.add_argument(flag, type=kind, default=default, help=about)

    def parse_args(self, *given: Any, **options: Any) -> Any:
        """As argparse's. Raises ValueError for the first number outside of its range."""
        found = super().parse_args(*given, **options)
        for flag, allowed in self.allowed.items():
            value = getattr(found, flag.removeprefix("--").replace("-", "_"))
            if value is not None and value not in allowed:
                raise ValueError(f"{flag} must be {allowed.words(value)}, got {value}")
        return found


def timeout(arguments: list[str]) -> float:
    """What --timeout says among the arguments of a command: processes meet before they read these. The default where
    it makes no sense, which the command itself then tells."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--timeout", type=float)
    try:
        found, _ = parser.parse_known_args(arguments)
    except (argparse.ArgumentError, SystemExit):
        return TIMEOUT
    return found.timeout if found.timeout is not None and found.timeout in WAIT else TIMEOUT


def check_text(arguments: list[str]) -> None:
    """Raises ValueError for an argument that neither a file system nor a page can hold, and for an empty one: a
    variable of the shell that is not set."""
    option = "a name on the command line"
    for argument in arguments:
        if argument.startswith("--"):
            option = argument.partition("=")[0]
        if not is_text(argument):
            raise ValueError(f"{option} must be {TEXT}, got {argument!r}")
        if argument in ("", f"{option}="):
            raise ValueError(f"{option} must not be empty")

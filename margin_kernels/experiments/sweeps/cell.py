"""A cell: one run of a sweep, with its name, its place, its config and the cells that it waits for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from ..config import Config, ConfigError


class Option(NamedTuple):
    """One combination of the values that a model chooses among: dotted key -> value, and its cell for each seed."""

    values: dict[str, Any]
    cells: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One run. `after` is the name of the cell it goes on from, `attacker` that of the cell whose network attacks it;
    the folders of their networks, which config.model.initial and config.evaluation.attacker are, stand in its job. A
    `candidate` is trained and not evaluated; a cell with a `choice` is not trained: it takes the network of one of
    these options, and its own config is that of the first."""

    name: str
    model: str
    point: str
    values: dict[str, Any]  # dotted key -> value of the point and the grid
    seed: int
    config: Config
    after: str | None
    attacker: str | None = None
    candidate: bool = False
    choice: tuple[Option, ...] = ()

    @property
    def needs(self) -> list[str]:
        """The cells that have to be finished before this one."""
        names = [self.after] if self.candidate else [self.after, self.attacker]
        return [name for option in self.choice for name in option.cells] + [n for n in names if n is not None]


def select(cells: list[Cell], patterns: list[str]) -> list[Cell]:
    """The cells whose names match a shell pattern, and those that they need. Raises ConfigError for a pattern that
    matches none."""
    matches = [{cell.name for cell in cells if fnmatchcase(cell.name, pattern)} for pattern in patterns]
    for pattern, names in zip(patterns, matches, strict=True):
        if not names:
            raise ConfigError(f"--cells {pattern}: no cell has such a name; --dry-run lists them")
    names = set().union(*matches)
    by_name = {cell.name: cell for cell in cells}
    found = list(names)
    while found:
        needed = [name for name in by_name[found.pop()].needs if name not in names]
        names.update(needed)
        found += needed
    return [cell for cell in cells if cell.name in names]


def cell_name(model: str, point: str, seed: int) -> str:
    """A file name: model, point where there is one, and seed."""
    parts = [re.sub(r"[^A-Za-z0-9.=+-]+", "_", text).strip("_") for text in (str(model), point) if text]
    return "__".join([*parts, f"seed{seed}"])


def words(values: dict[str, Any]) -> str:
    return " ".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in values.items())

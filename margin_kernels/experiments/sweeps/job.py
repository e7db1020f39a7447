"""What a worker is given: a Job, as FOLDER/job.json."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config, from_dict, to_dict
from ..results import Tried, read_json, write_json

FILE = "job.json"


@dataclass(frozen=True)
class Choice:
    """What a cell takes instead of being trained.

    Args:
        taken: name of the candidate that was chosen
        folder: where its weights are
        others: the other candidates of the same seed
        tried: what the model chose among
    """

    taken: str
    folder: str
    others: list[str]
    tried: list[Tried]


@dataclass(frozen=True)
class Job:
    """One cell of a sweep for a process of its own.

    Args:
        cell, model, point, seed, values, after, attacker: its place in the sweep, as in its record
        config: what to train and measure; its model.initial and evaluation.attacker are folders, as in any config
        records: the file of the records
        candidates: that of the candidates' records
        common: the options that the cells of the sweep have in common, for the first line of a new file
        candidate: train only, and write to `candidates`
        trained: the record and the weights exist; measure anew
        choice: take the network of a candidate, or None
    """

    cell: str
    model: str
    point: str
    seed: int
    values: dict[str, Any]
    after: str | None
    attacker: str | None
    config: Config
    records: str
    candidates: str
    common: dict[str, Any]
    candidate: bool = False
    trained: bool = False
    choice: Choice | None = None

    @property
    def place(self) -> dict[str, Any]:
        """The fields that the record has too."""
        return {name: getattr(self, name) for name in ("cell", "model", "point", "seed", "values", "after", "attacker")}

    def write(self, folder: Path) -> None:
        write_json(folder / FILE, {**dataclasses.asdict(self), "config": to_dict(self.config)})

    @classmethod
    def read(cls, folder: Path) -> Job:
        values = read_json(folder / FILE)
        choice = values["choice"]
        if choice is not None:
            choice = Choice(**{**choice, "tried": [Tried(**tried) for tried in choice["tried"]]})
        return cls(**{**values, "config": from_dict(values["config"]), "choice": choice})

"""What a training run and a finished cell of a sweep leave, with types: Run and Record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Config, from_dict, is_key, own_options
from . import shape
from .files import finite, read_json

Epoch = dict[str, Any]  # epoch, lr, train_loss, train_accuracy, validation_accuracy, seconds, ms_per_step, distance
# What an evaluation has of each sample, which feeds histograms.
SINGLE_SAMPLES = ("deepfool_norms", "distances")
Evaluation = dict[str, Any]  # name of a measurement -> number, or mapping: see evaluation/measure.py


@dataclass(frozen=True)
class Run:
    """Everything about a training run but its weights.

    Args:
        config: what was asked for, without paths of the machine
        network: name, shape, classes and options, as models.build takes them
        parameters: their number
        versions: of everything that can change a number
        machine: processor, cores, threads, device
        history: one entry for each epoch
        measured: gamma, and layer_weights, where they were measured (gamma auto, gamma_unit "median")
    """

    config: Config
    network: dict[str, Any]
    parameters: int
    versions: dict[str, str]
    machine: dict[str, Any]
    history: list[Epoch]
    measured: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict: what JSON stores. Empty fields and the options of other losses are left out."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        values = {name: value for name, value in values.items() if value not in (None, {}, []) or name == "history"}
        return finite({**values, "config": own_options(self.config)})

    @classmethod
    def read(cls, path: Path) -> Run:
        """The run that a file holds. Raises ValueError, which names the file, where it holds none."""
        values = read_json(path)
        try:
            shape.check(values, shape.RUN, "run")
            return cls.from_dict(values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} must be what `margin-kernels train` of this version writes: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """The inverse of to_dict; fields that `values` lacks have their defaults. Raises ConfigError for an unknown key
        of the config."""
        return cls(**{**values, "config": from_dict(values["config"])})


@dataclass(frozen=True)
class Tried:
    """One combination of values that a model with `choose` chose among: dotted key -> value, the mean validation
    accuracy over the seeds, whether it was chosen, and the seeds."""

    values: dict[str, Any]
    validation_accuracy: float
    chosen: bool
    seeds: list[int]


@dataclass(frozen=True, kw_only=True)
class Record(Run):
    """A finished cell of a sweep: its training run, where it stands in the sweep, and what its network is worth.

    Args:
        cell: its name, also that of its config
        model, point, seed: labels and seed in the sweep
        values: dotted key -> value of the point
        after: the cell from whose weights it went on, or None
        attacker: the cell whose network made its black-box images, or None
        seconds: of training, evaluation and choice
        evaluation: the measurements, or None: a candidate is trained and not evaluated
        timing: cost of a step beside one of cross-entropy, where it was measured
        choice: what its model chose among
    """

    cell: str
    model: str
    point: str
    seed: int
    values: dict[str, Any]
    after: str | None = None
    attacker: str | None = None
    seconds: dict[str, float]
    evaluation: Evaluation | None = None
    timing: dict[str, float] | None = None
    choice: list[Tried] = field(default_factory=list)

    @property
    def measurements(self) -> Evaluation:
        """The evaluation, empty of a candidate."""
        return self.evaluation or {}

    @property
    def run(self) -> Run:
        """The training run alone."""
        return Run(**{item.name: getattr(self, item.name) for item in dataclasses.fields(Run)})

    @property
    def place(self) -> tuple[str, str]:
        """Labels of model and point."""
        return self.model, self.point

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        del values["config"]["name"]  # that of the cell
        values |= {"point": self.point, "values": self.values}  # also empty ones
        if self.choice:
            values["choice"] = [dataclasses.asdict(tried) for tried in self.choice]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        config = {**values["config"], "name": values["cell"]}
        for key in values["values"]:
            if not is_key(key):
                raise ValueError(f"values must have keys of a config, got {key!r}")
        choice = [Tried(**tried) for tried in values.get("choice", [])]
        return cls(**{**values, "config": from_dict(config), "choice": choice})


def changed_settings(record: Record, config: Config, after: str | None, attacker: str | None) -> list[str]:
    """Dotted names of the options in which a record differs from what a cell asks for; options that the cell's loss
    ignores do not count."""
    found = differing(own_options(record.config), finite(own_options(config)))
    for name, recorded, asked in (
        ("model.initial", record.after, after),
        ("evaluation.attacker", record.attacker, attacker),
    ):
        found += [name] if recorded != asked else []
    return sorted(found)


def differing(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the entries in which two nested dicts differ."""
    names: list[str] = []
    for key in sorted(set(left) | set(right)):
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            names += differing(a, b, f"{prefix}{key}.")
        elif a != b:
            names.append(prefix + key)
    return names

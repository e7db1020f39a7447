"""A sweep with its records: what reports are made of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..data import units
from .record import Record

COMPARABLE = ("full", "paper")  # budgets that train as much as the paper


@dataclass(frozen=True)
class Study:
    """One sweep's results: name, budget, finished records in the order of models and points, and published values,
    (model, point) -> measure -> value as printed; the folder, in which there may be weights."""

    name: str
    budget: str
    records: list[Record]
    published: dict[tuple[str, str], dict[str, float]]
    folder: Path | None = None

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(record.model for record in self.records))

    @property
    def points(self) -> list[str]:
        return list(dict.fromkeys(record.point for record in self.records))

    def of(self, model: str, point: str) -> list[Record]:
        """A record per seed."""
        return [record for record in self.records if record.place == (model, point)]

    @property
    def comparable(self) -> bool:
        """Whether the sweep did what the paper did, so that published values may stand beside its own."""
        return self.budget in COMPARABLE

    @property
    def not_comparable(self) -> str:
        """Why published values are not comparable."""
        return f"budget {self.budget}, and not the paper's, which is {COMPARABLE[0]}"

    @property
    def units(self) -> str:
        """In what radii and norms are."""
        return units(record.config.data for record in self.records)

    @property
    def note(self) -> str:
        """Budget and number of seeds."""
        counts = {len(self.of(model, point)) for model in self.models for point in self.points} - {0}
        low, high = min(counts), max(counts)
        return f"budget {self.budget}, {low if low == high else f'{low} to {high}'} seed{'s' if high > 1 else ''}"

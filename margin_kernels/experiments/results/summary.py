"""A sweep's records as one table: mean and standard deviation over the seeds for each model at each point.

mean = sum x_s / S      std = sqrt(sum (x_s - mean)^2 / (S - 1)), none for one seed
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import write_csv, write_json
from .record import Record

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Measure:
    """One column: its name in the files, its heading, the number in a record (None: not measured), how it prints
    (factor and digits), whether it is printed at all, how a plot calls it where the heading is too short, and of an
    error at which test images it was counted (clean, fgsm, ifgsm, worst)."""

    key: str
    heading: str
    value: Callable[[Record], float | None]
    factor: float = 1.0
    digits: int = 3
    shown: bool = True
    name: str = ""
    of: str = ""

    @property
    def words(self) -> str:
        return self.name or self.heading


def _evaluation(key: str) -> Callable[[Record], float | None]:
    return lambda record: record.measurements.get(key)


def _error(key: str) -> Callable[[Record], float | None]:
    def value(record: Record) -> float | None:
        accuracy = record.measurements.get(key)
        return None if accuracy is None else 1 - accuracy

    return value


def _last(key: str) -> Callable[[Record], float | None]:
    return lambda record: record.history[-1].get(key) if record.history else None


def _ms_per_step(record: Record) -> float | None:
    epochs = [epoch["ms_per_step"] for epoch in record.history if "ms_per_step" in epoch]
    return statistics.median(epochs) if epochs else None


def _other_side(side: str, key: str) -> Callable[[Record], float | None]:
    """Error at black-box images, or of the attacker at this network's."""

    def value(record: Record) -> float | None:
        accuracy = record.measurements.get(side, {}).get(key)
        return None if accuracy is None else 1 - accuracy

    return value


MEASURES = (
    Measure("error", "error %", _error("clean"), 100, 2, name="test error, %", of="clean"),
    Measure("fgsm_error", "FGSM %", _error("fgsm_ce"), 100, 2, name="error under FGSM, %", of="fgsm"),
    Measure(
        "fgsm_gap_error",
        "FGSM gap %",
        _error("fgsm_gap"),
        100,
        2,
        name="error under FGSM on the logit gap, %",
        of="fgsm",
    ),
    Measure("ifgsm_error", "IFGSM %", _error("ifgsm_ce"), 100, 2, shown=False, of="ifgsm"),
    Measure(
        "ifgsm_gap_error",
        "IFGSM gap %",
        _error("ifgsm_gap"),
        100,
        2,
        name="error under IFGSM on the logit gap, %",
        of="ifgsm",
    ),
    Measure("worst_error", "worst %", _error("worst"), 100, 2, shown=False, of="worst"),
    Measure(
        "black_box_fgsm_error",
        "black box FGSM %",
        _other_side("black_box", "fgsm_ce"),
        100,
        2,
        name="error under FGSM, black box, %",
        of="fgsm",
    ),
    Measure(
        "black_box_ifgsm_error",
        "black box IFGSM %",
        _other_side("black_box", "ifgsm_ce"),
        100,
        2,
        shown=False,
        of="ifgsm",
    ),
    Measure(
        "black_box_ifgsm_gap_error", "black box IFGSM gap %", _other_side("black_box", "ifgsm_gap"), 100, 2, of="ifgsm"
    ),
    Measure("reverse_fgsm_error", "attacker FGSM %", _other_side("reverse", "fgsm_ce"), 100, 2, shown=False, of="fgsm"),
    Measure(
        "reverse_ifgsm_gap_error",
        "attacker IFGSM gap %",
        _other_side("reverse", "ifgsm_gap"),
        100,
        2,
        shown=False,
        of="ifgsm",
    ),
    Measure("zero_ce", "zero grad. %", _evaluation("zero_ce"), 100, 1),
    Measure("saturated", "1 - p < 6e-8 %", _evaluation("saturated"), 100, 1, shown=False),
    Measure("deepfool_norm", "margin", _evaluation("deepfool_norm"), name="margin, mean l2 norm of DeepFool"),
    Measure("deepfool_norm_correct", "of correct", _evaluation("deepfool_norm_correct"), shown=False),
    Measure("rho_adv", "rho_adv", _evaluation("rho_adv"), 1, 4, name="relative margin, rho_adv"),
    Measure("validation_accuracy", "valid. %", _last("validation_accuracy"), 100, 2),
    Measure("train_accuracy", "train %", _last("train_accuracy"), 100, 2, shown=False),
    Measure("epochs", "epochs", lambda record: len(record.history), 1, 0, shown=False),
    Measure("ms_per_step", "ms/step", _ms_per_step, 1, 1),
    Measure("seconds", "seconds", lambda record: sum(record.seconds.values()), 1, 0, shown=False),
)


def rows(records: list[Record]) -> list[dict[str, Any]]:
    """One row per model and point, in the order of the sweep: labels, values, number of seeds, and mean and std of each
    measure that some record has; None where a seed has no number (no image classified correctly, say)."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.point, record.model), []).append(record)
    points = list(dict.fromkeys(point for point, _ in groups))
    result = []
    for (point, model), group in sorted(groups.items(), key=lambda item: points.index(item[0][0])):
        row: dict[str, Any] = {"model": model, "point": point, **group[0].values, "seeds": len(group)}
        for measure in MEASURES:
            found = [value for record in group if (value := measure.value(record)) is not None]
            if found:
                complete = len(found) == len(group)
                row[f"{measure.key}_mean"] = statistics.fmean(found) if complete else None
                row[f"{measure.key}_std"] = statistics.stdev(found) if complete and len(found) > 1 else None
        result.append(row)
    return result


def write_summary(
    folder: Path, name: str, budget: str, records: list[Record], failed: dict[str, str]
) -> list[dict[str, Any]]:
    """summary.csv: the rows, which are returned; summary.json: sweep, budget, radius of the attacks, what failed,
    versions and machine."""
    table = rows(records)
    write_csv(folder / "summary.csv", table)
    first = records[0] if records else None
    about = {
        "sweep": name,
        "budget": budget,
        "eps": first and first.measurements.get("eps"),
        "failed": sorted(failed),
        "versions": first and first.versions,
        "machine": first and first.machine,
    }
    write_json(folder / "summary.json", about)
    return table


def show(console: Console, table: list[dict[str, Any]], title: str) -> None:
    """Prints the rows: a block per point, a line per model, `mean +- std`."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    shown = [m for m in MEASURES if m.shown and any(f"{m.key}_mean" in row for row in table)]
    printed = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    printed.add_column("", no_wrap=True)
    for measure in shown:
        printed.add_column(measure.heading, justify="right", no_wrap=True)
    previous = ""
    for row in table:
        if row["point"] != previous:
            previous = row["point"]
            printed.add_row(Text(previous, style="italic"))
        printed.add_row(Text(row["model"]), *(cell(measure, row) for measure in shown))
    # as wide as it needs to be, also where the output goes into a file
    wide = Console(file=console.file, width=1000)
    wide.width = max(Measurement.get(wide, wide.options, printed).maximum, console.width)
    wide.print(printed)


def cell(measure: Measure, row: dict[str, Any]) -> str:
    """A printed mean with its standard deviation, or a dash."""
    mean, std = row.get(f"{measure.key}_mean"), row.get(f"{measure.key}_std")
    if mean is None:
        return "-"
    text = f"{measure.factor * mean:.{measure.digits}f}"
    return text if std is None else f"{text} ± {measure.factor * std:.{measure.digits}f}"


def line(record: Record) -> str:
    """A finished cell in one line."""
    if record.evaluation is None:  # a candidate
        return f"validation accuracy {100 * record.history[-1]['validation_accuracy']:.2f} %"
    row = rows([record])[0]
    wanted = ("error", "fgsm_gap_error", "deepfool_norm", "rho_adv")
    parts = [f"{m.heading} {cell(m, row)}" for m in MEASURES if m.key in wanted and f"{m.key}_mean" in row]
    return f"{', '.join(parts)}, {sum(record.seconds.values()):.0f} s"

"""gamma that a large margin loss asked for at each tap, beside the median distance that its network has reached.

asked     config.loss.gamma, or what was measured for gamma auto and gamma_unit "median"
reached   median of d over the test images with d > 0, in the norm of the loss (evaluation["reached"])
"""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .. import objectives
from ..results import Evaluation, Run, Study
from .table import Compared, norm_name


@dataclass(frozen=True)
class Reached:
    """One line: label, norm of the loss, and of each tap what was asked and what was reached (None: not measured)."""

    label: str
    norm: str
    taps: dict[str, tuple[float, float | None]]


def of_run(label: str, run: Run, evaluation: Evaluation) -> Reached | None:
    """The line of a run; None where its loss has no gamma, or none is known."""
    loss = run.config.loss
    if loss.kind != "large_margin":
        return None
    measured = evaluation.get("distance") or {}
    taps = objectives.layers(loss.layers, tuple(tap for tap in measured if tap not in ("input", "output")))
    gamma = run.measured.get("gamma", None if loss.gamma_unit == "median" else loss.gamma)
    gamma = objectives.per_tap(gamma, loss, taps)
    asked = gamma if isinstance(gamma, list) else [gamma] * len(taps)
    if len(asked) != len(taps) or not all(isinstance(value, (int, float)) for value in asked):
        return None
    reached = evaluation.get("reached", {}).get("median", {})
    pairs = zip(taps, asked, strict=True)
    return Reached(label, norm_name(loss.p), {tap: (value, reached.get(tap)) for tap, value in pairs})


def of_networks(models: list[Compared]) -> list[Reached]:
    """The lines of a report of runs."""
    return [line for m in models if (line := of_run(m.label, m.run, m.evaluation)) is not None]


def of_study(study: Study) -> list[Reached]:
    """The lines of a sweep: means over the seeds."""
    lines = []
    for point in study.points:
        for model in study.models:
            label = " / ".join(filter(None, (model, point)))
            found = [of_run(label, record.run, record.measurements) for record in study.of(model, point)]
            known = [line for line in found if line is not None]
            if known and len({(line.norm, *line.taps) for line in known}) == 1:
                taps = {tap: _mean([line.taps[tap] for line in known]) for tap in known[0].taps}
                lines.append(Reached(label, known[0].norm, taps))
    return lines


def _mean(pairs: Sequence[tuple[float, float | None]]) -> tuple[float, float | None]:
    reached = [value for _, value in pairs if value is not None]
    whole = len(reached) == len(pairs)
    return statistics.fmean(asked for asked, _ in pairs), statistics.fmean(reached) if whole else None


def rows(lines: list[Reached]) -> tuple[str, list[str], int]:
    """The head, the lines and the number of columns of the table, as HTML."""
    taps = list(dict.fromkeys(tap for line in lines for tap in line.taps))
    head = "<th></th><th>norm</th>" + "".join(f"<th>{html.escape(tap)}</th>" for tap in taps)
    found = []
    for line in lines:
        cells = "".join(f"<td>{_cell(line.taps.get(tap))}</td>" for tap in taps)
        found.append(f"<tr><td>{html.escape(line.label)}</td><td>{line.norm}</td>{cells}</tr>")
    return head, found, 2 + len(taps)


def _cell(pair: tuple[float, float | None] | None) -> str:
    if pair is None:
        return "-"
    asked, reached = pair
    if reached is None or reached != reached:
        return f"{asked:.3g}<small>not measured</small>"
    share = f" ({100 * reached / asked:.0f} %)" if asked else ""
    return f"{asked:.3g}<small>{reached:.3g}{share}</small>"


NOTE = (
    "Large: the gamma that the loss asked for at the tap. Small: the median distance of the test images that are "
    "classified correctly, in the norm of the loss, and as a share of gamma."
)

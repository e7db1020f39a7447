"""Sweeps as one page: index.html (self-contained), results.csv, results.json, figures/*.png and *.svg.

For each sweep: means and standard deviations over the seeds, published values beside ours with the difference, every
figure of study_figures.py, study_distances.py and study_images.py, and how it was run.
"""

from __future__ import annotations

import csv
import html
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import sweeps
from ..config import EvaluationConfig
from ..results import (
    MEASURES,
    RECORDS,
    Measure,
    Record,
    Records,
    Study,
    Tried,
    read_json,
    read_text,
    shape,
    summary,
    write_csv,
    write_json,
    write_text,
)
from ..training import TOLERANCE, reliable
from . import choices as chosen
from . import gamma, glossary, labels, page, study_distances, study_figures, study_images, takeaway
from .figures import Figure
from .intervals import Interval, counted, student, wilson
from .table import UNRELIABLE


def is_sweep(folder: Path) -> bool:
    """Whether `folder` is that of a sweep."""
    return (folder / RECORDS).is_file()


def load_study(folder: Path, file: Path | None = None) -> Study:
    """The finished cells of a sweep's folder. `file`: the sweep file, for published values and the order of models;
    by default the shipped one that summary.json names, if there is one. Raises ValueError where nothing is finished."""
    records = Records(folder / RECORDS).all()
    if not records:
        raise ValueError(f"{folder / RECORDS}: no records; `margin-kernels sweep` writes them")
    for record in records:
        try:
            shape.check_evaluation(record.measurements, shape.RECORD_EVALUATION)
        except ValueError as error:
            raise ValueError(f"{folder / RECORDS}: {record.cell} cannot be reported: {error}") from None
    about = folder / "summary.json"
    said = read_json(about) if about.is_file() else {}
    shape.check(said, shape.SUMMARY, str(about))
    name, budget = said.get("sweep") or folder.name, said.get("budget") or "unknown"
    if file is None:
        file = sweeps.shipped().get(name)
    models, points = _order(folder) if file is None else sweeps.labels(file)
    rank = {label: i for i, label in enumerate(models)}
    at = {label: i for i, label in enumerate(points)}
    end = len(models) + len(points)  # what the file no longer has comes last
    records.sort(key=lambda r: (at.get(r.point, end), rank.get(r.model, end), r.seed, r.cell))
    if file is None:
        return Study(name, budget, records, {}, folder)
    done = {record.place for record in records}
    values = {
        (model, point): value
        for (model, point), value in sweeps.published(file).items()
        if (model, point) in done or (model.startswith("[") and any(point == at for _, at in done))
    }
    return Study(name, budget, records, values, folder)


def _order(folder: Path) -> tuple[list[str], list[str]]:
    """Models and points as summary.csv lists them: in the order of a sweep file that is not there."""
    table = folder / "summary.csv"
    if not table.is_file():
        return [], []
    try:
        rows = list(csv.DictReader(read_text(table).splitlines()))
        return list(dict.fromkeys(row["model"] for row in rows)), list(dict.fromkeys(row["point"] for row in rows))
    except (csv.Error, KeyError) as error:
        raise ValueError(
            f"{table} must be the table that `margin-kernels sweep` writes, got {error}; delete it, or sweep again"
        ) from None


def distinct(studies: list[Study], folders: list[Path]) -> list[Study]:
    """The studies, named after their folders where several are of one sweep."""
    names = labels.distinct([study.name for study in studies], folders)
    return [replace(study, name=name) for study, name in zip(studies, names, strict=True)]


def write_study_report(folder: Path, studies: list[Study], title: str, data_dir: str | None = None) -> Path:
    """Writes everything into `folder` and returns the page's path. `data_dir`: where the test images are, for those
    that are shown attacked."""
    images = {study.name: study_images.all_figures(study, data_dir) for study in studies}
    drawn = {
        study.name: {**study_figures.all_figures(study), **study_distances.all_figures(study), **images[study.name][0]}
        for study in studies
    }
    rows = {study.name: summary.rows(study.records) for study in studies}
    write_csv(folder / "results.csv", [{"sweep": name, **row} for name in rows for row in rows[name]])
    results = [
        {"sweep": study.name, "budget": study.budget, "rows": rows[study.name]}
        | {"published": [asdict(value) for value in comparison(study)]}
        | ({"choices": plain_choices(found)} if (found := choices(study)) else {})
        for study in studies
    ]
    write_json(folder / "results.json", {"title": title, "sweeps": results})
    for groups in drawn.values():
        for figures in groups.values():
            for figure in figures:
                page.write_bytes(folder / "figures" / f"{figure.name}.png", figure.png)
                write_text(folder / "figures" / f"{figure.name}.svg", figure.svg)
    body = [f"<h1>{html.escape(title)}</h1>", glossary.unfolding()]
    for study in studies:
        body += section(study, drawn[study.name], images[study.name][1])
    write_text(folder / "index.html", page.document(html.escape(title), body))
    return folder / "index.html"


def section(study: Study, groups: dict[str, list[Figure]], note: str) -> list[str]:
    """One sweep's part of the page; `note` says what is not in `groups`, and why."""
    eps = ", ".join(dict.fromkeys(f"{record.measurements['eps']:g}" for record in study.records))
    about = f"{study.note.capitalize()}. Attacks of l_inf radius {eps}, {study.units}."
    body = [f"<h2>{html.escape(study.name.replace('_', ' '))}</h2>"]
    body += [page.takeaways(takeaway.of_study(study)), f"<p>{html.escape(about)}</p>"]
    body += [means(study), *page.notes(_below(study))]
    body += page.gamma_part(gamma.of_study(study), "h3")
    compared = comparison(study)
    if compared:
        body += ["<h3>Ours and the published values</h3>", published_table(compared, study.comparable)]
        if not study.comparable:
            body += page.notes([f"Not comparable: {study.not_comparable}."])
    options = choices(study)
    if options:
        marks = [text for tried in options.values() for text in chosen.marks(tried)]
        body += ["<h3>Chosen on the validation images</h3>", choices_table(options)]
        body += page.notes([chosen.sentence(marks)])
    for heading, figures in groups.items():
        body += [f"<h3>{html.escape(heading)}</h3>", *page.gallery(figures)]
    if note:
        body.append(f"<p>{html.escape(note)}</p>")
    body += ["<h3>How it was run</h3>", page.description_list(study_conditions(study))]
    for model in study.models:
        first = next(record for record in study.records if record.model == model)
        label = ", ".join(filter(None, (model, first.point)))
        body.append(page.config_text(label, first.config))
    return body


def means(study: Study) -> str:
    """The table of the terminal: a block per point, a line per model; below each mean its 95 % interval."""
    rows = summary.rows(study.records)
    shown = [m for m in MEASURES if m.shown and any(f"{m.key}_mean" in row for row in rows)]
    head = "<th></th>" + "".join(f"<th>{html.escape(measure.heading)}</th>" for measure in shown)
    lines = []
    for point in study.points:
        if point:
            lines.append(page.section_line(point, len(shown) + 1))
        for row in (row for row in rows if row["point"] == point):
            records = study.of(row["model"], point)
            cells = "".join(f"<td>{summary.cell(m, row)}{_small(m, records)}</td>" for m in shown)
            lines.append(f"<tr><td>{html.escape(row['model'])}</td>{cells}</tr>")
    return page.scrolled(head, lines, len(shown) + 1, "means")


def _small(measure: Measure, records: list[Record]) -> str:
    """What stands below a mean: its interval where there is one, and the doubt about a timing."""
    text = ""
    if (found := interval(measure, records)) is not None:
        low, high = found
        text = f"<small>{low:.{measure.digits}f} - {high:.{measure.digits}f}</small>"
    if measure.key == "ms_per_step" and not all(reliable(record.timing or {}) for record in records):
        text += f'<small class="doubt">{UNRELIABLE}</small>'
    return text


def interval(measure: Measure, records: list[Record]) -> Interval | None:
    """The 95 % interval in printed units: of the mean over several seeds by Student's t, of an error of one seed by
    Wilson; None of another measurement of one seed, and where a seed has no number."""
    values = [value for record in records if (value := measure.value(record)) is not None]
    if not values or len(values) < len(records):
        return None
    if len(values) > 1:
        found = student(values)
    elif measure.of:
        first = records[0]
        count = counted(first.measurements, first.config.evaluation, measure.of)
        found = wilson(values[0], count) if count > 0 else None
    else:
        found = None
    if found is None:
        return None
    low, high = (measure.factor * end for end in found)
    return (max(low, 0.0), min(high, 100.0)) if measure.factor == 100 else (max(low, 0.0), high)


def _below(study: Study) -> list[str]:
    """What is to be said of the numbers of the means."""
    counts = {len(study.of(model, point)) for model in study.models for point in study.points} - {0}
    several = (
        "mean over the seeds, \N{PLUS-MINUS SIGN} their standard deviation; small, below it: the 95 % interval of "
    )
    several += "the mean by Student's t, cut at 0 and at 100 %"
    single = "small, below an error of one seed: its 95 % interval, binomial (Wilson), over the test images"
    words = "; ".join(filter(None, (several if max(counts) > 1 else "", single if min(counts) == 1 else "")))
    doubtful = [r.cell for r in study.records if not reliable(r.timing or {})]
    doubt = (
        f"{UNRELIABLE.capitalize()} of {len(doubtful)} of {len(study.records)} cells: a second network of "
        f"cross-entropy did not take the same time as the first, within {100 * TOLERANCE:.0f} %."
    )
    return [f"{words[0].upper()}{words[1:]}.", doubt if doubtful else ""]


@dataclass(frozen=True)
class PublishedValue:
    """A number of a paper beside ours, both in printed units: labels of model and point, key of the measure; ours and
    delta = ours - published are None where the sweep has no such model, or it was not measured."""

    model: str
    point: str
    measure: str
    ours: float | None
    published: float
    delta: float | None

    @property
    def label(self) -> str:
        return " / ".join(filter(None, (self.model, self.point)))


def comparison(study: Study) -> list[PublishedValue]:
    """Every published value of the study."""
    rows = {(row["model"], row["point"]): row for row in summary.rows(study.records)}
    result = []
    for (model, point), values in study.published.items():
        for measure in (m for m in MEASURES if m.key in values):
            mean = rows.get((model, point), {}).get(f"{measure.key}_mean")
            ours = None if mean is None else measure.factor * mean
            delta = None if ours is None else ours - values[measure.key]
            result.append(PublishedValue(model, point, measure.key, ours, values[measure.key], delta))
    return result


def published_table(found: list[PublishedValue], comparable: bool = True) -> str:
    """The published values as a table, each with a remark where the budget was not that of the paper."""
    by_key = {measure.key: measure for measure in MEASURES}
    lines = []
    for value in found:
        measure = by_key[value.measure]
        ours = "-" if value.ours is None else f"{value.ours:.{measure.digits}f}"
        delta = "-" if value.delta is None else f"{value.delta:+.{measure.digits}f}"
        remark = "" if comparable else '<small class="doubt">not comparable</small>'
        cells = (html.escape(measure.heading), ours, f"{value.published:g}{remark}", delta)
        lines.append(f"<tr><td>{html.escape(value.label)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<th></th><th>measure</th><th>ours</th><th>published</th><th>delta</th>"
    return page.scrolled(head, lines, 5, "compared")


def choices(study: Study) -> dict[tuple[str, str], list[Tried]]:
    """What each model chose among, by model and point; only models that chose."""
    return {record.place: record.choice for record in study.records if record.choice}


def plain_choices(found: dict[tuple[str, str], list[Tried]]) -> list[dict[str, Any]]:
    """The same as rows of JSON: model, point, setting, mean validation accuracy over the seeds, whether chosen."""
    return [
        {"model": model, "point": point, "setting": sweeps.words(tried.values)}
        | {"validation_accuracy": tried.validation_accuracy, "chosen": tried.chosen}
        for (model, point), options in found.items()
        for tried in options
    ]


def choices_table(found: dict[tuple[str, str], list[Tried]]) -> str:
    """The same as a table, what was chosen marked."""
    lines = []
    for place, options in found.items():
        for tried, mark in zip(options, chosen.marks(options), strict=True):
            words = (" / ".join(filter(None, place)), sweeps.words(tried.values))
            cells = (*words, f"{100 * tried.validation_accuracy:.2f}", mark)
            style = ' class="chosen"' if chosen.CHOSEN in mark else ""
            lines.append(f"<tr{style}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    return page.scrolled("<th></th><th>setting</th><th>valid. %</th><th></th>", lines, 4, "compared")


def _attacked(evaluation: EvaluationConfig) -> str:
    """How many images were attacked, and how many of them by IFGSM."""
    every, iterated = evaluation.attack_samples, evaluation.ifgsm_samples
    return f"{'all' if every is None else every}, by IFGSM {'all of them' if iterated is None else iterated}"


def study_conditions(study: Study) -> dict[str, Any]:
    """How the cells were run."""
    records = study.records

    def each(value: Callable[[Record], Any]) -> str:
        return ", ".join(dict.fromkeys(str(value(record)) for record in records))

    def machine(record: Record) -> str:
        own = {
            name: record.machine.get(name) or "unknown" for name in ("processor", "cores", "torch_threads", "device")
        }
        where = record.machine.get("gpu") or own["device"]
        return f"{own['processor']}, {own['cores']} cores, {own['torch_threads']} threads, {where}"

    seconds = sum(sum(record.seconds.values()) for record in records)
    return {
        "budget": study.budget,
        "cells": len(records),
        "seeds": each(lambda record: record.seed),
        "epochs": each(lambda record: record.config.training.epochs),
        "data": each(lambda record: record.config.data.name),
        "network": each(lambda record: f"{record.config.model.name}, {record.parameters:,} parameters"),
        "test images": each(lambda record: record.measurements["samples"]),
        "attacked images": each(lambda record: _attacked(record.config.evaluation)),
        "machine": each(machine),
        "versions": each(lambda record: ", ".join(f"{name} {v}" for name, v in record.versions.items())),
        "time": f"{seconds / 3600:.1f} hours of all cells" if seconds > 3600 else f"{seconds:.0f} s of all cells",
    }

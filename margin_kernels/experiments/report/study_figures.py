"""The plots of a sweep: a measure against what was swept, accuracy against eps and against sigma, a measure by model.

Means over the seeds, with their standard deviation where there are several; published values as open markers. The first
model of the sweep is the reference: where there are more than fit one figure, each figure shows it beside some others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from ..config import value_of
from ..evaluation import METHODS
from ..results import MEASURES, Measure, Record, Study, summary
from .figures import COLOURS, MARKERS, STYLES, Figure, draw

TOGETHER = 6  # models in one figure beside the reference
CURVE = 3  # radii that make a curve
SWEPT = (
    "error",
    "ifgsm_gap_error",
    "deepfool_norm",
)  # the measures that are drawn, those with published values besides
WORDS = {"fgsm": "FGSM", "ifgsm": "IFGSM", "ce": "cross-entropy", "gap": "the logit gap"}
AXES = {"data.label_noise": ("wrong training labels, %", 100), "data.train_fraction": ("training images, %", 100)}


@dataclass(frozen=True)
class Swept:
    """What the points of a sweep differ in: a dotted key, its words, the factor of its values, value by point."""

    key: str
    words: str
    factor: float
    values: dict[str, float]

    @property
    def logarithmic(self) -> bool:
        low, high = min(self.values.values()), max(self.values.values())
        return low > 0 and high > 20 * low


def swept(study: Study) -> Swept | None:
    """The one number, besides those of training, in which the points differ; None where there is none, or several."""
    firsts = {point: next(record for record in study.records if record.point == point) for point in study.points}
    keys = dict.fromkeys(key for record in firsts.values() for key in record.values)
    found = []
    for key in keys:
        values = {point: value_of(record.config, key) for point, record in firsts.items()}
        numbers = all(isinstance(value, (int, float)) for value in values.values())
        if numbers and not key.startswith("training.") and len(set(values.values())) > 1:
            words, factor = AXES.get(key, (key.rsplit(".", 1)[-1].replace("_", " "), 1))
            found.append(Swept(key, words, factor, values))
    distinct = len(found) == 1 and len(set(found[0].values.values())) == len(study.points)
    return found[0] if distinct else None


def all_figures(study: Study) -> dict[str, list[Figure]]:
    """Every plot of one sweep, grouped under its heading."""
    axis = swept(study)
    groups: dict[str, list[Figure]] = {}
    plots = [by_model(study, measure) if axis is None else against(study, measure, axis) for measure in drawn(study)]
    groups["By model" if axis is None else f"Against {axis.words}"] = [figure for plot in plots for figure in plot]
    for point in study.points:
        for side in ("", "black_box", "reverse"):
            figures = list(curves(study, point, side))
            if figures:
                groups[f"Accuracy against eps, {side_words(study, side)}{place(point)}"] = figures
        figures = list(noise(study, point))
        if figures:
            groups[f"Accuracy under Gaussian noise{place(point)}"] = figures
    return groups


def _title(measure: Measure) -> str:
    """A measure's words without its unit, as a heading."""
    return measure.words[0].upper() + measure.words[1:].removesuffix(", %")


def drawn(study: Study) -> list[Measure]:
    """The measures that are drawn: those of SWEPT, and those with published values."""
    wanted = {*SWEPT, *(key for values in study.published.values() for key in values)}
    return [m for m in MEASURES if m.key in wanted and any(m.value(r) is not None for r in study.records)]


def together(models: Sequence[str]) -> list[list[str]]:
    """The models of each figure: the first one and at most TOGETHER others, as evenly as can be."""
    reference, others = models[0], list(models[1:])
    count = max(1, math.ceil(len(others) / TOGETHER))
    return [[reference, *part.tolist()] for part in np.array_split(np.array(others, dtype=object), count)]


def pages(study: Study, name: str) -> Iterator[tuple[str, str, list[str]]]:
    """File stem, part of the title, and models of each figure."""
    pages = together(study.models)
    for i, models in enumerate(pages, 1):
        many = len(pages) > 1
        yield f"{study.name}_{name}{f'_{i}' if many else ''}", f" ({i}/{len(pages)})" if many else "", models


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _bars(stds: Sequence[float]) -> Sequence[float] | None:
    """No error bars where one run stands alone."""
    return stds if any(stds) else None


def line_style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index], "linestyle": STYLES[index], "marker": MARKERS[index], "markersize": 4.5}


def _open(index: int | None) -> dict[str, Any]:
    """An open marker: of a model's colour, or black for a published value of no model here."""
    colour, marker = ("#000000", "*") if index is None else (COLOURS[index], MARKERS[index])
    size = 11 if index is None else 8
    return {"color": colour, "marker": marker, "linestyle": "none", "markerfacecolor": "white", "markersize": size}


def finish(axes: Axes, title: str, study: Study, legend: bool = True) -> None:
    axes.figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    axes.set_title(study.note, fontsize=8, color="#555555")
    if legend:
        named = dict(
            zip(*reversed(axes.get_legend_handles_labels()), strict=True)
        )  # one entry for all marks of a model
        labels = sorted(named, key=lambda label: "published" in label)
        axes.figure.legend([named[label] for label in labels], labels, loc="outside lower center", ncols=2)


def against(study: Study, measure: Measure, axis: Swept) -> Iterator[Figure]:
    """`measure` against what was swept, a line per model."""
    means = summary.rows(study.records)
    everything = [measure.factor * row[f"{measure.key}_mean"] for row in means if f"{measure.key}_mean" in row]
    everything += [values[measure.key] for values in study.published.values() if measure.key in values]
    for name, part, models in pages(study, f"{measure.key}_{axis.key.rsplit('.', 1)[-1]}"):

        def paint(axes: Axes, models: list[str] = models, part: str = part) -> None:
            for i, model in enumerate(models):
                found = [row for row in means if row["model"] == model and row.get(f"{measure.key}_mean") is not None]
                found.sort(key=lambda row: axis.values[row["point"]])
                x = [axis.factor * axis.values[row["point"]] for row in found]
                y = [measure.factor * row[f"{measure.key}_mean"] for row in found]
                std = [measure.factor * (row[f"{measure.key}_std"] or 0.0) for row in found]
                axes.errorbar(x, y, _bars(std), label=model, capsize=2, **line_style(i))
            for (model, point), values in study.published.items():
                index = models.index(model) if model in models else None
                if measure.key in values and point in axis.values and (index is not None or _foreign(study, model)):
                    style = _open(index)
                    axes.plot(
                        axis.factor * axis.values[point],
                        values[measure.key],
                        **style,
                        label=f"{model}, {published(study)}",
                    )
            _scale(axes, axis, everything)
            axes.set(xlabel=axis.words, ylabel=measure.words)
            finish(axes, _title(measure) + part, study)

        caption = f"{_title(measure)} on test images, {mean_words(study)}; {study.note}.{_open_words(study, measure)}"
        yield draw(name, caption, paint, tall=True)


def mean_words(study: Study) -> str:
    several = any(len(study.of(model, point)) > 1 for model in study.models for point in study.points)
    return "mean and standard deviation over the seeds" if several else "one run each"


def _open_words(study: Study, measure: Measure) -> str:
    return _open_note(study) if any(measure.key in values for values in study.published.values()) else ""


def published(study: Study) -> str:
    """How a legend calls a published value."""
    return "published" if study.comparable else "published (not comparable)"


def _open_note(study: Study) -> str:
    """The end of a caption where there are published values."""
    return f" Open markers: published values{'' if study.comparable else f', not comparable: {study.not_comparable}'}."


def _foreign(study: Study, model: str) -> bool:
    """Whether a published value is of no model of the sweep."""
    return model not in study.models and model.startswith("[")


def _scale(axes: Axes, axis: Swept, values: list[float]) -> None:
    """The swept values as ticks; the same vertical axis for all figures of a measure."""
    ticks = sorted(axis.factor * value for value in axis.values.values())
    if axis.logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    low, high = min(values), max(values)
    if low > 0 and high > 10 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.15, high * 1.3)
        steps = [m * 10.0**k for k in range(-3, 4) for m in (1, 2, 5)]
        shown = [step for step in steps if low / 1.15 <= step <= high * 1.3]
        axes.set_yticks(shown, [f"{step:g}" for step in shown])
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        space = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        axes.set_ylim(low - space, high + space)


def side_words(study: Study, side: str) -> str:
    """Who is attacked by whom."""
    words = {"": "white box", "black_box": "black box"}
    return words.get(side) or f"transferred to {' and '.join(sorted(_attackers(study)))}"


def curves(study: Study, point: str, side: str) -> Iterator[Figure]:
    """Accuracy against eps under each attack: that of each model at its own images (side ""), at the attacker's
    ("black_box"), and that of the attacker at each model's ("reverse"). The attacker's own curve: white box."""
    curve, prefix = f"{side}_curves".lstrip("_"), f"{side}_".lstrip("_")
    remark = {
        "": "",
        "black_box": " The attacker itself: white box.",
        "reverse": " Each curve: the images were attacked on that model; its own: white box.",
    }[side]
    for method in reversed(METHODS):
        for objective in ("gap", "ce"):
            key = f"{method}_{objective}"
            title = f"{WORDS[method]} on {WORDS[objective]}, {side_words(study, side)}"

            def series(record: Record, key: str = key) -> tuple[list[float], list[float]] | None:
                measured = record.measurements
                if not any(curve in other.measurements for other in study.records):
                    return None
                attacker = record.model in _attackers(study)
                found = measured.get("curves" if attacker else curve, {}).get(key)
                return None if found is None else (measured["curve_eps"], found)

            measured = f"{prefix}{method}_{'' if objective == 'ce' else 'gap_'}error"
            stem = f"{prefix}{key}{slug(point)}"
            marks = {
                model: (_eps(study), 100 - values[measured])
                for (model, at), values in study.published.items()
                if at == point and measured in values
            }
            yield from _accuracy(study, point, stem, title, f"eps (l_inf, {study.units})", series, marks, remark)


def _attackers(study: Study) -> set[str]:
    """The models whose networks attacked others."""
    cells = {record.attacker for record in study.records}
    return {record.model for record in study.records if record.cell in cells}


def _eps(study: Study) -> float:
    return study.records[0].measurements["eps"]


def slug(point: str) -> str:
    """A point at the end of a file stem."""
    return "".join(c if c.isalnum() else "_" for c in f" {point}").rstrip("_")


def place(point: str) -> str:
    """A point at the end of a heading."""
    return f", {point}" if point else ""


def noise(study: Study, point: str) -> Iterator[Figure]:
    """Accuracy against the standard deviation of the noise."""

    def series(record: Record) -> tuple[list[float], list[float]] | None:
        measured = record.measurements
        return (measured["noise_sigmas"], measured["noise"]) if "noise" in measured else None

    stem = f"noise{slug(point)}"
    yield from _accuracy(study, point, stem, "Gaussian noise", f"sigma ({study.units})", series, {}, "")


def _accuracy(
    study: Study,
    point: str,
    stem: str,
    title: str,
    words: str,
    series: Callable[[Record], tuple[list[float], list[float]] | None],
    marks: dict[str, tuple[float, float]],
    remark: str,
) -> Iterator[Figure]:
    """Accuracy, %, against what `series` gives of each record; nothing where that is no curve."""
    found: dict[str, tuple[list[float], np.ndarray]] = {}
    for model in study.models:
        runs = [values for record in study.of(model, point) if (values := series(record)) is not None]
        if runs and len(runs[0][0]) >= CURVE:
            found[model] = (runs[0][0], np.array([values for _, values in runs]))
    if not found:
        return
    for name, part, models in pages(study, stem):

        def paint(axes: Axes, models: list[str] = models, part: str = part) -> None:
            for i, model in enumerate(models):
                if model not in found:
                    continue
                x, runs = found[model]
                stats = [_mean_std(column) for column in 100 * runs.T]
                means, stds = zip(*stats, strict=True)
                axes.errorbar(x, means, _bars(stds), label=model, capsize=2, **line_style(i))
            for model, (x_mark, y_mark) in marks.items():
                index = models.index(model) if model in models else None
                if index is not None or _foreign(study, model):
                    axes.plot(x_mark, y_mark, **_open(index), label=f"{model}, {published(study)}")
            axes.set(xlabel=words, ylabel="accuracy, %", ylim=(-2, 102))
            axes.set_xlim(left=0)
            finish(axes, title + part, study)

        note = _open_note(study) if marks else ""
        caption = f"{title}: accuracy on test images, {mean_words(study)}; {study.note}.{remark}{note}"
        yield draw(name, caption, paint, tall=True)


def by_model(study: Study, measure: Measure) -> Iterator[Figure]:
    """`measure` of each model, a figure per point; published values as open markers."""
    rows = summary.rows(study.records)
    for point in study.points:
        found = [row for row in rows if row["point"] == point and row.get(f"{measure.key}_mean") is not None]
        if not found:
            continue
        labels = [row["model"] for row in found]
        marks = {
            model: values[measure.key]
            for (model, at), values in study.published.items()
            if at == point and measure.key in values
        }
        labels += [model for model in marks if model not in labels]

        def paint(
            axes: Axes,
            found: list[Any] = found,
            labels: list[str] = labels,
            marks: dict[str, float] = marks,
            point: Any = point,
        ) -> None:
            means = [measure.factor * row[f"{measure.key}_mean"] for row in found]
            stds = [measure.factor * (row[f"{measure.key}_std"] or 0.0) for row in found]
            axes.errorbar(
                means,
                range(len(found)),
                xerr=_bars(stds),
                linestyle="none",
                marker="o",
                color=COLOURS[2],
                capsize=2,
                label="ours",
            )
            shown = [(value, labels.index(model)) for model, value in marks.items()]
            if shown:
                style = {**_open(None), "marker": "D", "markersize": 6, "color": COLOURS[3], "clip_on": False}
                axes.plot([x for x, _ in shown], [y for _, y in shown], **style, label=published(study))
            axes.set_yticks(range(len(labels)), labels)
            axes.set_ylim(len(labels) - 0.5, -0.5)
            axes.tick_params(axis="y", length=0)
            ends = [mean + std for mean, std in zip(means, stds, strict=True)] + [x for x, _ in shown]
            axes.set_xlim(0, 1.06 * max(ends) or 1.0)
            axes.set_xlabel(measure.words)
            finish(axes, ", ".join(filter(None, (_title(measure), point))), study, legend=bool(shown))

        stem = f"{study.name}_{measure.key}{slug(point)}"
        caption = f"{_title(measure)} on test images, {mean_words(study)}; {study.note}.{_open_words(study, measure)}"
        yield draw(stem, caption, paint, tall=len(labels) > 8)

"""The one table of a comparison: measurements down, models across; the same rows in the terminal, in HTML and in
CSV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..results import Epoch, Evaluation, Run
from ..training import TOLERANCE, reliable
from .intervals import Interval, counted, wilson

# Of the terminal's table: the longest label of a row, and a model's numbers with their space.
LABEL_WIDTH, COLUMN_WIDTH = 30, 10


@dataclass(frozen=True)
class Compared:
    """One network of a comparison: label of its column, its run, its measurements, cost of a step where measured."""

    label: str
    run: Run
    evaluation: Evaluation
    timing: dict[str, float] | None = None

    @property
    def history(self) -> list[Epoch]:
        return self.run.history


@dataclass(frozen=True)
class Row:
    """One measurement: its CSV column, its words, how to get it, how to print it, whether larger is better (None:
    neither), and of an accuracy how many images it is a share of."""

    key: str
    label: str
    value: Callable[[Compared], float | None]
    form: Callable[[float], str]
    larger: bool | None = None
    images: Callable[[Compared], int] | None = None


@dataclass(frozen=True)
class Section:
    title: str
    rows: list[Row]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _evaluation(key: str) -> Callable[[Compared], float | None]:
    return lambda model: model.evaluation.get(key)


def _images(part: str) -> Callable[[Compared], int]:
    return lambda model: counted(model.evaluation, model.run.config.evaluation, part)


def _tap(tap: str) -> Callable[[Compared], float | None]:
    return lambda model: model.evaluation["distance"].get(tap)


def _timing(key: str) -> Callable[[Compared], float | None]:
    return lambda model: (model.timing or {}).get(key)


def sections(models: list[Compared]) -> list[Section]:
    """The rows that these models have, grouped; every label fits the first column of an 80-column terminal."""
    first = models[0].evaluation
    taps = list(dict.fromkeys(tap for model in models for tap in model.evaluation["distance"]))
    words = {"fgsm": "FGSM", "ifgsm": "IFGSM", "ce": "cross-entropy", "gap": "logit gap"}
    attacked = [
        Row(
            f"{method}_{objective}",
            f"{words[method]} on {words[objective]}",
            _evaluation(f"{method}_{objective}"),
            _percent,
            True,
            _images(method),
        )
        for method in ("fgsm", "ifgsm")
        for objective in ("ce", "gap")
    ]
    clean = Row("clean", "clean", _evaluation("clean"), _percent, True, _images("clean"))
    worst = Row("worst", "worst of the four", _evaluation("worst"), _percent, True, _images("worst"))
    zero = [Row(f"zero_{key}", f"of {words[key]}", _evaluation(f"zero_{key}"), _percent) for key in ("ce", "gap")]
    if any("saturated" in model.evaluation for model in models):  # older records have none
        zero.append(Row("saturated", "1 - p_y below 6e-8", _evaluation("saturated"), _percent))
    norms = [
        Row("deepfool_norm", "mean l2 norm", _evaluation("deepfool_norm"), "{:.3f}".format, True),
        Row("deepfool_norm_correct", "of correct images", _evaluation("deepfool_norm_correct"), "{:.3f}".format, True),
        Row("rho_adv", "relative to image, rho_adv", _evaluation("rho_adv"), "{:.3f}".format, True),
    ]
    distances = [Row(f"distance.{tap}", tap, _tap(tap), "{:.3g}".format) for tap in taps]
    groups = [
        Section(f"Accuracy (linf, eps = {first['eps']:g})", [clean, *attacked, worst]),
        Section("Zero attack gradients", zero),
        Section("DeepFool", norms),
    ]
    if distances:
        groups.append(Section(f"Mean signed distance, {norm_name(first['distance_p'])}", distances))
    if any(model.timing for model in models):
        cost = [
            Row("ms_per_step", "ms per step", _timing("ms_per_step"), "{:.2f}".format),
            Row("ratio", "ratio to cross-entropy", _timing("ratio"), "{:.2f}x".format),
        ]
        if any("control" in (model.timing or {}) for model in models):  # not timed by earlier versions
            cost.append(Row("control", "cross-entropy to itself", _timing("control"), "{:.2f}x".format))
        groups.append(Section("Cost of training", cost))
    named = {}
    for model in models:
        for name, found in model.evaluation.get("attacks", {}).items():
            label = f"{name.removeprefix('foolbox:')}, {found['norm']} {found['eps']:g}"
            named[name, found["norm"], found["eps"]] = Row(
                f"{name}_{found['eps']:g}",
                label,
                _named(name, found),
                _percent,
                True,
                lambda model, name=name: model.evaluation["attacks"][name]["samples"],  # type: ignore[misc]
            )
    if named:
        groups.append(Section("Accuracy, other attacks", list(named.values())))
    for side, title in (("black_box", "Accuracy, black box"), ("reverse", "Accuracy of the attacker")):
        if any(side in model.evaluation for model in models):
            rows = [replace(row, key=f"{side}_{row.key}", value=_side(side, row.key)) for row in attacked]
            groups.append(Section(f"{title} (linf, eps = {first['eps']:g})", rows))
    sigmas = list(dict.fromkeys(sigma for model in models for sigma in model.evaluation.get("noise_sigmas", [])))
    if sigmas:
        rows = [
            Row(f"noise_{sigma:g}", f"sigma {sigma:g}", _noise(sigma), _percent, True, _images("noise"))
            for sigma in sigmas
        ]
        groups.append(Section("Accuracy under Gaussian noise", rows))
    return groups


def _named(name: str, asked: dict[str, Any]) -> Callable[[Compared], float | None]:
    """The accuracy under an attack of that radius; a model that was attacked within another has none."""

    def value(model: Compared) -> float | None:
        found = model.evaluation.get("attacks", {}).get(name, {})
        return found.get("accuracy") if found.get("eps") == asked["eps"] else None

    return value


def _side(side: str, key: str) -> Callable[[Compared], float | None]:
    return lambda model: model.evaluation.get(side, {}).get(key)


def _noise(sigma: float) -> Callable[[Compared], float | None]:
    def value(model: Compared) -> float | None:
        evaluation = model.evaluation
        return dict(zip(evaluation.get("noise_sigmas", []), evaluation.get("noise", []), strict=True)).get(sigma)

    return value


def norm_name(p: float | str) -> str:
    """l1, l2, linf."""
    return "linf" if p in ("inf", float("inf")) else f"l{p:g}"


def best(row: Row, models: list[Compared]) -> set[int]:
    """Indices of the models whose printed value is the best of the row; empty where the row is no contest."""
    if row.larger is None:
        return set()
    values = {i: value for i, model in enumerate(models) if (value := row.value(model)) is not None}
    if len(values) < 2:
        return set()
    top = row.form(max(values.values()) if row.larger else min(values.values()))
    return {i for i, value in values.items() if row.form(value) == top}


def interval(row: Row, model: Compared) -> Interval | None:
    """The 95 % interval of an accuracy, of one seed; None of any other measurement, and where there is no value."""
    value = row.value(model)
    if row.images is None or value is None or value != value:
        return None
    count = row.images(model)
    return wilson(value, count) if count > 0 else None


def unreliable(model: Compared) -> bool:
    """Whether the machine was too busy for the timing of this model: cross-entropy to itself is far from 1."""
    return model.timing is not None and not reliable(model.timing)


UNRELIABLE = "timing unreliable"
TIMED = ("ms_per_step", "ratio")  # the rows that it is about


def images_words(models: list[Compared]) -> str:
    """Of how many test images the accuracies are shares, in words."""
    rows = [row for section in sections(models) for row in section.rows if row.images is not None]
    found = {row.images(m) for row in rows if row.images for m in models if row.value(m) is not None}
    low, high = min(found), max(found)
    return f"{high} test images" if low == high else f"{low} to {high} test images, as many as were attacked"


def doubts(models: list[Compared]) -> str:
    """Which timings are unreliable and why, in a sentence; "" where none is."""
    found = [f"{model.label} ({model.timing['control']:.2f})" for model in models if model.timing and unreliable(model)]
    if not found:
        return ""
    return (
        f"{UNRELIABLE.capitalize()}: {', '.join(found)}. In brackets what a second network of "
        f"cross-entropy took in the same run, as a ratio to the first: it must be within {100 * TOLERANCE:.0f} % of 1."
    )


def show(console: Console, models: list[Compared], title: str) -> None:
    """Prints the table, in parts where the terminal is too narrow for all models; the best value of a row in bold."""
    fitting = max(1, (console.width - LABEL_WIDTH) // COLUMN_WIDTH)
    for first in range(0, len(models), fitting):
        part = range(first, min(first + fitting, len(models)))
        console.print(_table(models, part, title if first == 0 else None))
    if said := doubts(models):
        console.print(said, highlight=False, markup=False)


def _table(models: list[Compared], part: range, title: str | None) -> Table:
    table = Table(
        title=title and Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for model in (models[i] for i in part):
        # a word a line keeps columns as narrow as their numbers
        table.add_column(Text(model.label.replace(" ", "\n").replace("-", "-\n")), justify="right", vertical="bottom")
    for i, section in enumerate(sections(models)):
        if i:
            table.add_row()
        table.add_row(Text(section.title, style="italic"))
        for row in section.rows:
            winners = best(row, models)
            texts = {i: cell(row, models[i]) for i in part}
            table.add_row("  " + row.label, *(Text(t, style="bold" if i in winners else "") for i, t in texts.items()))
    return table


def cell(row: Row, model: Compared) -> str:
    """A printed value, or a dash."""
    value = row.value(model)
    return "-" if value is None or value != value else row.form(value)


def flat(models: list[Compared]) -> list[dict[str, Any]]:
    """One CSV row per model; NAME_low and NAME_high: the 95 % interval of an accuracy."""
    rows = []
    for model in models:
        loss = model.run.config.loss
        entry: dict[str, Any] = {"model": model.label, "loss": loss.kind}
        if loss.kind == "large_margin":
            gamma = loss.gamma if isinstance(loss.gamma, list) else [loss.gamma]
            entry |= {"p": loss.p, "gamma": " ".join(v if isinstance(v, str) else f"{v:.6g}" for v in gamma)}
        entry["eps"] = model.evaluation["eps"]
        for section in sections(models):
            for row in section.rows:
                entry[row.key] = row.value(model)
                if row.images is not None:
                    entry[f"{row.key}_low"], entry[f"{row.key}_high"] = interval(row, model) or (None, None)
        rows.append(entry)
    return rows

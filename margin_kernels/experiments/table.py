"""The one table of a comparison: measurements down, models across; the same rows in the terminal, in HTML and in
CSV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

Model = dict[str, Any]  # name, label, config, history, evaluation, timing


@dataclass(frozen=True)
class Row:
    """One measurement: its CSV column, its words, how to get it, how to print it, and whether larger is better
    (None: neither)."""

    key: str
    label: str
    value: Callable[[Model], float | None]
    form: Callable[[float], str]
    larger: bool | None = None


@dataclass(frozen=True)
class Section:
    title: str
    rows: list[Row]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _evaluation(key: str) -> Callable[[Model], float | None]:
    return lambda model: model["evaluation"].get(key)


def _tap(tap: str) -> Callable[[Model], float | None]:
    return lambda model: model["evaluation"]["distance"].get(tap)


def _timing(key: str) -> Callable[[Model], float | None]:
    return lambda model: (model.get("timing") or {}).get(key)


def sections(models: list[Model]) -> list[Section]:
    """The rows that these models have, grouped."""
    first = models[0]["evaluation"]
    taps = list(dict.fromkeys(tap for model in models for tap in model["evaluation"]["distance"]))
    accuracy = [Row("clean", "clean", _evaluation("clean"), _percent, True)]
    words = {"fgsm": "FGSM", "ifgsm": "IFGSM", "ce": "cross-entropy", "gap": "logit gap"}
    for method in ("fgsm", "ifgsm"):
        for objective in ("ce", "gap"):
            key = f"{method}_{objective}"
            accuracy.append(Row(key, f"{words[method]}, {words[objective]}", _evaluation(key), _percent, True))
    accuracy.append(Row("worst", "worst of the four", _evaluation("worst"), _percent, True))
    zero = [Row(f"zero_{key}", words[key], _evaluation(f"zero_{key}"), _percent) for key in ("ce", "gap")]
    norms = [
        Row("deepfool", "DeepFool, mean l2 norm", _evaluation("deepfool"), "{:.3f}".format, True),
        Row("rho_adv", "relative to the image (rho_adv)", _evaluation("rho_adv"), "{:.4f}".format, True),
    ]
    distances = [Row(f"distance.{tap}", tap, _tap(tap), "{:.3g}".format) for tap in taps]
    groups = [
        Section(f"Accuracy (attacks: l_inf, eps = {first['eps']:g})", accuracy),
        Section("Samples whose attack gradient is zero", zero),
        Section("Distance to the boundary", norms),
        Section(f"Mean signed distance per tap (l{first['distance_p']:g})" if first["distance_p"] != "inf" else
                "Mean signed distance per tap (linf)", distances),
    ]  # fmt: skip
    if any(model.get("timing") for model in models):
        cost = [
            Row("ms_per_step", "ms per step", _timing("ms_per_step"), "{:.2f}".format),
            Row("ratio", "ratio to cross-entropy", _timing("ratio"), "{:.2f}x".format),
        ]
        groups.append(Section("Cost of a training step", cost))
    return groups


def best(row: Row, models: list[Model]) -> set[int]:
    """Indices of the models whose printed value is the best of the row; empty where the row is no contest."""
    if row.larger is None:
        return set()
    values = {i: value for i, model in enumerate(models) if (value := row.value(model)) is not None}
    if len(values) < 2:
        return set()
    top = row.form(max(values.values()) if row.larger else min(values.values()))
    return {i for i, value in values.items() if row.form(value) == top}


def show(console: Console, models: list[Model], title: str) -> None:
    """Prints the table; the best value of a row in bold."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("", no_wrap=True)
    for model in models:
        table.add_column(model["label"], justify="right", no_wrap=True)
    for section in sections(models):
        table.add_section()
        table.add_row(f"[italic]{section.title}[/italic]")
        for row in section.rows:
            winners = best(row, models)
            cells = []
            for i, model in enumerate(models):
                text = cell(row, model)
                cells.append(f"[bold]{text}[/bold]" if i in winners else text)
            table.add_row("  " + row.label, *cells)
    console.print(table)


def cell(row: Row, model: Model) -> str:
    """A printed value, or a dash."""
    value = row.value(model)
    return "-" if value is None or value != value else row.form(value)


def flat(models: list[Model]) -> list[dict[str, Any]]:
    """One CSV row per model."""
    rows = []
    for model in models:
        loss = model["config"]["loss"]
        entry: dict[str, Any] = {"model": model["label"], "loss": loss["kind"]}
        if loss["kind"] == "large_margin":
            gamma = loss["gamma"] if isinstance(loss["gamma"], list) else [loss["gamma"]]
            entry |= {"p": loss["p"], "gamma": " ".join(f"{value:.6g}" for value in gamma)}
        entry["eps"] = model["evaluation"]["eps"]
        for section in sections(models):
            entry |= {row.key: row.value(model) for row in section.rows}
        rows.append(entry)
    return rows

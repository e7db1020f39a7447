"""The plots of a report, one panel each: accuracy against eps, distance histograms, distance during training.

Okabe-Ito colours with a line style and a marker each, so that neither colour vision nor a grey print is needed to
tell models apart.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7A7A7A")
STYLES = ("-", "--", "-", "-", "-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

SETTINGS = {
    "figure.figsize": (5.0, 3.5),
    "figure.dpi": 110,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.hashsalt": "margin_kernels",  # the same data gives the same file
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
}


@dataclass(frozen=True)
class Figure:
    """A finished plot: file stem, what it shows in one sentence, SVG text and PNG bytes."""

    name: str
    caption: str
    svg: str
    png: bytes


def draw(name: str, caption: str, paint: Callable[[Axes], Any]) -> Figure:
    """Runs `paint` on fresh axes and keeps the result as SVG and PNG."""
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(layout="constrained")
        try:
            paint(axes)
            vector, raster = io.BytesIO(), io.BytesIO()
            figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
            figure.savefig(raster, format="png", dpi=150)
        finally:
            plt.close(figure)
    return Figure(name, caption, vector.getvalue().decode(), raster.getvalue())


def _style(index: int) -> dict[str, Any]:
    n = index % len(COLOURS)
    return {"color": COLOURS[n], "linestyle": STYLES[n]}


def accuracy_curve(models: list[dict[str, Any]], key: str) -> Figure:
    """Accuracy against eps under one attack; `key` as in evaluation["curves"]."""
    method, objective = key.split("_")
    words = {"ce": "cross-entropy", "gap": "logit gap"}[objective]

    def paint(axes: Axes) -> None:
        for i, model in enumerate(models):
            evaluation = model["evaluation"]
            values = 100 * np.array(evaluation["curves"][key])
            axes.plot(
                evaluation["curve_eps"], values, label=model["label"], marker=MARKERS[i % 8], markersize=4, **_style(i)
            )
        axes.set(title=f"{method.upper()} on the {words}", xlabel="eps (l_inf, images in [0, 1])", ylabel="accuracy, %")
        axes.set_ylim(-2, 102)
        axes.set_xlim(left=0)
        axes.legend()

    return draw(f"accuracy_{key}", f"White-box accuracy against the radius of {method.upper()} on the {words}.", paint)


def distance_histogram(models: list[dict[str, Any]], tap: str) -> Figure:
    """Distribution of the signed distance at one tap over the test samples."""

    def paint(axes: Axes) -> None:
        series = [np.array(model["evaluation"]["distances"][tap]) for model in models]
        joined = np.concatenate(series)
        low, high = np.percentile(joined, [0.5, 99.5])
        edges = np.linspace(min(low, 0), high, 41)
        for i, (model, values) in enumerate(zip(models, series, strict=True)):
            inside = np.clip(values, edges[0], edges[-1])  # the outermost bins hold the rest
            weights = np.full(len(values), 100 / len(values))
            axes.hist(inside, edges, weights=weights, histtype="step", linewidth=1.6, label=model["label"], **_style(i))
        axes.axvline(0, color="#555555", linewidth=1)
        p = models[0]["evaluation"]["distance_p"]
        name = f"l{p}" if p == "inf" else f"l{p:g}"
        axes.set(title=f"Distance at {tap}", xlabel=f"signed distance to the boundary ({name})", ylabel="samples, %")
        _line_legend(axes, models)

    return draw(
        f"histogram_{tap}", f"Signed distance to the nearest boundary at {tap}; left of 0 is misclassified.", paint
    )


def _line_legend(axes: Axes, models: list[dict[str, Any]]) -> None:
    """A legend of lines: histogram outlines would show boxes."""
    handles = [plt.Line2D([], [], label=model["label"], **_style(i)) for i, model in enumerate(models)]
    axes.legend(handles=handles)


def distance_course(models: list[dict[str, Any]], tap: str) -> Figure:
    """Mean signed distance at one tap on validation images after each epoch."""

    def paint(axes: Axes) -> None:
        for i, model in enumerate(models):
            records = [record for record in model["history"] if tap in record.get("distance", {})]
            if records:
                epochs = [record["epoch"] for record in records]
                axes.plot(epochs, [r["distance"][tap] for r in records], label=model["label"], **_style(i))
        axes.axhline(0, color="#555555", linewidth=1)
        axes.set(title=f"Mean distance at {tap}", xlabel="epoch", ylabel="mean signed distance")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend()

    return draw(f"course_{tap}", f"Mean signed distance at {tap} on validation images during training.", paint)


def all_figures(models: list[dict[str, Any]]) -> dict[str, list[Figure]]:
    """Every plot of a report, grouped under its heading."""
    taps = list(models[0]["evaluation"]["distance"])
    shared = [tap for tap in taps if all(tap in model["evaluation"]["distance"] for model in models)]
    groups = {
        "Accuracy against eps": [
            accuracy_curve(models, key) for key in ("ifgsm_gap", "ifgsm_ce", "fgsm_gap", "fgsm_ce")
        ],
        "Distance histograms": [distance_histogram(models, tap) for tap in shared],
    }
    measured = [tap for tap in shared if any(tap in r.get("distance", {}) for m in models for r in m["history"])]
    if measured:
        groups["Distance during training"] = [distance_course(models, tap) for tap in measured]
    return groups

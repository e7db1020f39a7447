"""The plots of a report, one panel each: accuracy against eps, histograms of margins and distances, distance during
training.

Okabe-Ito colours with a line style and a marker each, so that neither colour vision nor a grey print is needed to
tell models apart.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import Collection
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..data import units
from .intervals import counted, wilson
from .table import Compared, norm_name

COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#7A7A7A")
STYLES = ("-", "--", "-", "-", "-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

BROAD = 6.0  # inches: wider figures would be too small beside others
ASINH = "asinh scale"  # linear around 0, logarithmic far from it
POINTS = 5000  # of one line or one cloud: about 100 kB of SVG

SETTINGS: dict[Any, Any] = {
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
    "text.parse_math": False,  # names of models may hold dollars
}


@dataclass(frozen=True)
class Figure:
    """A finished plot: file stem, what it shows in one sentence, SVG text and PNG bytes, and whether it takes a whole
    row of the page."""

    name: str
    caption: str
    svg: str
    png: bytes
    broad: bool = False


def draw(name: str, caption: str, paint: Callable[[Axes], Any], tall: bool = False) -> Figure:
    """Runs `paint` on fresh axes and keeps the result as SVG and PNG; `tall` leaves room for a legend below."""
    return draw_panels(name, caption, lambda panels: paint(panels[0]), 1, 1, (5.0, 4.6 if tall else 3.5))


def draw_panels(
    name: str, caption: str, paint: Callable[[list[Axes]], Any], count: int, columns: int, size: tuple[float, float]
) -> Figure:
    """Runs `paint` on `count` fresh axes, `columns` in a row, of `size` (width, height) in inches each."""
    rows = math.ceil(count / columns)
    with plt.rc_context(SETTINGS):
        figure, grid = plt.subplots(
            rows, columns, layout="constrained", figsize=(columns * size[0], rows * size[1]), squeeze=False
        )
        try:
            for axes in grid.flat[count:]:
                axes.remove()
            paint(list(grid.flat[:count]))
            rasterise(figure)
            vector, raster = io.BytesIO(), io.BytesIO()
            figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
            figure.savefig(raster, format="png", dpi=150)
        finally:
            plt.close(figure)
    stem = re.sub(r"[^\w.=+-]+", "_", name)  # of names in records, which are those of no folder
    return Figure(stem, caption, vector.getvalue().decode(), raster.getvalue(), columns * size[0] > BROAD)


def rasterise(figure: Any) -> None:
    """What has more than POINTS points becomes pixels within the SVG, so that a page stays of a size to be sent."""
    for artist in figure.findobj(Line2D):
        artist.set_rasterized(len(artist.get_xdata(orig=False)) > POINTS)
    for artist in figure.findobj(Collection):
        artist.set_rasterized(len(artist.get_offsets()) > POINTS)


def _style(index: int) -> dict[str, Any]:
    n = index % len(COLOURS)
    return {"color": COLOURS[n], "linestyle": STYLES[n]}


def accuracy_curve(models: list[Compared], key: str) -> Figure:
    """Accuracy against eps under one attack; `key` as in evaluation["curves"]."""
    method, objective = key.split("_")
    words = {"ce": "cross-entropy", "gap": "logit gap"}[objective]

    def paint(axes: Axes) -> None:
        for i, model in enumerate(models):
            evaluation = model.evaluation
            values = 100 * np.array(evaluation["curves"][key], dtype=float)  # null, what was not measured, is a gap
            radii, asked = evaluation["curve_eps"], model.run.config.evaluation
            # Without an attack all images are looked at that FGSM has.
            images = [counted(evaluation, asked, method if eps else "fgsm") for eps in radii]
            mark: dict[str, Any] = {"marker": MARKERS[i % 8], "markersize": 4, "capsize": 2, "elinewidth": 0.8}
            axes.errorbar(radii, values, _bars(values, images), label=model.label, **mark, **_style(i))
        axes.set(
            title=f"{method.upper()} on the {words}",
            xlabel=f"eps (l_inf, {units(model.run.config.data for model in models)})",
            ylabel="accuracy, %",
        )
        axes.set_ylim(-2, 102)
        axes.set_xlim(left=0)
        axes.legend()

    caption = (
        f"White-box accuracy against the radius of {method.upper()} on the {words}, with 95 % intervals for other test "
        "images."
    )
    return draw(f"accuracy_{key}", caption, paint)


def _bars(values: np.ndarray, counts: list[int]) -> np.ndarray:
    """How far below and above each percentage of `counts` images its 95 % interval reaches, [2,P]; NaN stays."""
    ends = [
        (value, value) if math.isnan(value) else 100 * np.array(wilson(value / 100, count))
        for value, count in zip(values, counts, strict=True)
    ]
    return np.abs(np.array(ends).T - values)


def distance_histogram(models: list[Compared], tap: str) -> Figure:
    """Distribution of the signed distance at one tap over the test samples."""
    p = norm_name(models[0].evaluation["distance_p"])
    caption = f"Signed distance to the nearest boundary at {tap}; left of 0 is misclassified, dotted: the mean."
    series = [_samples(model, tap) for model in models]
    axis = f"signed distance to the boundary, {p}"
    return _histogram(f"histogram_{tap}", caption, f"Distance at {tap}", axis, models, series)


def margin_histogram(models: list[Compared]) -> Figure:
    """Distribution of the DeepFool norm over the test samples, negative where misclassified."""
    caption = "l2 norm of the DeepFool perturbation per image; left of 0 is misclassified, dotted: the mean."
    series = [_samples(model) for model in models]
    return _histogram(
        "histogram_margin",
        caption,
        "Margin",
        f"DeepFool norm, l2, {units(model.run.config.data for model in models)}",
        models,
        series,
    )


def _samples(model: Compared, tap: str | None = None) -> np.ndarray:
    """The finite distances of single samples at a tap, or their DeepFool norms; none where they were not measured."""
    evaluation = model.evaluation
    found = evaluation.get("deepfool_norms", []) if tap is None else evaluation.get("distances", {}).get(tap, [])
    values = np.array(found, dtype=float)
    return values[np.isfinite(values)]


def _histogram(
    name: str, caption: str, title: str, axis: str, models: list[Compared], series: list[np.ndarray]
) -> Figure:
    """The distributions of `series`, a strip per model on one axis."""

    def paint(axes: Axes) -> None:
        low, high = np.percentile(np.concatenate(series), [0.5, 99.5])
        scale = _scale([float(np.median(np.abs(values))) for values in series])
        low = min(low, 0.0)
        edges = np.linspace(low, high, 51) if scale is None else _asinh_edges(low, high, scale, 51)
        for i, values in enumerate(series):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)  # the outermost bins hold the rest
            base = len(series) - 1 - i
            heights = base + 0.85 * counts / counts.max()
            axes.stairs(heights, edges, baseline=base, fill=True, color=COLOURS[i % 8], alpha=0.35)
            axes.stairs(heights, edges, baseline=base, color=COLOURS[i % 8], linewidth=1.2)
            axes.plot([np.mean(values)] * 2, [base, base + 0.85], color=COLOURS[i % 8], linewidth=1.2, linestyle=":")
        axes.axvline(0, color="#555555", linewidth=1)
        if scale is not None:
            axes.set_xscale("asinh", linear_width=scale)
            axes.set_xticks(*_asinh_ticks(low, high, scale))
            axes.minorticks_off()
        axes.set_yticks(range(len(series)), [model.label for model in reversed(models)], va="bottom")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set(title=title, xlabel=axis if scale is None else _declared(axis))

    return draw(name, caption, paint)


def _scale(sizes: list[float]) -> float | None:
    """Linear width of an asinh axis for models whose distances differ by more than a factor of 8, or None: linear."""
    positive = [size for size in sizes if size > 0]
    if not positive or max(positive) < 8 * min(positive):
        return None
    return min(positive)


def _declared(words: str) -> str:
    """The words at an asinh axis."""
    return f"{words} ({ASINH})" if words else ASINH


def asinh_axis(axes: Axes, sizes: list[float]) -> None:
    """An asinh y axis where the sizes of what is drawn ask for one, which its label then says."""
    scale = _scale(sizes)
    if scale is not None:
        axes.set_yscale("asinh", linear_width=scale)
        axes.set_yticks(*_asinh_ticks(*axes.get_ylim(), scale))
        axes.set_ylabel(_declared(axes.get_ylabel()))
        axes.minorticks_off()


def _asinh_edges(low: float, high: float, scale: float, count: int) -> np.ndarray:
    """Edges that are equally far apart on an asinh axis."""
    return scale * np.sinh(np.linspace(np.arcsinh(low / scale), np.arcsinh(high / scale), count))


def _asinh_ticks(low: float, high: float, scale: float) -> tuple[list[float], list[str]]:
    """0 and round numbers of an asinh axis, a tenth of the axis apart at least: positions and labels."""
    span = np.arcsinh(high / scale) - np.arcsinh(low / scale)
    decades = range(math.floor(math.log10(scale)) - 1, math.ceil(math.log10(max(high, -low))) + 1)
    candidates = [sign * mantissa * 10.0**k for mantissa in (1, 3) for k in decades for sign in (1, -1)]
    kept = [0.0]
    for tick in sorted(candidates, key=lambda t: (-abs(t) if abs(t) in (1, 10) else 0, abs(t))):
        gaps = [abs(np.arcsinh(tick / scale) - np.arcsinh(other / scale)) for other in kept]
        if low <= tick <= high and min(gaps) > 0.12 * span:
            kept.append(tick)
    return kept, [f"{tick:g}" for tick in kept]


def distance_course(models: list[Compared], tap: str) -> Figure:
    """Mean signed distance at one tap on validation images after each epoch."""

    def paint(axes: Axes) -> None:
        for i, model in enumerate(models):
            records = [record for record in model.history if tap in record.get("distance", {})]
            if records:
                epochs = [record["epoch"] for record in records]
                axes.plot(epochs, [r["distance"][tap] for r in records], label=model.label, **_style(i))
        axes.axhline(0, color="#555555", linewidth=1)
        axes.set(title=f"Mean distance at {tap}", xlabel="epoch", ylabel="mean signed distance")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        lasts = [m.history[-1].get("distance", {}).get(tap) for m in models if m.history]
        asinh_axis(axes, [abs(last) for last in lasts if last is not None])
        crowded = len(models) > 5  # so many lines leave no room for it
        axes.legend(loc="center left" if crowded else "best", bbox_to_anchor=(1.0, 0.5) if crowded else None)

    return draw(f"course_{tap}", f"Mean signed distance at {tap} on validation images during training.", paint)


def all_figures(models: list[Compared]) -> dict[str, list[Figure]]:
    """Every plot of a report, grouped under its heading."""
    taps = list(models[0].evaluation["distance"])
    shared = [tap for tap in taps if all(tap in model.evaluation["distance"] for model in models)]
    evaluations = [model.evaluation for model in models]
    curves = [
        key
        for key in ("ifgsm_gap", "ifgsm_ce", "fgsm_gap", "fgsm_ce")
        if all(key in evaluation["curves"] for evaluation in evaluations)
    ]
    groups = {"Accuracy against eps": [accuracy_curve(models, key) for key in curves]}
    if all(len(_samples(model)) for model in models):
        groups["Histogram of the margin"] = [margin_histogram(models)]
    sampled = [tap for tap in shared if all(len(_samples(model, tap)) for model in models)]
    if sampled:
        groups["Distance histograms"] = [distance_histogram(models, tap) for tap in sampled]
    measured = [tap for tap in shared if any(tap in r.get("distance", {}) for m in models for r in m.history)]
    if measured:
        groups["Distance during training"] = [distance_course(models, tap) for tap in measured]
    return groups

"""The plots of a sweep's distances: densities over the test images, means at each tap during training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ..evaluation import histogram
from ..results import Record, Study
from .figures import COLOURS, STYLES, Figure, asinh_axis, draw, draw_panels
from .study_figures import finish, mean_words, pages, place, slug
from .table import norm_name

DENSITIES = {
    "deepfool_norm": ("Density of the margin", "signed l2 norm of DeepFool,\n{units}", "deepfool_norm_correct"),
    "rho_adv": ("Density of the relative margin", "signed l2 norm of DeepFool\n/ l2 norm of the image", "rho_adv"),
}
SHARE = 0.005  # of the images that may lie outside of a figure on either side
COLUMNS = 2  # taps in a row: as many as a phone can show
RESOLUTION = 60  # bins of a density, as many as that at most


def all_figures(study: Study) -> dict[str, list[Figure]]:
    """Every plot of the distances, grouped under its heading."""
    groups: dict[str, list[Figure]] = {}
    for point in study.points:
        drawn = [figure for measure in DENSITIES for figure in densities(study, point, measure)]
        groups[f"Densities of the margins{place(point)}"] = drawn
        groups[f"Distances during training{place(point)}"] = list(courses(study, point))
    return {heading: figures for heading, figures in groups.items() if figures}


def total(records: list[Record], measure: str) -> np.ndarray | None:
    """Counts of the bins over the seeds, [BINS]; None where a record has neither them nor the values themselves."""
    found = []
    for record in records:
        evaluation = record.measurements
        counts = evaluation.get("histograms", {}).get(measure)
        if counts is None and measure == "deepfool_norm" and "deepfool_norms" in evaluation:  # of an earlier version
            counts = histogram.counts(evaluation["deepfool_norms"], measure)
        found.append(counts)
    return None if not found or None in found else np.sum(found, axis=0)


def densities(study: Study, point: str, measure: str) -> Iterator[Figure]:
    """The density of a measure, a strip per model, all on one scale; nothing where no record has the counts."""
    title, words, mean = DENSITIES[measure]
    words = words.format(units=study.units)
    totals = {model: found for model in study.models if (found := total(study.of(model, point), measure)) is not None}
    totals = {model: found for model, found in totals.items() if found.sum()}
    if not totals:
        return
    for name, part, models in pages(study, f"{measure}_density{slug(point)}"):
        shown = [model for model in models if model in totals]
        if not shown:
            continue
        low = min(0.0, *(histogram.quantile(totals[model], measure, SHARE) for model in shown))
        high = max(histogram.quantile(totals[model], measure, 1 - SHARE) for model in shown)
        curves = [histogram.density(totals[model], measure, (high - low) / RESOLUTION) for model in shown]
        means = [np.mean([r.measurements.get(mean) or np.nan for r in study.of(model, point)]) for model in shown]

        def paint(
            axes: Axes,
            models: list[str] = models,
            shown: list[str] = shown,
            curves: list[tuple[np.ndarray, np.ndarray]] = curves,
            means: list[Any] = means,
            limits: tuple[float, float] = (low, high),
            part: str = part,
        ) -> None:
            top = max(values.max() for _, values in curves)
            for i, (edges, values) in enumerate(curves):
                base, colour = len(shown) - 1 - i, COLOURS[models.index(shown[i])]
                heights = base + 0.9 * values / top
                axes.stairs(heights, edges, baseline=base, fill=True, color=colour, alpha=0.35)
                axes.stairs(heights, edges, baseline=base, color=colour, linewidth=1.1)
                axes.plot([means[i]] * 2, [base, base + 0.9], color=colour, linewidth=1.2, linestyle=":")
            axes.axvline(0, color="#555555", linewidth=1)
            axes.set_yticks(range(len(shown)), shown[::-1], va="bottom")
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.set(xlabel=words, xlim=limits, ylim=(0, len(shown)))
            finish(axes, title + place(point) + part, study, legend=False)

        caption = (
            f"{title} over the test images, all on one scale; left of 0 is misclassified, dotted: the mean of the "
            f"images that are classified correctly{_summed(study, point)}; {study.note}."
        )
        yield draw(name, caption, paint, tall=len(shown) > 3)


def _summed(study: Study, point: str) -> str:
    return ", all seeds together" if any(len(study.of(model, point)) > 1 for model in study.models) else ""


def course(records: list[Record], tap: str) -> tuple[list[int], list[float]]:
    """Epochs and mean signed distance at a tap, over the seeds that have both."""
    values: dict[int, list[float]] = {}
    for record in records:
        for epoch in record.history:
            distance = epoch.get("distance", {}).get(tap)
            if distance is not None:
                values.setdefault(epoch["epoch"], []).append(distance)
    return sorted(values), [float(np.mean(values[epoch])) for epoch in sorted(values)]


def courses(study: Study, point: str) -> Iterator[Figure]:
    """The mean signed distance during training, a panel per tap ([E], appendix B.2); nothing where none is recorded."""
    records = [record for record in study.records if record.point == point]
    taps = list(dict.fromkeys(tap for r in records for epoch in r.history for tap in epoch.get("distance", {})))
    if not taps:
        return
    p = norm_name(next(r for r in records if r.history).config.training.distance_p)
    for name, part, models in pages(study, f"course{slug(point)}"):

        def paint(panels: list[Axes], models: list[str] = models, part: str = part) -> None:
            for axes, tap in zip(panels, taps, strict=True):
                ends = []
                for i, model in enumerate(models):
                    epochs, means = course(study.of(model, point), tap)
                    if epochs:
                        axes.plot(epochs, means, label=model, color=COLOURS[i], linestyle=STYLES[i])
                        ends.append(abs(means[-1]))
                axes.axhline(0, color="#555555", linewidth=1)
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                asinh_axis(axes, ends)
            finish(panels[0], f"Mean signed distance, {p}{place(point)}{part}; {study.note}", study)
            for i, (axes, tap) in enumerate(zip(panels, taps, strict=True)):
                axes.set_title(tap, fontsize=10, color="#000000")
                axes.set_xlabel("epoch" if i >= len(taps) - COLUMNS else "")

        caption = (
            f"Mean signed distance, {p}, to the nearest boundary on validation images after each epoch, at the input, "
            f"the hidden layers and the output, linearised as in the large margin loss, {mean_words(study)}; "
            f"{study.note}."
        )
        yield draw_panels(name, caption, paint, len(taps), COLUMNS, (3.2, 2.3))

"""Ratio to cross-entropy against that of the floor, one point for each network and step of a results file of step.py.

python benchmarks/step_plot.py benchmarks/results/step_cpu.json benchmarks/results/step_cpu      writes .png and .svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from margin_kernels.experiments.report.figures import MARKERS, SETTINGS

# Okabe-Ito, by what the step does; the marker says on which network.
KINDS = {
    "loop": "#0072B2",
    "split": "#009E73",
    "adversarial": "#CC79A7",
    "1-to-N": "#000000",
    "baseline": "#D55E00",
}
MORE_MARKERS = (*MARKERS, "<", ">", "h")


def kind(cell: dict[str, Any]) -> str:
    return cell["passes"] or cell["loss"].split()[0]


def paint(axes: Axes, parts: list[dict[str, Any]]) -> None:
    networks = list(dict.fromkeys(part["network"] for part in parts))
    drawn = []
    for part in parts:
        marker = MORE_MARKERS[networks.index(part["network"]) % len(MORE_MARKERS)]
        for cell in part["steps"]:
            if "refused" not in cell and cell["loss"] != "cross-entropy":
                x, y = cell["floor_to_cross_entropy"], cell["to_cross_entropy"]
                drawn.append((kind(cell), x, y))
                axes.scatter(x, y, s=26, c=KINDS[kind(cell)], marker=marker, alpha=0.75, linewidths=0)
    low = 0.9 * min(min(x, y) for _, x, y in drawn)
    high = 1.15 * max(max(x, y) for _, x, y in drawn)
    right = 1.15 * max(x for _, x, _ in drawn)
    axes.plot([low, high], [low, high], color="#555555", linewidth=1)
    axes.set(xscale="log", yscale="log", xlim=(low, right), ylim=(low, high))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(FixedLocator([0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 10, 15, 20, 30, 40]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.set(xlabel="floor of the step / cross-entropy step", ylabel="step / cross-entropy step")
    kinds = [Patch(color=KINDS[name], label=name) for name in KINDS if any(name == found for found, _, _ in drawn)]
    shapes = [
        Line2D([], [], color="#7A7A7A", marker=MORE_MARKERS[i % len(MORE_MARKERS)], linestyle="", label=name)
        for i, name in enumerate(networks)
    ]
    line = Line2D([], [], color="#555555", linewidth=1, label="at the floor")
    first = axes.legend(handles=[line, *kinds], title="step", loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axes.add_artist(first)
    axes.legend(handles=shapes, title="network", loc="lower left", bbox_to_anchor=(1.01, 0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path, help="path without suffix")
    parser.add_argument("--threads", type=int, default=None, help="default: the largest number in the file")
    arguments = parser.parse_args()
    parts = json.loads(arguments.results.read_text())["networks"]
    threads = arguments.threads or max(part["threads"] for part in parts)
    parts = [part for part in parts if part["threads"] == threads]
    with plt.rc_context({**SETTINGS, "figure.figsize": (7.0, 5.0)}):
        figure, axes = plt.subplots(layout="constrained")
        paint(axes, parts)
        axes.set_title(f"Training steps, {parts[0]['device']}, {threads} thread{'s' if threads > 1 else ''}")
        figure.savefig(arguments.out.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        figure.savefig(arguments.out.with_suffix(".png"), dpi=150)
    print(f"wrote {arguments.out.with_suffix('.png')} and .svg")


if __name__ == "__main__":
    main()

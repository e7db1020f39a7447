"""The pictures of the site, computed by the library: python docs/pictures.py writes docs/pictures/*.svg.

Small networks on two moons, in the plane, and the losses against what they depend on; internals: a step, and the rooms.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import make_moons
from torch import Tensor, nn

import margin_kernels as mk

FOLDER = Path(__file__).resolve().parent / "pictures"
BLUE, ORANGE, GREEN, GREY = "#3050a0", "#d08020", "#308040", "#909090"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "margin_kernels",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
WIDTH, HEIGHT = 8.0, 3.2


def moons() -> tuple[Tensor, Tensor]:
    points, labels = make_moons(200, noise=0.12, random_state=0)
    return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))


def trained(loss: nn.Module, steps: int = 400) -> nn.Module:
    model = network()
    task = mk.MarginTask(model, loss)
    x, y = moons()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        task(x, y)["loss"].backward()
        optimizer.step()
    return model.eval()


def plane(points: int = 120) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates of a grid, [points], [points], and the grid [points * points, 2]."""
    across, up = torch.linspace(-1.6, 2.6, points), torch.linspace(-1.2, 1.7, points)
    grid = torch.stack(torch.meshgrid(across, up, indexing="xy"), dim=-1)
    return across, up, grid.reshape(-1, 2)


def distances(model: nn.Module, grid: Tensor) -> Tensor:
    """Signed distance of the class 1 at the input, linearised, [N]."""
    task = mk.MarginTask(model, mk.LargeMarginLoss(gamma=1.0))
    return task.evaluate(grid, torch.ones(len(grid), dtype=torch.int64))["distance"][:, 0, 0]


def show_points(axes: Axes) -> None:
    x, y = moons()
    for label, color, marker in ((0, BLUE, "o"), (1, ORANGE, "s")):
        axes.scatter(x[y == label, 0], x[y == label, 1], s=8, c=color, marker=marker)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def large_margin() -> Figure:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(WIDTH, HEIGHT))
    d = torch.linspace(-2, 2, 401)
    for cap, color, text in ((None, BLUE, "alpha = None"), (1.0, ORANGE, "alpha = 1")):
        term = mk.functional.margin_hinge(-d[:, None], torch.ones(401, 1, 1), 1.0, cap, eps=0.0, reduction="none")
        left.plot(d, term, color=color, label=text)
    left.axvline(1, color=GREY, lw=0.8, ls=":")
    left.set(xlabel="distance d / gamma", ylabel="term / gamma")
    left.legend(frameon=False)
    across, up, grid = plane()
    found = distances(trained(mk.LargeMarginLoss(gamma=0.3, cross_entropy_weight=1.0)), grid).reshape(120, 120)
    right.contourf(across, up, found, levels=[-10, -0.3, 0.3, 10], colors=["#c4cfe8", "#ffffff", "#f3dfc4"])
    right.contour(across, up, found, levels=[0], colors=["black"], linewidths=[1.4])
    show_points(right)
    return figure


def sensitivity() -> Figure:
    figure, axes = pyplot.subplots(1, 2, figsize=(WIDTH, HEIGHT), sharey=True)
    across, up, grid = plane()
    maps = []
    for weight in (0.0, 0.1):
        model = trained(mk.MarginSensitivityLoss(weight=weight))
        measured = mk.MarginTask(model, mk.MarginSensitivityLoss()).evaluate(
            grid, torch.ones(len(grid), dtype=torch.int64)
        )
        maps.append((f"weight = {weight:g}", measured["norm"].reshape(120, 120), measured["gap"].reshape(120, 120)))
    top = max(float(norm.max()) for _, norm, _ in maps)
    for place, (title, norm, gap) in zip(axes, maps, strict=True):
        shown = place.contourf(across, up, norm, levels=torch.linspace(0, top, 9), cmap="Greys")
        place.contour(across, up, gap, levels=[0], colors=["black"], linewidths=[1.4])
        show_points(place)
        place.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes, label="norm of the gradient of the gap", format="%.0f")
    return figure


def adversarial() -> Figure:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(WIDTH, HEIGHT))
    m = torch.linspace(0.01, 2, 150)
    logits, target = torch.tensor([[4.0, 0.0]]), torch.tensor([0])
    for shrinkage, color in (("lin", GREY), ("exp", BLUE), ("inv", GREEN)):
        for c, style in ((2.0, "-"), (25.0, "--")):
            if shrinkage == "lin" and c > 2:
                continue
            loss = mk.AdversarialMarginLoss(weight=32, c=c, shrinkage=shrinkage)
            found = torch.tensor([term_of(loss, float(value), logits, target) for value in m])
            left.plot(*found.T, style, color=color, label=f'"{shrinkage}", c = {c:g}')
    left.set(xlabel="distance m", ylabel="term of a correct sample", ylim=(-40, 40))
    left.legend(frameon=False, fontsize=7)
    model = trained(mk.LargeMarginLoss(gamma=0.3, cross_entropy_weight=1.0))
    across, up, grid = plane()
    with torch.no_grad():
        gap = (model(grid)[:, 1] - model(grid)[:, 0]).reshape(120, 120)
    right.contour(across, up, gap, levels=[0], colors=["black"], linewidths=[1.4])
    show_points(right)
    x = moons()[0][:200:17]
    way = [x] + [x + mk.deepfool(model, x, max_iter=steps).perturbation for steps in range(1, 6)]
    for n in range(len(x)):
        right.plot(*torch.stack([point[n] for point in way]).T, "-", color=GREEN, lw=1.2)
        right.plot(*way[-1][n], "x", color=GREEN, ms=4)
    return figure


def term_of(loss: mk.AdversarialMarginLoss, m: float, logits: Tensor, target: Tensor) -> tuple[float, float]:
    """DeepFool's distance of one correctly classified sample that is m away from a linear boundary, and its term."""
    model = nn.Linear(1, 2, bias=True)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[-1.0], [1.0]]) * float(logits[0, 0] - logits[0, 1]) / 2 / m)
        model.bias.copy_(logits[0])
    x = torch.zeros(1, 1)
    out = mk.MarginTask(model, loss)(x, target)
    return float(out["distance"]), float(out["loss"].detach() - out["nll"].mean())


def one_to_n() -> Figure:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(WIDTH, HEIGHT))
    generator = torch.Generator().manual_seed(0)
    others, labels = torch.randn(63, 10, generator=generator), torch.arange(63) % 10
    own = torch.linspace(-4, 12, 161)
    for delta, color in ((1.0, BLUE), (5.0, ORANGE), (10.0, GREEN)):
        values, slopes = [], []
        for score in own:
            row = torch.zeros(1, 10)
            logits = torch.cat([row, others]).requires_grad_()
            shifted = logits + torch.nn.functional.pad(score.reshape(1, 1), (0, 9, 0, 63))
            loss = mk.functional.one_to_n(shifted, torch.cat([torch.tensor([0]), labels]), delta, reduction="none")[0]
            values.append(loss.item())
            slopes.append(torch.autograd.grad(loss, logits)[0][0, 0].item())
        left.plot(own, values, color=color, label=f"delta = {delta:g}")
        right.plot(own, slopes, color=color)
    left.set(xlabel="score of the label", ylabel="loss")
    right.set(xlabel="score of the label", ylabel="slope")
    left.legend(frameon=False)
    return figure


def box(axes: Axes, x: float, y: float, width: float, text: str, color: str, height: float = 0.62) -> None:
    axes.add_patch(pyplot.Rectangle((x, y), width, height, facecolor=color, edgecolor="white", lw=1.5))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white", fontsize=8)


def step() -> Figure:
    """Passes of a step, each as wide as its work: F forward, B activations, W weights, all F."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 2.6))
    forward, activations, weights = ("forward  F", BLUE), ("activations  F", ORANGE), ("weights  F", GREEN)
    to_taps = ("to the taps  F", "#b05050")
    rows = [
        ("cross-entropy", [forward, activations, weights]),
        ("margin, split", [forward, to_taps, weights]),
        ("margin, loop", [forward, to_taps, activations, weights]),
        ("second order, loop", [forward, to_taps, ("double backward  2 F", "#705090"), activations, weights]),
        ("second order, tangent", [forward, to_taps, ("tangent  F", "#308890"), weights]),
    ]
    for line, (name, passes) in enumerate(reversed(rows)):
        at = 0.0
        axes.text(-0.1, line + 0.31, name, ha="right", va="center", fontsize=9)
        for text, color in passes:
            width = 2.0 if "2 F" in text else 1.0
            box(axes, at, line, width, text, color)
            at += width
    axes.set(xlim=(-1.6, 6.1), ylim=(-0.2, len(rows)))
    axes.axis("off")
    return figure


def house() -> Figure:
    """The rooms; each imports those below it alone."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.4))
    floors = [
        [("experiments", 0.0, 3.0), ("integrations", 3.1, 2.9)],
        [("task", 0.0, 2.2), ("monitor", 2.3, 1.6), ("bench", 4.0, 2.0)],
        [("losses", 0.0, 6.0)],
        [("gradients", 0.0, 3.9), ("deepfool", 4.0, 2.0)],
        [("functional", 0.0, 6.0)],
        [("backends", 0.0, 6.0)],
        [("reference (PyTorch)", 0.0, 2.0), ("triton", 2.1, 1.5), ("_C: csrc/cpu, csrc/cuda", 3.7, 2.3)],
    ]
    colors = ("#607090", BLUE, "#b05050", ORANGE, GREEN, "#308890", GREY)
    for height, (rooms, color) in enumerate(zip(reversed(floors), reversed(colors), strict=True)):
        for name, x, width in rooms:
            box(axes, x, height, width, name, color, 0.78)
    axes.annotate(
        "imports", (6.4, 0.4), (6.4, 6.4), arrowprops={"arrowstyle": "->", "color": "#909090"}, ha="center", color=GREY
    )
    axes.set(xlim=(-0.1, 6.9), ylim=(-0.2, 7.0))
    axes.axis("off")
    return figure


PICTURES: dict[str, Callable[[], Figure]] = {
    "large_margin": large_margin,
    "sensitivity": sensitivity,
    "adversarial": adversarial,
    "one_to_n": one_to_n,
    "step": step,
    "house": house,
}


def main(folder: Path = FOLDER) -> None:
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        with matplotlib.rc_context(STYLE):
            figure = draw()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            pyplot.close(figure)


if __name__ == "__main__":
    main()

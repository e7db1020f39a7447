"""[A]'s toy in the plane: two rectangles 2 apart, of which no classifier keeps more than 1 from both.

    class 0   uniform on [-3, -1] x [-2, 2]            class 1   uniform on [1, 3] x [-2, 2]
    margin    min over training points n of s_n distance(x_n), s_n = 1 where x_n is classified correctly, else -1

Protocol of [A] (Yan, Guo, Zhang, TPAMI 2019): 200 training and 200 test points of each class, batch 20, SGD with
momentum 0.9 and weight decay 1e-4, learning rate 0.1 halved each quarter of 1000 epochs; gradients clipped at norm 10
as in its code. A linear classifier and a small ReLU network; cross-entropy, the large margin loss at the input (gamma
= 1, the best margin there is), and AVG and MIN with EXP in each of their gradients, lambda 32, c 2.

`margin` is measured on the exact boundary (zero_set.py). Beside it stands what DeepFool reports, as training runs it
(5 iterations, overshoot 0.02 of each step) and as evaluation does (50, overshoot 0.02 of the whole): a loss that makes
DeepFool overshoot enlarges its distances without moving the boundary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from margin_kernels import deepfool

from .. import objectives
from ..config import AdversarialConfig, LossConfig
from ..report import figures, write_bytes
from ..results import machine, versions, write_json, write_text
from ..training import Meter
from .zero_set import distances, zero_set

EPOCHS, QUICK = 1000, 4  # of the paper, and of --quick
POINTS = 200  # of each class, in training and in test
TRAINING = {"batch_size": 20, "lr": 0.1, "factor": 0.5, "momentum": 0.9, "weight_decay": 1e-4, "clip_norm": 10.0}
BOX = 12.0  # half the side of the square in which the boundary is looked for: 9 from every point
WINDOW = (-4.0, 4.0), (-3.0, 3.0)  # what the figure shows

NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "linear": lambda: nn.Sequential(nn.Linear(2, 2)),
    "ReLU 2-16-16-2": lambda: nn.Sequential(
        nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)
    ),
}


def _adversarial(aggregation: Any, gradient: Any) -> LossConfig:
    options = AdversarialConfig(aggregation=aggregation, shrinkage="exp", gradient=gradient)
    return LossConfig("adversarial_margin", adversarial=options)


LOSSES = {
    "cross-entropy": LossConfig(),
    "large margin l2": LossConfig("large_margin", gamma=1.0, p=2.0, cross_entropy_weight=1.0, layers=["input"]),
    **{
        f"{aggregation.upper()} EXP, {gradient.replace('_', ' ')}": _adversarial(aggregation, gradient)
        for aggregation in ("avg", "min")
        for gradient in ("unrolled", "envelope", "first_order")
    },
}


def rectangles(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` points of each class, uniform on its rectangle: x float [2 count, 2], y int64 [2 count]."""
    u = torch.rand(2 * count, 2, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(2 * count) % 2
    side = 2 * y - 1
    return torch.stack([side * (1 + 2 * u[:, 0]), 4 * u[:, 1] - 2], 1), y


def train(model: nn.Sequential, loss: LossConfig, x: Tensor, y: Tensor, epochs: int, seed: int) -> None:
    """The protocol of [A] on the points x [N, 2] with labels y [N], in place; `seed` draws their order."""
    task = objectives.build(model, loss, ())
    own = TRAINING
    optimiser = torch.optim.SGD(model.parameters(), own["lr"], own["momentum"], weight_decay=own["weight_decay"])
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        optimiser.param_groups[0]["lr"] = own["lr"] * own["factor"] ** (4 * epoch // epochs)
        for part in torch.randperm(len(x), generator=order).split(int(own["batch_size"])):
            optimiser.zero_grad()
            task(x[part], y[part])["loss"].backward()
            nn.utils.clip_grad_norm_(model.parameters(), own["clip_norm"])
            optimiser.step()


@dataclass(frozen=True)
class Measured:
    """A network at the training points.

    Attributes:
        margin: the smallest signed distance to the exact boundary; None where there is none within BOX
        deepfool_training: the smallest signed distance that DeepFool reports as training runs it; None: it finds none
        deepfool_training_missed: points for which it finds no boundary
        deepfool: as evaluation runs it
        deepfool_missed: points for which it finds no boundary
        boundary: segments [S, 2, 2] of the exact boundary
    """

    margin: float | None
    deepfool_training: float | None
    deepfool_training_missed: int
    deepfool: float | None
    deepfool_missed: int
    boundary: list[Any]


@dataclass(frozen=True)
class Trained:
    """One loss on one network: what the file stores of it."""

    network: str
    model: str
    train_error: float
    test_error: float
    measured: Measured
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Flat, what JSON stores."""
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        del own["measured"], own["seconds"]
        return {**own, **vars(self.measured), "seconds": self.seconds}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Trained:
        """The inverse of to_dict."""
        names = {item.name for item in dataclasses.fields(Measured)}
        measured = Measured(**{name: value for name, value in values.items() if name in names})
        return cls(measured=measured, **{name: value for name, value in values.items() if name not in names})


@dataclass(frozen=True)
class Seeds:
    """Of the weights and the order of the samples, of the training points, and of the test points."""

    weights_and_order: int
    training_points: int
    test_points: int


@dataclass(frozen=True)
class Toy:
    """The record of a run, toy.json."""

    what: str
    epochs: int
    epochs_of_the_paper: int
    training: dict[str, float]
    points_of_each_class: int
    seeds: Seeds
    attainable_margin: float
    losses: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    models: list[Trained]

    def to_dict(self) -> dict[str, Any]:
        """What JSON stores."""
        seeds = {name.replace("_", " "): value for name, value in vars(self.seeds).items()}
        return {**vars(self), "seeds": seeds, "models": [model.to_dict() for model in self.models]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Toy:
        """The inverse of to_dict."""
        seeds = Seeds(**{name.replace(" ", "_"): value for name, value in values["seeds"].items()})
        return cls(**{**values, "seeds": seeds, "models": [Trained.from_dict(model) for model in values["models"]]})


def measure(model: nn.Sequential, x: Tensor, y: Tensor) -> Measured:
    """The network at the training points x [N, 2] with labels y [N]."""
    boundary = zero_set(model, BOX)
    with torch.no_grad():
        side = torch.where(model(x).argmax(1) == y, 1.0, -1.0)

    def reported(max_iter: int, overshoot_mode: str) -> tuple[float | None, int]:
        found = deepfool(model, x, max_iter=max_iter, overshoot_mode=overshoot_mode)
        return _smallest((side * found.distance)[found.success]), int((~found.success).sum())

    margin = _smallest(side.double() * torch.from_numpy(distances(_array(x), boundary)))
    return Measured(margin, *reported(5, "step"), *reported(50, "total"), np.round(boundary, 5).tolist())


def _array(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def _smallest(values: Tensor) -> float | None:
    """The minimum, None where nothing is finite."""
    values = values[values.isfinite()]
    return float(values.min()) if len(values) else None


def attainable(x: Tensor, y: Tensor) -> float:
    """Half the distance between the nearest points of different classes: no classifier has a larger margin."""
    return float(torch.cdist(x[y == 0].double(), x[y == 1].double()).min() / 2)


def run(folder: Path, epochs: int = EPOCHS, seed: int = 0, console: Console | None = None) -> Toy:
    """Trains every loss on every network, prints the table, writes toy.json, toy.png and toy.svg into `folder` and
    returns the record. The seeds: `seed` of weights and order, `seed` and `seed` + 1 of training and test points."""
    console = console or Console()
    (x, y), (test_x, test_y) = rectangles(POINTS, seed), rectangles(POINTS, seed + 1)
    models = []
    with Meter(len(NETWORKS) * len(LOSSES), "training", console, steps=False) as meter:
        for network, make in NETWORKS.items():
            for label, loss in LOSSES.items():
                meter.advance(0, f"training {network}, {label}")
                torch.manual_seed(seed)
                model = make()
                start = time.perf_counter()
                train(model, loss, x, y, epochs, seed)
                seconds = time.perf_counter() - start
                errors = _error(model, x, y), _error(model, test_x, test_y)
                models.append(Trained(network, label, *errors, measure(model, x, y), round(seconds, 2)))
                meter.advance(1)
    record = Toy(
        what="the 2-D toy of adversarial margin maximisation [A]",
        epochs=epochs,
        epochs_of_the_paper=EPOCHS,
        training=TRAINING,
        points_of_each_class=POINTS,
        seeds=Seeds(seed, seed, seed + 1),
        attainable_margin=attainable(x, y),
        losses={label: _described(loss) for label, loss in LOSSES.items()},
        versions=versions(),
        machine=machine(),
        models=models,
    )
    write_measured(folder, record)
    show(console, record)
    return record


def _error(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) != y).float().mean())


def _described(loss: LossConfig) -> dict[str, Any]:
    """The options of a loss that count."""
    if loss.kind == "adversarial_margin":
        return {"kind": loss.kind, **vars(loss.adversarial)}
    if loss.kind == "large_margin":
        names = (
            "gamma",
            "p",
            "top_k",
            "aggregation",
            "layers",
            "second_order",
            "margin_weight",
            "cross_entropy_weight",
        )
        return {"kind": loss.kind, **{name: getattr(loss, name) for name in names}}
    return {"kind": loss.kind}


def write_measured(folder: Path, record: Toy) -> None:
    """The record and its figure."""
    drawn = figure(record)
    write_json(folder / "toy.json", record.to_dict())
    write_text(folder / "toy.svg", drawn.svg)
    write_bytes(folder / "toy.png", drawn.png)


def show(console: Console, record: Toy) -> None:
    """Prints the record: a line per model."""
    title = f"Two rectangles, {record.epochs} epochs; attainable margin {record.attainable_margin:.3f}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("test error %", "margin", "DeepFool, 50", "in training, 5", "seconds"):
        table.add_column(heading, justify="right")
    network = ""
    for model in record.models:
        if model.network != network:
            network = model.network
            table.add_row(Text(network, style="italic"))
        own = model.measured
        found = (_number(value) for value in (own.margin, own.deepfool, own.deepfool_training))
        table.add_row(model.model, f"{100 * model.test_error:.1f}", *found, f"{model.seconds:.0f}")
    console.print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def figure(record: Toy) -> figures.Figure:
    """A panel for each model, drawn from the record alone: boundary, band of the margin around it, training points."""
    x, y = rectangles(record.points_of_each_class, record.seeds.training_points)
    models = record.models
    columns = 4

    def paint(panels: list[Axes]) -> None:
        for axes, model in zip(panels, models, strict=True):
            _panel(axes, model, _array(x), y.numpy())

    caption = (
        f"Decision boundary after {record.epochs} epochs, the band of its margin, and the training points. Title: "
        "smallest distance of a training point to the boundary, and what DeepFool (50 iterations) reports for it. "
        f"The best margin is 1 for the rectangles and {record.attainable_margin:.3f} for these points."
    )
    return figures.draw_panels("toy", caption, paint, len(models), columns, (2.6, 2.35))


def _panel(axes: Axes, model: Trained, x: np.ndarray, y: np.ndarray) -> None:
    boundary = np.array(model.measured.boundary).reshape(-1, 2, 2)
    for side in (-1, 1):
        axes.add_patch(Rectangle((2 * side - 1, -2), 2, 4, fill=False, edgecolor="#999999", linewidth=0.8))
    margin = model.measured.margin
    if margin is not None and margin > 0:
        (left, right), (bottom, top) = WINDOW
        grid = np.meshgrid(np.linspace(left, right, 161), np.linspace(bottom, top, 121))
        near = distances(np.stack(grid, 2).reshape(-1, 2), boundary).reshape(grid[0].shape)
        axes.contourf(*grid, near, [-1, margin], colors=["#56B4E9"], alpha=0.35)
    for segment in boundary:
        axes.plot(*segment.T, color="#000000", linewidth=1.4, solid_capstyle="round")
    for label, colour, marker in ((0, "#D55E00", "o"), (1, "#0072B2", "^")):
        own = x[y == label]
        axes.scatter(own[:, 0], own[:, 1], s=4, color=colour, marker=marker, linewidth=0)
    axes.set_aspect("equal")
    axes.grid(False)
    axes.set(xlim=WINDOW[0], ylim=WINDOW[1], xticks=(-2, 0, 2), yticks=(-2, 0, 2))
    axes.tick_params(labelsize=7)
    numbers = f"margin {_number(margin)}, DeepFool {_number(model.measured.deepfool)}"
    error = f", error {100 * model.train_error:.1f} %" if model.train_error else ""
    axes.set_title(f"{model.network.split()[0]}, {model.model}\n{numbers}{error}", fontsize=7.5)

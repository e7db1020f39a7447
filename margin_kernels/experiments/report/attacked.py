"""Attacked test images of one network: arrays, and a picture with a row for each of the first images.

    original | attacked | difference        the class that is predicted stands below, framed where it is not the label

The difference is drawn from -m (blue) over 0 (white) to m (red), m its largest absolute value in the picture, summed up
over colour channels as the entry of largest size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from ..data import Dataset
from ..evaluation import eval_mode
from ..evaluation.by_name import NamedAttack, lengths
from ..results import write_atomic
from .figures import draw_panels
from .study_images import RIGHT, WRONG

ROWS = 12  # images in the picture
COLUMNS = ("original", "attacked", "difference")


@dataclass(frozen=True)
class Attacked:
    """Images [N, *] before and after an attack of radius `eps` in `norm`, labels and predicted classes [N], names of
    the classes, and what black and white are."""

    attack: str
    norm: str
    eps: float
    images: Tensor
    attacked: Tensor
    labels: Tensor
    predicted: Tensor
    predicted_attacked: Tensor
    classes: tuple[str, ...]
    span: tuple[float, float]

    def words(self) -> str:
        """What the attack did, in a line."""
        before, after = ((p == self.labels).double().mean() for p in (self.predicted, self.predicted_attacked))
        radius = "" if self.attack == "deepfool" else f" within {self.norm} {self.eps:g}"
        moved = lengths(self.attacked - self.images, self.norm)
        return (
            f"{self.attack}{radius}: accuracy on {len(self.labels)} test images {before:.1%} before, {after:.1%} after "
            f"the attack; {self.norm} of the difference {moved.mean():.4g} on average, {moved.max():.4g} at most"
        )


def attacked(
    model: nn.Module,
    dataset: Dataset,
    attack: NamedAttack,
    eps: float,
    samples: int,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> Attacked:
    """The first `samples` test images, attacked on `model`."""
    part = dataset.test.head(samples)
    rows: list[tuple[Tensor, ...]] = []
    for x, y in part.batches(batch_size, device):
        moved = attack(model, x, y, eps, part.bounds)
        with eval_mode(model), torch.no_grad():
            rows.append(tuple(v.cpu() for v in (x, moved, y, model(x).argmax(1), model(moved).argmax(1))))
    images, moved, labels, predicted, after = (torch.cat(column) for column in zip(*rows, strict=True))
    span = part.bounds if part.preprocess == "none" else (float(images.min()), float(images.max()))
    return Attacked(attack.name, attack.norm, eps, images, moved, labels, predicted, after, dataset.class_names, span)


def write(folder: Path, found: Attacked) -> list[Path]:
    """attacked.npz and, of images with one or three channels, attacked.png; returns their paths."""
    arrays: dict[str, Any] = {
        "images": found.images.numpy(),
        "attacked": found.attacked.numpy(),
        "labels": found.labels.numpy(),
        "predicted": found.predicted.numpy(),
        "predicted_attacked": found.predicted_attacked.numpy(),
        "classes": np.array(found.classes),
    }
    write_atomic(folder / "attacked.npz", lambda file: np.savez_compressed(file, **arrays))
    files = [folder / "attacked.npz"]
    if found.images.ndim == 4 and found.images.shape[1] in (1, 3):
        png = draw_panels("attacked", "", lambda panels: _paint(panels, found), *_grid(found)).png
        write_atomic(folder / "attacked.png", lambda file: file.write(png))
        files.append(folder / "attacked.png")
    else:
        (folder / "attacked.png").unlink(missing_ok=True)
    return files


def _grid(found: Attacked) -> tuple[int, int, tuple[float, float]]:
    """Panels, columns of panels, and the size of one: two images beside each other where there are several."""
    shown = min(len(found.labels), ROWS)
    return shown * len(COLUMNS), len(COLUMNS) * (1 if shown < 2 else 2), (1.5, 1.55)


def _paint(panels: list[Axes], found: Attacked) -> None:
    shown = min(len(found.labels), ROWS)
    difference = (found.attacked - found.images)[:shown]
    size = difference.abs().argmax(1, keepdim=True)
    largest = difference.gather(1, size)[:, 0]  # of the channels
    most = float(largest.abs().max()) or 1.0
    for index in range(shown):
        label = int(found.labels[index])
        original, moved, change = panels[len(COLUMNS) * index : len(COLUMNS) * (index + 1)]
        for axes, images, predicted in (
            (original, found.images, found.predicted),
            (moved, found.attacked, found.predicted_attacked),
        ):
            _picture(axes, images[index], found.span)
            right = int(predicted[index]) == label
            axes.spines[:].set(visible=not right, color=WRONG, linewidth=2.5)
            weight = "normal" if right else "bold"
            words = found.classes[int(predicted[index])]
            axes.set_xlabel(words, fontsize=8.5, color=RIGHT if right else WRONG, fontweight=weight)
        change.imshow(largest[index].numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        _bare(change)
        norm = float(lengths(difference[index : index + 1], found.norm))
        change.set_xlabel(f"{found.norm} {norm:.3g}", fontsize=8.5)
        original.set_ylabel(f"label {found.classes[label]}", fontsize=8.5)
        if index < (1 if shown < 2 else 2):
            for axes, column in zip((original, moved, change), COLUMNS, strict=True):
                axes.set_title(column, fontsize=9, loc="center")


def _picture(axes: Axes, image: Tensor, span: tuple[float, float]) -> None:
    low, high = span
    pixels = np.moveaxis(((image - low) / (high - low)).clamp(0, 1).numpy(), 0, 2)
    axes.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#999999", linewidth=0.6)

"""Attacked test images of the networks whose weights a sweep has kept: a figure for each image, a row for each model.

    clean | FGSM, IFGSM: l_inf radius evaluation.eps, on the logit gap, clipped to [0, 1] | DeepFool: x + r

r is the perturbation whose norm `deepfool_norm` and `rho_adv` are the means of; x + r is not clipped, but shown so.
Whitened images are clipped by no attack; they are shown from the lowest to the highest pixel of the clean one.
"""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from margin_kernels import deepfool

from .. import data
from ..config import DataConfig, EvaluationConfig, is_code
from ..evaluation import attacks
from ..models import load_model
from ..results import Record, Study
from .figures import Figure, draw_panels
from .study_figures import place, slug

ROWS = 8  # models at most
IMAGES = 3  # figures for each point
SEARCHED = 500  # test images among which they are chosen
COLUMNS = ("clean", "FGSM gap", "IFGSM gap", "DeepFool")
RIGHT, WRONG = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Shown:
    """What one network makes of the chosen images, by column: images [N, C, H, W] and classes [N]; norms of DeepFool's
    perturbations [N], NaN where it finds no boundary."""

    images: dict[str, Tensor]
    labels: dict[str, Tensor]
    norms: Tensor


def all_figures(study: Study, data_dir: str | None) -> tuple[dict[str, list[Figure]], str]:
    """The figures of each point that has weights, grouped under their headings; where there are none, why. Raises
    DataError where `data_dir` does not hold the images."""
    kept = {point: networks(study, point) for point in study.points}
    kept = {point: found for point, found in kept.items() if found}
    if not kept:
        return {}, "No attacked images: no weights were kept; margin-kernels sweep --keep-weights does."
    settings = study.records[0].config.data
    if any(is_code(name) for record in study.records for name in (record.config.data.name, record.config.model.name)):
        return {}, "No attacked images: data or network are code, which no report runs; margin-kernels attack does."
    if settings.name != "digits" and data_dir is None:
        return (
            {},
            "No attacked images: margin-kernels report --data-dir DIR draws them from the weights that were kept.",
        )
    groups = {}
    loaded: DataConfig | None = None
    for point, records in kept.items():
        # the points may differ in their training images, to which whitening is fitted; the others share the test images
        first = next(iter(records.values())).config.data
        wanted = first if first.preprocess != "none" else replace(first, train_fraction=1.0, label_noise=0.0, seed=0)
        if wanted != loaded:
            dataset, loaded = data.of(replace(wanted, dir=data_dir)), wanted
        if len(dataset.shape) != 3 or dataset.shape[0] not in (1, 3):
            return {}, f"No attacked images: data of shape {list(dataset.shape)} are no pictures."
        groups[f"Attacked test images{place(point)}"] = figures(study, point, records, dataset)
    return groups, ""


def networks(study: Study, point: str) -> dict[str, Record]:
    """The first ROWS models whose weights are there, with the record of the first seed that has them; all of them take
    images that were preprocessed alike."""
    found: dict[str, Record] = {}
    for model in study.models:
        for record in study.of(model, point):
            if model not in found and (folder_of(study, record) / "model.safetensors").is_file():
                found[model] = record
    units = {model: data.units([record.config.data]) for model, record in found.items()}
    alike = [model for model in found if units[model] == next(iter(units.values()))]
    return {model: found[model] for model in alike[:ROWS]}


def folder_of(study: Study, record: Record) -> Path:
    """Where a sweep keeps the weights of a cell."""
    return (study.folder or Path()) / "cells" / record.cell


def figures(study: Study, point: str, records: dict[str, Record], dataset: data.Dataset) -> list[Figure]:
    """A figure for each of the chosen images."""
    models = {label: load_model(folder_of(study, record))[0] for label, record in records.items()}
    first = next(iter(records.values()))
    settings = first.config.evaluation
    indices = select_images(list(models.values()), dataset.test)
    x, y = dataset.test.batch(indices)
    bounds = dataset.test.bounds
    shown = {label: attack(model, x, y, settings, bounds) for label, model in models.items()}
    left = len(study.models) - len(models)
    rest = f" {left} of the models not shown." if left else ""
    return [
        figure(
            f"{study.name}_images{slug(point)}_{i + 1}",
            f"Test image {index} ({dataset.class_names[y[i]]}): as it is, under FGSM and IFGSM of l_inf radius "
            f"{settings.eps:g} on the logit gap, and with DeepFool's perturbation, whose l2 norm stands below; the "
            f"class that is predicted, framed where it is not the label. {_why(shown, i, int(y[i]))} Seed "
            f"{first.seed}; {study.note}.{rest}",
            shown,
            i,
            int(y[i]),
            dataset.class_names,
            bounds if math.isfinite(bounds[1]) else (float(x[i].min()), float(x[i].max())),
        )
        for i, index in enumerate(indices.tolist())
    ]


def _why(shown: dict[str, Shown], index: int, label: int) -> str:
    """How the image was chosen."""
    if all(int(own.labels["clean"][index]) == label for own in shown.values()):
        return "Chosen as the first of its class that all these networks classify correctly."
    return f"Chosen as the first of its class, of which all know none among the first {SEARCHED} test images."


def select_images(models: list[nn.Module], split: data.Split) -> Tensor:
    """Indices [IMAGES] of the first test images that all models classify correctly, one of a class; where they do not
    suffice, others follow."""
    x, y = split.batch(slice(0, SEARCHED))
    right = torch.ones(len(y), dtype=torch.bool)
    with torch.no_grad():
        for model in models:
            right &= model(x).argmax(1) == y
    ordered = [*right.nonzero().flatten().tolist(), *(~right).nonzero().flatten().tolist()]
    first = {int(y[index]): index for index in reversed(ordered)}  # of each class
    return torch.tensor(sorted(first.values(), key=ordered.index)[:IMAGES])


def attack(
    model: nn.Module, x: Tensor, y: Tensor, settings: EvaluationConfig, bounds: tuple[float, float] = (0.0, 1.0)
) -> Shown:
    """The columns of one row: images x [N, C, H, W] within `bounds` with labels y [N]."""
    found = deepfool(model, x, max_iter=settings.deepfool_iterations, step_limit=settings.deepfool_step_limit)
    images = {
        "clean": x,
        "FGSM gap": attacks.fgsm(model, x, y, settings.eps, "gap", bounds).images,
        "IFGSM gap": attacks.ifgsm(model, x, y, settings.eps, None, settings.steps, "gap", bounds).images,
        "DeepFool": x + found.perturbation,
    }
    with torch.no_grad():
        labels = {column: model(moved).argmax(1) for column, moved in images.items()}
    return Shown(images, labels, found.distance.masked_fill(~found.success, torch.nan))


def figure(
    name: str,
    caption: str,
    shown: dict[str, Shown],
    index: int,
    label: int,
    classes: tuple[str, ...],
    span: tuple[float, float] = (0.0, 1.0),
) -> Figure:
    """The grid of the image at `index`; `span`: the values of black and white."""

    def paint(panels: list[Axes]) -> None:
        cells = [(model, column) for model in shown for column in COLUMNS]
        for axes, (model, column) in zip(panels, cells, strict=True):
            own = shown[model]
            predicted = int(own.labels[column][index])
            words = classes[predicted]
            if column == "DeepFool":
                norm = float(own.norms[index])
                words += f", l2 {norm:.2f}" if norm == norm else ", none found"
            _picture(axes, own.images[column][index], words, predicted == label, span)
            if model == next(iter(shown)):
                axes.set_title(column, fontsize=9, loc="center")
            if column == COLUMNS[0]:
                axes.set_ylabel(textwrap.fill(model, 14), rotation=0, ha="right", va="center", fontsize=9)

    return draw_panels(name, caption, paint, len(shown) * len(COLUMNS), len(COLUMNS), (1.4, 1.3))


def _picture(axes: Axes, image: Tensor, words: str, right: bool, span: tuple[float, float]) -> None:
    """An image [C, H, W] with the predicted class below."""
    low, high = span
    pixels = np.moveaxis(((image - low) / (high - low)).clamp(0, 1).numpy(), 0, 2)
    axes.imshow(pixels if pixels.shape[2] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=1)
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=not right, color=WRONG, linewidth=2.5)
    axes.set_xlabel(words, fontsize=8.5, color=RIGHT if right else WRONG, fontweight="normal" if right else "bold")

"""Classification data as tensors: images [N, C, H, W] or [N, D] in [0, 1], or whitened, integer labels [N], in train,
validation and test splits.

    digits          scikit-learn's bundled 1797 scanned digits, 1x8x8, offline; stratified 60 / 20 / 20
    mnist, fashion_mnist   60,000 / 10,000 of 1x28x28; the last `validation_size` training images are held out
    cifar10, cifar100      50,000 / 10,000 of 3x32x32; the last `validation_size` training images are held out
    image_folder, npz      folder.py, npz.py
    package.module:make    what code of the user's returns: own.py

The splits depend on nothing but the data; a training fraction and label noise are drawn once from `seed`, which is
not the training seed: every model of a comparison sees the same images and the same wrong labels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import DATASETS, DataConfig, is_code
from . import cifar, folder, idx, npz, own
from .idx import DataError
from .split import Dataset, Split
from .whitening import Whitening

AUGMENTATIONS = ("none", "crop", "crop_flip")
PREPROCESSING = {"none": "images in [0, 1]", "gcn_zca": "whitened images"}  # and the words for their units
SHIFT = 4  # pixels of an augmented image
WIDE = 4096  # values of an image that are whitened: the covariance has as many rows and columns

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = tuple("0123456789")


def load(
    name: str = "digits",
    data_dir: str | Path | None = None,
    validation_size: int = 5000,
    train_fraction: float = 1.0,
    label_noise: float = 0.0,
    seed: int = 0,
    verify: bool = True,
    preprocess: str = "none",
    args: dict[str, Any] | None = None,
    size: int | list[int] | None = None,
) -> Dataset:
    """Reads a data set by name, or calls the code that the name stands for.

    Arguments: `data_dir` the folder of the files or its parent (not for digits); `validation_size` images held out
    of the training set (not for digits); `train_fraction` in (0, 1], the share of the remaining training images that
    is kept, int(fraction * N) of them; `label_noise` in [0, 1], the share of training labels flipped to another
    class; `seed` draws both; `verify` compares checksums; `preprocess` "none" or "gcn_zca" (whitening.py, fitted to the
    training images that are kept); `args` keywords for the code; `size` that images of image_folder are resized
    to. Raises DataError naming the file, what was found and what was expected; ValueError
    for an argument out of range.
    """
    if name not in DATASETS and not is_code(name):
        raise ValueError(f"data.name must be one of {', '.join(DATASETS)}, or code as file.py:make, got {name!r}")
    if not 0 < train_fraction <= 1:
        raise ValueError(f"data.train_fraction must be in (0, 1], got {train_fraction}")
    if preprocess not in PREPROCESSING:
        raise ValueError(f"data.preprocess must be one of {', '.join(PREPROCESSING)}, got {preprocess!r}")
    if not 0 <= label_noise <= 1:
        raise ValueError(f"data.label_noise must be in [0, 1], got {label_noise}")
    if is_code(name):
        where = None if data_dir is None else str(data_dir)
        dataset = own.load_own(DataConfig(name, where, args or {}, validation_size=validation_size))
    elif name == "digits":
        dataset = _load_digits()
    else:
        dataset = _load_files(name, data_dir, validation_size, verify, size)
    generator = torch.Generator().manual_seed(seed)
    train = dataset.train
    if train_fraction < 1:
        count = int(train_fraction * len(train))
        if count < 1:
            raise ValueError(
                f"data.train_fraction must leave at least one of {len(train)} training images, got {train_fraction}"
            )
        keep = torch.randperm(len(train), generator=generator)[:count].sort().values
        train = Split(train.images[keep], train.labels[keep])
    if label_noise > 0:
        train = Split(train.images, flip_labels(train.labels, label_noise, dataset.num_classes, generator))
    dataset = replace(dataset, train=train)
    if preprocess == "none":
        return dataset
    if (values := train.images[0].numel()) > WIDE:
        raise ValueError(f"data.preprocess gcn_zca is for images of at most {WIDE:,} values, got {values:,}")
    whitening = Whitening(train.images)
    train, validation, test = (
        Split(whitening(split.images), split.labels, preprocess)
        for split in (dataset.train, dataset.validation, dataset.test)
    )
    return replace(dataset, train=train, validation=validation, test=test)


def of(config: DataConfig) -> Dataset:
    """The dataset that a config describes."""
    return load(
        config.name,
        config.dir,
        config.validation_size,
        config.train_fraction,
        config.label_noise,
        config.seed,
        config.verify,
        config.preprocess,
        config.args,
        config.size,
    )


def units(configs: Iterable[DataConfig]) -> str:
    """In what radii and norms of networks on these data are: "images in [0, 1]"."""
    return " and ".join(dict.fromkeys(PREPROCESSING[config.preprocess] for config in configs))


def flip_labels(labels: Tensor, noise: float, num_classes: int, generator: torch.Generator) -> Tensor:
    """Labels int64 [N] of which round(noise * N) were moved to another class, uniformly among the others."""
    flipped = labels.clone()
    chosen = torch.randperm(len(labels), generator=generator)[: round(noise * len(labels))]
    shift = torch.randint(1, num_classes, (len(chosen),), generator=generator)  # 1..C-1: never back to the same class
    flipped[chosen] = (labels[chosen] + shift) % num_classes
    return flipped


def augmented(x: Tensor, kind: str, generator: torch.Generator, start: int = 0, whole: int | None = None) -> Tensor:
    """x [N, C, H, W] as `kind` says: "none"; "crop", each image shifted by up to 4 pixels either way, with zeros
    behind; "crop_flip", which also mirrors half of them. Drawn from `generator`, a CPU one, for all of a batch of
    `whole` images (default: N) of which x are those from `start` on."""
    if kind == "none":
        return x
    if kind not in AUGMENTATIONS:
        raise ValueError(f"training.augment must be one of {', '.join(AUGMENTATIONS)}, got {kind!r}")
    if x.ndim != 4:
        raise ValueError(f"training.augment must be none for vectors, got {kind!r}")
    n, _, height, width = x.shape
    whole = n if whole is None else whole
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, whole, 1), generator=generator)[:, start : start + n]
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    if kind == "crop_flip":
        mirrored = torch.rand(whole, 1, generator=generator)[start : start + n] < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (SHIFT,) * 4)
    image = torch.arange(n)[:, None, None]
    index = [part.to(x.device) for part in (image, rows[:, :, None], columns[:, None, :])]
    return padded.permute(0, 2, 3, 1)[index[0], index[1], index[2]].permute(0, 3, 1, 2).contiguous()


def _load_digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)[:, None]  # 17 grey levels, 0..16
    labels = bunch.target.astype(np.int64)
    rest, test = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    train, validation = train_test_split(rest, test_size=0.25, random_state=0, stratify=labels[rest])

    def split(index: np.ndarray) -> Split:
        return Split(torch.from_numpy(images[index]), torch.from_numpy(labels[index]))

    return Dataset("digits", split(train), split(validation), split(test), len(DIGITS), (1, 8, 8), DIGITS)


def _load_files(
    name: str, data_dir: str | Path | None, validation_size: int, verify: bool, size: int | list[int] | None
) -> Dataset:
    if data_dir is None:
        raise DataError(
            f"{name} is read from files: pass --data-dir with their folder or its parent (only digits comes bundled)."
        )
    try:
        place = Path(data_dir).expanduser()
    except RuntimeError:
        raise DataError(f"{data_dir}: --data-dir names the home of a user that there is not.") from None
    if not place.exists():
        raise DataError(f"{place}: --data-dir does not exist.")
    if name == "image_folder":
        return folder.load_folder(place, size, validation_size)
    if name == "npz":
        return npz.load_npz(place, validation_size)
    if name in cifar.LAYOUTS:
        arrays = cifar.load_cifar(place, verify, cifar.LAYOUTS[name])
    else:
        arrays = idx.load_idx(name, place, verify)
    images, labels, test_images, test_labels = (
        torch.from_numpy(np.array(a)) for a in arrays
    )  # frombuffer gives read-only memory
    if not 0 < validation_size < len(labels):
        raise ValueError(f"data.validation_size must be from 1 to {len(labels) - 1}, got {validation_size}")
    first = len(labels) - validation_size
    names = {"mnist": DIGITS, "fashion_mnist": FASHION, "cifar10": CIFAR, "cifar100": cifar.FINE}[name]
    return Dataset(
        name,
        Split(images[:first], labels[:first]),
        Split(images[first:], labels[first:]),
        Split(test_images, test_labels),
        len(names),
        tuple(images.shape[1:]),
        names,
    )

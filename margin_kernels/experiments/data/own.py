"""Data of the user's: what the code returns that data.name stands for.

    def make(n=100, data_dir=None):                            # keywords from data.args; data_dir is data.dir
        return {"train": (images, labels), "test": (images, labels)}

The return value is a mapping, a NamedTuple or any object with `train` and `test`, or the pair (train, test);
`validation` may be there too, and `class_names` [C] or `classes` = C. A split is a pair of arrays or tensors, or a
torch Dataset of (image, label), which is read once, in its order:

    images   [N, C, H, W] or [N, D]: floats in [0, 1], or uint8 from 0 to 255
    labels   [N]: integers from 0 to C - 1; without class_names and classes each of them has a training image

Normalise inside of the network: attacks and distances are in the units of these images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DataConfig, called, takes, told
from .idx import DataError
from .split import Dataset, Split

SPLITS = ("train", "validation", "test")


def load_own(config: DataConfig) -> Dataset:
    """The dataset that the code data.name returns. Raises DataError, or ConfigError for what the code raises."""
    offered = {} if config.dir is None else {"data_dir": config.dir}
    if offered and not takes("data", config.name, "data_dir"):
        raise DataError(f"data.dir is {config.dir}, but {config.name} has no keyword data_dir to take it")
    found = called("data", config.name, config.args, offered)
    parts = _parts(found, config.name)
    splits = {name: read_split(parts[name], f"{config.name}: {name}") for name in SPLITS if name in parts}
    names = parts.get("class_names")
    if names is not None and (
        isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names)
    ):
        raise DataError(f"{config.name}: class_names must be a list of texts, got {names!r:.100}")
    classes = parts.get("classes")
    if classes is not None and (type(classes) is not int or (names is not None and classes != len(names))):
        raise DataError(f"{config.name}: classes must be the number of classes, got {classes!r:.100}")
    return assembled(config.name, splits, config.validation_size, names, classes)


def _parts(found: Any, where: str) -> dict[str, Any]:
    """The splits by name, and class_names and classes where they are there."""
    names = (*SPLITS, "class_names", "classes")
    if isinstance(found, (tuple, list)) and not hasattr(found, "_fields"):
        if len(found) != 2:
            raise DataError(f"{where} must return train and test, got a {type(found).__name__} of {len(found)}")
        return dict(zip(("train", "test"), found, strict=True))
    if isinstance(found, Mapping):
        parts = {name: found[name] for name in names if name in found}
        has = ", ".join(map(str, found)) or "nothing"
    else:
        parts = {name: getattr(found, name) for name in names if hasattr(found, name)}
        has = f"a {type(found).__name__}"
    parts = {name: part for name, part in parts.items() if part is not None}
    if "train" not in parts or "test" not in parts:
        raise DataError(f"{where} must return train and test, as a mapping, attributes or a pair, got {has}")
    return parts


def read_split(part: Any, where: str) -> Split:
    """A split from a pair (images, labels), or from a torch Dataset."""
    if isinstance(part, (tuple, list)):
        if len(part) != 2:
            raise DataError(f"{where} must be a pair (images, labels) or a torch Dataset, got {len(part)} values")
        images, labels = part
    elif hasattr(part, "__getitem__") and hasattr(part, "__len__") and not isinstance(part, (Tensor, np.ndarray, dict)):
        images, labels = _read_dataset(part, where)
    else:
        raise DataError(f"{where} must be a pair (images, labels) or a torch Dataset, got {type(part).__name__}")
    return checked_split(images, labels, where)


def _read_dataset(part: Any, where: str) -> tuple[Any, Any]:
    images: list[Tensor] = []
    labels: list[int] = []
    with told(f"{where}: the reading"):
        count = len(part)
    for index in range(count):
        with told(f"{where}[{index}]"):
            item = part[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{where}[{index}] must be (image, label), got {type(item).__name__}")
        image, label = _pixels(item[0], f"{where}[{index}]"), item[1]
        if images and (image.shape != images[0].shape or image.dtype != images[0].dtype):
            raise DataError(
                f"{where}[{index}]: an image must be {images[0].dtype} {list(images[0].shape)} as those before, got "
                f"{image.dtype} {list(image.shape)}"
            )
        if isinstance(label, (Tensor, np.generic, np.ndarray)) and np.asarray(label).size == 1:
            label = label.item()
        if type(label) is not int:
            raise DataError(f"{where}[{index}]: a label must be an integer, got {type(label).__name__}")
        images.append(image)
        labels.append(label)
    return torch.stack(images) if images else torch.zeros(0), torch.tensor(labels, dtype=torch.int64)


def _pixels(image: Any, where: str) -> Tensor:
    """One image as a tensor; one of PIL as uint8 [C, H, W]."""
    if isinstance(image, Tensor):
        return image.detach().cpu()
    if isinstance(image, np.ndarray):
        return torch.from_numpy(np.array(image))
    if hasattr(image, "getbands"):
        if image.mode not in ("L", "RGB"):
            raise DataError(f"{where}: an image of PIL must have the mode L or RGB, got {image.mode}")
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    raise DataError(f"{where}: an image must be a tensor, an array or one of PIL, got {type(image).__name__}")


def checked_split(images: Any, labels: Any, where: str) -> Split:
    """A split of images and labels that are what they must be. Raises DataError."""
    images, labels = _tensor(images, f"{where}: images"), _tensor(labels, f"{where}: labels")
    if images.ndim not in (2, 4) or 0 in images.shape:
        raise DataError(f"{where}: images must be [N, C, H, W] or [N, D], none of them 0, got {list(images.shape)}")
    if labels.ndim != 1 or labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise DataError(f"{where}: labels must be integers [N], got {labels.dtype} {list(labels.shape)}")
    if len(images) != len(labels):
        raise DataError(f"{where} must have as many labels as images, got {len(labels)} and {len(images)}")
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise DataError(f"{where}: images must be floats in [0, 1] or uint8, got {images.dtype}")
        low, high = (float(value) for value in images.aminmax())
        if not (low >= 0 and high <= 1):
            remedy = (
                "divide by 255, or give uint8" if 2 < high <= 255 and low >= 0 else "normalise inside of the network"
            )
            raise DataError(f"{where}: images must be in [0, 1], got {low:g} to {high:g}: {remedy}")
        images = images.float()
    if int(labels.min()) < 0:
        raise DataError(f"{where}: labels must be at least 0, got {int(labels.min())}")
    return Split(images.contiguous(), labels.long().contiguous())


def _tensor(values: Any, where: str) -> Tensor:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    try:
        array = np.array(values)
        return torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} must be an array or a tensor, got {type(values).__name__}: {error}") from None


def assembled(
    name: str,
    splits: dict[str, Split],
    validation_size: int,
    names: Sequence[str] | None = None,
    classes: int | None = None,
) -> Dataset:
    """The dataset of a train and a test split, and of a validation split where there is one; otherwise
    `validation_size` training images are held out, chosen at random, always the same: data may be sorted by class."""
    train = splits["train"]
    shape = tuple(train.images.shape[1:])
    for key, split in splits.items():
        if split.images.shape[1:] != train.images.shape[1:]:
            raise DataError(f"{name}: images of {key} must be {list(shape)}, got {list(split.images.shape[1:])}")
    classes = len(names) if names is not None else classes
    if classes is None:
        classes = int(train.labels.max()) + 1
        without = (torch.bincount(train.labels, minlength=classes) == 0).nonzero().flatten().tolist()
        if without:
            raise DataError(
                f"{name}: labels of train go to {classes - 1}, but no image has {', '.join(map(str, without[:5]))}: "
                "number the classes from 0, or return class_names or classes"
            )
    if classes < 2:
        raise DataError(f"{name} must have at least 2 classes, got {classes}")
    for key, split in splits.items():
        if int(split.labels.max()) >= classes:
            raise DataError(f"{name}: labels of {key} must be in [0, {classes - 1}], got {int(split.labels.max())}")
    if "validation" not in splits:
        train, splits["validation"] = _held_out(train, validation_size)
    class_names = tuple(names) if names is not None else tuple(map(str, range(classes)))
    return Dataset(name, train, splits["validation"], splits["test"], classes, shape, class_names)


def _held_out(train: Split, size: int) -> tuple[Split, Split]:
    if not 0 < size < len(train):
        raise ValueError(f"data.validation_size must be from 1 to {len(train) - 1}, got {size}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held, kept = order[:size].sort().values, order[size:].sort().values
    return Split(train.images[kept], train.labels[kept]), Split(train.images[held], train.labels[held])

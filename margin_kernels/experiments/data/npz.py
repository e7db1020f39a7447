"""Arrays in a file of numpy, by the names of Keras: x_train, y_train, x_test, y_test, perhaps x_val and y_val.

x    [N, H, W], [N, H, W, C] or [N, C, H, W] with 1, 3 or 4 channels, or [N, D]: uint8, or floats in [0, 1]
y    [N] or [N, 1]: integers from 0
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from .idx import DataError
from .own import assembled, checked_split
from .split import Dataset

CHANNELS = (1, 3, 4)
LARGEST = 1 << 34  # bytes of the arrays
NAMES = {"train": ("train",), "test": ("test",), "validation": ("val", "valid", "validation")}


def load_npz(path: Path, validation_size: int) -> Dataset:
    """The dataset of a file, or of the one .npz file in a folder. Raises DataError naming the file and the array."""
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if len(files) != 1:
            raise DataError(f"{path} must hold one .npz file, got {len(files)}: give the file itself as --data-dir")
        (path,) = files
    splits = {}
    arrays = _arrays(path)
    for split, names in NAMES.items():
        for name in names:
            if f"x_{name}" in arrays and f"y_{name}" in arrays:
                where = f"{path}: x_{name}"
                labels = arrays[f"y_{name}"]
                labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
                splits[split] = checked_split(_channels_first(arrays[f"x_{name}"], where), labels, where)
    if "train" not in splits or "test" not in splits:
        raise DataError(f"{path} must hold x_train, y_train, x_test and y_test, got {', '.join(arrays) or 'nothing'}")
    return assembled("npz", splits, validation_size)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(member.file_size for member in archive.infolist())
        if total > LARGEST:
            raise DataError(f"{path} must hold at most {LARGEST:,} bytes when it is unpacked, got {total:,}")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name.startswith(("x_", "y_"))}
    except DataError:
        raise
    except Exception as error:  # a damaged archive, or an array of objects
        raise DataError(f"{path}: not a readable .npz file ({type(error).__name__}: {error})") from None


def _channels_first(images: np.ndarray, where: str) -> np.ndarray:
    """[N, C, H, W] or [N, D]."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim != 4:
        return images
    first, last = images.shape[1] in CHANNELS, images.shape[3] in CHANNELS
    if first and last:
        raise DataError(
            f"{where} must be [N, C, H, W] or [N, H, W, C], and {list(images.shape)} may be both: read it by code "
            "of your own (data.name)"
        )
    if not (first or last):
        raise DataError(f"{where} must have 1, 3 or 4 channels, [N, C, H, W] or [N, H, W, C], got {list(images.shape)}")
    return np.moveaxis(images, 3, 1) if last else images

"""Image folders: DIR/train/CLASS/IMAGE, DIR/test/CLASS/IMAGE, and DIR/val/CLASS/IMAGE for validation; where there is no
test, val is the test split. Classes are the folders of train, in the order of their names.

Pixels are uint8 [C, H, W]: C = 1 where all images are grey, else 3. Images have one size, or are resized to `size`
(bilinear with antialiasing; the aspect ratio changes where it is another). Files without the suffix of an image, and
those whose names begin with a dot, are left alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .idx import DataError
from .own import assembled, checked_split
from .split import Dataset

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
GREY, COLOUR = ("1", "L"), ("P", "RGB", "RGBA", "LA", "CMYK", "YCbCr")
LARGEST = 1 << 34  # bytes of the pixels of a split


def load_folder(data_dir: Path, size: int | list[int] | None, validation_size: int) -> Dataset:
    """The dataset of a folder. Raises DataError naming the file."""
    train = data_dir / "train"
    held = next((data_dir / name for name in ("val", "validation") if (data_dir / name).is_dir()), None)
    test = data_dir / "test" if (data_dir / "test").is_dir() else held
    if not train.is_dir() or test is None:
        there = ", ".join(sorted(path.name for path in data_dir.iterdir())[:10]) if data_dir.is_dir() else "no folder"
        raise DataError(f"{data_dir} must hold the folders train, and test or val, got {there or 'nothing'}")
    folders = {"train": train, "test": test, **({"validation": held} if held not in (None, test) else {})}
    classes = sorted(path.name for path in train.iterdir() if path.is_dir() and not path.name.startswith("."))
    files = {name: _files(folder, classes) for name, folder in folders.items()}
    empty = set(range(len(classes))) - {label for _, label in files["train"]}
    if len(classes) < 2 or empty:
        what = f"none in {classes[min(empty)]}" if empty else f"{len(classes)} folders"
        raise DataError(f"{train} must hold a folder with images for each of at least 2 classes, got {what}")
    wanted = None if size is None else (size, size) if isinstance(size, int) else (size[0], size[1])
    grey = all(_mode(path) in GREY for found in files.values() for path, _ in found)
    splits = {}
    for name, found in files.items():
        if not found:
            raise DataError(
                f"{folders[name]} must hold images in folders of the classes {', '.join(classes[:5])}, got none"
            )
        images = _pixels([path for path, _ in found], "L" if grey else "RGB", wanted)
        splits[name] = checked_split(images, np.array([label for _, label in found]), str(folders[name]))
    return assembled("image_folder", splits, validation_size, classes)


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """(image, label) of every image of a split, by class and name."""
    found = []
    for path in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if path.name not in classes:
            raise DataError(f"{path} must have the name of a class of train, {', '.join(classes[:5])}, ...")
        images = sorted(
            image for image in path.rglob("*") if image.suffix.lower() in SUFFIXES and not image.name.startswith(".")
        )
        found += [(image, classes.index(path.name)) for image in images]
    return found


def _opened(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError("image_folder needs a package: pip install pillow") from error
    try:
        return Image.open(path)
    except Exception as error:  # a damaged image raises nearly anything
        raise DataError(f"{path}: not a readable image ({type(error).__name__}: {error})") from None


def _mode(path: Path) -> str:
    with _opened(path) as image:
        if image.mode not in (*GREY, *COLOUR):
            raise DataError(
                f"{path}: an image must have 8 bits a channel ({', '.join(GREY + COLOUR)}), got {image.mode}"
            )
        return str(image.mode)


def _pixels(paths: list[Path], mode: str, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [N, C, H, W] of the images, in one memory."""
    from PIL import Image

    result: np.ndarray | None = None
    for number, path in enumerate(paths):
        with _opened(path) as image:
            try:
                pixels = image.convert(mode)
                if size is not None:
                    pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
                array = np.asarray(pixels)
            except Exception as error:
                raise DataError(f"{path}: not a readable image ({type(error).__name__}: {error})") from None
        array = array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)
        if result is None:
            if len(paths) * array.size > LARGEST:
                total = len(paths) * array.size
                raise DataError(f"{path.parents[1]} must have at most {LARGEST:,} bytes of pixels, got {total:,}")
            result = np.empty((len(paths), *array.shape), np.uint8)
        if array.shape != result.shape[1:]:
            height, width = result.shape[2:]
            raise DataError(
                f"{path} must be of {width}x{height} pixels as {paths[0].name}, got {array.shape[2]}x{array.shape[1]}: "
                "set data.size"
            )
        result[number] = array
    assert result is not None
    return result

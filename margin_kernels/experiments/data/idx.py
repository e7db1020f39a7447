"""MNIST and Fashion-MNIST: idx files, gzipped or not, checked before a byte of them is believed.

    images: int32 magic 2051, int32 N, int32 rows, int32 cols (big-endian), then N*rows*cols uint8
    labels: int32 magic 2049, int32 N, then N uint8

A gzipped file is compared with the md5 of the official distribution, an unzipped one with the sha256 of the official
content; the header and the exact size are checked in either case, so that `verify=False` still refuses a truncated
file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

IMAGES_MAGIC = 2051
LABELS_MAGIC = 2049
WIDEST = 256  # pixels: the networks of larger ones would have gigabytes of weights
LARGEST = 1 << 30  # bytes of a file, zipped or not: the official ones have at most 47,040,016


class DataError(ValueError):
    """A data file is missing, truncated, foreign or damaged; the message names the file, what was found and what was
    expected."""


@dataclass(frozen=True)
class Official:
    """Digests of one official file: md5 of the .gz, sha256 of the unzipped content."""

    md5: str
    sha256: str


TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"

OFFICIAL: dict[str, dict[str, Official]] = {
    "mnist": {
        TRAIN_IMAGES: Official(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873", "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"
        ),
        TRAIN_LABELS: Official(
            "d53e105ee54ea40749a09fcbcd1e9432", "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"
        ),
        TEST_IMAGES: Official(
            "9fb629c4189551a2d022fa330f9573f3", "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"
        ),
        TEST_LABELS: Official(
            "ec29112dd5afa0611ce80d1b7f02629c", "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"
        ),
    },
    "fashion_mnist": {
        TRAIN_IMAGES: Official(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        TRAIN_LABELS: Official(
            "25c81989df183df01b3e8a0aad5dffbe", "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        TEST_IMAGES: Official(
            "bef4ecab320f06d8554ea6380940ec79", "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        TEST_LABELS: Official(
            "bb300cfdad3c16e7a12a480ee83cd310", "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    },
}


def find_folder(name: str, data_dir: Path) -> Path:
    """The folder that holds `name`'s idx files: `data_dir` itself, or one of the usual layouts below it."""
    camel = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name]
    tried = [data_dir, data_dir / name, data_dir / camel / "raw", data_dir / "raw", data_dir / camel]
    for folder in tried:
        if any((folder / (TRAIN_IMAGES + suffix)).is_file() for suffix in ("", ".gz")):
            return folder
    places = ", ".join(str(folder) for folder in tried)
    raise DataError(
        f"{name}: no {TRAIN_IMAGES}[.gz] found; looked in {places}. Pass --data-dir with the folder of the idx files."
    )


def file_bytes(path: Path) -> bytes:
    """The bytes of a data file. Raises DataError where it is none, or too large."""
    if not path.is_file():
        raise DataError(f"{path} must be a file, got a folder, a pipe, a device or a link to nothing")
    if path.stat().st_size > LARGEST:
        raise DataError(f"{path} must have at most {LARGEST:,} bytes, got {path.stat().st_size:,}")
    return path.read_bytes()


def _content(path: Path, name: str, stem: str, verify: bool) -> bytes:
    """Unzipped bytes of `path`. Its digest is compared with the official one before anything is unzipped."""
    stored = file_bytes(path)
    official = OFFICIAL[name][stem]
    zipped = path.suffix == ".gz"
    if zipped:
        found, expected, kind = hashlib.md5(stored).hexdigest(), official.md5, "md5"
    else:
        found, expected, kind = hashlib.sha256(stored).hexdigest(), official.sha256, "sha256"
    if verify and found != expected:
        other = [key for key, files in OFFICIAL.items() if found in (files[stem].md5, files[stem].sha256)]
        hint = f" (this is the file of {other[0]})" if other else ""
        raise DataError(
            f"{path}: {kind} of {name} must be {expected}, got {found}{hint}. "
            "Fetch the official file again, or pass --data.verify false to read a file of your own."
        )
    return _unzipped(stored, path) if zipped else stored


def _unzipped(stored: bytes, path: Path) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(stored)) as file:
            content = file.read(LARGEST + 1)
            complete = not file.read(1)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(
            f"{path}: not a complete gzip file ({error}); {len(stored):,} bytes found. Fetch it again."
        ) from error
    if not complete or len(content) > LARGEST:
        raise DataError(f"{path} must have at most {LARGEST:,} bytes when it is unzipped, got more")
    return content


def parse_images(content: bytes, path: Path) -> np.ndarray:
    """uint8 [N, rows, cols] of an idx3 content; raises DataError where header and size disagree."""
    _check_magic(content, IMAGES_MAGIC, 16, path)
    count, rows, cols = (int(v) for v in np.frombuffer(content, dtype=">i4", count=3, offset=4))
    if count < 1 or rows < 1 or cols < 1:
        raise DataError(f"{path} must hold at least one image of one pixel, got {count} of {rows}x{cols}")
    if rows > WIDEST or cols > WIDEST:
        raise DataError(f"{path} must hold images of at most {WIDEST}x{WIDEST} pixels, got {rows}x{cols}")
    _check_size(content, 16 + count * rows * cols, f"{count} images of {rows}x{cols}", path)
    return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(count, rows, cols)


def parse_labels(content: bytes, path: Path) -> np.ndarray:
    """uint8 [N] of an idx1 content, all in 0..9; raises DataError otherwise."""
    _check_magic(content, LABELS_MAGIC, 8, path)
    count = int(np.frombuffer(content, dtype=">i4", count=1, offset=4)[0])
    if count < 1:
        raise DataError(f"{path} must hold at least one label, got {count}")
    _check_size(content, 8 + count, f"{count} labels", path)
    labels = np.frombuffer(content, dtype=np.uint8, offset=8)
    if labels.max() > 9:
        raise DataError(f"{path}: labels must be in [0, 9], got {labels.max()}")
    return labels


def _check_magic(content: bytes, magic: int, header: int, path: Path) -> None:
    if len(content) < header:
        raise DataError(f"{path}: truncated: an idx header must have {header} bytes, got {len(content)}")
    found = int.from_bytes(content[:4], "big")
    if found != magic:
        raise DataError(
            f"{path}: magic number must be {magic}, got {found}: this is not the idx file that its name says"
        )


def _check_size(content: bytes, expected: int, what: str, path: Path) -> None:
    if len(content) != expected:
        verdict = "truncated" if len(content) < expected else "too long"
        raise DataError(f"{path}: {verdict}: {what} must have {expected:,} bytes, got {len(content):,}")


def load_idx(name: str, data_dir: Path, verify: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train images uint8 [N, 1, 28, 28], train labels int64 [N], test images, test labels."""
    folder = find_folder(name, data_dir)
    arrays: list[np.ndarray] = []
    for images_stem, labels_stem in ((TRAIN_IMAGES, TRAIN_LABELS), (TEST_IMAGES, TEST_LABELS)):
        images_path, labels_path = _existing(folder, images_stem), _existing(folder, labels_stem)
        images = parse_images(_content(images_path, name, images_stem, verify), images_path)
        labels = parse_labels(_content(labels_path, name, labels_stem, verify), labels_path)
        if len(images) != len(labels):
            raise DataError(
                f"{labels_path} must have {len(images)} labels, as many as {images_path.name}, got {len(labels)}"
            )
        arrays += [images[:, None], labels.astype(np.int64)]
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise DataError(
            f"{folder}: test images must be {list(arrays[0].shape[2:])} like the training images, got "
            f"{list(arrays[2].shape[2:])}"
        )
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _existing(folder: Path, stem: str) -> Path:
    for path in (folder / (stem + ".gz"), folder / stem):
        if path.is_file():
            return path
    present = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise DataError(f"{folder / stem}[.gz]: missing; the folder holds {present}.")

"""CIFAR-10 and CIFAR-100: python batches (extracted folder or the .tar.gz / .tar.xz archive) and the binary layout,
checksums verified.

    CIFAR-10    python: data_batch_1..5, test_batch: a Python 2 pickle of {b"data": uint8 [10000, 3072], b"labels": list
                of 10000 ints, ...}; binary: data_batch_1..5.bin, test_batch.bin: 10000 records of one label byte and
                3072 pixel bytes
    CIFAR-100   python: train, test: b"fine_labels" in the place of b"labels"; binary: train.bin, test.bin: a coarse and
                a fine label byte and 3072 pixel bytes. The fine labels are read
    a row of 3072 is 1024 red, 1024 green, 1024 blue, each plane row-major: reshape(-1, 3, 32, 32) is [N, C, H, W]

No checksum of the binary files of CIFAR-100 stands here: verified are the numbers of images, 50,000 and 10,000, and
that every class has as many.

Pickles can run code: batches are read by an unpickler that rebuilds numpy arrays and the plain built-in types, and
refuses the rest.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .idx import LARGEST, DataError, file_bytes

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-python.tar.xz", "cifar-10-binary.tar.gz", "cifar-10-binary.tar.xz")

MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
MD5_100 = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
NAMES = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
    "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)
FINE = tuple(NAMES.split())  # the classes of CIFAR-100 in the order of their labels


@dataclass(frozen=True)
class Layout:
    """One of the two data sets as files: name, classes, the batches (the last one is the test split), the key of the
    labels, the bytes in front of the pixels, of which the last one is the label, folders, archives, known checksums."""

    name: str
    classes: int
    batches: tuple[str, ...]
    labels: bytes
    prefix: int
    folders: tuple[str, str]
    archives: tuple[str, ...]
    md5: dict[str, str]


CIFAR10 = Layout("cifar10", 10, BATCHES, b"labels", 1, (PYTHON_FOLDER, BINARY_FOLDER), ARCHIVES, MD5)
CIFAR100 = Layout(
    "cifar100",
    100,
    ("train", "test"),
    b"fine_labels",
    2,
    ("cifar-100-python", "cifar-100-binary"),
    tuple(name.replace("cifar-10-", "cifar-100-") for name in ARCHIVES),
    MD5_100,
)
LAYOUTS = {layout.name: layout for layout in (CIFAR10, CIFAR100)}


class RestrictedUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays and built-in containers; any other name in the pickle raises DataError instead of being
    imported."""

    # numpy moved `core` to `_core` in 2.0; a batch written by either must load under either.
    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes into a protocol-2 pickle
            return _encode_latin1
        raise DataError(f"the pickle asks for {module}.{name}, which a CIFAR batch does not need; it was not loaded.")


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise DataError(f"the encoding of bytes in the pickle must be latin1, got {encoding!r}")
    return text.encode("latin1")


def parse_python_batch(content: bytes, where: str, layout: Layout = CIFAR10) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3, 32, 32] and int64 [N] from the bytes of one python batch."""
    try:
        batch = RestrictedUnpickler(io.BytesIO(content), encoding="bytes").load()
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything, and none of it names the file
        raise DataError(f"{where}: not a readable pickle ({type(error).__name__}: {error}).") from error
    if not isinstance(batch, dict) or b"data" not in batch or layout.labels not in batch:
        found = sorted(map(repr, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise DataError(f"{where} must hold a dict with b'data' and {layout.labels!r}, got {found}")
    data, labels = batch[b"data"], batch[layout.labels]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        found = f"{data.dtype} {list(data.shape)}" if isinstance(data, np.ndarray) else type(data).__name__
        raise DataError(f"{where}: b'data' must be uint8 [N, 3072], got {found}")
    if not isinstance(labels, np.ndarray):
        # a nest of lists of lists may stand for more values than memory holds
        if not isinstance(labels, list) or not all(type(label) is int and abs(label) < 2**63 for label in labels):
            raise DataError(f"{where}: labels must be integers [N], got {type(labels).__name__} of others")
        labels = np.array(labels, dtype=np.int64)
    return _checked(data, labels, where, layout)


def parse_binary_batch(content: bytes, where: str, layout: Layout = CIFAR10) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3, 32, 32] and int64 [N] from the bytes of one binary batch."""
    prefix, size = layout.prefix, layout.prefix + 3072
    if not content or len(content) % size:
        what = "1 label" if prefix == 1 else f"{prefix} labels"
        raise DataError(
            f"{where} must have a multiple of {size} bytes, {what} and 3072 pixels each, got {len(content):,}"
        )
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
    return _checked(rows[:, prefix:], rows[:, prefix - 1], where, layout)


def _checked(data: np.ndarray, labels: np.ndarray, where: str, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(f"{where}: labels must be integers [N], got {labels.dtype} {list(labels.shape)}")
    if len(data) < 1:
        raise DataError(f"{where} must hold at least one image, got none")
    if len(labels) != len(data):
        raise DataError(f"{where} must have {len(data)} labels, one per image, got {len(labels)}")
    if labels.min() < 0 or labels.max() >= layout.classes:
        raise DataError(f"{where}: labels must be in [0, {layout.classes - 1}], got {labels.min()} to {labels.max()}")
    return data.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def find_source(data_dir: Path, layout: Layout = CIFAR10) -> Path:
    """The extracted folder, or the archive, that holds the batches: in `data_dir` or the usual places below it."""
    if data_dir.is_file():
        return data_dir
    first, subs = layout.batches[0], (".", layout.name)
    for folder in (data_dir / sub / leaf for sub in subs for leaf in (".", *layout.folders)):
        if any((folder / (first + suffix)).is_file() for suffix in ("", ".bin")):
            return folder
    for archive in (data_dir / sub / leaf for sub in subs for leaf in layout.archives):
        if archive.is_file():
            return archive
    raise DataError(
        f"{layout.name}: neither {first}[.bin] nor one of {', '.join(layout.archives)} found in {data_dir} or below "
        f"it. Pass --data-dir with the folder {', '.join(layout.folders)} or the one of the archive."
    )


def _members(source: Path, layout: Layout = CIFAR10) -> dict[str, bytes]:
    """Content of the batch files by name (data_batch_1 or data_batch_1.bin)."""
    wanted = set(layout.batches) | {name + ".bin" for name in layout.batches}
    if source.is_dir():
        return {path.name: file_bytes(path) for path in sorted(source.iterdir()) if path.name in wanted}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(source, "r:*") as archive:
            total = 0
            for member in archive:  # one pass: seeking back in a compressed archive would unpack it again
                total += member.size
                if total > LARGEST:
                    raise DataError(f"{source} must hold at most {LARGEST:,} bytes when it is unpacked, got more")
                stem = member.name.rsplit("/", 1)[-1]
                stream = archive.extractfile(member) if member.isfile() and stem in wanted else None
                if stream is not None:
                    found[stem] = stream.read()
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{source}: not a complete tar archive ({error}). Fetch it again.") from error
    return found


def load_cifar(
    data_dir: Path, verify: bool = True, layout: Layout = CIFAR10
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Train images uint8 [50000, 3, 32, 32], train labels int64 [50000], test images, test labels."""
    source = find_source(data_dir, layout)
    contents = _members(source, layout)
    suffix = ".bin" if layout.batches[0] + ".bin" in contents else ""
    images, labels = [], []
    for name in layout.batches:
        member = name + suffix
        where = f"{source}/{member}"
        if member not in contents:
            raise DataError(f"{where}: missing; found {', '.join(sorted(contents)) or 'no batch at all'}.")
        content = contents[member]
        if verify and member in layout.md5:
            found = hashlib.md5(content).hexdigest()
            if found != layout.md5[member]:
                raise DataError(
                    f"{where}: md5 must be {layout.md5[member]}, got {found} ({len(content):,} bytes). "
                    "Fetch the official file again, or pass --data.verify false to read a file of your own."
                )
        x, y = (parse_binary_batch if suffix else parse_python_batch)(content, where, layout)
        if verify and member not in layout.md5:
            _check_numbers(y, where, layout, 10_000 if name == layout.batches[-1] else 50_000)
        images.append(x)
        labels.append(y)
    return np.concatenate(images[:-1]), np.concatenate(labels[:-1]), images[-1], labels[-1]


def _check_numbers(labels: np.ndarray, where: str, layout: Layout, count: int) -> None:
    """Raises DataError where a file without a known checksum has not the numbers of the official one."""
    of_class = np.bincount(labels, minlength=layout.classes)
    if len(labels) != count or of_class.min() != of_class.max():
        raise DataError(
            f"{where} must hold {count:,} images, {count // layout.classes} of each class, got {len(labels):,}, "
            f"{of_class.min()} to {of_class.max()} of a class. Fetch the official file again, or pass "
            "--data.verify false to read a file of your own."
        )

"""What a run leaves behind: config.yaml, metrics.csv (a row per epoch), run.json (everything), checkpoints; written
atomically.

An atomic write goes to a temporary file in the same folder and is moved over the old one, so that a run that is
killed at any moment leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import math
import os
import platform
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from margin_kernels import backends
from margin_kernels.version import __version__

TEMPORARY = ".writing."  # begin of the names of unfinished files
LOCK = "lock"
LARGEST = 1 << 30  # bytes of a text file: records of a large sweep have some 10 MB


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` with a temporary binary file and moves it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{os.getpid()}.{secrets.token_hex(4)}"
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = str(path), None
        raise


def sweep_temporary(folder: Path) -> None:
    """Removes what killed processes of this machine left of unfinished writes in a folder."""
    for path in folder.glob(f"{TEMPORARY}*"):
        process = path.name.removeprefix(TEMPORARY).partition(".")[0]
        if process.isdigit() and _is_alive(int(process)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True


@contextmanager
def locked(
    folder: Path, who: str, wait: float = 0.0, remedy: str = "wait for it to end, or choose another --out"
) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it is missing, and sweeps what killed processes left in it. The lock
    ends with the process, however it ends. Raises ValueError where another process holds it for `wait` seconds more;
    `who`: what that process may be; `remedy`: what to do then."""
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + wait
    with open_lock(folder / LOCK) as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if time.monotonic() >= until:
                    raise ValueError(f"{folder} is in use by {who}: {remedy}") from None
                time.sleep(0.1)
        sweep_temporary(folder)
        yield


def open_lock(path: Path) -> BinaryIO:
    """A file to hold a lock of, which is made if it is missing and not changed. Raises ValueError where a pipe or a
    device is in its place: to open one may wait for ever, and its lock would be that of all programs."""
    number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    file = os.fdopen(number, "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path} must be a file, got a pipe or a device; remove it")
    return file


def read_text(path: Path) -> str:
    """The text of a file. Raises ValueError, which names it, where it is not UTF-8 or too large."""
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"{path} must have at most {LARGEST:,} bytes, got {size:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be text in UTF-8, got byte {error.object[error.start]:#x} at {error.start}"
        ) from None


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises ValueError, which names it, where it is none."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON, got {error}; delete it and make it again") from None


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """JSON without NaN, which is not JSON: non-finite numbers become null."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line per row; columns in order of first appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def finite(value: Any) -> Any:
    """`value` with non-finite floats replaced by None, recursively; tuples become lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def flatten(prefix: str, values: dict[str, float]) -> dict[str, float]:
    """{"input": 1.0} -> {"prefix.input": 1.0}: columns of a CSV file."""
    return {f"{prefix}.{key}": value for key, value in values.items()}


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    import numpy as np

    found = {
        "margin_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def machine(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Processor, cores, threads, accelerator and the backend of the ops; no host name and no path."""
    info: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
        "backend": backends.choose("competitors", [torch.empty(0, device=device)])[0],
    }
    if torch.device(device).type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def _processor() -> str:
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"

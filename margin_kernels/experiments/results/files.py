"""What a run leaves behind: config.yaml, metrics.csv (a row per epoch), run.json (everything), checkpoints; written
atomically.

An atomic write goes to a temporary file in the same folder and is moved over the old one, so that a run that is
killed at any moment leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from margin_kernels.version import __version__


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` with a temporary binary file and moves it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    """Processor, cores, threads and accelerator; no host name and no path."""
    info: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": str(device),
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

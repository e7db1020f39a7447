"""Machine, date, versions and commit of a run; times are measured by margin_kernels.timing."""

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import margin_kernels
from margin_kernels import backends


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def environment() -> dict[str, Any]:
    """Machine, date, versions and commit of a run."""
    extension = backends.EXTENSION.build_info() if backends.EXTENSION is not None else None
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "margin_kernels": margin_kernels.__version__,
        "extension": extension,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda_version": torch.version.cuda,
        "triton": _version_of("triton"),
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

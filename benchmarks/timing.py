"""Interleaved timing: every round runs all competitors in a new random order; a figure is a ratio of medians."""

import datetime
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import margin_kernels
from margin_kernels import backends


def _host_seconds(call: Callable[[], Any], inner: int) -> float:
    start = time.perf_counter()
    for _ in range(inner):
        call()
    return time.perf_counter() - start


def _device_seconds(call: Callable[[], Any], inner: int) -> float:
    """Between two events on the current stream: what the device takes, or the host where it cannot keep up."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(inner):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    competitors: Mapping[str, Callable[[], Any]], rounds: int, inner: int = 1, warmup: int = 2, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds per call of each competitor over `rounds` rounds of `inner` calls."""
    seconds = _device_seconds if device == "cuda" else _host_seconds
    order = list(competitors)
    generator = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}
    for name in order:
        for _ in range(warmup):
            competitors[name]()
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            times[name].append(seconds(competitors[name], inner) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


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

"""Time and memory of calls. Every round runs all of them in a new random order; what is compared is compared in rounds,
so that a machine that is slower for a while is so for all of them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


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


def seconds_of_rounds(
    competitors: Mapping[str, Callable[[], Any]], rounds: int, inner: int = 1, warmup: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds per call of each competitor in each of `rounds` rounds of `inner` calls; device: "cuda" measures between
    events, anything else on the host."""
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
    return times


def interleaved(
    competitors: Mapping[str, Callable[[], Any]], rounds: int, inner: int = 1, warmup: int = 2, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds per call of each competitor over `rounds` rounds of `inner` calls."""
    times = seconds_of_rounds(competitors, rounds, inner, warmup, device)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_bytes(call: Callable[[], Any], device: str | None = None) -> int:
    """Largest sum of live bytes allocated during one call by PyTorch's allocator on "cuda" or the "cpu" (None: the
    default one); the call should have been made before, so that an optimiser has its buffers."""
    gc.collect()  # what other runs left behind would count as freed by this one
    if (device or torch.get_default_device().type) == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        call()
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak

"""Peak memory of a call, and how many kernels it launches."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """Largest sum of live bytes allocated during one call by PyTorch's allocator; it should have been made before,
    so that an optimiser has its buffers."""
    gc.collect()  # what other runs left behind would count as freed by this one
    if torch.get_default_device().type == "cuda":
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


def launches(call: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills on the device during one call; None on the CPU, which launches none."""
    if torch.get_default_device().type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type() == DeviceType.CUDA for event in run.profiler.kineto_results.events())

"""How many kernels a call launches."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def launches(call: Callable[[], Any]) -> int | None:
    """Kernels, copies and fills on the device during one call; None on the CPU, which launches none."""
    if torch.get_default_device().type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as run:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type() == DeviceType.CUDA for event in run.profiler.kineto_results.events())

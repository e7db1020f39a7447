"""Whether operations are being recorded instead of run: then no value can be read, and nothing kept for later."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

# For all threads: the autograd engine runs the backward of a CUDA graph in its own.
_recordings = 0


def recording() -> bool:
    """Whether margin_kernels.compiled records a step."""
    return _recordings > 0


def tracing() -> bool:
    """Whether torch.compile or margin_kernels.compiled records."""
    return torch.compiler.is_compiling() or recording()


@contextmanager
def recorded() -> Iterator[None]:
    """Inside, operations are recorded."""
    global _recordings
    _recordings += 1
    try:
        yield
    finally:
        _recordings -= 1


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is one of PyTorch's own and no subclass; one that stands for it in a recording counts."""
    return type(tensor) in (Tensor, nn.Parameter) or (recording() and isinstance(tensor, FakeTensor))

"""Which backend can run a call, and in one sentence why not.

backend="auto" takes the first that can: CUDA tensor -> cuda, triton, reference; any other tensor -> cpu, reference.
The environment variable MARGIN_KERNELS_BACKEND replaces "auto", never a backend named in the call.
"""

import importlib
import os
import pkgutil
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from . import triton as triton_backend
from .tracing import tracing

BACKENDS = ("cuda", "cpu", "triton", "reference")
COMPILED = ("cuda", "cpu")
_REBUILD = "reinstall with 'pip install --no-build-isolation .' in the source folder (needs a C++ compiler)"
_REBUILD_CUDA = (
    "reinstall with 'MARGIN_KERNELS_CUDA=1 pip install --no-build-isolation .' where torch has CUDA and CUDA_HOME "
    "points to a toolkit"
)


class BackendError(RuntimeError):
    """A backend named in the call, or by MARGIN_KERNELS_BACKEND, cannot run it. The message says why and what to do."""


def _load_extension() -> tuple[ModuleType | None, str | None]:
    """(the compiled extension, None) or (None, the sentence that says why it cannot be used)."""
    if not any(module.name == "_C" for module in pkgutil.iter_modules([os.path.dirname(__file__)])):
        return None, f"the compiled extension margin_kernels._C was not built: {_REBUILD}"
    try:
        extension = importlib.import_module("margin_kernels._C")
    except ImportError as error:
        built_for = _built_for()
        if built_for not in (None, torch.__version__):
            return None, (
                f"margin_kernels._C was built for torch {built_for} and this is torch {torch.__version__}: {_REBUILD}"
            )
        return None, f"margin_kernels._C failed to import ({error}): {_REBUILD}"
    info = extension.build_info()
    if info["torch"] != torch.__version__.split("+")[0]:
        return None, (
            f"margin_kernels._C was built for torch {info['torch']} and this is torch {torch.__version__}: {_REBUILD}"
        )
    return extension, None


def _built_for() -> str | None:
    """The torch version that setup.py noted beside the extension: readable where the extension is not."""
    try:
        from ._build import TORCH_VERSION
    except ImportError:
        return None
    return TORCH_VERSION


EXTENSION, EXTENSION_ERROR = _load_extension()
if EXTENSION_ERROR is not None and "was not built" not in EXTENSION_ERROR:
    # Built, but not for what runs here. Without it all works, slower: said once, at import, with the remedy.
    warnings.warn(f"falling back to the reference implementation: {EXTENSION_ERROR}", RuntimeWarning, stacklevel=3)

# Asked once: a compiler that traces a call cannot look into the extension.
HAS_CUDA = EXTENSION is not None and EXTENSION.build_info()["cuda"]


def why_not(backend: str, op: str, tensors: Sequence[Tensor]) -> str | None:
    """None where `backend` can run `op` on `tensors`, else one sentence with the reason and the remedy."""
    return _WHY_NOT[backend](op, tensors)


def _why_not_compiled(op: str, tensors: Sequence[Tensor], device: str) -> str | None:
    if EXTENSION is None:
        return EXTENSION_ERROR
    if not hasattr(EXTENSION, op):
        return f"margin_kernels._C was built from a source without {op}: {_REBUILD}"
    if device == "cuda" and not HAS_CUDA:
        return f"margin_kernels._C was built without CUDA: {_REBUILD_CUDA}"
    found = tensors[0].device.type
    if found != device and found != "meta":
        return f"the {device} backend runs on {device.upper()} tensors and got one on {found}: move it, or use 'auto'"
    if not tracing() and is_functorch_wrapped(tensors[0]):
        return "the compiled ops do not run under torch.func transforms: pass backend='reference'"
    return None


def is_functorch_wrapped(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _why_not_triton(op: str, tensors: Sequence[Tensor]) -> str | None:
    return triton_backend.why_not(op, tensors)


_WHY_NOT: dict[str, Callable[[str, Sequence[Tensor]], str | None]] = {
    "cuda": lambda op, tensors: _why_not_compiled(op, tensors, "cuda"),
    "cpu": lambda op, tensors: _why_not_compiled(op, tensors, "cpu"),
    "triton": _why_not_triton,
    "reference": lambda op, tensors: None,
}


def _implementation(backend: str, op: str) -> Callable[..., Any]:
    if backend == "reference":
        return getattr(reference, op)
    if backend == "triton":
        return triton_backend.implementation(op)
    if tracing():
        return getattr(torch.ops.margin_kernels, op).default
    # The pybind11 function: the same dispatcher call with two microseconds less of argument parsing.
    return getattr(EXTENSION, op)


def choose(op: str, tensors: Sequence[Tensor], backend: str = "auto") -> tuple[str, Callable[..., Any]]:
    """The name of the backend that runs this call, and its implementation of `op`.

    Raises ValueError for an unknown name and BackendError where a backend that was named cannot run the call.
    """
    if backend == "auto":
        backend = os.environ.get("MARGIN_KERNELS_BACKEND", "auto")
    if backend == "auto":
        order = ("cuda", "triton", "reference") if tensors[0].is_cuda else ("cpu", "reference")
        for name in order:
            if _WHY_NOT[name](op, tensors) is None:
                backend = name
                break
    else:
        _require(op, tensors, backend)
    return backend, _implementation(backend, op)


def _require(op: str, tensors: Sequence[Tensor], backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_not(backend, op, tensors)
    if reason is not None:
        raise BackendError(f"backend {backend!r} cannot run {op}: {reason}")

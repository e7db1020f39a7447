"""Triton kernels, one module per op, registered as custom ops: torch.ops.margin_kernels_triton.X and X_backward.

Nothing here imports triton before a Triton kernel is asked for: it takes as long as the rest of the package.
"""

import importlib.util
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..tracing import tracing
from .interpreter import INTERPRETED

OPS = ("competitors", "dual_norm", "row_distance", "margin_hinge", "one_to_n", "deepfool_step")
OLDEST = (3, 6)


def _why_not_installed() -> str | None:
    oldest = ".".join(map(str, OLDEST))
    remedy = f"pip install 'triton>={oldest}' (Linux)"
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: {remedy}"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # installed under another name, by a nightly build of torch
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        return f"triton {version} is older than {oldest}: {remedy}"
    return None


NOT_INSTALLED = _why_not_installed()


def why_not(op: str, tensors: Sequence[Tensor]) -> str | None:
    """None where the Triton kernel of `op` can run on `tensors`, else the reason in one sentence."""
    if op not in OPS:
        return f"there is no Triton kernel for {op} in this version: use 'auto' or 'reference'"
    if NOT_INSTALLED is not None:
        return NOT_INSTALLED
    device = tensors[0].device.type
    if INTERPRETED and device not in ("cpu", "meta"):
        return f"under TRITON_INTERPRET=1 the kernels run on CPU tensors and got one on {device}: unset it"
    if not INTERPRETED and device not in ("cuda", "meta"):
        return (
            f"the Triton kernels run on CUDA tensors and got one on {device}: move it, use 'auto', or, for tests, set "
            "TRITON_INTERPRET=1 before margin_kernels is imported"
        )
    if not tracing() and torch._C._functorch.is_functorch_wrapped_tensor(tensors[0]):
        return "the Triton ops do not run under torch.func transforms: pass backend='reference'"
    return None


def implementation(op: str) -> Callable[..., Any]:
    """The Python function of `op`: the signature of the reference, differentiable, run by Triton kernels."""
    from . import ops  # imports triton

    return getattr(ops, op)

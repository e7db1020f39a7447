"""Triton kernels, one module per op, registered as custom ops. OPS names those that exist."""

from collections.abc import Sequence

from torch import Tensor

OPS: tuple[str, ...] = ()


def why_not(op: str, tensors: Sequence[Tensor]) -> str | None:
    """None where the Triton kernel of `op` can run on `tensors`, else the reason in one sentence."""
    if op not in OPS:
        return f"there is no Triton kernel for {op} in this version: use 'auto' or 'reference'"
    return None

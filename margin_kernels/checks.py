"""Argument checks in Python: the same mistakes and the same words as csrc/check.h.

They run before the reference and Triton implementations; the compiled ops check for themselves. Only shapes, dtypes
and devices are read, plus the targets where they lie on the CPU: nothing here waits for a device.
"""

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .backends import is_functorch_wrapped
from .reference.margin_hinge import AGGREGATIONS
from .reference.one_to_n import BOUNDS
from .tracing import tracing

Layerwise = float | Sequence[float] | Tensor
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _value(message: str) -> NoReturn:
    raise ValueError(message)


def _type(message: str) -> NoReturn:
    raise TypeError(message)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        _type(f"{name} must be float64, float32, bfloat16 or float16, got {_name(tensor.dtype)}")


def check_labelled_logits(logits: Tensor, target: Tensor) -> None:
    check_floating("logits", logits)
    if logits.dim() != 2:
        _value(f"logits must have shape [N, C], got {list(logits.shape)}")
    if target.dtype != torch.int64:
        _type(f"target must be int64 class indices, got {_name(target.dtype)}")
    rows, classes = logits.shape
    if target.dim() != 1 or target.shape[0] != rows:
        _value(f"target must have shape [{rows}] to match logits, got {list(target.shape)}")
    if target.device != logits.device:
        _value(f"target must be on the device of logits ({logits.device}), got {target.device}")
    if classes < 2:
        _value(f"logits must have at least 2 classes, got {classes}")


def check_classes(name: str, values: Tensor, classes: int, ignored: int | None = None) -> None:
    """Every entry of values [N] or [N, k] in [0, classes), or equal to `ignored`, where they lie on the CPU."""
    if values.device.type != "cpu" or not _readable(values):
        return
    outside = (values < 0) | (values >= classes)
    if ignored is not None:
        outside = outside & (values != ignored)
    if bool(outside.any()):
        where = outside.nonzero()[0].tolist()
        _value(f"{name} must be in [0, {classes}), got {int(values[tuple(where)])} at row {where[0]}")


def check_competitors(logits: Tensor, target: Tensor, k: int, ignore_index: int) -> None:
    check_labelled_logits(logits, target)
    classes = logits.shape[1]
    if not 0 <= k <= classes - 1:
        _value(f"k must be in [0, {classes - 1}] for {classes} classes, got {k}")
    check_classes("target", target, classes, ignore_index)


def check_dual_norm(gradients: Sequence[Tensor], p: float, batch_dims: int) -> None:
    check_p(p)
    if batch_dims not in (1, 2):
        _value(f"batch_dims must be 1 ([N, *]) or 2 ([N, k, *]), got {batch_dims}")
    if len(gradients) == 0:
        _value("gradients must hold at least one tensor, got an empty list")
    first = gradients[0]
    for i, g in enumerate(gradients):
        check_floating(f"gradients[{i}]", g)
        if g.dim() < batch_dims:
            _value(f"gradients[{i}] must have at least {batch_dims} dimensions, got shape {list(g.shape)}")
        if g.shape[:batch_dims] != first.shape[:batch_dims]:
            _value(
                f"gradients[{i}] must begin with {list(first.shape[:batch_dims])} like gradients[0], "
                f"got {list(g.shape)}"
            )
        if g.device != first.device:
            _value(f"gradients[{i}] must be on the device of gradients[0] ({first.device}), got {g.device}")


def exponent(p: float | str) -> float:
    """p as a number: "inf" is infinity, as in a configuration file."""
    if isinstance(p, str):
        if p != "inf":
            _value(f"p must be >= 1 (or inf), got {p}")
        return math.inf
    return float(p)


def check_p(p: float) -> None:
    if not p >= 1:
        _value(f"p must be >= 1 (or inf), got {p:g}")


def check_margin_hinge(
    gap: Tensor,
    norm: Tensor,
    gamma: Tensor,
    cap: Tensor | None,
    weight: Tensor | None,
    min_norm: Tensor | None,
    eps: float,
    aggregation: str,
    layer_reduction: str,
) -> None:
    check_floating("gap", gap)
    check_floating("norm", norm)
    if gap.dim() != 2 or gap.shape[1] < 1:
        _value(f"gap must have shape [N, k] with k >= 1, got {list(gap.shape)}")
    if norm.dim() != 3 or norm.shape[:2] != gap.shape or norm.shape[2] < 1:
        _value(f"norm must have shape [{gap.shape[0]}, {gap.shape[1]}, L] to match gap, got {list(norm.shape)}")
    if norm.device != gap.device:
        _value(f"norm must be on the device of gap ({gap.device}), got {norm.device}")
    layers = norm.shape[2]
    for name, tensor in (("gamma", gamma), ("cap", cap), ("weight", weight), ("min_norm", min_norm)):
        if tensor is None:
            continue
        check_floating(name, tensor)
        if tensor.dim() != 1 or tensor.shape[0] != layers:
            _value(f"{name} must have shape [{layers}], one entry per layer, got {list(tensor.shape)}")
        if tensor.device != gap.device:
            _value(f"{name} must be on the device of gap ({gap.device}), got {tensor.device}")
        if tensor.requires_grad:
            _value(f"{name} must not require grad: it is a hyper-parameter")
    if not 0 <= eps < math.inf:
        _value(f"eps must be finite and >= 0, got {eps:g}")
    if aggregation not in AGGREGATIONS:
        _value(f"aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation}")
    if layer_reduction not in ("mean", "sum"):
        _value(f"layer_reduction must be one of mean, sum, got {layer_reduction}")


def check_layerwise(name: str, value: Layerwise | None) -> None:
    """A bound of margin_hinge is >= 0. One that lies on a device is not read: there the loss is NaN instead."""
    for number in _numbers(value):
        if not number >= 0:
            _value(f"{name} must be >= 0, got {number:g}")


def check_layer_weights(value: Layerwise | None, layer_reduction: str) -> None:
    check_layerwise("layer_weights", value)
    numbers = _numbers(value)
    if layer_reduction == "mean" and numbers and not any(numbers):
        _value(f"layer_weights must not all be 0 with layer_reduction=mean, got {numbers}")


def _numbers(value: Layerwise | None) -> list[float]:
    """The value as numbers; none where it is a tensor on a device, or one that a compiler traces."""
    if isinstance(value, Tensor):
        readable = value.device.type == "cpu" and _readable(value) and value.dim() <= 1
        return torch.atleast_1d(value.detach()).tolist() if readable else []
    if value is None or isinstance(value, (int, float)):
        return [] if value is None else [float(value)]
    return [float(number) for number in value]


def check_row_distance(rows: Tensor, index: Tensor, target: Tensor, p: float) -> None:
    check_p(p)
    check_floating("rows", rows)
    if rows.dim() != 2:
        _value(f"rows must have shape [C, D], got {list(rows.shape)}")
    for name, tensor in (("index", index), ("target", target)):
        if tensor.dtype != torch.int64:
            _type(f"{name} must be int64 class indices, got {_name(tensor.dtype)}")
    if index.dim() != 2 or index.shape[1] < 1:
        _value(f"index must have shape [N, k] with k >= 1, got {list(index.shape)}")
    if target.dim() != 1 or target.shape[0] != index.shape[0]:
        _value(f"target must have shape [{index.shape[0]}] to match index, got {list(target.shape)}")
    for name, tensor in (("index", index), ("target", target)):
        if tensor.device != rows.device:
            _value(f"{name} must be on the device of rows ({rows.device}), got {tensor.device}")
    check_classes("target", target, rows.shape[0])
    check_classes("index", index, rows.shape[0])


def check_one_to_n(logits: Tensor, target: Tensor, delta: float, bound: str, ignored: int | None = None) -> None:
    check_labelled_logits(logits, target)
    if not 0 < delta < math.inf:
        _value(f"delta must be finite and > 0, got {delta:g}")
    if bound not in BOUNDS:
        _value(f"bound must be one of {', '.join(BOUNDS)}, got {bound}")
    check_classes("target", target, logits.shape[1], ignored)


def check_deepfool_step(gap: Tensor, gradients: Tensor, active: Tensor | None, p: float) -> None:
    check_p(p)
    check_floating("gap", gap)
    check_floating("gradients", gradients)
    if gap.dim() != 2 or gap.shape[1] < 1:
        _value(f"gap must have shape [N, k] with k >= 1, got {list(gap.shape)}")
    if gradients.dim() < 2 or gradients.shape[:2] != gap.shape:
        _value(f"gradients must begin with {list(gap.shape)} like gap, got {list(gradients.shape)}")
    if gradients.device != gap.device:
        _value(f"gradients must be on the device of gap ({gap.device}), got {gradients.device}")
    if active is None:
        return
    if active.dtype != torch.bool:
        _type(f"active must be bool, got {_name(active.dtype)}")
    if active.dim() != 1 or active.shape[0] != gap.shape[0]:
        _value(f"active must have shape [{gap.shape[0]}] to match gap, got {list(active.shape)}")
    if active.device != gap.device:
        _value(f"active must be on the device of gap ({gap.device}), got {active.device}")


def _readable(tensor: Tensor) -> bool:
    """Whether reading values is possible and free: not while a compiler or a torch.func transform traces."""
    return not tracing() and type(tensor) in (Tensor, torch.nn.Parameter) and not is_functorch_wrapped(tensor)

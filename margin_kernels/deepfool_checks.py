"""What DeepFool refuses, by name, and what it warns of: "NAME must be ..., got ..."."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .batchnorm import training_batchnorms
from .sharding import is_sharded
from .tracing import tracing


def check_search(p: Any, max_iter: Any, overshoot: Any, top_k: Any) -> float:
    """p as a number. Raises ValueError or TypeError for an option out of range."""
    exponent = math.inf if p == "inf" else _number("p", p, ' >= 1 or "inf"')
    if not exponent >= 1:
        raise ValueError(f"p must be >= 1 (or inf), got {p:g}")
    for name, value in (("max_iter", max_iter), ("top_k", top_k)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not 0 <= _number("overshoot", overshoot) < math.inf:
        raise ValueError(f"overshoot must be finite and >= 0, got {overshoot}")
    return exponent


def _number(name: str, value: Any, allowed: str = "") -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number{allowed}, got {value!r}")
    return float(value)


def check_arguments(
    model: Any,
    x: Any,
    target: Any,
    overshoot_mode: Any,
    bounds: Any,
    step_limit: Any,
) -> None:
    """Raises ValueError or TypeError for an argument of `deepfool` that needs no forward pass to be judged."""
    if not callable(model):
        raise TypeError(f"model must be a module or a function, got {type(model).__name__}")
    if isinstance(model, nn.Module):
        if any(map(is_sharded, model.modules())):
            raise ValueError(
                "model must not be sharded: load its state dict into a plain model, as docs/processes.md says"
            )
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if is_lazy(tensor):
                raise ValueError(f"model must have had a forward pass, got the uninitialised parameter {name!r}")
            if tensor.is_inference():
                raise ValueError(
                    f"model must be made outside of torch.inference_mode, got the inference tensor {name!r}: autograd "
                    "cannot use it; copy.deepcopy(model) outside of inference_mode can be used"
                )
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        raise ValueError(f"x must be a floating-point tensor [N, *], got {described(x)}")
    if target is not None:
        if not isinstance(target, Tensor) or target.dtype != torch.int64:
            raise TypeError(f"target must be int64 class indices, got {described(target)}")
        if target.shape != x.shape[:1]:
            raise ValueError(f"target must have shape [{len(x)}] to match x, got {list(target.shape)}")
        if target.device != x.device:
            raise ValueError(f"target must be on the device of x ({x.device}), got {target.device}")
    if overshoot_mode not in ("total", "step"):
        raise ValueError(f"overshoot_mode must be one of 'total', 'step', got {overshoot_mode!r}")
    if step_limit is not None and not _number("step_limit", step_limit) > 0:
        raise ValueError(f"step_limit must be > 0, got {step_limit}")
    if bounds is not None:
        _check_bounds(x, bounds)


def _check_bounds(x: Tensor, bounds: Any) -> None:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"bounds must be (low, high) or None, got {bounds!r}")
    low, high = (_number("bounds", bound) for bound in bounds)
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds}")
    if tracing():
        return
    outside = (x < low) | (x > high)
    if bool(outside.any()):
        where = outside.nonzero()[0].tolist()
        raise ValueError(
            f"x must lie in bounds ({low:g}, {high:g}), got {float(x[tuple(where)]):g} in sample {where[0]}"
        )


def check_logits(logits: Any, x: Tensor, target: Tensor | None) -> None:
    """Raises ValueError for what is no logits [N, C] of x [N, *], and for a target outside [0, C)."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x) or not logits.is_floating_point():
        raise ValueError(f"model must return logits [N, C] with N = {len(x)}, got {described(logits)}")
    classes = logits.shape[1]
    if classes < 2:
        raise ValueError(f"model must return logits of at least 2 classes, got {classes}")
    if target is not None and not tracing():
        outside = (target < 0) | (target >= classes)
        if bool(outside.any()):
            row = int(outside.nonzero()[0])
            raise ValueError(f"target must be in [0, {classes}), got {int(target[row])} at row {row}")


def warn_of_training_mode(model: Any, drew: bool) -> bool:
    """Warns of a model that is no fixed function of each sample; returns whether it is none."""
    found = []
    if isinstance(model, nn.Module) and training_batchnorms(model):
        found.append("batch norm in training mode, which couples the samples of a batch")
    if drew:
        found.append("random numbers, as dropout in training mode draws them")
    if found:
        warnings.warn(
            f"the model uses {' and '.join(found)}: every step sees another function, and the distances belong to "
            "none of them. Call model.eval() before deepfool",
            stacklevel=4,
        )
    return bool(found)


def warn_of_probabilities(logits: Tensor) -> None:
    """Warns where every row of logits [N, C] looks like the output of a softmax."""
    if len(logits) == 0 or tracing():
        return
    tolerance = 1e-2 if logits.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if bool(((logits >= 0).all(1) & ((logits.double().sum(1) - 1).abs() < tolerance)).all()):
        warnings.warn(
            "the model seems to return probabilities (rows >= 0 that sum to 1), and DeepFool expects logits: "
            "boundaries look far away where the softmax is saturated. Leave the softmax out, or pass "
            "lambda x: model(x).log()",
            stacklevel=4,
        )


def described(value: Any) -> str:
    """A value in an error: dtype and shape of a tensor, the type of anything else."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

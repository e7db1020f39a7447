"""The fields of a step as scalars for a logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Fields that are names of classes or masks, of which a mean says nothing.
NOT_NUMBERS = ("output", "target", "competitor", "label", "valid", "position", "partial")


def flat(out: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Tensor]:
    """As MarginTask.log; layers: the names of the taps."""
    found: dict[str, Tensor] = {}
    valid = out.get("valid")
    for name, value in out.items():
        if not isinstance(value, Tensor) or name in NOT_NUMBERS:
            continue
        value = value.detach()
        if value.dim() == 0:
            found[name] = value.float()
        elif name == "degenerate":
            found[name] = value.sum().float()
        elif name not in ("distance", "norm", "active") or len(layers) == 0:
            found[name] = _mean(value.float(), valid)
    found |= _accuracy(out)
    if layers and "distance" in out and "active" in out:
        found |= _of_layers(out, layers)
    return {name: value if value.dtype == torch.float32 else value.float() for name, value in found.items()}


def _mean(values: Tensor, valid: Any) -> Tensor:
    """The mean over the rows that are valid, where their mask fits, of the entries that are finite."""
    keep = values.isfinite()
    if isinstance(valid, Tensor) and valid.shape == values.shape[: valid.dim()]:
        keep = keep & valid.view(*valid.shape, *[1] * (values.dim() - valid.dim()))
    return torch.where(keep, values, 0).sum() / keep.sum()


def _accuracy(out: Mapping[str, Any]) -> dict[str, Tensor]:
    """The share of predictions that are the target."""
    output, target, valid = out.get("output"), out.get("target"), out.get("valid")
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.shape[:1] != target.shape[:1]:
        return {}
    output = output.detach()
    if output.numel() == target.numel():  # one logit
        right = (output.reshape(target.shape) > 0) == (target > 0)
    elif output.dim() == 2:
        right = output.argmax(1) == target
    else:
        return {}
    return {"accuracy": _mean(right.float(), valid)}


def _of_layers(out: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Tensor]:
    distance, usable = out["distance"].detach().float(), ~out["degenerate"]
    rows = usable.flatten(0, -3).any(1)
    nearest = torch.where(usable, distance, torch.inf).flatten(0, -3).amin(1)
    active = out["active"].flatten(0, -3).any(1).float()
    valid = out["valid"].flatten()
    found = {}
    for i, name in enumerate(layers):
        found[f"distance/{name}"] = _mean(nearest[:, i], valid & rows[:, i])
        found[f"active/{name}"] = _mean(active[:, i], valid & rows[:, i])
    return found

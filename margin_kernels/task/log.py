"""The fields of a step as scalars for a logger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .layout import layout_of

# Fields that are names of classes or masks, of which a mean says nothing.
NOT_NUMBERS = ("output", "target", "all_targets", "competitor", "label", "valid", "position", "partial")


def flat(out: Mapping[str, Any], layers: Sequence[str], class_dim: int | None) -> dict[str, Tensor]:
    """As MarginTask.log; layers: the names of the taps; class_dim: of logits with predictions at positions."""
    found: dict[str, Tensor] = {}
    valid = out.get("valid")
    drawn = None if valid is None else rows_that_count(out)
    for name, value in out.items():
        if not isinstance(value, Tensor) or name in NOT_NUMBERS:
            continue
        value = value.detach().float()
        if value.dim() == 0:
            found[name] = value
        elif name == "degenerate":
            found[name] = value.sum()
        elif name == "loss":  # reduction="none": its terms have their weights
            found[name] = value.mean()
        elif valid is not None and value.shape == valid.shape:
            found[name] = _mean(value, valid)
        elif name == "gap" and drawn is not None:  # the strongest competitor's
            found[name] = _mean(value.reshape(len(drawn), -1)[:, 0], drawn)
        elif value.dim() == 1 and name not in ("norm", "distance"):
            found[name] = _mean(value, drawn)
    found |= _accuracy(out, class_dim)
    if layers and "active" in out:
        found |= _of_layers(out, layers)
    return found


def rows_that_count(out: Mapping[str, Any]) -> Tensor:
    """Which rows of gap, norm and distance are not ignored, [R] bool."""
    valid: Tensor = out["valid"]
    if "position" in out:
        valid = valid.flatten(1).gather(1, out["position"])
    return valid.flatten()


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """The mean over the rows that are valid; NaN and infinity stay."""
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0).sum() / valid.sum()


def _accuracy(out: Mapping[str, Any], class_dim: int | None) -> dict[str, Tensor]:
    """The share of predictions that are the target, at all positions; one that is NaN is none."""
    output, target = out.get("output"), out.get("all_targets", out.get("target"))
    if not isinstance(output, Tensor) or not isinstance(target, Tensor) or output.shape[:1] != target.shape[:1]:
        return {}
    output = output.detach()
    if output.numel() == target.numel():  # one logit
        output = output.reshape(target.shape)
        right = ((output > 0) == (target > 0)) & ~output.isnan()
    elif output.dim() >= 2:
        d = layout_of(output, target, class_dim).class_dim or 1
        right = (output.argmax(d) == target) & ~output.isnan().any(d)
    else:
        return {}
    return {"accuracy": _mean(right.float(), out.get("valid"))}


def _of_layers(out: Mapping[str, Any], layers: Sequence[str]) -> dict[str, Tensor]:
    distance, usable = out["distance"].detach().float(), ~out["degenerate"]
    nearest = torch.where(usable, distance, torch.inf).flatten(0, -3).amin(1)
    active = out["active"].flatten(0, -3).any(1).float()
    rows = usable.flatten(0, -3).any(1) & rows_that_count(out).unsqueeze(1)
    found = {}
    for i, name in enumerate(layers):
        found[f"distance/{name}"] = _mean(nearest[:, i], rows[:, i])
        found[f"active/{name}"] = _mean(active[:, i], rows[:, i])
    return found

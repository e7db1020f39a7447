"""The logits in what a model returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def logits_in(made: Any) -> Any:
    """What a model has returned where that is a tensor, else its `.logits` or what it has under the key "logits"; None
    where it has neither."""
    if isinstance(made, Tensor):
        return made
    if isinstance(made, Mapping):
        return made.get("logits")
    return getattr(made, "logits", None)


def described(made: Any) -> str:
    """What a model has returned, in words."""
    name = type(made).__name__
    if isinstance(made, Mapping):
        return f"a {name} with {', '.join(map(repr, made)) or 'nothing'}"
    if isinstance(made, (tuple, list)):
        return f"a {name} of {len(made)}"
    return name


def is_one_logit(logits: Any) -> bool:
    """Whether logits are those of a model with one, [N] or [N,1]."""
    return isinstance(logits, Tensor) and (logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1))


def with_zero(f: Tensor) -> Tensor:
    """One logit f [N] or [N,1] as those of the classes z = (0, f), [N,2], whose softmax is sigmoid(f)."""
    f = f.reshape(-1, 1)
    return torch.cat([torch.zeros_like(f), f], 1)

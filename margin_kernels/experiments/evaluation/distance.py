"""Signed distance to the nearest decision boundary at every tap, measured on any model ([E]
appendix B.2).

    d[n, l] = min over j != y of (z_y - z_j) / (eps + ||grad_{h_l} (z_y - z_j)||_q)        positive = classified
    correctly
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import margin_kernels as mk
from margin_kernels.modes import eval_mode

from ..data import Split


def tap_names(hidden: tuple[str, ...]) -> tuple[str, ...]:
    """The taps that are measured: input, every hidden layer, output."""
    return ("input", *hidden, "output")


def signed_distance(
    model: nn.Module,
    split: Split,
    hidden: tuple[str, ...],
    p: float,
    batch_size: int = 500,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Distances in the p norm, [N, L] on the CPU, over all C - 1 competitors; L as tap_names(hidden). Model in eval
    mode, no gradients left."""
    with eval_mode(model), torch.no_grad():
        classes = model(split.batch(slice(0, 1), device)[0]).shape[1]
    task = mk.MarginTask(model, mk.LargeMarginLoss(p=p, top_k=classes - 1), layers=tap_names(hidden))
    parts = []
    with eval_mode(model), torch.enable_grad():
        for x, y in split.batches(batch_size, device):
            parts.append(task(x, y)["distance"].amin(1).float().cpu())
    return torch.cat(parts)

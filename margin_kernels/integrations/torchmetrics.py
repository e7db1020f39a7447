"""MarginDistance: mean and quantiles of distances to the decision boundary, over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..losses import base
from ..task.log import rows_that_count
from . import missing

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    raise missing("torchmetrics", error) from error


class MarginDistance(Metric):
    """Distances d [N,k,L] of MarginTask ([N,P,k,L] at positions), that of each sample to its nearest competitor:
    {"count": [L], "mean": [L], "right": share with d > 0 [L], "quantiles": [Q,L]}.

        metric = MarginDistance(layers=len(task.layers), low=-2.0, high=2.0)
        metric.update(task.evaluate(x, y))
        metric.compute()["mean"]

    All states are sums, so that processes are joined exactly. Quantiles come from a histogram of `bins` equal bins
    between low and high, to half of a bin's width; one that lies outside is -inf or inf. Infinite and undefined
    distances, degenerate ones, and samples that the task does not count are left out. (Metric makes a number of what
    has one element.)

    Args:
        layers: how many, L
        low: where the bins begin
        high: where they end, > low
        bins: how many, >= 1
        quantiles: in [0, 1]
        options: of Metric: dist_sync_on_step, process_group, ...
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    count: Tensor
    total: Tensor
    right: Tensor
    histogram: Tensor

    def __init__(
        self,
        layers: int,
        low: float,
        high: float,
        bins: int = 1000,
        quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        base.count("layers", layers)
        base.count("bins", bins)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"low and high must be finite and low < high, got {low} and {high}")
        self.low, self.high, self.bins = float(low), float(high), bins
        self.quantiles = tuple(base.fraction("quantiles", q) for q in quantiles)
        for name, columns in (("count", ()), ("right", ()), ("histogram", (bins + 2,))):
            self.add_state(name, torch.zeros(layers, *columns, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(layers, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, found: dict[str, Tensor] | Tensor) -> None:
        """Takes what a task measured on one batch, `distance`, `degenerate` and `valid`, or distances themselves."""
        measured = {"distance": found} if isinstance(found, Tensor) else found
        if "distance" not in measured:
            raise ValueError(
                f"found must hold 'distance', got {sorted(measured)}: without gradients a task measures none, "
                "task.evaluate does"
            )
        distance = measured["distance"].detach().double()
        if distance.dim() < 3 or distance.shape[-1] != len(self.count):
            raise ValueError(f"distance must be [N,k,{len(self.count)}], got {list(distance.shape)}")
        if "degenerate" in measured:
            distance = torch.where(measured["degenerate"], math.inf, distance)
        nearest = distance.flatten(0, -3).amin(1)
        counted = nearest.isfinite()
        if "valid" in measured:
            counted &= rows_that_count(measured).unsqueeze(1)
        place = ((nearest.nan_to_num() - self.low) / (self.high - self.low) * self.bins).floor()
        place = place.clamp(-1, self.bins).long() + 1
        self.count += counted.sum(0)
        self.right += (counted & (nearest > 0)).sum(0)
        self.total += torch.where(counted, nearest, 0).sum(0)
        self.histogram.scatter_add_(1, place.T, counted.long().T)

    def compute(self) -> dict[str, Tensor]:
        """Over all samples so far, of all processes; NaN for a layer without one."""
        share = self.count.double()
        edge = torch.linspace(self.low, self.high, self.bins + 1, dtype=torch.float64, device=share.device)
        middle = torch.cat([edge.new_tensor([-math.inf]), (edge[1:] + edge[:-1]) / 2, edge.new_tensor([math.inf])])
        below = self.histogram.cumsum(1).double()
        at = torch.tensor(self.quantiles, dtype=torch.float64, device=share.device)
        # The sample whose rank is q (count - 1), rounded down, as in a sorted list.
        rank = (at * (share - 1).clamp(min=0).unsqueeze(1)).floor()
        quantiles = middle[torch.searchsorted(below, rank, right=True).clamp(max=self.bins + 1)]
        quantiles = torch.where(self.count.unsqueeze(1) > 0, quantiles, math.nan)
        return {
            "count": self.count.clone(),
            "mean": self.total / share,
            "right": self.right / share,
            "quantiles": quantiles.T,
        }

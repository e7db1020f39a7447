"""What a trained network's distances say about the margins to ask for."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..losses.base import positive
from ..losses.large_margin import LargeMarginLoss
from ..modes import eval_mode
from ..outputs import described
from ..process_group import Group, alone
from .auto_gamma import nearest, positive_median
from .log import rows_that_count
from .task import MarginTask

TRAIN_FIRST = "train first: the network is wrong on half of the samples"


class SuggestedGamma(NamedTuple):
    """Arguments of LargeMarginLoss: LargeMarginLoss(**suggestion._asdict(), ...)."""

    gamma: list[float]
    layer_weights: list[float]
    layer_reduction: str = "sum"


def suggest_gamma(task: MarginTask, loader: Iterable[Any], factor: float = 1.5) -> SuggestedGamma:
    """What LargeMarginLoss is to ask for, from the distances that the network of a task has.

        gamma_l = factor * median of d[n,l] to the nearest competitor, over the samples with d[n,l] > 0
        layer_weights_l = 1 / (L gamma_l)

    which is what gamma="auto" asks for.

    Args:
        task: a MarginTask with LargeMarginLoss, whose layers, p, competitors, eps and scale are measured; its gamma and
            weights do not matter. In eval mode meanwhile.
        loader: batches: tuples of the arguments of a task, x [N,*], y [N], or dicts of them with the key "target".
        factor: > 0.

    Raises:
        ValueError: the median over all samples is not positive at some layer: train first; or no sample was measured.
    """
    positive("factor", factor)
    distances = nearest_distances(task, loader)
    missing = [name for name, seen in zip(task.layers, (~distances.isnan()).any(0).tolist(), strict=True) if not seen]
    if missing:
        raise ValueError(
            f"loader must hold samples whose margin can be measured, got none at layer {missing[0]!r}: empty batches, "
            "targets that are all ignored, or norms of 0"
        )
    medians = distances.nanmedian(0).values
    if not bool((medians > 0).all()):
        measured = ", ".join(f"{median:.4g}" for median in medians.tolist())
        raise ValueError(f"the median distances must be positive, got {measured}: {TRAIN_FIRST}")
    gamma = (factor * positive_median(distances)).tolist()
    return SuggestedGamma(gamma, [1 / (len(gamma) * value) for value in gamma])


def nearest_distances(task: MarginTask, loader: Iterable[Any]) -> Tensor:
    """d[n,l] to the nearest competitor [N,L] of the samples in batches, as the loss of a task measures it in eval mode;
    NaN where there is none. With a process_group those of all its processes, each of which calls this with batches of
    its own."""
    if not isinstance(getattr(task, "loss", None), LargeMarginLoss):
        raise TypeError(f"task must be a MarginTask with LargeMarginLoss, got {type(task).__name__}")
    loss = copy.copy(task.loss)
    loss.gamma, loss.layer_weights, loss.second_order = 1.0, None, False
    probe = task.with_loss(loss)
    with eval_mode(task.model), torch.enable_grad(), alone():
        found = [_nearest_of(_evaluated(probe, batch)) for batch in loader]
    if not found:
        raise ValueError("loader must hold at least one batch, got none")
    group = Group(task.loss.process_group)
    return group.gathered(torch.cat(found), "the gathering of distances for suggest_gamma")


def _evaluated(task: MarginTask, batch: Any) -> dict[str, Any]:
    if isinstance(batch, Mapping) and "target" in batch:
        return task.evaluate(**batch)
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(
            'loader must give tuples of the arguments of a task, as (x, y), or dicts with the key "target", got '
            f"{described(batch)}"
        )
    return task.evaluate(*batch)


def _nearest_of(out: dict[str, Any]) -> Tensor:
    usable = ~out["degenerate"].flatten(0, -3) & rows_that_count(out).view(-1, 1, 1)
    return nearest(out["distance"].flatten(0, -3), usable)

"""One batch: the rows of logits and targets that a loss is given of what the model makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gradients.request import Captured
from ..losses.base import MarginLoss
from ..losses.targets import NEEDS_CLASSES
from .layout import Layout, Rows, draw, layout_of, seen_from
from .reading import mapped

# Of predictions at positions: the fields that a loss has for all of them, not for those at which margins are measured.
OF_ALL = ("nll", "classification")


class Batch(NamedTuple):
    """A batch as the loss is given it: `rows` of logits with targets, of all predictions or of those drawn at
    `position` [N,P], and `all_rows`."""

    layout: Layout
    rows: Rows
    all_rows: Rows
    position: Tensor | None = None
    counted: Tensor | None = None  # [N,T] bool, of all positions

    @property
    def given(self) -> tuple[Tensor, Tensor]:
        """Logits and targets."""
        return self.rows.logits, self.rows.target

    @property
    def weights(self) -> dict[str, Tensor]:
        """The argument sample_weight, where there is one."""
        return {} if self.rows.weight is None else {"sample_weight": self.rows.weight}

    def label(self) -> Tensor:
        """The class of each row, of soft targets the largest."""
        return _label(self.rows.target)

    def fields(self, made: Tensor, measured: Mapping[str, Any]) -> dict[str, Any]:
        """What a step returns: for predictions at positions with the shape of the target, or [N,P,*], in the place of
        rows."""
        found = {"output": made, "target": self.label(), **measured}
        if not self.layout.dense:
            return found
        every = torch.Size([made.shape[0], *self.layout.positions])
        drawn = every if self.position is None else self.position.shape
        for name, value in found.items():
            if name == "output" or not isinstance(value, Tensor) or value.dim() == 0:
                continue
            of_all = self.position is None or name in OF_ALL
            found[name] = value.reshape(*(every if of_all else drawn), *value.shape[1:])
        if self.position is not None:
            found["position"] = self.position
            found["all_targets"] = _label(self.all_rows.target).reshape(every)
            if self.counted is not None:
                found["valid"] = self.counted.reshape(every)
        return found


def _label(target: Tensor) -> Tensor:
    return target.argmax(1) if target.is_floating_point() else target


def usable(tree: Any) -> Any:
    """The same with clones in the place of tensors that were made in inference mode, which keep no versions."""
    return mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf, tree)


def ignored_by(loss: MarginLoss) -> int | None:
    """The target of samples that a loss leaves out."""
    return getattr(loss, "ignore_index", None)


class Batches:
    """Makes batches of the logits of one task.

    Args:
        class_dim: as in MarginTask; the shapes of an earlier batch may have shown it
        positions: as in MarginTask
    """

    def __init__(self, class_dim: int | None, positions: int | None) -> None:
        self.class_dim, self.positions = class_dim, positions

    def layout(self, made: Tensor, y: Tensor) -> Layout:
        found = layout_of(made, y, self.class_dim)
        if found.dense:
            self.class_dim = 1 if found.class_dim == 1 else -1
        return found

    def of(self, loss: MarginLoss, made: Tensor, y: Tensor, sample_weight: Tensor | None) -> Batch:
        """A batch of a loss that measures at no tap: all predictions as rows."""
        layout, ignored = self.layout(made, y), ignored_by(loss)
        if layout.one_logit and not loss.takes_one_logit:
            raise ValueError(NEEDS_CLASSES.format(name=type(loss).__name__))
        if layout.dense and loss.needs == "model":
            raise ValueError(
                f"{type(loss).__name__} takes one prediction a sample, [N,C], got logits {list(made.shape)}"
            )
        rows = layout.rows(made, y, sample_weight, ignored)
        return Batch(layout, rows, rows)

    def at_taps(
        self, loss: MarginLoss, made: Tensor, captured: Captured, y: Tensor, sample_weight: Tensor | None
    ) -> tuple[Batch, Captured]:
        """The rows that a loss at taps is given, and the forward pass as they see it; `made` are the logits of the
        loss, those of `captured` may be others."""
        layout, ignored = self.layout(made, y), ignored_by(loss)
        if not layout.dense:
            rows = layout.rows(made, y, sample_weight, ignored)
            batch = Batch(layout, rows, rows)
            if rows.logits is made:
                return batch, captured
            seen = rows.logits if captured.logits is made else layout.classes(captured.logits)
            return batch, seen_from(captured, (), seen)
        if self.positions is None:
            count = torch.Size(layout.positions).numel()
            raise ValueError(
                f"positions must be given for logits {list(made.shape)}, {count} predictions a sample with passes of "
                f"their own: MarginTask(..., positions=1) draws one of each sample in a step, positions={count} takes "
                "all"
            )
        if loss.reduction == "none":
            raise ValueError('reduction must be "mean" or "sum" for predictions at positions, got "none"')
        counted = layout.counted(y, ignored)
        index, stands_for = draw(counted, self.positions)
        rows, slots = layout.drawn(made, y, sample_weight, ignored, index, stands_for)
        batch = Batch(layout, rows, layout.rows(made, y, sample_weight, ignored, in_place=True), index, counted)
        if captured.logits is made:
            return batch, seen_from(captured, slots, rows.logits)
        passed, slots = layout.drawn(captured.logits, y, sample_weight, ignored, index, stands_for)
        return batch, seen_from(captured, slots, passed.logits)

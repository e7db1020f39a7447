"""Logits of any shape as rows of classes, with one target each.

    logits            target                            rows
    [N,C]             [N], or soft [N,C]                N
    [N] or [N,1]      [N] or [N,1]: 0/1, -1/+1, or p    N, of the classes z = (0, f)
    [N,C,*S]          [N,*S], or soft [N,C,*S]          N T, one for each of T = prod(S) positions
    [N,T,C]           [N,T], or soft [N,T,C]            N T

Each position of a sample is one prediction: its margin is measured by passes of its own, to the activations of the
whole sample. So a loss at taps takes P positions of each sample, drawn among those whose target counts; a row stands
for V / P where V of a sample's positions count, so that the mean over draws is the mean over all positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..gradients.request import Captured
from ..losses.targets import two_classes
from ..outputs import is_one_logit, with_zero
from .reading import shape_of_targets


class Rows(NamedTuple):
    """Logits [R,C], target [R] or [R,C], and sample weights [R] or None."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None


class Layout(NamedTuple):
    """Where the classes are in logits of shape [N,*]: in no dimension (one logit), 1, or the last."""

    class_dim: int | None
    shape: torch.Size

    @property
    def dense(self) -> bool:
        """Whether a sample has several predictions."""
        return len(self.shape) > 2

    @property
    def one_logit(self) -> bool:
        """Whether a prediction is one logit."""
        return self.class_dim is None or self.shape[self.class_dim] == 1

    @property
    def positions(self) -> Sequence[int]:
        """The sizes of the dimensions that count a sample's predictions."""
        return [size for d, size in enumerate(self.shape) if d not in (0, self.class_dim)]

    def classes(self, logits: Tensor) -> Tensor:
        """Logits [M,*] with one prediction a sample as [M,C]."""
        if self.class_dim is not None:
            return logits
        return with_zero(logits)

    def rows(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignored: int | None,
        in_place: bool = False,
    ) -> Rows:
        """All predictions as rows; in_place: logits [N,C,*S] as [N,C,S], which is a view, for their N S rows."""
        if self.class_dim is None:
            return Rows(*two_classes(logits, target, ignored), weight)
        if not self.dense:
            return Rows(logits, target, weight)
        if in_place and self.class_dim == 1 and self.shape[1] > 1:
            rows = logits.flatten(2)
        else:
            rows = logits.movedim(self.class_dim, -1).flatten(0, -2)
        target = self._targets(target)
        weight = None if weight is None else self._of_each_row(weight)
        return Rows(*_classes(rows, target, ignored), weight)

    def drawn(
        self,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignored: int | None,
        index: Tensor,
        stands_for: Tensor,
    ) -> tuple[Rows, list[Tensor]]:
        """The predictions at positions index [N,P] as rows n P + p, each with a weight `stands_for` [N,P]; and the
        logits [N,C] of each p."""
        n = len(index)
        classes = self.shape[self.class_dim or 0]
        flat = logits.movedim(self.class_dim or 0, 1).flatten(2)
        slots = [flat.gather(2, column.view(n, 1, 1).expand(n, classes, 1)).squeeze(2) for column in index.unbind(1)]
        if classes == 1:
            slots = [with_zero(f) for f in slots]
        every = self._targets(target)
        _, every = _classes(flat.new_zeros(len(every), classes), every, ignored)
        at = (index + torch.arange(n, device=index.device).unsqueeze(1) * prod(self.positions)).flatten()
        factor = stands_for.flatten()
        if weight is not None:
            factor = factor * self._of_each_row(weight)[at]
        return Rows(torch.stack(slots, 1).flatten(0, 1), every[at], factor), slots

    def counted(self, target: Tensor, ignore_index: int | None) -> Tensor:
        """Which positions have a target that counts, [N,T] bool."""
        shape = self.shape[0], prod(self.positions)
        if target.is_floating_point() or ignore_index is None:
            return torch.ones(shape, dtype=torch.bool, device=target.device)
        return (target != ignore_index).reshape(shape)

    def _counted(self) -> torch.Size:
        return torch.Size([self.shape[0], *self.positions])

    def _of_each_row(self, weight: Tensor) -> Tensor:
        if weight.shape == self._counted():
            return weight.flatten()
        if weight.shape != self.shape[:1]:
            raise ValueError(
                f"sample_weight must have shape {list(self.shape[:1])} or {list(self._counted())}, got "
                f"{list(weight.shape)}"
            )
        return weight.repeat_interleave(prod(self.positions))

    def _targets(self, target: Tensor) -> Tensor:
        """The targets as [R], or soft as [R,C]."""
        if target.is_floating_point() and target.shape == self.shape and self.shape[self.class_dim or 0] > 1:
            return target.movedim(self.class_dim or 0, -1).flatten(0, -2)
        return target.flatten()


def _classes(rows: Tensor, target: Tensor, ignored: int | None) -> tuple[Tensor, Tensor]:
    return two_classes(rows, target, ignored) if rows.shape[1] == 1 else (rows, target)


def layout_of(logits: Tensor, target: Tensor, class_dim: int | None) -> Layout:
    """How logits [N,*] and a target are to be read; class_dim: 1 or -1 where the user or an earlier batch says it.

    Raises ValueError where the shapes do not go together, or leave open which dimension holds the classes.
    """
    shape = logits.shape
    if logits.dim() == 0:
        raise ValueError("logits must have shape [N, C], got a single number")
    if is_one_logit(logits):
        return Layout(None, shape)
    if logits.dim() == 2 or not isinstance(target, Tensor):
        return Layout(1, shape)
    last = logits.dim() - 1
    fitting = []
    for d in (1, last):
        without = [size for i, size in enumerate(shape) if i != d]
        with_one = [1 if i == d else size for i, size in enumerate(shape)]
        soft = target.is_floating_point() and target.shape == shape and shape[1] > 1
        if soft or list(target.shape) == without or (shape[d] == 1 and list(target.shape) == with_one):
            fitting.append(d)
    given = None if class_dim is None else class_dim % logits.dim()
    if given is not None and given in fitting:
        return Layout(given, shape)
    if given is not None or not fitting:
        wanted = "[N,C,*] with [N,*], or [N,*,C] with [N,*]" if given is None else f"of class_dim={class_dim}"
        raise ValueError(f"logits and target must have shapes {wanted}, got {shape_of_targets(logits, target)}")
    if len(fitting) == 2:
        raise ValueError(
            f"class_dim must say which dimension of the logits holds the classes, 1 or -1, for both fit "
            f"{shape_of_targets(logits, target)}: MarginTask(..., class_dim=1)"
        )
    return Layout(fitting[0], shape)


def draw(counted: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """P positions of each sample among those that count, [N,T] bool, without repetition: their numbers index [N,P], and
    how many each stands for, [N,P], 0 for those that do not count, where a sample has fewer than P."""
    n, t = counted.shape
    if not 1 <= positions <= t:
        raise ValueError(f"positions must be in [1, {t}], the positions of a sample, got {positions}")
    if positions == t:
        index = torch.arange(t, device=counted.device).expand(n, t)
    else:
        order = torch.rand(n, t, device=counted.device, dtype=torch.float32) + counted
        index = order.topk(positions, 1).indices
    taken = counted.gather(1, index)
    return index, taken * (counted.sum(1, keepdim=True) / taken.sum(1, keepdim=True).clamp(min=1))


def seen_from(captured: Captured, slots: Sequence[Tensor], rows: Tensor) -> Captured:
    """One forward pass with the logits of P positions in the place of its logits."""
    views = [replace(captured, logits=slot, head=None, _structures={}) for slot in slots]
    return replace(captured, logits=rows, head=None, slots=views, _structures={})

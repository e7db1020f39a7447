"""Margins that are asked for as multiples of the distances that a network has: LargeMarginLoss(gamma="auto").

    gamma_l = factor * m_l       m_l = running median of d[n,l] to the nearest competitor, over the samples with d > 0
    loss    = sum_l w_l term_l / gamma_l / sum_l w_l                            the terms of all layers on one scale

Over the samples that the network gets right, for a share of the labels may be wrong: with 60 % of wrong labels the
median over all samples is negative, and the margin is what holds a network against them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..process_group import Group, rehearsing
from ..tracing import recording

# Weight of a batch's median in the running one, but for the first batches, whose mean it is.
RATE = 0.05
# The margin waits while the network is right about fewer samples than this share.
RIGHT = 0.2
# How often the host asks whether the medians are fixed, so that it need not gather them any more.
ASK_EVERY = 50


class AutoGamma(nn.Module):
    """The running medians [L] of one task's distances, in its state dict.

    They follow the batches for `warmup` steps in which the network is right about a fifth of the samples, and the
    margin has no weight; then they are fixed and the margin has its weight. With several processes they are those of
    the joint batch. In eval mode they stay. Nothing waits for the device, but several processes for each other.

    median [L];  right [L], running share of samples with d > 0;  seen: batches so far;  steps: those that count;
    fixed: 1 or 0, in an average of several tasks their share, of which more than a half must be

    All are floating point, so that AveragedModel(task, use_buffers=True) averages them, and keep their types whatever
    that of the task is. (Single numbers are float32: torch.compile drops what is written into a float64 [] on the CPU.)

    A soft competitor's d > 0 says that the label has more than 1 / (1 + R^soft_shift) of the probability, more than
    half of it with soft_shift = 0, which many wrong labels rule out: then cross-entropy goes on alone. (Counting the
    samples that are classified right instead, the margin begins on the few that are above a half, and networks err
    more: digits with 60 % of wrong labels 13.1 %, cross-entropy 11.0.)
    """

    median: Tensor
    right: Tensor
    seen: Tensor
    steps: Tensor
    fixed: Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        for name in ("median", "right"):
            self.register_buffer(name, torch.zeros(layers, dtype=torch.float64))
        for name in ("seen", "steps", "fixed"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float32))
        self._asked, self._known_fixed, self._told = 0, False, False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_fixed = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AutoGamma:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            exact = before[name]
            if buffer is not None and exact is not None and buffer.dtype != exact.dtype:
                self._buffers[name] = exact.to(buffer.device)
        return self

    def _is_fixed(self) -> Tensor:
        return self.fixed > 0.5

    def is_known_to_be_fixed(self) -> bool:
        """On the CPU what is so, for a loop may write to `fixed`; elsewhere what the host was told last."""
        if recording() or self.fixed.device.type != "cpu":
            return self._known_fixed
        return self.fixed.item() > 0.5

    def step(self, distance: Tensor, usable: Tensor, warmup: int, group: Group) -> tuple[Tensor, Tensor]:
        """The medians [L], 1 where they are not fixed yet, and whether they are, [] bool, with the distances [N,k,L] of
        one more batch, those that are `usable`, of this process of `group`."""
        if not self._told and not recording():
            self._told = True
            warnings.warn(
                f'gamma="auto": the margin has no weight until the network was right about {RIGHT:.0%} of the samples '
                f"in {warmup} steps",
                stacklevel=5,
            )
        if rehearsing():  # before a step is compiled, which cannot ask
            self._known_fixed = bool(self._is_fixed())
        if self.training and not self.is_known_to_be_fixed():
            self._follow(distance, usable, warmup, group)
        return self._now(distance)

    def known(self) -> list[float] | None:
        """The medians where the host knows them to be fixed."""
        found: list[float] | None = self.median.tolist() if self.is_known_to_be_fixed() else None
        return found

    def _now(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        if self.median.device != distance.device:
            raise ValueError(
                f"task must be on {distance.device}, as its batches are, got {self.median.device}: use task.to()"
            )
        fixed = self._is_fixed()
        return torch.where(fixed, self.median, 1.0).to(distance.dtype), fixed

    def _follow(self, distance: Tensor, usable: Tensor, warmup: int, group: Group) -> None:
        if group.size > 1 and recording():
            raise ValueError(
                'gamma="auto" must be fixed before a step is compiled where several processes train: take the '
                "lists of suggest_gamma, or compile after the warm-up"
            )
        found = group.gathered(nearest(distance, usable), 'the gathering of distances for gamma="auto"')
        batch = positive_median(found).to(self.median.dtype)
        present = ~found.isnan()
        right = ((found > 0).sum(0) / present.sum(0).clamp(min=1)).to(batch.dtype)
        # What a batch says of the median, where it is right about a sample, and of the share, where it has one.
        told = torch.stack([batch.isfinite(), present.any(0)]).to(batch.dtype)
        values = torch.stack([batch.nan_to_num(), right]) * told
        fixed = self._is_fixed()
        rate = torch.clamp(1.0 / (self.seen + 1), min=RATE) * ~fixed
        # The first median is taken as it is, however late it comes.
        step = torch.where((self.median == 0) & ~fixed, 1.0, rate) * told[0]
        self.median.add_((values[0] - self.median) * step)
        self.right.add_((values[1] - self.right) * rate * told[1])
        counts = ~fixed & told.any()
        self.seen.add_(counts)
        self.steps.add_(counts & (self.right >= RIGHT).all() & (self.median > 0).all())
        self.fixed.copy_(fixed | (self.steps > warmup))  # and so they stay, whatever `warmup` becomes
        if not recording() and not rehearsing():
            self._asked += 1
            if self._asked % ASK_EVERY == 0:
                self._known_fixed = bool(self._is_fixed())


class Held:
    """The medians of an AutoGamma as they are, for a loss that is only looked at."""

    def __init__(self, medians: AutoGamma) -> None:
        self._medians = medians

    def known(self) -> list[float] | None:
        return self._medians.known()

    def step(self, distance: Tensor, usable: Tensor, warmup: int, group: Group) -> tuple[Tensor, Tensor]:
        return self._medians._now(distance)


def positive_median(distance: Tensor) -> Tensor:
    """Median over the samples with d > 0 of distances [N,L], [L]; NaN where there is none."""
    if len(distance) == 0:
        return distance.new_full(distance.shape[1:], torch.nan)
    return torch.where(distance > 0, distance, torch.nan).nanmedian(0).values


def nearest(distance: Tensor, usable: Tensor) -> Tensor:
    """The distance to the nearest competitor [N,L] of distances [N,k,L], NaN where none is usable."""
    found = torch.where(usable, distance, torch.inf).amin(1)
    return torch.where(found.isfinite(), found, torch.nan)

"""Progress of a run: a rich bar with rate and time left on a terminal, plain lines elsewhere.

    left = (total - done) * (now - t_1) / (done - done_1)

t_1 and done_1 are those of the first amount that was counted: it is warm-up, as first steps are, and tells nothing of
the rest. No time is told before others have been counted for as long as that one took.
"""

from __future__ import annotations

import errno
import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text


class Output(Console):
    """The console of the commands: text is text. Where its reader has ended, the command ends with a sentence, and not
    as rich has it without one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, **options)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "the reader of the output has ended")


class Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


class Left(ProgressColumn):
    """The time that is left, as the meter has it."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def render(self, task: Task) -> Text:
        left = self.meter.left()
        return Text("" if left is None else f"{duration(left)} left", style="progress.remaining")


def duration(amount: float) -> str:
    """12 s, 3 min, 2 h 05 min."""
    if amount < 100:
        return f"{amount:.0f} s" if amount >= 10 else f"{amount:.1f} s"
    if amount < 5400:
        return f"{amount / 60:.0f} min"
    return f"{int(amount // 3600)} h {int(amount % 3600 // 60):02d} min"


class Meter:
    """Counts `total` units of work: `with Meter(total) as meter: meter.advance(); meter.say("...")`.

    On a terminal a bar; otherwise a line at most every `interval` seconds with the share done, the rate and the time
    left. `steps` False: the units are of no interest to the reader (estimated seconds, say) and only shares are shown.
    """

    def __init__(
        self,
        total: float,
        label: str = "",
        console: Console | None = None,
        interval: float = 10.0,
        quiet: bool = False,
        steps: bool = True,
    ) -> None:
        self.console = console or Console()
        self.total, self.done, self.label = total, 0.0, label
        self.quiet, self.steps, self.interval = quiet, steps, interval
        self.start = self.last = time.monotonic()
        self.first: tuple[float, float] | None = None  # when the first amount was counted, and how much it was
        self.bar: Progress | None = None

    def __enter__(self) -> Meter:
        self.start = self.last = time.monotonic()
        if self.console.is_terminal and not self.quiet:
            columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn()]
            columns += [MofNCompleteColumn(), Rate()] if self.steps else [TaskProgressColumn()]
            columns += [TimeElapsedColumn(), Left(self)]
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, amount: float = 1, label: str | None = None) -> None:
        """Counts `amount` units as done."""
        self.done += amount
        if self.first is None and amount > 0:
            self.first = time.monotonic(), self.done
        self.label = self.label if label is None else label
        if self.bar is not None:
            self.bar.update(self.task, advance=amount, description=self.label)
        elif not self.quiet and time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            self.say(self.line())

    def rate(self) -> float | None:
        """Units per second since the first amount; None where that was not long enough."""
        if self.first is None:
            return None
        begun, before = self.first
        elapsed = time.monotonic() - begun
        return (self.done - before) / elapsed if self.done > before and 0 < elapsed >= begun - self.start else None

    def left(self) -> float | None:
        """Seconds to the end at that rate."""
        rate = self.rate()
        return None if rate is None else max(0.0, self.total - self.done) / rate

    def line(self) -> str:
        """Share done, rate and time left in words."""
        rate, left = self.rate(), self.left()
        share = f"{self.done / max(self.total, 1e-9):.0%}"
        if self.steps:
            share = f"{self.done:.0f}/{self.total:.0f} ({share}){'' if rate is None else f', {rate:.1f}/s'}"
        words = "time left not known yet" if left is None else f"{duration(left)} left"
        return f"{self.label}: {share}, {time.monotonic() - self.start:.0f} s, {words}"

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
            sys.stdout.flush()

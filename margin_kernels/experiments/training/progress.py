"""Progress of a run: a rich bar with rate and time left on a terminal, plain lines elsewhere."""

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
    TimeRemainingColumn,
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
        self.bar: Progress | None = None

    def __enter__(self) -> Meter:
        self.start = self.last = time.monotonic()
        if self.console.is_terminal and not self.quiet:
            columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn()]
            columns += [MofNCompleteColumn(), Rate()] if self.steps else [TaskProgressColumn()]
            columns += [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()]
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
        self.label = self.label if label is None else label
        if self.bar is not None:
            self.bar.update(self.task, advance=amount, description=self.label)
        elif not self.quiet and time.monotonic() - self.last >= self.interval:
            self.last = time.monotonic()
            self.say(self.line())

    def line(self) -> str:
        """Share done, rate and time left in words."""
        elapsed = max(time.monotonic() - self.start, 1e-9)
        rate = self.done / elapsed
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate > 0 else "time left unknown"
        share = f"{self.done / max(self.total, 1e-9):.0%}"
        if self.steps:
            share = f"{self.done:.0f}/{self.total:.0f} ({share}), {rate:.1f}/s"
        return f"{self.label}: {share}, {elapsed:.0f} s, {left}"

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)
            sys.stdout.flush()

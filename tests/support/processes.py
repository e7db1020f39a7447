"""Several processes of one gloo group, started once and used by many tests."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed, multiprocessing

# Cells that repeat what others show in another combination: `make nightly` runs them all.
NIGHTLY = pytest.mark.skipif(os.environ.get("MARGIN_KERNELS_NIGHTLY") != "1", reason="make nightly runs it")
# Seconds that a collective and the whole call of `run` may take.
COLLECTIVE, CALL = 60, 240


def _serve(rank: int, size: int, file: str, pipe: Any, seconds: float) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
    )
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            task = None
        if task is None:
            # Gloo's threads outlive their group and drop Python objects when they wake: they must not meet an
            # interpreter that is closing (PyTorch then aborts).
            os._exit(0)
        function, args = task
        try:
            torch.manual_seed(0)
            pipe.send((function(rank, size, *args), None))
        except BaseException as error:  # the test reads it
            pipe.send((None, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Processes:
    """`size` processes with a default gloo group, each with one thread; seconds: the time-out of a collective."""

    def __init__(self, size: int, seconds: float = COLLECTIVE) -> None:
        self.size, self._seconds = size, seconds
        self._pipes: list[Any] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        store = tempfile.mktemp(prefix="gloo")
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, store, there, self._seconds), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def outcomes(self, function: Callable[..., Any], *args: Any) -> list[tuple[Any, str | None]]:
        """What function(rank, size, *args) returned in every process, or the words of its error.

        A function that fails on some processes only may leave collectives behind: the processes are then replaced.
        """
        if not self._processes or not all(process.is_alive() for process in self._processes):
            self.stop()
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        found: list[tuple[Any, str | None]] = []
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            try:
                found.append(pipe.recv() if pipe.poll(CALL) else (None, f"TimeoutError: no answer in {CALL} s"))
            except EOFError:
                found.append((None, f"the process ended with {process.exitcode}"))
        if any(error is not None for _, error in found):
            self.stop()
        return found

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What function(rank, size, *args) returned in every process. Raises AssertionError where one failed."""
        found = self.outcomes(function, *args)
        failed = [f"process {rank}: {error}" for rank, (_, error) in enumerate(found) if error is not None]
        assert not failed, "\n".join(failed)
        return [value for value, _ in found]

    def stop(self, seconds: float = 0) -> None:
        """Ends the processes, which have so long to do so by themselves: what they ran is then counted (coverage)."""
        for pipe in self._pipes if seconds else ():
            with suppress(OSError):
                pipe.send(None)
        until = time.monotonic() + seconds
        for process in self._processes:
            process.join(max(0, until - time.monotonic()))
            process.kill()
        for process in self._processes:
            process.join()
        self._pipes, self._processes = [], []

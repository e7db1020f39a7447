"""What goes wrong in a command, in one sentence with the remedy: the only place that turns exceptions into text.

| exception | sentence | status |
| --- | --- | --- |
| an expected one (`training.EXPECTED`) | its own message | 1 |
| OSError, MemoryError, torch's "out of memory" | file and cause, and what to do | 1 |
| KeyboardInterrupt, SIGTERM, SIGHUP | how to go on | 130, 143, 129 |
| any other | it is a fault of this program; the traceback follows, for the report | 70 |

Of several processes the one that fails first says so, and its status is that of all.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from types import FrameType

import torch

from .processes import ALONE, ElsewhereError, Processes, ProcessesError
from .trainer import EXPECTED

INTERRUPTED = 128  # and the number of the signal
FAULT = 70  # EX_SOFTWARE
REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again; what was complete before is unharmed",
    errno.EDQUOT: "free some space and run the same command again; what was complete before is unharmed",
    errno.EACCES: "choose another folder or change its permissions",
    errno.EPERM: "choose another folder or change its permissions",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file; choose another folder",
    errno.EISDIR: "a file is expected; choose another name",
    errno.EEXIST: "a file of that name is in the way; choose another folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f) and run the same command again",
    errno.EPIPE: "write it into a file, and look at that",
    errno.EMFILE: "raise the limit of open files (ulimit -n) or lower --jobs",
    errno.ENOMEM: "lower --jobs, --training.batch_size or --evaluation.batch_size",
}


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to end, as Ctrl-C does; `number`: its number."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop_on_signals() -> None:
    """SIGTERM and SIGHUP end this process as SIGINT does: what is complete is saved, cells are ended."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, stop)


def write_any_text() -> None:
    """Where the encoding of the output lacks a character, its code is written: nothing ends because of a name. What
    is written to an output that the caller has closed goes nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for as long as the process lives)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def end_output() -> None:
    """What the standard output did not take goes nowhere: Python would try it again at its end, with a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def sentence(error: BaseException) -> str | None:
    """One sentence, in one line, for what may go wrong on any machine; None for what is a fault of this program."""
    text = _words(error)
    return None if text is None else " ".join(text.split())


def _words(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        remedy = REMEDIES.get(error.errno or 0)
        return f"{where}{error.strerror or error}" + ("" if remedy is None else f"; {remedy}")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("not enough memory", "can't allocate memory")
    ):
        return f"out of memory; {REMEDIES[errno.ENOMEM]}"
    if isinstance(error, EXPECTED):
        return str(error)
    return None


def status(stopped: KeyboardInterrupt) -> int:
    """The exit status of a process that a signal ended."""
    return INTERRUPTED + (stopped.number if isinstance(stopped, Stopped) else signal.SIGINT)


def keep_status() -> None:
    """The status of this process is settled: torchrun ends the others when one has failed."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def report(what: str, error: BaseException, processes: Processes = ALONE) -> int:
    """Prints what went wrong in `what` to the error stream; returns the exit status."""
    if isinstance(error, ElsewhereError):
        return error.status
    interrupted = isinstance(error, KeyboardInterrupt)
    text = None if interrupted else sentence(error)
    own = status(error) if isinstance(error, KeyboardInterrupt) else FAULT if text is None else 1
    said = processes.claim(own)
    if said is not None:
        return said
    if interrupted:
        resumed = "; `--resume` continues from the last epoch" if what.endswith(" train") else ""
        where = f" in {processes.doing}" if processes.several else ""
        print(f"{what}: interrupted{where}{resumed}", file=sys.stderr)
        return own
    if isinstance(error, ProcessesError) and (silent := processes.silent()):
        text = f"{text} ({silent})"
    if text is None:
        traceback.print_exception(error)
        print(
            f"{what}: this is a fault of the program and not of your input; please report the lines above, with "
            "`python -m margin_kernels.info`",
            file=sys.stderr,
        )
        return own
    print(f"{what}: {text}", file=sys.stderr)
    return own

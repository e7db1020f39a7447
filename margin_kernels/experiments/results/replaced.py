"""A run that takes the place of another one: what was there lies in FOLDER/replaced until the first checkpoint of the
new run, which ends it, and is put back where the new run ends before that.

A kill at any moment leaves one of three states, and `settle` goes on from each:

    replaced/ holds files, no checkpoint.pt beside it     the new run has none yet, or files are being moved: put back
    replaced/ holds files, checkpoint.pt beside it        that of the new run, as the old one was moved first: done
    replaced/ is empty                                    nothing was moved yet, or all is back: done
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import TEMPORARY

REPLACED = "replaced"
CHECKPOINT = "checkpoint.pt"  # moved first and put back last
# What a run leaves in its folder.
RUN_FILES = (CHECKPOINT, "model.safetensors", "model.json", "evaluation.json", "run.json", "metrics.csv", "config.yaml")


def set_aside(folder: Path) -> None:
    """Moves the files of a run into FOLDER/replaced."""
    names = [name for name in RUN_FILES if (folder / name).exists()]
    if names:
        (folder / REPLACED).mkdir()
    for name in names:
        os.rename(folder / name, folder / REPLACED / name)


def settle(folder: Path) -> None:
    """Puts what was set aside back, or removes it where the new run has a checkpoint."""
    aside = folder / REPLACED
    if not aside.is_dir():
        return
    if not (folder / CHECKPOINT).exists():
        for name in reversed(RUN_FILES):
            if (aside / name).exists():
                os.replace(aside / name, folder / name)
    discard(folder)


def discard(folder: Path) -> None:
    """Removes what was set aside: at once for whoever looks for it."""
    if (folder / REPLACED).is_dir():
        gone = folder / f"{TEMPORARY}{os.getpid()}.{secrets.token_hex(4)}"
        os.rename(folder / REPLACED, gone)
        shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def replacing(folder: Path) -> Iterator[None]:
    """Sets the run of a folder aside for one that trains within; calls `settle` where that ends early. The caller holds
    the lock of the folder, and calls `settle` after each epoch."""
    set_aside(folder)
    try:
        yield
        discard(folder)
    finally:
        settle(folder)

"""Labels of runs and sweeps that are told apart by their folders where their names are the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def once(folders: Sequence[Path]) -> None:
    """Raises ValueError where the same folder is given twice."""
    resolved = [os.path.realpath(folder) for folder in folders]  # of links in a circle too
    for own, folder in zip(resolved, folders, strict=True):
        if resolved.count(own) > 1:
            raise ValueError(f"folders must be given once each, got {folder} {resolved.count(own)} times")


def distinct(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """The names; those that several have are replaced by the shortest ends of their folders in which these differ.
    Raises ValueError where the same folder is given twice."""
    once(folders)
    parts = [Path(os.path.realpath(folder)).parts[1:] for folder in folders]
    found = list(names)
    for name in {name for name in names if list(names).count(name) > 1}:
        alike = [i for i, other in enumerate(names) if other == name]
        for i in alike:
            found[i] = _shortest(parts[i], [parts[j] for j in alike if j != i])
    # an end of a folder may be the name of another one
    return found if len(set(found)) == len(found) else ["/".join(own) for own in _apart(parts)]


def _shortest(own: tuple[str, ...], others: list[tuple[str, ...]]) -> str:
    """As few of the last parts as no other folder ends with."""
    for count in range(1, len(own)):
        if all(other[-count:] != own[-count:] for other in others):
            return "/".join(own[-count:])
    return "/".join(own)


def _apart(parts: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The folders below the deepest one that holds all of them."""
    shared = 0
    while all(len(own) > shared + 1 for own in parts) and len({own[shared] for own in parts}) == 1:
        shared += 1
    return [own[shared:] for own in parts]

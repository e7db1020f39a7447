"""Records in one file, a line each: {"shared": VALUES} first, then for each record what differs from these values.

    {"shared":{"config":{...},"machine":{...},"versions":{...}}}          written once, with the first record
    {"cell":"hinge__seed0","config":{"loss":{"kind":"hinge"}},...}        nested as the shared values are
    {"cell":"hinge__seed1",...,"absent":[["machine","gpu"]]}              paths of shared values that the record has not

Every line ends with its checksum (checksum.py); one that was changed by hand or by accident is refused.

A new record is a new line at the end, one that was made anew takes the place of the old one. Several processes may
write: each holds the lock of the file beside it (records.lock) meanwhile. A line that a killed process left unfinished
is not read, and the next record overwrites it. Numbers are written with as many digits as it takes to read the same
number back.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import shape
from .checksum import sealed_line, unsealed_line
from .files import open_lock, read_text, write_text
from .record import Record

Values = dict[str, Any]
RECORDS, CANDIDATES = "records.jsonl", "candidates.jsonl"  # in the folder of a sweep
# what the cells of a sweep mostly have in common, besides the config
SHARED = ("network", "parameters", "versions", "machine")
SHARED_MEASUREMENTS = ("samples", "eps", "curve_eps", "noise_sigmas", "distance_p", "distance", "distances")


def differences(values: Values, shared: Values) -> Values:
    """`values` without what `shared` has too, at every depth; `absent`: the paths of what only `shared` has."""
    found, absent = _differences(values, shared)
    return {**found, "absent": absent} if absent else found


def _differences(values: Values, shared: Values) -> tuple[Values, list[list[str]]]:
    found: Values = {}
    absent = [[key] for key in shared if key not in values]
    for key, value in values.items():
        if key not in shared:
            found[key] = value
        elif isinstance(value, dict) and isinstance(shared[key], dict):
            below, missing = _differences(value, shared[key])
            if below:
                found[key] = below
            absent += [[key, *path] for path in missing]
        elif dumps(value) != dumps(shared[key]):  # 1, 1.0 and True are three values
            found[key] = value
    return found, absent


def merged(line: Values, shared: Values) -> Values:
    """The inverse of `differences`."""
    values = _merged({key: value for key, value in line.items() if key != "absent"}, shared)
    for path in line.get("absent", []):
        below = values
        for key in path[:-1]:
            below = below[key]
        below.pop(path[-1], None)
    return values


def _merged(line: Values, shared: Values) -> Values:
    values = {key: _merged({}, value) if isinstance(value, dict) else value for key, value in shared.items()}
    for key, value in line.items():
        nested = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = _merged(value, values[key]) if nested else value
    return values


def common(*settings: Values) -> Values:
    """The entries that all of `settings` have, with the same value, at every depth."""
    first, *others = settings
    found: Values = {}
    for key, value in first.items():
        if not all(key in other for other in others):
            continue
        if isinstance(value, dict) and all(isinstance(other[key], dict) for other in others):
            found[key] = common(value, *(other[key] for other in others))
        elif all(dumps(other[key]) == dumps(value) for other in others):
            found[key] = value
    return found


def restricted(values: Values, keys: Values) -> Values:
    """The entries of `values` whose keys are also in `keys`, at every depth."""
    return {
        key: restricted(value, keys[key]) if isinstance(value, dict) and isinstance(keys[key], dict) else value
        for key, value in values.items()
        if key in keys
    }


def shared_values(record: Values, config: Values) -> Values:
    """What the first line holds where `record` is the first one: its values of what is mostly the same, and its options
    among those of `config`."""
    measured = record.get("evaluation", {})
    return {
        "config": restricted(record["config"], config),
        **{key: record[key] for key in SHARED if key in record},
        "evaluation": {key: measured[key] for key in SHARED_MEASUREMENTS if key in measured},
    }


def dumps(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class Records:
    """The records of the cells in one file; read again whenever it has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._records: dict[str, Record] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._read()

    def __getitem__(self, name: str) -> Record:
        return self._read()[name]

    def all(self) -> list[Record]:
        """In the order of their lines."""
        return list(self._read().values())

    def put(self, record: Record, config: Values | None = None) -> None:
        """Writes one record. `config`: the options that the cells have in common, for the first line of a new file;
        those of `record` without it."""
        values = record.to_dict()
        with self._lock():
            lines = _whole_lines(read_text(self.path)) if self.path.is_file() else []
            if lines:
                shared = self._shared(lines[0])
            else:
                shared = shared_values(values, values["config"] if config is None else config)
            line = sealed_line(dumps({"cell": record.cell, **differences(values, shared)}))
            place = next((i for i, other in enumerate(lines[1:], 1) if _cell(other) == record.cell), None)
            if place is None:
                self._append(lines, [line] if lines else [sealed_line(dumps({"shared": shared})), line])
            else:
                lines[place] = line
                write_text(self.path, "".join(f"{line}\n" for line in lines))

    def _append(self, lines: list[str], new: list[str]) -> None:
        """Writes `new` behind `lines`, which are there; what a killed process left behind these goes."""
        before = "\n".join(lines).encode()
        with self.path.open("r+b" if self.path.is_file() else "wb") as file:
            file.truncate(len(before))
            file.seek(len(before))
            file.write(("\n" * bool(lines) + "\n".join(new) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> dict[str, Record]:
        if not self.path.is_file():
            return {}
        about = self.path.stat()
        seen = (about.st_ino, about.st_mtime_ns, about.st_size)
        if seen != self._seen:
            whole = _whole_lines(read_text(self.path))
            shared = self._shared(whole[0]) if whole else {}
            found: dict[str, Record] = {}
            for number, line in enumerate(whole[1:], 2):
                record = self._record(number, self._parsed(number, line), shared)
                if record.cell in found:
                    raise ValueError(
                        f"{self.path}, line {number}: a second record of {record.cell}; delete one of them"
                    )
                found[record.cell] = record
            self._records, self._seen = found, seen
        return self._records

    def _parsed(self, number: int, line: str) -> Values:
        try:
            values = json.loads(unsealed_line(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.path}, line {number}: not a record as it was written: {error}. Delete the line, or, where it "
                "was changed on purpose, run `margin-kernels check --renew`"
            ) from None
        if not isinstance(values, dict):
            raise ValueError(f"{self.path}, line {number} must be a JSON object, got {type(values).__name__}")
        return values

    def _record(self, number: int, line: Values, shared: Values) -> Record:
        try:
            values = merged(line, shared)
            shape.check(values, shape.RECORD, "record")
            if values.get("evaluation") is not None:
                shape.check_evaluation(values["evaluation"], shape.optional(shape.EVALUATION))
            if values.get("timing") is not None:
                shape.check(values["timing"], shape.TIMING, "timing")
            return Record.from_dict(values)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"{self.path}, line {number}: not a record of this version: {error}") from None

    def renew(self) -> int:
        """Gives every line the checksum of what stands in it now; returns the number of lines that had another."""
        with self._lock():
            lines = _whole_lines(read_text(self.path))
            new = []
            for number, line in enumerate(lines, 1):
                try:
                    values = json.loads(line)
                    own = {key: value for key, value in dict(values).items() if key != "crc32"}
                    new.append(sealed_line(dumps(own)))
                except (ValueError, TypeError, RecursionError):
                    raise ValueError(f"{self.path}, line {number} must be a JSON object of numbers and text") from None
            changed = sum(one != other for one, other in zip(lines, new, strict=True))
            if changed:
                write_text(self.path, "".join(f"{line}\n" for line in new))
            return changed

    def _shared(self, line: str) -> Values:
        values = self._parsed(1, line)
        if set(values) != {"shared"}:
            raise ValueError(f"{self.path}, line 1 must hold the shared values, got {', '.join(values)}")
        if not isinstance(values["shared"], dict):
            raise ValueError(f"{self.path}, line 1: the shared values must be a mapping")
        return values["shared"]

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open_lock(self.path.with_suffix(".lock")) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _whole_lines(content: str) -> list[str]:
    """The lines, without a last one that has no end: neither a newline nor the closing bracket of its values."""
    *lines, last = content.split("\n")
    try:
        json.loads(last)
    except json.JSONDecodeError:
        return lines
    return [*lines, last]


def _cell(line: str) -> str:
    return json.loads(line)["cell"]

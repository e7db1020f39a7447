"""`margin-kernels check DIR ...`: whether the files of runs and sweeps are as they were written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import check_whole
from ..models import check_saved
from ..results import CANDIDATES, RECORDS, Record, Records, Run, read_json, shape
from ..training import Output, load_state
from .parser import Parser


def _records(path: Path) -> list[Record]:
    return Records(path).all()


# name of a file -> what reads all of it, and raises ValueError
CHECKS: dict[str, Callable[[Path], Any]] = {
    "checkpoint.pt": lambda path: load_state(path.parent),
    "model.safetensors": lambda path: check_saved(path.parent),
    "model.json": lambda path: check_saved(path.parent),
    RECORDS: _records,
    CANDIDATES: _records,
    "run.json": Run.read,
    "evaluation.json": lambda path: shape.check(read_json(path), dict, str(path)),
    "summary.json": lambda path: shape.check(read_json(path), dict, str(path)),
    "config.yaml": check_whole,
}


def check(arguments: list[str]) -> int:
    """Reads every file of the folders and those below them; 1 where one is damaged or there is none."""
    parser = Parser(
        prog="margin-kernels check",
        description="Reads checkpoints, weights and records of runs and sweeps, and compares their checksums.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders written by train or sweep; those below as well")
    parser.add_argument(
        "--renew", action="store_true", help="first give the lines of records, which you changed, new checksums"
    )
    options = parser.parse_args(arguments)
    console = Output(soft_wrap=True)
    damaged = 0
    for folder in options.folders:
        files = sorted(path for path in folder.rglob("*") if path.name in CHECKS)
        # of a network once, by its weights where they are there
        files = [
            path for path in files if path.name != "model.json" or not path.with_name("model.safetensors").exists()
        ]
        if not files:
            raise ValueError(f"{folder} must hold files of a run or a sweep, got none of {', '.join(CHECKS)}")
        for path in files:
            if not path.is_file():
                damaged += 1
                console.print(f"damaged  {path} must be a file, got a folder, a pipe, a device or a link to nothing")
                continue
            if options.renew and CHECKS[path.name] is _records:
                console.print(f"{Records(path).renew()} lines of {path} have a new checksum")
            try:
                CHECKS[path.name](path)
            except ValueError as error:
                damaged += 1
                console.print(f"damaged  {error}")
            else:
                console.print(f"ok       {path}")
    return 1 if damaged else 0

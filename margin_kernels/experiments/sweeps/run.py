"""Runs the cells of a sweep, J processes at a time, and keeps what they find.

    OUT/records.jsonl       a line for each finished cell: config, history, evaluation, seconds, versions, machine
    OUT/candidates.jsonl    what a model with `choose` chooses among: as above, without an evaluation
    OUT/cells/CELL/         an unfinished cell: checkpoint, log.txt; weights where they are kept
    OUT/summary.csv, .json  mean and standard deviation over the seeds

A sweep that was killed goes on with the same command: finished cells stand, the others continue from their
checkpoints. A cell that fails is reported and the others go on. Where the sweep now asks for another evaluation
(`evaluation.*` alone differs from the record), a finished cell whose weights were kept is evaluated again.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from ..config import own_options
from ..results import CANDIDATES, RECORDS, Record, Records, Tried, changed_settings, common, finite, locked, summary
from ..training import RESUMABLE, Meter
from .cell import Cell, Option
from .job import Choice, Job

PACKAGE = Path(__file__).resolve().parents[3]  # the folder that holds margin_kernels
# Started with -P: nothing in the working folder is imported, neither a random.py nor another copy of this package.
# Where the package is found in its own folder alone, that comes last.
WORKER = (
    "import sys; sys.path.append(sys.argv.pop(1)); from margin_kernels.experiments.sweeps.worker import start; start()"
)
TRAINED = 0.9  # share of a cell that counts as done when its epochs are


@dataclass(frozen=True)
class Options:
    """How to run: where the data files are, processes at a time, CPU threads of each, training device (None: as the
    file says; "cuda": every visible GPU in turn), whether all weights are kept."""

    data_dir: str | None = None
    jobs: int = 1
    threads: int = 1
    device: str | None = None
    keep_weights: bool = False


class Runner:
    """The cells of one sweep in one folder."""

    def __init__(self, cells: list[Cell], out: Path, options: Options, console: Console) -> None:
        self.cells = {cell.name: cell for cell in cells}
        self.out, self.options, self.console = out, options, console
        # weights that another cell starts from, takes or is attacked by
        self.needed = {name for cell in cells for name in cell.needs}
        self.records, self.candidates = Records(out / RECORDS), Records(out / CANDIDATES)
        self.common = finite(common(*(own_options(cell.config) for cell in cells)))
        self.choosing: dict[str, list[Cell]] = {}  # by candidate
        for cell in cells:
            for name in (name for option in cell.choice for name in option.cells):
                self.choosing.setdefault(name, []).append(cell)
        self.failed: dict[str, str] = {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.devices: dict[str, str] = {}  # of the running cells

    def folder(self, name: str) -> Path:
        return self.out / "cells" / name

    def records_of(self, cell: Cell) -> Records:
        return self.candidates if cell.candidate else self.records

    def recorded(self, name: str) -> bool:
        return name in self.records_of(self.cells[name])

    def finished(self, cell: Cell) -> bool:
        """Whether the cell's record exists and holds what the cell asks for. Raises ValueError where it is that of
        another training, or of another evaluation and the weights are gone. A candidate is done with once the choice
        has been made."""
        records = self.records_of(cell)
        if cell.name not in records:
            choosing = self.choosing.get(cell.name, [])
            return bool(choosing) and all(map(self.finished, choosing))
        record = records[cell.name]
        if cell.choice:
            made = [(tried.values, tried.seeds) for tried in record.choice]
            if made != [(option.values, self._seeds(option)) for option in cell.choice]:
                raise ValueError(
                    f"{records.path}: {cell.name} was chosen among other values or by other seeds: choose another "
                    "--out, or delete its line"
                )
            cell = self._taking(cell, record.choice)
        changed = [
            key for key in changed_settings(record, cell.config, cell.after, cell.attacker) if key not in RESUMABLE
        ]
        if cell.candidate:  # never evaluated
            changed = [key for key in changed if not key.startswith("evaluation.")]
        if not changed:
            return True
        if all(key.startswith("evaluation.") for key in changed) and self.kept(cell.name):
            return False
        raise ValueError(
            f"{records.path}: {cell.name} was made with other settings ({', '.join(changed)}): choose another --out, "
            "or delete its line"
        )

    def _taking(self, cell: Cell, options: list[Tried]) -> Cell:
        """A cell with a choice as the run that it takes: that of its seed with the one of `options` that is chosen."""
        candidate = next(
            self._candidate(cell, own) for own, option in zip(cell.choice, options, strict=True) if option.chosen
        )
        settings = replace(candidate.config, name=cell.name, evaluation=cell.config.evaluation)
        return replace(candidate, name=cell.name, config=settings, candidate=False, attacker=cell.attacker)

    def _candidate(self, cell: Cell, option: Option) -> Cell:
        """The cell of an option that has the seed of `cell`."""
        return next(self.cells[name] for name in option.cells if self.cells[name].seed == cell.seed)

    def _seeds(self, option: Option) -> list[int]:
        return [self.cells[name].seed for name in option.cells]

    def _validated(self, cell: Cell) -> list[Tried]:
        """What `cell` chooses among, with the mean validation accuracy over the seeds; the first best one is chosen."""
        means = []
        for option in cell.choice:
            found = [self.candidates[name].history for name in option.cells]
            means.append(statistics.fmean(history[-1]["validation_accuracy"] for history in found))
        best = means.index(max(means))
        return [
            Tried(option.values, mean, i == best, self._seeds(option))
            for i, (option, mean) in enumerate(zip(cell.choice, means, strict=True))
        ]

    def kept(self, name: str) -> bool:
        """Whether a cell's weights are there."""
        return (self.folder(name) / "model.safetensors").is_file()

    def trained(self, cell: Cell) -> bool:
        """Of a cell that is not finished: whether it only has to be evaluated again."""
        return self.recorded(cell.name)

    def state(self, cell: Cell) -> str:
        """What is left to do, in two words."""
        if self.finished(cell):
            return "finished"
        if self.trained(cell):
            return "evaluate"
        return "choose" if cell.choice else "begun" if self.begun(cell) else "to do"

    def begun(self, cell: Cell) -> bool:
        return (self.folder(cell.name) / "checkpoint.pt").is_file()

    def run(self, seconds: Mapping[str, float | None] | None = None) -> dict[str, str]:
        """Runs what is not finished; returns the error of each cell that failed. `seconds`: what each will take by
        estimate, for the time that is left; without all of them cells count alike."""
        with locked(self.out, "another sweep"):
            waiting = [cell for cell in self.cells.values() if not self.finished(cell)]
            cost = costs_of(waiting, seconds or {})
            total, todo = len(self.cells), set(cost)
            with Meter(sum(cost.values()), "", self.console, interval=30, steps=False) as meter:
                try:
                    while waiting or self.running:
                        waiting = self._start(waiting, meter)
                        self._collect(meter)
                        open_cells = {cell.name for cell in waiting} | set(self.running)
                        progress = sum(cost[name] for name in todo - open_cells)
                        progress += sum(cost[name] * self._share(name) for name in self.running)
                        meter.advance(max(0.0, progress - meter.done), f"{total - len(open_cells)}/{total} cells")
                        if self.running:
                            time.sleep(0.2)
                finally:
                    self._stop()
        return self.failed

    def _start(self, waiting: list[Cell], meter: Meter) -> list[Cell]:
        """Starts what can start; returns what has to wait."""
        left = []
        unfinished = {cell.name for cell in waiting} | set(self.running)
        for cell in waiting:
            problem = self._problem(cell)
            if problem is not None:
                self._fail(cell.name, problem, meter)
            elif len(self.running) >= self.options.jobs or not unfinished.isdisjoint(self._needs(cell)):
                left.append(cell)
            else:
                self.running[cell.name] = self._launch(cell)
        return left

    def _needs(self, cell: Cell) -> list[str]:
        """The cells that have to be finished before this one starts."""
        if self.trained(cell):
            return [] if cell.attacker is None else [cell.attacker]
        return cell.needs

    def _problem(self, cell: Cell) -> str | None:
        """Why the cell can never start."""
        among = {name for option in cell.choice for name in option.cells}
        for name in self._needs(cell):
            if name in self.failed:
                if name in among:
                    return f"{name}, one of those it chooses among, failed"
                return f"{name}, whose weights it {'starts from' if name == cell.after else 'is attacked by'}, failed"
            used = name not in among or self.cells[name].seed == cell.seed
            if used and self.recorded(name) and not self.kept(name):
                path = self.records_of(self.cells[name]).path
                return f"the weights of {name} were not kept: delete its line in {path} to train it once more"
        return None

    def _launch(self, cell: Cell) -> subprocess.Popen[bytes]:
        folder = self.folder(cell.name)
        self._job(cell).write(folder)
        if self.trained(cell):
            self.needed.add(cell.name)  # weights that were kept stay
        return start_worker(folder, self.options.threads)

    def _job(self, cell: Cell) -> Job:
        """What the worker of a cell is given: names of cells have become folders."""
        run, choice = cell, None
        if cell.choice and self.trained(cell):
            run = self._taking(cell, self.records[cell.name].choice)
        elif cell.choice:
            tried = self._validated(cell)
            run, choice = self._taking(cell, tried), self._choice(cell, tried)
        settings = run.config
        device = self.devices[cell.name] = self._free(self.options.device or settings.training.device)
        initial = settings.model.initial if run.after is None else str(self.folder(run.after))
        attacker = settings.evaluation.attacker if cell.attacker is None else str(self.folder(cell.attacker))
        settings = replace(
            settings,
            data=replace(settings.data, dir=self.options.data_dir),
            model=replace(settings.model, initial=initial),
            training=replace(settings.training, device=device, threads=self.options.threads),
            evaluation=replace(settings.evaluation, attacker=attacker),
        )
        return Job(
            cell=cell.name,
            model=cell.model,
            point=cell.point,
            seed=cell.seed,
            values=cell.values,
            after=run.after,
            attacker=cell.attacker,
            config=settings,
            records=str(self.records.path),
            candidates=str(self.candidates.path),
            common=self.common,
            candidate=cell.candidate,
            trained=self.trained(cell),
            choice=choice,
        )

    def _choice(self, cell: Cell, tried: list[Tried]) -> Choice:
        """The candidate of the cell's seed that was chosen, and the others."""
        names = [self._candidate(cell, option).name for option in cell.choice]
        (taken,) = (name for name, option in zip(names, tried, strict=True) if option.chosen)
        return Choice(taken, str(self.folder(taken)), [name for name in names if name != taken], tried)

    def _free(self, device: str) -> str:
        """For "cuda" the GPU on which the fewest cells are running, anything else as it is."""
        if device != "cuda":
            return device
        busy = [self.devices[name] for name in self.running]
        return min((f"cuda:{i}" for i in range(max(1, torch.cuda.device_count()))), key=busy.count)

    def _collect(self, meter: Meter) -> None:
        """Takes note of the processes that have ended."""
        for name, process in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[name]
            if process.returncode == 0 and self.recorded(name):
                record: Record = self.records_of(self.cells[name])[name]
                meter.say(f"{name}: {summary.line(record)}")
                self._clean(name)
                cell = self.cells[name]
                if not self.options.keep_weights:
                    for option in cell.choice:  # what it chose among
                        shutil.rmtree(self.folder(self._candidate(cell, option).name), ignore_errors=True)
            else:
                self._fail(name, _last_line(self.folder(name) / "log.txt", process.returncode), meter)

    def _fail(self, name: str, error: str, meter: Meter) -> None:
        self.failed[name] = error
        meter.say(f"{name} FAILED: {error}")

    def _clean(self, name: str) -> None:
        """Leaves of a finished cell's folder what is to be kept."""
        folder = self.folder(name)
        if self.options.keep_weights or name in self.needed:
            (folder / "checkpoint.pt").unlink(missing_ok=True)
        else:
            shutil.rmtree(folder)

    def _share(self, name: str) -> float:
        """How far a running cell is with its training, from the epochs that it has recorded."""
        metrics = self.folder(name) / "metrics.csv"
        epochs = self.cells[name].config.training.epochs
        if not metrics.is_file() or epochs == 0:
            return 0.0
        return TRAINED * min(1.0, (len(metrics.read_text().splitlines()) - 1) / epochs)

    def _stop(self) -> None:
        """Ends what still runs; each cell's last checkpoint stays."""
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait()


def costs_of(cells: Iterable[Cell], seconds: Mapping[str, float | None]) -> dict[str, float]:
    """Seconds of each cell by estimate, or 1 of each where one of them has no estimate."""
    known = {cell.name: seconds.get(cell.name) for cell in cells}
    if any(value is None for value in known.values()) or not sum(value or 0.0 for value in known.values()):
        return dict.fromkeys(known, 1.0)
    return {name: value or 0.0 for name, value in known.items()}


def start_worker(folder: Path, threads: int) -> subprocess.Popen[bytes]:
    """The process of the cell whose job lies in `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-P", "-c", WORKER, str(PACKAGE), str(folder)]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)


def _last_line(log: Path, status: int) -> str:
    """What a failed process said last."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else f'exit status {status}'} (log: {log})"

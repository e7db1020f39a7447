"""One cell of a sweep in a process of its own, which `run.py` starts: worker.main(), with FOLDER as the argument.

FOLDER/job.json says what to train and where the record goes. Training continues from FOLDER/checkpoint.pt where a
killed process has left one. The record is written at the end, at once: a record that exists is complete. A cell that is
trained and only measured anew keeps its weights and all of its record but the evaluation. A candidate is trained and
not evaluated; the cell that chooses among candidates takes the weights and the record of one, and evaluates it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from margin_kernels.memory import keep_freed_memory

from .. import data, models
from ..config import Config, LossConfig
from ..evaluation import evaluate
from ..results import Record, Records, locked
from ..training import Trainer, errors, resolve_device, time_steps
from .job import Choice, Job

WAIT = 60.0  # seconds


def start() -> None:
    """The process of the cell whose folder stands on the command line."""
    keep_freed_memory()
    errors.write_any_text()
    main(Path(sys.argv[1]))


def main(folder: Path) -> None:
    """`run`, while this process holds the lock of the folder; what may go wrong on any machine ends it with a sentence.

    A cell of a sweep that was killed ends within a step. Until then the next sweep waits for it.
    """
    try:
        with locked(folder, "the same cell of a sweep that was killed", WAIT):
            run(folder)
    except Exception as error:
        text = errors.sentence(error)
        if text is None:
            raise
        sys.exit(text)


def run(folder: Path) -> None:
    """Trains, or takes the weights that were kept, evaluates and records the cell of `folder`."""
    tick = while_alive(os.getppid())
    job = Job.read(folder)
    settings = job.config
    if settings.training.threads is not None:
        torch.set_num_threads(settings.training.threads)
    dataset = data.of(settings.data)
    records, candidates = Records(Path(job.records)), Records(Path(job.candidates))
    if job.trained:
        record = records[job.cell]
    elif job.choice is not None:
        record = replace(taken(folder, job.choice, candidates), **job.place)
    else:
        record = trained(folder, job, dataset, tick)
    asked = replace(record.config, name=job.cell, evaluation=settings.evaluation)
    record = replace(record, config=asked, attacker=job.attacker)
    if job.candidate:
        candidates.put(record, job.common)
        return
    model, _ = models.load_model(folder)
    device = resolve_device(settings.training.device)
    hidden = models.hidden_of(model, settings)
    start = time.perf_counter()
    evaluation = evaluate(model.to(device), dataset.test, hidden, settings.evaluation, device, tick, record.config.loss)
    seconds = {**record.seconds, "evaluation": time.perf_counter() - start}
    repeats = settings.evaluation.timing_repeats
    timing = time_beside_cross_entropy(settings, dataset, repeats) if repeats else None
    records.put(replace(record, evaluation=evaluation, seconds=seconds, timing=timing), job.common)


def taken(folder: Path, choice: Choice, candidates: Records) -> Record:
    """The record of the candidate that was chosen, its weights copied to `folder`; the training of those of the same
    seed that were not chosen counts as seconds of the choice."""
    for name in ("model.safetensors", "model.json"):
        shutil.copyfile(Path(choice.folder) / name, folder / name)
    record = candidates[choice.taken]
    others = sum(candidates[name].seconds["training"] for name in choice.others)
    return replace(record, seconds={**record.seconds, "choice": others}, choice=choice.tried)


def trained(folder: Path, job: Job, dataset: data.Dataset, tick: Callable[[Any], None]) -> Record:
    """Trains the cell to its end: its record without an evaluation."""
    trainer = Trainer(job.config, dataset, folder)
    if (folder / "checkpoint.pt").exists():
        trainer.resume()
    trainer.run(tick=tick, say=lambda line: print(line, flush=True))
    summary = trainer.summary()
    seconds = {"training": sum(epoch["seconds"] for epoch in trainer.history)}
    return Record(**{item.name: getattr(summary, item.name) for item in fields(summary)}, **job.place, seconds=seconds)


def time_beside_cross_entropy(settings: Config, dataset: data.Dataset, repeats: int) -> dict[str, float]:
    """Cost of a step beside a step of cross-entropy."""
    return time_steps(replace(settings, loss=LossConfig()), {"own": settings}, dataset, repeats)["own"]


def while_alive(parent: int) -> Callable[[Any], None]:
    """A tick that ends this process once its sweep is gone, which would start the cell a second time."""

    def tick(work: Any) -> None:
        if os.getppid() != parent:
            sys.exit("the sweep has ended")

    return tick

"""One cell of a sweep in a process of its own: python -m margin_kernels.experiments.cell FOLDER

FOLDER/job.json says what to train and where the record goes. Training continues from FOLDER/checkpoint.pt where a
killed process has left one. The record is written at the end, atomically: a record that exists is complete.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import checkpoint, config, data
from .config import Config, LossConfig
from .evaluate import evaluate, time_steps
from .records import write_json
from .training import Trainer, TrainingError

EXPECTED = (config.ConfigError, data.DataError, checkpoint.CheckpointError, TrainingError, ValueError)


def run(folder: Path) -> None:
    """Trains, evaluates and records the cell of `folder`."""
    job = json.loads((folder / "job.json").read_text())
    settings = config.from_dict(job["config"])
    dataset = data.of(settings.data)
    trainer = Trainer(settings, dataset, folder)
    if (folder / "checkpoint.pt").exists():
        trainer.resume()
    trainer.run(tick=while_alive(os.getppid()), say=lambda line: print(line, flush=True))
    start = time.perf_counter()
    evaluation = evaluate(trainer.model, dataset.test, trainer.hidden, settings.evaluation, trainer.device)
    seconds = {
        "training": sum(record["seconds"] for record in trainer.history),
        "evaluation": time.perf_counter() - start,
    }
    record = {**job["cell"], **trainer.summary(), "evaluation": evaluation, "seconds": seconds}
    record["config"]["model"]["initial"] = job["cell"]["after"]  # the cell, not a path of this machine
    if settings.evaluation.timing_repeats:
        record["timing"] = timing(settings, dataset)
    write_json(Path(job["record"]), record)


def timing(settings: Config, dataset: data.Dataset) -> dict[str, float]:
    """Cost of a step beside a step of cross-entropy."""
    baseline = replace(settings, loss=LossConfig())
    return time_steps(baseline, {"own": settings}, dataset, settings.evaluation.timing_repeats)["own"]


def while_alive(parent: int) -> Callable[[int], Any]:
    """A tick that ends this process once its sweep is gone, which would start the cell a second time."""

    def tick(steps: int) -> None:
        if os.getppid() != parent:
            sys.exit("the sweep has ended")

    return tick


if __name__ == "__main__":
    try:
        run(Path(sys.argv[1]))
    except EXPECTED as error:
        sys.exit(f"{type(error).__name__}: {error}")

"""One cell of a sweep in a process of its own: python -m margin_kernels.experiments.sweeps.worker FOLDER

FOLDER/job.json says what to train and where the record goes. Training continues from FOLDER/checkpoint.pt where a
killed process has left one. The record is written at the end, atomically: a record that exists is complete. A cell that
is trained and only measured anew (job "trained") keeps its weights and all of its record but the evaluation. A
candidate (job "candidate") is trained and not evaluated; the cell that chooses among candidates (job "choice") takes
the weights and the record of one, and evaluates it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from margin_kernels.memory import keep_freed_memory

from .. import config, data, models
from ..config import Config, LossConfig
from ..evaluation import evaluate
from ..results import write_json
from ..training import Trainer, TrainingError, resolve_device, time_steps

EXPECTED = (config.ConfigError, data.DataError, models.CheckpointError, TrainingError, ValueError)


def run(folder: Path) -> None:
    """Trains, or takes the weights that were kept, evaluates and records the cell of `folder`."""
    tick = while_alive(os.getppid())
    job = json.loads((folder / "job.json").read_text())
    settings = config.from_dict(job["config"])
    if settings.training.threads is not None:
        torch.set_num_threads(settings.training.threads)
    dataset = data.of(settings.data)
    path = Path(job["record"])
    if job["trained"]:
        record = json.loads(path.read_text())
    elif "choice" in job:
        record = {**taken(folder, job["choice"]), **job["cell"]}
        record["config"]["name"] = settings.name
    else:
        record = {**job["cell"], **trained(folder, settings, dataset, tick)}
    # the cells, not paths of this machine
    record["config"]["model"]["initial"] = job["cell"]["after"]
    record["config"]["evaluation"] = {**config.to_dict(settings)["evaluation"], "attacker": job["attacker"]}
    if job["candidate"]:
        write_json(path, record)
        return
    model, _ = models.load_model(folder)
    device = resolve_device(settings.training.device)
    hidden = models.hidden_taps(settings.model.name)
    start = time.perf_counter()
    record["evaluation"] = evaluate(model.to(device), dataset.test, hidden, settings.evaluation, device, tick)
    record["seconds"]["evaluation"] = time.perf_counter() - start
    record.pop("timing", None)
    if settings.evaluation.timing_repeats:
        record["timing"] = timing(settings, dataset)
    write_json(path, record)


def taken(folder: Path, choice: dict[str, Any]) -> dict[str, Any]:
    """The record of the candidate that was chosen, its weights copied to `folder`; the training of those of the same
    seed that were not chosen counts as seconds of the choice."""
    for name in ("model.safetensors", "model.json"):
        shutil.copyfile(Path(choice["folder"]) / name, folder / name)
    record = json.loads(Path(choice["record"]).read_text())
    others = (json.loads(Path(path).read_text()) for path in choice["others"])
    record["seconds"]["choice"] = sum(other["seconds"]["training"] for other in others)
    return {**record, "choice": choice["options"]}


def trained(folder: Path, settings: Config, dataset: data.Dataset, tick: Callable[[Any], None]) -> dict[str, Any]:
    """Trains the cell to its end: what its record says of that."""
    trainer = Trainer(settings, dataset, folder)
    if (folder / "checkpoint.pt").exists():
        trainer.resume()
    trainer.run(tick=tick, say=lambda line: print(line, flush=True))
    return {**trainer.summary(), "seconds": {"training": sum(epoch["seconds"] for epoch in trainer.history)}}


def timing(settings: Config, dataset: data.Dataset) -> dict[str, float]:
    """Cost of a step beside a step of cross-entropy."""
    baseline = replace(settings, loss=LossConfig())
    return time_steps(baseline, {"own": settings}, dataset, settings.evaluation.timing_repeats)["own"]


def while_alive(parent: int) -> Callable[[Any], None]:
    """A tick that ends this process once its sweep is gone, which would start the cell a second time."""

    def tick(work: Any) -> None:
        if os.getppid() != parent:
            sys.exit("the sweep has ended")

    return tick


if __name__ == "__main__":
    keep_freed_memory()
    try:
        run(Path(sys.argv[1]))
    except EXPECTED as error:
        sys.exit(f"{type(error).__name__}: {error}")

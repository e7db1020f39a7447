"""Sweeps of cells that train in a second, run through the command line."""

from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest
import torch
import yaml

from margin_kernels.experiments import cli
from margin_kernels.experiments.results import RECORDS, Records
from margin_kernels.experiments.sweeps import worker

EVALUATION = {
    "curve": [0.0, 0.1],
    "attack_samples": 40,
    "ifgsm_samples": 20,
    "steps": 2,
    "deepfool_samples": 20,
    "deepfool_iterations": 5,
    "distance_samples": 0,
    "timing_repeats": 0,
}
TINY = {
    "base": {
        "model": {"name": "digits_cnn"},
        "optimiser": {"lr": 0.003},
        "training": {"epochs": 2, "batch_size": 64, "distance_samples": 0},
        "evaluation": EVALUATION,
    },
    "models": {"cross-entropy": {}, "hinge": {"loss": {"kind": "hinge"}}},
    "grid": {"data.label_noise": [0.0, 0.4]},
    "seeds": [0, 1],
    "budgets": {"quick": {"training.epochs": 1}},
}


def write(folder, content, name="tiny.yaml"):
    path = folder / name
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def changed(**keys):
    return {**TINY, **keys}


def run(path, out, *arguments):
    """`margin-kernels sweep`, whose cells run in this process, one after another: nobody waits for `import torch`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("margin_kernels.experiments.sweeps.run.start_worker", _work_here)
        return run_in_processes(path, out, *arguments)


def run_in_processes(path, out, *arguments):
    """`margin-kernels sweep` as it is."""
    return cli.main(["sweep", str(path), "--out", str(out), *arguments])


class _Ended(NamedTuple):
    """What a sweep asks of the process of a cell, of one that has ended."""

    returncode: int

    def poll(self):
        return self.returncode


def _work_here(folder, threads):
    """Runs the worker of `folder` to its end, with what it prints in its log."""
    before = torch.get_num_threads()
    with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            worker.main(folder)
        except SystemExit as error:
            print(error.code)
            return _Ended(1)
        finally:
            torch.set_num_threads(before)
    return _Ended(0)


def records(out):
    return {record.cell: record for record in Records(out / RECORDS).all()}

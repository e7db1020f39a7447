"""Sweeps of cells that train in a second, run through the command line."""

import yaml

from margin_kernels.experiments import cli
from margin_kernels.experiments.results import RECORDS, Records

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
    return cli.main(["sweep", str(path), "--out", str(out), *arguments])


def records(out):
    return {record.cell: record for record in Records(out / RECORDS).all()}

"""`margin-kernels evaluate RUN ...` and `attack RUN`: what trained networks are worth, and their attacked images."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from .. import config, data, models
from ..config import Config, bounds
from ..evaluation import by_name, check_images, evaluate
from ..report import attacked, labels, table
from ..results import CANDIDATES, RECORDS, REPLACED, Records, Run, locked, read_json, settle, shape, write_json
from ..training import Meter, Output, resolve_device, time_steps
from .parser import Parser


def evaluate_runs(arguments: list[str]) -> int:
    parser = Parser(prog="margin-kernels evaluate", description="Measures trained networks on the test split.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders written by train")
    parser.add_argument("--data-dir", default=None, help="folder of the data files, or its parent")
    parser.add_argument("--device", default=None, help="default: the device of the run")
    parser.number("--eps", bounds.RADIUS, None, "l_inf radius of the table (default: the run's)")
    parser.add_argument("--attacker", default=None, help="folder of a run whose network makes black-box images")
    parser.add_argument(
        "--attack",
        action="append",
        default=[],
        metavar="NAME",
        help="another attack within --eps, autoattack or foolbox:NAME (foolbox:LinfPGD, foolbox:L2PGD, ...: the radius "
        "is in the attack's own norm); once for each. On the images that evaluation.attack_samples says",
    )
    parser.number("--attack-samples", bounds.SOME, None, "images of --attack (default: the run's attack_samples)", True)
    parser.add_argument("--no-timing", action="store_true", help="do not time training steps")
    options = parser.parse_args(arguments)
    console = Output()
    for name in options.attack:  # before anything is measured
        by_name.find(name)
    labels.once(options.runs)
    for folder in options.runs:  # all of them before the first is measured
        if not ((folder / "config.yaml").is_file() or (folder / REPLACED).is_dir()):
            raise models.CheckpointError(
                f"{folder / 'config.yaml'}: missing; {folder} is not the folder of a training run"
            )
    with Meter(len(options.runs), "evaluating", console) as meter:
        for folder in options.runs:
            with locked(folder, "a training or another evaluation", remedy="wait for it to end"):
                settle(folder)
                write_json(folder / "evaluation.json", measured(folder, options, meter))
    compared = read_all(options.runs)
    table.show(console, compared, "Test split")
    console.print(f"next: margin-kernels report {' '.join(map(str, options.runs))} --out report")
    return 0


def measured(folder: Path, options: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """What evaluation.json holds of a run."""
    settings = read_config(folder, options)
    meter.advance(0, f"evaluating {settings.name}")
    dataset = data.of(settings.data)
    evaluation = evaluate_run(folder, settings, dataset, meter, options)
    if settings.evaluation.timing_repeats and not options.no_timing:
        base = replace(settings, loss=config.LossConfig())
        timed = time_steps(base, {settings.name: settings}, dataset, settings.evaluation.timing_repeats)
        evaluation["timing"] = timed[settings.name]
    return evaluation


def read_config(folder: Path, options: argparse.Namespace) -> Config:
    """A run's config with the options of the command line applied."""
    path = folder / "config.yaml"
    config.check_whole(path)
    settings = config.parse(["--config", str(path)])
    if options.data_dir is not None:
        settings = replace(settings, data=replace(settings.data, dir=options.data_dir))
    if options.device is not None:
        settings = replace(settings, training=replace(settings.training, device=options.device))
    measured = {key: value for key in ("eps", "attacker") if (value := getattr(options, key)) is not None}
    settings = replace(settings, evaluation=replace(settings.evaluation, **measured))
    config.check(settings)
    return settings


def load_run(folder: Path, settings: Config, dataset: data.Dataset) -> nn.Module:
    """The network of a run, which must be that of its config and take the images of the dataset."""
    model, description = models.load_model(folder)
    if description["name"] != settings.model.name:
        raise ValueError(
            f"{folder / 'config.yaml'}: model.name must be {description['name']}, as in model.json, "
            f"got {settings.model.name}"
        )
    check_images(folder, description, dataset.test, str(folder / "model.json"))
    return model


def evaluate_run(
    folder: Path, settings: Config, dataset: data.Dataset, meter: Meter, options: argparse.Namespace
) -> dict[str, Any]:
    """Evaluates the network of one run on the test split."""
    model = load_run(folder, settings, dataset)
    device = resolve_device(settings.training.device)
    hidden, asked = models.hidden_of(model, settings), settings.evaluation
    if options.attack and not math.isfinite(dataset.test.bounds[1]):
        raise ValueError("--attack needs images with bounds: whitened ones (data.preprocess) have none")
    result = evaluate(model.to(device), dataset.test, hidden, asked, device, meter.advance, settings.loss)
    if options.attack:
        count = asked.attack_samples if options.attack_samples is None else options.attack_samples
        named = [by_name.find(name) for name in dict.fromkeys(options.attack)]
        part = dataset.test.head(count)
        result["attacks"] = by_name.accuracies(model, part, named, asked.eps, asked.batch_size, device)
    return {"evaluation": result, "weights": models.weights_digest(folder)}


def attack(arguments: list[str]) -> int:
    parser = Parser(
        prog="margin-kernels attack",
        description="Attacks the first test images on a trained network, and writes them as arrays (attacked.npz), "
        "with labels and predictions, and as a picture (attacked.png): original, attacked, difference.",
    )
    parser.add_argument("run", type=Path, help="folder written by train")
    parser.add_argument(
        "--attack",
        default="ifgsm",
        metavar="NAME",
        help=f"{', '.join(by_name.OWN)}, autoattack or foolbox:NAME (default: ifgsm, on the logit gap)",
    )
    parser.number("--eps", bounds.RADIUS, None, "radius, in the attack's norm; not of deepfool (default: the run's)")
    parser.number("--samples", bounds.TIMES, 12, "test images (default: 12)")
    parser.add_argument("--out", type=Path, default=Path("attacked"), help="folder of the files (default: attacked)")
    parser.add_argument("--data-dir", default=None, help="folder of the data files, or its parent")
    parser.add_argument("--device", default=None, help="default: the device of the run")
    options = parser.parse_args(arguments)
    options.attacker = None
    settings = read_config(options.run, options)
    asked = settings.evaluation
    named = by_name.find(options.attack, asked.steps, asked.deepfool_iterations)
    dataset = data.of(settings.data)
    model = load_run(options.run, settings, dataset)
    device = resolve_device(settings.training.device)
    with locked(options.out, "another attack, run or report"):
        found = attacked.attacked(
            model.to(device), dataset, named, asked.eps, options.samples, asked.batch_size, device
        )
        files = attacked.write(options.out, found)
    console = Output()
    console.print(found.words(), soft_wrap=True)
    console.print(", ".join(map(str, files)), soft_wrap=True)
    return 0


def read_all(folders: list[Path]) -> list[table.Compared]:
    """The runs, labelled by their folders where two have the same name. Raises ValueError where one is given twice."""
    found = [read_compared(folder) for folder in folders]
    names = labels.distinct([model.label for model in found], list(map(_place, folders)))
    return [replace(model, label=name) for model, name in zip(found, names, strict=True)]


def _place(folder: Path) -> Path:
    """The folder of a run; FOLDER/CELL of FOLDER/records.jsonl:CELL."""
    path, _, cell = str(folder).rpartition(":")
    return Path(path).parent / cell if Path(path).is_file() else folder


def read_compared(folder: Path) -> table.Compared:
    """A run as report and table want it: a folder, or FOLDER/records.jsonl:CELL, a cell of a sweep."""
    path, _, cell = str(folder).rpartition(":")
    if Path(path).is_file():
        found = Records(Path(path))
        if cell not in found:
            raise ValueError(f"{path}: no record of {cell}; there are {', '.join(r.cell for r in found.all())}")
        record = found[cell]
        try:
            shape.check(record.machine, shape.MACHINE, "machine")
            shape.check_evaluation(record.measurements, shape.EVALUATION)
        except ValueError as error:
            raise ValueError(f"{path}: {cell} cannot be reported: {error}") from None
        return table.Compared(" ".join(filter(None, record.place)), record.run, record.measurements, record.timing)
    if (folder / REPLACED).is_dir():
        raise ValueError(
            f"{folder}: another run is replacing this one, or was stopped while it did: wait for it, or let "
            "`margin-kernels evaluate` put back what was there"
        )
    if (folder / "cells").is_dir() or (folder / CANDIDATES).is_file():
        raise ValueError(
            f"{folder / RECORDS}: missing; no cell of this sweep is finished: `margin-kernels sweep` with its file and "
            f"--out {folder} goes on"
        )
    if not (folder / "run.json").is_file():
        raise ValueError(
            f"{folder / 'run.json'}: missing; run `margin-kernels train` first, or `margin-kernels sweep` for a sweep"
        )
    if not (folder / "evaluation.json").is_file():
        raise ValueError(f"{folder / 'evaluation.json'}: missing; run `margin-kernels evaluate` first")
    run = Run.read(folder / "run.json")
    evaluation = read_json(folder / "evaluation.json")
    try:
        shape.check(evaluation, {"evaluation": dict, "timing?": shape.TIMING, "weights": str}, "evaluation.json")
        shape.check_evaluation(evaluation["evaluation"], shape.EVALUATION)
    except ValueError as error:
        raise ValueError(f"{folder / 'evaluation.json'}: {error}; run `margin-kernels evaluate` again") from None
    if evaluation["weights"] != models.weights_digest(folder):
        raise ValueError(
            f"{folder / 'evaluation.json'} was measured on other weights than those of {folder}: run "
            "`margin-kernels evaluate` again"
        )
    label = run.config.name.replace("_", " ")
    return table.Compared(label, run, evaluation["evaluation"], evaluation.get("timing"))

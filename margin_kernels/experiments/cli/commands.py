"""`margin-kernels`: train | evaluate | report | sweep | attack | check | demo | toy | explain | bench | info.

margin-kernels train --config mnist_large_margin_l2 --data-dir DIR --out runs/l2 --loss.gamma 2
margin-kernels evaluate runs/ce runs/l2 --data-dir DIR
margin-kernels report runs/ce runs/l2 --out report
margin-kernels sweep sensitivity_mnist_mlp --data-dir DIR --out sweeps/sensitivity --budget cpu --jobs 2
margin-kernels report sweeps/sensitivity --out report
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser

from margin_kernels import LargeMarginLoss, MarginTask
from margin_kernels.info import lines as installed
from margin_kernels.memory import keep_freed_memory

from .. import config, data, models, sweeps
from ..config import bounds
from ..report import page, study_page, table, takeaway
from ..results import (
    RECORDS,
    Records,
    Run,
    locked,
    replacing,
    settle,
    summary,
)
from ..training import ALONE, TIMEOUT, Meter, Output, Processes, Trainer, errors, join, resolve_device
from .bench import bench
from .check import check
from .evaluate import attack, evaluate_runs, read_all
from .parser import Parser, check_text, timeout

USAGE = """usage: margin-kernels COMMAND [options]

  train      train a network; --config FILE or the name of a shipped config, dotted overrides, --print_config
  evaluate   measure trained networks: accuracy, attacks, distances, cost of a step
  report     compare evaluated runs, or show sweeps: one HTML page, CSV, JSON, SVG, PNG
  sweep      train and evaluate models x grid points x seeds, J processes at a time; goes on where it was stopped
  attack     attacked test images of a trained network: arrays and a picture
  check      whether checkpoints, weights and records are as they were written
  demo       train and compare eight losses on scikit-learn's digits
  toy        two rectangles in the plane: boundaries, true margins, and those that DeepFool reports
  explain    how the gradients of a shipped network are obtained, why, and what a step costs
  bench      what a step of each loss costs on your own model or a shipped one: time, floor, memory, strategy
  info       versions, machine, backends, shipped configs and sweeps

margin-kernels COMMAND --help says more. Several processes train one network:
torchrun --nproc-per-node 2 -m margin_kernels.experiments train ...
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command, of `arguments` or, as a process of its own, of the command line; returns the exit status."""
    alone = arguments is None
    arguments = sys.argv[1:] if arguments is None else arguments
    command, *rest = arguments or ["--help"]
    if alone:
        errors.stop_on_signals()
        errors.write_any_text()
    if alone and command in TRAINING:
        keep_freed_memory()
    processes = ALONE
    try:
        processes = join(timeout(rest))  # before anything may fail on one of them
        check_text(rest)
        status = run_command(command, rest, processes)
        if alone:
            sys.stdout.flush()
    except SystemExit as asked:  # after --help
        if not processes.several:
            raise
        status = int(asked.code or 0)
    except (Exception, KeyboardInterrupt) as error:
        if processes.several:
            errors.keep_status()
        status = errors.report(f"margin-kernels {command}", error, processes)
        if alone:
            errors.end_output()
    processes.leave()
    if alone and processes.several:
        processes.end(status)
    return status


def run_command(command: str, rest: list[str], processes: Processes = ALONE) -> int:
    if processes.several and command != "train":
        raise ValueError(
            f"one process must run this command, got {processes.size} (WORLD_SIZE): only train takes several"
        )
    if command == "train":
        return train(rest, processes)
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        print(f"margin-kernels: command must be one of {', '.join(COMMANDS)}, got {command!r}", file=sys.stderr)
        return 2
    return COMMANDS[command](rest)


def train(arguments: list[str], processes: Processes = ALONE) -> int:
    parser = ArgumentParser(
        prog="margin-kernels train", exit_on_error=False, print_config=None, description="Trains one network."
    )
    config.add_arguments(parser)
    parser.add_argument("--print_config", action="store_true", help="print the resolved config, as a file, and end")
    parser.add_argument("--data-dir", default=None, help="folder of the data files, or its parent (same as --data.dir)")
    parser.add_argument("--out", default=None, help="folder of the run (default: runs/NAME)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the folder's checkpoint; a higher --training.epochs extends the run, bit for bit as if it "
        "had been as long from the start (not a cosine schedule, whose rates depend on the end)",
    )
    parser.add_argument("--overwrite", action="store_true", help="throw away the run that the folder holds")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        help="seconds that one of several processes waits for the others, which torchrun has started",
    )
    namespace = config.parse_with(parser, arguments)
    settings = config.from_namespace(namespace)
    if namespace.timeout not in bounds.WAIT:
        raise ValueError(f"--timeout must be {bounds.WAIT.words(namespace.timeout)}, got {namespace.timeout}")
    if namespace.data_dir is not None:
        settings = replace(settings, data=replace(settings.data, dir=namespace.data_dir))
    if namespace.print_config:
        print(config.to_yaml(settings), end="")
        return 0
    folder = Path(namespace.out or Path("runs") / settings.name)
    if namespace.resume and namespace.overwrite:
        raise ValueError("--resume and --overwrite must not be given together")
    console = Output()
    with ExitStack() as stack:  # of process 0, which alone holds the folder

        def hold() -> None:
            if namespace.resume and not folder.is_dir():
                raise models.CheckpointError(f"{folder}: nothing to resume; start without --resume.")
            stack.enter_context(locked(folder, "another run or an evaluation of it"))
            settle(folder)
            holds = any((folder / name).exists() for name in ("checkpoint.pt", "model.safetensors"))
            if holds and not (namespace.resume or namespace.overwrite):
                raise ValueError(
                    f"{folder} already holds a run; continue it with --resume, throw it away with --overwrite, or "
                    "choose another --out"
                )

        def replace_run() -> None:
            stack.enter_context(replacing(folder))

        processes.first(f"the check of {folder}", hold)
        dataset = processes.together("the reading of the data", lambda: data.of(settings.data))
        trainer = Trainer(settings, dataset, folder, processes)
        if processes.several:
            console.print(f"{processes.size} processes{trainer.differs()}")
        if namespace.resume:
            before = trainer.resume()
            by = "" if before == processes.size else f", which {before} process{'es' * (before > 1)} wrote"
            console.print(f"resuming after epoch {trainer.epoch}{by}")
            if trainer.stopped:
                console.print("nothing is left: training.stop_at_train_accuracy was reached")
            elif trainer.epoch == settings.training.epochs:
                console.print("nothing is left: a higher --training.epochs extends the run")
        else:
            processes.first(f"the check of {folder}", replace_run)
        start = time.perf_counter()
        steps = trainer.steps_per_epoch * (settings.training.epochs - trainer.epoch)
        with Meter(steps, settings.name, console) as meter:

            def say(line: str) -> None:
                if processes.writes:
                    settle(folder)  # with this epoch's checkpoint the run that it replaces goes
                meter.say(line)

            trainer.run(tick=meter.advance, say=say)
    console.print(f"done in {time.perf_counter() - start:.0f} s: {folder}", soft_wrap=True)
    console.print(f"next: margin-kernels evaluate {folder}", soft_wrap=True)
    return 0


def make_report(arguments: list[str]) -> int:
    parser = Parser(prog="margin-kernels report", description="Compares evaluated runs on one page.")
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="folders written by train and evaluate, or FOLDER/records.jsonl:CELL of a sweep; or folders of sweeps, "
        "for their own report",
    )
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder of the report")
    parser.add_argument("--title", default=None, help="heading of the page (default: made of names and data)")
    parser.add_argument(
        "--sweep", default=None, help="sweep file with published values (default: the shipped one of that name)"
    )
    parser.add_argument(
        "--data-dir", default=None, help="of sweeps with kept weights: folder of the data files, for attacked images"
    )
    options = parser.parse_args(arguments)
    with locked(options.out, "another report, or by a run or a sweep of that folder"):
        if any(map(study_page.is_sweep, options.runs)):
            return report_sweeps(options)
        return report_runs(options)


def report_runs(options: argparse.Namespace) -> int:
    """One page of the runs whose folders are given."""
    compared = read_all(options.runs)
    names = {model.run.config.data.name for model in compared}
    title = options.title or f"Large-margin training on {', '.join(sorted(names))}"
    seconds = sum(epoch["seconds"] for model in compared for epoch in model.history)
    comparison = page.Comparison(title, compared, run_conditions(compared[0].run, seconds))
    console = Output()
    html = page.write_report(options.out, comparison)
    table.show(console, compared, title)
    console.print(" ".join(takeaway.of_networks(compared)))
    console.print(f"open {html}", soft_wrap=True)
    return 0


def report_sweeps(options: argparse.Namespace) -> int:
    """One page of the sweeps whose folders are given."""
    for folder in options.runs:
        if not study_page.is_sweep(folder):
            raise ValueError(f"{folder} is not the folder of a sweep, others are: report runs and sweeps separately")
    file = None if options.sweep is None else sweeps.find(options.sweep)
    studies = study_page.distinct([study_page.load_study(folder, file) for folder in options.runs], options.runs)
    names = ", ".join(study.name.replace("_", " ") for study in studies)
    title = options.title or (names if len(studies) < 3 else f"{len(studies)} sweeps")
    html = study_page.write_study_report(options.out, studies, title, options.data_dir)
    console = Output()
    for study in studies:
        summary.show(console, summary.rows(study.records), f"{study.name}, {study.note}")
        console.print(" ".join(takeaway.of_study(study)))
    console.print(f"open {html}", soft_wrap=True)
    return 0


def run_conditions(run: Run, seconds: float) -> dict[str, Any]:
    """What a report says about how it was run."""
    machine = run.machine
    return {
        "network": f"{run.config.model.name}, {run.parameters:,} parameters",
        "data": run.config.data.name,
        "seed": run.config.training.seed,
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "machine": f"{machine['processor']}, {machine['cores']} cores",
        "device": f"{machine['device']}, {machine['torch_threads']} threads",
        "training time": f"{seconds:.0f} s",
    }


def run_sweep(arguments: list[str]) -> int:
    parser = Parser(
        prog="margin-kernels sweep",
        description="Trains and evaluates every cell of a sweep file. Finished cells are never repeated: the same "
        "command continues a sweep that was stopped.",
    )
    parser.add_argument("sweep", help=f"a YAML file, or one of {', '.join(sweeps.shipped())}")
    parser.add_argument("--data-dir", default=None, help="folder of the data files, or its parent")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results (default: sweeps/NAME)")
    parser.add_argument(
        "--budget",
        default=None,
        help="what the file offers: quick shows that it works, cpu is made for two cores, full is what the paper did "
        "(default: cpu, and full where the file has no such budget)",
    )
    parser.number("--jobs", bounds.PROCESSES, 1, "cells at a time (default: 1)")
    parser.number("--threads", bounds.PROCESSES, 1, "CPU threads of each (default: 1)")
    parser.add_argument(
        "--device",
        default=None,
        help="training device of all cells (default: as the file says); cuda: all GPUs in turn",
    )
    parser.add_argument("--keep-weights", action="store_true", help="keep the weights of every cell")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the cells and what is left to do, with the time that each will take, estimated from a few steps",
    )
    parser.add_argument("--no-estimate", action="store_true", help="time nothing beforehand")
    parser.add_argument(
        "--cells", nargs="+", metavar="PATTERN", default=["*"], help='only cells with such names: "l1*" "*seed0"'
    )
    options = parser.parse_args(arguments)
    path = sweeps.find(options.sweep)
    budget = sweeps.budget_of(path, options.budget)
    every = sweeps.read(path, budget)
    cells = sweeps.select(every, options.cells)
    out = options.out or Path("sweeps") / path.stem
    console = Output()
    how = sweeps.Options(
        options.data_dir, options.jobs, options.threads, options.device, keep_weights=options.keep_weights
    )
    runner = sweeps.Runner(cells, out, how, console)
    if options.dry_run:
        states = [runner.state(cell) for cell in cells]
        left = [cell for cell, state in zip(cells, states, strict=True) if state != "finished"]
        costs = estimated(left, options, runner)
        for cell, state in zip(cells, states, strict=True):
            cost = costs.of.get(cell.name)
            beside = "" if options.no_estimate else f"{'-' if cost is None else sweeps.duration(cost):>10}  "
            console.print(f"{beside}{state:8}  {cell.config.training.epochs:4} epochs  {cell.name}", soft_wrap=True)
        console.print(f"budget {budget}: {len(cells)} cells, {len(cells) - len(left)} finished, {len(left)} to do")
        for line in costs.lines(options.jobs):
            console.print(line, soft_wrap=True)
        return 0
    for device in {options.device} if options.device else {cell.config.training.device for cell in cells}:
        resolve_device(device)
    seconds: dict[str, float | None] = {}
    try:
        if left := [cell for cell in cells if runner.state(cell) != "finished"]:
            timing = "" if options.no_estimate else "; a few steps of each network and loss are timed"
            console.print(f"budget {budget}: {len(left)} of {len(cells)} cells to do{timing}", soft_wrap=True)
            costs = estimated(left, options, runner)
            seconds = costs.of
            for line in costs.lines(options.jobs):
                console.print(line, soft_wrap=True)
        failed = runner.run(seconds)
        status = 1 if failed else 0
    except KeyboardInterrupt as stopped:
        console.print("interrupted; the same command goes on from here")
        failed, status = runner.failed, errors.status(stopped)
    wanted = [cell.name for cell in every if not cell.candidate]
    records = Records(out / RECORDS)
    found = [records[name] for name in wanted if name in records]
    table_rows = summary.write_summary(out, path.stem, budget, found, failed)
    if table_rows:
        summary.show(console, table_rows, f"{path.stem}, {budget}: {len(found)} of {len(wanted)} cells")
    for name, error in failed.items():
        print(f"{name} failed: {error}", file=sys.stderr)
    console.print(f"{out / 'summary.csv'}, {out / 'summary.json'}", soft_wrap=True)
    return status


def estimated(cells: list[sweeps.Cell], options: argparse.Namespace, runner: sweeps.Runner) -> sweeps.Estimate:
    """What the cells that are left will take; nothing of cells with --no-estimate."""
    cells = [] if options.no_estimate else cells
    device = "cuda:0" if options.device == "cuda" else options.device
    return sweeps.estimate(cells, options.data_dir, options.threads, device, runner.trained)


def run_demo(arguments: list[str]) -> int:
    from ..demo import digits

    parser = Parser(prog="margin-kernels demo", description=digits.__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results")
    parser.add_argument(
        "--quick", action="store_true", help="fewer epochs and values of gamma: shows that everything works"
    )
    parser.number("--seed", bounds.SEED, 0, "of weights and order (default: 0)")
    options = parser.parse_args(arguments)
    with locked(options.out, "another demo"):
        digits.run(options.out, quick=options.quick, seed=options.seed)
    return 0


def run_toy(arguments: list[str]) -> int:
    from ..demo import plane

    parser = Parser(
        prog="margin-kernels toy",
        description="Two rectangles in the plane [A]: trains a linear classifier and a small ReLU network with eight "
        "losses, and measures the margin on the exact boundary beside the one that DeepFool reports.",
    )
    parser.add_argument("--out", type=Path, default=Path("toy"), help="folder of toy.json, toy.png and toy.svg")
    epochs = bounds.Range(1, bounds.EPOCHS.most)
    parser.number("--epochs", epochs, plane.EPOCHS, f"at least 1 (default: {plane.EPOCHS}, as in the paper)")
    parser.add_argument("--quick", action="store_true", help=f"{plane.QUICK} epochs: shows that everything works")
    seeds = bounds.Range(0, bounds.SEED.most - 1)
    parser.number("--seed", seeds, 0, "of weights, order and training points; the next one of test points (default: 0)")
    options = parser.parse_args(arguments)
    with locked(options.out, "another toy"):
        plane.run(options.out, plane.QUICK if options.quick else options.epochs, options.seed)
    return 0


def explain(arguments: list[str]) -> int:
    parser = Parser(
        prog="margin-kernels explain",
        description="How the gradients of a margin loss are obtained for shipped networks: the strategy, its reason, "
        "why  the others are refused, the cost in passes, backends and memory. On a batch of random images.",
    )
    parser.add_argument("networks", nargs="+", help=f"names of networks: {', '.join(models.MODELS)}")
    parser.add_argument("--layers", nargs="+", help="taps (default: input, the network's hidden layers, output)")
    parser.number("--top-k", bounds.Range(1, CLASSES - 1), 1, "competitors (default: 1)")
    parser.add_argument("--second-order", action="store_true", help="differentiate the norms as well")
    parser.number("--cross-entropy-weight", bounds.RADIUS, 0.0, "beside the margin (default: 0)")
    parser.add_argument("--norm", choices=("batch", "group"), help="of networks that have one (default: batch)")
    parser.number("--batch-size", bounds.Range(1, 1024), 2, "images (default: 2)")
    parser.add_argument("--eval", action="store_true", help="the network in evaluation mode")
    options = parser.parse_args(arguments)
    loss = LargeMarginLoss(
        top_k=options.top_k,
        second_order=options.second_order,
        cross_entropy_weight=options.cross_entropy_weight,
    )
    for name in options.networks:
        if options.norm is not None and not models.has_norm(name):
            raise ValueError(f"--norm is for networks that have one, and {name} has none")
        extra = {} if options.norm is None else {"norm": options.norm}
        shape = models.default_shape(name)
        network = models.build(name, shape, CLASSES, **extra).train(not options.eval)
        layers = options.layers or ("input", *models.hidden_taps(name), "output")
        task = MarginTask(network, loss, layers)
        x = torch.rand(options.batch_size, *shape)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what batch norm does is part of the explanation
            found = task.explain(x, torch.zeros(options.batch_size, dtype=torch.int64))
        print(f"{name}, {options.batch_size} x {'x'.join(map(str, shape))}\n{found}\n")
    return 0


def info(arguments: list[str]) -> int:
    parser = Parser(
        prog="margin-kernels info",
        description="What is installed and what runs here, as `python -m margin_kernels.info` has it, and the shipped "
        "configs and sweeps.",
    )
    parser.parse_args(arguments)
    print("\n".join(installed()))
    print(f"\nconfigs        {', '.join(config.shipped())}\nsweeps         {', '.join(sweeps.shipped())}")
    return 0


CLASSES = 10  # of `explain`, which has no data
TRAINING = ("train", "demo", "toy")  # the commands that take training steps in their own process
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "evaluate": evaluate_runs,
    "report": make_report,
    "sweep": run_sweep,
    "attack": attack,
    "check": check,
    "demo": run_demo,
    "toy": run_toy,
    "explain": explain,
    "bench": bench,
    "info": info,
}

if __name__ == "__main__":
    sys.exit(main())

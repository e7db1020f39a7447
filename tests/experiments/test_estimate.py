"""A sweep says beforehand how long its cells will take: what is timed is multiplied by what the cells really do."""

import re
from dataclasses import replace

import pytest
import torch
from support.tiny_sweeps import TINY, changed, records, run, write
from torch import nn

from margin_kernels.experiments import config, data, sweeps
from margin_kernels.experiments.config import Config, EvaluationConfig
from margin_kernels.experiments.evaluation import measure
from margin_kernels.experiments.sweeps import estimates
from margin_kernels.experiments.sweeps.estimates import Costs, duration, kind, seconds
from margin_kernels.experiments.training import Trainer

NOTHING = Costs(step=0, forward=0, distance=0, gradient=0, deepfool=0)


class Counted(nn.Module):
    """A linear classifier that counts its images, with and without gradients in them."""

    def __init__(self):
        super().__init__()
        self.flat, self.head = nn.Flatten(), nn.Linear(64, 10)
        self.plain = self.differentiated = 0

    def forward(self, x):
        if torch.is_grad_enabled() and x.requires_grad:
            self.differentiated += len(x)
        else:
            self.plain += len(x)
        return self.head(self.flat(x))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.mark.parametrize("attacked", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"curve": [0.0, 0.1, 0.2], "attack_samples": 30, "ifgsm_samples": 12, "steps": 3},
        {"curve": [0.1], "noise_sigmas": [0.1, 0.2], "noise_samples": 17, "ifgsm_samples": 0},
        {"curve": [], "noise_sigmas": [0.3], "steps": 1},
    ],
)
def test_the_images_of_an_evaluation_are_counted_as_they_are_passed(digits, monkeypatch, options, attacked):
    asked = EvaluationConfig(deepfool_samples=0, distance_samples=0, timing_repeats=0, batch_size=64, **options)
    asked = replace(asked, attacker="other" if attacked else None)
    model, other = Counted(), Counted()
    monkeypatch.setattr(measure, "load_attacker", lambda *given: other)
    split = digits.test.head(50)
    measure.evaluate(model, split, (), asked)
    settings = Config(evaluation=asked)
    sizes = (100, 20, len(split))
    forward = seconds(settings, replace(NOTHING, forward=1), sizes, train=False, evaluate=True)
    gradient = seconds(settings, replace(NOTHING, gradient=1), sizes, train=False, evaluate=True)
    assert forward == model.plain + other.plain
    assert gradient == model.differentiated + other.differentiated


def test_the_steps_and_images_of_a_training_are_counted_as_they_are_taken(digits, monkeypatch):
    steps, images, measured = [], [], []
    settings = config.parse(["--training.epochs", "3", "--training.repeat", "2", "--training.distance_samples", "9"])
    small = replace(digits, train=digits.train.head(150), validation=digits.validation.head(40))
    trainer = Trainer(settings, small)
    monkeypatch.setattr(trainer, "step", lambda *given: (steps.append(1), (torch.zeros(()), torch.zeros(())))[1])
    monkeypatch.setattr(
        "margin_kernels.experiments.training.trainer.hits", lambda model, split, device: images.append(len(split)) or 0
    )
    monkeypatch.setattr(
        "margin_kernels.experiments.training.trainer.signed_distance",
        lambda model, split, *given, **options: measured.append(len(split)) or torch.zeros(len(split), 5),
    )
    trainer.run()
    sizes = (150, 40, 1)
    for name, found in (("step", steps), ("forward", images), ("distance", measured)):
        assert seconds(settings, replace(NOTHING, **{name: 1}), sizes, train=True, evaluate=False) == sum(found)
    rest = EvaluationConfig(deepfool_samples=7, distance_samples=5, timing_repeats=2)
    settings = replace(settings, evaluation=rest)
    for name, expected in (("deepfool", 7), ("distance", 5), ("step", 6)):
        assert seconds(settings, replace(NOTHING, **{name: 1}), (1, 1, 99), train=False, evaluate=True) == expected
    for p, expected in ((2.0, 5), ("inf", 10)):  # in the norm of the loss once more, where that is another one
        margin = replace(settings, loss=config.LossConfig(kind="large_margin", p=p))
        assert seconds(margin, replace(NOTHING, distance=1), (1, 1, 99), train=False, evaluate=True) == expected


def test_networks_and_losses_are_timed_once_each(tmp_path, monkeypatch):
    timed = []

    def costs(config, dataset):
        timed.append((config.model.name, config.loss.kind, config.loss.top_k, len(dataset.train)))
        return replace(NOTHING, step=len(timed))

    monkeypatch.setattr(estimates, "costs", costs)
    margin = {"loss": {"kind": "large_margin", "top_k": 2, "gamma": 2.0}}
    models = {"plain": {}, "margin": margin, "other gamma": {"loss": {**margin["loss"], "gamma": 3.0}}}
    models["more"] = {"loss": {**margin["loss"], "top_k": 3}}
    models["chosen"] = {**margin, "choose": {"optimiser.lr": [0.1, 0.2]}}
    content = changed(models=models, grid={"data.train_fraction": [1.0, 0.1]}, seeds=[0, 1])
    cells = sweeps.read(write(tmp_path, content))
    found = sweeps.estimate(cells, None, 1, None, lambda cell: False)
    assert [entry[1:3] for entry in timed] == [("cross_entropy", 1), ("large_margin", 2), ("large_margin", 3)]
    assert {entry[3] for entry in timed} == {1077}
    steps = {1.0: 2 * 17, 0.1: 2 * 2}  # epochs of 1077 and 107 images in batches of 64
    for cell in cells:
        cost = {"plain": 1, "margin": 2, "other gamma": 2, "more": 3}.get(cell.model, 2)
        assert found.of[cell.name] == (0 if cell.choice else cost * steps[cell.config.data.train_fraction]), cell.name
    assert found.total == sum(found.of.values()) and found.distinct == 3
    (total, how) = found.lines(1)
    assert total == f"about {duration(found.total)} of one process in all" and "20 steps" in how and "3 networks" in how
    assert f"about {duration(found.total / 2)} with --jobs 2" in found.lines(2)[0]
    trained = sweeps.estimate(cells, None, 1, None, lambda cell: True)
    assert trained.total == 0  # what is trained is only evaluated, which costs nothing here


def test_gamma_is_no_other_loss_and_a_batch_size_is():
    settings = config.parse(["--loss.kind", "large_margin", "--loss.gamma", "2"])
    same = config.parse(
        ["--loss.kind", "large_margin", "--loss.gamma", "3", "--optimiser.lr", "1", "--training.seed", "4"]
    )
    assert kind(settings) == kind(same)
    for option in (
        ["--training.batch_size", "8"],
        ["--loss.second_order", "true"],
        ["--loss.p", "inf"],
        ["--model.norm", "group"],
    ):
        assert kind(config.parse(["--loss.kind", "large_margin", "--loss.gamma", "2", *option])) != kind(settings), (
            option
        )


def test_a_dry_run_and_the_start_of_a_sweep_tell_times_and_a_finished_one_none(tmp_path, capsys):
    path = write(tmp_path, changed(grid={}, seeds=[0]))
    assert run(path, tmp_path / "out", "--dry-run", "--jobs", "2") == 0
    text = capsys.readouterr().out
    for name in ("cross-entropy", "hinge"):
        assert re.search(rf"^ +[\d.]+ s  to do        2 epochs  {name}__seed0$", text, re.MULTILINE)
    assert re.search(
        r"^about [\d.]+ s of one process in all, about [\d.]+ s with --jobs 2 if each has cores", text, re.MULTILINE
    )
    assert "of each of 2 networks and losses, timed here on random weights" in text and not (tmp_path / "out").exists()
    assert run(path, tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "budget full: 2 of 2 cells to do" in text and "of one process in all" in text
    assert len(records(tmp_path / "out")) == 2
    assert run(path, tmp_path / "out") == 0
    assert "of one process" not in capsys.readouterr().out
    assert run(path, tmp_path / "new", "--dry-run", "--no-estimate") == 0
    text = capsys.readouterr().out
    assert "to do        2 epochs  hinge__seed0" in text and "of one process" not in text


def test_what_cannot_be_timed_is_told_and_the_rest_is_counted(tmp_path, capsys):
    models = {"plain": {}, "nin": {"model.name": "nin", "model.args": {}}, "own": {"model.name": "gone.py:Net"}}
    path = write(tmp_path, changed(grid={}, seeds=[0], models=models))
    assert run(path, tmp_path / "out", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "no estimate for own (gone.py:Net, cross_entropy): model.name: gone.py is no file" in text
    assert (
        re.search(r" +-  to do        2 epochs  own__seed0", text)
        and "(without 1 cells that could not be timed)" in text
    )
    missing = write(tmp_path, changed(base={**TINY["base"], "data": {"name": "mnist"}}), "mnist.yaml")
    assert run(missing, tmp_path / "out", "--dry-run") == 0
    text = capsys.readouterr().out
    assert text.count("mnist is read from files: pass --data-dir") == 2 and "of one process" not in text


def test_the_budget_is_cpu_where_the_file_has_one(tmp_path, capsys):
    assert sweeps.budget_of(write(tmp_path, TINY), None) == "full"
    two = write(tmp_path, changed(budgets={"cpu": {"training.epochs": 7}}), "two.yaml")
    assert sweeps.budget_of(two, None) == "cpu" and sweeps.budget_of(two, "full") == "full"
    for path in sweeps.shipped().values():
        assert sweeps.budget_of(path, None) == "cpu", path
    assert run(two, tmp_path / "out", "--dry-run", "--no-estimate") == 0
    text = capsys.readouterr().out
    assert "budget cpu: 8 cells" in text and text.count("   7 epochs  ") == 8


def test_the_first_call_is_warm_up_and_not_timed(monkeypatch):
    now, took = [0.0], iter([5.0, 0.25, 0.125, 0.25])

    def call():
        now[0] += next(took)

    monkeypatch.setattr(estimates.time, "perf_counter", lambda: now[0])
    assert estimates._times(call, 0.5) == [0.25, 0.125, 0.25]


@pytest.mark.parametrize(
    ("amount", "words"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (42.4, "42 s"), (150, "2 min"), (7500, "2 h 05 min")]
)
def test_durations(amount, words):
    assert duration(amount) == words

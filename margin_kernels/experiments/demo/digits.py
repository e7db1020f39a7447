"""Eight losses on scikit-learn's digits: cross-entropy, hinge, the large margin loss for l1, l2 and linf, margin
sensitivity, adversarial margin maximisation, and 1-to-N.

Each margin loss has one hyper-parameter that is chosen on the validation split. The large margin losses tap the input,
every hidden layer and the output; their gamma is a multiple m of what cross-entropy reaches by itself, tap by tap:

    gamma_l = m * median over training samples with d > 0 of d[n,l] of the cross-entropy network, in the loss's norm
    loss    = mean nll + mean over n of sum_l r_l max_j max(0, 1 - d[n,j,l] / gamma_l)          r_input = 16, else 1

so that every tap is measured in its own units and the input, where attacks happen, weighs most. Of margin sensitivity
and of adversarial margins it is the weight, of 1-to-N the bound delta. The test split is looked at once, for the table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from margin_kernels.task.auto_gamma import positive_median

from .. import data
from ..config import (
    AdversarialConfig,
    Config,
    EvaluationConfig,
    LossConfig,
    ModelConfig,
    OneToNConfig,
    OptimiserConfig,
    ScheduleConfig,
    SensitivityConfig,
    TrainingConfig,
)
from ..evaluation import accuracy, eval_mode, evaluate, ifgsm, signed_distance
from ..report import choices, page, table, takeaway
from ..results import machine, versions
from ..training import Meter, Trainer, time_steps

NORMS = ("1", "2", "inf")
TUNED = (*(f"l{norm} margin" for norm in NORMS), "sensitivity", "adversarial", "1-to-N")
EPS = 0.1
TOLERANCE = 0.005  # validation accuracy a margin network may lose against cross-entropy
INPUT_WEIGHT = 16.0

RULE = (
    "One network per value. The gamma of a large margin loss is m times the median distance of the cross-entropy "
    "network at each tap, in the norm of the loss. Chosen on the validation split: among the networks whose accuracy "
    f"is at most {100 * TOLERANCE:g} points below that of cross-entropy (or the most accurate one, if there is none), "
    f"the one with the best accuracy under IFGSM on the logit gap, eps = {EPS:g}."
)


UNCHOSEN = {"chosen": False, "edge": False}


@dataclass(frozen=True)
class Plan:
    """How much the demo does: epochs, and the values among which each hyper-parameter is chosen."""

    epochs: int
    multiples: tuple[float, ...]
    sensitivity: tuple[float, ...]
    adversarial: tuple[float, ...]
    deltas: tuple[float, ...]
    top_k: int
    evaluation: EvaluationConfig


# From small to large. What was chosen of these with seed 0 has a value on either side.
FULL = Plan(
    25,
    (0.5, 1.0, 1.5, 2.0),
    (0.03, 0.1, 0.3),
    (4.0, 16.0, 64.0),
    (0.05, 0.2, 1.0, 5.0),
    3,
    EvaluationConfig(eps=EPS, timing_repeats=15),
)
QUICK = Plan(
    12,
    (2.0,),
    (0.1,),
    (16.0,),
    (1.0,),
    1,
    EvaluationConfig(
        eps=EPS, curve=[0.0, 0.05, 0.1, 0.2], deepfool_samples=100, deepfool_iterations=20, timing_repeats=9
    ),
)


def settings(name: str, loss: LossConfig, plan: Plan, seed: int) -> Config:
    """The config that all networks share but for the loss."""
    return Config(
        name=name,
        model=ModelConfig("digits_cnn"),
        loss=loss,
        optimiser=OptimiserConfig("adam", 2e-3),
        schedule=ScheduleConfig("cosine"),
        training=TrainingConfig(epochs=plan.epochs, batch_size=64, seed=seed, distance_samples=180),
        evaluation=plan.evaluation,
    )


def margin_loss(norm: str, gamma: list[float], top_k: int) -> LossConfig:
    """The large margin loss in the units of each tap (module docstring)."""
    weights = [(INPUT_WEIGHT if tap == 0 else 1.0) / value for tap, value in enumerate(gamma)]
    return LossConfig(
        kind="large_margin",
        p="inf" if norm == "inf" else float(norm),
        gamma=gamma,
        top_k=top_k,
        layer_weights=weights,
        layer_reduction="sum",
        second_order=True,
        cross_entropy_weight=1.0,
    )


Trial = tuple[str, list[float] | str, LossConfig]  # the value that is tried, gamma per tap where there is one, the loss


def trials(label: str, baseline: Trainer, plan: Plan) -> list[Trial]:
    """What is tried for one loss."""
    if label == "sensitivity":
        weights = [LossConfig("margin_sensitivity", sensitivity=SensitivityConfig(w)) for w in plan.sensitivity]
        return [(f"weight {loss.sensitivity.weight:g}", "", loss) for loss in weights]
    if label == "adversarial":
        weights = [LossConfig("adversarial_margin", adversarial=AdversarialConfig(w)) for w in plan.adversarial]
        return [(f"weight {loss.adversarial.weight:g}", "", loss) for loss in weights]
    if label == "1-to-N":
        bounds = [LossConfig("one_to_n", one_to_n=OneToNConfig(delta)) for delta in plan.deltas]
        return [(f"delta {loss.one_to_n.delta:g}", "", loss) for loss in bounds]
    norm = label.removesuffix(" margin").removeprefix("l")
    p = math.inf if norm == "inf" else float(norm)
    distances = signed_distance(baseline.model, baseline.dataset.train, baseline.hidden, p)
    medians = positive_median(distances).tolist()
    tried: list[Trial] = []
    for multiple in plan.multiples:
        gamma = [float(f"{multiple * value:.4g}") for value in medians]
        tried.append((f"m {multiple:g}", gamma, margin_loss(norm, gamma, plan.top_k)))
    return tried


class Demo:
    """The demo's state: the data, the meter, and what was trained."""

    def __init__(self, plan: Plan, seed: int, meter: Meter, dataset: data.Dataset) -> None:
        self.plan, self.seed, self.meter, self.dataset = plan, seed, meter, dataset

    def train(self, label: str, loss: LossConfig) -> Trainer:
        """One network; the meter counts its steps at their estimated cost."""
        trainer = Trainer(settings(label, loss, self.plan, self.seed), self.dataset)
        cost = step_cost(loss, self.plan)
        trainer.run(tick=lambda steps: self.meter.advance(cost * steps, f"training {label}"))
        return trainer

    def validate(self, trainer: Trainer) -> tuple[float, float]:
        """Accuracy on the validation split, clean and under IFGSM on the logit gap."""
        x, y = self.dataset.validation.batch(slice(0, None))
        with eval_mode(trainer.model):
            attacked = ifgsm(trainer.model, x, y, EPS, steps=self.plan.evaluation.steps, objective="gap")
        attacked_split = data.Split(attacked.images, y)
        return accuracy(trainer.model, self.dataset.validation), accuracy(trainer.model, attacked_split)

    def tune(self, baseline: Trainer, label: str) -> tuple[Trainer, list[dict[str, Any]]]:
        """The network of one loss with the best value of its hyper-parameter, and a row per value."""
        floor = accuracy(baseline.model, self.dataset.validation) - TOLERANCE
        tried: list[tuple[Trainer, float, float]] = []
        rows: list[dict[str, Any]] = []
        for value, gamma, loss in trials(label, baseline, self.plan):
            trainer = self.train(label, loss)
            clean, attacked = self.validate(trainer)
            tried.append((trainer, clean, attacked))
            rows.append({"loss": label, "value": value, "gamma per tap": gamma, "clean": clean, "IFGSM gap": attacked})
        chosen = choose([(clean, attacked) for _, clean, attacked in tried], floor)
        for i, row in enumerate(rows):
            row["chosen"] = i == chosen
            row["edge"] = i == chosen and i in (0, len(rows) - 1) and len(rows) > 1
        return tried[chosen][0], rows


def choose(scores: list[tuple[float, float]], floor: float) -> int:
    """Index of the best (clean, attacked) pair: the best attacked accuracy among those with clean >= floor, or the best
    clean accuracy where there is none."""
    fit = [i for i, (clean, _) in enumerate(scores) if clean >= floor - 1e-9]
    if fit:
        return max(fit, key=lambda i: (scores[i][1], scores[i][0]))
    return max(range(len(scores)), key=lambda i: scores[i])


def step_cost(loss: LossConfig, plan: Plan) -> float:
    """Cost of a training step in units of a cross-entropy step, for the time that is left: about what
    benchmarks/results/digits/results.csv measured."""
    own = {"large_margin": 1.0 + 1.25 * plan.top_k, "margin_sensitivity": 5.4, "adversarial_margin": 16.8}
    return own.get(loss.kind, 1.0)


def run(folder: Path, quick: bool = False, seed: int = 0, console: Console | None = None) -> page.Comparison:
    """Trains, tunes, evaluates, prints the table and writes the report into `folder`; returns the results."""
    threads = torch.get_num_threads()
    # Steps of milliseconds: threads that wait for each other cost more than they gain as soon as the machine has other
    # work, and the demo has to end in time there too.
    torch.set_num_threads(1)
    try:
        return _run(folder, QUICK if quick else FULL, seed, console or Console())
    finally:
        torch.set_num_threads(threads)


def _run(folder: Path, plan: Plan, seed: int, console: Console) -> page.Comparison:
    start = time.perf_counter()
    dataset = data.load("digits")
    steps = plan.epochs * math.ceil(len(dataset.train) / 64)
    networks = len(plan.multiples) * len(NORMS) * step_cost(LossConfig("large_margin"), plan)
    networks += len(plan.sensitivity) * step_cost(LossConfig("margin_sensitivity"), plan)
    networks += len(plan.adversarial) * step_cost(LossConfig("adversarial_margin"), plan) + len(plan.deltas)
    evaluation_cost = 0.4 * steps
    total = steps * (2 + networks) + evaluation_cost * (2 + len(TUNED)) + 0.2 * steps
    with Meter(total, "training", console, steps=False) as meter:
        demo = Demo(plan, seed, meter, dataset)
        trainers = {"cross-entropy": demo.train("cross-entropy", LossConfig())}
        trainers["hinge"] = demo.train("hinge", LossConfig(kind="hinge"))
        tuning: list[dict[str, Any]] = []
        baseline = trainers["cross-entropy"]
        for label in TUNED:
            trainers[label], rows = demo.tune(baseline, label)
            tuning += rows
        reference = dict.fromkeys(("value", "gamma per tap"), "")
        for label in ("hinge", "cross-entropy"):
            clean, attacked = demo.validate(trainers[label])
            tuning.insert(0, {"loss": label, **reference, "clean": clean, "IFGSM gap": attacked} | UNCHOSEN)
        meter.advance(0, "timing")
        configs = {label: trainer.config for label, trainer in trainers.items()}
        timing = time_steps(baseline.config, configs, dataset, plan.evaluation.timing_repeats)
        meter.advance(0.2 * steps)
        models = [
            describe(label, trainer, dataset, timing[label], share_of(meter, evaluation_cost, f"evaluating {label}"))
            for label, trainer in trainers.items()
        ]
    seconds = time.perf_counter() - start
    results = page.Comparison(
        title="Large-margin training on scikit-learn's digits",
        models=models,
        conditions=demo_conditions(baseline, seconds, len(dataset.test)),
        intro=INTRO,
        tuning=tuning,
        tuning_rule=RULE,
    )
    show_tuning(console, tuning)
    table.show(console, models, f"Test split, {len(dataset.test)} images, seed {seed}")
    console.print(" ".join(takeaway.of_networks(models)), highlight=False, markup=False)
    html = page.write_report(folder, results)
    console.print(f"{seconds:.0f} s. Open {html}", highlight=False, soft_wrap=True)
    return results


INTRO = [
    "Small convolutional networks, alike but for the loss. The large margin loss (Elsayed et al., NeurIPS 2018) asks "
    "for a distance gamma to the decision boundary at the input, at every hidden layer and at the output, in the l1, "
    "l2 or linf norm. The distances are differentiated to second order here, and the input tap weighs "
    f"{INPUT_WEIGHT:g} times as much as each other tap.",
    "Sensitivity: margin sensitivity (Matyasko and Chau, IJCNN 2017), a hinge and the squared norm of the gradient of "
    "the margin. Adversarial: MIN EXP of adversarial margin maximisation (Yan, Guo and Zhang, TPAMI 2019), the norm of "
    "the perturbation that DeepFool finds. 1-to-N: the loss of Rocca Layza, Pedrini and Torres, SIBGRAPI 2020.",
    "A large margin loss may scale the logits until cross-entropy has no gradient left to attack with, so every attack "
    "is also run on the logit gap, which has no scale.",
]


def share_of(meter: Meter, cost: float, label: str) -> Callable[[float], None]:
    """A callback that counts shares of `cost` units."""
    return lambda share: meter.advance(cost * share, label)


def describe(
    label: str, trainer: Trainer, dataset: data.Dataset, timing: dict[str, float], tick: Callable[[float], None]
) -> table.Compared:
    """Everything the report shows of one network."""
    settings = trainer.config
    evaluation = evaluate(
        trainer.model, dataset.test, trainer.hidden, settings.evaluation, tick=tick, loss=settings.loss
    )
    return table.Compared(label, trainer.summary(), evaluation, timing)


def demo_conditions(baseline: Trainer, seconds: float, tested: int) -> dict[str, Any]:
    """How the demo was run."""
    here = machine()
    training = baseline.config.training
    parameters = sum(p.numel() for p in baseline.model.parameters())
    images = baseline.dataset
    return {
        "network": f"{baseline.description['name']}, {parameters:,} parameters",
        "images": f"{len(images.train)} training, {len(images.validation)} validation, {tested} test",
        "training": f"{training.epochs} epochs, batch {training.batch_size}, Adam, cosine schedule",
        "seed": training.seed,
        "time": f"{seconds:.0f} s in all",
        "machine": f"{here['processor']}, {here['cores']} cores, {here['torch_threads']} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }


def show_tuning(console: Console, rows: list[dict[str, Any]]) -> None:
    """Prints the choice of gamma; the chosen rows in bold."""
    title = "Choice on the validation split (bold: chosen)"
    shown = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [key for key in rows[0] if key not in ("chosen", "edge")]
    for column in columns:
        width = max(len(column), *(len(page.tuning_cell(row[column])) for row in rows))
        shown.add_column(
            column,
            justify="left" if column in ("loss", "value") else "right",
            no_wrap=True,
            # the long lists of gamma give way to the numbers that decide: 80 columns hold the table
            max_width=26 if column == "gamma per tap" else width,
        )
    for row, mark in zip(rows, page.tuning_marks(rows), strict=True):
        bold = "bold" if choices.CHOSEN in mark else ""
        shown.add_row(*(page.tuning_cell(row[column]) for column in columns), style=bold)
    console.print(shown)
    if said := choices.sentence(page.tuning_marks(rows)):
        console.print(said)

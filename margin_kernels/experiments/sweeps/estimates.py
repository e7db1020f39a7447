"""How long cells will take, from a few steps of each distinct network and loss, timed on this machine.

    training     steps of all epochs x (time of a step), and after each epoch validation and distances
    evaluation   clean accuracy, attacks at every radius, noise, DeepFool and distances

Steps are of the cell's own loss and batch, on random weights; the rest is timed on a few images of that network, and
counted by the images that the cell asks for. Left out: the reading of the data, the start of the processes, compiled
steps (timed as they are without), and what trained weights change: DeepFool's iterations above all.
"""

from __future__ import annotations

import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import data
from ..config import Config, exponent, own_options
from ..data import Dataset
from ..evaluation import attacks, boundary_norms, hits, signed_distance
from ..training import Trainer, duration, of_its_own_loss
from .cell import Cell

STEPS, SECONDS = 20, 0.5  # at most so many steps of a network and loss, and no further one after so long
IMAGES = 32  # of which validation, distances and attacks are timed, each for
BRIEFLY = 0.1  # seconds


@dataclass(frozen=True)
class Costs:
    """Seconds of a training step, and per image: of a forward pass, the distances of the training and of the
    evaluation, a gradient of an attack, and DeepFool."""

    step: float
    forward: float
    distance: float
    gradient: float
    deepfool: float


def seconds(config: Config, costs: Costs, sizes: tuple[int, int, int], train: bool, evaluate: bool) -> float:
    """Of a cell of this config on a dataset of `sizes`: training, validation and test images."""
    total = 0.0
    if train:
        settings = config.training
        steps = settings.repeat * math.ceil(sizes[0] / settings.batch_size)
        measured = sizes[1] * costs.forward + min(settings.distance_samples, sizes[1]) * costs.distance
        total += settings.epochs * (steps * costs.step + measured)
    if evaluate:
        asked, test = config.evaluation, sizes[2]
        attacked = test if asked.attack_samples is None else min(asked.attack_samples, test)
        iterated = attacked if asked.ifgsm_samples is None else min(asked.ifgsm_samples, attacked)
        gradients = attacked + asked.steps * iterated
        # attacks on the network, judged by it; with an attacker by both, and attacks on that one, judged by the network
        makers, judges = (1, 1) if asked.attacker is None else (2, 3)
        radii = len({asked.eps, *(eps for eps in asked.curve if eps > 0)}) * len(attacks.OBJECTIVES)
        total += radii * (makers * gradients * costs.gradient + judges * (attacked + iterated) * costs.forward)
        if 0 in asked.curve and asked.eps > 0:
            total += makers * (attacked + iterated) * costs.forward
        noisy = test if asked.noise_samples is None else min(asked.noise_samples, test)
        total += (test + len(asked.noise_sigmas) * noisy) * costs.forward
        total += min(asked.deepfool_samples, test) * costs.deepfool
        again = config.loss.kind == "large_margin" and exponent(config.loss.p) != exponent(asked.distance_p)
        total += (1 + again) * min(asked.distance_samples, test) * costs.distance
        total += 3 * asked.timing_repeats * costs.step
    return total


@dataclass(frozen=True)
class Estimate:
    """Seconds of cells by name, None of those that could not be timed; why not, by network and loss; how many networks
    and losses were timed."""

    of: dict[str, float | None]
    problems: dict[str, str]
    distinct: int

    @property
    def total(self) -> float:
        return sum(found for found in self.of.values() if found is not None)

    def lines(self, jobs: int) -> list[str]:
        """What a sweep says of all cells."""
        missing = sum(found is None for found in self.of.values())
        known = len(self.of) - missing
        result = [f"no estimate for {label}: {problem}" for label, problem in self.problems.items()]
        if known:
            shared = max(self.total / jobs, max(found for found in self.of.values() if found is not None))
            several = f", about {duration(shared)} with --jobs {jobs} if each has cores of its own" if jobs > 1 else ""
            without = f" (without {missing} cells that could not be timed)" if missing else ""
            result.append(f"about {duration(self.total)} of one process in all{several}{without}")
            result.append(
                f"estimated from up to {STEPS} steps, and attacks and distances of {IMAGES} images, of each of "
                f"{self.distinct} networks and losses, timed here on random weights (DeepFool takes other times on "
                "trained ones); reading data, starting processes and compiling come on top"
            )
        return result


def estimate(
    cells: Iterable[Cell],
    data_dir: str | None,
    threads: int,
    device: str | None,
    trained: Callable[[Cell], bool],
) -> Estimate:
    """Times each distinct network and loss of `cells` once. `trained`: whether a cell has only to be evaluated."""
    of: dict[str, float | None] = {}
    problems: dict[str, str] = {}
    datasets: dict[str, Dataset] = {}
    found: dict[str, Costs | None] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the cells themselves warn
            for cell in cells:
                config = cell.config
                training = replace(config.training, device=device or config.training.device, threads=None)
                config = replace(config, data=replace(config.data, dir=data_dir), training=training)
                label, key = f"{cell.model} ({config.model.name}, {config.loss.kind})", kind(config)
                of[cell.name] = None
                try:
                    dataset = _whole(config, datasets)
                    if key not in found:
                        found[key] = None
                        found[key] = costs(config, dataset)
                except (
                    Exception
                ) as error:  # of data that are missing, or of code of the user's: the cell tells it as well
                    problems.setdefault(label, " ".join(str(error).split()) or type(error).__name__)
                own = found.get(key)
                if own is not None:
                    kept = max(1, int(config.data.train_fraction * len(dataset.train)))
                    sizes = (kept, len(dataset.validation), len(dataset.test))
                    train = not (trained(cell) or cell.choice)
                    of[cell.name] = seconds(config, own, sizes, train, not cell.candidate)
    finally:
        torch.set_num_threads(before)
    return Estimate(of, problems, len(found))


def _whole(config: Config, read: dict[str, Dataset]) -> Dataset:
    """The data of a config before fraction, noise and whitening, which cost no step anything; each is read once."""
    plain = replace(config.data, train_fraction=1.0, label_noise=0.0, seed=0, preprocess="none")
    key = json.dumps([plain.name, plain.args, plain.size, plain.validation_size])
    if key not in read:
        read[key] = data.of(plain)
    return read[key]


def kind(config: Config) -> str:
    """What decides the cost of a step: network, loss without its real numbers, batch, and how both are run."""
    own = own_options(config)
    training = {name: own["training"][name] for name in WAYS}
    loss = _without_numbers(own["loss"])
    return json.dumps([own["data"]["name"], own["data"]["args"], own["data"]["size"], own["model"], loss, training])


WAYS = ("batch_size", "accumulate", "augment", "precision", "channels_last", "clip_norm", "device", "distance_p")


def _without_numbers(value: Any) -> Any:
    """Options of a loss without floats, which cost nothing: 0.1 and 0.2 are one loss here."""
    if isinstance(value, dict):
        return {name: _without_numbers(below) for name, below in value.items() if name != "cross_entropy_epochs"}
    if isinstance(value, list):
        return [_without_numbers(below) for below in value]
    return "number" if isinstance(value, float) else value


def costs(config: Config, dataset: Dataset) -> Costs:
    """Times a few steps, and the measurements of a few images, on random weights."""
    training = replace(config.training, compile=False, tensorboard=False)
    timed = of_its_own_loss(replace(config, training=training, model=replace(config.model, initial=None)))
    trainer = Trainer(timed, dataset)
    batch = torch.arange(min(training.batch_size, len(dataset.train)))
    step = statistics.median(_times(lambda: trainer.step(batch), SECONDS))
    part = dataset.test.head(IMAGES)
    x, y = part.batch(slice(None), trainer.device)
    model, device, asked = trainer.model, trainer.device, config.evaluation

    def per_image(call: Callable[[], Any]) -> float:
        return statistics.median(_times(call, BRIEFLY)) / len(part)

    p = exponent(asked.distance_p)
    return Costs(
        step=step,
        forward=per_image(lambda: hits(model, part, device)),
        distance=per_image(lambda: signed_distance(model, part, trainer.hidden, p, device=device)),
        gradient=per_image(lambda: attacks.fgsm(model, x, y, asked.eps, "ce", part.bounds)),
        deepfool=per_image(lambda: boundary_norms(model, part, asked, device)),
    )


def _times(call: Callable[[], Any], most: float) -> list[float]:
    """Seconds of up to STEPS calls after one beforehand; each of them reads a number of its result."""
    found: list[float] = []
    call()
    while len(found) < STEPS and sum(found) < most:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found

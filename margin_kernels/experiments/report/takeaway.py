"""What a table says, in sentences that are computed from it.

A network is ahead of another one only where the 95 % intervals of their shares do not overlap (one run each), or where
the interval of their difference over the seeds, paired by seed, leaves out 0. Where several are compared with one
reference in a sweep, the level is 1 - 0.05 / comparisons (Bonferroni). The reference is the first network that was
trained with cross-entropy, or else the first one; of a sweep its first model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..results import MEASURES, Measure, Record, Study
from . import table
from .intervals import LEVEL, Interval, apart, counted, student, wilson
from .table import Compared

LISTED = 3  # places that a sentence names at most
MEASURED = (("error",), ("ifgsm_gap_error", "fgsm_gap_error"))  # of a sweep: the first that was measured of each


def of_networks(models: list[Compared]) -> list[str]:
    """What the table of these networks says: who is ahead, and what else there is to say of that."""
    if problem := _incomparable(models):
        return [f"Nothing is compared here: {problem}."]
    rows = {row.key: row for section in table.sections(models) for row in section.rows}
    attacked = all(table.interval(rows["worst"], model) is not None for model in models)
    row = rows["worst"] if attacked else rows["clean"]
    where = "Without an attack"
    if row.key == "worst":
        where = f"Under the worst attack of the table (linf, eps = {models[0].evaluation['eps']:g})"
    reference = next((model for model in models if model.run.config.loss.kind == "cross_entropy"), models[0])
    if len(models) == 1:
        alone = f"{where}, {reference.label} classifies {_words(row, reference)} of the test images correctly."
        return [alone, "There is no other network to compare it with."]
    others = sorted((model for model in models if model is not reference), key=lambda model: -_value(row, model))
    best = others[0]
    pair = f"{best.label} classifies {_words(row, best)} of the test images correctly and {reference.label} "
    pair += _words(row, reference)
    rest = []
    if not apart(_interval(row, best), _interval(row, reference)):
        first = f"{where}, nothing is clearly ahead of {reference.label}: {pair}; these 95 % intervals overlap."
    elif _value(row, best) < _value(row, reference):
        first = f"{where}, nothing is ahead of {reference.label}: {pair}; these 95 % intervals do not overlap."
    else:
        first = f"{where}, {pair}: these 95 % intervals do not overlap."
        near = [model for model in others[1:] if not apart(_interval(row, model), _interval(row, best))]
        if near:
            listed = _listed([f"{model.label} ({row.form(_value(row, model))})" for model in near])
            rest.append(f"{best.label} cannot be told from {listed}.")
    if row.key == "worst":
        rest.append(_clean(rows["clean"], best, reference))
    if best.timing and best.timing.get("ratio"):
        doubt = ", a timing that is not reliable" if table.unreliable(best) else ""
        rest.append(
            f"A training step of {best.label} costs {best.timing['ratio']:.2f} times one of cross-entropy{doubt}."
        )
    return [first, " ".join([*rest, "One run each: another seed may change this order."])]


def _incomparable(models: list[Compared]) -> str:
    """Why these networks were not measured alike; "" where they were."""
    radii = dict.fromkeys(f"{model.evaluation['eps']:g}" for model in models)
    if len(radii) > 1:
        return f"the networks were attacked within different radii, eps = {_listed(list(radii))}"
    data = [model.run.config.data for model in models]
    if len({(own.name, own.size, own.preprocess, str(own.args)) for own in data}) > 1:
        return "the networks were measured on different data"
    if len(samples := {model.evaluation["samples"] for model in models}) > 1:
        return f"the networks were measured on test splits of {' and '.join(map(str, sorted(samples)))} images"
    return ""


def _value(row: table.Row, model: Compared) -> float:
    value = row.value(model)
    assert value is not None
    return value


def _interval(row: table.Row, model: Compared) -> Interval:
    found = table.interval(row, model)
    assert found is not None
    return found


def _words(row: table.Row, model: Compared) -> str:
    """A share with its interval: 82.5 % (78.2 to 86.1)."""
    low, high = _interval(row, model)
    return f"{row.form(_value(row, model))} ({100 * low:.1f} to {100 * high:.1f})"


def _clean(row: table.Row, best: Compared, reference: Compared) -> str:
    numbers = f"{row.form(_value(row, best))} against {row.form(_value(row, reference))}"
    if not apart(_interval(row, best), _interval(row, reference)):
        return f"Without an attack {best.label} and {reference.label} cannot be told apart: {numbers}."
    better = "better" if _value(row, best) > _value(row, reference) else "worse"
    return f"Without an attack {best.label} is {better} than {reference.label}: {numbers}."


def _listed(words: list[str]) -> str:
    """a, b and c; of more than LISTED the first ones, and how many others there are."""
    if len(words) > LISTED:
        return f"{', '.join(words[:LISTED])} and {len(words) - LISTED} more"
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


@dataclass(frozen=True)
class Difference:
    """A model less the reference at a point: the mean in printed units, its interval or None (one seed), and whether
    it is clear of 0."""

    model: str
    point: str
    mean: float
    interval: Interval | None
    clear: bool

    @property
    def words(self) -> str:
        at = f" at {self.point}" if self.point else ""
        low, high = sorted((abs(self.interval[0]), abs(self.interval[1]))) if self.interval else (0.0, 0.0)
        spread = f" ({low:.1f} to {high:.1f})" if self.interval else ""
        return f"{self.model}{at} by {abs(self.mean):.1f} points{spread}"


def of_study(study: Study) -> list[str]:
    """What the records of a sweep say, a sentence for the test error and one for the error under attack, and how they
    were found."""
    reference, *others = study.models
    if not others:
        return [f"There is one model, {reference}, and nothing to compare it with."]
    by_key = {measure.key: measure for measure in MEASURES}
    sentences = []
    for keys in MEASURED:
        for measure in (by_key[key] for key in keys):
            found = differences(study, measure)
            if found:
                sentences.append(_sentence(measure, found, reference, len(study.points)))
                break
    if not sentences:
        return [f"No model was measured at the same points and seeds as {reference}: nothing is compared."]
    alike = "the 95 % interval of the difference, paired by seed (Student's t), leaves out 0"
    single = "the 95 % intervals of the two errors (Wilson) do not overlap"
    several = {len(_pairs(study, by_key["error"], model, point)) > 1 for model in others for point in study.points}
    rule = f"{alike}; with one seed: {single}" if several == {True, False} else alike if True in several else single
    together = len(others) * len(study.points)
    bonferroni = f", for all {together} comparisons together (Bonferroni)" if together > 1 else ""
    return [*sentences, f"Clearly: {rule}{bonferroni}."]


def differences(study: Study, measure: Measure) -> list[Difference]:
    """Of every model and point that has seeds in common with the reference."""
    level = 1 - (1 - LEVEL) / ((len(study.models) - 1) * len(study.points))
    found = []
    for point in study.points:
        for model in study.models[1:]:
            pairs = _pairs(study, measure, model, point)
            if not pairs:
                continue
            gaps = [measure.factor * (own - base) for (own, _), (base, _) in pairs]
            interval = student(gaps, level)
            clear = not interval[0] <= 0 <= interval[1] if interval else _single(measure, pairs[0], level)
            found.append(Difference(model, point, statistics.fmean(gaps), interval, clear))
    return found


Measured = tuple[float, Record]


def _pairs(study: Study, measure: Measure, model: str, point: str) -> list[tuple[Measured, Measured]]:
    """The measure of a model and of the reference, with their records, of each seed that has both."""

    def by_seed(name: str) -> dict[int, Measured]:
        values = ((measure.value(record), record) for record in study.of(name, point))
        return {record.seed: (value, record) for value, record in values if value is not None}

    own, base = by_seed(model), by_seed(study.models[0])
    return [(own[seed], base[seed]) for seed in own if seed in base]


def _single(measure: Measure, pair: tuple[Measured, Measured], level: float) -> bool:
    """Whether one run is clear of another one."""
    counts = [counted(record.measurements, record.config.evaluation, measure.of) for _, record in pair]
    if min(counts) < 1:
        return False
    one, other = (wilson(value, count, level) for (value, _), count in zip(pair, counts, strict=True))
    return apart(one, other)


def _sentence(measure: Measure, found: list[Difference], reference: str, points: int) -> str:
    title = measure.words[0].upper() + measure.words[1:].removesuffix(", %")
    clear = sorted((each for each in found if each.clear), key=lambda each: each.mean)
    below, above = [d for d in clear if d.mean < 0], [d for d in clear if d.mean > 0][::-1]
    where = "" if points == 1 else f" at any of the {points} points"
    text = f"{title}: no model is clearly below {reference}{where}"
    if below:
        text = f"{title}, clearly below {reference}: {_places(below)}"
    return f"{text}. Clearly above it: {_places(above)}." if above else f"{text}."


def _places(found: Sequence[Difference]) -> str:
    return _listed([each.words for each in found])

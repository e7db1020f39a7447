"""A sweep: models x points x seeds as a YAML file, read into cells. Each cell is one training run and its evaluation.

    base: mnist_cross_entropy            a config by name or file, or a mapping with the keys of a config; its
                                         evaluation.attacker is the label of a model, of the same point and seed
    models:                              label -> overrides of the base
      cross-entropy: {}
      margin: {after: cross-entropy, loss: {kind: large_margin}}      goes on from the weights of a model above it
      tuned: {choose: {loss.gamma: [1, 2]}}       trained with every combination of these values; the one with the best
                                         mean validation accuracy over the seeds, at each point, is the model's: no
                                         other meets the test images
    grid: {data.label_noise: [0.0, 0.4]} every combination of the values;
    points:                              and, or instead, a list of overrides, each with an optional label and seeds
      - {label: 68 samples, data.train_fraction: 0.00125, training.repeat: 100, seeds: [0, 1]}
    seeds: [0, 1, 2]
    seed_keys: [training.seed, data.seed]      which keys a seed sets; these two by default
    published:                           "MODEL" or "MODEL / POINT" -> measure of summary.py -> number as printed there;
      "margin / 68 samples": {error: 12.5}       a label in brackets is a model of the paper that the file has not
    budgets:                             name -> overrides of the base; seeds, grid and points replace those above
      quick: {training.epochs: 1, seeds: [0]}
    extends: another_sweep               a sweep by name or file on which this one builds: its own base and models are
                                         laid over those, any other key replaces; published values are not taken over
    without: ["margin*"]                 models of the extended sweep to leave out, as shell patterns

Keys may be nested or dotted. Later ones win: base, budget, model, point, grid, seed. The budget "full" is the file as
it stands unless the file says otherwise. The seeds are the outermost loop, so that a sweep that is stopped early has
compared all models.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from .. import config, models, objectives
from ..config import Config, ConfigError, to_dict
from ..config.bounds import LABEL, is_label
from ..results import MEASURES
from .cell import Cell, Option, cell_name, words

LARGEST = 10_000  # cells: a larger grid is a mistake, and would be expanded for hours
KEYS = ("base", "models", "grid", "points", "seeds", "seed_keys", "budgets", "published", "extends", "without")
REPLACED = ("seeds", "grid", "points")  # what a budget may replace


def shipped() -> dict[str, Path]:
    """The sweep files that come with the package, by name."""
    return config.yaml_files("sweeps")


def find(name: str) -> Path:
    """A path to a YAML file, or the name of a shipped sweep."""
    if Path(name).is_file():
        return Path(name)
    if name in shipped():
        return shipped()[name]
    raise ConfigError(f"sweep {name}: no such file, and not one of the shipped sweeps: {', '.join(shipped())}")


def read(path: Path, budget: str = "full") -> list[Cell]:
    """The cells of a sweep file, in the order in which they are started. Raises ConfigError naming the key."""
    content = _content(path)
    if not content.get("models"):
        raise ConfigError(f"{path}: models must be a mapping of at least one label to its overrides")
    _published(path, content)
    budgets = _mapping(path, "budgets", content.get("budgets"))
    budgets = {"full": {}, **{_label(path, "budgets", name): own for name, own in budgets.items()}}
    _known(f"{path}: --budget", "budget", [budget], tuple(budgets))
    chosen = dict(_mapping(path, f"budgets.{budget}", budgets[budget]))
    content = {**content, **{key: chosen.pop(key) for key in REPLACED if key in chosen}}
    base = _merge(_base(path, content.get("base")), _overrides(path, f"budgets.{budget}", chosen))
    seed_keys = content.get("seed_keys", ["training.seed", "data.seed"])
    if not isinstance(seed_keys, list) or not all(isinstance(key, str) for key in seed_keys):
        raise ConfigError(f"{path}: seed_keys must be a list of keys, got {seed_keys!r}")
    defaults = _dotted(to_dict(config.Config()))
    for key in seed_keys:
        if key in defaults and not key.endswith("seed"):
            raise ConfigError(f"{path}: seed_keys must be keys of seeds, got {key!r}")
    _overrides(path, "seed_keys", dict.fromkeys(seed_keys, 0))
    points = _points(path, content, _seeds(path, "seeds", content.get("seeds", [0])))
    # types are checked model by model and point by point: a parser takes a tenth of a second
    models = list(_models(path, content["models"]))
    of_point = sum(len(model.options) + model.chooses for model in models)
    _bounded(path, "cells", of_point * sum(len(set(point.seeds)) for point in points))
    of_model = {
        (model.label, i): to_dict(_typed(f"{path}: {model.label}", _merge(_merge(base, model.values), _nested(option))))
        for model in models
        for i, option in enumerate(model.options)
    }
    varied = {key for model in models for option in model.options for key in option}
    varied |= {key for point in points for key in point.values}
    for key in sorted(varied & {*seed_keys, "name", "evaluation.attacker"}):
        raise ConfigError(
            f"{path}: {key} must not stand in points, grid or choose: the sweep itself sets it for each cell"
        )
    conditions = []
    for point in points:
        typed = _typed(f"{path}: {point.label}", _merge(base, _nested(point.values)))
        values = _nested({key: config.value_of(typed, key) for key in point.values})
        for model in models:
            conditions.append((point, model, values))
            for key in model.options[0]:
                if key in point.values:
                    raise ConfigError(f"{path}: models.{model.label}.choose.{key}: point {point.label!r} sets that key")
    cells: dict[str, Cell] = {}

    def add(cell: Cell) -> None:
        if cell.name in cells:
            raise ConfigError(f"{path}: two cells are called {cell.name}; give models and points distinct labels")
        try:
            config.check(cell.config)
        except ConfigError as error:
            raise ConfigError(f"{path}: {cell.model}: {error}") from None
        cells[cell.name] = cell

    for seed in dict.fromkeys(seed for point in points for seed in point.seeds):
        for point, model, values in conditions:
            if seed not in point.seeds:
                continue
            name = cell_name(model.label, point.label, seed)
            before = None if model.after is None else cell_name(model.after, point.label, seed)
            own = {"name": name, **dict.fromkeys(seed_keys, seed), "evaluation.attacker": None}
            settings = [_merge(of_model[model.label, i], values) for i in range(len(model.options))]
            attacker = _attacker(path, content["models"], model.label, settings[0]["evaluation"]["attacker"])
            attacker = None if attacker is None else cell_name(attacker, point.label, seed)
            complete = [config.from_dict(_merge(each, _nested(own))) for each in settings]
            if not model.chooses:
                add(Cell(name, model.label, point.label, point.values, seed, complete[0], before, attacker))
                continue
            choice = []
            for option, its_config in zip(model.options, complete, strict=True):
                label = f"{model.label} {words(option)}"
                names = {s: cell_name(label, point.label, s) for s in point.seeds}
                its_config = replace(its_config, name=names[seed])
                add(
                    Cell(
                        names[seed],
                        label,
                        point.label,
                        {**point.values, **option},
                        seed,
                        its_config,
                        before,
                        None,
                        True,
                    )
                )
                choice.append(Option(option, tuple(names.values())))
            add(
                Cell(
                    name,
                    model.label,
                    point.label,
                    point.values,
                    seed,
                    complete[0],
                    None,
                    attacker,
                    choice=tuple(choice),
                )
            )
    return list(cells.values())


def budget_of(path: Path, asked: str | None) -> str:
    """The budget that is asked for; without one "cpu" where the file has it, and else "full"."""
    if asked is not None:
        return asked
    return "cpu" if "cpu" in _mapping(path, "budgets", _content(path).get("budgets")) else "full"


def published(path: Path) -> dict[tuple[str, str], dict[str, float]]:
    """The published values of a sweep file: (model, point) -> key of a measure -> number in the unit of the printed
    table, so errors in %. Raises ConfigError for a model, point or measure that there is not."""
    return _published(path, _content(path))


def labels(path: Path) -> tuple[list[str], list[str]]:
    """The models and the points of a sweep file, those of all budgets, in its order."""
    return _labels(path, _content(path))


def _labels(path: Path, content: dict[str, Any]) -> tuple[list[str], list[str]]:
    found = [_label(path, "models", model) for model in _mapping(path, "models", content.get("models"))]
    points = []
    for name, chosen in {"full": {}, **_mapping(path, "budgets", content.get("budgets"))}.items():
        replaced = {key: value for key, value in _mapping(path, f"budgets.{name}", chosen).items() if key in REPLACED}
        points += [point.label for point in _points(path, {**content, **replaced}, [0])]
    return found, list(dict.fromkeys(points))


def _published(path: Path, content: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    known, points = _labels(path, content)
    result: dict[tuple[str, str], dict[str, float]] = {}
    for key, values in _mapping(path, "published", content.get("published")).items():
        model, _, point = str(key).partition(" / ")
        if not model.startswith("["):
            _known(f"{path}: published", "model", [model], tuple(known))
        _known(f"{path}: published.{key}", "point", [point], tuple(points))
        values = _mapping(path, f"published.{key}", values)
        _known(f"{path}: published.{key}", "measure", values, tuple(measure.key for measure in MEASURES))
        for measure, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e300:
                raise ConfigError(f"{path}: published.{key}.{measure} must be a number, got {value!r}")
        result[model, point] = {measure: float(value) for measure, value in values.items()}
    return result


def _content(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a sweep file, laid over that of the file that it extends."""
    content = config.read_yaml(path)
    _known(str(path), "key", content, KEYS)
    if path in above:
        raise ConfigError(f"{path}: extends: the file extends itself")
    if "extends" not in content:
        if "without" in content:
            raise ConfigError(f"{path}: without: leaves out models of the sweep that `extends` names; there is none")
        return content
    below = _content(find(str(content.pop("extends"))), (*above, path))
    below.pop("published", None)
    if "points" in content or "grid" in content:
        below = {key: value for key, value in below.items() if key not in ("points", "grid")}
    base = _merge(_base(path, below.get("base")), _base(path, content.get("base")))
    models = _without(path, _mapping(path, "models", below.get("models")), content.pop("without", []))
    for label, own in _mapping(path, "models", content.get("models")).items():
        where = f"models.{label}"
        given = _nested(_mapping(path, where, own), f"{path}: {where}")
        models[label] = _merge(_nested(_mapping(path, where, models.get(label)), f"{path}: {where}"), given)
    return {**below, **content, "base": base, "models": models}


def _without(path: Path, models: dict[str, Any], patterns: Any) -> dict[str, Any]:
    """The models whose labels match no pattern. Raises ConfigError for a pattern that matches none."""
    if not isinstance(patterns, list):
        raise ConfigError(f"{path}: without must be a list of patterns, got {patterns!r}")
    for pattern in patterns:
        if not any(fnmatchcase(str(label), str(pattern)) for label in models):
            raise ConfigError(f"{path}: without: no model matches {pattern!r}; there are {', '.join(map(str, models))}")
    return {
        label: own
        for label, own in models.items()
        if not any(fnmatchcase(str(label), str(pattern)) for pattern in patterns)
    }


def _base(path: Path, base: Any) -> dict[str, Any]:
    if isinstance(base, str):
        file = Path(base) if Path(base).is_file() else config.find(base)
        loaded = config.read_yaml(file)
        config.check_keys(loaded, str(file))
        return loaded
    return _overrides(path, "base", _mapping(path, "base", base))


def _seeds(path: Path, where: str, seeds: Any) -> list[int]:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise ConfigError(f"{path}: {where} must be a list of integers, got {seeds!r}")
    return seeds


class Point(NamedTuple):
    """One condition under which all models are compared; `values`: dotted key -> value."""

    label: str
    values: dict[str, Any]
    seeds: list[int]


def _points(path: Path, content: dict[str, Any], seeds: list[int]) -> list[Point]:
    """Each point combined with each grid point; one empty point where there is none."""
    grid = _mapping(path, "grid", content.get("grid"))
    _overrides(path, "grid", grid)
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid.{key} must be a list of values, got {values!r}")
    points = content.get("points", [{}])
    if not isinstance(points, list) or not points:
        raise ConfigError(f"{path}: points must be a list of mappings, got {points!r}")
    _bounded(path, "points of grid and points", len(points) * math.prod(map(len, grid.values())))
    result = []
    for number, given in enumerate(points):
        own = dict(_mapping(path, f"points[{number}]", given))
        own_seeds = _seeds(path, f"points[{number}].seeds", own.pop("seeds", seeds))
        label = own.pop("label", None)
        values = _dotted(_overrides(path, f"points[{number}]", own))
        label = words(values) if label is None else _label(path, f"points[{number}].label", label)
        for combination in itertools.product(*grid.values()):
            chosen = dict(zip(grid, combination, strict=True))
            result.append(Point(" ".join(filter(None, (label, words(chosen)))), {**values, **chosen}, own_seeds))
    return result


class Model(NamedTuple):
    """Label, predecessor and overrides of a model; the options that it chooses among, dotted key -> value; one without
    values where it does not choose."""

    label: str
    after: str | None
    values: dict[str, Any]
    options: list[dict[str, Any]]

    @property
    def chooses(self) -> bool:
        return bool(self.options[0])


def _models(path: Path, entries: Any) -> Iterator[Model]:
    for model, given in _mapping(path, "models", entries).items():
        own = dict(_mapping(path, f"models.{model}", given))
        after = _predecessor(path, entries, model, own.pop("after", None))
        where = f"models.{model}.choose"
        choose = _dotted(_overrides(path, where, _mapping(path, where, own.pop("choose", None))))
        for key, values in choose.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"{path}: models.{model}.choose.{key} must be a list of values, got {values!r}")
        _bounded(path, f"combinations of models.{model}.choose", math.prod(map(len, choose.values())))
        options = [dict(zip(choose, values, strict=True)) for values in itertools.product(*choose.values())]
        yield Model(_label(path, "models", model), after, _overrides(path, f"models.{model}", own), options)


def _predecessor(path: Path, labels: dict[str, Any], model: str, after: str | None, key: str = "after") -> str | None:
    """The label `after`, which must be that of a model above `model`: no circle of models that wait for each other."""
    if after is None:
        return None
    earlier = [str(label) for label in labels]
    earlier = earlier[: earlier.index(str(model))]
    label = str(after)  # YAML has numbers where labels are digits
    _known(f"{path}: models.{model}.{key}", "model above it", [label], tuple(earlier))
    return label


def _attacker(path: Path, labels: dict[str, Any], model: str, attacker: str | None) -> str | None:
    """The label of the model's attacker; none for the attacker itself, whose white-box attacks are the same."""
    return None if attacker == model else _predecessor(path, labels, model, attacker, "evaluation.attacker")


def _typed(where: str, values: dict[str, Any]) -> Config:
    """The config of a cell, with types, network and loss checked before anything is trained."""
    try:
        settings = config.typed(values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    for key, value, allowed in (
        ("model.name", settings.model.name, models.MODELS),
        ("loss.kind", settings.loss.kind, objectives.OBJECTIVES),
    ):
        if key != "model.name" or not config.is_code(value):
            _known(f"{where}: {key}", "value", [value], tuple(allowed))
    return settings


def _bounded(path: Path, what: str, count: int) -> None:
    """Raises ConfigError for a number that nobody means, before so many are made."""
    if count > LARGEST:
        raise ConfigError(
            f"{path}: a sweep must have at most {LARGEST:,} {what}, got {count:,}; make several sweeps of it"
        )


def _mapping(path: Path, where: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {where} must be a mapping, got {value!r}")
    return value


def _label(path: Path, where: str, value: Any) -> str:
    """A name in a sweep file, which ends in tables, figures and names of folders; YAML has numbers where labels are
    made of digits."""
    label = str(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not is_label(label):
        quotes = "" if isinstance(value, str) else f" of the kind {type(value).__name__}: put it in quotes"
        raise ConfigError(f"{path}: a name in {where} must be {LABEL}, got {value!r}{quotes}")
    return label


def _overrides(path: Path, where: str, values: dict[str, Any]) -> dict[str, Any]:
    """`values` nested, after a look at its keys."""
    nested = _nested(values, f"{path}: {where}")
    config.check_keys(nested, f"{path}: {where}")
    return nested


def _known(where: str, what: str, given: Any, known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known) or 'none'}"
            raise ConfigError(f"{where}: unknown {what} {name!r}; {hint}")


def _nested(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """{"a.b": 1, "c": {"d": 2}} -> {"a": {"b": 1}, "c": {"d": 2}}. Raises ConfigError for a key of `where` that stands
    there twice, nested and dotted."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        value = _nested(value, f"{where}.{key}") if isinstance(value, dict) else value
        for part in reversed(str(key).split(".")):
            value = {part: value}
        if (twice := _common(result, value)) is not None:
            raise ConfigError(f"{where}: {twice} stands there twice, nested and dotted: leave one of them out")
        result = _merge(result, value)
    return result


def _common(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The dotted name of a value that both have, or None."""
    for key in one.keys() & other.keys():
        if not (isinstance(one[key], dict) and isinstance(other[key], dict)):
            return key
        if (below := _common(one[key], other[key])) is not None:
            return f"{key}.{below}"
    return None


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of _nested."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`low` with the entries of `high` in place of its own, recursively."""
    result = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merge(result[key], value) if both else value
    return result

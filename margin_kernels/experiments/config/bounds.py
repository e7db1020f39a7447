"""What the numbers of a config may be, told before anything is trained. Types and choices of words: reading.py."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import PurePath
from types import NoneType
from typing import Any, NamedTuple, get_args, get_type_hints

from .options import DATASETS, Config


class ConfigError(ValueError):
    """A config file or an override that does not fit; the message names the key and, for an unknown one, the close
    names."""


HUGE = 1e6  # a bound from here on is there so that numbers stay what they are: the other one is told alone


TEXT = "text in UTF-8 without NUL"
LABEL = "text without control characters, at most 255 bytes"


class Range(NamedTuple):
    """From `least` to `most`, these included unless `open` (then above `least`)."""

    least: float = -math.inf
    most: float = math.inf
    open: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float))
        return (value > self.least if self.open else value >= self.least) and value <= self.most

    def words(self, value: float) -> str:
        """What `value`, which is none of them, must be."""
        if self.most >= HUGE and value > self.most:
            return f"at most {self.most:g}"
        if self.most >= HUGE:
            return f"above {self.least:g}" if self.open else f"at least {self.least:g}"
        return f"in {'(' if self.open else '['}{self.least}, {self.most}]"


SHARE, NOT_NEGATIVE, POSITIVE = Range(0, 1), Range(0), Range(0, open=True)
MANY, SOME = Range(0, 1e9), Range(1, 1e9)  # of images and classes: more than any data set has
EPOCHS = Range(0, 1e6)
BATCH = Range(1, 1e6)  # images at a time
PROCESSES = Range(1, max(256, os.cpu_count() or 1))
LONGEST = 1000  # values in a list
TIMES = Range(1, 1e6)  # of what is done again and again: more never ends
RADIUS = Range(0, 1e30)  # of images in float32
WAIT = Range(1, 1e6)  # seconds
SEED = Range(0, 2**63 - 1)  # what torch's generators take
# Of every integer that is not named here MANY holds; every other number must be finite.
RANGES = {
    "data.validation_size": SOME,
    "data.size": Range(1, 4096),
    "data.train_fraction": Range(0, 1, open=True),
    "data.label_noise": SHARE,
    "data.seed": SEED,
    "model.dropout": Range(0, 1),
    "loss.cross_entropy_epochs": EPOCHS,
    "loss.gamma_factor": POSITIVE,
    "loss.label_smoothing": SHARE,
    "loss.soft_shift": Range(0, 1),
    "loss.top_k": SOME,
    "loss.sensitivity.top_k": SOME,
    "loss.adversarial.top_k": SOME,
    "loss.adversarial.max_iter": TIMES,
    "loss.adversarial_training.eps": RADIUS,
    "loss.adversarial_training.steps": TIMES,
    "loss.virtual_adversarial.eps": POSITIVE,
    "loss.virtual_adversarial.xi": Range(1e-8, 1e3),  # below it float32 has no divergence left
    "loss.virtual_adversarial.iterations": TIMES,
    "optimiser.lr": NOT_NEGATIVE,
    "optimiser.momentum": SHARE,
    "optimiser.weight_decay": NOT_NEGATIVE,
    "schedule.factor": NOT_NEGATIVE,
    "schedule.warmup": EPOCHS,
    "schedule.milestones": EPOCHS,
    "training.epochs": EPOCHS,
    "training.repeat": TIMES,
    "training.stop_at_train_accuracy": SHARE,
    "training.batch_size": BATCH,
    "training.accumulate": BATCH,
    "training.seed": SEED,
    "training.clip_norm": POSITIVE,
    "training.threads": PROCESSES,
    "evaluation.eps": RADIUS,
    "evaluation.curve": RADIUS,
    "evaluation.steps": TIMES,
    "evaluation.attack_samples": SOME,
    "evaluation.noise_samples": TIMES,
    "evaluation.batch_size": BATCH,
    "evaluation.deepfool_iterations": TIMES,
    "evaluation.timing_repeats": EPOCHS,
    "evaluation.deepfool_step_limit": POSITIVE,
    "evaluation.noise_sigmas": RADIUS,
    "evaluation.noise_seed": SEED,
}
NORM = Range(1)  # of every p, infinity included


def check(config: Config) -> None:
    """Raises ConfigError for the first number that makes no sense, by its dotted key, for a null where there must be a
    value, and for a name that is no name of a folder."""
    for key in nulls(config):
        raise ConfigError(f"{key} must have a value, got null")
    is_name = config.name not in (".", "..") and PurePath(config.name).name == config.name
    if not (is_name and is_label(config.name)):
        raise ConfigError(
            f"name must be the name of a folder, without separators and at most 255 bytes, got {config.name!r}"
        )
    for key, text in leaves(config):
        if isinstance(text, str) and not is_text(text):
            raise ConfigError(f"{key} must be {TEXT}, got {text!r}")
        if text == "":
            raise ConfigError(f"{key} must not be empty")
    check_named(config)
    for key, count in lengths(config):
        if count > LONGEST:
            raise ConfigError(f"{key} must have at most {LONGEST:,} values, got {count:,}")
    for key, value in numbers(config):
        is_norm = key.rsplit(".", 1)[-1] in ("p", "distance_p")
        if not (is_norm or math.isfinite(value)):
            raise ConfigError(f"{key} must be finite, got {value}")
        allowed = NORM if is_norm else RANGES.get(key, MANY if isinstance(value, int) else Range())
        if value not in allowed:
            raise ConfigError(f"{key} must be {allowed.words(value)}, got {value}")
    parts, images = config.training.accumulate, config.training.batch_size
    if parts > images:
        raise ConfigError(f"training.accumulate must be at most training.batch_size, {images}, got {parts}")


def check_named(config: Config) -> None:
    """Raises ConfigError for a data set that there is not, and for options of code where none is named."""
    for section, own in (("data", config.data), ("model", config.model)):
        check_plain(f"{section}.args", own.args)
        if own.args and ":" not in own.name:
            raise ConfigError(
                f"{section}.args are for code that {section}.name names, as in file.py:name, got {own.name!r}"
            )
    if ":" not in config.data.name and config.data.name not in DATASETS:
        raise ConfigError(
            f"data.name must be one of {', '.join(DATASETS)}, or code as package.module:make or file.py:make, got "
            f"{config.data.name!r}"
        )
    size = config.data.size
    if size is not None and config.data.name != "image_folder":
        raise ConfigError(f"data.size is for image_folder, got it with {config.data.name!r}")
    if isinstance(size, list) and len(size) != 2:
        raise ConfigError(f"data.size must be one number, or height and width, got {size}")


def check_plain(key: str, value: Any) -> None:
    """Raises ConfigError for what JSON and YAML do not keep as it is."""
    if isinstance(value, dict):
        for name, below in value.items():
            if not isinstance(name, str) or not is_label(name):
                raise ConfigError(f"a name in {key} must be {LABEL}, got {name!r}")
            check_plain(f"{key}.{name}", below)
    elif isinstance(value, list):
        for number, below in enumerate(value):
            check_plain(f"{key}[{number}]", below)
    elif isinstance(value, str):
        if value and not is_label(value):
            raise ConfigError(f"{key} must be {LABEL}, got {value!r:.100}")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be finite, got {value}")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{key} must be an integer of 64 bits, got one of {value.bit_length():,}")
    elif not isinstance(value, (int, float, NoneType)):
        raise ConfigError(
            f"{key} must be made of texts, numbers, true, false, null, lists and mappings, got {type(value).__name__}"
        )


def is_text(value: str) -> bool:
    """Whether files, their names and a terminal can hold a text."""
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return "\0" not in value


def is_label(value: str) -> bool:
    """Whether a page, a figure and the name of a file can show a text: no control characters, at most 255 bytes."""
    return value.strip() != "" and value.isprintable() and is_text(value) and len(value.encode()) <= 255


def nulls(section: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the fields that are None and must not be."""
    kinds = get_type_hints(type(section))
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from nulls(value, f"{prefix}{item.name}.")
        elif value is None and NoneType not in get_args(kinds[item.name]):
            yield prefix + item.name


def lengths(section: Any, prefix: str = "") -> Iterator[tuple[str, int]]:
    """(dotted key, number of values) of every list in a section."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from lengths(value, f"{prefix}{item.name}.")
        elif isinstance(value, (list, tuple)):
            yield prefix + item.name, len(value)


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in a section, those in lists one by one."""
    for item in dataclasses.fields(section):
        value = getattr(section, item.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield from ((prefix + item.name, one) for one in (value if isinstance(value, (list, tuple)) else [value]))


def numbers(section: Any) -> Iterator[tuple[str, float]]:
    """(dotted key, number) of every number in a section; True and False are none."""
    for key, value in leaves(section):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield key, value

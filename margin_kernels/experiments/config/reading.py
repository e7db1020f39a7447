"""Configs from YAML files, dotted overrides and records, and back. The resolved config is saved beside the results.

margin-kernels train --config mnist_large_margin_l2 --data-dir DIR --loss.gamma 2 --training.epochs 3
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import yaml

from .bounds import TEXT, ConfigError, check
from .options import GENERAL_OPTIONS, OPTIONS_OF_LOSS, Config

if TYPE_CHECKING:  # the networks and the data, which import this room, need no command line
    from jsonargparse import ArgumentError, ArgumentParser, Namespace

WORDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false", NoneType: "null"}
SECTIONS = {  # and the first option of each; jsonargparse would take a file or a mapping that nothing has checked
    name: dataclasses.fields(section)[0].name
    for name, section in get_type_hints(Config).items()
    if dataclasses.is_dataclass(section)
}
LARGEST = 1_000_000  # values in a YAML file
LARGEST_FILE = 1 << 26  # its bytes


def shipped() -> dict[str, Path]:
    """The config files that come with the package, by name."""
    return yaml_files("config")


def yaml_files(room: str) -> dict[str, Path]:
    """The YAML files in the folder `shipped` of a room of the experiments, by name."""
    folder = Path(str(resources.files("margin_kernels.experiments") / room / "shipped"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str) -> Path:
    """A path to a YAML file, or the name of a shipped one."""
    if Path(name).is_file():
        return Path(name)
    files = shipped()
    stem = Path(name).stem
    if stem in files and Path(name).name in (stem, stem + ".yaml"):
        return files[stem]
    if "/" in name and stem in files and Path(name).parent.name == "configs":
        return files[stem]
    raise ConfigError(f"--config {name}: no such file, and not one of the shipped configs: {', '.join(files)}")


class Loader(yaml.SafeLoader):
    """yaml's safe loader, and each key of a mapping once: yaml itself takes the last one without a word."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":  # any other key is refused when it is built
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the key {key.value!r} stands twice in one mapping", key.start_mark
                    )
                seen.add(key.value)
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty one. Raises ConfigError with file and line where it holds no such."""
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ConfigError(f"{path} must have at most {LARGEST_FILE:,} bytes, got {size:,}")
    try:
        loader = Loader(path.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        at = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ConfigError(f"{path}{at}: not YAML: {error.problem or error}") from None
    except Exception as error:  # tags with values of another kind: yaml raises any type
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        count = _expanded(content, {})
        if count <= LARGEST:
            json.dumps(content, skipkeys=True, default=str, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{path} must be {TEXT}, got {error.object[error.start]!r}") from None
    except RecursionError:
        raise ConfigError(f"{path}: an anchor stands within what it names") from None
    except ValueError:  # Python writes no integer of more than 4300 digits, and reads hexadecimal ones of any length
        raise ConfigError(f"{path} must hold integers of at most 4,300 digits, got a longer one") from None
    if count > LARGEST:
        raise ConfigError(f"{path} must stand for at most {LARGEST:,} values, got {count:,} by its anchors")
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must be a mapping of keys to values, got {type(content).__name__}")
    return content


def _expanded(value: Any, seen: dict[int, int | None]) -> int:
    """How many values there are in a YAML file when each alias is replaced by what it names."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in seen:
        seen[id(value)] = None
        below = value.values() if isinstance(value, dict) else value
        seen[id(value)] = 1 + sum(_expanded(one, seen) for one in below)
    count = seen[id(value)]
    if count is None:  # it is being counted
        raise RecursionError
    return count


def add_arguments(parser: ArgumentParser) -> None:
    """--config, and one dotted option per field of Config."""
    parser.add_class_arguments(Config, None, help="The run")
    refused = {f"--{section}" for section in _sections(Config)}  # --data FILE and its like
    for action in parser._actions:
        if not refused.isdisjoint(action.option_strings):
            action.help = argparse.SUPPRESS
    parser.add_argument("--config", action="config", help="a YAML file, or the name of a shipped config")


def _sections(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of the dataclasses in a config."""
    for name, kind in get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            yield prefix + name
            yield from _sections(kind, f"{prefix}{name}.")  # type: ignore[arg-type]


def keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all fields."""
    names = []
    for item in dataclasses.fields(cls):
        default = item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        nested = dataclasses.is_dataclass(default)
        names += keys(type(default), f"{prefix}{item.name}.") if nested else [prefix + item.name]
    return names


def is_key(name: str) -> bool:
    """Whether a dotted name is that of a field, or of a keyword below one that takes any."""
    return name in keys() or name.startswith(tuple(f"{key}." for key in keys() if key.endswith(".args")))


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted name; None of a keyword that is not given."""
    found: Any = to_dict(config)
    for part in key.split("."):
        found = None if found is None else found.get(part)
    return found


def check_keys(given: dict[str, Any], where: str, prefix: str = "") -> None:
    """Raises ConfigError for a key of `given` that no field has, with the closest field names."""
    known = keys()
    for key, value in given.items():
        name = prefix + str(key)
        if isinstance(value, dict) and any(k.startswith(name + ".") for k in known):
            check_keys(value, where, name + ".")
        elif name not in known:
            raise ConfigError(f"{where}: unknown key {name!r}; {_suggestion(name, known)}")


def check_whole(path: Path) -> None:
    """Raises ConfigError where the file is not all of what to_yaml writes: the rest would silently be defaults."""
    values = read_yaml(path)
    check_keys(values, str(path))
    lacking = [key for key in keys() if not _has(values, key.split("."))]
    if lacking or not path.read_text(encoding="utf-8").endswith("\n"):
        raise ConfigError(
            f"{path} must have every key of a config, as `margin-kernels train` writes it; it is cut off or of an "
            f"earlier version, without {', '.join(lacking[:3]) or 'its end'}{', ...' if len(lacking) > 3 else ''}: "
            "`margin-kernels train` with the same options and --resume writes it again"
        )


def _has(values: Any, key: list[str]) -> bool:
    return not key or (isinstance(values, dict) and key[0] in values and _has(values[key[0]], key[1:]))


def _suggestion(name: str, known: list[str]) -> str:
    leaf = name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    close += [k for k in known if k.rsplit(".", 1)[-1] == leaf and k not in close]
    return f"did you mean {' or '.join(close)}?" if close else f"known keys: {', '.join(known)}"


def from_namespace(namespace: Namespace) -> Config:
    """The typed config of a parsed namespace. Raises ConfigError for numbers that make no sense."""
    config: Config = _build(Config, namespace.as_dict())
    check(config)
    return config


def _build(cls: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass cls from a nested dict that may hold more than its fields."""
    given = {}
    for item in dataclasses.fields(cls):
        if item.name not in values:
            continue
        value = values[item.name]
        nested = isinstance(value, dict) and dataclasses.is_dataclass(item.default_factory)
        given[item.name] = _build(item.default_factory, value) if nested else value  # type: ignore[arg-type]
    return cls(**given)


def parse(arguments: list[str]) -> Config:
    """Config from command-line style arguments: `["--config", "x.yaml", "--loss.gamma", "2"]`. Raises ConfigError."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return from_namespace(parse_with(parser, arguments))


def parse_with(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parses with `parser` (of add_arguments); resolves shipped config names; unknown keys raise ConfigError with
    close names."""
    from jsonargparse import ArgumentError

    arguments = _with_config_paths(arguments)
    for option in arguments:
        match = re.match(r"--([a-z_]+\.[\w.]+)", option)
        section = option.partition("=")[0].removeprefix("--")
        if section in SECTIONS and option.startswith("--"):
            raise ConfigError(f"--{section} must name one of its options, as in --{section}.{SECTIONS[section]}")
        if match and not is_key(match[1]):
            raise ConfigError(f"command line: unknown key {match[1]!r}; {_suggestion(match[1], keys())}")
    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        raise ConfigError(_sentence(error)) from None


def _with_config_paths(arguments: list[str]) -> list[str]:
    """`--config NAME` and `--config=NAME` with NAME replaced by the file's path, after its keys were checked."""
    result = []
    previous = ""
    for argument in arguments:
        prefix, value = ("--config=", argument[9:]) if argument.startswith("--config=") else ("", argument)
        if prefix or previous == "--config":
            path = find(value)
            content = read_yaml(path)
            if not content:
                raise ConfigError(f"{path} must be a mapping of keys to values, got nothing")
            check_keys(content, str(path))
            argument = prefix + str(path)
        result.append(argument)
        previous = argument
    return result


def typed(values: dict[str, Any]) -> Config:
    """Config from a nested dict as a YAML file holds it: keys and types are checked. Raises ConfigError."""
    from jsonargparse import ArgumentError

    check_keys(values, "config")
    try:
        return from_namespace(_parser().parse_object(values))
    except ArgumentError as error:
        raise ConfigError(_sentence(error)) from None


def _sentence(error: ArgumentError) -> str:
    """What jsonargparse says on several lines, in one: "KEY must be KIND, got VALUE" for a value of another kind."""
    text = str(error)
    key = re.search(r'Parser key "([\w.]+)":(?![\s\S]*Parser key)', text)
    value = re.findall(r"(?:Got|Given) value: (.*)", text)
    if key is None or not value or key[1] not in (kinds := _kinds(Config)):
        return " ".join(text.split())
    return f"{key[1]} must be {kinds[key[1]]}, got {value[-1]}"


def _kinds(cls: type, prefix: str = "") -> dict[str, str]:
    """Dotted key -> what it may be, in words."""
    found: dict[str, str] = {}
    for name, kind in get_type_hints(cls).items():
        nested = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        found |= _kinds(kind, f"{prefix}{name}.") if nested else {prefix + name: _words(kind)}
    return found


def _words(kind: Any) -> str:
    if kind in WORDS:
        return WORDS[kind]
    below = [repr(one) if get_origin(kind) is Literal else _words(one) for one in get_args(kind)]
    if get_origin(kind) is dict:
        return "a mapping"
    if get_origin(kind) is list:
        return f"a list of {below[0].split(' ', 1)[-1]}s"
    return " or ".join((", ".join(below[:-1]), below[-1]) if len(below) > 1 else below)


@functools.cache
def _parser() -> ArgumentParser:
    """A parser of configs alone, made once: a sweep has hundreds of cells."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return parser


def to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict: what JSON and YAML store."""
    return dataclasses.asdict(config)


def own_options(config: Config) -> dict[str, Any]:
    """What a record keeps of a config: all but paths of the machine, and of the options of the loss those that it
    reads."""
    values = to_dict(config)
    for section, name in (("data", "dir"), ("model", "initial"), ("evaluation", "attacker")):
        del values[section][name]
    read = {*GENERAL_OPTIONS, *OPTIONS_OF_LOSS[config.loss.kind]}
    values["loss"] = {name: value for name, value in values["loss"].items() if name in read}
    return values


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of to_dict; unknown keys raise ConfigError."""
    check_keys(values, "config")
    return _build(Config, values)


def complete(values: dict[str, Any]) -> dict[str, Any]:
    """A stored config, perhaps of an earlier version, with the defaults of the fields that it lacks."""
    return to_dict(from_dict(values))


def to_yaml(config: Config) -> str:
    """YAML in the order of the dataclasses."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)

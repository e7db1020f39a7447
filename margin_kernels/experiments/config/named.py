"""Code that a config names: "package.module:name", or "folder/file.py:name" with a path from the working folder.

Only what the user named is imported, when it is needed. The working folder and that of a named file are searched after
everything that is installed. What the code raises is told with its own message and the line of the user's file.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from .bounds import ConfigError

PACKAGE = str(Path(__file__).resolve().parents[2])
# Frames below these are not the user's.
PLACES = ("stdlib", "purelib", "platlib")
NOT_THE_USERS = (PACKAGE + os.sep, "<frozen", *(sysconfig.get_path(name) + os.sep for name in PLACES))


def is_code(name: str) -> bool:
    """Whether a name is that of code."""
    return ":" in name


def called(key: str, name: str, arguments: dict[str, Any], offered: dict[str, Any]) -> Any:
    """What the code `name` of the option `key`.name returns, called with the keywords `arguments` of `key`.args, and
    with those of `offered` that its signature names. Raises ConfigError."""
    return called_by(f"{key}.name", f"{key}.args", name, arguments, offered)


def called_by(option: str, of: str, name: str, arguments: dict[str, Any], offered: dict[str, Any]) -> Any:
    """The same for an option of any name, with the one that holds the arguments."""
    function = _found(option, name)
    arguments = copy.deepcopy(arguments)  # the config's own
    with told(f"{option} {name}"):
        try:
            signature = inspect.signature(function)
        except ValueError:  # of some functions in C
            signature = None
    if signature is not None:
        named = {parameter.name for parameter in signature.parameters.values() if parameter.kind in NAMED}
        arguments = {**{word: value for word, value in offered.items() if word in named}, **arguments}
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise ConfigError(f"{of} must fit {name}{signature}, got {list(arguments)}: {error}") from None
    with told(f"{option} {name}"):
        return function(**arguments)


NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def takes(key: str, name: str, word: str) -> bool:
    """Whether the signature of the code names a keyword."""
    try:
        return word in inspect.signature(_found(f"{key}.name", name)).parameters
    except ValueError:
        return False


def text_digest(key: str, name: str) -> str | None:
    """A checksum of the file in which the code stands, or None where it stands in none."""
    path = getattr(sys.modules.get(_found(f"{key}.name", name).__module__ or ""), "__file__", None)
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@contextmanager
def told(what: str) -> Iterator[None]:
    """Raises ConfigError for whatever the user's code raises: its type, its message and its place."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SyntaxError):
            place = f"{error.filename}, line {error.lineno}"
            raise ConfigError(f"{what} raised {type(error).__name__}: {error.msg} ({place})") from error
        raise ConfigError(f"{what} raised {type(error).__name__}: {error} ({_place(error)})") from error


def _place(error: BaseException) -> str:
    """File and line of the last frame that is the user's, or of the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NOT_THE_USERS)]
    frame = (own or frames)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _found(key: str, name: str) -> Callable[..., Any]:
    where, _, path = name.rpartition(":")
    if not where or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f'{key} must be "package.module:name" or "file.py:name", got {name!r}')
    module = _file(key, Path(where)) if where.endswith(".py") else _module(key, where)
    found: Any = module
    for part in path.split("."):
        if not hasattr(found, part):
            names = [known for known in vars(found) if not known.startswith("_")]
            close = difflib.get_close_matches(part, names, n=3) or names[:10]
            raise ConfigError(f"{key}: {where} has no {path!r}; it has {', '.join(close) or 'nothing'}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{key} must name a class or a function, got {name}, a {type(found).__name__}")
    return found


def _module(key: str, name: str) -> ModuleType:
    _search(Path.cwd())
    try:
        with told(f"{key}: the import of {name}"):
            return importlib.import_module(name)
    except ConfigError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{name}.".startswith(f"{missing.name}."):
            raise ConfigError(
                f"{key}: no module {missing.name!r} is installed or lies in the working folder {Path.cwd()}; a file is "
                "named as in folder/file.py:name"
            ) from None
        raise


def _file(key: str, path: Path) -> ModuleType:
    """The module of a file, imported once for what the file holds."""
    if not path.is_file():
        raise ConfigError(f"{key}: {path} is no file; its path must be one from the working folder {Path.cwd()}")
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode() + b"\0" + path.read_bytes()).hexdigest()[:16]
    name = f"{path.stem}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    _search(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{key}: {path} must be a file of Python")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        with told(f"{key}: the import of {path}"):
            spec.loader.exec_module(module)
    except ConfigError:
        del sys.modules[name]
        raise
    return module


def _search(folder: Path) -> None:
    """Modules of a folder are found, after all others."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

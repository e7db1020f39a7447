"""`margin-kernels` where its extra is not installed: one sentence that says what to install."""

import argparse
import os
import re
import subprocess
import sys
import tomllib

import jsonargparse
import pytest
from support import ROOT

from margin_kernels import info
from margin_kernels.experiments import __main__ as command_line
from margin_kernels.experiments import config, sweeps
from margin_kernels.experiments.cli import commands

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REMEDY = 'pip install "margin_kernels[experiments]"'


def test_without_the_extra_the_command_line_says_what_to_install(tmp_path):
    (tmp_path / "jsonargparse.py").write_text("raise ModuleNotFoundError(name='jsonargparse')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-m", "margin_kernels.experiments", "--help"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"margin-kernels: jsonargparse is not installed; the command line needs an extra: {REMEDY}")


def missing(name):
    def run(arguments):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    return run


def test_a_package_of_the_extra_that_one_command_imports_is_named(monkeypatch, capsys):
    monkeypatch.setattr("margin_kernels.experiments.cli.main", missing("matplotlib.figure"))
    assert command_line.main(["report"]) == 1
    assert capsys.readouterr().err.startswith("margin-kernels: matplotlib.figure is not installed;")


def test_any_other_missing_module_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("margin_kernels.experiments.cli.main", missing("margin_kernels.nothing"))
    with pytest.raises(ModuleNotFoundError, match=r"margin_kernels\.nothing"):
        command_line.main([])


def test_with_the_extra_the_command_runs(capsys):
    assert command_line.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: margin-kernels COMMAND")


class Parsed(Exception):
    """What a command's parser looked like when it was to read its arguments."""


def options_of(command, monkeypatch):
    """The options that a command shows: (flags, help)."""

    def stop(parser, *given, **options):
        raise Parsed(parser)

    for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):
        monkeypatch.setattr(kind, "parse_args", stop)
    with pytest.raises(Parsed) as caught:
        commands.run_command(command, [])
    (parser,) = caught.value.args
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return [(action.option_strings or [action.dest], action.help) for action in shown]


@pytest.mark.parametrize("command", commands.COMMANDS)
def test_no_option_is_without_help(command, monkeypatch):
    options = options_of(command, monkeypatch)
    without = [flags for flags, text in options if not text or len(text) < 5 or text == "Path to a configuration file."]
    assert not without
    if command == "train":
        flags = {flag for names, _ in options for flag in names}
        assert {f"--{key}" for key in config.keys()} <= flags  # noqa: SIM118 (no mapping)
        assert "--loss.sensitivity" not in flags and "--data" not in flags  # which are refused


def test_every_command_is_in_the_usage():
    assert set(re.findall(r"^  (\w+)  ", commands.USAGE, re.MULTILINE)) == set(commands.COMMANDS)
    assert str(commands.__doc__).partition(": ")[2].partition(".")[0].split(" | ") == list(commands.COMMANDS)


def test_info_is_that_of_the_library_and_the_shipped_files(capsys):
    assert command_line.main(["info"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("\n".join(info.lines()) + "\n\n")
    assert text.splitlines()[-2:] == [
        f"configs        {', '.join(config.shipped())}",
        f"sweeps         {', '.join(sweeps.shipped())}",
    ]


def test_the_script_and_the_names_of_the_extra_are_those_of_pyproject():
    assert PROJECT["scripts"] == {"margin-kernels": "margin_kernels.experiments.__main__:main"}
    modules = {"scikit-learn": "sklearn", "PyYAML": "yaml"}
    extra = {re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["optional-dependencies"]["experiments"]}
    assert {modules.get(name, name) for name in extra} == set(command_line.EXTRA)

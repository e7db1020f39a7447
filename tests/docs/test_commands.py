"""The commands that the pages print are commands: their options, configs, sweeps and budgets exist."""

import contextlib
import fnmatch
import io
import re
import shlex
from functools import cache
from itertools import pairwise

import pytest
from support import ROOT

from margin_kernels.experiments import cli, config, sweeps

PAGES = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks" / "results").rglob("README.md")]
LINE = re.compile(r"^    (?:\.venv/bin/)?margin-kernels (.+)$", re.MULTILINE)
PRINTED = sorted({line for page in PAGES for line in LINE.findall(page.read_text())})


@cache
def flags(command: str) -> str:
    """What `margin-kernels COMMAND --help` says."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return text.getvalue()


def test_there_are_commands():
    assert len(PRINTED) > 25


@pytest.mark.parametrize("line", PRINTED)
def test_a_printed_command_can_be_given(line):
    command, *rest = shlex.split(line, comments=True)
    names = [word.partition("=")[0] for word in rest if word.startswith("--")]
    for name in names:
        key = name.removeprefix("--")
        known = re.search(rf"{re.escape(name)}\b", flags(command)) is not None
        assert known or (command == "train" and (config.is_key(key) or ".args." in key)), name
    if command == "sweep":
        assert rest[0] in sweeps.shipped()
    for option, value in pairwise(rest):
        if option == "--config":
            assert value in config.shipped() or value.endswith(".yaml")
        if option == "--budget":
            assert sweeps.read(sweeps.shipped()[rest[0]], value)


def test_patterns_of_cells_name_the_models_that_the_page_promises():
    """papers.md: cross-entropy and the four large margin models in l2 and linf."""
    (line,) = [line for line in PRINTED if "--cells" in line]
    words = shlex.split(line, comments=True)
    patterns = words[words.index("--cells") + 1 :]
    cells = sweeps.read(sweeps.shipped()[words[1]], "cpu")
    chosen = {cell.model for cell in cells if any(fnmatch.fnmatch(cell.name, pattern) for pattern in patterns)}
    assert chosen == {
        "cross-entropy",
        *(f"large margin {p} {where}" for p in ("l2", "linf") for where in ("input", "all")),
    }

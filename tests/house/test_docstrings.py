"""Docstrings speak one dialect, Google's: sections with entries `name: text`."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
FILES = sorted((ROOT / "margin_kernels").rglob("*.py"))
SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "Yields:")
# `name   text` at the margin of a docstring, and the headings of other dialects.
FOREIGN = re.compile(r"^(?:\w+(?:, \w+)*  +[^=\s].*|:param .*|:returns?:.*|Parameters|Arguments:|Example:)$")


def docstrings(source: str) -> dict[str, str]:
    """Name of a class or function -> its docstring without indentation."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found[node.name] = ast.get_docstring(node) or ""
    return found


def foreign_lines(docstring: str) -> list[str]:
    return [line for line in docstring.splitlines() if FOREIGN.match(line)]


def entries_without_text(docstring: str) -> list[str]:
    """First lines of sections that are not `name: text` (Returns may be plain text)."""
    lines = docstring.splitlines()
    wrong = []
    for section, entry in pairwise(lines):
        if section in SECTIONS and section not in ("Returns:", "Yields:"):
            fits = re.match(r"^    \*{0,2}[\w., ]+(?: \([^)]*\))?: \S", entry)
            wrong += [] if fits else [entry]
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_in_googles_dialect(path):
    for name, docstring in docstrings(path.read_text()).items():
        assert foreign_lines(docstring) == [], name
        assert entries_without_text(docstring) == [], name


def test_another_dialect_is_seen():
    assert foreign_lines("A sum.\n\nx   the first term\ny   the second\n") == ["x   the first term", "y   the second"]
    assert foreign_lines("A sum.\n\n    x = y + z   in units of x\n") == []
    assert entries_without_text("A sum.\n\nArgs:\n    the terms\n") == ["    the terms"]
    assert entries_without_text("A sum.\n\nArgs:\n    x: the terms\n") == []

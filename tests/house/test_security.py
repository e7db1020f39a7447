"""No reader executes or unpickles what it reads: what SECURITY.md says."""

import ast
import io
import os
from pathlib import Path

import pytest
import torch
from support import ROOT

from margin_kernels.experiments import __main__ as command_line
from margin_kernels.experiments.results import sealed

PACKAGE = ROOT / "margin_kernels"
# module -> the functions that run or rebuild anything that a file names
UNSAFE = {
    "pickle": {"load", "loads", "Unpickler"},
    "yaml": {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"},
    "builtins": {"eval", "exec"},
    "os": {"system", "popen"},
}


UNSAFE_LOADERS = {"Loader", "FullLoader", "UnsafeLoader", "CLoader", "CFullLoader", "CUnsafeLoader"}  # of yaml


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def calls(tree):
    """(module, function, call) of every call of a plain name or of an attribute of one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield "builtins", node.func.id, node
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            yield node.func.value.id, node.func.attr, node


def test_no_file_of_the_package_calls_what_executes_a_file():
    loads = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        named = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not named & {f"yaml.{name}" for name in UNSAFE_LOADERS}, path
        for module, function, call in calls(tree):
            assert function not in UNSAFE.get(module, ()), f"{path}:{call.lineno}"
            if (module, function) == ("torch", "load"):
                loads += 1
                safe = {word.arg: ast.unparse(word.value) for word in call.keywords}
                assert safe.get("weights_only") == "True", f"{path}:{call.lineno}"
    assert loads == 1  # checkpoint.pt alone


def test_a_checkpoint_that_names_a_function_is_refused_and_not_run(tmp_path, capsys):
    content = io.BytesIO()
    torch.save({"epoch": Bomb(tmp_path / "ran")}, content)
    (tmp_path / "checkpoint.pt").write_bytes(sealed(content.getvalue()))
    arguments = ["train", "--config", "digits_cross_entropy", "--out", str(tmp_path), "--resume"]
    assert command_line.main(arguments) == 1
    assert "checkpoint.pt: not a readable checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("command", [["train", "--config"], ["sweep", "--dry-run"]])
def test_a_yaml_file_that_names_a_function_is_refused_and_not_run(tmp_path, capsys, command):
    file = tmp_path / "file.yaml"
    file.write_text(f"name: !!python/object/apply:os.mkdir [{str(tmp_path / 'ran')!r}]\n")
    assert command_line.main([*command, str(file)]) == 1
    assert "python/object/apply:os.mkdir" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file.yaml"]


def test_a_config_cannot_name_a_class(tmp_path, capsys):
    file = tmp_path / "file.yaml"
    file.write_text(f"loss:\n  class_path: os.mkdir\n  init_args: {{path: {tmp_path / 'ran'}}}\n")
    assert command_line.main(["train", "--config", str(file)]) == 1
    assert "unknown key 'loss.class_path'" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["file.yaml"]


def test_every_promise_about_kills_and_full_disks_names_a_test_that_exists():
    text = (ROOT / "SECURITY.md").read_text()
    table = text.partition("## What a kill")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][2:]
    trees = [ast.parse(path.read_text()) for path in (ROOT / "tests/experiments").glob("test_*.py")]
    tests = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = [{name.strip().strip("`") for name in row[3].split(",")} for row in rows]
    assert len(rows) >= 13 and all(named)
    assert set().union(*named) <= tests

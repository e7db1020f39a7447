"""The files of examples/ run as their docstrings say."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LONGEST = 60  # lines
# Examples in other libraries -> what they import.
LIBRARIES = {
    "hf_train.py": ("transformers", "accelerate"),
    "lightning_train.py": ("lightning", "torchmetrics"),
    "timm_train.py": ("timm",),
}
PROCESSES = [ROOT / "examples" / name for name in ("ddp_train.py", "fsdp_train.py")]
# Examples in one process -> what the numbers of their output show.
ALONE: dict[str, Callable[[str], bool]] = {
    "deepfool_evaluation.py": lambda out: all(
        ce < robust
        for ce, robust in zip(*(numbers(out, name) for name in ("cross-entropy: ", "robust preset: ")), strict=True)
    ),
    "hidden_taps.py": lambda out: len(set(re.findall(r"(\d+\.\d{5}) (?:in a task|by hand)", out))) == 1,
    "margin_monitor.py": lambda out: len(medians(out)) == 10 and medians(out)[-1] > 1 > 0 > medians(out)[0],
    "own_loop.py": lambda out: min(float(value) for value in re.findall(r"accuracy ([\d.]+)", out)[-3:]) > 0.93,
    "vit_train.py": lambda out: "strategy    split" in out and losses(out)[-1] < 0.3 * losses(out)[0],
}


def numbers(out: str, name: str) -> list[float]:
    """The numbers of the line that begins with a name."""
    (line,) = [line for line in out.splitlines() if line.startswith(name)]
    return [float(value) for value in re.findall(r"[\d.]+", line.removeprefix(name))]


def medians(out: str) -> list[float]:
    """Of the first layer, in each epoch."""
    return [float(line.split()[7]) for line in out.splitlines() if line.startswith("1 ")]


def losses(out: str) -> list[float]:
    return [float(value) for value in re.findall(r": loss ([\d.]+)", out)]


def test_there_are_examples_and_each_is_short():
    assert [path.name for path in EXAMPLES] == sorted([*(path.name for path in PROCESSES), *ALONE, *LIBRARIES])
    assert all(len(path.read_text().splitlines()) < LONGEST for path in EXAMPLES)


def output_of(path: Path, program: str, *options: str, **environment: str) -> str:
    """What an example prints that runs as its docstring says, by `program` in a line of its own: Python with these
    options. Its last line tells a test error below 15 %."""
    (line,) = re.findall(rf"^    {program} (.*)$", path.read_text(), re.MULTILINE)
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-P", *options, *line.split()]
    found = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240, check=False)
    assert found.returncode == 0, found.stderr
    assert float(re.fullmatch(r"test error ([\d.]+)%", found.stdout.splitlines()[-1])[1]) < 15
    return found.stdout


@pytest.mark.parametrize("path", PROCESSES, ids=lambda path: path.name)
def test_an_example_of_several_processes_runs_as_its_docstring_says(path):
    *epochs, _ = output_of(path, "torchrun", "-m", "torch.distributed.run", "--standalone").splitlines()
    errors = [float(re.search(r"error ([\d.]+)%", text)[1]) for text in epochs]
    assert len(epochs) == 15 and errors[-1] < 2 < errors[0]  # each epoch is told once


@pytest.mark.parametrize("name", ALONE)
def test_an_example_in_one_process_runs_as_its_docstring_says(name):
    out = output_of(ROOT / "examples" / name, "python")
    assert ALONE[name](out), out


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_example_in_another_library_runs_as_its_docstring_says(name):
    for package in LIBRARIES[name]:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    output_of(ROOT / "examples" / name, "python", HF_HUB_OFFLINE="1")

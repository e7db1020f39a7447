"""The files of examples/ run as their docstrings say."""

import os
import re
import subprocess
import sys

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
PROCESSES = [path for path in EXAMPLES if path.name not in LIBRARIES]


def test_there_are_examples_and_each_is_short():
    assert [path.name for path in EXAMPLES] == sorted(["ddp_train.py", "fsdp_train.py", *LIBRARIES])
    assert all(len(path.read_text().splitlines()) < LONGEST for path in EXAMPLES)


@pytest.mark.parametrize("path", PROCESSES, ids=lambda path: path.name)
def test_an_example_runs_as_its_docstring_says(path):
    (line,) = re.findall(r"^    torchrun (.*)$", path.read_text(), re.MULTILINE)
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", *line.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert found.returncode == 0, found.stderr
    *epochs, last = found.stdout.splitlines()
    errors = [float(re.search(r"error ([\d.]+)%", text)[1]) for text in epochs]
    assert len(epochs) == 15 and errors[-1] < 2 < errors[0]  # each epoch is told once
    assert float(re.fullmatch(r"test error ([\d.]+)%", last)[1]) < 15


@pytest.mark.parametrize("name", LIBRARIES)
def test_an_example_in_another_library_runs_as_its_docstring_says(name):
    for package in LIBRARIES[name]:
        pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    (line,) = re.findall(r"^    python (.*)$", (ROOT / "examples" / name).read_text(), re.MULTILINE)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", *line.split()]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert found.returncode == 0, found.stderr
    last = found.stdout.splitlines()[-1]
    assert float(re.fullmatch(r"test error ([\d.]+)%", last)[1]) < 15

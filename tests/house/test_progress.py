"""The progress of a long test is seen while it runs, and only where one process runs the tests."""

import os
import re
import subprocess
import sys

import pytest
from support import ROOT

LONG = """
import conftest

def test_long(progress, monkeypatch):
    monkeypatch.setattr(conftest, "PROGRESS_SECONDS", 0)
    for _ in range(3):
        progress(3)
    print("captured")
"""


@pytest.mark.parametrize("processes", ["0", "1"])
def test_a_line_for_each_case_passes_the_capture_but_not_a_worker_of_xdist(processes, tmp_path):
    (tmp_path / "test_long.py").write_text(LONG)
    options = f"-p conftest -p no:cacheprovider -n {processes}".split()
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    run = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    cases = re.findall(r"(?m)^case (\d) of 3, \d+ s$", run.stdout)
    assert cases == (["1", "2", "3"] if processes == "0" else [])
    assert "1 passed" in run.stdout and "captured" not in run.stdout

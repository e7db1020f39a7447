"""benchmarks/run_gpu.sh, as far as it can be looked at without a GPU: its limits, its stages, what it leaves.

`DEVICE=cpu bash benchmarks/run_gpu.sh FOLDER` is the dry run: every stage in small.
"""

import io
import json
import re
import subprocess
import sys
import tarfile

import pytest
import tables
from support import ROOT

SCRIPT = ROOT / "benchmarks" / "run_gpu.sh"
TEXT = SCRIPT.read_text()
STAGES = {name: int(limit) for name, limit in re.findall(r"^stage (\w+) (\d+) ", TEXT, re.MULTILINE)}
PARTS = {int(part): names.split() for part, names in re.findall(r'\[(\d)\]="([^"]+)"', TEXT)}
LONGEST = 560  # seconds that a command may take
# What a machine with a GPU may lack.
MISSING = ("jsonargparse", "rich", "foolbox", "sklearn", "docstring_parser", "mkdocs")
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({MISSING!r})); "
WITHOUT += f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); "


def test_the_limits_of_a_command_add_up_to_less_than_it_may_take():
    assert set(PARTS) == {1, 2} and {name for names in PARTS.values() for name in names} == set(STAGES)
    for names in PARTS.values():
        assert 100 < sum(STAGES[name] for name in names) < LONGEST


def test_the_build_comes_first_and_the_tests_before_the_sanitizers_and_the_times():
    assert PARTS[1] == ["build", "cuda", "triton", "memcheck", "racecheck", "kernels"]
    assert list(STAGES)[: len(PARTS[1])] == PARTS[1] and PARTS[2][0] == "build"


@pytest.mark.parametrize("module", ["step", "losses", "kernels_gpu"])
def test_what_a_stage_runs_can_be_imported_without_the_experiments_extra(module):
    code = f"{WITHOUT} import {module}; print({module}.__doc__[:5])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and len(found.stdout) == 6, found.stderr


def test_losses_are_timed_on_drawn_images_where_there_are_no_digits():
    code = f"{WITHOUT} import losses; x, y = losses.digits(20); "
    code += "print(losses.WITH_DIGITS, tuple(x.shape), y.tolist()[:11])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False (20, 1, 28, 28) [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0]"


@pytest.mark.parametrize(
    ("environment", "words"), [({"STAGES": "nothing"}, "{"), ({"PART": "3"}, "the second argument must be 1 or 2")]
)
def test_a_command_ends_with_an_archive_or_with_a_sentence(tmp_path, environment, words):
    part = environment.pop("PART", "1")
    command = ["bash", str(SCRIPT), str(tmp_path), part]
    path = f"{ROOT}/.venv/bin:/usr/bin:/bin"
    run = subprocess.run(
        command,
        env=environment | {"DEVICE": "cpu", "PYTHON": sys.executable, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert words in run.stdout + run.stderr
    assert (tmp_path / "results.tar").is_file() == (part == "1")


def archive(path, files):
    with tarfile.open(path, "w") as to:
        for name, content in files.items():
            data = json.dumps(content).encode() if name.endswith(".json") else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            to.addfile(member, io.BytesIO(data))
    return path


def test_the_tables_of_an_archive_are_printed_also_of_a_run_that_was_stopped(tmp_path):
    row = {"op": "one_to_n", "n": 4096, "what": "cuda", "microseconds": 21.25, "share_of_copy": 0.57, "to_eager": 0.5}
    launches = {"op": "margin_hinge", "what": "cuda", "launches_forward": 1, "launches_forward_backward": 3}
    step = {"loss": "1-to-N", "order": 1, "k": None, "taps": "", "passes": "", "to_cross_entropy": 1.25}
    step |= {"floor_to_cross_entropy": 1.0, "milliseconds": 4.0, "to_floor": 1.25, "flops_to_cross_entropy": 1.0}
    step |= {"memory_to_cross_entropy": 1.0, "number_of_passes": 3, "auto": False}
    network = {"network": "vit_b16", "threads": 1, "steps": [step], "batch": 64, "dtype": "bfloat16"}
    network |= {"channels_last": True, "device": "cuda"}
    files = {
        "summary_1.json": {"build": {"exit": 0, "seconds": 61}, "cuda": {"exit": 124, "seconds": 80}},
        "kernels_gpu.json": {"rows": [row, launches], "failures": {"dual_norm": "RuntimeError: out of memory"}},
        "step_gpu.json": {"networks": [network]},
        "cuda.log": b"text",
    }
    found = tables.read(archive(tmp_path / "results.tar", files))
    assert "| cuda | 124 | 80 |" in found["summary_1"]
    assert "| op one_to_n, n 4096 | cuda | 21.2 | 57 | 0.50 eager | - |" in found["kernels_gpu"]
    assert "| op margin_hinge | cuda | - | - | - | 1 / 3 |" in found["kernels_gpu"]
    assert found["kernels_gpu"].endswith("dual_norm: RuntimeError: out of memory")
    assert "| 1-to-N | 1.25 (1.00) |" in found["step_gpu/ratios"]

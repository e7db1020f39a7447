"""A disk that is full: a sentence, nothing half written, and the same command goes on where there is more room."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from support import ROOT
from support.command_line import COMMAND

from margin_kernels.experiments import cli
from margin_kernels.experiments.results import Records

SHAPE = "data: {train_fraction: 0.1}, training: {epochs: 1, distance_samples: 8, threads: 1}, "
SHAPE += "evaluation: {attack_samples: 5, deepfool_samples: 2, distance_samples: 2, timing_repeats: 0, curve: [0.1]}"
# of DISK, SIZE, FROM and KEPT; the disk is gone with the process, so what lies on it is copied at the end
MOUNTED = """
mount -t tmpfs -o size="$2" tmpfs "$1" || exit 77
if [ -n "$3" ]; then cp -a "$3" "$1/run" || exit 78; fi
disk=$1 kept=$4; shift 4; "$@"; status=$?
cp -a "$disk/." "$kept"; exit $status
"""


def on_a_disk(tmp_path, size, arguments, before=""):
    """Runs a command with a disk of `size` bytes at tmp_path/disk; what lies there afterwards is in tmp_path/kept."""
    for name in ("disk", "kept"):
        (tmp_path / name).mkdir()
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here: a disk of a given size cannot be mounted")
    mounted = ["unshare", "-rm", "sh", "-c", MOUNTED, "sh", "disk", str(size), str(before), "kept"]
    ended = subprocess.run([*mounted, *COMMAND, *arguments], cwd=tmp_path, capture_output=True, text=True)
    if ended.returncode == 77 or "unshare:" in ended.stderr:
        pytest.skip(f"a disk of a given size cannot be mounted here: {ended.stderr.strip()}")
    return ended


def assert_told(ended):
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "No space left on device; free some space and run the same command again" in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr


def assert_nothing_half(folder):
    """Every file that is there is whole, and none is unfinished."""
    for path in Path(folder).rglob("*"):
        assert not path.name.endswith(".tmp"), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix in (".png", ".html"):
            end = b"IEND\xaeB`\x82" if path.suffix == ".png" else b"</html>"
            assert path.read_bytes().rstrip().endswith(end), path


def test_a_run_keeps_its_checkpoint(tmp_path):
    (tmp_path / "c.yaml").write_text(f"{{{SHAPE}}}\n")
    train = ["train", "--config", str(tmp_path / "c.yaml")]
    assert cli.main([*train, "--out", str(tmp_path / "run")]) == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    room = sum(-(-path.stat().st_size // 4096) * 4096 for path in (tmp_path / "run").rglob("*") if path.is_file())
    more = [*train, "--training.epochs", "2", "--resume"]
    ended = on_a_disk(tmp_path, room + len(before) // 2, [*more, "--out", "disk/run"], tmp_path / "run")
    assert_told(ended)
    assert_nothing_half(tmp_path / "kept")
    assert (tmp_path / "kept" / "run" / "checkpoint.pt").read_bytes() == before
    assert cli.main([*more, "--out", str(tmp_path / "kept" / "run")]) == 0
    assert len(json.loads((tmp_path / "kept" / "run" / "run.json").read_text())["history"]) == 2


def test_a_sweep_goes_on_from_its_records(tmp_path):
    """Room for a cell of a small network and not for one of a large one: the record of the first survives, byte for
    byte, and the same command trains the second alone."""
    (tmp_path / "s.yaml").write_text(f"base: {{{SHAPE}}}\nmodels: {{small: {{}}, large: {{model.name: mlp800}}}}\n")
    sweep = ["sweep", str(tmp_path / "s.yaml")]
    ended = on_a_disk(tmp_path, 2**21, [*sweep, "--out", "disk/out"])
    assert ended.returncode == 1 and "large__seed0 FAILED" in ended.stdout, ended.stdout + ended.stderr
    assert "No space left on device; free some space" in ended.stderr and "Traceback" not in ended.stderr
    assert_nothing_half(tmp_path / "kept")
    kept = Records(tmp_path / "kept" / "out" / "records.jsonl")
    assert [record.cell for record in kept.all()] == ["small__seed0"]
    before = kept.path.read_bytes()
    assert cli.main([*sweep, "--out", str(tmp_path / "kept" / "out")]) == 0
    assert [record.model for record in kept.all() if record.evaluation] == ["small", "large"]
    assert kept.path.read_bytes().startswith(before)
    assert not (tmp_path / "kept" / "out" / "cells" / "small__seed0").exists()


def test_a_report_is_whole_or_told(tmp_path):
    source = ROOT / "benchmarks/results/papers/sensitivity_mnist_mlp"
    ended = on_a_disk(tmp_path, 65536, ["report", str(source), "--out", "disk/report"])
    assert_told(ended)
    assert_nothing_half(tmp_path / "kept")
    assert not (tmp_path / "kept" / "report" / "index.html").exists()

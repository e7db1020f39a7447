"""The commands of the pages that need no data files of others run, in the order of the pages, and write what they say.

Each runs as it is printed, with options behind it that make a network of seconds of it.
"""

import re
import shlex
import shutil
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from support import ROOT
from support.command_line import SMALL

from margin_kernels.experiments import cli

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES += (ROOT / "benchmarks" / "results").rglob("README.md")
LINE = re.compile(r"^    (?:\.venv/bin/)?margin-kernels (.+)$", re.MULTILINE)
FEW = [
    *("--training.epochs", "2", "--evaluation.attack_samples", "20", "--evaluation.ifgsm_samples", "20"),
    *("--evaluation.deepfool_samples", "10", "--evaluation.distance_samples", "10", "--evaluation.timing_repeats", "1"),
]
TRAINED = ("config.yaml", "model.safetensors", "model.json", "run.json", "metrics.csv", "checkpoint.pt")
MINE = """
import torch
from torch import nn

def make(n=1000):
    x, y = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3
    return {"train": (x, y), "test": (x[:60], y[:60])}

class Net(nn.Module):
    hidden_taps = ("relu1",)

    def __init__(self, shape, classes, width=64):
        super().__init__()
        self.first, self.relu1 = nn.Linear(36, width), nn.ReLU()
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.relu1(self.first(x.flatten(1))))
"""
NETS = """
from torch import nn

class make(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer3, self.head = nn.Conv2d(3, 4, 3, 4), nn.Linear(256, 10)

    def forward(self, x):
        return self.head(self.layer3(x).relu().flatten(1))
"""


class Run(NamedTuple):
    """What stands behind a printed command, the files that it writes, and what it prints."""

    more: Sequence[str] = ()
    files: Sequence[str] = ()
    says: str = ""


TRAIN = [*SMALL, *FEW]
RUNS = {
    "train --config digits_cross_entropy --out runs/ce": Run(
        TRAIN, [f"runs/ce/{name}" for name in TRAINED], "next: margin-kernels evaluate runs/ce"
    ),
    "train --config digits_large_margin_l2 --out runs/l2": Run(
        TRAIN, [f"runs/l2/{name}" for name in TRAINED], "next: margin-kernels evaluate runs/l2"
    ),
    "evaluate runs/ce runs/l2": Run(
        files=["runs/ce/evaluation.json", "runs/l2/evaluation.json"], says="next: margin-kernels report runs/ce runs/l2"
    ),
    "report runs/ce runs/l2 --out report": Run(
        files=["report/index.html", "report/results.csv"], says="open report/index.html"
    ),
    "evaluate runs/l2 --attacker runs/ce --attack foolbox:LinfPGD": Run(
        ["--attack-samples", "10"], ["runs/l2/evaluation.json"], "LinfPGD, linf"
    ),
    "attack runs/l2 --attack ifgsm --eps 0.1": Run(files=["attacked/attacked.npz", "attacked/attacked.png"]),
    "train --config my.yaml --loss.gamma 2 --training.device cuda": Run(
        ["--training.device", "cpu", "--out", "runs/other", *TRAIN], ["runs/other/model.safetensors"]
    ),
    "train --data.name mine.py:make --data.args.n 1000 --data.validation_size 100 --model.name mine.py:Net "
    "--out runs/mine": Run(FEW, ["runs/mine/model.safetensors"]),
    "sweep adversarial_margin_mnist --data-dir DIR --dry-run": Run(
        ["--no-estimate"], says="8 cells, 8 finished, 0 to do"
    ),
    "report sweeps/adversarial_margin_mnist --out report": Run(files=["report/index.html"]),
    "bench --model nets.py:make --shape 3x32x32 --batch-size 128 --layers input layer3": Run(
        ["--rounds", "1"], says="nets.py:make: "
    ),
    "bench --model mnist_cnn": Run(["--rounds", "1", "--batch-size", "8"], says="mnist_cnn: "),
    "toy --out toy": Run(["--quick"], ["toy/toy.png"]),
}
# Commands that do not run here, and why.
NOT_HERE = {
    r"--data-dir DIR": "needs the files of MNIST or CIFAR",
    r"^report (attacks|data|margins|one_to_n|sensitivity|runs/ce_mlp800 runs/deep_defense) ": "of such runs",
}


def printed() -> list[str]:
    """Every command of the pages, without its comment, in the order of the pages."""
    lines = [shlex.join(shlex.split(line, comments=True)) for page in PAGES for line in LINE.findall(page.read_text())]
    return list(dict.fromkeys(lines))


def test_every_printed_command_runs_or_has_a_reason_not_to():
    left = [line for line in printed() if line not in RUNS]
    assert not [line for line in left if not any(re.search(pattern, line) for pattern in NOT_HERE)]
    assert not set(RUNS) - set(printed())


def test_the_commands_of_the_pages_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "nets.py").write_text(NETS)
    shutil.copytree(
        ROOT / "benchmarks" / "results" / "papers" / "adversarial_margin_mnist", "sweeps/adversarial_margin_mnist"
    )
    threads = torch.get_num_threads()
    assert cli.main(["train", "--config", "digits_large_margin_l2", "--print_config"]) == 0
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    try:
        for line, run in RUNS.items():
            before = time.time_ns() - 10**9  # clocks of files are coarse
            assert cli.main([*shlex.split(line), *run.more]) == 0, line
            out = capsys.readouterr().out
            assert run.says in out, f"{line}\n{out}"
            for name in run.files:
                assert (tmp_path / name).stat().st_mtime_ns >= before and (tmp_path / name).stat().st_size > 0, name
    finally:
        torch.set_num_threads(threads)

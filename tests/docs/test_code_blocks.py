"""Every Python block of the pages runs, with what the page takes as given."""

import re
from itertools import pairwise

import pytest
import torch
from small_networks import Registered
from support import ROOT
from torch import nn
from torch.nn import functional as F

import margin_kernels as mk

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = [(page.name, number, code) for page in PAGES for number, code in enumerate(BLOCK.findall(page.read_text()))]


class Network(nn.Module):
    """The modules that the pages name."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3)
        self.blocks = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.layer1, self.layer2 = nn.Conv2d(4, 4, 1), nn.Tanh()
        self.layer3 = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.head = nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.layer3(self.layer2(self.layer1(self.blocks(self.conv1(x))))).flatten(1))


def given():
    """What stands before a block on its page."""
    torch.manual_seed(0)
    model = Network()
    loader = [(torch.rand(6, 1, 8, 8), torch.randint(5, (6,))) for _ in range(3)]
    loss = mk.LargeMarginLoss(gamma=0.1)
    return {
        "mk": mk,
        "torch": torch,
        "F": F,
        "model": model,
        "loader": loader,
        "loss": loss,
        "MyFunction": Registered,
        "x": loader[0][0],
        "y": loader[0][1],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
        "task": mk.MarginTask(model, loss, layers=("input",)),
    }


def test_every_page_with_code_is_here():
    assert len(BLOCKS) >= 20 and {"README.md", "gradients.md", "monitor.md", "one-to-n.md"} <= {
        name for name, _, _ in BLOCKS
    }


@pytest.mark.parametrize(("name", "number", "code"), BLOCKS, ids=[f"{name}-{number}" for name, number, _ in BLOCKS])
@pytest.mark.filterwarnings("ignore:gamma=.auto")
def test_a_block_runs(name, number, code, capsys):
    names = given()
    model = names["model"]
    before = [parameter.clone() for parameter in model.parameters()]
    exec(compile(code, f"{name}, block {number}", "exec"), names)
    if "optimizer.step()" in code and names["model"] is model:
        assert all(not torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    elif "optimizer.step()" in code:  # a program of its own
        assert names["accuracy"] > 0.85
    if "print(" in code:
        assert len(capsys.readouterr().out) > 40
    if "out = task(" in code:
        assert names["out"]["loss"].isfinite() and names["out"]["output"].shape == (6, 5)


def test_headings_of_a_page_are_in_order():
    """A level is entered from the one above it."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
        assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels)), page.name

"""`margin-kernels bench` on shipped networks and on code of the user's."""

import sys

import pytest

from margin_kernels.experiments import cli

NETS = """
import torch
from torch import nn

def make(width=4, classes=3):
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, classes))

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(9, 5), nn.Linear(5, 4)

    def forward(self, x):
        return self.head(self.embed(x))

def make_batch(batch_size=8):
    return torch.randint(9, (batch_size, 3)), torch.randint(4, (batch_size,))

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = make(4, 4)

    def forward(self, image):
        return {"logits": self.head(image)}

def named_batch(batch_size):
    return {"image": torch.rand(batch_size, 6)}, torch.randint(4, (batch_size,))

def breaks():
    raise RuntimeError("no weights here")

number, no_batch = 3, dict
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["margin_kernels.bench"], "peak_bytes", lambda run, device: 1)  # saves a second
    (tmp_path / "nets_of_a_user.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)


def bench(*arguments):
    return cli.main(["bench", "--rounds", "1", *arguments])


def test_a_shipped_network_is_measured_at_its_hidden_layers(capsys):
    assert bench("--model", "digits_cnn", "--batch-size", "4") == 0
    text = capsys.readouterr().out
    assert text.startswith("digits_cnn: cpu, ") and "batch 4" in text and "1 rounds" in text
    assert "\nsoft margin + cross-entropy: the graph proves" in text


@pytest.mark.parametrize("where", ["nets_of_a_user.py", "nets_of_a_user"])
def test_code_of_the_users_is_measured(where, capsys):
    arguments = ["--model", f"{where}:make", "--args", '{"width": 5}', "--shape", "6", "--layers", "input", "0"]
    assert bench(*arguments) == 0
    text = capsys.readouterr().out
    assert f"{6 * 5 + 5 + 5 * 3 + 3} parameters" in text and "batch 32" in text and "refused" not in text


def test_a_batch_of_the_users_is_measured(capsys):
    model = ["--model", "nets_of_a_user.py:Tokens", "--data", "nets_of_a_user.py:make_batch"]
    assert bench(*model, "--batch-size", "6", "--layers", "embed") == 0
    text = capsys.readouterr().out
    assert "batch 6" in text and "\nmargin + cross-entropy, loop  " in text
    assert bench(*model) == 0
    text = capsys.readouterr().out
    assert "batch 32" in text and text.count('refused: the tap "input" needs a floating-point input') == 4


def test_a_batch_with_names_is_keywords(capsys):
    file = "nets_of_a_user.py"
    assert bench("--model", f"{file}:Named", "--data", f"{file}:named_batch") == 0
    assert "refused" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "nowhere"], '--model must be "package.module:make", "file.py:make" or one of'),
        (["--model", "nowhere.py:make"], "--model: nowhere.py is no file"),
        (["--model", "nets_of_a_user.py:made"], "--model: nets_of_a_user.py has no 'made'; it has make"),
        (["--model", "nets_of_a_user.py:number"], "--model must name a class or a function, got"),
        (["--model", "nets_of_a_user.py:breaks"], "raised RuntimeError: no weights here"),
        (["--model", "nets_of_a_user.py:no_batch"], "must give an nn.Module, got dict"),
        (["--model", "nets_of_a_user.py:make"], "--shape must say what nets_of_a_user.py:make takes"),
        (["--model", "nets_of_a_user.py:make", "--args", '{"wide": 3}'], "--args must fit nets_of_a_user.py:make("),
        (["--model", "nets_of_a_user.py:make", "--args", "[3]"], "--args must be a JSON object"),
        (["--model", "nets_of_a_user.py:make", "--args", "{"], "--args must be JSON, got '{'"),
        (["--model", "nets_of_a_user.py:make", "--shape", "6x-1"], "--shape must be sides in [1, 65536]"),
        (["--model", "digits_cnn", "--args", '{"wide": 3}'], "--args must fit digits_cnn, got ['wide']"),
        (["--model", "nets_of_a_user.py:make", "--data", "nets_of_a_user.py:no_batch"], "must give x and y"),
        (["--model", "nets_of_a_user.py:make", "--data", "nets_of_a_user.py:Tokens"], "--batch-size must fit"),
        (["--model", "digits_cnn", "--data", "nets_of_a_user.py:make_batch", "--shape", "6"], "--shape is of a random"),
        (["--model", "digits_cnn", "--shape", "6"], "--shape must be of an image"),
        (["--model", "nets_of_a_user.py:make", "--shape", "7"], "raised RuntimeError on [32, 7]: mat1 and mat2"),
        (["--model", "digits_cnn", "--layers", "nowhere"], "layers has 'nowhere'"),
    ],
)  # fmt: skip
def test_a_wrong_call_ends_with_a_sentence(arguments, words, capsys):
    assert bench(*arguments) == 1
    text = capsys.readouterr().err
    assert words in text and "Traceback" not in text

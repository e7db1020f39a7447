"""Data and networks of the user's: code that a config names trains, resumes, is measured and swept as shipped ones are,
and whatever does not fit is told with the user's own message and place."""

import json
import re
import sys
import textwrap
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import tiny_sweeps
from torch import nn

from margin_kernels.experiments import cli, config, data, models
from margin_kernels.experiments.config import ConfigError, DataConfig
from margin_kernels.experiments.data import Dataset, Split
from margin_kernels.experiments.training import Trainer

SOURCE = """
import torch
from torch import nn


def splits(n, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    images = torch.rand(n, 1, 4, 4, generator=generator) * 0.6
    images[torch.arange(n), 0, labels, labels] += 0.4
    return images, labels


def make(n=90, classes=3, seed=0, data_dir=None):
    shift = 0 if data_dir is None else int(data_dir)
    return {"train": splits(n, classes, seed + shift), "test": splits(30, classes, seed + 1)}


class Net(nn.Module):
    hidden_taps = ("act",)

    def __init__(self, shape, classes, width=8):
        super().__init__()
        self.flat, self.first = nn.Flatten(), nn.Linear(shape[1] * shape[2], width)
        self.act, self.head = nn.ReLU(), nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.act(self.first(self.flat(x))))


class Plain(Net):
    hidden_taps = None


def broken(n=1):
    return torch.zeros(2) + torch.zeros(3)
"""
MARGIN = ["--loss.kind", "large_margin", "--loss.top_k", "2", "--loss.gamma", "0.5", "--loss.p", "inf"]
SHORT = ["--training.epochs", "2", "--training.batch_size", "16", "--training.distance_samples", "8"]
SHORT += ["--data.validation_size", "20", "--evaluation.timing_repeats", "0", "--evaluation.deepfool_samples", "10"]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The working folder with mine.py in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path


def arguments(*more, network="mine.py:Net"):
    return ["--data.name", "mine.py:make", "--model.name", network, *SHORT, *more]


def by_hand(seed=0, classes=3):
    """The dataset that mine.py makes, written out."""

    def splits(n, seed):
        labels = torch.arange(n) % classes
        images = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 0.6
        for image, label in zip(images, labels.tolist(), strict=True):
            image[0, label, label] += 0.4
        return images, labels

    images, labels = splits(90, seed)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    held, kept = sorted(order[:20].tolist()), sorted(order[20:].tolist())
    train, validation = Split(images[kept], labels[kept]), Split(images[held], labels[held])
    return Dataset("mine", train, validation, Split(*splits(30, seed + 1)), classes, (1, 4, 4), ("0", "1", "2"))


def test_a_run_of_code_is_that_of_the_same_data_and_network_by_hand(mine):
    settings = config.parse(arguments("--model.args.width", "6", *MARGIN))
    dataset = data.of(settings.data)
    expected = by_hand()
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(dataset, name).images, getattr(expected, name).images)
        assert torch.equal(getattr(dataset, name).labels, getattr(expected, name).labels)
    assert (dataset.num_classes, dataset.shape, dataset.class_names) == (3, (1, 4, 4), ("0", "1", "2"))
    trainer = Trainer(settings, expected)
    assert trainer.hidden == ("act",) and trainer.model.first.weight.shape == (6, 16)
    history = trainer.run()
    assert set(history[-1]["distance"]) == {"input", "act", "output"}
    assert cli.main(["train", *arguments("--model.args.width", "6", *MARGIN), "--out", "run"]) == 0
    model, description = models.load_model(mine / "run")
    assert description["name"] == "mine.py:Net" and description["options"] == {"args": {"width": 6}}
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_a_run_of_code_resumes_is_evaluated_checked_and_reported(mine, capsys):
    longer = [*arguments(*MARGIN), "--training.epochs", "4"]
    assert cli.main(["train", *longer, "--out", "whole"]) == 0
    assert cli.main(["train", *arguments(*MARGIN), "--out", "parts"]) == 0
    assert cli.main(["train", *longer, "--out", "parts", "--resume"]) == 0
    whole, parts = (models.load_model(mine / name)[0].state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert cli.main(["evaluate", "whole"]) == 0
    found = json.loads((mine / "whole/evaluation.json").read_text())["evaluation"]
    x, y = by_hand().test.batch(slice(None))
    model, _ = models.load_model(mine / "whole")
    assert found["clean"] == float((model(x).argmax(1) == y).double().mean())
    assert set(found["distance"]) == {"input", "act", "output"}
    (mine / "mine.py").write_text("raise SystemExit('run')\n")  # check and report run nothing
    capsys.readouterr()
    assert cli.main(["check", "whole"]) == 0
    assert cli.main(["report", "whole", "--out", "page"]) == 0
    assert "mine.py:Net" in (mine / "page/index.html").read_text()
    assert cli.main(["evaluate", "whole"]) == 1
    assert "mine.py raised SystemExit: run" in capsys.readouterr().err


def test_a_sweep_of_code_trains_in_a_process_of_its_own(mine):
    content = {
        "base": {
            "data": {"name": "mine.py:make", "validation_size": 20, "args": {"n": 60}},
            "model": {"name": "mine.py:Net"},
            "training": {"epochs": 1, "batch_size": 16, "distance_samples": 0},
            "evaluation": {**tiny_sweeps.EVALUATION, "attack_samples": 20},
        },
        "models": {"narrow": {"model.args.width": 4}, "wide": {"model.args.width": 12}},
        "grid": {"data.args.n": [60, 90]},
    }
    path = tiny_sweeps.write(mine, content)
    assert tiny_sweeps.run_in_processes(path, mine / "out", "--cells", "narrow__n=60*") == 0
    assert tiny_sweeps.run(path, mine / "out") == 0
    found = tiny_sweeps.records(mine / "out")
    assert {name: record.parameters for name, record in found.items()} == {
        f"{label}__n={n}__seed0": 17 * width + (width + 1) * 3
        for label, width in (("narrow", 4), ("wide", 12))
        for n in (60, 90)
    }
    assert {name: record.config.data.args for name, record in found.items()} == {
        name: {"n": int(name[-9:-7])} for name in found
    }
    assert cli.main(["report", str(mine / "out"), "--out", "page"]) == 0


def test_weights_that_meet_another_text_of_their_network_are_told(mine):
    assert cli.main(["train", *arguments(), "--out", "run"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load_model(mine / "run")
    (mine / "mine.py").write_text(SOURCE.replace("nn.ReLU()", "nn.Tanh()"))
    with pytest.warns(UserWarning, match="run: the file of mine.py:Net has another text than when these weights were"):
        models.load_model(mine / "run")
    with pytest.warns(UserWarning, match="run: the file of mine.py:Net has another text than when the checkpoint was"):
        assert cli.main(["train", *arguments("--training.epochs", "3"), "--out", "run", "--resume"]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load_model(mine / "run")  # which the new text has trained


def test_hidden_layers_of_ones_own_network_are_named_by_it_or_by_the_loss(mine):
    settings = config.parse(arguments(*MARGIN, network="mine.py:Plain"))
    with pytest.raises(
        ConfigError,
        match=r"loss.layers has hidden, but mine.py:Plain has no attribute hidden_taps: name "
        r"its modules in loss.layers, of flat, first, act, head",
    ):
        Trainer(settings, by_hand())
    plain = replace(settings, loss=replace(settings.loss, layers=["input", "f*", "act"]))
    assert Trainer(plain, by_hand()).hidden == ("flat", "first", "act")
    cross_entropy = replace(settings, loss=config.LossConfig())
    assert Trainer(cross_entropy, by_hand()).hidden == ()
    model = nn.Sequential(nn.Linear(2, 2))
    model.hidden_taps = "0"
    with pytest.raises(ConfigError, match="hidden_taps must be a list of names of modules, got '0'"):
        models.hidden_of(model, settings)


def test_vectors_and_a_data_dir_reach_code(mine):
    (mine / "flat.py").write_text(
        "import numpy as np\n"
        "def make(data_dir):\n"
        "    rows = np.load(data_dir)\n"
        "    return (rows, np.arange(40) % 2), (rows[:10], np.arange(10) % 2)\n"
    )
    rows = np.random.default_rng(0).random((40, 5))
    np.save(mine / "rows.npy", rows)
    dataset = data.of(DataConfig("flat.py:make", "rows.npy", validation_size=10))
    assert dataset.shape == (5,) and dataset.num_classes == 2
    assert torch.equal(dataset.test.images, torch.from_numpy(rows[:10]).float())
    settings = config.parse(["--model.name", "mlp800", *SHORT])
    trainer = Trainer(settings, dataset)
    assert trainer.run()[-1]["distance"].keys() == {"input", "relu1", "relu2", "output"}
    with pytest.raises(ValueError, match=r"training.augment must be none for vectors, got 'crop'"):
        Trainer(config.parse(["--model.name", "mlp800", *SHORT, "--training.augment", "crop"]), dataset).run()


def test_a_torch_dataset_is_read_once_in_its_order(mine):
    (mine / "torchy.py").write_text(
        textwrap.dedent("""
        import torch
        from collections import namedtuple
        reads = []
        class Rows(torch.utils.data.Dataset):
            def __init__(self, n): self.n = n
            def __len__(self): return self.n
            def __getitem__(self, i):
                reads.append(i)
                return torch.full((1, 2, 2), i / 50), torch.tensor(i % 2)
        Splits = namedtuple("Splits", "train validation test")
        def make():
            return Splits(Rows(30), Rows(8), Rows(4))
        def count():
            return reads
        """)
    )
    dataset = data.of(DataConfig("torchy.py:make"))
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [30, 8, 4]
    assert torch.equal(dataset.train.images[:, 0, 1, 1], torch.arange(30) / 50)
    assert torch.equal(dataset.train.labels, torch.arange(30) % 2)
    assert config.called("data", "torchy.py:count", {}, {}) == [*range(30), *range(8), *range(4)]


IMAGES, LABELS = "torch.rand(6, 1, 2, 2)", "torch.arange(6) % 2"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("1", "must return train and test, as a mapping, attributes or a pair, got a int"),
        ("{'train': 1}", "must return train and test, as a mapping, attributes or a pair, got train"),
        ("(1, 2, 3)", "must return train and test, got a tuple of 3"),
        ("(1, 2)", "train must be a pair .images, labels. or a torch Dataset, got int"),
        (f"(({IMAGES}, {LABELS}, 1), 1)", "train must be a pair .images, labels. or a torch Dataset, got 3 values"),
        (
            f"((torch.rand(6, 2, 2), {LABELS}), 1)",
            r"train: images must be \[N, C, H, W\] or \[N, D\], .* got \[6, 2, 2\]",
        ),
        ("((torch.rand(0, 4), torch.arange(0)), 1)", r"images must be .* none of them 0, got \[0, 4\]"),
        (
            f"(({IMAGES} - 0.5, {LABELS}), 1)",
            r"train: images must be in \[0, 1\], got -.* to .*: normalise inside of the",
        ),
        (f"((255 * {IMAGES}, {LABELS}), 1)", r"images must be in \[0, 1\], got .*: divide by 255, or give uint8"),
        (f"(({IMAGES} / 0, {LABELS}), 1)", r"images must be in \[0, 1\], got inf to inf"),
        (f"(({IMAGES} * float('nan'), {LABELS}), 1)", r"images must be in \[0, 1\], got nan to nan"),
        (f"(({IMAGES}.long(), {LABELS}), 1)", r"images must be floats in \[0, 1\] or uint8, got torch.int64"),
        (f"(({IMAGES}, torch.rand(6)), 1)", r"labels must be integers \[N\], got torch.float32 \[6\]"),
        (f"(({IMAGES}, torch.arange(5)), 1)", "train must have as many labels as images, got 5 and 6"),
        (f"(({IMAGES}, {LABELS} - 1), 1)", "labels must be at least 0, got -1"),
        (
            f"(({IMAGES}, {LABELS} + 1), ({IMAGES}, {LABELS}))",
            "labels of train go to 2, but no image has 0: number the",
        ),
        (f"(({IMAGES}, {LABELS} * 0), ({IMAGES}, {LABELS} * 0))", "must have at least 2 classes, got 1"),
        (f"(({IMAGES}, {LABELS}), ({IMAGES}, {LABELS} + 1))", r"labels of test must be in \[0, 1\], got 2"),
        (
            f"(({IMAGES}, {LABELS}), (torch.rand(6, 1, 2, 3), {LABELS}))",
            r"images of test must be \[1, 2, 2\], got \[1, 2, 3\]",
        ),
        (f"(({IMAGES}, {LABELS}), ({IMAGES}, {LABELS}))", "data.validation_size must be from 1 to 5, got 5000"),
        (
            f"dict(train=({IMAGES}, {LABELS}), test=({IMAGES}, {LABELS}), class_names='ab')",
            "class_names must be a list of",
        ),
        (
            f"dict(train=({IMAGES}, {LABELS}), test=({IMAGES}, {LABELS}), class_names=['a'], classes=2)",
            "classes must be the",
        ),
        ("((['a', object()], 1), 1)", r"images must be an array or a tensor, got list"),
    ],
)
def test_data_that_does_not_fit_is_told(mine, returned, message):
    (mine / "bad.py").write_text(f"import torch\ndef make():\n    return {returned}\n")
    with pytest.raises(ValueError, match=message) as caught:
        data.of(DataConfig("bad.py:make"))
    assert "bad.py:make" in str(caught.value) or "validation_size" in message


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("1", r"train\[0\] must be \(image, label\), got int"),
        ("('a', 1)", r"train\[0\]: an image must be a tensor, an array or one of PIL, got str"),
        (
            "(torch.rand(1, 2, 2 + i), 1)",
            r"train\[1\]: an image must be torch.float32 \[1, 2, 2\] as those before, got",
        ),
        ("(torch.rand(1, 2, 2), 0.5)", r"train\[0\]: a label must be an integer, got float"),
        ("(torch.rand(1, 2, 2), torch.arange(2))", r"train\[0\]: a label must be an integer, got Tensor"),
        ("[][i]", r"train\[0\] raised IndexError: list index out of range \(.*bad.py, line 5\)"),
    ],
)
def test_a_torch_dataset_that_does_not_fit_is_told(mine, item, message):
    (mine / "bad.py").write_text(
        "import torch\nclass Rows:\n    def __len__(self): return 3\n"
        f"    def __getitem__(self, i):\n        return {item}\ndef make(): return Rows(), Rows()\n"
    )
    with pytest.raises(ValueError, match=message):
        data.of(DataConfig("bad.py:make"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:broken", r"raised RuntimeError: The size of tensor a .* \(.*mine.py, line 36\)"),
        ("mine.py:brokn", "data.name: mine.py has no 'brokn'; it has broken"),
        ("mine.py:", 'data.name must be "package.module:name" or "file.py:name", got'),
        (":make", 'data.name must be "package.module:name" or "file.py:name", got'),
        ("mine.py:torch", "data.name must name a class or a function, got mine.py:torch, a module"),
        ("gone.py:make", "data.name: gone.py is no file; its path must be one from the working folder"),
        (
            "no_such_package.sub:make",
            "data.name: no module 'no_such_package' is installed or lies in the working folder",
        ),
        ("syntax.py:make", r"import of .*syntax.py raised SyntaxError: .* \(.*syntax.py, line 2\)"),
        (
            "needs.py:make",
            r"import of .*needs.py raised ModuleNotFoundError: No module named 'nothing_here' .*line 1\)",
        ),
        ("leaves.py:make", r"import of .*leaves.py raised SystemExit: 3 \(.*leaves.py, line 1\)"),
    ],
)
def test_code_that_cannot_run_is_told_with_its_place(mine, capsys, name, message):
    (mine / "syntax.py").write_text("x = 1\nx = = 2\n")
    (mine / "needs.py").write_text("import nothing_here\n")
    (mine / "leaves.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(ConfigError, match=message):
        data.of(DataConfig(name))
    assert cli.main(["train", "--data.name", name, "--out", "run"]) == 1
    assert capsys.readouterr().err.startswith("margin-kernels train: data.name")


def test_code_is_found_as_a_module_of_the_working_folder_and_last(mine):
    (mine / "package").mkdir()
    (mine / "package/__init__.py").write_text("")
    (mine / "package/inner.py").write_text(SOURCE)
    (mine / "json.py").write_text("raise SystemExit('shadowed')\n")  # what is installed is found first
    dataset = data.of(DataConfig("package.inner:make", validation_size=20, args={"seed": 5}))
    assert torch.equal(dataset.test.images, by_hand(5).test.images)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--data.args.m", "1"],
            r"data.args must fit mine.py:make\(n=90, .*\), got \['m'\]: got an unexpected keyword",
        ),
        (["--data.args.n", "1.5"], r"data.name mine.py:make raised TypeError: arange.*|raised .*mine.py, line"),
        (["--data.dir", "x"], r"raised ValueError: invalid literal .* \(.*mine.py, line 15\)"),
        (["--model.args.depth", "1"], "model.args must fit mine.py:Net"),
        (
            ["--model.dropout", "0.5"],
            "model.dropout is for shipped networks: give mine.py:Net its options by model.args",
        ),
        (["--model.norm", "group"], "model.norm is for shipped networks"),
        (["--model.center", "true"], "model.center is for shipped networks"),
        (["--model.name", "mine.py:broken"], "model.name mine.py:broken raised RuntimeError: The size of tensor a"),
        (["--model.name", "mine.py:make"], "model.name mine.py:make must return a torch.nn.Module, got dict"),
        (
            ["--model.name", "torch.nn:Identity"],
            r"model.name must be a network that returns logits \[N, 3\], got \[1, 1, 4, 4\]",
        ),
        (
            ["--model.name", "torch.nn:Linear", "--model.args", '{"in_features": 3, "out_features": 3}'],
            r"model.name torch.nn:Linear raised RuntimeError: mat1 and mat2 shapes",
        ),
        (["--data.size", "8"], "data.size is for image_folder, got it with 'mine.py:make'"),
        (
            ["--data.name", "digits", "--data.args.n", "1"],
            "data.args are for code that data.name names, as in file.py:name",
        ),
        (["--data.name", "digit"], "data.name must be one of digits, mnist, .*npz, or code as package.module:make or"),
    ],
)
def test_options_that_do_not_fit_code_are_refused(mine, capsys, given, message):
    assert cli.main(["train", *arguments(*given), "--out", "run"]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_values_of_args_are_plain(mine):
    for value, words in (
        (float("nan"), "must be finite, got nan"),
        (2**70, "must be an integer of 64 bits"),
        ("a\0", "must be text without control"),
        ({1: 2}, "a name in data.args.x must be text"),
        ([object()], r"data.args.x\[0\] must be made of texts, numbers, .* got object"),
    ):
        settings = config.Config(data=DataConfig("mine.py:make", args={"x": value}))
        with pytest.raises(ConfigError, match=words):
            config.check(settings)

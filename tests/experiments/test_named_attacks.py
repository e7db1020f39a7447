"""Attacks by name: what other packages return is measured and not believed; arrays and a picture of attacked images."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import ROOT
from support.command_line import SMALL
from torch import nn

from margin_kernels.experiments import cli, data, models
from margin_kernels.experiments.data import Split
from margin_kernels.experiments.evaluation import by_name
from margin_kernels.experiments.evaluation.by_name import NamedAttack, find, lengths

QUICK = ["--training.epochs", "3", "--evaluation.timing_repeats", "0", "--evaluation.deepfool_samples", "10"]
QUICK += ["--evaluation.curve", "[0.1]", "--evaluation.attack_samples", "40", "--evaluation.distance_samples", "10"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained network of digits."""
    folder = tmp_path_factory.mktemp("attacked") / "run"
    assert cli.main(["train", *SMALL, *QUICK, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def linear():
    """A linear classifier of two classes, whose worst images in a ball are known: x + eps q, q of the gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    x = 0.4 + 0.2 * torch.rand(40, 1, 3, 4)
    return model, Split(x, model(x).argmax(1))


def standing(model, split, norm, eps):
    """The share of images of a linear model of two classes that no perturbation of that size moves over."""
    weight, q = model[1].weight.detach(), {"linf": 1, "l2": 2, "l1": math.inf}[norm]
    gap = (
        model(split.images).gather(1, split.labels[:, None]) - model(split.images).gather(1, 1 - split.labels[:, None])
    )[:, 0]
    return float((gap > eps * (weight[0] - weight[1]).norm(q)).double().mean())


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("fgsm", "linf"),
        ("ifgsm", "linf"),
        ("pgd", "linf"),
        ("foolbox:LinfPGD", "linf"),
        ("foolbox:LinfFastGradientAttack", "linf"),
        ("foolbox:L2PGD", "l2"),
        ("foolbox:L2FastGradientAttack", "l2"),
        ("foolbox:L2DeepFoolAttack", "l2"),
        ("foolbox:LinfDeepFoolAttack", "linf"),
    ],
)
def test_an_attack_on_a_linear_model_leaves_the_share_that_the_formula_says(linear, name, norm):
    if name.startswith("foolbox"):
        pytest.importorskip("foolbox", reason="foolbox is not installed")
    model, split = linear
    attack = find(name)
    assert attack.norm == norm
    gaps = model(split.images).diff(dim=1).abs()[:, 0]
    weight = model[1].weight.detach()
    eps = float(gaps.median() / (weight[0] - weight[1]).norm({"linf": 1, "l2": 2}[norm]))
    assert eps < 0.3
    before = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    found = by_name.accuracies(model, split, [attack], eps, 16)[name]
    assert (found["eps"], found["norm"], found["samples"]) == (eps, norm, 40)
    best = standing(model, split, norm, eps)
    # foolbox's PGD takes 40 steps of eps / 30 from a random start: it does not cross the ball
    assert best <= found["accuracy"] <= best + (0.25 if name.endswith("PGD") else 0.026)
    assert found["accuracy"] < 0.8
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    again = by_name.accuracies(model, split, [attack], eps, 16)[name]
    assert again == found  # one seed for every call


def test_images_that_leave_the_ball_or_the_bounds_are_refused(linear):
    model, split = linear
    x, y = split.batch(slice(4))
    for moved, words in (
        (x + 0.2, r"must stay within linf 0.1 and \[0, 1\], got 0.2 and"),
        (x * float("nan"), "must return images"),
        (x[:2], r"must return images \[4, 1, 3, 4\], got \[2, 1, 3, 4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            NamedAttack("foolbox:Mine", "linf", lambda *given, moved=moved: moved)(model, x, y, 0.1, (0.0, 1.0))
    with pytest.raises(ValueError, match=r"within linf 0.1 and \[0, 1\], got 0.1 and \[1.1, 1.1\]"):
        NamedAttack("foolbox:Mine", "linf", lambda *given: torch.ones(1, 1, 3, 4) + 0.1)(
            model, torch.ones(1, 1, 3, 4), y[:1], 0.1, (0.0, 1.0)
        )
    with pytest.raises(ValueError, match="needs images with bounds: whitened ones"):
        NamedAttack("foolbox:Mine", "linf", lambda *given: x)(model, x, y, 0.1, (-math.inf, math.inf))

    def fails(*given):
        raise RuntimeError("no such thing")

    with pytest.raises(
        ValueError, match=r"--attack foolbox:Mine raised RuntimeError: no such thing \(.*test_named_attacks.py"
    ):
        NamedAttack("foolbox:Mine", "linf", fails)(model, x, y, 0.1, (0.0, 1.0))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cw", "--attack must be one of fgsm, ifgsm, pgd, deepfool, autoattack or foolbox:NAME, got 'cw'"),
        ("foolbox:", "--attack must be one of"),
        ("foolbox:LinfPDG", "foolbox has no attack 'LinfPDG'; it has .*LinfPGD"),
        ("foolbox:base", "foolbox has no attack 'base'"),
        ("foolbox:SpatialAttack", "--attack foolbox:SpatialAttack must measure its radius in linf, l2 or l1"),
        ("foolbox:VirtualAdversarialAttack", "raised TypeError: .*missing 1 required positional argument: 'steps'"),
    ],
)
def test_names_that_there_are_not_are_told_before_anything_is_measured(run, capsys, name, words):
    if name.startswith("foolbox:") and len(name) > 8:
        pytest.importorskip("foolbox", reason="foolbox is not installed")
    with pytest.raises(ValueError, match=words):
        find(name)
    assert cli.main(["evaluate", str(run), "--attack", name]) == 1
    assert not (run / "evaluation.json").exists() and name in capsys.readouterr().err


def test_a_package_that_is_missing_is_named_with_its_install(monkeypatch, run, capsys):
    for module in ("autoattack", "torchattacks", "foolbox"):
        monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["evaluate", str(run), "--attack", "autoattack"]) == 1
    assert (
        "--attack autoattack needs a package that is not installed: pip install torchattacks" in capsys.readouterr().err
    )
    assert cli.main(["attack", str(run), "--attack", "foolbox:LinfPGD", "--out", str(run.parent / "none")]) == 1
    assert "pip install foolbox" in capsys.readouterr().err and not (run.parent / "none").exists()


@pytest.mark.parametrize("package", ["autoattack", "torchattacks"])
def test_autoattack_of_either_package_stays_in_the_ball(linear, package):
    pytest.importorskip(package, reason=f"{package} is not installed")
    model, split = linear
    found = by_name.accuracies(model, split, [find("autoattack")], 0.02, 40)["autoattack"]
    assert found["accuracy"] <= standing(model, split, "linf", 0.02) + 0.051


@pytest.mark.parametrize("package", ["autoattack", "torchattacks"])
def test_either_package_of_autoattack_is_asked_for_its_standard_version(linear, monkeypatch, package):
    asked = {}

    class AutoAttack:
        def __init__(self, model, **options):
            asked.update(options)

        def __call__(self, x, y):
            return (x + asked["eps"]).clamp(0, 1)

        def run_standard_evaluation(self, x, y, bs):
            asked["bs"] = bs
            return self(x, y)

    for module in ("autoattack", "torchattacks"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(AutoAttack=AutoAttack) if module == package else None)
    model, split = linear
    x, y = split.batch(slice(None))
    assert torch.equal(find("autoattack")(model, x, y, 0.05, (0.0, 1.0)), x + 0.05)
    assert (asked["norm"], asked["eps"], asked["version"], asked["seed"]) == ("Linf", 0.05, "standard", 0)
    assert asked.get("bs") == (40 if package == "autoattack" else None)
    assert asked.get("n_classes") == (2 if package == "torchattacks" else None)


def test_named_attacks_stand_in_the_evaluation_and_in_the_table(run, tmp_path, capsys):
    pytest.importorskip("foolbox", reason="foolbox is not installed")
    options = [
        "--attack",
        "foolbox:LinfPGD",
        "--attack",
        "foolbox:L2PGD",
        "--attack-samples",
        "25",
        "--eps",
        "0.12",
        "--no-timing",
    ]
    assert cli.main(["evaluate", str(run), *options]) == 0
    text = capsys.readouterr().out
    found = json.loads((run / "evaluation.json").read_text())["evaluation"]["attacks"]
    assert set(found) == {"foolbox:LinfPGD", "foolbox:L2PGD"} and found["foolbox:L2PGD"]["norm"] == "l2"
    model, _ = models.load_model(run)
    x, y = data.load("digits").test.head(25).batch(slice(None))
    attack = find("foolbox:LinfPGD")
    moved = attack(model, x, y, 0.12, (0.0, 1.0))
    assert found["foolbox:LinfPGD"] == {
        "eps": 0.12,
        "norm": "linf",
        "samples": 25,
        "accuracy": float((model(moved).argmax(1) == y).double().mean()),
    }
    assert "Accuracy, other attacks" in text and "LinfPGD, linf 0.12" in text
    assert f"{100 * found['foolbox:LinfPGD']['accuracy']:.1f} %" in text
    assert cli.main(["report", str(run), "--out", str(tmp_path)]) == 0
    assert "foolbox:LinfPGD_0.12" in (tmp_path / "results.csv").read_text().splitlines()[0]
    (run / "evaluation.json").unlink()


@pytest.mark.parametrize("name", ["ifgsm", "deepfool", "foolbox:L2PGD"])
def test_attacked_images_are_written_with_what_is_predicted(run, tmp_path, capsys, name):
    if name.startswith("foolbox"):
        pytest.importorskip("foolbox", reason="foolbox is not installed")
    assert (
        cli.main(["attack", str(run), "--attack", name, "--eps", "0.3", "--samples", "15", "--out", str(tmp_path)]) == 0
    )
    text = capsys.readouterr().out
    model, _ = models.load_model(run)
    x, y = data.load("digits").test.head(15).batch(slice(None))
    with np.load(tmp_path / "attacked.npz") as file:
        found = {key: file[key] for key in file.files}
    assert np.array_equal(found["images"], x.numpy()) and np.array_equal(found["labels"], y.numpy())
    assert found["classes"].tolist() == list("0123456789")
    moved = torch.from_numpy(found["attacked"])
    assert np.array_equal(found["predicted"], model(x).argmax(1).numpy())
    assert np.array_equal(found["predicted_attacked"], model(moved).argmax(1).numpy())
    norm = find(name).norm
    sizes = lengths(moved - x, norm)
    assert not torch.equal(moved, x) and (name == "deepfool" or sizes.max() <= 0.3 * (1 + 1e-4))
    after = (found["predicted_attacked"] == found["labels"]).mean()
    assert f"{after:.1%} after the attack" in text and f"{float(sizes.max()):.4g} at most" in text


def test_the_picture_shows_original_attacked_and_difference(run, tmp_path):
    matplotlib = pytest.importorskip("matplotlib.image", reason="matplotlib is not installed")
    assert cli.main(["attack", str(run), "--eps", "0.3", "--samples", "2", "--out", str(tmp_path)]) == 0
    picture = matplotlib.imread(tmp_path / "attacked.png")[..., :3]
    with np.load(tmp_path / "attacked.npz") as file:
        change = (file["attacked"] - file["images"])[0, 0]
    height, width = picture.shape[:2]
    assert width > 2.5 * height  # two images of three panels in a row
    colourful = picture.max(2) - picture.min(2) > 0.3
    columns = colourful.sum(0) > height / 4  # the panels of differences are the only ones full of colour
    edges = np.flatnonzero(np.diff(columns.astype(int)))
    panel = picture[:, edges[0] : edges[-1]]
    red, blue = (panel[..., 0] - panel[..., 2] > 0.3).sum(), (panel[..., 2] - panel[..., 0] > 0.3).sum()
    assert (red > blue) == ((change > 0).sum() > (change < 0).sum()) or abs(red - blue) < 0.2 * (red + blue)
    assert columns[: width // 3 - 20].sum() < width / 20  # the first two panels are grey


def test_a_picture_is_drawn_of_pictures_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "flat.py").write_text(
        "import torch\n"
        "def make():\n"
        "    x = torch.rand(60, 6, generator=torch.Generator().manual_seed(0))\n"
        "    y = (x[:, 0] > x[:, 1]).long()\n"
        "    return (x, y), (x[:20], y[:20])\n"
    )
    options = [
        "--data.name",
        "flat.py:make",
        "--data.validation_size",
        "10",
        "--model.name",
        "mlp800",
        "--training.epochs",
        "2",
    ]
    assert cli.main(["train", *options, "--out", "run"]) == 0
    assert cli.main(["attack", "run", "--attack", "pgd", "--eps", "0.5", "--out", "out"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["attacked.npz", "lock"]
    with np.load(tmp_path / "out/attacked.npz") as file:
        assert file["attacked"].shape == (12, 6) and np.abs(file["attacked"] - file["images"]).max() <= 0.5 + 1e-6


def test_foolbox_is_in_the_extra_of_tests():
    assert '"foolbox"' in (ROOT / "pyproject.toml").read_text()

"""Training is repeatable, resumes bit for bit, records what it did, and stops with a reason."""

import csv
import json
import math
import sys
import tomllib
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support import ROOT
from torch import nn
from torch.nn import functional as F

import margin_kernels as mk
from margin_kernels.experiments import config, data, models, objectives
from margin_kernels.experiments.data import Dataset, Split
from margin_kernels.experiments.evaluation import attacks
from margin_kernels.experiments.results import files
from margin_kernels.experiments.training import Trainer, TrainingError, build_optimiser, learning_rate
from margin_kernels.experiments.training.checkpoint import load_state, save_state


@pytest.fixture(scope="module")
def digits():
    """160 training and 60 validation digits: enough for every code path, fast enough for every test."""
    whole = data.load("digits")
    return Dataset("digits", whole.train.head(160), whole.validation.head(60), whole.test.head(60), 10, (1, 8, 8), ())


def settings(*arguments):
    base = ["--training.epochs", "4", "--training.batch_size", "48", "--training.distance_samples", "16"]
    return config.parse([*base, *arguments])


SENSITIVITY = ("--loss.kind", "margin_sensitivity")
ONE_TO_N = ("--loss.kind", "one_to_n", "--loss.one_to_n.delta", "5", "--loss.one_to_n.bound", "positive")
CROSS_ENTROPY = ("--loss.cross_entropy_weight", "1")
MARGIN = ("--loss.kind", "large_margin", "--loss.top_k", "2", "--loss.gamma", "[0.5,1,2,4,4]", *CROSS_ENTROPY)
MEDIAN = (
    *("--loss.kind", "large_margin", "--loss.top_k", "2", "--loss.second_order", "true"),
    *("--loss.cross_entropy_epochs", "1", "--loss.gamma", "[2,1.5,3]", "--loss.gamma_unit", "median"),
    *("--loss.layer_weights", "[16,1,2]", *CROSS_ENTROPY),
)
AUTO = (
    *("--loss.kind", "large_margin", "--loss.top_k", "1", "--loss.competitors", "soft", "--loss.gamma", "auto"),
    *("--loss.gamma_factor", "1.5", "--loss.alpha", "1", "--loss.label_smoothing", "0.1", "--loss.warmup", "6"),
    *CROSS_ENTROPY,
)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def without_time(history):
    return [{k: v for k, v in record.items() if k not in ("seconds", "ms_per_step")} for record in history]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model.dropout", "0.3", "--schedule.name", "cosine"),
        (
            *MARGIN,
            "--optimiser.name",
            "sgd",
            "--optimiser.lr",
            "0.05",
            "--schedule.name",
            "step",
            "--schedule.milestones",
            "[3]",
        ),
        ("--loss.kind", "hinge", "--optimiser.name", "rmsprop", "--training.precision", "bf16"),
        (*SENSITIVITY, "--loss.sensitivity.p", "inf", "--model.dropout", "0.3"),
        (*ONE_TO_N, "--loss.one_to_n.weight_norm", "true"),
        ("--training.augment", "crop_flip"),
        MEDIAN,
        (*MEDIAN, "--loss.cross_entropy_epochs", "2"),
        AUTO,
        (*AUTO, "--loss.warmup", "2", "--optimiser.lr", "0.01"),
        (*AUTO, "--loss.warmup", "1", "--loss.cross_entropy_epochs", "2"),
    ],
)
def test_two_epochs_resume_and_two_more_are_bitwise_four(digits, tmp_path, arguments):
    straight = Trainer(settings(*arguments), digits)
    straight.run()
    first = Trainer(settings(*arguments), digits, tmp_path)
    first.run(until=2)
    torch.manual_seed(12345)  # another process has another random state
    second = Trainer(settings(*arguments), digits, tmp_path)
    second.resume()
    second.run()
    assert torch.equal(weights(straight), weights(second))
    assert without_time(straight.history) == without_time(second.history)
    assert not torch.equal(weights(first), weights(second))
    loaded, _ = models.load_model(tmp_path)
    assert torch.equal(torch.cat([p.flatten() for p in loaded.parameters()]), weights(second))


def test_a_loss_begins_after_its_epochs_of_cross_entropy_with_gamma_in_medians(digits):
    cross_entropy, margin = Trainer(settings(), digits), Trainer(settings(*MEDIAN), digits)
    for trainer in (cross_entropy, margin):
        trainer.run(until=1)
    assert torch.equal(weights(cross_entropy), weights(margin)) and margin.measured == {}
    model, taps = cross_entropy.model.eval(), ("input", "relu1", "pool2", "relu3", "output")
    x, y = digits.train.batch(slice(None, 1000))
    logits, seen = taps_of(model, x)
    own = logits.gather(1, y[:, None])
    rivals = logits.scatter(1, y[:, None], -math.inf).argsort(1, descending=True)
    factors, parts = (2, 1.5, 1.5, 1.5, 3), (16, 1, 1, 1, 2)
    gamma = []
    for tap, factor in zip(taps, factors, strict=True):
        distances = []
        for j in range(9):
            gap = own - logits.gather(1, rivals[:, j : j + 1])
            (g,) = torch.autograd.grad(gap.sum(), seen[tap], retain_graph=True)
            distances.append(gap[:, 0] / (1e-6 + g.flatten(1).norm(dim=1)))
        nearest = torch.stack(distances).amin(0)
        gamma.append(factor * nearest[nearest > 0].median().item())
    for trainer in (cross_entropy, margin):
        trainer.run(until=2)
    assert not torch.equal(weights(cross_entropy), weights(margin))
    assert margin.measured["gamma"] == pytest.approx(gamma, rel=1e-3)
    assert margin.measured["layer_weights"] == pytest.approx(
        [w / g for w, g in zip(parts, gamma, strict=True)], rel=2e-3
    )
    assert list(margin.task.loss.gamma) == margin.measured["gamma"]
    assert margin.summary().measured == margin.measured


def test_gamma_auto_is_what_the_library_finds_and_stands_in_the_record(digits, tmp_path):
    trainer = Trainer(
        settings(*AUTO, "--loss.warmup", "2", "--training.epochs", "12", "--optimiser.lr", "0.01"), digits, tmp_path
    )
    trainer.run(until=1)
    assert "measured" not in trainer.summary().to_dict()
    trainer.run()
    found, loss = trainer.task.auto_gamma, trainer.task.loss
    assert bool(found.fixed) and trainer.task.layers == ("input", "relu1", "pool2", "relu3", "output")
    assert (loss.gamma, loss.competitors, loss.label_smoothing, loss.warmup) == ("auto", "soft", 0.1, 2)
    gamma = trainer.summary().measured["gamma"]
    assert gamma == pytest.approx((1.5 * found.median).tolist(), rel=1e-3) and min(gamma) > 0
    assert json.loads((tmp_path / "run.json").read_text())["measured"] == {"gamma": gamma}


def test_a_checkpoint_without_the_medians_of_gamma_auto_is_refused(digits, tmp_path):
    Trainer(settings(*AUTO), digits, tmp_path).run(until=1)
    save_state(tmp_path, {**load_state(tmp_path), "auto_gamma": {}})
    with pytest.raises(models.CheckpointError, match=r"lacks the medians of gamma auto .*--overwrite"):
        Trainer(settings(*AUTO), digits, tmp_path).resume()


def test_gamma_is_measured_in_one_way(digits):
    with pytest.raises(ValueError, match=r"loss.gamma_unit must be absolute with loss.gamma auto"):
        Trainer(settings(*AUTO, "--loss.gamma_unit", "median"), digits)


def taps_of(model, x):
    """Logits and every tapped tensor of digits_cnn."""
    x = x.clone().requires_grad_()
    seen = {"input": x}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
        for name, module in model.named_modules()
    ]
    logits = model(x)
    for handle in handles:
        handle.remove()
    seen["output"] = logits
    return logits, seen


def test_gamma_in_medians_needs_weights_to_measure(digits):
    with pytest.raises(ValueError, match=r"set loss.cross_entropy_epochs, or model.initial"):
        Trainer(settings(*MEDIAN, "--loss.cross_entropy_epochs", "0"), digits)


def test_one_value_for_each_of_layers_counts_for_every_hidden_tap():
    loss, taps = settings(*MEDIAN).loss, ("input", "relu1", "pool2", "relu3", "output")
    assert objectives.per_tap([1.0, 2.0, 3.0], loss, taps) == [1.0, 2.0, 2.0, 2.0, 3.0]
    assert objectives.per_tap([1.0, 2.0, 3.0, 4.0, 5.0], loss, taps) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert objectives.per_tap(7.0, loss, taps) == 7.0
    assert objectives.in_medians(replace(loss, gamma=3.0, layer_weights=None), taps, [1.0, 2.0, 4.0, 8.0, 16.0]) == {
        "gamma": [3.0, 6.0, 12.0, 24.0, 48.0],
        "layer_weights": [0.3333, 0.1667, 0.08333, 0.04167, 0.02083],
    }


def test_the_seed_decides_weights_and_order(digits):
    runs = [Trainer(settings("--training.seed", str(seed)), digits) for seed in (1, 1, 2)]
    for run in runs:
        run.run(until=1)
    assert torch.equal(weights(runs[0]), weights(runs[1]))
    assert not torch.equal(weights(runs[0]), weights(runs[2]))


def test_accumulated_parts_give_the_gradient_of_the_whole_batch(digits):
    index = torch.arange(47)  # 47 = 16 + 16 + 15: parts of different size
    whole, parts = (Trainer(settings("--training.accumulate", n), digits) for n in ("1", "3"))
    losses = [float(trainer.step(index)[0]) for trainer in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_gradient(digits):
    trainer = Trainer(settings("--training.clip_norm", "0.01"), digits)
    trainer.step(torch.arange(40))
    norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_learning_lowers_the_loss_and_raises_the_accuracy(digits):
    squared_hinge = ("--loss.kind", "squared_hinge")
    for arguments in ((), ("--loss.kind", "hinge"), squared_hinge, MARGIN, SENSITIVITY, ONE_TO_N, FGSM):
        options = ("--training.epochs", "8", "--training.batch_size", "16", "--optimiser.lr", "0.003")
        history = Trainer(settings(*arguments, *options), digits).run()
        assert history[-1]["train_loss"] < 0.8 * history[0]["train_loss"]
        assert history[-1]["validation_accuracy"] > 0.7


def test_distances_are_recorded_for_cross_entropy_too(digits):
    (record,) = Trainer(settings("--training.epochs", "1"), digits).run()
    assert list(record["distance"]) == ["input", "relu1", "pool2", "relu3", "output"]
    assert all(math.isfinite(value) for value in record["distance"].values())


def test_measuring_distances_does_not_change_training(digits):
    measured = []
    for samples in ("0", "16"):
        trainer = Trainer(settings("--training.distance_samples", samples, "--model.dropout", "0.5"), digits)
        trainer.run(until=2)
        measured.append(weights(trainer))
    assert torch.equal(*measured)


def test_a_diverging_run_stops_with_advice_and_keeps_the_checkpoint(digits, tmp_path):
    trainer = Trainer(settings("--optimiser.name", "sgd"), digits, tmp_path)
    trainer.run(until=1)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        trainer.model.head.bias.fill_(math.nan)
    with pytest.raises(
        TrainingError, match=r"the loss is nan at epoch 2, step 1. The last checkpoint \(epoch 1\) is kept"
    ):
        trainer.run()
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


def test_records_hold_every_epoch_the_config_and_no_path(digits, tmp_path):
    cfg = settings("--data.dir", str(tmp_path))
    Trainer(cfg, digits, tmp_path / "run").run(until=2)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [row["epoch"] for row in rows] == ["1", "2"] and float(rows[1]["distance.input"])
    assert run["history"][1]["train_loss"] == pytest.approx(float(rows[1]["train_loss"]))
    assert run["versions"]["torch"] == torch.__version__ and run["config"]["loss"]["kind"] == "cross_entropy"
    assert str(tmp_path) not in (tmp_path / "run" / "run.json").read_text()
    assert config.parse(["--config", str(tmp_path / "run" / "config.yaml")]) == cfg


def test_resume_refuses_another_config_and_a_broken_file(digits, tmp_path):
    Trainer(settings(), digits, tmp_path).run(until=1)
    other = Trainer(settings("--optimiser.lr", "0.5", "--training.seed", "3"), digits, tmp_path)
    with pytest.raises(models.CheckpointError, match=r"other settings \(optimiser.lr, training.seed\)"):
        other.resume()
    path = tmp_path / "checkpoint.pt"
    state = load_state(tmp_path)
    del state["config"]["training"]["repeat"]  # as written before the field existed
    save_state(tmp_path, state)
    same = Trainer(settings(), digits, tmp_path)
    same.resume()
    assert same.epoch == 1
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(models.CheckpointError, match=r"checkpoint.pt must end with its checksum"):
        Trainer(settings(), digits, tmp_path).resume()
    path.unlink()
    with pytest.raises(models.CheckpointError, match="nothing to resume"):
        Trainer(settings(), digits, tmp_path).resume()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_json_holds_no_nan(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": [1.0, math.nan], "b": {"c": math.inf}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.0, None], "b": {"c": None}}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"name": "constant"}, [1, 1, 1]),
        ({"name": "cosine"}, [1, 0.5 * (1 + math.cos(math.pi * 0.3)), 0.5]),
        ({"name": "step", "milestones": [3, 5], "factor": 0.1}, [1, 0.1, 0.01]),
        ({"name": "exponential", "factor": 0.5}, [1, 0.125, 1 / 32]),
        ({"name": "constant", "warmup": 6}, [0, 0.5, 5 / 6]),
    ],
)
def test_schedules_follow_their_formulas(schedule, expected):
    cfg = replace(
        config.Config(),
        optimiser=config.OptimiserConfig(lr=1.0),
        schedule=config.ScheduleConfig(**schedule),
        training=config.TrainingConfig(epochs=10),
    )
    assert [learning_rate(cfg, epoch) for epoch in (0, 3, 5)] == pytest.approx(expected)


def test_hinge_is_the_literal_formula():
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_(True)
    target = torch.arange(9) % 5
    literal = sum(
        max(0.0, 1 + max(float(z[j] - z[y]) for j in range(5) if j != y))
        for z, y in zip(logits.detach(), target.tolist(), strict=True)
    )
    assert objectives.hinge(logits, target).item() == pytest.approx(literal / 9)
    assert torch.autograd.gradcheck(lambda z: objectives.hinge(z, target), logits)


FGSM = ("--loss.kind", "fgsm_training", "--loss.adversarial_training.eps", "0.1")


@pytest.mark.parametrize("steps", [1, 3])
def test_adversarial_training_is_the_mean_over_images_and_attacked_images(digits, steps):
    torch.manual_seed(0)
    model = models.build("digits_cnn", (1, 8, 8), 10, dropout=0.5).train()
    options = config.AdversarialTrainingConfig(eps=0.1, steps=steps)
    task = objectives.build(model, config.LossConfig(kind="fgsm_training", adversarial_training=options), ())
    x, y = digits.train.batch(slice(0, 20))
    torch.manual_seed(3)
    loss = task(x, y)["loss"]
    grads = torch.autograd.grad(loss, list(model.parameters()))
    torch.manual_seed(3)
    attacked = attacks.fgsm(model, x, y, 0.1) if steps == 1 else attacks.pgd(model, x, y, 0.1, steps=3, objective="ce")
    assert (attacked.images - x).abs().max() == pytest.approx(0.1, abs=1e-6)
    expected = (F.cross_entropy(model(x), y) + F.cross_entropy(model(attacked.images), y)) / 2
    torch.testing.assert_close(loss, expected)
    for a, b in zip(grads, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b)
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("steps", [1, 3])
def test_adversarial_training_does_not_clip_whitened_images(steps):
    digits = data.load("digits", preprocess="gcn_zca")
    arguments = ("--data.preprocess", "gcn_zca", *FGSM, "--loss.adversarial_training.steps", str(steps))
    trainer = Trainer(settings(*arguments), digits)
    assert trainer.task.bounds == (-math.inf, math.inf) and trainer.description["preprocess"] == "gcn_zca"
    x, y = digits.train.batch(slice(0, 20))
    assert x.min() < -0.5 and x.max() > 1.5
    torch.manual_seed(3)
    loss = trainer.task(x, y)["loss"]
    torch.manual_seed(3)
    free = (-math.inf, math.inf)
    if steps == 1:
        attacked = attacks.fgsm(trainer.model, x, y, 0.1, bounds=free)
    else:
        attacked = attacks.pgd(trainer.model, x, y, 0.1, steps=3, objective="ce", bounds=free)
    torch.testing.assert_close((attacked.images - x).abs().max(), torch.tensor(0.1), rtol=0, atol=1e-5)
    expected = (F.cross_entropy(trainer.model(x), y) + F.cross_entropy(trainer.model(attacked.images), y)) / 2
    torch.testing.assert_close(loss, expected)


def after_twelve_epochs(digits, *arguments):
    options = ("--training.epochs", "12", "--training.batch_size", "16", "--training.distance_samples", "0")
    trainer = Trainer(settings(*options, *arguments), digits)
    trainer.run()
    return trainer.model.eval()


def test_adversarial_training_defends_against_the_attack_it_trains_on(digits):
    accuracies = []
    for arguments in ((), FGSM):
        model = after_twelve_epochs(digits, *arguments)
        x, y = digits.test.batch(slice(None))
        attacked = attacks.fgsm(model, x, y, 0.1).images
        accuracies.append(float((model(attacked).argmax(1) == y).float().mean()))
    assert accuracies[1] > accuracies[0] + 0.05


VAT = ("--loss.kind", "vat", "--loss.virtual_adversarial.eps", "0.5")


@pytest.mark.parametrize("iterations", [1, 3])
def test_virtual_adversarial_training_is_the_literal_algorithm(digits, iterations):
    """Image by image, probabilities and norms written out; the network has dropout, and batch norm."""
    torch.manual_seed(0)
    convolution = models.build("digits_cnn", (1, 8, 8), 10, dropout=0.5)
    model = nn.Sequential(nn.BatchNorm2d(1), convolution).double().train()
    options = config.VirtualAdversarialConfig(weight=0.7, eps=0.5, xi=0.01, iterations=iterations)
    task = objectives.build(model, config.LossConfig(kind="vat", virtual_adversarial=options), ())
    x, y = digits.train.batch(slice(0, 12))
    x = x.double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(3)
    out = task(x, y)
    grads = torch.autograd.grad(out["loss"], list(model.parameters()))
    statistics = {key: value.clone() for key, value in model.state_dict().items() if "running" in key}
    model.load_state_dict(state)

    def divergence(p, q):
        return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))

    torch.manual_seed(3)
    drawn = torch.randn_like(x)
    model.eval()
    moved = []
    for image, d in zip(x, drawn, strict=True):
        p = model(image[None])[0].softmax(0).detach()
        for _ in range(iterations):
            v = (0.01 * d / d.pow(2).sum().sqrt()).requires_grad_()
            (d,) = torch.autograd.grad(divergence(p, model((image + v)[None])[0].softmax(0)), v)
        moved.append(image + 0.5 * d / d.pow(2).sum().sqrt())
    model.train()
    logits, other = model(x), model(torch.stack(moved))
    torch.testing.assert_close(torch.stack(moved).sub(x).flatten(1).norm(dim=1), torch.full((12,), 0.5).double())
    expected = F.cross_entropy(logits, y)
    for p, q in zip(logits.detach().softmax(1), other.softmax(1), strict=True):
        expected = expected + 0.7 / 12 * divergence(p, q)
    torch.testing.assert_close(out["loss"], expected)
    torch.testing.assert_close(out["output"], logits.detach())
    for a, b in zip(grads, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b)
    for key, value in statistics.items():  # batch norm has seen x and x + r, and no iterate
        torch.testing.assert_close(value, model.state_dict()[key])
    assert model.training and all(p.grad is None for p in model.parameters())


def test_virtual_adversarial_training_smooths_the_predictions(digits):
    divergences = []
    for arguments in ((), VAT):
        model = after_twelve_epochs(digits, *arguments)
        task = objectives.build(model, settings(*VAT).loss, ())
        x, _ = digits.test.batch(slice(None))
        torch.manual_seed(0)
        with torch.no_grad():
            moved = model(x + 0.5 * task.direction(x))
            divergences.append(float(objectives.kl_divergence(model(x), moved)))
    assert divergences[1] < 0.8 * divergences[0]


def test_a_saturated_or_broken_vat_is_a_zero_step_or_a_clear_error(digits):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.zero_()
    task = objectives.build(model, settings(*VAT).loss, ())
    x, y = digits.train.batch(slice(0, 5))
    assert not task.direction(x).any() and math.isfinite(float(task(x, y)["loss"].detach()))
    tiny = objectives.unit(torch.tensor([[3e-30, 4e-30], [0.0, 0.0]]))
    torch.testing.assert_close(tiny, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    for key, value in (("iterations", 0), ("eps", 0.0), ("xi", -1.0)):
        with pytest.raises(ValueError, match=rf"loss.virtual_adversarial.{key} must be .*, got {value}"):
            Trainer(settings("--loss.kind", "vat", f"--loss.virtual_adversarial.{key}", str(value)), digits)


def test_a_centred_run_keeps_the_mean_of_its_training_images(digits, tmp_path):
    trainer = Trainer(settings("--model.center", "true"), digits, tmp_path)
    mean = digits.train.images.double().mean(0)
    torch.testing.assert_close(trainer.model.center.mean.double(), mean, atol=1e-7, rtol=0)
    trainer.run(until=1)
    loaded, description = models.load_model(tmp_path)
    assert torch.equal(loaded.center.mean, trainer.model.center.mean) and description["options"]["center"] is True
    x = digits.test.batch(slice(0, 7))[0]
    assert torch.equal(loaded(x), trainer.model.eval()(x))


def test_repeated_passes_are_epochs_without_the_records_between_them(digits):
    options = ("--training.distance_samples", "0", "--optimiser.name", "sgd")
    single = Trainer(settings(*options, "--training.epochs", "6"), digits)
    triple = Trainer(settings(*options, "--training.epochs", "2", "--training.repeat", "3"), digits)
    short, long = triple.run(), single.run()
    assert torch.equal(weights(single), weights(triple)) and triple.steps_per_epoch == 3 * single.steps_per_epoch
    assert short[1]["validation_accuracy"] == long[5]["validation_accuracy"]
    for key in ("train_loss", "train_accuracy"):
        assert short[0][key] == pytest.approx(sum(record[key] for record in long[:3]) / 3)


def test_training_stops_at_the_training_accuracy_it_is_given(digits, tmp_path):
    options = ("--training.epochs", "12", "--training.batch_size", "16", "--training.distance_samples", "0")
    whole = Trainer(settings(*options), digits).run()
    goal = whole[5]["train_accuracy"]
    first = next(i for i, record in enumerate(whole) if record["train_accuracy"] >= goal)
    assert 0 < first < 11
    stopped = Trainer(settings(*options, "--training.stop_at_train_accuracy", str(goal)), digits, tmp_path)
    assert without_time(stopped.run()) == without_time(whole[: first + 1])
    again = Trainer(settings(*options, "--training.stop_at_train_accuracy", str(goal)), digits, tmp_path)
    again.resume()
    assert len(again.run()) == first + 1


def test_large_margin_without_margin_weight_trains_as_cross_entropy(digits):
    plain = Trainer(settings(), digits)
    margin = Trainer(settings(*MARGIN, "--loss.margin_weight", "0"), digits)
    for trainer in (plain, margin):
        trainer.run(until=1)
    torch.testing.assert_close(weights(plain), weights(margin), rtol=1e-3, atol=1e-5)


def test_margin_sensitivity_without_weight_trains_as_the_hinge(digits):
    plain = Trainer(settings("--loss.kind", "hinge"), digits)
    sensitivity = Trainer(settings(*SENSITIVITY, "--loss.sensitivity.weight", "0"), digits)
    for trainer in (plain, sensitivity):
        trainer.run(until=1)
    torch.testing.assert_close(weights(plain), weights(sensitivity), rtol=1e-3, atol=1e-5)


def test_margin_sensitivity_lowers_the_norm_that_it_is_given(digits):
    index, norms = torch.arange(60), []
    options = ("--training.epochs", "8", "--training.batch_size", "16", "--optimiser.lr", "0.003")
    for weight in ("0", "0.1"):
        trainer = Trainer(settings(*SENSITIVITY, "--loss.sensitivity.weight", weight, *options), digits)
        trainer.run()
        norms.append(float(trainer.task(*digits.train.batch(index, "cpu"))["norm"].mean()))
    assert norms[1] < 0.7 * norms[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            (*SENSITIVITY, "--loss.sensitivity.power", "1", "--loss.sensitivity.top_k", "3"),
            mk.MarginSensitivityLoss(0.1, 2, 1, top_k=3),
        ),
        (
            (*SENSITIVITY, "--loss.sensitivity.p", "inf", "--loss.sensitivity.classification", "cross_entropy"),
            mk.MarginSensitivityLoss(0.1, "inf", 2, "cross_entropy"),
        ),
        ((*ONE_TO_N, "--loss.one_to_n.cross_entropy", "true"), mk.OneToNLoss(5.0, "positive", True)),
    ],
)
def test_options_of_a_loss_reach_it_and_the_first_step_has_its_value(digits, arguments, expected):
    trainer = Trainer(settings(*arguments), digits)
    assert repr(trainer.task.loss) == repr(expected)
    assert trainer.task.layers == (("input",) if expected.needs == "taps" else ())
    x, y = digits.train.batch(torch.arange(40), "cpu")
    x.requires_grad_()
    logits = trainer.model(x)
    value = expected(logits, y, [x]) if expected.needs == "taps" else expected(logits, y)
    loss, hits = trainer.step(torch.arange(40))
    assert float(loss) / 40 == pytest.approx(float(value.detach()), rel=1e-5)
    assert int(hits) == int((logits.argmax(1) == y).sum())


def test_weight_norm_takes_the_networks_last_layer(digits):
    trainer = Trainer(settings(*ONE_TO_N, "--loss.one_to_n.weight_norm", "true"), digits)
    assert trainer.task.loss.weight_norm is trainer.model.head
    options = config.LossConfig(kind="one_to_n", one_to_n=config.OneToNConfig(weight_norm=True))
    with pytest.raises(ValueError, match=r"weight_norm needs a network whose logits come from a linear layer `head`"):
        objectives.build(nn.Linear(2, 2), options, ())


def test_layer_names_are_expanded_and_losses_chosen_by_name():
    assert objectives.layers(["input", "hidden", "output"], ("a", "b")) == ("input", "a", "b", "output")
    with pytest.raises(ValueError, match=r"loss.kind must be one of cross_entropy, hinge, large_margin"):
        objectives.build(nn.Linear(2, 2), config.LossConfig(kind="svm"), ())
    task = objectives.build(nn.Linear(3, 4), config.LossConfig(), ())
    x, y = torch.rand(5, 3), torch.tensor([0, 1, 2, 3, 0])
    out = task(x, y)
    assert torch.equal(out["loss"], F.cross_entropy(task.model(x), y)) and torch.equal(out["output"], task.model(x))


def test_settings_that_cannot_run_here_say_so(digits):
    with pytest.raises(ValueError, match=r"fp16, which needs a CUDA device"):
        Trainer(settings("--training.precision", "fp16"), digits)
    with pytest.raises(ValueError, match=r"torch.compile cannot follow the gradients of loss.kind fgsm_training"):
        Trainer(settings(*FGSM, "--training.compile", "true"), digits)
    with pytest.raises(ValueError, match=r"cannot follow the gradients of loss.kind vat"):
        Trainer(settings(*VAT, "--training.compile", "true"), digits)
    with pytest.raises(ValueError, match=r"optimiser.name must be one of sgd, adam, rmsprop, got 'lion'"):
        build_optimiser(replace(config.Config(), optimiser=config.OptimiserConfig(name="lion")), [torch.zeros(1)])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"training.device must be cpu, got .* sees no CUDA device"):
            Trainer(settings("--training.device", "cuda"), digits)


def test_without_tensorboard_its_extra_is_named(digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    asked = settings("--training.tensorboard", "true")
    with pytest.raises(ValueError, match=r'tensorboard needs a package: pip install "margin_kernels\[tensorboard\]"'):
        Trainer(asked, digits, tmp_path)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["tensorboard"] == ["tensorboard"]


def test_tensorboard_is_given_every_number_of_every_epoch(digits, tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, name, value, epoch):
            written.append((name, value, epoch))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    trainer = Trainer(settings("--training.tensorboard", "true"), digits, tmp_path)
    trainer.run()
    names = {name for name, _, _ in written}
    assert {"train_loss", "validation_accuracy", "lr", "distance/input", "distance/output"} <= names
    for record in trainer.history:
        assert ("train_loss", record["train_loss"], record["epoch"]) in written
        assert ("distance/input", record["distance"]["input"], record["epoch"]) in written


@pytest.mark.parametrize("options", [MARGIN, SENSITIVITY, ()], ids=["large margin", "sensitivity", "cross-entropy"])
def test_compiled_steps_train_as_plain_ones(options, digits, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = (Trainer(settings(*options, "--training.compile", flag), digits) for flag in ("false", "true"))
    for number in range(3):
        index = torch.arange(20 * number, 20 * number + 20)
        for one, other in zip(compiled.step(index), plain.step(index), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_runs_on_the_gpu(digits, precision):
    trainer = Trainer(settings(*MARGIN, "--training.device", "cuda", "--training.precision", precision), digits)
    history = trainer.run()
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_batches_of_a_split_cover_it_in_order():
    split = Split(torch.arange(10).view(10, 1, 1, 1).float(), torch.arange(10))
    assert torch.cat([y for _, y in split.batches(4)]).tolist() == list(range(10))


def test_a_run_can_start_from_the_weights_of_another(digits, tmp_path):
    first = Trainer(settings(), digits, tmp_path / "first")
    first.run(until=1)
    second = Trainer(settings("--model.initial", str(tmp_path / "first"), *MARGIN, "--training.seed", "7"), digits)
    assert torch.equal(weights(first), weights(second))
    with pytest.raises(ValueError, match=r"model\.initial: .* holds .*digits_cnn.*, and this run trains .*mlp800"):
        Trainer(settings("--model.initial", str(tmp_path / "first"), "--model.name", "mlp800"), digits)

"""Measurements are what their formulas say; the table, the page and the command line show the same numbers."""

import json
import math
import re
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

from margin_kernels.experiments import cli, config, data, models
from margin_kernels.experiments.config import EvaluationConfig
from margin_kernels.experiments.data import Split
from margin_kernels.experiments.demo import digits
from margin_kernels.experiments.evaluation import measure, signed_distance
from margin_kernels.experiments.report import figures, page, table
from margin_kernels.experiments.results import SINGLE_SAMPLES, Run, merged
from margin_kernels.experiments.training import Trainer, time_steps

SMALL = EvaluationConfig(
    curve=[0.0, 0.1], deepfool_samples=30, deepfool_iterations=10, distance_samples=30, steps=3, timing_repeats=2
)


class Linear(nn.Module):
    """A linear classifier of 1x2x3 images whose only tap besides input and output is the flattened image."""

    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.flatten(x))


def compared(evaluation, label="a"):
    """A network of a report with nothing but its measurements."""
    run = Run(config=config.Config(), network={}, parameters=1, versions={}, machine={}, history=[])
    return table.Compared(label, run, evaluation)


@pytest.fixture
def linear():
    torch.manual_seed(0)
    model = Linear()
    x = torch.rand(50, 1, 2, 3)
    y = torch.where(torch.arange(50) % 5 == 0, torch.arange(50) % 4, model(x).argmax(1))
    return model, Split(x, y)


def exact(model, split, q):
    """Literal signed distances of a linear classifier."""
    result = []
    for x, y in zip(split.images.flatten(1), split.labels.tolist(), strict=True):
        z, w = model.head(x).detach(), model.head.weight.detach()
        result.append(min(float((z[y] - z[j]) / (1e-6 + (w[y] - w[j]).norm(q))) for j in range(4) if j != y))
    return torch.tensor(result)


@pytest.mark.parametrize(("p", "q"), [(1.0, math.inf), (2.0, 2), (math.inf, 1)])
def test_signed_distance_of_a_linear_classifier_is_exact(linear, p, q):
    model, split = linear
    distance = signed_distance(model, split, ("flatten",), p, batch_size=16)
    torch.testing.assert_close(distance[:, 0], exact(model, split, q), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance[:, 1], distance[:, 0], rtol=1e-5, atol=1e-7)
    assert ((distance > 0).all(1) == (model(split.images).argmax(1) == split.labels)).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attacked_accuracy_of_a_linear_classifier_is_exact(linear):
    """Unclipped, FGSM on the gap moves z_j - z_y by eps ||w_j - w_y||_1 for the leading j: with two classes exactly
    the samples within linf distance eps fall."""
    model, split = linear
    images = split.images * 0.2 + 0.4  # eps away from the ends of the data range, where clipping would shorten steps
    with torch.no_grad():
        model.head.weight[2:] = 0
        model.head.bias[2:] = -100
        gap = model(images)[:, 0] - model(images)[:, 1]
        model.head.bias[0] -= gap.median()  # the boundary runs through the middle of the samples
        logits = model(images)
    distance = (logits[:, 0] - logits[:, 1]).abs() / (model.head.weight[0] - model.head.weight[1]).norm(1)
    eps = distance.median().item() + 1e-4
    result = measure.at_radius(model, Split(images, logits.argmax(1)), eps, SMALL)
    share = float((distance > eps).float().mean())
    assert 0.3 < share < 0.7
    for key in ("fgsm_gap", "ifgsm_gap", "worst"):
        assert result[key] == pytest.approx(share)
    assert result["zero_gap"] == 0


def test_deepfool_norms_count_only_what_is_classified_correctly(linear):
    model, split = linear
    norms = measure.boundary_norms(model, split, SMALL)
    right = model(split.images).argmax(1) == split.labels
    distance = exact(model, split, 2)[right]
    assert norms["deepfool_norm_correct"] == pytest.approx(float((1.02 * (distance + 1e-4)).mean()), rel=1e-4)
    ratio = 1.02 * (distance + 1e-4) / split.images[right].flatten(1).norm(dim=1)
    assert norms["rho_adv"] == pytest.approx(float(ratio.mean()), rel=1e-4)
    assert norms["deepfool_missed"] == 0
    everything = 1.02 * (exact(model, split, 2).abs() + 1e-4)  # a wrong sample too has a way to another class
    wrong = ~right
    assert 0 < int(wrong.sum()) < len(split)
    signed = torch.tensor(norms["deepfool_norms"])
    assert torch.equal(signed < 0, wrong)
    torch.testing.assert_close(signed[right], everything[right], rtol=1e-4, atol=0)
    assert norms["deepfool_norm"] == pytest.approx(float(signed.abs().mean()), rel=1e-4)


def test_a_misclassified_sample_counts_by_its_distance_to_another_prediction():
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))  # boundary x_0 = 0, predicted 0 right of it
    split = Split(torch.tensor([[0.5, 0.2], [0.25, 0.0]]).view(2, 1, 1, 2), torch.tensor([0, 1]))
    norms = measure.boundary_norms(model, split, SMALL)
    first, second = (1.02 * (distance + 1e-4) for distance in (0.5, 0.25))
    assert norms["deepfool_norms"] == pytest.approx([first, -second], rel=1e-4)
    assert norms["deepfool_norm"] == pytest.approx((first + second) / 2, rel=1e-4)
    assert norms["deepfool_norm_correct"] == pytest.approx(first, rel=1e-4)


def test_deepfool_steps_can_be_limited(linear):
    """A linear classifier is crossed in one step of the length of the distance, or in several shorter ones."""
    model, split = linear
    free = measure.boundary_norms(model, split, SMALL)
    limit = statistics.median(abs(margin) for margin in free["deepfool_norms"]) / 3
    one = measure.boundary_norms(model, split, replace(SMALL, deepfool_iterations=1, deepfool_step_limit=limit))
    near = sum(abs(margin) < limit for margin in free["deepfool_norms"])
    assert 0 < near < len(split) and one["deepfool_missed"] == len(split) - near
    many = measure.boundary_norms(model, split, replace(SMALL, deepfool_iterations=200, deepfool_step_limit=limit))
    assert many["deepfool_missed"] == 0 and many["deepfool_norm"] == pytest.approx(free["deepfool_norm"], rel=0.05)


def test_a_sample_without_a_boundary_is_counted_as_missed(linear):
    model, split = linear
    with torch.no_grad():
        model.head.weight.zero_()
    norms = measure.boundary_norms(model, split, SMALL)
    assert (
        norms["deepfool_missed"] == len(split) and math.isnan(norms["deepfool_norm"]) and math.isnan(norms["rho_adv"])
    )


def test_ifgsm_on_fewer_images_is_ifgsm_on_the_first_of_them(linear):
    model, split = linear
    part = measure.at_radius(model, split, 0.1, replace(SMALL, ifgsm_samples=20, batch_size=7))
    whole, first = (measure.at_radius(model, s, 0.1, SMALL) for s in (split, split.head(20)))
    for key in ("ifgsm_ce", "ifgsm_gap", "worst"):
        assert part[key] == first[key]
    for key in ("fgsm_ce", "fgsm_gap", "zero_ce", "zero_gap"):
        assert part[key] == pytest.approx(whole[key])
    none = measure.at_radius(model, split, 0.1, replace(SMALL, ifgsm_samples=0))
    assert "ifgsm_gap" not in none and none["worst"] <= min(none["fgsm_ce"], none["fgsm_gap"])


def test_saturated_images_are_counted_beside_the_zero_gradients(linear):
    """Of a network with scaled logits: the share of 1 - p_y < 6e-8 by a literal loop in double precision; no attack
    stands still there."""
    model, split = linear
    with torch.no_grad():
        model.head.weight.mul_(100)
        model.head.bias.mul_(100)
    result = measure.at_radius(model, split, 0.05, SMALL)
    count = 0
    for z, y in zip(model(split.images).detach().double(), split.labels.tolist(), strict=True):
        count += sum(math.exp(float(z[j] - z[y])) for j in range(4) if j != y) < 6e-8
    assert 0.2 < count / len(split) < 1 and result["saturated"] == pytest.approx(count / len(split))
    assert result["zero_ce"] == result["zero_gap"] == 0
    models = [compared({**result, "distance": {}, "eps": 0.05})]
    rows = {row.key: table.cell(row, models[0]) for section in table.sections(models) for row in section.rows}
    assert rows["saturated"] == f"{100 * count / len(split):.1f} %"
    del models[0].evaluation["saturated"]  # a record from before
    assert all(row.key != "saturated" for section in table.sections(models) for row in section.rows)


def test_no_radius_is_attacked_twice_and_zero_not_at_all(linear, monkeypatch):
    model, split = linear
    seen = []
    original = measure.at_radius
    monkeypatch.setattr(measure, "at_radius", lambda m, s, eps, *rest: seen.append(eps) or original(m, s, eps, *rest))
    settings = replace(SMALL, eps=0.1, curve=[0.0, 0.1, 0.2, 0.2], ifgsm_samples=10, attack_samples=30)
    result = measure.evaluate(model, split, ("flatten",), settings)
    assert seen == [0.1, 0.2]
    hits = model(split.images).argmax(1) == split.labels
    assert result["curves"]["fgsm_ce"][0] == pytest.approx(float(hits[:30].float().mean()))
    assert result["curves"]["ifgsm_gap"][0] == pytest.approx(float(hits[:10].float().mean()))
    assert result["curves"]["fgsm_gap"][1] == result["fgsm_gap"]
    assert result["curves"]["fgsm_gap"][2] == result["curves"]["fgsm_gap"][3]


def test_what_is_not_measured_is_left_out_of_record_table_and_page(linear):
    model, split = linear
    settings = replace(SMALL, ifgsm_samples=0, deepfool_samples=0, distance_samples=0)
    result = measure.evaluate(model, split, ("flatten",), settings)
    assert (
        result["distance"] == {} and "deepfool_norm" not in result and set(result["curves"]) == {"fgsm_ce", "fgsm_gap"}
    )
    models = [compared(result)]
    titles = [section.title for section in table.sections(models)]
    assert not any("signed distance" in title for title in titles)
    rows = {row.key: table.cell(row, models[0]) for section in table.sections(models) for row in section.rows}
    assert (
        rows["ifgsm_gap"] == "-" and rows["deepfool_norm"] == "-" and rows["clean"] == f"{100 * result['clean']:.1f} %"
    )
    groups = figures.all_figures(models)
    assert {heading: [figure.name for figure in group] for heading, group in groups.items()} == {
        "Accuracy against eps": ["accuracy_fgsm_gap", "accuracy_fgsm_ce"]
    }


def other_linear(split):
    torch.manual_seed(5)
    model = Linear()
    with torch.no_grad():  # between the network of the fixture and a random one: its attacks transfer in part
        model.head.weight.mul_(0.5)
    return model


def literal_right(judge, images, labels):
    return [int(judge(x[None]).argmax()) == int(y) for x, y in zip(images, labels, strict=True)]


@pytest.mark.parametrize("eps", [0.05, 0.2])
def test_black_box_images_are_made_on_the_attacker_and_reverse_ones_here(linear, eps):
    """Both against a loop over single images with the attack's formula written out."""
    model, split = linear
    attacker = other_linear(split)
    settings = replace(SMALL, batch_size=16, ifgsm_samples=20)
    result = measure.at_radius(model, split, eps, settings, attacker=attacker)

    def literal(maker, x, y, method, objective):
        steps, size = (1, eps) if method == "fgsm" else (SMALL.steps, 2 * eps / SMALL.steps)
        current = x.clone()
        for _ in range(steps):
            leaf = current.clone().requires_grad_()
            z = maker(leaf[None])[0]
            rest = [z[j] for j in range(4) if j != y]
            value = torch.logsumexp(z, 0) - z[y] if objective == "ce" else torch.stack(rest).max() - z[y]
            (gradient,) = torch.autograd.grad(value, leaf)
            current = torch.minimum(torch.maximum(current + size * gradient.sign(), x - eps), x + eps).clamp(0, 1)
        return current

    shares = {}
    for side, maker, judge in (("black_box", attacker, model), ("reverse", model, attacker)):
        for method, count in (("fgsm", 50), ("ifgsm", 20)):
            for objective in ("ce", "gap"):
                x, y = split.images[:count], split.labels[:count].tolist()
                attacked = [literal(maker, a, b, method, objective) for a, b in zip(x, y, strict=True)]
                shares[side, f"{method}_{objective}"] = sum(literal_right(judge, attacked, y)) / count
    for (side, key), share in shares.items():
        assert result[side][key] == pytest.approx(share), (side, key)
    assert len(set(shares.values())) > 2
    alone = measure.at_radius(model, split, eps, settings)
    assert "black_box" not in alone and all(result[key] == alone[key] for key in alone)


def test_curves_of_the_black_box_stand_beside_the_white_box_ones(linear, monkeypatch, tmp_path):
    model, split = linear
    attacker = other_linear(split)
    monkeypatch.setattr(measure, "load_attacker", lambda folder, part, device: attacker)
    settings = replace(SMALL, eps=0.1, curve=[0.0, 0.1, 0.2], attacker="runs/ce", ifgsm_samples=10)
    result = measure.evaluate(model, split, ("flatten",), settings)
    at = measure.at_radius(model, split, 0.2, settings, attacker=attacker)
    for side in ("black_box", "reverse"):
        assert set(result[f"{side}_curves"]) == set(result["curves"])
        for key, values in result[f"{side}_curves"].items():
            assert values[1:] == [result[side][key], at[side][key]]
    hits = [model_(split.images).argmax(1) == split.labels for model_ in (model, attacker)]
    for curves, right in (("black_box_curves", hits[0]), ("reverse_curves", hits[1])):
        assert result[curves]["fgsm_ce"][0] == pytest.approx(float(right.float().mean()))
        assert result[curves]["ifgsm_gap"][0] == pytest.approx(float(right[:10].float().mean()))
    models = [compared(result)]
    rows = {row.key: row.value(models[0]) for section in table.sections(models) for row in section.rows}
    assert rows["black_box_fgsm_gap"] == result["black_box"]["fgsm_gap"]
    assert rows["reverse_ifgsm_ce"] == result["reverse"]["ifgsm_ce"]


def test_accuracy_under_noise_is_that_of_a_literal_loop(linear):
    model, split = linear
    settings = replace(SMALL, noise_sigmas=[0.0, 0.2, 0.6], noise_seed=3)
    result = measure.evaluate(model, split, ("flatten",), settings)
    noise = torch.randn(split.images.shape, generator=torch.Generator().manual_seed(3))
    for sigma, share in zip([0.0, 0.2, 0.6], result["noise"], strict=True):
        noisy = [(x + sigma * n).clamp(0, 1) for x, n in zip(split.images, noise, strict=True)]
        assert share == pytest.approx(sum(literal_right(model, noisy, split.labels)) / 50)
    assert result["noise"][0] == result["clean"] > result["noise"][2] and result["noise_sigmas"] == [0.0, 0.2, 0.6]
    assert measure.under_noise(model, split, replace(settings, batch_size=7)) == result["noise"]
    part = measure.evaluate(model, split, ("flatten",), replace(settings, noise_samples=20))
    assert part["noise"] == measure.under_noise(model, split.head(20), settings) != result["noise"]
    assert measure.under_noise(model, split, replace(settings, noise_seed=4)) != result["noise"]
    images = torch.cat([split.images] * 2).mul(255).byte()
    assert measure.under_noise(model, Split(images, split.labels.repeat(2)), settings)[0] > 0.5  # bytes are scaled
    with pytest.raises(ValueError, match=r"evaluation.noise_sigmas must be numbers >= 0, got \[-0.1\]"):
        measure.under_noise(model, split, replace(settings, noise_sigmas=[-0.1]))


def test_an_attacker_must_be_there_and_take_the_same_images(linear, tmp_path):
    _, split = linear
    with pytest.raises(models.CheckpointError, match=r"model.json: missing; .* is not the folder of a trained run"):
        measure.load_attacker(tmp_path, split)
    description = {"name": "digits_cnn", "shape": [1, 8, 8], "classes": 10, "options": {}}
    models.save_model(tmp_path, models.build("digits_cnn", (1, 8, 8), 10), description)
    with pytest.raises(ValueError, match=r"evaluation.attacker: .* images of shape \[1, 8, 8\], these are \[1, 2, 3\]"):
        measure.load_attacker(tmp_path, split)
    with pytest.raises(ValueError, match=r"takes images with data.preprocess 'none', these have 'gcn_zca'"):
        measure.load_attacker(tmp_path, replace(split, preprocess="gcn_zca"))
    models.save_model(tmp_path, models.build("digits_cnn", (1, 8, 8), 10), {**description, "preprocess": "gcn_zca"})
    with pytest.raises(ValueError, match=r"takes images with data.preprocess 'gcn_zca', these have 'none'"):
        measure.load_attacker(tmp_path, Split(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])))


def test_whitened_images_are_not_clipped(linear):
    """Where clipping would undo most of a step, the attacked share of a linear classifier is exact all the same."""
    model, split = linear
    images = 8 * split.images - 4
    with torch.no_grad():
        model.head.weight[2:] = 0
        model.head.bias[2:] = -100
        gap = model(images)[:, 0] - model(images)[:, 1]
        model.head.bias[0] -= gap.median()
        logits = model(images)
    distance = (logits[:, 0] - logits[:, 1]).abs() / (model.head.weight[0] - model.head.weight[1]).norm(1)
    eps = distance.median().item() + 1e-4
    whitened = Split(images, logits.argmax(1), "gcn_zca")
    result = measure.at_radius(model, whitened, eps, SMALL)
    for key in ("fgsm_gap", "ifgsm_gap", "worst"):
        assert result[key] == pytest.approx(float((distance > eps).float().mean()))
    settings = replace(SMALL, noise_sigmas=[1.0])
    noisy = images + torch.randn(images.shape, generator=torch.Generator().manual_seed(settings.noise_seed))
    share = float((model(noisy).argmax(1) == whitened.labels).float().mean())
    assert measure.under_noise(model, whitened, settings) == [pytest.approx(share)]
    assert whitened.head(3).preprocess == "gcn_zca"


def test_worst_of_the_attacks_is_at_most_the_weakest_accuracy(linear):
    model, split = linear
    result = measure.evaluate(model, split, ("flatten",), SMALL)
    for i, eps in enumerate(SMALL.curve):
        values = [result["curves"][key][i] for key in result["curves"]]
        if eps == 0:
            assert values == [result["clean"]] * 4
        else:
            assert result["worst"] <= min(values) <= result["clean"]
    assert list(result["distance"]) == ["input", "flatten", "output"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two evaluated runs of the command line, and its report."""
    root = tmp_path_factory.mktemp("runs")
    quick = ["--training.epochs", "2", "--training.distance_samples", "16", "--evaluation.curve", "[0,0.1]"]
    quick += [
        "--evaluation.deepfool_samples",
        "20",
        "--evaluation.timing_repeats",
        "2",
        "--evaluation.attack_samples",
        "50",
    ]
    for name in ("digits_cross_entropy", "digits_large_margin_l2"):
        assert cli.main(["train", "--config", name, "--out", str(root / name), *quick]) == 0
    folders = [str(root / name) for name in ("digits_cross_entropy", "digits_large_margin_l2")]
    assert cli.main(["evaluate", *folders]) == 0
    assert cli.main(["report", *folders, "--out", str(root / "report")]) == 0
    return root


def test_the_page_needs_nothing_beside_itself_and_names_no_path(runs):
    page = (runs / "report" / "index.html").read_text()
    without_data = re.sub(r'src="data:image/svg\+xml;base64,[^"]*"', "", page)
    assert page.count("data:image/svg+xml") == 4 + 1 + 5 + 5
    assert not re.search(r'(src|href)="|@import|url\(|<script', without_data)
    assert str(runs) not in page and "/home" not in page and "/tmp" not in page
    assert '<meta name="viewport"' in page


def test_page_json_and_csv_show_the_same_numbers(runs):
    first, *lines = map(json.loads, (runs / "report" / "results.jsonl").read_text().splitlines())
    page = (runs / "report" / "index.html").read_text()
    models = [merged(line, first["shared"]) for line in lines]
    assert len(models) == 2 and first["title"] == "Large-margin training on digits"
    for model in models:
        folder = runs / model["run"]["config"]["name"]
        evaluation = json.loads((folder / "evaluation.json").read_text())
        measured = evaluation["evaluation"]
        assert {k: v for k, v in measured.items() if k not in SINGLE_SAMPLES} == model["evaluation"]
        assert model["timing"] == evaluation["timing"]
        assert f"{100 * model['evaluation']['clean']:.1f} %" in page
        assert f"{model['evaluation']['distance']['input']:.3g}" in page
    lines = (runs / "report" / "results.csv").read_text().splitlines()
    assert len(lines) == 3 and "distance.relu3" in lines[0] and "ratio" in lines[0]
    assert len(list((runs / "report" / "figures").glob("*.png"))) == 15


def test_a_run_is_not_overwritten_by_accident(runs, capsys):
    assert cli.main(["train", "--config", "digits_cross_entropy", "--out", str(runs / "digits_cross_entropy")]) == 1
    assert "already holds a run; continue it with --resume" in capsys.readouterr().err


def test_mistakes_are_answered_in_one_sentence(tmp_path, capsys):
    assert cli.main(["train", "--data.name", "mnist", "--out", str(tmp_path)]) == 1
    assert "mnist is read from files: pass --data-dir" in capsys.readouterr().err
    assert cli.main(["train", "--loss.kind", "svm", "--out", str(tmp_path)]) == 1
    assert "loss.kind must be one of cross_entropy, hinge, large_margin" in capsys.readouterr().err
    assert cli.main(["evaluate", str(tmp_path)]) == 1
    assert "is not the folder of a training run" in capsys.readouterr().err
    assert cli.main(["swep"]) == 2
    assert "command must be one of train, evaluate, report, sweep" in capsys.readouterr().err


def test_print_config_shows_the_resolved_config_as_a_file_that_can_be_given(tmp_path, capsys):
    asked = ["--config", "digits_large_margin_l2", "--loss.gamma", "3"]
    assert cli.main(["train", *asked, "--data-dir", "here", "--out", str(tmp_path / "run"), "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "gamma: 3.0" in printed and "name: digits_large_margin_l2" in printed and not (tmp_path / "run").exists()
    (tmp_path / "my.yaml").write_text(printed)
    assert config.parse(["--config", str(tmp_path / "my.yaml")]) == config.parse([*asked, "--data.dir", "here"])


def test_gamma_is_chosen_by_attacked_accuracy_among_the_accurate():
    scores = [(0.97, 0.5), (0.965, 0.8), (0.90, 0.9)]
    assert digits.choose(scores, floor=0.965) == 1
    assert digits.choose(scores, floor=0.97) == 0
    assert digits.choose(scores, floor=0.99) == 0  # none is accurate enough: the most accurate


def test_steps_are_timed_on_fresh_networks():
    dataset = data.load("digits")
    base = config.parse(["--training.batch_size", "16"])
    hinge = replace(base, loss=config.LossConfig(kind="hinge"))
    timed = time_steps(base, {"same": base, "hinge": hinge}, dataset, repeats=3)
    for result in timed.values():
        assert result["ms_per_step"] > 0 and result["baseline_ms_per_step"] > 0 and result["ratio"] > 0


def test_best_values_are_marked_by_what_is_printed(linear):
    model, split = linear
    evaluation = measure.evaluate(model, split, ("flatten",), SMALL)
    models = [compared(dict(evaluation), label) for label in ("a", "b", "c")]
    models[1].evaluation["clean"] = evaluation["clean"] + 1e-5  # prints the same
    models[2].evaluation["clean"] = evaluation["clean"] - 0.1
    (accuracy, *_) = table.sections(models)
    assert table.best(accuracy.rows[0], models) == {0, 1}
    assert page.tuning_cell([1.5, 2.0]) == "1.5, 2" and page.tuning_cell(0.9751) == "97.5 %"


def test_evaluating_leaves_the_network_trainable():
    trainer = Trainer(config.parse(["--training.epochs", "1", "--training.distance_samples", "0"]), data.load("digits"))
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.model.train()
    measure.evaluate(trainer.model, trainer.dataset.test.head(20), trainer.hidden, SMALL)
    assert trainer.model.training
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))

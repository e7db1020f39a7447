"""The toy of two rectangles: its best margin is 1, and the margin that it measures is that of the exact boundary."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from margin_kernels.experiments import cli
from margin_kernels.experiments.demo import plane
from margin_kernels.experiments.demo.zero_set import distances, zero_set

CORNERS = torch.tensor([[side * x, y] for side in (-1.0, 1.0) for x in (1.0, 3.0) for y in (-2.0, 2.0)])


def linear(weight, bias):
    """z_1 - z_0 = weight . x + bias."""
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.0], list(weight)]))
        layer.bias.copy_(torch.tensor([0.0, bias]))
    return nn.Sequential(layer)


def diamond():
    """z_1 - z_0 = |x_0| + |x_1| - 1 from four neurons."""
    hidden = nn.Linear(2, 4)
    with torch.no_grad():
        hidden.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]))
        hidden.bias.zero_()
    (head,) = linear((0.0, 0.0), -1.0)
    wide = nn.Linear(4, 2)
    with torch.no_grad():
        wide.weight.copy_(torch.tensor([[0.0] * 4, [1.0] * 4]))
        wide.bias.copy_(head.bias)
    return nn.Sequential(hidden, nn.ReLU(), wide)


def test_the_points_fill_two_rectangles_which_are_two_apart():
    x, y = plane.rectangles(5000, seed=3)
    assert x.shape == (10000, 2) and int(y.sum()) == 5000
    for label, (low, high) in enumerate([(-3.0, -1.0), (1.0, 3.0)]):
        own = x[y == label]
        assert own[:, 0].min() >= low and own[:, 0].max() <= high and own[:, 1].abs().max() <= 2
        assert torch.allclose(own.mean(0), torch.tensor([(low + high) / 2, 0.0]), atol=0.05)
        assert torch.allclose(own.var(0), torch.tensor([4 / 12, 16 / 12]), atol=0.05)
    assert 1 <= plane.attainable(x, y) < 1.01
    assert torch.equal(plane.rectangles(5000, 3)[0], x) and not torch.equal(plane.rectangles(5000, 4)[0], x)


def test_the_best_linear_margin_of_the_rectangles_is_one():
    """Over all directions and offsets, at the corners of the rectangles."""
    y = (CORNERS[:, 0] > 0).long()
    assert plane.attainable(CORNERS, y) == 1.0
    best = {}
    for angle in np.linspace(-math.pi / 2, math.pi / 2, 181):
        projected = CORNERS.numpy() @ np.array([math.cos(angle), math.sin(angle)])
        best[angle] = (projected[y == 1].min() - projected[y == 0].max()) / 2
    assert max(best.values()) == pytest.approx(1.0, abs=1e-12) and max(best, key=best.get) == pytest.approx(0)
    found = plane.measure(linear((5.0, 0.0), 0.0), CORNERS, y)
    assert found.margin == pytest.approx(1.0, abs=1e-12)
    assert found.deepfool == pytest.approx(1.02, abs=1e-3)  # its overshoot


def test_the_distance_to_a_line_is_the_closed_form():
    generator = np.random.default_rng(0)
    points = generator.uniform(-3, 3, (50, 2))
    model = linear((0.6, -0.8), 0.3)
    w, b = (t.detach().double().numpy() for t in (model[0].weight, model[0].bias))
    expected = np.abs(points @ (w[1] - w[0]) + b[1] - b[0]) / np.linalg.norm(w[1] - w[0])
    np.testing.assert_allclose(distances(points, zero_set(model, 12)), expected, rtol=1e-12)


def test_the_distance_to_a_diamond_is_the_closed_form():
    segments = zero_set(diamond(), 12)
    assert np.allclose(np.abs(segments).sum(2), 1)  # every end lies on it
    assert np.linalg.norm(segments[:, 1] - segments[:, 0], axis=1).sum() == pytest.approx(4 * math.sqrt(2))
    points = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.25, 0.25], [-3.0, 4.0], [0.5, 0.5]])
    expected = [math.sqrt(0.5), 1.0, math.sqrt(0.5), 0.25 * math.sqrt(2), math.sqrt(9 + 9), 0.0]
    np.testing.assert_allclose(distances(points, segments), expected, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_between_a_point_and_its_distance_nothing_changes_sign_and_just_behind_it_does(seed):
    torch.manual_seed(seed)
    model = plane.NETWORKS["ReLU 2-16-16-2"]().double()
    with torch.no_grad():
        for layer in model[::2]:  # type: ignore[attr-defined]
            layer.weight.mul_(3)  # so that the boundary bends
    points = torch.rand(40, 2, dtype=torch.float64) * 6 - 3
    measured = torch.from_numpy(distances(points.numpy(), zero_set(model, 12)))
    angle = torch.linspace(0, 2 * math.pi, 2001, dtype=torch.float64)
    circle = torch.stack([angle.cos(), angle.sin()], 1)

    def gap(x):
        return (model(x) @ torch.tensor([-1.0, 1.0], dtype=torch.float64)).detach()

    here = gap(points).sign()
    for i, (point, side, radius) in enumerate(zip(points, here, measured, strict=True)):
        for share in (0.2, 0.5, 0.8, 0.95, 0.999):
            assert (gap(point + share * radius * circle).sign() == side).all(), i
    near = measured < 3
    assert near.sum() > 10
    for point, side, radius in zip(points[near], here[near], measured[near], strict=True):
        assert (gap(point + (1.01 * radius + 1e-6) * circle).sign() != side).any()


def test_a_network_without_a_boundary_has_no_margin_and_misclassified_points_a_negative_one():
    x, y = plane.rectangles(20, seed=0)
    nowhere = plane.measure(linear((0.0, 0.0), 1.0), x, y)
    assert nowhere.margin is None and nowhere.boundary == []
    assert nowhere.deepfool is None and nowhere.deepfool_missed == 40
    wrong = plane.measure(linear((-1.0, 0.0), 0.0), x, y)
    assert wrong.margin == pytest.approx(-float(x[:, 0].abs().max())) and wrong.deepfool < -2.5
    assert len(zero_set(linear((1.0, 0.0), -20.0), 12)) == 0  # beyond the box
    with pytest.raises(ValueError, match="layers must be Linear or ReLU, got Tanh"):
        zero_set(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), 12)


def test_a_network_that_is_flat_at_the_data_deceives_deepfool_and_not_the_margin():
    """z_1 - z_0 = x_0 behind |x_0| < 0.5 only: at the data the slope is 0.01, and a linear step goes far too far."""
    hidden = nn.Linear(2, 3)
    with torch.no_grad():
        hidden.weight.copy_(torch.tensor([[1.0, 0.0]] * 3))
        hidden.bias.copy_(torch.tensor([10.0, 0.5, -0.5]))
        head = nn.Linear(3, 2)
        head.weight.copy_(torch.tensor([[0.0, 0.0, 0.0], [0.01, 1.0, -1.0]]))
        head.bias.copy_(torch.tensor([0.0, -0.6]))
    x, y = plane.rectangles(50, seed=0)
    found = plane.measure(nn.Sequential(hidden, nn.ReLU(), head), x, y)
    assert 0.9 < found.margin < 1.1 and found.deepfool_training > 20


def test_every_loss_moves_every_weight_of_the_relu_network():
    x, y = plane.rectangles(10, seed=0)
    for label, loss in plane.LOSSES.items():
        torch.manual_seed(0)
        model = plane.NETWORKS["ReLU 2-16-16-2"]()
        before = [w.clone() for w in model.parameters()]
        plane.train(model, loss, x, y, epochs=3, seed=0)
        for old, new in zip(before, model.parameters(), strict=True):
            assert new.isfinite().all() and not torch.equal(old, new), label


def test_a_quick_run_leaves_a_record_and_a_figure(tmp_path, capsys, monkeypatch):
    labels = ["cross-entropy", "MIN EXP, envelope"]
    monkeypatch.setattr(plane, "LOSSES", {label: plane.LOSSES[label] for label in labels})
    assert cli.main(["toy", "--quick", "--out", str(tmp_path), "--seed", "5"]) == 0
    record = json.loads((tmp_path / "toy.json").read_text())
    assert [(m["network"], m["model"]) for m in record["models"]] == [(n, m) for n in plane.NETWORKS for m in labels]
    assert record["epochs"] == plane.QUICK and record["epochs_of_the_paper"] == 1000 and record["versions"]["torch"]
    assert record["seeds"] == {"weights and order": 5, "training points": 5, "test points": 6}
    assert record["losses"]["MIN EXP, envelope"]["gradient"] == "envelope"
    assert plane.Toy.from_dict(record).to_dict() == record
    x, y = plane.rectangles(200, 5)
    assert record["attainable_margin"] == plane.attainable(x, y) >= 1
    for model in record["models"]:
        assert model["train_error"] == model["test_error"] == 0 and 0.3 < model["margin"] <= record["attainable_margin"]
        again = distances(x.double().numpy(), np.array(model["boundary"]))
        assert again.min() == pytest.approx(model["margin"], abs=1e-4)
    assert (tmp_path / "toy.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (tmp_path / "toy.svg").read_text()
    assert (
        plane.figure(plane.Toy.from_dict(record)).svg == (tmp_path / "toy.svg").read_text()
    )  # the record is enough to draw it
    assert "MIN EXP, envelope" in capsys.readouterr().out
    assert cli.main(["toy", "--epochs", "0", "--out", str(tmp_path)]) == 1
    assert "--epochs must be at least 1, got 0" in capsys.readouterr().err

"""MarginDistance against the distances themselves, over batches and processes."""

import math

import pytest
import torch
from support.processes import Processes
from torch import nn

import margin_kernels as mk

torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed: pip install torchmetrics")
from margin_kernels.integrations.torchmetrics import MarginDistance  # noqa: E402

LOW, HIGH, BINS = -3.0, 3.0, 600
WIDTH = (HIGH - LOW) / BINS


def distances(n=400, k=2, layers=3):
    generator = torch.Generator().manual_seed(0)
    found = torch.randn(n, k, layers, generator=generator, dtype=torch.float64)
    return 0.8 * found + torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64)[:layers]


def expected(distance):
    """Of distances [N,k,L], finite: by sorting."""
    nearest = distance.amin(1)
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    return {
        "count": torch.full((nearest.shape[1],), len(nearest)),
        "mean": nearest.mean(0),
        "right": (nearest > 0).double().mean(0),
        "quantiles": nearest.quantile(at, 0, interpolation="lower"),
    }


def check(found, wanted):
    for name, value in wanted.items():
        tolerance = WIDTH / 2 if name == "quantiles" else 1e-12
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance)


def test_batches_are_joined():
    metric = MarginDistance(3, LOW, HIGH, BINS)
    assert isinstance(metric, torchmetrics.Metric)
    for part in distances().split([7, 0, 93, 300]):
        metric.update(part)
    check(metric.compute(), expected(distances()))
    metric.reset()
    assert not metric.compute()["count"].any() and metric.compute()["quantiles"].isnan().all()


def of_a_part(rank, size):
    metric = MarginDistance(3, LOW, HIGH, BINS)
    rows = [slice(0, 390), slice(390, 400)][rank]
    metric.update(distances()[rows])
    return metric.compute(), metric.count


def test_processes_are_joined():
    processes = Processes(2)
    try:
        found = processes.run(of_a_part)
    finally:
        processes.stop()
    for joined, _ in found:
        check(joined, expected(distances()))
    assert [int(own[0]) for _, own in found] == [390, 10]


def test_it_takes_what_a_task_measures():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    task = mk.MarginTask(model, mk.LargeMarginLoss(1.0, top_k=2), layers=("input", "1"))
    x, y = torch.randn(50, 6, dtype=torch.float64), torch.randint(4, (50,))
    y[::10] = -100
    metric = MarginDistance(len(task.layers), 3 * LOW, 3 * HIGH, 3 * BINS)
    metric.update(task.evaluate(x, y))
    check(metric.compute(), expected(task(x[y >= 0], y[y >= 0])["distance"]))
    with torch.no_grad(), pytest.raises(ValueError, match=r"found must hold 'distance', got .*nll"):
        metric.update({name: value for name, value in task(x, y).items() if name != "distance"})


def test_degenerate_terms_are_left_out_and_positions_are_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    with torch.no_grad():
        model[0].bias.fill_(-1.2)  # of most samples every unit is dead, and the input has no direction
    task = mk.MarginTask(model, mk.LargeMarginLoss(1.0, top_k=3), layers=("input", "output"), positions=2)
    x, y = torch.randn(30, 5, 6, dtype=torch.float64), torch.randint(4, (30, 5))
    y[:, 0] = -100
    out = task.evaluate(x, y)
    metric = MarginDistance(2, LOW, HIGH, BINS)
    metric.update(out)
    found, logged = metric.compute(), task.log(out)
    assert out["distance"].shape == (30, 2, 3, 2) and 0 < found["count"][0] < found["count"][1] == 60
    for i, name in enumerate(task.layers):
        assert found["mean"][i].item() == pytest.approx(logged[f"distance/{name}"].item(), rel=1e-6)


def test_what_is_not_finite_is_left_out_and_what_is_outside_the_bins_is_infinite():
    metric = MarginDistance(1, 0.0, 1.0, 10, quantiles=(0.0, 0.5, 1.0))
    metric.update(torch.tensor([-5.0, 0.45, 0.45, 7.0, math.inf, math.nan]).view(-1, 1, 1))
    found = metric.compute()
    assert found["count"].item() == 4 and found["right"].item() == 0.75
    assert found["mean"].item() == pytest.approx((-5 + 0.9 + 7) / 4)
    torch.testing.assert_close(found["quantiles"].flatten().tolist(), [-math.inf, 0.45, math.inf])


def test_wrong_arguments_are_told_by_name():
    with pytest.raises(ValueError, match="low and high must be finite and low < high, got 1 and 1"):
        MarginDistance(1, 1, 1)
    with pytest.raises(ValueError, match="layers must be >= 1, got 0"):
        MarginDistance(0, 0, 1)
    with pytest.raises(ValueError, match=r"quantiles must be in \[0, 1\]"):
        MarginDistance(1, 0, 1, quantiles=(2.0,))
    with pytest.raises(ValueError, match=r"distance must be \[N,k,2\], got \[3, 1, 1\]"):
        MarginDistance(2, 0, 1).update(torch.zeros(3, 1, 1))

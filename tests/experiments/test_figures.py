"""Densities, courses and attacked images of a sweep show what its records and weights hold."""

import json
import math
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from support.finished_cells import record
from torch import nn

from margin_kernels.experiments import cli, config, data, models, sweeps
from margin_kernels.experiments.evaluation import histogram
from margin_kernels.experiments.evaluation.measure import boundary_norms
from margin_kernels.experiments.report import figures, study_distances, study_images, study_page, table
from margin_kernels.experiments.results import RECORDS, Records, Run, Study


def lines_of(figure_list, monkeypatch, module):
    """What each figure of `figure_list` draws: name, and of each of its axes title, lines by label, and tick labels."""
    seen = []

    def panels(name, caption, paint, count=1, columns=1, size=None):
        figure, grid = figures.plt.subplots(1, count, squeeze=False)
        paint(list(grid.flat))
        drawn = [
            (
                axes.get_title() or axes.get_title(loc="left"),
                {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()},
                [tick.get_text() for tick in axes.get_yticklabels()],
            )
            for axes in grid.flat
        ]
        figures.plt.close(figure)
        seen.append((name, caption, drawn))
        return figures.Figure(name, caption, "<svg/>", b"")

    monkeypatch.setattr(module, "draw_panels", panels)
    monkeypatch.setattr(module, "draw", lambda name, caption, paint, tall: panels(name, caption, lambda p: paint(p[0])))
    list(figure_list())
    return seen


def test_bins_resolve_small_and_large_distances_alike():
    for measure, width in histogram.WIDTHS.items():
        edges = histogram.edges(measure)
        assert (
            len(edges) == histogram.BINS + 1 and edges[80] == 0 and edges[-1] == pytest.approx(201.7 * width, rel=1e-3)
        )
        np.testing.assert_allclose(edges, -edges[::-1], atol=1e-12)
        steps = np.diff(edges)
        assert steps[80] == pytest.approx(0.075 * width, rel=0.01)
        far = edges[1:] > 10 * width
        assert (steps[far] / edges[1:][far] < 0.076).all()


def test_counts_are_those_of_the_samples_and_leave_out_what_has_no_boundary():
    values = [0.001, 0.001, -0.3, 2.0, math.nan, None, 1e3, math.inf, -1e3]
    counts = histogram.counts(values, "deepfool_norm")
    edges = histogram.edges("deepfool_norm")
    assert sum(counts) == 7 and counts[-1] == 2 and counts[0] == 1 and counts[80] == 2
    for value in (-0.3, 2.0):
        assert counts[int(np.searchsorted(edges, value)) - 1] == 1
    assert histogram.counts([], "rho_adv") == [0] * histogram.BINS


def test_densities_have_integral_one_and_the_shape_of_the_samples():
    values = np.random.default_rng(0).normal(2.0, 0.5, 20000)
    total = np.array(histogram.counts(values, "deepfool_norm"))
    edges, density = histogram.density(total, "deepfool_norm", 0.1)
    assert (np.diff(edges)[:-1] >= 0.1 - 1e-12).all() and (density * np.diff(edges)).sum() == pytest.approx(1.0)
    middle = (edges[1:] + edges[:-1]) / 2
    expected = np.exp(-0.5 * ((middle - 2) / 0.5) ** 2) / (0.5 * math.sqrt(2 * math.pi))
    assert np.abs(density - expected).max() < 0.06
    assert histogram.quantile(total, "deepfool_norm", 0.5) == pytest.approx(2.0, abs=0.16)
    assert histogram.quantile(total, "deepfool_norm", 1.0) >= values.max() - 0.3


def test_an_evaluation_keeps_the_counts_of_its_margins():
    torch.manual_seed(0)
    split = data.Split(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
    model = models.build("digits_cnn", (1, 8, 8), 10).eval()
    norms = boundary_norms(model, split, config.EvaluationConfig(deepfool_iterations=10))
    margins = norms["deepfool_norms"]
    assert norms["histograms"]["deepfool_norm"] == histogram.counts(margins, "deepfool_norm")
    relative = [m / float(x.norm()) for m, x in zip(margins, split.images, strict=True)]
    assert sum(norms["histograms"]["rho_adv"]) == 40 - norms["deepfool_missed"]
    difference = np.array(norms["histograms"]["rho_adv"]) - histogram.counts(relative, "rho_adv")
    assert np.abs(difference).sum() <= 2  # margins were rounded to five digits


def test_densities_of_a_sweep_add_up_its_seeds_and_older_records_still_load(monkeypatch):
    records = [record("plain", "", seed, deepfool_norm_correct=1.0 + seed) for seed in (0, 1)]
    for made, value in zip(records, (1.0, 2.0), strict=True):
        made.evaluation["histograms"] = {m: histogram.counts([value] * 10, m) for m in histogram.WIDTHS}
        made.evaluation["rho_adv"] = 0.2
    records.append(record("old", "", 0, deepfool_norms=[0.5, -0.5, None], deepfool_norm_correct=0.5))
    records.append(record("older", "", 0, deepfool_norm=1.0))
    study = Study("s", "cpu", records, {})
    assert sum(study_distances.total(study.of("plain", ""), "deepfool_norm")) == 20
    assert sum(study_distances.total(study.of("old", ""), "deepfool_norm")) == 2
    assert study_distances.total(study.of("older", ""), "deepfool_norm") is None
    seen = lines_of(lambda: study_distances.densities(study, "", "deepfool_norm"), monkeypatch, study_distances)
    ((name, caption, [(_, lines, ticks)]),) = seen
    assert name == "s_deepfool_norm_density" and ticks == ["old", "plain"]
    assert "all seeds together" in caption and "cpu" in caption
    means = sorted(points[0][0] for points in lines.values() if points[0][0] == points[1][0])
    assert means == [0, 0.5, 1.5]  # the line at 0, and the mean of each model
    seen = lines_of(lambda: study_distances.densities(study, "", "rho_adv"), monkeypatch, study_distances)
    assert seen[0][2][0][2] == ["plain"]
    few = Study("s", "cpu", records[3:], {})
    assert study_distances.all_figures(few) == {}


def course_record(model, seed, values):
    """A record whose history holds a distance per epoch at two taps."""
    made = record(model, "", seed)
    history = [{"epoch": i + 1, "distance": {"input": v, "output": 10 * v}} for i, v in enumerate(values)]
    return replace(made, history=history)


def test_courses_are_the_means_over_the_seeds_at_each_tap(monkeypatch):
    records = [course_record("plain", 0, [0.1, 0.3]), course_record("plain", 1, [0.3, 0.5])]
    records.append(course_record("margin", 0, [0.2, 0.6, 0.8]))
    study = Study("s", "full", records, {})
    assert study_distances.course(study.of("plain", ""), "input")[1] == pytest.approx([0.2, 0.4])
    seen = lines_of(lambda: study_distances.courses(study, ""), monkeypatch, study_distances)
    ((name, caption, (first, second)),) = seen
    assert name == "s_course" and (first[0], second[0]) == ("input", "output")
    assert np.allclose(first[1]["plain"], [[1, 0.2], [2, 0.4]]) and np.allclose(second[1]["plain"], [[1, 2], [2, 4]])
    assert first[1]["margin"] == [[1, 0.2], [2, 0.6], [3, 0.8]]
    assert "validation images" in caption and "budget full, 1 to 2 seeds" in caption
    unmeasured = Study("s", "full", [record("plain", "", 0)], {})
    assert not list(study_distances.courses(unmeasured, ""))


@pytest.mark.parametrize("largest", [1.0, 100.0])
def test_an_axis_that_is_not_linear_says_so(monkeypatch, largest):
    """Distances that differ by more than a factor of 8."""
    labels = []

    def draw(name, caption, paint):
        figure, axes = figures.plt.subplots()
        paint(axes)
        labels.append((axes.get_xlabel(), axes.get_ylabel()))
        figures.plt.close(figure)

    monkeypatch.setattr(figures, "draw", draw)
    models_ = [
        network(name, distances={"input": [0.3 * size, 0.6 * size]}, history=course_record("a", 0, [size]).history)
        for name, size in (("small", 0.5), ("large", largest))
    ]
    figures.distance_course(models_, "input")
    figures.distance_histogram(models_, "input")
    (_, course), (histogram_, _) = labels
    declared = " (asinh scale)" if largest == 100 else ""
    assert course == f"mean signed distance{declared}"
    assert histogram_ == f"signed distance to the boundary, l2{declared}"


def network(label, history, **evaluation):
    run = Run(config.Config(name=label), {}, 1, {}, {}, history)
    return table.Compared(label, run, {"distance_p": 2.0, **evaluation})


class Bright(nn.Module):
    """Class 1 where the mean pixel is above `level`: DeepFool's distance is |mean - level| sqrt(pixels)."""

    def __init__(self, level):
        super().__init__()
        self.level = level

    def forward(self, x):
        gap = x.flatten(1).mean(1) - self.level
        return torch.stack([-gap, gap], 1)


def test_attacked_images_are_those_of_the_attacks_and_their_norms_deepfools():
    x = torch.full((2, 1, 4, 4), 0.4)
    x[1] += 0.3
    y = torch.tensor([0, 1])
    settings = config.EvaluationConfig(eps=0.15, steps=2)
    shown = study_images.attack(Bright(0.5), x, y, settings)
    assert shown.labels["clean"].tolist() == [0, 1] and shown.labels["FGSM gap"].tolist() == [1, 1]
    torch.testing.assert_close(shown.images["FGSM gap"][0], x[0] + 0.15)
    torch.testing.assert_close(shown.images["IFGSM gap"][1], x[1] - 0.15)
    expected = torch.tensor([0.1, 0.2]) * 4
    torch.testing.assert_close(shown.norms, expected, rtol=0.025, atol=1e-3)
    assert shown.labels["DeepFool"].tolist() == [1, 0]
    torch.testing.assert_close((shown.images["DeepFool"] - x).flatten(1).norm(dim=1), shown.norms)


def test_whitened_images_are_attacked_without_bounds_and_shown_over_their_own_range():
    x = torch.tensor([-2.0, 3.0]).repeat_interleave(8).view(1, 1, 4, 4)  # mean 0.5
    settings = config.EvaluationConfig(eps=0.75, steps=2)
    free = (-math.inf, math.inf)
    shown = study_images.attack(Bright(0.4), x, torch.tensor([1]), settings, free)
    torch.testing.assert_close(shown.images["FGSM gap"], x - 0.75)
    torch.testing.assert_close(shown.images["IFGSM gap"], x - 0.75)
    axes = MagicMock()
    study_images._picture(axes, shown.images["FGSM gap"][0], "1", True, (-2.0, 3.0))
    (drawn,) = axes.imshow.call_args.args
    np.testing.assert_allclose(drawn, np.repeat([0.0, 0.85], 8).reshape(4, 4), rtol=1e-5)


def test_axes_name_the_units_of_the_images():
    made = record("plain", "", 0)
    assert Study("s", "cpu", [made], {}).units == "images in [0, 1]"
    whitened = record("hinge", "", 0)
    whitened.config.data.preprocess = "gcn_zca"
    assert Study("s", "cpu", [whitened], {}).units == "whitened images"
    assert Study("s", "cpu", [made, whitened], {}).units == "images in [0, 1] and whitened images"


def test_the_caption_says_whether_all_models_know_the_image():
    x = torch.full((2, 1, 4, 4), 0.4)
    shown = {
        str(v): study_images.attack(Bright(v), x, torch.tensor([0, 1]), config.EvaluationConfig()) for v in (0.5, 0.6)
    }
    assert "all these networks classify correctly" in study_images._why(shown, 0, 0)
    assert "all know none among the first 500" in study_images._why(shown, 1, 1)


def test_the_images_that_all_models_know_come_first_one_of_a_class():
    values = torch.tensor([0.1, 0.2, 0.55, 0.9, 0.8, 0.3])
    split = data.Split(values[:, None, None, None].expand(6, 1, 2, 2).clone(), torch.tensor([0, 0, 1, 1, 0, 1]))
    assert study_images.select_images([Bright(0.5)], split).tolist() == [0, 2]
    assert study_images.select_images([Bright(0.5), Bright(0.6)], split).tolist() == [0, 3]
    none = data.Split(split.images[:4], 1 - split.labels[:4])
    assert study_images.select_images([Bright(0.5)], none).tolist() == [0, 2]  # where none is known, any


@pytest.fixture
def kept(tmp_path):
    """The folder of a sweep of two models, one of which has left its weights."""
    out = tmp_path / "sweep"
    for label in ("hinge", "plain"):
        Records(out / RECORDS).put(record(label, "", 0))
    torch.manual_seed(0)
    description = {"name": "digits_cnn", "shape": [1, 8, 8], "classes": 10, "options": {}}
    models.save_model(out / "cells" / "plain__seed0", models.build("digits_cnn", (1, 8, 8), 10), description)
    (out / "summary.json").write_text(json.dumps({"sweep": "own", "budget": "cpu"}))
    (out / "summary.csv").write_text("model,point\nplain,\nhinge,\n")
    return out


def test_a_report_shows_attacked_images_of_the_weights_that_were_kept(kept, tmp_path):
    assert cli.main(["report", str(kept), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<h3>Attacked test images</h3>" in page and "1 of the models not shown" in page
    assert "No attacked images" not in page and str(tmp_path) not in page
    for number in (1, 2, 3):
        assert (tmp_path / "report" / "figures" / f"own_images_{number}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (tmp_path / "report" / "figures" / f"own_images_{number}.svg").read_text()
    study = study_page.load_study(kept)
    assert study.models == ["plain", "hinge"]  # in the order of the summary, not of the files
    assert list(study_images.networks(study, "")) == ["plain"]


def test_without_weights_or_data_the_page_says_why_there_are_no_attacked_images(kept, tmp_path, capsys):
    for made in Records(kept / RECORDS).all():
        made.config.data.name = "mnist"
        Records(kept / RECORDS).put(made)
    assert cli.main(["report", str(kept), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "No attacked images: margin-kernels report --data-dir DIR draws them" in page
    assert cli.main(["report", str(kept), "--out", str(tmp_path / "r"), "--data-dir", str(tmp_path / "none")]) == 1
    assert "--data-dir does not exist" in capsys.readouterr().err
    (kept / "cells" / "plain__seed0" / "model.safetensors").unlink()
    assert cli.main(["report", str(kept), "--out", str(tmp_path / "report")]) == 0
    assert "No attacked images: no weights were kept" in (tmp_path / "report" / "index.html").read_text()


def test_the_shipped_sweep_of_distances_measures_them_at_every_epoch():
    for budget in ("full", "cpu", "quick"):
        cells = sweeps.read(sweeps.shipped()["distances_mnist"], budget)
        assert {cell.config.training.distance_samples for cell in cells} == {256}
        assert [cell.model for cell in cells[:5]] == [
            "cross-entropy",
            "large margin l2 input",
            "large margin l2 all",
            "MIN EXP",
            "sensitivity l2",
        ]
        assert {cell.values["data.label_noise"] for cell in cells} == {0.0, 0.8}

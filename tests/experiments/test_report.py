"""A sweep's report shows the numbers of its records: figures of the right curves, published values and differences."""

import base64
import csv
import json
import re
from dataclasses import replace

import pytest
import yaml
from support.finished_cells import record

from margin_kernels.experiments import cli, sweeps
from margin_kernels.experiments.config import ConfigError
from margin_kernels.experiments.report import figures, study_figures, study_page
from margin_kernels.experiments.results import RECORDS, Records, Study, summary

MODELS = {"plain": {}, "hinge": {"loss.kind": "hinge"}}
NOISE = {
    "models": MODELS,
    "grid": {"data.label_noise": [0.0, 0.4]},
    "seeds": [0, 1],
    "published": {
        "plain / label_noise=0.4": {"error": 12.5, "deepfool_norm": 1.5},
        "[X] best / label_noise=0.0": {"error": 3},
    },
}


def noisy():
    """2 models x 2 noise levels x 2 seeds with known accuracies."""
    accuracies = {("plain", 0.0): (0.98, 0.96), ("plain", 0.4): (0.9, 0.8), ("hinge", 0.0): (0.97, 0.97)}
    accuracies["hinge", 0.4] = (0.85, 0.75)
    return [
        record(model, f"label_noise={noise}", seed, noise, accuracies[model, noise][seed], deepfool_norm=1.0 + seed)
        for noise in (0.0, 0.4)
        for model in MODELS
        for seed in (0, 1)
    ]


@pytest.fixture
def folder(tmp_path):
    """A sweep's folder, and its file."""
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(NOISE, sort_keys=False))
    out = tmp_path / "out"
    for made in noisy():
        Records(out / RECORDS).put(made)
    (out / "summary.json").write_text(json.dumps({"sweep": "noise_sweep", "budget": "cpu"}))
    return out


def drawn_lines(figure_list, monkeypatch):
    """The lines (label -> x, y) of each figure that `figure_list` draws."""
    seen = []

    def draw(name, caption, paint, tall=False):
        figure, axes = figures.plt.subplots()
        paint(axes)
        handles, labels = axes.get_legend_handles_labels()
        lines = [getattr(handle, "lines", (handle,))[0] for handle in handles]
        points = {
            label: [(round(float(x), 6), round(float(y), 6)) for x, y in zip(*line.get_data(), strict=True)]
            for line, label in zip(lines, labels, strict=True)
        }
        seen.append((name, points, axes.get_xscale(), caption))
        figures.plt.close(figure)
        return figures.Figure(name, caption, "<svg/>", b"")

    monkeypatch.setattr(study_figures, "draw", draw)
    list(figure_list())
    return seen


def test_error_is_drawn_against_the_swept_value_with_published_marks(folder, monkeypatch):
    study = study_page.load_study(folder, folder.parent / "sweep.yaml")
    axis = study_figures.swept(study)
    assert (axis.key, axis.logarithmic) == ("data.label_noise", False)
    error = next(m for m in summary.MEASURES if m.key == "error")
    ((name, points, _, caption),) = drawn_lines(lambda: study_figures.against(study, error, axis), monkeypatch)
    assert name == "noise_sweep_error_label_noise"
    assert points["plain"] == [(0.0, 3.0), (40.0, 15.0)]
    assert points["hinge"] == [(0.0, 3.0), (40.0, 20.0)]
    assert points["plain, published (not comparable)"] == [(40.0, 12.5)]
    assert points["[X] best, published (not comparable)"] == [(0.0, 3.0)]
    assert "budget cpu, 2 seeds" in caption
    assert "Open markers: published values, not comparable: budget cpu, and not the paper's, which is full." in caption
    ((_, points, _, caption),) = drawn_lines(
        lambda: study_figures.against(replace(study, budget="full"), error, axis), monkeypatch
    )
    assert points["plain, published"] == [(40.0, 12.5)] and points["[X] best, published"] == [(0.0, 3.0)]
    assert caption.endswith("Open markers: published values.")


def test_training_fractions_are_drawn_on_a_logarithmic_axis(monkeypatch):
    records = []
    for label, fraction, repeat in (("all", 1.0, 1), ("few", 0.00125, 100)):
        made = record("plain", label, 0, deepfool_norm=1.0)
        made.config.data.train_fraction = fraction
        records.append(replace(made, values={"data.train_fraction": fraction, "training.repeat": repeat}))
    study = Study("little", "cpu", records, {})
    axis = study_figures.swept(study)
    margin = next(m for m in summary.MEASURES if m.key == "deepfool_norm")
    ((_, points, scale, _),) = drawn_lines(lambda: study_figures.against(study, margin, axis), monkeypatch)
    assert scale == "log" and points["plain"] == [(0.125, 1.0), (100.0, 1.0)]


def test_points_that_differ_in_several_ways_are_no_axis():
    first, second = record("plain", "noise", 0, 0.8), record("plain", "few", 0)
    second = replace(second, values={"data.train_fraction": 0.1})
    first.config.data.train_fraction, second.config.data.train_fraction = 1.0, 0.1
    assert study_figures.swept(Study("mixed", "cpu", [first, second], {})) is None
    assert study_figures.swept(Study("one", "cpu", [record("plain", "", 0)], {})) is None


def test_white_box_black_box_and_noise_curves_are_those_of_the_records(monkeypatch):
    curve = {"curve_eps": [0.0, 0.1, 0.2], "noise_sigmas": [0.0, 0.2, 0.4]}
    own = {"fgsm_ce": [0.9, 0.5, 0.1]}
    records = [record("plain", "", seed, curves=own, noise=None, **curve) for seed in (0, 1)]
    other = {"curves": {"fgsm_ce": [0.8, 0.7, 0.6]}, "attacker": "plain__seed0", "black_box": {}}
    other["reverse_curves"] = {"fgsm_ce": [0.9, 0.85, 0.65]}
    records.append(record("hinge", "", 0, **other, black_box_curves={"fgsm_ce": [0.8, 0.75, 0.7]}, **curve))
    records[1].evaluation["curves"] = {"fgsm_ce": [0.9, 0.7, 0.3]}
    for made, noise in zip(records, ([0.9, 0.8, 0.7], [0.9, 0.6, 0.5], [0.8, 0.8, 0.4]), strict=True):
        made.evaluation["noise"] = noise
    study = Study("attacks", "quick", records, {("plain", ""): {"black_box_fgsm_error": 33.0}})
    white = drawn_lines(lambda: study_figures.curves(study, "", ""), monkeypatch)
    ((name, points, _, caption),) = white
    assert name == "attacks_fgsm_ce" and "1 to 2 seeds" in caption
    assert points["plain"] == [(0.0, 90), (0.1, 60), (0.2, 20)]
    ((name, points, *_),) = drawn_lines(lambda: study_figures.curves(study, "", "black_box"), monkeypatch)
    assert name == "attacks_black_box_fgsm_ce"
    assert points["hinge"] == [(0.0, 80), (0.1, 75), (0.2, 70)]
    assert points["plain"] == [(0.0, 90), (0.1, 60), (0.2, 20)]  # the attacker: white box
    assert points["plain, published (not comparable)"] == [(0.1, 67.0)]
    ((name, points, _, caption),) = drawn_lines(lambda: study_figures.curves(study, "", "reverse"), monkeypatch)
    assert name == "attacks_reverse_fgsm_ce" and "FGSM on cross-entropy, transferred to plain" in caption
    assert points["hinge"] == [(0.0, 90), (0.1, 85), (0.2, 65)]
    assert points["plain"] == [(0.0, 90), (0.1, 60), (0.2, 20)]  # its own: white box
    assert "plain, published (not comparable)" not in points
    ((_, points, *_),) = drawn_lines(lambda: study_figures.noise(study, ""), monkeypatch)
    assert points["plain"] == [(0.0, 90), (0.2, 70), (0.4, 60)]
    records[2].evaluation["curve_eps"] = records[0].evaluation["curve_eps"] = [0.0, 0.1]
    short = Study("attacks", "quick", [records[0]], {})
    assert not drawn_lines(lambda: study_figures.curves(short, "", ""), monkeypatch)  # no curve


def test_a_table_like_sweep_is_drawn_by_model_with_all_published_marks(monkeypatch):
    """Also those of a model that was not measured, and of none here."""
    records = [record("plain", "", 0, clean=0.9), record("hinge", "", 0, clean=0.8)]
    records.append(record("vat", "", 0, clean=None))
    marks = {("hinge", ""): {"error": 25.0}, ("vat", ""): {"error": 5.0}, ("[X] best", ""): {"error": 1.0}}
    study = Study("table", "cpu", records, marks)
    error = next(m for m in summary.MEASURES if m.key == "error")
    ((name, points, _, caption),) = drawn_lines(lambda: study_figures.by_model(study, error), monkeypatch)
    assert name == "table_error" and "one run each; budget cpu, 1 seed" in caption
    assert points == {
        "ours": [(10.0, 0.0), (20.0, 1.0)],
        "published (not comparable)": [(25.0, 1.0), (5.0, 2.0), (1.0, 3.0)],
    }


def test_many_models_are_drawn_beside_the_reference_a_few_at_a_time():
    names = [f"m{i}" for i in range(18)]
    parts = study_figures.together(names)
    assert [len(part) for part in parts] == [7, 7, 6] and all(part[0] == "m0" for part in parts)
    assert [name for part in parts for name in part[1:]] == names[1:]
    assert study_figures.together(["a"]) == [["a"]] and study_figures.together(["a", "b"]) == [["a", "b"]]


def test_ours_published_and_delta_are_in_printed_units(folder):
    study = study_page.load_study(folder, folder.parent / "sweep.yaml")
    rows = {(row.model, row.measure): row for row in study_page.comparison(study)}
    assert rows["plain", "error"].ours == pytest.approx(15.0) and rows["plain", "error"].published == 12.5
    assert rows["plain", "error"].delta == pytest.approx(2.5)
    assert rows["plain", "deepfool_norm"].ours == 1.5 and rows["plain", "deepfool_norm"].delta == 0
    assert rows["[X] best", "error"].ours is None and rows["[X] best", "error"].delta is None
    table = study_page.published_table(list(rows.values()))
    assert "<td>error %</td><td>15.00</td><td>12.5</td><td>+2.50</td>" in table
    assert "<td>[X] best / label_noise=0.0</td><td>error %</td><td>-</td><td>3</td><td>-</td>" in table
    table = study_page.published_table(list(rows.values()), comparable=False)
    assert '<td>12.5<small class="doubt">not comparable</small></td><td>+2.50</td>' in table


def test_the_page_of_a_sweep_needs_nothing_beside_itself(folder, tmp_path, capsys):
    file, report = folder.parent / "sweep.yaml", tmp_path / "report"
    assert cli.main(["report", str(folder), "--sweep", str(file), "--out", str(report)]) == 0
    page = (report / "index.html").read_text()
    without_data = re.sub(r'src="data:image/svg\+xml;base64,[^"]*"', "", page)
    assert not re.search(r'(src|href)="|@import|url\(|<script', without_data)
    assert page.count("data:image/svg+xml") == 2 and str(tmp_path) not in page
    assert '<meta name="viewport"' in page and "15.00 ± 7.07" in page and "Budget cpu, 2 seeds" in page
    stems = ["noise_sweep_error_label_noise", "noise_sweep_deepfool_norm_label_noise"]
    assert sorted(path.name for path in (report / "figures").iterdir()) == sorted(
        f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")
    )
    svg = base64.b64decode(re.search(r'base64,([^"]*)"', page)[1]).decode()
    assert svg == (report / "figures" / f"{stems[0]}.svg").read_text()
    (first, *_) = csv.DictReader((report / "results.csv").open())
    assert first["sweep"] == "noise_sweep" and float(first["error_mean"]) == pytest.approx(0.03)
    results = json.loads((report / "results.json").read_text())["sweeps"]
    assert results[0]["budget"] == "cpu" and len(results[0]["published"]) == 3


def test_two_folders_of_one_sweep_keep_their_figures_apart(folder, tmp_path):
    second = tmp_path / "again"
    Records(second / RECORDS).put(noisy()[0])
    (second / "summary.json").write_text(json.dumps({"sweep": "noise_sweep", "budget": "full"}))
    assert cli.main(["report", str(folder), str(second), "--out", str(tmp_path / "report")]) == 0
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<h2>out</h2>" in page and "<h2>again</h2>" in page
    assert (tmp_path / "report" / "figures" / "again_error_label_noise_0_0.png").is_file()


def test_what_is_no_sweep_is_refused(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / RECORDS).touch()
    assert cli.main(["report", str(tmp_path / "empty"), "--out", str(tmp_path)]) == 1
    assert "records.jsonl: no records; `margin-kernels sweep` writes them" in capsys.readouterr().err
    assert cli.main(["report", str(folder), str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "is not the folder of a sweep, others are" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"plane": {"error": 1}}, "published: unknown model 'plane'; did you mean plain"),
        ({"plain": {"error": 1}}, "published.plain: unknown point ''"),
        ({"plain / label_noise=0.3": {"error": 1}}, "unknown point 'label_noise=0.3'; did you mean label_noise=0"),
        ({"plain / label_noise=0.4": {"eror": 1}}, "unknown measure 'eror'; did you mean error"),
        ({"plain / label_noise=0.4": {"error": "1 %"}}, "published.plain / label_noise=0.4.error must be a number"),
    ],
)
def test_published_values_of_nothing_are_refused_by_name(tmp_path, published, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**NOISE, "published": published}))
    with pytest.raises(ConfigError, match=re.escape(message)):
        sweeps.read(path)


def test_a_sweep_builds_on_another(tmp_path):
    parent, child = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    parent.write_text(
        yaml.safe_dump(
            {**NOISE, "base": {"loss.top_k": 3, "data.seed": 5}, "seed_keys": ["training.seed"]}, sort_keys=False
        )
    )
    own = {
        "extends": str(parent),
        "base": {"loss": {"top_k": 2}},
        "points": [{"label": "few", "data.train_fraction": 0.1}],
    }
    own["models"] = {"hinge": {"optimiser.lr": 0.5}, "vat": {"loss.kind": "vat"}}
    child.write_text(yaml.safe_dump(own))
    cells = sweeps.read(child)
    assert [cell.name for cell in cells] == [
        f"{model}__few__seed{seed}" for seed in (0, 1) for model in ("plain", "hinge", "vat")
    ]
    hinge = cells[1].config
    assert (hinge.loss.kind, hinge.optimiser.lr, hinge.loss.top_k, hinge.data.seed) == ("hinge", 0.5, 2, 5)
    assert sweeps.published(child) == {} and len(sweeps.published(parent)) == 2
    child.write_text(yaml.safe_dump({"extends": str(child)}))
    with pytest.raises(ConfigError, match="extends: the file extends itself"):
        sweeps.read(child)
    child.write_text(yaml.safe_dump({"extends": "no_such"}))
    with pytest.raises(ConfigError, match="sweep no_such: no such file"):
        sweeps.read(child)


def test_a_sweep_leaves_out_models_of_the_one_it_builds_on(tmp_path):
    parent, child = tmp_path / "parent.yaml", tmp_path / "child.yaml"
    models = {"plain": {}, "margin l1": {"loss.kind": "hinge"}, "margin l2": {}, "second": {"after": "margin l2"}}
    parent.write_text(yaml.safe_dump({"base": {}, "models": models}, sort_keys=False))

    def read(**own):
        child.write_text(yaml.safe_dump({"extends": str(parent), **own}))
        return [cell.name for cell in sweeps.read(child)]

    assert read(without=["margin*", "second"]) == ["plain__seed0"]
    # a label that is left out is free again: nothing of the extended sweep's model remains
    assert read(without=["margin l1"], models={"margin l1": {}}) == [
        f"{model}__seed0" for model in ("plain", "margin_l2", "second", "margin_l1")
    ]
    assert next(cell for cell in sweeps.read(child) if cell.model == "margin l1").config.loss.kind != "hinge"
    with pytest.raises(ConfigError, match=r"models.second.after: unknown model above it 'margin l2'"):
        read(without=["margin*"])
    with pytest.raises(ConfigError, match="without: no model matches 'margn'; there are plain, margin l1, margin l2"):
        read(without=["margn"])
    with pytest.raises(ConfigError, match="without must be a list of patterns, got 'plain'"):
        read(without="plain")
    child.write_text(yaml.safe_dump({"base": {}, "models": models, "without": ["plain"]}))
    with pytest.raises(ConfigError, match="without: leaves out models of the sweep that `extends` names"):
        sweeps.read(child)

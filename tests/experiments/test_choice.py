"""A model with `choose` is the candidate that is best on validation images; no other candidate meets a test image."""

import json
import shutil
import statistics
from dataclasses import replace

import pytest
import torch
from support.tiny_sweeps import EVALUATION, TINY, changed, records, run, write

from margin_kernels.experiments import cli, sweeps
from margin_kernels.experiments.config import ConfigError
from margin_kernels.experiments.results import Records, Tried

FAST, SLOW = 0.003, 1e-5
CHOICE = changed(
    base={**TINY["base"], "evaluation": {**EVALUATION, "attacker": "plain"}},
    models={
        "plain": {},
        "tuned": {"loss.kind": "hinge", "choose": {"optimiser.lr": [SLOW, FAST]}},
        "fixed": {"loss.kind": "hinge", "optimiser.lr": FAST},
        "second": {"after": "tuned", "training.epochs": 0},
    },
    grid={},
    seeds=[0, 1],
    budgets={},
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("choice")
    path = write(root, CHOICE)
    assert run(path, root / "out", "--jobs", "2") == 0
    return path, root / "out"


def candidates(out):
    return {record.cell: record for record in Records(out / "candidates.jsonl").all()}


def test_the_best_on_validation_images_is_taken_and_only_it_is_evaluated(finished):
    _, out = finished
    found, tried = records(out), candidates(out)
    assert set(found) == {f"{model}__seed{s}" for model in ("plain", "tuned", "fixed", "second") for s in (0, 1)}
    assert set(tried) == {f"tuned_lr={lr}__seed{s}" for lr in (SLOW, FAST) for s in (0, 1)}
    assert all(record.evaluation is None for record in tried.values())

    def mean(lr):
        return statistics.fmean(tried[f"tuned_lr={lr}__seed{s}"].history[-1]["validation_accuracy"] for s in (0, 1))

    assert mean(FAST) > mean(SLOW) + 0.1
    for seed in (0, 1):
        tuned, fixed = found[f"tuned__seed{seed}"], found[f"fixed__seed{seed}"]
        assert tuned.choice == [Tried({"optimiser.lr": lr}, mean(lr), lr == FAST, [0, 1]) for lr in (SLOW, FAST)]
        # all but the name is what a model with this setting would have
        assert tuned.evaluation == fixed.evaluation and "black_box" in tuned.evaluation
        assert replace(tuned.config, name="") == replace(fixed.config, name="")
        weights = tried[f"tuned_lr={SLOW}__seed{seed}"].seconds
        assert tuned.seconds["choice"] == weights["training"] and set(weights) == {"training"}
        assert found[f"second__seed{seed}"].evaluation["fgsm_gap"] == tuned.evaluation["fgsm_gap"]
        assert found[f"second__seed{seed}"].after == f"tuned__seed{seed}"
    # weights are left of what another cell needs
    kept = {f"{model}__seed{seed}" for model in ("plain", "tuned") for seed in (0, 1)}
    assert {folder.name for folder in (out / "cells").iterdir()} == kept


def test_a_choice_that_was_made_stands_without_its_candidates(finished, tmp_path, capsys):
    path, out = finished
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "candidates.jsonl").unlink()
    assert run(path, again, "--dry-run") == 0
    assert "12 cells, 12 finished, 0 to do" in capsys.readouterr().out
    assert run(path, again) == 0
    assert not (again / "candidates.jsonl").exists() and records(again) == records(out)


def test_a_choice_among_other_values_is_refused(finished, tmp_path, capsys):
    _, out = finished
    models = {**CHOICE["models"], "tuned": {"loss.kind": "hinge", "choose": {"optimiser.lr": [SLOW, FAST, 0.01]}}}
    for other in ({"models": models}, {"seeds": [0, 1, 2]}, {"seeds": [0]}):
        assert run(write(tmp_path, {**CHOICE, **other}), out) == 1
        error = capsys.readouterr().err
        assert "was chosen among other values or by other seeds: choose another --out, or delete its line" in error


def test_another_evaluation_of_what_was_chosen_needs_only_its_weights(finished, tmp_path):
    _, out = finished
    again = tmp_path / "again"
    shutil.copytree(out, again)
    base = {**CHOICE["base"], "evaluation": {**CHOICE["base"]["evaluation"], "eps": 0.05}}
    models = {key: CHOICE["models"][key] for key in ("plain", "tuned")}
    assert run(write(tmp_path, {**CHOICE, "base": base, "models": models}), again) == 0
    for seed in (0, 1):
        before, after = (records(folder)[f"tuned__seed{seed}"] for folder in (out, again))
        assert (before.evaluation["eps"], after.evaluation["eps"]) == (0.1, 0.05)
        assert after.choice == before.choice and after.history == before.history
        assert after.evaluation["fgsm_gap"] > before.evaluation["fgsm_gap"]


def test_a_report_shows_what_was_chosen_among_what(finished, tmp_path):
    _, out = finished
    assert cli.main(["report", str(out), "--out", str(tmp_path)]) == 0
    page = (tmp_path / "index.html").read_text()
    assert "<h3>Chosen on the validation images</h3>" in page and "<td>lr=0.003</td>" in page
    (study,) = json.loads((tmp_path / "results.json").read_text())["sweeps"]
    assert [(row["setting"], row["chosen"]) for row in study["choices"]] == [("lr=1e-05", False), ("lr=0.003", True)]
    shown = {f"{100 * row['validation_accuracy']:.2f}" for row in study["choices"]}
    assert all(f"<td>{accuracy}</td>" in page for accuracy in shown)


def test_several_keys_are_chosen_together_and_all_seeds_take_part(tmp_path):
    choose = {"optimiser": {"lr": [0.1, 0.2]}, "model.dropout": [0.0, 0.5]}
    content = changed(models={"a": {"choose": choose}}, grid={}, seeds=[3, 4])
    cells = {cell.name: cell for cell in sweeps.read(write(tmp_path, content))}
    assert len(cells) == 10
    tuned = cells["a__seed3"]
    assert [option.values for option in tuned.choice] == [
        {"optimiser.lr": lr, "model.dropout": dropout} for lr in (0.1, 0.2) for dropout in (0.0, 0.5)
    ]
    assert tuned.choice[1].cells == ("a_lr=0.1_dropout=0.5__seed3", "a_lr=0.1_dropout=0.5__seed4")
    last = cells["a_lr=0.2_dropout=0.5__seed4"]
    assert last.candidate and (last.config.optimiser.lr, last.config.model.dropout) == (0.2, 0.5)
    assert last.needs == [] and len(tuned.needs) == 8
    assert len(sweeps.select(list(cells.values()), ["a__seed3"])) == 9


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        ({"loss.gama": [1]}, r"models.a.choose: unknown key 'loss.gama'; did you mean loss.gamma"),
        ({"loss.gamma": 1}, r"models.a.choose.loss.gamma must be a list of values, got 1"),
        ({"loss.gamma": []}, r"models.a.choose.loss.gamma must be a list of values, got \[\]"),
        ({"model.name": ["mlp80"]}, r"model.name: unknown value 'mlp80'; did you mean mlp800"),
        (3, r"models.a.choose must be a mapping, got 3"),
    ],
)
def test_a_choice_that_does_not_fit_is_refused_by_name(tmp_path, choose, message):
    with pytest.raises(ConfigError, match=message):
        sweeps.read(write(tmp_path, changed(models={"a": {"choose": choose}})))


def test_what_a_point_sets_is_not_to_be_chosen(tmp_path):
    content = changed(models={"a": {"choose": {"data.label_noise": [0.1]}}})
    with pytest.raises(ConfigError, match=r"models.a.choose.data.label_noise: point 'label_noise=0.0' sets that key"):
        sweeps.read(write(tmp_path, content))


def test_nothing_is_chosen_where_a_candidate_fails(tmp_path, capsys):
    models = {"tuned": {"choose": {"optimiser.lr": [1e30, FAST]}}, "other": {}}
    path, out = write(tmp_path, changed(models=models, grid={}, seeds=[0])), tmp_path / "out"
    assert run(path, out, "--budget", "quick") == 1
    error = capsys.readouterr().err
    assert "tuned__seed0 failed: tuned_lr=1e+30__seed0, one of those it chooses among, failed" in error
    assert set(records(out)) == {"other__seed0"}


def test_cells_on_cuda_take_the_gpu_with_the_fewest_of_them(tmp_path, monkeypatch):
    cells = sweeps.read(write(tmp_path, CHOICE))
    runner = sweeps.Runner(cells, tmp_path, sweeps.Options(), None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    taken = []
    for cell in cells[:5]:
        taken.append(runner._free("cuda"))
        runner.devices[cell.name], runner.running[cell.name] = taken[-1], None
    assert taken == ["cuda:0", "cuda:1", "cuda:2", "cuda:0", "cuda:1"]
    del runner.running[cells[1].name]
    assert runner._free("cuda") == "cuda:1"  # one cell as on cuda:2, and before it
    assert (runner._free("cpu"), runner._free("cuda:2")) == ("cpu", "cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert runner._free("cuda") == "cuda:0"  # which the cell refuses in its own words

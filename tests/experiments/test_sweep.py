"""A sweep runs every cell once, goes on where it was stopped, and its summary holds the mean and std of its records."""

import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import yaml
from support import resolved
from support.tiny_sweeps import EVALUATION, TINY, changed, records, run, run_in_processes, write

from margin_kernels.experiments import cli, data, models, sweeps
from margin_kernels.experiments.config import Config, ConfigError
from margin_kernels.experiments.evaluation import attacks
from margin_kernels.experiments.results import RECORDS, SINGLE_SAMPLES, Record, merged, sealed_line, summary


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The finished sweep of 2 models x 2 noise levels x 2 seeds."""
    root = tmp_path_factory.mktemp("sweep")
    path = write(root, TINY)
    assert run(path, root / "out", "--budget", "quick", "--jobs", "2") == 0
    return path, root / "out"


def test_every_cell_has_a_record_with_everything_and_no_path(tiny):
    out = tiny[1]
    found = records(out)
    assert sorted(found) == sorted(
        f"{model}__label_noise={noise}__seed{seed}"
        for model in ("cross-entropy", "hinge")
        for noise in ("0.0", "0.4")
        for seed in (0, 1)
    )
    record = found["hinge__label_noise=0.4__seed1"]
    assert record.config.loss.kind == "hinge" and record.config.data.label_noise == 0.4
    assert record.config.training.seed == 1 and record.config.data.seed == 1
    assert record.config.training.epochs == 1 and len(record.history) == 1
    assert record.values == {"data.label_noise": 0.4} and record.seed == 1
    assert {"clean", "fgsm_ce", "ifgsm_gap", "deepfool_norm", "rho_adv"} <= set(record.evaluation)
    assert len(record.evaluation["deepfool_norms"]) == 20
    assert sum(record.evaluation["histograms"]["deepfool_norm"]) == 20 - record.evaluation["deepfool_missed"]
    assert record.seconds["training"] > 0 and record.seconds["evaluation"] > 0
    assert record.versions["torch"] and record.machine["torch_threads"] == 1
    assert str(out.parent) not in (out / RECORDS).read_text()
    assert not any((out / "cells").iterdir())  # neither weights nor checkpoints were asked for


def test_the_same_seed_means_the_same_data_and_weights_for_every_model(tiny):
    found = records(tiny[1])
    first, second = (found[f"cross-entropy__label_noise=0.4__seed{seed}"] for seed in (0, 1))
    assert first.history[0]["train_loss"] != second.history[0]["train_loss"]
    clean = found["cross-entropy__label_noise=0.0__seed0"]
    assert clean.history[0]["train_loss"] < first.history[0]["train_loss"]


def test_summary_numbers_are_mean_and_std_of_the_records(tiny):
    out, found = tiny[1], records(tiny[1])
    rows = list(csv.DictReader((out / "summary.csv").open()))
    assert [(row["model"], row["data.label_noise"], row["seeds"]) for row in rows] == [
        ("cross-entropy", "0.0", "2"),
        ("hinge", "0.0", "2"),
        ("cross-entropy", "0.4", "2"),
        ("hinge", "0.4", "2"),
    ]
    about = json.loads((out / "summary.json").read_text())
    assert (about["sweep"], about["budget"], about["eps"], about["failed"]) == ("tiny", "quick", 0.1, [])
    for row in rows:
        name = f"{row['model']}__label_noise={row['data.label_noise']}"
        a, b = (found[f"{name}__seed{seed}"] for seed in (0, 1))
        for column, x, y in (
            ("error", 1 - a.evaluation["clean"], 1 - b.evaluation["clean"]),
            ("fgsm_error", 1 - a.evaluation["fgsm_ce"], 1 - b.evaluation["fgsm_ce"]),
            ("ifgsm_gap_error", 1 - a.evaluation["ifgsm_gap"], 1 - b.evaluation["ifgsm_gap"]),
            (
                "deepfool_norm_correct",
                a.evaluation["deepfool_norm_correct"],
                b.evaluation["deepfool_norm_correct"],
            ),
            ("deepfool_norm", a.evaluation["deepfool_norm"], b.evaluation["deepfool_norm"]),
            ("rho_adv", a.evaluation["rho_adv"], b.evaluation["rho_adv"]),
            ("validation_accuracy", *(r.history[-1]["validation_accuracy"] for r in (a, b))),
            ("ms_per_step", *(r.history[-1]["ms_per_step"] for r in (a, b))),
        ):
            mean, std = (x + y) / 2, abs(x - y) / 2**0.5
            assert float(row[f"{column}_mean"]) == pytest.approx(mean), column
            assert float(row[f"{column}_std"]) == pytest.approx(std, abs=1e-12), column


def test_a_finished_sweep_trains_nothing_and_prints_the_table_again(tiny, capsys):
    path, out = tiny
    file = out / RECORDS
    before = (file.stat().st_mtime_ns, file.read_bytes())
    assert run(path, out, "--budget", "quick") == 0
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before
    printed = capsys.readouterr().out
    error = statistics.fmean(1 - r.evaluation["clean"] for n, r in records(out).items() if n.startswith("hinge__l"))
    assert "8 of 8 cells" in printed and 0 < error < 1
    row = next(csv.DictReader((out / "summary.csv").open()))
    wanted = f"{100 * float(row['error_mean']):.2f} ± {100 * float(row['error_std']):.2f}"
    assert wanted in next(line for line in printed.splitlines() if line.strip().startswith("cross-entropy"))


def test_another_budget_is_not_mixed_with_the_records_of_this_one(tiny, capsys):
    path, out = tiny
    assert run(path, out) == 1
    assert "was made with other settings (training.epochs): choose another --out" in capsys.readouterr().err


def test_a_record_from_before_a_field_existed_counts_as_its_default(tiny, tmp_path):
    path, out = tiny
    first, *lines = (out / RECORDS).read_text().splitlines(keepends=True)
    shared = json.loads(first)
    del shared["shared"]["config"]["training"]["repeat"]
    file = tmp_path / RECORDS
    del shared["crc32"]
    file.write_text("".join([sealed_line(json.dumps(shared)) + "\n", *lines]))
    before = file.stat().st_mtime_ns
    assert run(path, tmp_path, "--budget", "quick") == 0
    assert file.stat().st_mtime_ns == before
    assert all(record.config.training.repeat == 1 for record in records(tmp_path).values())


def test_records_make_a_report_with_the_histogram_of_the_margin(tiny, tmp_path):
    paths = [f"{tiny[1] / RECORDS}:{model}__label_noise=0.4__seed0" for model in ("cross-entropy", "hinge")]
    assert cli.main(["report", *paths, "--out", str(tmp_path)]) == 0
    first, *lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    models = [merged(line, first["shared"]) for line in lines]
    assert [model["label"] for model in models] == ["cross-entropy label_noise=0.4", "hinge label_noise=0.4"]
    own = records(tiny[1])["hinge__label_noise=0.4__seed0"]
    assert models[1]["evaluation"] == {k: v for k, v in own.evaluation.items() if k not in SINGLE_SAMPLES}
    assert own.evaluation["deepfool_norms"] and models[1]["run"] == own.run.to_dict()
    assert "evaluation" not in models[1]["run"] and models[1]["run"]["history"] == own.history
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/svg+xml") == 4 + 1 and "Histogram of the margin" in page


def test_dry_run_lists_the_cells_and_starts_nothing(tiny, tmp_path, capsys):
    path, out = tiny
    assert run(path, out, "--budget", "quick", "--dry-run") == 0
    assert "8 cells, 8 finished, 0 to do" in capsys.readouterr().out
    assert run(path, tmp_path / "new", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "to do        2 epochs  hinge__label_noise=0.4__seed1" in printed and "8 cells, 0 finished" in printed
    assert not (tmp_path / "new").exists()


def test_cells_are_chosen_by_name_with_those_that_they_go_on_from(tmp_path):
    path = tmp_path / "chain.yaml"
    models = {"first": {}, "second": {"after": "first"}, "third": {"after": "second"}, "other": {}}
    path.write_text(yaml.safe_dump(changed(grid={}, seeds=[0, 1], budgets={}, models=models)))
    every = sweeps.read(path)
    names = [cell.name for cell in sweeps.select(every, ["second*seed1", "other__seed0"])]
    assert names == ["other__seed0", "first__seed1", "second__seed1"]
    assert sweeps.select(every, ["*"]) == every
    with pytest.raises(ConfigError, match=r"--cells fourth\*: no cell has such a name; --dry-run lists them"):
        sweeps.select(every, ["first*", "fourth*"])


def test_a_killed_sweep_goes_on_from_records_and_checkpoints(tmp_path):
    """SIGKILL while a cell trains: its process ends too, finished records stay as they were, and the rest is what an
    undisturbed sweep gives."""
    long = changed(grid={}, seeds=[0], budgets={})
    long["base"] = {**TINY["base"], "training": {**TINY["base"]["training"], "epochs": 15}}
    path, out = write(tmp_path, long), tmp_path / "out"
    command = [sys.executable, "-m", "margin_kernels.experiments", "sweep", str(path), "--out"]
    process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL)
    first, second = out / RECORDS, out / "cells" / "hinge__seed0"
    wait_for(lambda: first.exists() and (second / "checkpoint.pt").exists() and epochs(second) >= 2)
    child = int(
        re.search(r"\d+", subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout)[0]
    )
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: not alive(child))
    reached, kept = epochs(second), first.read_bytes()
    assert 2 <= reached < 15 and list(records(out)) == ["cross-entropy__seed0"]
    assert run(path, out) == 0
    assert first.read_bytes().startswith(kept) and first.read_bytes().count(b"\n") == kept.count(b"\n") + 1
    assert run(path, tmp_path / "straight") == 0
    for name, record in records(tmp_path / "straight").items():
        again = records(out)[name]
        assert again.evaluation == record.evaluation
        assert [e["train_loss"] for e in again.history] == [e["train_loss"] for e in record.history]


def epochs(folder):
    metrics = folder / "metrics.csv"
    return len(metrics.read_text().splitlines()) - 1 if metrics.exists() else 0


def alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_failing_cell_is_named_and_the_others_go_on(tmp_path, capsys):
    sweep_file = changed(
        models={
            "diverges": {"optimiser": {"name": "sgd", "lr": 1e30}},
            "after it": {"after": "diverges"},
            "hinge": {"loss.kind": "hinge"},
        },
        grid={},
        seeds=[0],
    )
    path = write(tmp_path, sweep_file)
    assert run_in_processes(path, tmp_path / "out", "--jobs", "2") == 1
    output = capsys.readouterr()
    assert "diverges__seed0 failed: diverges__seed0: the loss is nan" in output.err
    assert "after_it__seed0 failed: diverges__seed0, whose weights it starts from, failed" in output.err
    assert sorted(records(tmp_path / "out")) == ["hinge__seed0"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["failed"] == [
        "after_it__seed0",
        "diverges__seed0",
    ]


def test_a_model_can_go_on_from_the_weights_of_another(tmp_path):
    both = changed(
        models={
            "first": {},
            "same": {"after": "first", "training.epochs": 0},
            "longer": {"after": "first", "training.epochs": 1},
        },
        grid={},
        seeds=[3],
    )
    path, out = write(tmp_path, both), tmp_path / "out"
    assert run(path, out, "--jobs", "2") == 0
    found = records(out)
    assert found["same__seed3"].evaluation == found["first__seed3"].evaluation
    assert found["same__seed3"].after == "first__seed3" and found["same__seed3"].config.model.initial is None
    assert found["longer__seed3"].evaluation != found["first__seed3"].evaluation
    assert [folder.name for folder in (out / "cells").iterdir()] == ["first__seed3"]
    assert models.load_model(out / "cells" / "first__seed3")[1]["name"] == "digits_cnn"
    assert not (out / "cells" / "first__seed3" / "checkpoint.pt").exists()


ATTACKED = changed(
    base={**TINY["base"], "evaluation": {**EVALUATION, "attacker": "cross-entropy", "noise_sigmas": [0.0, 0.3]}},
    models={"cross-entropy": {}, "hinge": {"loss.kind": "hinge"}},
    grid={},
    seeds=[0],
    budgets={},
)


def test_a_model_is_attacked_by_another_of_its_point_and_seed(tmp_path):
    path, out = write(tmp_path, ATTACKED), tmp_path / "out"
    assert run(path, out, "--jobs", "2") == 0
    found = records(out)
    attacker, hinge = found["cross-entropy__seed0"], found["hinge__seed0"]
    assert "black_box" not in attacker.evaluation and attacker.attacker is None
    assert hinge.attacker == "cross-entropy__seed0"
    assert str(tmp_path) not in (out / RECORDS).read_text()
    # only the attacker's weights were needed, and with them its accuracies can be had again
    assert [folder.name for folder in (out / "cells").iterdir()] == ["cross-entropy__seed0"]
    model, _ = models.load_model(out / "cells" / "cross-entropy__seed0")
    split = data.load("digits").test
    x, y = split.batch(slice(0, 40))
    images = attacks.fgsm(model, x, y, 0.1, "gap").images
    own = float((model(images).argmax(1) == y).float().mean())
    assert attacker.evaluation["fgsm_gap"] == pytest.approx(own)
    assert hinge.evaluation["black_box"]["fgsm_gap"] != pytest.approx(own)
    row = summary.rows([hinge])[0]
    assert row["black_box_fgsm_error_mean"] == pytest.approx(1 - hinge.evaluation["black_box"]["fgsm_ce"])
    assert row["reverse_ifgsm_gap_error_mean"] == pytest.approx(1 - hinge.evaluation["reverse"]["ifgsm_gap"])
    assert run(path, out, "--dry-run") == 0  # the record of another label is not that of another setting


def test_an_attacker_comes_first_and_with_the_cells_that_it_attacks(tmp_path):
    cells = sweeps.read(write(tmp_path, ATTACKED))
    assert [cell.needs for cell in cells] == [[], ["cross-entropy__seed0"]]
    assert sweeps.select(cells, ["hinge*"]) == cells
    for labels, message in (
        (["hinge", "cross-entropy"], "models.hinge.evaluation.attacker: unknown model above it 'cross-entropy'"),
        (["hinge"], "models.hinge.evaluation.attacker: unknown model above it 'cross-entropy'; known: none"),
    ):
        content = {**ATTACKED, "models": {label: {} for label in labels}}
        with pytest.raises(ConfigError, match=message):
            sweeps.read(write(tmp_path, content))


def test_another_evaluation_is_made_from_kept_weights_and_trains_nothing(tmp_path, capsys):
    plain = changed(models=ATTACKED["models"], grid={}, seeds=[0], budgets={})
    out = tmp_path / "out"
    assert run(write(tmp_path, plain), out, "--keep-weights") == 0
    before, weights = records(out), {file: file.read_bytes() for file in out.glob("cells/*/model.safetensors")}
    times = {file: file.stat().st_mtime_ns for file in weights}
    assert len(weights) == 2
    path = write(tmp_path, ATTACKED)
    capsys.readouterr()
    assert run(path, out, "--dry-run") == 0
    assert "evaluate     2 epochs  hinge__seed0" in capsys.readouterr().out and records(out) == before
    assert run(path, out) == 0  # without --keep-weights: what was kept stays
    after = records(out)
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in weights} == {
        file: (content, times[file]) for file, content in weights.items()
    }
    for name, record in after.items():
        same = {"config": None, "evaluation": None, "seconds": {}, "attacker": None}
        assert replace(record, **same) == replace(before[name], **same)
        assert record.seconds["training"] == before[name].seconds["training"]
        for key in ("clean", "curves", "fgsm_ce", "deepfool_norms"):
            assert record.evaluation[key] == before[name].evaluation[key]
        assert len(record.evaluation["noise"]) == 2 and "noise" not in before[name].evaluation
    assert "black_box" in after["hinge__seed0"].evaluation
    trained = tmp_path / "trained"
    assert run(path, trained) == 0  # the same as if it had been asked for at once
    assert {name: record.evaluation for name, record in records(trained).items()} == {
        name: record.evaluation for name, record in after.items()
    }
    assert run(path, out, "--dry-run") == 0 and "2 finished, 0 to do" in capsys.readouterr().out


def test_another_evaluation_without_weights_is_refused(tiny, tmp_path, capsys):
    path, out = write(tmp_path, changed(base={**TINY["base"], "evaluation": {**EVALUATION, "eps": 0.2}})), tiny[1]
    assert run(path, out, "--budget", "quick") == 1
    assert "was made with other settings (evaluation.eps): choose another --out" in capsys.readouterr().err


def test_weights_are_kept_on_request(tmp_path):
    one = changed(models={"only": {}}, grid={}, seeds=[0])
    assert run(write(tmp_path, one), tmp_path / "out", "--keep-weights", "--budget", "quick") == 0
    model, description = models.load_model(tmp_path / "out" / "cells" / "only__seed0")
    assert description["name"] == "digits_cnn" and not model.training


def test_points_budgets_and_seed_keys_decide_the_configs(tmp_path):
    content = changed(
        points=[{"label": "few", "data": {"train_fraction": 0.1}, "training.epochs": 9}, {"data.train_fraction": 1.0}],
        seed_keys=["training.seed"],
        seeds=[4],
        budgets={"cpu": {"training.batch_size": 16, "seeds": [5, 6], "grid": {"loss.gamma": [1.0]}}},
    )
    path = write(tmp_path, content)
    cells = sweeps.read(path)
    assert [cell.name for cell in cells[:4]] == [
        "cross-entropy__few_label_noise=0.0__seed4",
        "hinge__few_label_noise=0.0__seed4",
        "cross-entropy__few_label_noise=0.4__seed4",
        "hinge__few_label_noise=0.4__seed4",
    ]
    assert cells[4].name == "cross-entropy__train_fraction=1.0_label_noise=0.0__seed4" and len(cells) == 8
    first, last = cells[0].config, cells[-1].config
    assert (first.data.train_fraction, first.training.epochs, first.training.seed, first.data.seed) == (0.1, 9, 4, 0)
    assert (last.data.label_noise, last.training.epochs, last.training.batch_size) == (0.4, 2, 64)
    cpu = sweeps.read(path, "cpu")
    assert [cell.seed for cell in cpu] == [5] * 4 + [6] * 4 and cpu[0].config.training.batch_size == 16
    assert cpu[0].values == {"data.train_fraction": 0.1, "training.epochs": 9, "loss.gamma": 1.0}


def test_a_point_may_have_seeds_of_its_own(tmp_path):
    points = [{"label": "all", "seeds": [0]}, {"label": "few", "data.train_fraction": 0.1}]
    cells = sweeps.read(write(tmp_path, changed(models={"a": {}}, grid={}, points=points, seeds=[0, 7])))
    assert [cell.name for cell in cells] == ["a__all__seed0", "a__few__seed0", "a__few__seed7"]
    with pytest.raises(ConfigError, match=r"points\[0\].seeds must be a list of integers, got \['x'\]"):
        sweeps.read(write(tmp_path, changed(points=[{"seeds": ["x"]}])))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modles": {}}, "unknown key 'modles'; did you mean models"),
        ({"grid": {"data.label_nose": [1]}}, "grid: unknown key 'data.label_nose'; did you mean data.label_noise"),
        ({"grid": {"data.label_noise": 0.5}}, r"grid.data.label_noise must be a list of values, got 0.5"),
        ({"models": {"a": {"los": {"kind": "hinge"}}}}, r"models.a: unknown key 'los'"),
        ({"models": {"a": {"loss.knd": "hinge"}}}, r"models.a: unknown key 'loss.knd'; did you mean loss.kind"),
        ({"models": {"a": {"loss.kind": "hinje"}}}, r"loss.kind: unknown value 'hinje'; did you mean hinge"),
        ({"models": {"a": {"model.name": "mlp80"}}}, r"model.name: unknown value 'mlp80'; did you mean mlp800"),
        ({"models": {"a": {"training.epochs": "many"}}}, r"tiny.yaml: a: .*training.epochs"),
        (
            {"models": {"hinge": {}, "b": {"after": "hinj"}}},
            r"models.b.after: unknown model above it 'hinj'; did you mean",
        ),
        ({"models": {"b": {"after": "b"}}}, r"models.b.after: unknown model above it 'b'; known: none"),
        ({"models": {}}, "models must be a mapping of at least one label"),
        ({"seeds": 3}, "seeds must be a list of integers, got 3"),
        ({"seed_keys": ["seed"]}, "seed_keys: unknown key 'seed'; did you mean"),
        (
            {"points": [{"training.epoch": 1}]},
            r"points\[0\]: unknown key 'training.epoch'; did you mean training.epochs",
        ),
        ({"points": [{"label": "a"}, {"label": "a"}]}, "two cells are called"),
        ({"base": "no_such_config"}, "no such file, and not one of the shipped configs"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_anything_runs(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        sweeps.read(write(tmp_path, changed(**keys)))


def test_unknown_names_and_impossible_options_are_refused(tmp_path, capsys):
    path = write(tmp_path, TINY)
    with pytest.raises(ConfigError, match=r"--budget: unknown budget 'quik'; did you mean quick"):
        sweeps.read(path, "quik")
    assert cli.main(["sweep", "no_such_sweep"]) == 1
    assert "no such file, and not one of the shipped sweeps" in capsys.readouterr().err
    assert run(path, tmp_path, "--jobs", "0") == 1
    assert re.search(r"--jobs must be in \[1, \d+\], got 0\n", capsys.readouterr().err)


def test_two_sweeps_do_not_share_a_folder(tmp_path):
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(write(tmp_path, TINY), tmp_path / "out") == 1


def bare_record(evaluation):
    """A record of model "a" with nothing but an evaluation."""
    run = {"network": {}, "parameters": 1, "versions": {}, "machine": {}, "history": [], "seconds": {"training": 1.0}}
    place = {"cell": "a__seed0", "model": "a", "point": "", "seed": 0, "values": {}}
    return Record(config=Config(), evaluation=evaluation, **run, **place)


def test_a_measure_that_a_seed_lacks_has_no_mean():
    evaluations = ({"clean": 0.5, "rho_adv": 0.1}, {"clean": 0.25, "rho_adv": None})
    (row,) = summary.rows([bare_record(evaluation) for evaluation in evaluations])
    assert row["error_mean"] == 0.625 and row["error_std"] == pytest.approx(0.25 / 2**0.5)
    assert row["rho_adv_mean"] is None and row["rho_adv_std"] is None


def test_one_seed_has_a_mean_and_no_std():
    (row,) = summary.rows([bare_record({"clean": 0.75})])
    assert row["error_mean"] == 0.25 and row["error_std"] is None and "deepfool_norm_mean" not in row
    assert summary.cell(summary.MEASURES[0], row) == "25.00"


@pytest.mark.parametrize("name", sorted(sweeps.shipped()))
def test_shipped_sweeps_read_and_build(name):
    path = sweeps.shipped()[name]
    assert path.read_text().startswith("# ")
    for budget in ("quick", "cpu", "full"):
        cells = sweeps.read(path, budget)
        assert cells and len({cell.name for cell in cells}) == len(cells)
        resolved.check(f"sweep {name} {budget}", [cell.config for cell in cells])
        for label in {cell.config.model.name for cell in cells}:
            models.build(label, (1, 28, 28), 10)

"""What goes wrong in a run: nothing complete is lost, nothing damaged is used, and a sentence says what to do."""

import errno
import json
import os
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ROOT, tiny_sweeps
from support.command_line import COMMAND, SMALL
from support.processes import NIGHTLY

from margin_kernels.experiments import cli, config, data, models
from margin_kernels.experiments.results import Records, digest, files, merged, sealed, sealed_line, unsealed
from margin_kernels.experiments.results.checksum import ChecksumError, unsealed_line
from margin_kernels.experiments.training import Trainer, TrainingError, errors, load_state
from margin_kernels.experiments.training.checkpoint import save_state

QUICK = [
    "--evaluation.attack_samples",
    "10",
    "--evaluation.deepfool_samples",
    "5",
    "--evaluation.distance_samples",
    "5",
]
FILES = ("checkpoint.pt", "model.safetensors", "model.json", "run.json", "metrics.csv", "config.yaml")


def train(out, *arguments):
    return cli.main(["train", *SMALL, "--out", str(out), *arguments])


def said(capsys):
    """The one line on the error stream."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two epochs; tests copy it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert train(folder, *QUICK, "--training.epochs", "2") == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in FILES:
        (folder / name).write_bytes((trained / name).read_bytes())
    return folder


# diverged weights


def exploding(factor=1e38, **training):
    """One step an epoch; the second epoch's step ends at weights that are not finite, with a finite loss before it."""
    settings = config.parse([*SMALL, "--optimiser.name", "sgd", "--schedule.name", "step"])
    return replace(
        settings,
        schedule=replace(settings.schedule, factor=factor, milestones=[1]),
        training=replace(settings.training, batch_size=4096, epochs=2, **training),
    )


@pytest.mark.parametrize("factor", [1e41, 1e33], ids=["weights overflow", "logits overflow"])
def test_weights_that_are_not_finite_never_replace_the_last_good_checkpoint(tmp_path, factor):
    settings = exploding(factor)
    dataset = data.of(settings.data)
    trainer = Trainer(settings, dataset, tmp_path)
    trainer.run(until=1)
    good = {name: (tmp_path / name).read_bytes() for name in ("checkpoint.pt", "run.json", "metrics.csv")}
    for attempt in range(2):
        again = Trainer(settings, dataset, tmp_path)
        again.resume()
        with pytest.raises(TrainingError, match=r"weights .*after epoch 2 .*not finite.*checkpoint \(epoch 1\)"):
            again.run()
        assert {name: (tmp_path / name).read_bytes() for name in good} == good, attempt
        assert len(again.history) == 1
    model, _ = models.load_model(tmp_path)
    assert all(bool(weight.isfinite().all()) for weight in model.state_dict().values())


def test_a_run_that_diverges_ends_with_1_and_leaves_no_weights(tmp_path, capsys):
    settings = exploding(1e41)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(replace(settings, schedule=replace(settings.schedule, milestones=[0]))))
    assert cli.main(["train", "--config", str(path), "--out", str(tmp_path / "run")]) == 1
    assert "the weights" in (text := said(capsys)) and "not finite" in text and "epoch 1" in text
    assert not {"checkpoint.pt", "model.safetensors"} & set(os.listdir(tmp_path / "run"))


# numbers that make no sense


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("training.clip_norm", "0", "must be above 0, got 0"),
        ("training.clip_norm", "-1", "must be above 0, got -1"),
        ("optimiser.lr", ".inf", "must be finite, got inf"),
        ("optimiser.lr", "-1", "must be at least 0, got -1"),
        ("optimiser.weight_decay", ".nan", "must be finite, got nan"),
        ("training.epochs", "-1", "must be at least 0, got -1"),
        ("training.batch_size", "0", "must be at least 1, got 0"),
        ("training.accumulate", "0", "must be at least 1, got 0"),
        ("training.repeat", "-2", "must be at least 1, got -2"),
        ("training.stop_at_train_accuracy", "1.5", r"must be in [0, 1], got 1.5"),
        ("training.seed", "9223372036854775808", "must be at most 9.22337e+18, got 9223372036854775808"),
        ("training.seed", "-1", "must be at least 0, got -1"),
        ("training.threads", "1000000", "must be in [1, "),
        ("training.threads", "0", "must be in [1, "),
        ("loss.gamma", "[1, .nan]", "must be finite, got nan"),
        ("loss.p", "0.5", "must be at least 1, got 0.5"),
        ("loss.top_k", "0", "must be at least 1, got 0"),
        ("data.label_noise", "1.5", "must be in [0, 1], got 1.5"),
        ("data.train_fraction", "0", "must be in (0, 1], got 0"),
        ("data.seed", "-3", "must be at least 0, got -3"),
        ("schedule.milestones", "[3, -1]", "must be at least 0, got -1"),
        ("evaluation.attack_samples", "-3", "must be at least 1, got -3"),
        ("evaluation.curve", "[0.1, -0.1]", "must be at least 0, got -0.1"),
        (
            "name",
            "../elsewhere",
            "must be the name of a folder, without separators and at most 255 bytes, got '../elsewhere'",
        ),
        ("name", "..", "must be the name of a folder"),
        ("name", "''", "must be the name of a folder"),
        ("training.device", "abacus", "must be cpu, cuda or cuda:N, got 'abacus'"),
        ("training.device", "meta", "must be cpu, cuda or cuda:N, got 'meta'"),
    ],
)
def test_numbers_and_names_that_make_no_sense_are_refused_before_anything_is_trained(
    tmp_path, monkeypatch, capsys, key, value, words
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    section, _, name = key.rpartition(".")
    path.write_text(f"{section}: {{{name}: {value}}}\n" if section else f"{name}: {value}\n")
    assert cli.main(["train", "--config", str(path), "--out", "run"]) == 1
    text = said(capsys)
    assert key in text and words in text
    assert not (tmp_path / "run" / "config.yaml").exists()


@given(st.text(max_size=20))
def test_a_name_stays_a_folder_below_runs(name):
    try:
        config.check(replace(config.Config(), name=name))
    except config.ConfigError as error:
        assert "name must be the name of a folder" in str(error)
    else:
        path = Path("runs") / name
        assert path.parent == Path("runs") and path.name == name not in ("", ".", "..") and "\0" not in name


def test_every_number_of_a_config_is_looked_at():
    seen = {key for key, _ in config.bounds.numbers(config.Config())}
    assert {"training.clip_norm", "loss.gamma", "evaluation.curve", "loss.sensitivity.weight"} - seen == {
        "training.clip_norm"  # None by default
    }
    assert set(config.bounds.RANGES) <= set(config.keys())


# changed bytes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data_=st.data())
@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors", "model.json"])
def test_a_changed_byte_is_told_and_nothing_is_resumed_or_measured(trained, tmp_path, name, data_):
    content = bytearray((trained / name).read_bytes())
    at = data_.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data_.draw(st.integers(0, 7))
    for other in FILES:
        (tmp_path / other).write_bytes(content if other == name else (trained / other).read_bytes())
    read = load_state if name == "checkpoint.pt" else models.load_model
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read(tmp_path)


def test_a_changed_checkpoint_ends_a_resumption_and_check_names_it(run, capsys):
    path = run / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    before = {name: (run / name).read_bytes() for name in FILES}
    assert train(run, *QUICK, "--training.epochs", "2", "--resume") == 1
    assert f"{path} is damaged: its content does not have the checksum" in said(capsys)
    assert {name: (run / name).read_bytes() for name in FILES} == before
    assert cli.main(["check", str(run)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["damaged", *["ok"] * 3] and "checkpoint.pt" in lines[0]


def test_check_reads_all_files_of_a_run_and_finds_them_whole(run, capsys):
    assert cli.main(["check", str(run)]) == 0
    out = capsys.readouterr().out
    assert out.count("ok ") == 4 and "model.safetensors" in out and "run.json" in out
    (run / "empty").mkdir()
    assert cli.main(["check", str(run / "empty")]) == 1
    assert "must hold files of a run or a sweep" in said(capsys)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.data())
def test_a_seal_is_broken_by_any_change(content, draw):
    whole = sealed(content)
    assert unsealed(whole, Path("file")) == content
    changed = bytearray(whole)
    changed[draw.draw(st.integers(0, len(whole) - 1))] ^= 1 << draw.draw(st.integers(0, 7))
    with pytest.raises(ChecksumError, match="file"):
        unsealed(bytes(changed), Path("file"))
    with pytest.raises(ChecksumError, match="file"):
        unsealed(whole[: draw.draw(st.integers(0, len(whole) - 1))], Path("file"))


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), min_size=1, max_size=4), st.data())
def test_a_line_of_records_with_another_character_is_refused(values, draw):
    line = json.dumps(values, separators=(",", ":"))
    whole = sealed_line(line)
    assert unsealed_line(whole) == line and json.loads(whole)["crc32"]
    at = draw.draw(st.integers(0, len(whole) - 1))
    other = draw.draw(st.characters(min_codepoint=32, max_codepoint=126).filter(lambda c: c != whole[at]))
    with pytest.raises(ValueError, match="checksum"):
        unsealed_line(whole[:at] + other + whole[at + 1 :])


def test_the_digest_of_a_network_is_of_names_types_shapes_values_and_description():
    weights = {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.float16)}
    found = digest(weights, {"name": "mlp"})
    others = [
        digest({**weights, "a": torch.zeros(3, 2)}, {"name": "mlp"}),
        digest({**weights, "a": torch.zeros(2, 3, dtype=torch.int32)}, {"name": "mlp"}),
        digest({**weights, "a": torch.zeros(2, 3).index_fill_(1, torch.tensor([1]), 1e-45)}, {"name": "mlp"}),
        digest({"a": weights["a"], "c": weights["b"]}, {"name": "mlp"}),
        digest(weights, {"name": "mlp2"}),
    ]
    assert len({found, *others}) == 6 and found == digest(dict(reversed(weights.items())), {"name": "mlp"})


# bad calls


BAD_CALLS = {
    "output is a file": (["train", *SMALL, "--out", "file"], "file: File exists; a file of that name is in the way"),
    "output below a file": (["train", *SMALL, "--out", "file/run"], "file/run: Not a directory; a part of the path"),
    "name too long": (["train", *SMALL, "--name", "n" * 300], "name must be the name of a folder"),
    "YAML syntax": (["train", "--config", "broken.yaml"], "broken.yaml, line 2: not YAML"),
    "YAML tags": (["train", "--config", "tag.yaml"], "tag.yaml, line 1: not YAML"),
    "YAML is binary": (["train", "--config", "binary.yaml"], "binary.yaml: not YAML"),
    "YAML too deep": (["train", "--config", "deep.yaml"], "deep.yaml: not YAML"),
    "a config that is a folder": (["train", "--config", "folder"], "--config folder: no such file"),
    "sweep syntax": (["sweep", "broken.yaml"], "broken.yaml, line 2: not YAML"),
    "sweep is a list": (["sweep", "list.yaml"], "list.yaml must be a mapping"),
    "sweep is empty": (["sweep", "empty.yaml"], "empty.yaml: models must be a mapping"),
    "nothing to evaluate": (["evaluate", "folder"], "folder/config.yaml: missing"),
    "nothing to report": (
        ["report", "folder"],
        "folder/run.json: missing; run `margin-kernels train` first, or `margin-kernels sweep` for a sweep",
    ),
    "nothing to report of a sweep": (
        ["report", "unfinished"],
        "unfinished/records.jsonl: missing; no cell of this sweep is finished: `margin-kernels sweep` with its file",
    ),
    "nothing to report of candidates": (["report", "candidates"], "candidates/records.jsonl: missing; no cell of this"),
    "foreign run.json": (["report", "foreign"], "foreign/run.json must be what `margin-kernels train`"),
    "run.json is no JSON": (["report", "torn"], "torn/run.json must be JSON"),
    "run.json is binary": (["report", "binary"], "binary/run.json must be text in UTF-8, got byte 0xff at 0"),
    "foreign records": (["report", "records/records.jsonl:a"], "records.jsonl, line 1"),
    "nothing to resume": (["train", *SMALL, "--out", "folder", "--resume"], "nothing to resume"),
    "nowhere to resume": (["train", *SMALL, "--out", "nowhere", "--resume"], "nowhere: nothing to resume"),
    "foreign checkpoint": (["train", *SMALL, "--out", "foreign", "--resume"], "not a checkpoint of this program"),
    "no data folder": (["train", *SMALL, "--data.name", "mnist", "--data-dir", "nowhere"], "--data-dir does not exist"),
    "data is a file": (["train", *SMALL, "--data.name", "mnist", "--data-dir", "file"], "no train-images-idx3-ubyte"),
    "no GPU": (["train", *SMALL, "--training.device", "cuda:64"], "training.device must be "),
    "no such command": (["trian"], "command must be one of train"),
    "resume and overwrite": (["train", "--resume", "--overwrite", "--out", "folder"], "must not be given together"),
    "nothing to check": (["check", "folder"], "must hold files of a run or a sweep"),
    "no such cell": (["sweep", "sensitivity_mnist_mlp", "--cells", "[/b]"], "no cell has such a name"),
}


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "foreign", "torn", "binary", "records", "unfinished/cells", "candidates"):
        Path(name).mkdir(parents=True)
    Path("candidates/candidates.jsonl").write_text("")
    Path("file").write_text("")
    Path("broken.yaml").write_text("a: [1\nb: 2\n")
    Path("tag.yaml").write_text("name: !!python/name:os.system\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    Path("deep.yaml").write_text("[" * 100_000)
    Path("list.yaml").write_text("- 1\n")
    Path("empty.yaml").write_text("")
    Path("foreign/run.json").write_text('{"model": 1}')
    Path("foreign/evaluation.json").write_text("{}")
    torch.save({"weights": torch.zeros(3)}, "weights.pt")
    Path("foreign/checkpoint.pt").write_bytes(sealed(Path("weights.pt").read_bytes()))
    Path("torn/run.json").write_text('{"config"')
    Path("torn/evaluation.json").write_text("{}")
    Path("binary/run.json").write_bytes(b"\xff\xfe")
    Path("binary/evaluation.json").write_text("{}")
    Path("records/records.jsonl").write_text('{"cell": "a"}\n{"cell": "b"}\n')
    return tmp_path


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_bad_call_is_answered_in_a_sentence(case, hostile, capsys):
    arguments, words = BAD_CALLS[case]
    assert cli.main(arguments) in (1, 2)
    text = said(capsys)
    assert words in text and len(text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            "runs/a: No space left on device; free some space",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "a: Permission denied; choose another folder"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "a: Read-only file system; choose a folder that can be"),
        (OSError(errno.EIO, "Input/output error", "a"), "a: Input/output error"),
        (MemoryError(), "out of memory; lower --jobs"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"), "out of memory; lower"),
        (ValueError("p must be >= 1"), "p must be >= 1"),
    ],
)
def test_what_may_go_wrong_on_any_machine_has_a_sentence(error, words, capsys):
    assert errors.report("margin-kernels train", error) == 1
    assert said(capsys).startswith(f"margin-kernels train: {words}")


def test_a_fault_of_the_program_says_so_and_shows_where(capsys, monkeypatch):
    def faulty(arguments):
        raise KeyError("distance")

    monkeypatch.setitem(cli.commands.COMMANDS, "info", faulty)
    assert cli.main(["info"]) == errors.FAULT == 70
    text = capsys.readouterr().err
    assert "KeyError: 'distance'" in text and "fault of the program" in text.splitlines()[-1]


def test_names_are_text_and_neither_markup_nor_mathematics(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["[b]x[", "a$x^$b", "<script>"]
    for name in names:
        assert cli.main(["train", *SMALL, *QUICK, "--training.epochs", "1", "--name", name]) == 0
    runs = [f"runs/{name}" for name in names]
    assert cli.main(["evaluate", "--no-timing", *runs]) == 0
    assert "[b]x[" in capsys.readouterr().out
    assert cli.main(["report", *runs, "--title", "[/b] $x^$"]) == 0
    assert "[/b] $x^$" in capsys.readouterr().out
    page = Path("report/index.html").read_text()
    assert "a$x^$b" in page and "<script>" not in page and "&lt;script&gt;" in page


# writes


def test_files_have_the_rights_that_umask_leaves(tmp_path):
    for mask, rights in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(mask)
        try:
            files.write_text(tmp_path / "file", "text")
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == rights
        (tmp_path / "file").unlink()


def test_an_unfinished_write_leaves_the_old_file_and_the_lock_sweeps_the_rest(tmp_path, monkeypatch):
    files.write_text(tmp_path / "file", "old")
    monkeypatch.setattr(os, "replace", lambda *paths: os.kill(os.getpid(), 0) or (_ for _ in ()).throw(OSError(28, "")))
    with pytest.raises(OSError, match="28"):
        files.write_text(tmp_path / "file", "new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"
    (tmp_path / ".writing.4194304.abc").write_text("ne")  # beyond the largest number of a process
    (tmp_path / ".writing.xyz").write_text("ne")
    with files.locked(tmp_path, "another run"):
        assert sorted(os.listdir(tmp_path)) == ["file", "lock"]


def test_two_runs_do_not_write_into_one_folder(run, capsys):
    before = {name: (run / name).read_bytes() for name in FILES}
    with files.locked(run, "this test"):
        assert train(run, *QUICK, "--training.epochs", "2", "--resume") == 1
    assert (
        f"{run} is in use by another run or an evaluation of it: wait for it to end, or choose another --out"
        in said(capsys)
    )
    assert {name: (run / name).read_bytes() for name in FILES} == before


def test_a_finished_run_is_overwritten_only_where_that_is_asked_for(run, capsys):
    before = (run / "model.safetensors").read_bytes()
    assert train(run, *QUICK, "--training.epochs", "1") == 1
    assert "already holds a run; continue it with --resume, throw it away with --overwrite" in said(capsys)
    assert (run / "model.safetensors").read_bytes() == before
    (run / "evaluation.json").write_text("{}")
    assert train(run, *QUICK, "--training.epochs", "1", "--overwrite") == 0
    assert (run / "model.safetensors").read_bytes() != before and not (run / "evaluation.json").exists()
    assert len(json.loads((run / "run.json").read_text())["history"]) == 1


def test_a_run_is_evaluated_by_one_process_and_not_while_it_trains(run, capsys):
    before = contents(run)
    with files.locked(run, "this test"):  # which may be any of the two
        assert cli.main(["evaluate", "--no-timing", str(run)]) == 1
    assert f"{run} is in use by a training or another evaluation: wait for it to end" in said(capsys)
    assert contents(run) == before
    assert cli.main(["evaluate", "--no-timing", str(run)]) == 0
    assert set(contents(run)) == {*before, "evaluation.json"}


def test_two_evaluations_at_once_leave_one_whole(run):
    command = [*COMMAND, "evaluate", "--no-timing", str(run)]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        text = process.communicate(timeout=120)[1]
        assert process.returncode == 0 or (process.returncode == 1 and "another evaluation: wait" in text), text
    assert 0 in [process.returncode for process in both]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["weights"] == models.weights_digest(run)


def test_a_second_sweep_of_a_folder_is_refused(tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(SWEEP.format(epochs=1))
    arguments = ["sweep", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out")]
    with files.locked(tmp_path / "out", "this test"):
        assert cli.main(arguments) == 1
    assert "out is in use by another sweep: wait for it to end, or choose another --out" in said(capsys)
    assert os.listdir(tmp_path / "out") == ["lock"]


def test_folders_behind_links_are_folders(run, tmp_path, capsys):
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    link = str(tmp_path / "link")
    assert train(link, *QUICK, "--training.epochs", "3", "--resume") == 0
    assert cli.main(["evaluate", "--no-timing", link]) == 0
    assert cli.main(["report", link, "--out", str(tmp_path / "report")]) == 0
    assert cli.main(["check", link]) == 0
    assert train(link, *QUICK, "--training.epochs", "1", "--overwrite") == 0
    assert (tmp_path / "link").is_symlink() and len(json.loads((run / "run.json").read_text())["history"]) == 1
    for name, words in (("dangling", "dangling: File exists"), ("loop", "loop: ")):
        assert train(tmp_path / name, "--training.epochs", "1") == 1
        assert words in said(capsys)
        assert cli.main(["evaluate", str(tmp_path / name)]) == 1
        assert f"{name} is not the folder of a training run" in said(capsys)


def test_a_lock_that_is_a_link_costs_its_target_nothing(tmp_path):
    (tmp_path / "precious").write_text("content")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with files.locked(tmp_path, "this test"):
        pass
    assert (tmp_path / "precious").read_text() == "content"


def contents(folder):
    """Name -> bytes of all files but the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_run_that_ends_before_its_first_checkpoint_leaves_the_one_that_it_was_to_replace(run, capsys):
    assert cli.main(["evaluate", "--no-timing", str(run)]) == 0
    before = contents(run)
    assert train(run, "--optimiser.lr", "1e30", "--optimiser.name", "sgd", "--overwrite") == 1
    assert "not finite" in (text := said(capsys)) or "the loss is" in text
    assert contents(run) == before
    assert train(run, "--training.threads", "0", "--overwrite") == 1
    assert contents(run) == before


@pytest.mark.parametrize(
    ("function", "count"), [*(("rename", count) for count in range(7)), *(("replace", count) for count in range(6))]
)
def test_a_run_killed_while_it_replaces_another_one_loses_neither(run, tmp_path, capsys, function, count):
    """Killed at every move of the old files (os.rename), the last of which removes them, and at every write
    (os.replace): whatever command comes next finds one of the two runs whole."""
    before = contents(run)
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, function, count)
        with pytest.raises(Killed):
            train(run, *QUICK, "--training.epochs", "1", "--overwrite")
    capsys.readouterr()
    if (run / "replaced").is_dir():
        assert cli.main(["report", str(run), "--out", str(tmp_path / "report")]) == 1
        assert "another run is replacing this one, or was stopped while it did" in said(capsys)
    begun = (run / "checkpoint.pt").exists() and load_state(run)["epoch"] == 1
    assert begun == ((function, count) in [("rename", 6), ("replace", 4), ("replace", 5)])
    if begun:
        assert train(run, *QUICK, "--training.epochs", "1", "--resume") == 0
        assert len(json.loads((run / "run.json").read_text())["history"]) == 1
    assert cli.main(["evaluate", "--no-timing", str(run)]) == 0
    after = contents(run)
    assert json.loads(after.pop("evaluation.json"))["weights"] == models.weights_digest(run)
    assert set(after) == set(FILES) and (begun or after == before)


class Killed(BaseException):
    """The process is gone."""


def killed_at(patch, function, count):
    """Once os.`function` was called `count` times, no call of it or of the other one does anything any more."""
    left = count

    def of(name, real):
        def call(*paths):
            nonlocal left
            left -= name == function
            if left < 0:
                raise Killed
            real(*paths)

        return call

    for name in ("rename", "replace"):
        patch.setattr(os, name, of(name, getattr(os, name)))


@pytest.mark.parametrize("schedule", ["constant", "exponential", "step"])
def test_a_finished_run_is_extended_and_is_then_as_one_that_was_as_long_from_the_start(tmp_path, schedule):
    options = ["--schedule.name", schedule, "--schedule.milestones", "[1]"]
    assert train(tmp_path / "a", *options, "--training.epochs", "1") == 0
    assert train(tmp_path / "a", *options, "--training.epochs", "3", "--resume") == 0
    assert train(tmp_path / "b", *options, "--training.epochs", "3") == 0
    one, other = (models.load_model(tmp_path / name)[0].state_dict() for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_cosine_schedule_is_not_extended_and_no_run_is_shortened(tmp_path, capsys):
    assert train(tmp_path / "a", "--schedule.name", "cosine", "--training.epochs", "1") == 0
    assert train(tmp_path / "a", "--schedule.name", "cosine", "--training.epochs", "2", "--resume") == 1
    text = said(capsys)
    assert "training.epochs must be 1, got 2: the learning rate of a cosine schedule is 0 after 1 epochs" in text
    assert f"--model.initial {tmp_path / 'a'} in another --out" in text
    remedy = ["--schedule.name", "cosine", "--training.epochs", "2", "--model.initial", str(tmp_path / "a")]
    assert train(tmp_path / "c", *remedy) == 0
    assert len((tmp_path / "c/metrics.csv").read_text().splitlines()) == 3
    assert train(tmp_path / "b", "--training.epochs", "2") == 0
    assert train(tmp_path / "b", "--training.epochs", "1", "--resume") == 1
    assert "training.epochs must be at least 2, which are trained already, got 1" in said(capsys)


def test_a_finished_run_that_is_resumed_says_that_nothing_is_left(tmp_path, capsys):
    assert train(tmp_path / "a", "--training.epochs", "1") == 0
    weights = (tmp_path / "a/model.safetensors").read_bytes()
    assert train(tmp_path / "a", "--training.epochs", "1", "--resume") == 0
    assert "nothing is left: a higher --training.epochs extends the run" in capsys.readouterr().out
    assert train(tmp_path / "b", "--training.epochs", "3", "--training.stop_at_train_accuracy", "0") == 0
    assert train(tmp_path / "b", "--training.epochs", "5", "--training.stop_at_train_accuracy", "0", "--resume") == 0
    assert "nothing is left: training.stop_at_train_accuracy was reached" in capsys.readouterr().out
    assert (tmp_path / "a/model.safetensors").read_bytes() == weights


# signals, kills and full disks, in processes of their own


def start(folder, *arguments):
    command = [*COMMAND, "train", *SMALL, "--out", str(folder), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_a_sentence_and_it_goes_on_bit_for_bit(tmp_path, number, status):
    process = start(tmp_path / "a", "--training.epochs", "400")
    until = time.monotonic() + 120
    while not (tmp_path / "a" / "checkpoint.pt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    assert process.returncode == status and "`--resume` continues" in text and "Traceback" not in text
    reached = len((tmp_path / "a" / "metrics.csv").read_text().splitlines()) - 1
    epochs = str(reached + 1)
    assert train(tmp_path / "a", "--training.epochs", epochs, "--resume") == 0
    assert train(tmp_path / "b", "--training.epochs", epochs) == 0
    one, other = (models.load_model(tmp_path / name)[0].state_dict() for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)


KILLED = """
import os, sys
from margin_kernels.experiments import cli
from margin_kernels.experiments.results import files
left = int(sys.argv[1])
real = os.replace
def replace(*paths):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    real(*paths)
os.replace = replace
sys.exit(cli.main(sys.argv[2:]))
"""


def some_of(writes):
    """Every write, of which `make test` tries the first and each fourth, `make nightly` all."""
    return [pytest.param(write, marks=() if write % 4 == 0 else NIGHTLY) for write in range(writes)]


WRITES = 9  # config; metrics, run and checkpoint of two epochs; model.json and weights


@pytest.mark.parametrize("write", some_of(WRITES))
def test_a_run_killed_at_a_write_goes_on_bit_for_bit(trained, tmp_path, write):
    arguments = ["train", *SMALL, *QUICK, "--training.epochs", "2", "--out", str(tmp_path / "a")]
    killed = subprocess.run(
        [sys.executable, "-P", "-c", KILLED, str(write), *arguments], capture_output=True, text=True
    )
    assert killed.returncode == 9, killed.stderr
    begun = (tmp_path / "a" / "checkpoint.pt").exists()
    assert begun == (write >= 4)
    assert cli.main([*arguments, *["--resume"] * begun]) == 0
    assert not [name for name in os.listdir(tmp_path / "a") if name.startswith(files.TEMPORARY)]
    one, other = (models.load_model(folder)[0].state_dict() for folder in (tmp_path / "a", trained))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("write", some_of(WRITES))
def test_a_sweep_killed_at_a_write_ends_with_the_same_records(tmp_path, write):
    """Its cells run in its process: job; config, metrics, run, checkpoint; model.json, weights; two summaries."""
    (tmp_path / "tiny.yaml").write_text(SWEEP.format(epochs=1))
    here = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); from support import tiny_sweeps; "
    here += "from margin_kernels.experiments.sweeps import run; run.start_worker = tiny_sweeps._work_here\n"
    arguments = ["sweep", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "a")]
    killed = subprocess.run(
        [sys.executable, "-P", "-c", here + KILLED, str(write), *arguments], capture_output=True, text=True
    )
    assert killed.returncode == 9, killed.stderr
    assert tiny_sweeps.run(tmp_path / "tiny.yaml", tmp_path / "a") == 0
    assert tiny_sweeps.run(tmp_path / "tiny.yaml", tmp_path / "b") == 0
    one, other = (tiny_sweeps.records(tmp_path / name)["plain__seed0"] for name in "ab")
    assert one.evaluation == other.evaluation and json.loads((tmp_path / "a" / "summary.json").read_text())
    left = [path.name for path in (tmp_path / "a").rglob(f"{files.TEMPORARY}*")]
    assert left == [] and (tmp_path / "a" / "summary.csv").exists()


REPORTED = 13  # tables; curves of four attacks; histograms of DeepFool's norm and of five taps; the page


@pytest.mark.parametrize("write", some_of(REPORTED))
def test_a_report_killed_at_a_write_is_made_again_whole(run, tmp_path, write):
    (run / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    assert cli.main(["evaluate", "--no-timing", str(run)]) == 0
    arguments = ["report", str(run), "--out", str(tmp_path / "a")]
    killed = subprocess.run(
        [sys.executable, "-P", "-c", KILLED, str(write), *arguments], capture_output=True, text=True
    )
    assert killed.returncode == 9, killed.stderr
    assert cli.main(arguments) == 0 and cli.main([*arguments[:-1], str(tmp_path / "b")]) == 0
    assert sorted(os.listdir(tmp_path / "a")) == sorted(os.listdir(tmp_path / "b"))
    page = [(tmp_path / name / "index.html").read_text() for name in "ab"]
    assert page[0] == page[1] and page[0].rstrip().endswith("</html>")


FULL = """
import resource, sys
from margin_kernels.experiments import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(cli.main(sys.argv[2:]))
"""


def test_a_write_that_does_not_fit_is_told_and_leaves_what_was_complete(run):
    size = (run / "checkpoint.pt").stat().st_size // 2
    before = {name: (run / name).read_bytes() for name in FILES}
    arguments = ["train", *SMALL, *QUICK, "--training.epochs", "3", "--out", str(run), "--resume"]
    ended = subprocess.run([sys.executable, "-P", "-c", FULL, str(size), *arguments], capture_output=True, text=True)
    assert ended.returncode == 1 and "File too large; raise the limit of file sizes" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (run / "checkpoint.pt").read_bytes() == before["checkpoint.pt"]
    assert cli.main(arguments) == 0 and len(json.loads((run / "run.json").read_text())["history"]) == 3


SWEEP = """
base:
  data: {{train_fraction: 0.1}}
  training: {{epochs: {epochs}, distance_samples: 8}}
  evaluation: {{attack_samples: 5, deepfool_samples: 2, distance_samples: 2, timing_repeats: 0, curve: [0.1]}}
models:
  plain: {{}}
"""


def test_cells_run_what_is_installed_and_not_what_lies_in_the_working_folder(tmp_path):
    """Names of the standard library, and a copy of the package."""
    for name in ("random.py", "tempfile.py", "yaml.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise SystemExit('taken')\n")
    (tmp_path / "margin_kernels").mkdir()
    (tmp_path / "margin_kernels" / "__init__.py").write_text("raise SystemExit('a copy was taken')\n")
    (tmp_path / "tiny.txt").write_text(SWEEP.format(epochs=1))
    (tmp_path / "tiny.txt").rename(tmp_path / "tiny.yaml")
    command = [*COMMAND, "sweep", "tiny.yaml", "--out", "out"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (record,) = Records(tmp_path / "out" / "records.jsonl").all()
    assert record.machine["backend"] in ("cpu", "reference") and record.versions["torch"] == torch.__version__
    assert not (tmp_path / "ran").exists()


def test_cells_of_a_killed_sweep_end_by_themselves_and_hold_their_folder_until_then(tmp_path):
    (tmp_path / "tiny.yaml").write_text(SWEEP.format(epochs=400))
    command = [*COMMAND, "sweep", "tiny.yaml", "--out", "out"]
    sweep = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = tmp_path / "out" / "cells" / "plain__seed0"
    until = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    with pytest.raises(ValueError, match="in use by another sweep"), files.locked(tmp_path / "out", "another sweep"):
        pass
    with pytest.raises(ValueError, match="in use by this cell"), files.locked(folder, "this cell"):
        pass
    sweep.kill()
    sweep.wait()
    with files.locked(folder, "the cell", wait=60):
        pass
    assert "the sweep has ended" in (folder / "log.txt").read_text()


# readers


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
@pytest.mark.parametrize("name", ["config.yaml", "run.json", "model.json", "model.safetensors", "checkpoint.pt"])
def test_no_content_of_a_file_ends_in_another_exception(trained, tmp_path, name, content):
    for other in FILES:
        (tmp_path / other).write_bytes(content if other == name else (trained / other).read_bytes())
    try:
        cli.check.CHECKS[name if name != "model.json" else "model.safetensors"](tmp_path / name)
    except ValueError as error:
        assert str(tmp_path) in str(error)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.text(max_size=60) | st.dictionaries(st.text(max_size=9), st.integers()).map(json.dumps)))
def test_no_lines_of_a_file_of_records_end_in_another_exception(tmp_path, lines):
    path = tmp_path / "records.jsonl"
    path.write_text(
        "\n".join(
            sealed_line(line) if random.random() < 0.5 and line.removeprefix("{").removesuffix("}").strip() else line
            for line in lines
        )
    )
    try:
        Records(path).all()
    except ValueError as error:
        assert str(path) in str(error)


def test_the_limit_of_file_sizes_is_not_left_behind():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# what an attack on all of this found


def test_images_of_files_train_and_are_extended(tmp_path):
    """Images in bytes, which the checks of weights divide as training does."""
    for part, count in (("train", 40), ("t10k", 10)):
        pixels = bytes(range(256)) * (count * 28 * 28 // 256 + 1)
        content = (2051).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in (count, 28, 28))
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(content + pixels[: count * 28 * 28])
        labels = (2049).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(i % 10 for i in range(count))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    arguments = [
        "--data.name",
        "mnist",
        "--data-dir",
        str(tmp_path),
        "--data.verify",
        "false",
        "--model.name",
        "mnist_cnn",
    ]
    arguments += ["--data.validation_size", "5", "--training.distance_samples", "2", "--training.threads", "1"]
    assert cli.main(["train", *arguments, "--out", str(tmp_path / "run"), "--training.epochs", "1"]) == 0
    assert cli.main(["check", str(tmp_path / "run")]) == 0


def test_an_evaluation_of_other_weights_is_not_reported(run, capsys):
    assert cli.main(["evaluate", "--no-timing", str(run)]) == 0
    assert train(run, *QUICK, "--training.epochs", "3", "--resume") == 0
    capsys.readouterr()
    assert cli.main(["report", str(run), "--out", str(run / "report")]) == 1
    assert "evaluation.json was measured on other weights than those of" in said(capsys)
    assert cli.main(["evaluate", "--no-timing", str(run)]) == 0
    assert cli.main(["report", str(run), "--out", str(run / "report")]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("grid: {training.seed: [1, 2]}\nmodels: {a: {}}", "training.seed must not stand in points, grid or choose"),
        ("models: {a: {choose: {name: [x, y]}}}", "name must not stand in points, grid or choose"),
        ("points: [{data.seed: 3}]\nmodels: {a: {}}", "data.seed must not stand in points, grid or choose"),
        (f"models: {{a: {{}}, {'n' * 250}: {{}}}}", "name must be the name of a folder"),
        ("models: {a: {}}\nseeds: [-1]", "seed must be at least 0, got -1"),
        ("models: {a: {}}\nseed_keys: 3", "seed_keys must be a list of keys, got 3"),
        ("models: {a: {}}\nseed_keys: [loss.kind]", "seed_keys must be keys of seeds, got 'loss.kind'"),
        (f"models: {{a: {{}}}}\npublished: {{a: {{error: 1{'0' * 400}}}}}", "published.a.error must be a number"),
        ("models: &x {a: *x}", "an anchor stands within what it names"),
        ("models: {a: {}}\nbase: !!timestamp x", "not YAML"),
    ],
)
def test_a_sweep_that_cannot_be_told_apart_or_stored_is_refused_before_it_starts(tmp_path, capsys, content, words):
    (tmp_path / "sweep.yaml").write_text(content + "\n")
    assert cli.main(["sweep", str(tmp_path / "sweep.yaml"), "--dry-run", "--out", str(tmp_path / "out")]) == 1
    assert words in said(capsys)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch", 7),
        ("history", [1]),
        ("history", None),
        ("model", {}),
        ("optimiser", {}),
        ("order", "x"),
        ("random", None),
    ],
)
def test_a_checkpoint_with_other_contents_is_refused(run, capsys, key, value):
    state = load_state(run)
    state[key] = value
    save_state(run, state)
    assert train(run, *QUICK, "--training.epochs", "2", "--resume") == 1
    assert "checkpoint.pt: not a checkpoint of this run" in said(capsys)


@pytest.mark.parametrize(
    "change", [{"classes": "x"}, {"shape": [-1, 8, 8]}, {"options": {"depth": 3}}, {"name": ["mlp"]}]
)
def test_a_description_of_another_network_is_refused(run, capsys, change):
    model, description = models.load_model(run)
    models.save_model(run, model, {**description, **change})
    assert cli.main(["evaluate", "--no-timing", str(run)]) == 1
    assert "model.json: not the network of" in said(capsys)


@pytest.mark.parametrize(
    "content", [[], 1, None, {}, {"evaluation": None}, {"evaluation": {"eps": None}}, {"evaluation": {"clean": "x"}}]
)
def test_an_evaluation_of_another_shape_is_refused(run, capsys, content):
    (run / "evaluation.json").write_text(json.dumps(content))
    assert cli.main(["report", str(run), "--out", str(run / "report")]) == 1
    assert (
        "evaluation.json" in (text := said(capsys))
        and "must " in text
        and "run `margin-kernels evaluate` again" in text
    )


@pytest.mark.parametrize(
    "change",
    [{"seed": "x"}, {"history": 3}, {"seconds": None}, {"evaluation": {"clean": None}}, {"machine": []}, {"model": 1}],
)
def test_a_record_of_another_shape_is_refused(tmp_path, capsys, change):
    first, line = finished_line()
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join((first, sealed_line(json.dumps({**line, **change})), "")))
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 1
    assert "records.jsonl, line 2: not a record of this version" in said(capsys)


def test_committed_records_are_whole(capsys):
    folders = sorted(path.parent for path in (ROOT / "benchmarks/results").glob("*/*/records.jsonl"))
    assert len(folders) >= 19
    for folder in folders:
        assert cli.main(["check", str(folder)]) == 0, said(capsys)


def finished_line():
    """The first line of a committed file, and the values of its second."""
    path = ROOT / "benchmarks/results/papers/sensitivity_mnist_mlp/records.jsonl"
    first, line, *_ = path.read_text().splitlines()
    return first, json.loads(unsealed_line(line))


WRONG = ("absent", None, "x", [1, "a"], {"a": "x"})


def test_no_part_of_a_record_that_is_missing_or_of_another_kind_ends_a_report_without_a_sentence(
    tmp_path, capsys, monkeypatch
):
    """Each key at three depths, with a new checksum; figures are laid out and not painted."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *given, **options: None)
    first, line = finished_line()
    shared = json.loads(unsealed_line(first))["shared"]
    whole = merged(line, shared)
    parts = [(key,) for key in whole]
    parts += [(key, below) for key in ("evaluation", "machine", "versions", "config") for below in whole[key]]
    parts += [("history", 0, key) for key in whole["history"][0]]
    statuses = []
    for part in parts:
        for value in WRONG:
            changed = json.loads(json.dumps(whole))
            *above, last = part
            place = changed
            for key in above:
                place = place[key]
            if value == "absent":
                del place[last]
            else:
                place[last] = value
            lines = ({"shared": {"config": {}}}, changed)
            (tmp_path / "records.jsonl").write_text("".join(sealed_line(json.dumps(own)) + "\n" for own in lines))
            statuses.append(cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report")]))
            text = capsys.readouterr().err
            assert statuses[-1] == 0 or (statuses[-1] == 1 and "records.jsonl" in text), (part, value, text)
    assert statuses.count(0) > 30 and statuses.count(1) > 150


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"values": {"a": 1}}, "values must have keys of a config, got 'a'"),
        ({"choice": [{"values": 1, "validation_accuracy": 1, "chosen": True, "seeds": 3}]}, "choice[0].values must be"),
        ({"timing": {"ratio": "x"}}, "timing.ratio must be"),
        ({"history": [{"epoch": "x"}]}, "history[0].epoch must be int"),
        ({"seconds": {"training": None}}, "seconds.training must be"),
    ],
)
def test_the_report_and_the_next_run_of_a_sweep_name_the_line_of_a_wrong_record(tmp_path, capsys, change, words):
    first, line = finished_line()
    lines = (first, sealed_line(json.dumps({**line, **change})), "")
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    sweep = ["sweep", "sensitivity_mnist_mlp", "--budget", "cpu", "--out", str(tmp_path)]
    for command in (["report", str(tmp_path), "--out", str(tmp_path / "report")], sweep, [*sweep, "--dry-run"]):
        assert cli.main(command) == 1
        assert words in (text := said(capsys)) and "records.jsonl, line 2" in text
    assert not (tmp_path / "cells").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"noise": [0.5]}, "evaluation.noise must have a value for each of noise_sigmas, got 1"),
        ({"curves": {"fgsm_ce": []}}, "evaluation.curves.fgsm_ce must have a value for each of curve_eps, got 0"),
        ({"histograms": {"rho_adv": ["x"]}}, "evaluation.histograms.rho_adv[0] must be int"),
        ({"histograms": {"rho_adv": [1]}}, "evaluation.histograms.rho_adv must have 160 counts, got [1]"),
    ],
)
def test_curves_and_histograms_have_as_many_values_as_they_are_drawn_over(tmp_path, capsys, change, words):
    first, line = finished_line()
    line["evaluation"] |= change
    (tmp_path / "records.jsonl").write_text("\n".join((first, sealed_line(json.dumps(line)), "")))
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 1
    assert words in said(capsys)


@pytest.mark.parametrize("line", ["[1]", "null", "{}", '{"a":NaN}', "[" * 100_000])
def test_lines_that_are_no_records_are_not_given_a_checksum(tmp_path, capsys, line):
    (tmp_path / "records.jsonl").write_text(line + "\n" + line + "\n")
    assert cli.main(["check", str(tmp_path), "--renew"]) == 1
    assert "records.jsonl" in capsys.readouterr().err + capsys.readouterr().out or line == "[" * 100_000


def test_an_output_whose_reader_has_ended_is_told(tmp_path):
    process = start(tmp_path / "run", "--training.epochs", "300")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    text = process.stderr.read()
    assert process.wait(timeout=60) == 1 and "the reader of the output has ended; write it into a file" in text


def test_demo_and_toy_look_at_their_folder_before_they_train(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    for command in (["demo", "--quick"], ["toy", "--quick"]):
        assert cli.main([*command, "--out", str(tmp_path / "file")]) == 1
        assert "file: File exists" in said(capsys)

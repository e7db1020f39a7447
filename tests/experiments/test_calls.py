"""Bad calls of every command: an exit status that is not 0 or 70, and a sentence that names what was wrong."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from margin_kernels.experiments import cli, config
from margin_kernels.experiments.results import Records

HUGE = str(10**20)
# command -> arguments with which it parses
NEEDED = {
    "evaluate": ["nowhere"],
    "attack": ["nowhere"],
    "report": ["nowhere"],
    "sweep": ["sensitivity_mnist_mlp", "--dry-run"],
    "check": ["nowhere"],
    "demo": ["--quick"],
    "toy": ["--quick"],
    "explain": ["digits_cnn"],
    "bench": ["--model", "digits_cnn"],
    "info": [],
}


def call(arguments):
    """The exit status of a command, also where argparse ends it."""
    try:
        return cli.main(arguments)
    except SystemExit as ended:
        return ended.code


def parsers(monkeypatch):
    """Command -> its parser; `train` has that of the configs besides."""
    found = {}

    class Seen(Exception):
        pass

    def parse(self, *given, **options):
        found[command] = self
        raise Seen

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        for command, arguments in NEEDED.items():
            with pytest.raises(Seen):
                cli.commands.COMMANDS[command](arguments)
    return found


def test_every_number_of_every_command_has_a_bound_and_a_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert set(NEEDED) | {"train"} == set(cli.commands.COMMANDS)
    tried = 0
    for command, parser in parsers(monkeypatch).items():
        flags = [action.option_strings[0] for action in parser._actions if action.type in (int, float)]
        assert flags == list(parser.allowed), command
        for flag in flags:
            for value in (str(10**31), HUGE, "-1", "nan", "inf", "1" * 5000):
                if flag in ("--eps", "--cross-entropy-weight") and value == HUGE:
                    continue  # a radius of images that float32 holds
                status = call([command, *NEEDED[command], flag, value])
                text = capsys.readouterr().err
                assert status in (1, 2), (command, flag, value, text)
                assert flag in text and "Traceback" not in text, text
                tried += 1
    assert tried >= 50 and list(tmp_path.iterdir()) == []


def test_every_number_of_a_config_is_bounded_or_finite():
    """Integers from above too: floats up to 10^20 are numbers like others."""
    defaults = {key: value for key, value in config.bounds.leaves(config.Config()) if not isinstance(value, bool)}
    numbers = [key for key, value in defaults.items() if isinstance(value, (int, float))]
    assert len(numbers) > 40
    for key in numbers:
        for value in (HUGE, "-1", "nan"):
            listed = f"[{value}]" if isinstance(_default(key), list) else value
            try:
                config.parse([f"--{key}", listed])
            except config.ConfigError as error:
                assert key in str(error) or value in str(error)
            else:
                assert value != "nan" and (value != HUGE or isinstance(defaults[key], float)), (key, value)


def _default(key):
    section = config.Config()
    for name in key.split("."):
        section = getattr(section, name)
    return section


def test_epochs_and_sweeps_have_a_size_beyond_which_nothing_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    many, few = list(range(3000)), list(range(200))
    bomb = "\n".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else 'x'] * 9)}]" for i in range(9))
    squared = f"{{loss.gamma: {many}, optimiser.lr: {many}}}"
    for content, words in (
        (f"models: {{a: {{}}}}\ngrid: {squared}", "at most 10,000 points of grid and points, got 9,000,000"),
        (f"models: {{a: {{choose: {squared}}}}}", "10,000 combinations of models.a.choose, got 9,000,000"),
        (f"models: {{a: {{}}}}\ngrid: {{loss.gamma: {few}}}\nseeds: {few}", "at most 10,000 cells, got 40,000"),
        (f"models: {{a: {{}}}}\nbase: {{training.epochs: {HUGE}}}", "training.epochs must be at most 1e+06"),
        (bomb, "sweep.yaml must stand for at most 1,000,000 values, got "),
    ):
        Path("sweep.yaml").write_text(content + "\n")
        assert cli.main(["sweep", "sweep.yaml", "--dry-run"]) == 1
        assert words in (text := capsys.readouterr().err) and "Traceback" not in text
    assert cli.main(["train", "--training.epochs", HUGE]) == 1
    assert "training.epochs must be at most 1e+06, got 100000000000000000000" in capsys.readouterr().err
    for key in ("training.repeat", "evaluation.steps", "evaluation.deepfool_iterations", "evaluation.timing_repeats"):
        assert cli.main(["train", f"--{key}", "1000001"]) == 1
        assert f"{key} must be at most 1e+06, got 1000001" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


@pytest.mark.parametrize("flag", ["--out", "--title", "--data-dir"])
@pytest.mark.parametrize("text", ["a\0b", "a\ud800"])
def test_text_that_nothing_can_hold_is_refused_by_its_option(tmp_path, monkeypatch, capsys, flag, text):
    monkeypatch.chdir(tmp_path)
    for arguments in ([flag, text], [f"{flag}={text}"]):
        for command in ("train", "report", "sweep", "demo", "toy"):
            assert call([command, *arguments]) == 1
            assert f": {flag} must be text in UTF-8 without NUL, got '" in capsys.readouterr().err
    assert cli.main(["evaluate", text]) == 1
    assert "a name on the command line must be text" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_text_in_files_that_nothing_can_hold_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for content, words in (
        ('models: {"a\\ud800": {}}', "sweep.yaml must be text in UTF-8 without NUL, got '\\ud800'"),
        ('models: {a: {}}\npoints: [{label: "\\ud800"}]', "sweep.yaml must be text"),
        ('models: {a: {data.dir: "x\\0"}}', "data.dir must be text in UTF-8 without NUL, got 'x\\x00'"),
    ):
        Path("sweep.yaml").write_text(content + "\n")
        assert cli.main(["sweep", "sweep.yaml", "--dry-run"]) == 1
        assert words in capsys.readouterr().err


def test_labels_that_are_numbers_are_found(tmp_path, monkeypatch, capsys):
    """YAML has an integer where a label is made of digits."""
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(
        "models: {1: {}, 2.5: {after: 1}, b: {after: 2.5, evaluation.attacker: '1'}}\nbudgets: {1: {seeds: [7]}}\n"
    )
    assert cli.main(["sweep", "sweep.yaml", "--dry-run", "--budget", "1"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[-1] for line in out.splitlines()[:3]] == ["1__seed7", "2.5__seed7", "b__seed7"]
    Path("sweep.yaml").write_text("models: {1: {after: 2}, 2: {}}\n")
    assert cli.main(["sweep", "sweep.yaml", "--dry-run"]) == 1
    assert "models.1.after: unknown model above it '2'; known: none" in capsys.readouterr().err


def test_names_that_the_encoding_of_the_output_lacks_cost_nothing(tmp_path):
    """A sweep, its cell in a process of its own, and its report."""
    base = "{data: {train_fraction: 0.1}, training: {epochs: 1, distance_samples: 8}, evaluation: {attack_samples: 5, "
    base += "deepfool_samples: 2, distance_samples: 2, timing_repeats: 0, curve: [0.1]}}"
    (tmp_path / "s.yaml").write_text(f"base: {base}\nmodels: {{grün: {{}}}}\n", encoding="utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    for arguments, words in (
        (["sweep", "s.yaml", "--out", "é"], "gr\\xfcn"),
        (["report", "é", "--title", "ü"], "gr\\xfcn"),
    ):
        command = [sys.executable, "-P", "-m", "margin_kernels.experiments", *arguments]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0 and words in ended.stdout, ended.stderr
    (record,) = Records(tmp_path / "é" / "records.jsonl").all()
    assert record.model == "grün" and record.evaluation is not None
    assert "<h1>ü</h1>" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_four_cells_at_a_time_on_fewer_cores_end(tmp_path):
    """More processes than most machines have cores to spare; each writes its record to the same file."""
    (tmp_path / "s.yaml").write_text(
        "base: {data: {train_fraction: 0.1}, training: {epochs: 1, distance_samples: 0}, "
        "evaluation: {attack_samples: 5, deepfool_samples: 2, distance_samples: 0, timing_repeats: 0, curve: [0.1]}}\n"
        "models: {a: {}}\nseeds: [0, 1, 2, 3]\n"
    )
    command = [sys.executable, "-P", "-m", "margin_kernels.experiments", "sweep", "s.yaml", "--out", "o", "--jobs", "4"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = Records(tmp_path / "o" / "records.jsonl").all()
    assert sorted(record.seed for record in found) == [0, 1, 2, 3] and all(record.evaluation for record in found)

"""Files and calls that an attack on the runner found: each ends in a sentence, and nothing is executed or half written.

Bad numbers and texts of every option: test_calls.py. Kills, damage and full disks: test_failures.py, test_full_disk.py.
"""

import json
import os
import pickle
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from support import ROOT
from support.command_line import COMMAND, SMALL

from margin_kernels.experiments import cli, config, data, models
from margin_kernels.experiments.data import cifar, idx
from margin_kernels.experiments.report import figures
from margin_kernels.experiments.results import Records, digest, files, merged, sealed_line
from margin_kernels.experiments.results.checksum import unsealed_line
from margin_kernels.experiments.training import load_state
from margin_kernels.experiments.training.checkpoint import save_state

TINY = [
    *SMALL,
    "--evaluation.attack_samples",
    "5",
    "--evaluation.deepfool_samples",
    "2",
    "--evaluation.distance_samples",
    "2",
]
TINY += ["--evaluation.timing_repeats", "0"]


def refused(capsys, arguments, *words):
    """Calls a command that ends with one line, which holds `words`."""
    assert cli.main([str(argument) for argument in arguments]) in (1, 2)
    text = capsys.readouterr().err
    assert "Traceback" not in text and len(text.strip().splitlines()) == 1, text
    for word in words:
        assert word in text, text


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one epoch, evaluated."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert cli.main(["train", *TINY, "--training.epochs", "1", "--out", str(folder)]) == 0
    assert cli.main(["evaluate", "--no-timing", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


# sweep files and configs


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("models: {a: {}, a: {loss.kind: hinge}}", "line 1: not YAML: the key 'a' stands twice in one mapping"),
        ("models: {a: {}}\nmodels: {b: {}}", "line 2: not YAML: the key 'models' stands twice in one mapping"),
        (
            "models: {a: {loss: {gamma: 1}, loss.gamma: 2}}",
            "models.a: loss.gamma stands there twice, nested and dotted",
        ),
        ("models: {a: {choose: {loss.gamma: [1], loss: {gamma: [2]}}}}", "loss.gamma stands there twice"),
        ("models: {null: {}}", "a name in models must be text without control characters, at most 255 bytes, got None"),
        ("models: {true: {}}", "got True of the kind bool: put it in quotes"),
        ("models: {2020-01-01: {}}", "of the kind date: put it in quotes"),
        ("models: {'': {}}", "a name in models must be text"),
        ("models: {' ': {}}", "a name in models must be text"),
        (
            'models: {"a\\nb": {}}',
            "a name in models must be text without control characters, at most 255 bytes, got 'a\\nb'",
        ),
        ('models: {"\\e[31m": {}}', "a name in models must be text"),
        ('models: {"a\\0": {}}', "a name in models must be text"),
        (f"models: {{{'n' * 256}: {{}}}}", "a name in models must be text"),
        ("models: {a: {}}\npoints: [{label: {a: 1}}]", "a name in points[0].label must be text"),
        ("models: {a: {}}\nbudgets: {null: {}}", "a name in budgets must be text"),
        ("models: {a: {}}\npublished: {a: {error: .nan}}", "published.a.error must be a number, got nan"),
        ("models: {a: {}}\npublished: {a: {error: true}}", "published.a.error must be a number, got True"),
        (
            f"models: {{a: {{training.epochs: 0x{'f' * 6000}}}}}",
            "sweep.yaml must hold integers of at most 4,300 digits",
        ),
        (f"models: {{a: {{training.epochs: {'9' * 5000}}}}}", "sweep.yaml: not YAML: Exceeds the limit (4300 digits)"),
        ("models: {a: {loss.gamma: x}}", "loss.gamma must be a number, a list of numbers or 'auto', got x"),
        ("models: {a: {loss.gamma: {x: 1}}}", "loss.gamma must be a number, a list of numbers or 'auto', got {'x': 1}"),
        (
            "models: {a: {loss.gamma: 2020-01-01}}",
            "loss.gamma must be a number, a list of numbers or 'auto', got 2020-01-01",
        ),
        ("models: {a: {training.epochs: true}}", "training.epochs must be an integer, got True"),
        ("models: {a: {training.compile: maybe}}", "training.compile must be true or false, got maybe"),
        ("models: {a: {model.norm: layer}}", "model.norm must be 'batch' or 'group', got layer"),
        ("models: {a: {loss.layers: input}}", "loss.layers must be a list of texts, got input"),
        ("models: {a: {evaluation.attacker: [a]}}", "evaluation.attacker must be a text or null, got ['a']"),
        ("models: !!set {a, b}", "models must be a mapping"),
        ("models: {a: {<<: 3}}", "line 1: not YAML: expected a mapping"),
        ("models: *x", "line 1: not YAML: found undefined alias"),
        ("models: {? [a] : {}}", "line 1: not YAML: found unhashable key"),
        ("models:\n\ta: {}", "line 2: not YAML"),
        ("models: {a: {}}\n---\nmodels: {b: {}}", "line 2: not YAML"),
        ("%YAML 9.9\n---\nmodels: {a: {}}", "line 1: not YAML"),
        ("models: {a: {? " + ".".join("a" * 5000) + " : 1}}", "unknown key 'a'"),
        ("models: " + "{a: " * 3000 + "1" + "}" * 3000, "sweep.yaml: not YAML"),
        ("extends: [a]\nmodels: {a: {}}", "no such file"),
        ("models: {a: {}, b: {after: [a]}}", "models.b.after: unknown model above it"),
    ],
)
def test_a_sweep_file_that_says_something_else_than_it_seems_to_is_refused(
    tmp_path, monkeypatch, capsys, content, words
):
    monkeypatch.chdir(tmp_path)
    Path("sweep.yaml").write_text(content + "\n")
    refused(capsys, ["sweep", "sweep.yaml", "--dry-run"], words)
    assert os.listdir() == ["sweep.yaml"]


def test_keys_that_a_mapping_merges_may_be_replaced(tmp_path):
    (tmp_path / "a.yaml").write_text("x: &a {<<: &b {q: 1}, q: 2}\ny: {<<: *a, q: 3}\nz: {<<: [*a, *b]}\n")
    assert config.read_yaml(tmp_path / "a.yaml") == {"x": {"q": 2}, "y": {"q": 3}, "z": {"q": 1}}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--loss", "x.yaml"], "--loss must name one of its options, as in --loss.kind"),
        (["--training={}"], "--training must name one of its options, as in --training.epochs"),
        (["--out", ""], "--out must not be empty"),
        (["--out="], "--out must not be empty"),
        (["--data.dir", ""], "--data.dir must not be empty"),
        (["--config", "empty.yaml"], "empty.yaml must be a mapping of keys to values, got nothing"),
        (["--config", "twice.yaml"], "twice.yaml, line 1: not YAML: the key 'epochs' stands twice"),
        (["--loss.p", "inff"], "loss.p must be a number or 'inf', got inff"),
        (["--training.epochs", "1.5"], "training.epochs must be an integer, got 1.5"),
        (
            ["--data.name", "imagenet"],
            "data.name must be one of digits, mnist, fashion_mnist, cifar10, cifar100, image_folder, npz, or code as",
        ),
        (["--training.accumulate", "65"], "training.accumulate must be at most training.batch_size, 64, got 65"),
        (["--training.batch_size", "1000001"], "training.batch_size must be at most 1e+06, got 1000001"),
        (["--evaluation.attack_samples", "1000000001"], "evaluation.attack_samples must be at most 1e+09"),
        (["--loss.top_k", "9007199254740992"], "loss.top_k must be at most 1e+09"),
        (["--schedule.milestones", "[1000001]"], "schedule.milestones must be at most 1e+06"),
        (["--schedule.warmup", "1e300"], "schedule.warmup must be at most 1e+06"),
        (["--optimiser.momentum", "5"], "optimiser.momentum must be in [0, 1], got 5"),
        (["--loss.virtual_adversarial.xi", "1e-300"], "loss.virtual_adversarial.xi must be in [1e-08, 1000.0]"),
        (["--evaluation.curve", str([0.1] * 1001)], "evaluation.curve must have at most 1,000 values, got 1,001"),
        (["--loss.layers", str(["input"] * 1001)], "loss.layers must have at most 1,000 values, got 1,001"),
        (["--loss.layers", "['']"], "loss.layers must not be empty"),
        (["--training.device", "cpu:5"], "training.device must be cpu, cuda or cuda:N, got 'cpu:5'"),
        (["--name", "a\nb"], "name must be the name of a folder"),
        (["--name", "\x1b[31m"], "name must be the name of a folder"),
    ],
)
def test_a_call_that_means_nothing_is_refused(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("empty.yaml").write_text("\n")
    Path("twice.yaml").write_text("training: {epochs: 1, epochs: 2}\n")
    Path("x.yaml").write_text("{kind: hinge}\n")
    refused(capsys, ["train", *TINY, *arguments], words)
    assert "config.yaml" not in [path.name for path in tmp_path.rglob("*")]


def test_more_calls_of_other_commands_that_mean_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text("models: {a: {}}\n")
    for arguments, words in (
        (["report", "x", "--out", ""], "--out must not be empty"),
        (["evaluate", ""], "a name on the command line must not be empty"),
        (["sweep", "s.yaml", "--device", "x"], "training.device must be cpu, cuda or cuda:N, got 'x'"),
        (["sweep", "s.yaml", "--jobs", "100000"], "--jobs must be in [1, "),
        (["explain", "digits_cnn", "--top-k", "10"], "--top-k must be in [1, 9], got 10"),
        (["explain", "digits_cnn", "--batch-size", "1000000"], "--batch-size must be in [1, 1024]"),
    ):
        refused(capsys, arguments, words)
    assert os.listdir() == ["s.yaml"]


# runs


def swapped(change):
    return lambda values: {key: change(value) for key, value in values.items()}


def first_cut(values):
    return {key: value[:1].clone() for key, value in values.items()}


def of_each_weight(change):
    return lambda optimiser: {**optimiser, "state": {key: change(state) for key, state in optimiser["state"].items()}}


@pytest.mark.parametrize(
    ("key", "change", "words"),
    [
        ("optimiser", of_each_weight(swapped(lambda t: torch.zeros(3) if t.ndim else t)), "must be a tensor of shape"),
        ("optimiser", of_each_weight(swapped(lambda t: t.reshape(-1)[:1])), "must be a tensor of shape"),
        ("optimiser", of_each_weight(lambda state: {"step": state["step"]}), "must have exp_avg, exp_avg_sq, step"),
        (
            "optimiser",
            lambda o: {**o, "param_groups": [{**o["param_groups"][0], "betas": (2, 2)}]},
            "betas of the config",
        ),
        ("model", swapped(lambda t: t.half()), "must be torch.float32"),
        ("model", swapped(lambda t: t * float("nan")), "must be finite, got NaN or infinity"),
        ("model", first_cut, "must be torch.float32 [16, 1, 3, 3], got torch.float32 [1, 1, 3, 3]"),
        ("model", lambda weights: {**weights, "x": torch.zeros(1)}, "weights must be conv1.weight"),
        ("model", lambda weights: dict.fromkeys(weights, 3), "must be torch.float32 [16, 1, 3, 3], got int"),
        ("epoch", lambda epoch: float(epoch), "1.0 epochs"),
        ("epoch", lambda epoch: True, "True epochs"),
        ("epoch", lambda epoch: 10**30, "training.epochs"),
        ("measured", lambda values: {"nope": [1.0]}, "measured must be gamma and layer_weights"),
        ("measured", lambda values: 3, "measured must be dict"),
        ("config", lambda values: None, "not a checkpoint of this run"),
        ("order", torch.zeros_like, "not a checkpoint of this run"),
    ],
)
def test_a_checkpoint_with_the_right_checksum_and_other_contents_is_refused(run, capsys, key, change, words):
    """The first two ended the process: a fused step writes to the tensors of the optimiser as if they had the size of
    the weights."""
    state = load_state(run)
    state[key] = change(state.get(key, {}))
    save_state(run, state)
    before = (run / "checkpoint.pt").read_bytes()
    refused(capsys, ["train", *TINY, "--training.epochs", "2", "--out", run, "--resume"], "checkpoint", words)
    assert (run / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("weights", "description", "words"),
    [
        (swapped(lambda t: t.half()), {}, "must be torch.float32 [16, 1, 3, 3], got torch.float16"),
        (swapped(lambda t: t.int()), {}, "must be torch.float32 [16, 1, 3, 3], got torch.int32"),
        (swapped(lambda t: t * float("inf")), {}, "must be finite, got NaN or infinity"),
        (first_cut, {}, "must be torch.float32 [16, 1, 3, 3], got torch.float32 [1, 1, 3, 3]"),
        (lambda weights: {}, {}, "weights must be conv1.weight"),
        (dict, {"classes": 10**9}, "head.weight must be torch.float32 [1000000000, 64]"),
        (dict, {"shape": [1, 10**6, 10**6]}, "not the network of"),
        (dict, {"name": "wrn28_10"}, "weights must be conv.weight"),
        (dict, {"preprocess": "gcn_zca"}, "takes images with data.preprocess 'gcn_zca', these have 'none'"),
    ],
)
def test_weights_with_the_right_checksum_that_are_none_of_the_network_are_refused(
    run, capsys, weights, description, words
):
    """No memory is asked for: 10^9 classes would take 256 GB."""
    model, about = models.load_model(run)
    found, about = weights({key: value.clone() for key, value in model.state_dict().items()}), {**about, **description}
    (run / "model.json").write_text(json.dumps(about))
    (run / "model.safetensors").write_bytes(save(found, {"sha256": digest(found, about)}))
    refused(capsys, ["evaluate", "--no-timing", run], words)


@pytest.mark.parametrize("name", ["checkpoint.pt", "model.safetensors", "run.json", "evaluation.json", "config.yaml"])
def test_what_lies_in_the_place_of_a_file_is_told_and_not_waited_for(run, capsys, name):
    for put in (
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to(path.name),
        lambda path: path.symlink_to("/dev/zero"),
    ):
        (run / name).rename(run / "aside")
        put(run / name)
        assert cli.main(["check", str(run)]) == 1
        assert f"damaged  {run / name} must be a file" in capsys.readouterr().out.replace("\n", " ")
        (run / name).rmdir() if (run / name).is_dir() else (run / name).unlink()
        (run / "aside").rename(run / name)
    assert cli.main(["check", str(run)]) == 0
    if name == "model.safetensors":
        (run / name).unlink()
        assert cli.main(["check", str(run)]) == 1


@pytest.mark.parametrize("name", ["checkpoint.pt", "run.json", "config.yaml"])
def test_a_file_that_is_larger_than_memory_is_not_read(run, capsys, name):
    os.truncate(run / name, 1 << 40)
    assert cli.main(["check", str(run)]) == 1
    assert f"damaged  {run / name} must " in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 1.0])
def test_a_config_that_is_cut_off_is_not_filled_with_defaults(run, capsys, share):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text[: int(share * len(text)) - 1])
    refused(capsys, ["evaluate", "--no-timing", run], "config.yaml", "")
    assert cli.main(["check", str(run)]) == 1
    assert cli.main(["train", *TINY, "--training.epochs", "1", "--out", str(run), "--resume"]) == 0
    assert (run / "config.yaml").read_text() == text


def test_no_run_is_measured_before_all_are_there(run, capsys):
    (run / "evaluation.json").unlink()
    refused(capsys, ["evaluate", "--no-timing", run, run / "nowhere"], "nowhere is not the folder of a training run")
    assert not (run / "evaluation.json").exists()


# records and reports


@pytest.fixture
def sweep(tmp_path):
    """The folder of a sweep with one record, which `write` changes."""
    source = ROOT / "benchmarks/results/papers/sensitivity_mnist_mlp/records.jsonl"
    first, line, *_ = source.read_text().splitlines()
    whole = merged(json.loads(unsealed_line(line)), json.loads(unsealed_line(first))["shared"])
    folder = tmp_path / "sweep"
    folder.mkdir()

    def write(**changes):
        evaluation = {**whole["evaluation"], **changes.pop("evaluation", {})}
        record = {**whole, **changes, "evaluation": evaluation}
        lines = ({"shared": {"config": {}}}, record)
        (folder / "records.jsonl").write_text("".join(sealed_line(json.dumps(own)) + "\n" for own in lines))
        return folder, record

    return write


BIG = 10**400


@pytest.mark.parametrize(
    "change",
    [
        *({"model": text} for text in ("", "a\0b", "a\nb", "\x1b[31m", "x" * 100_000, "\ud800", " ")),
        *({"point": text} for text in ("a\0b", "x" * 100_000, "\ud800")),
        {"cell": "a\nb"},
        {"seed": BIG},
        {"parameters": BIG},
        {"seconds": {"training": BIG}},
        {"versions": {"torch": "\x1b[31m"}},
        {"machine": {"processor": "a\0"}},
        {"evaluation": {"eps": BIG}},
        {"evaluation": {"samples": BIG}},
        {"evaluation": {"distance": {"\ud800": 1.0}}},
        {"evaluation": {"histograms": {"rho_adv": [BIG] * 160}}},
        {"evaluation": {"histograms": {"rho_adv": [10**300] * 160}}},
    ],
    ids=lambda change: f"{change!r:.40}",
)
def test_a_record_with_text_or_numbers_that_no_page_can_show_is_refused(sweep, tmp_path, capsys, change):
    folder, _ = sweep(**change)
    refused(
        capsys, ["report", folder, "--out", tmp_path / "report"], "records.jsonl, line 2: not a record of this version"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"curve_eps": [0.1], "curves": {"fgsm_ce": [None]}},
        {"curve_eps": [], "curves": {}},
        {"distance": {"input": None}},
        {"distances": {}},
        {"distances": {"input": [None] * 5}},
        {"distances": {"input": [1.0] * 5}},
        {"deepfool_norms": [None] * 5},
        {"deepfool_norms": []},
    ],
    ids=lambda change: f"{change!r:.40}",
)
def test_what_was_not_measured_is_left_out_of_a_report(sweep, tmp_path, monkeypatch, change):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *given, **options: None)
    folder, record = sweep(evaluation=change)
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "a")]) == 0
    cell = f"{folder / 'records.jsonl'}:{record['cell']}"
    assert cli.main(["report", cell, "--out", str(tmp_path / "b")]) == 0


def test_figures_stay_in_the_folder_of_the_report(sweep, tmp_path, monkeypatch):
    """Their names are those of the taps in the records."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *given, **options: None)
    tap = "x/../../../evil"
    folder, record = sweep(evaluation={"distance": {tap: 1.0}, "distances": {tap: [1.0, 2.0]}})
    cell = f"{folder / 'records.jsonl'}:{record['cell']}"
    assert cli.main(["report", cell, "--out", str(tmp_path / "a" / "b")]) == 0
    assert sorted(os.listdir(tmp_path)) == ["a", "sweep"] and os.listdir(tmp_path / "a") == ["b"]
    assert "histogram_x_.._.._.._evil.png" in os.listdir(tmp_path / "a" / "b" / "figures")
    assert figures.draw("a/b c", "", lambda axes: None).name == "a_b_c"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("summary.json", "[]", "summary.json must be dict, got list"),
        ("summary.json", '{"sweep": 3}', "summary.json.sweep must be str or null, got int"),
        ("summary.json", '{"sweep": "a\\n"}', "summary.json.sweep must be text without control characters"),
        ("summary.json", "1" * 5000, "summary.json must be JSON"),
        ("summary.csv", "a,b\n1,2\n", "summary.csv must be the table that `margin-kernels sweep` writes, got 'model'"),
        ("summary.csv", f"model,point\n{'x' * 200_000},y\n", "summary.csv must be the table"),
        ("summary.csv", b"model\n\xff", "summary.csv must be text in UTF-8"),
    ],
)
def test_summaries_of_another_kind_are_told(sweep, tmp_path, capsys, name, content, words):
    folder, _ = sweep()
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(capsys, ["report", folder, "--out", tmp_path / "report"], words)


@pytest.mark.parametrize("name", ["lock", "records.lock"])
def test_a_lock_that_is_a_pipe_or_a_device_is_not_waited_for(tmp_path, name):

    def lock():
        if name == "lock":
            with files.locked(tmp_path, "this test"):
                return
        Records(tmp_path / "records.jsonl").renew()

    os.mkfifo(tmp_path / name)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} must be a file, got a pipe or a device; remove it"):
            lock()
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("/dev/null")


def test_two_reports_into_one_folder_leave_one_whole(run, tmp_path, capsys):
    arguments = ["report", str(run), "--out", str(tmp_path / "report")]
    with files.locked(tmp_path / "report", "this test"):
        refused(capsys, arguments, "report is in use by another report", "wait for it to end, or choose another --out")
    assert os.listdir(tmp_path / "report") == ["lock"]
    both = [subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for _ in "ab"]
    texts = [process.communicate(timeout=120)[1].decode() for process in both]
    assert 0 in [process.returncode for process in both]
    for process, text in zip(both, texts, strict=True):
        assert process.returncode == 0 or "is in use by another report" in text, text
    assert (tmp_path / "report" / "index.html").read_text().rstrip().endswith("</html>")


# data files


def batch(**changes):
    return pickle.dumps({b"data": torch.zeros(2, 3072, dtype=torch.uint8).numpy(), b"labels": [0, 1], **changes}, 2)


def test_a_nest_of_labels_that_stands_for_more_than_memory_holds_is_refused():
    labels = [0] * 10
    for _ in range(12):
        labels = [labels] * 10
    for given in (labels, [[0], [0, 1]], [0.5, 0.5], [True, False], [10**30, 0], "ab", None, {0: 1}):
        content = batch()
        values = pickle.loads(content, encoding="bytes")
        values[b"labels"] = given
        with pytest.raises(data.DataError, match=r"^file.*labels must be"):
            cifar.parse_python_batch(pickle.dumps(values, 2), "file")


@pytest.mark.parametrize(
    "put",
    [
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
        lambda path: path.symlink_to("/dev/zero"),
        lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    ],
    ids=["pipe", "folder", "link to nothing", "device", "larger than memory"],
)
def test_a_batch_that_is_no_file_or_too_large_is_refused(tmp_path, put):
    (tmp_path / "data_batch_1").write_bytes(batch())
    put(tmp_path / "data_batch_2")
    with pytest.raises(data.DataError, match=r"data_batch_2 must (be a file|have at most)"):
        cifar.load_cifar(tmp_path, verify=False)


def test_images_that_need_networks_of_gigabytes_and_negative_counts_are_refused():
    with pytest.raises(data.DataError, match="file must hold images of at most 256x256 pixels, got 2000x1"):
        idx.parse_images(struct.pack(">iiii", 2051, 1, 2000, 1) + bytes(2000), Path("file"))
    for count in (0, -5):
        with pytest.raises(data.DataError, match=f"file must hold at least one label, got {count}"):
            idx.parse_labels(struct.pack(">ii", 2049, count), Path("file"))


# output and environment


@pytest.mark.parametrize("arguments", [[], ["train", "--print_config"]])
def test_an_output_that_takes_nothing_ends_a_command_with_a_sentence(run, arguments):
    """A full device, and a reader that has ended; what the caller has closed is no fault."""
    command = [*COMMAND, *arguments]
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(command, cwd=run.parent, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1 and "No space left" in ended.stderr
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, cwd=run.parent, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ended.returncode == 1 and len(ended.stderr.splitlines()) == 1, ended.stderr
    assert "write it into a file, and look at that" in ended.stderr
    closed = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], cwd=run.parent, stderr=subprocess.PIPE, text=True)
    assert closed.returncode == 0 and closed.stderr == ""


def test_an_environment_without_anything_costs_nothing(run, tmp_path):
    """An unknown matplotlib backend, no home, no terminal, one column, no locale."""
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if key in os.environ}
    environment = {**kept, "MPLBACKEND": "x", "COLUMNS": "1", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    command = [*COMMAND, "report", str(run), "--out", str(tmp_path / "report"), "--title", "ü"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert "<h1>ü</h1>" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")

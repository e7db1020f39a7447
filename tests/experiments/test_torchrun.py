"""`torchrun ... -m margin_kernels.experiments train`: several processes train as one does, and end as one does."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from support import ROOT
from support.command_line import COMMAND, SMALL
from support.processes import NIGHTLY

from margin_kernels.experiments import cli, config, data, models
from margin_kernels.experiments.cli.commands import run_command
from margin_kernels.experiments.results import Run
from margin_kernels.experiments.training import Processes, ProcessesError, Trainer, load_state
from margin_kernels.experiments.training.processes import ElsewhereError

SGD = ("--optimiser.name", "sgd", "--optimiser.lr", "0.05", "--training.threads", "1", "--training.batch_size", "48")
LARGE_MARGIN = ("--loss.kind", "large_margin", "--loss.top_k", "2", "--loss.gamma", "[0.5,1,2,4,4]")
LARGE_MARGIN += ("--loss.cross_entropy_weight", "1")
TWO = ("--training.epochs", "2")
MEDIAN = (*TWO, "--loss.gamma", "1.5", "--loss.gamma_unit", "median", "--loss.cross_entropy_epochs", "1")
SENSITIVITY = ("--loss.kind", "margin_sensitivity", "--loss.sensitivity.classification", "cross_entropy")
ADVERSARIAL = ("--loss.kind", "adversarial_margin", "--loss.adversarial.aggregation", "avg")
AUTO = (*LARGE_MARGIN[:4], "--loss.gamma", "auto", "--loss.warmup", "1", "--loss.cross_entropy_weight", "1", *TWO)
ONE_TO_N = ("--loss.kind", "one_to_n", "--loss.one_to_n.delta", "5")


def settings(*arguments):
    base = ["--training.epochs", "1", "--training.distance_samples", "16", *SGD]
    return config.parse([*base, *arguments])


def digits(count):
    """So many training digits and 60 for validation."""
    whole = data.load("digits")
    return replace(whole, train=whole.train.head(count), validation=whole.validation.head(60))


def weights(trainer):
    return torch.cat([value.detach().double().flatten() for value in trainer.model.state_dict().values()])


def history(trainer):
    return [{k: v for k, v in record.items() if k not in ("seconds", "ms_per_step")} for record in trainer.history]


def train(rank, size, arguments, count, folder=None, epochs=None, resume=False):
    """Weights and history of one process after some epochs."""
    processes = Processes(rank, size, timeout=60)
    trainer = Trainer(settings(*arguments), digits(count), folder, processes)
    if resume:
        trainer.resume()
    trainer.run(until=epochs)
    return weights(trainer), history(trainer)


# 107 images: batches of 48, 48 and 11; 49: of 48 and 1, of which all processes but the first have no part.
@pytest.mark.parametrize(
    ("size", "count", "arguments"),
    [
        (2, 49, ("--optimiser.momentum", "0.9")),
        pytest.param(
            *(2, 107, ("--loss.kind", "hinge", "--training.accumulate", "3", "--training.augment", "crop")),
            marks=NIGHTLY,
        ),
        pytest.param(*(3, 107, ("--optimiser.momentum", "0.9", *TWO)), marks=NIGHTLY),
        (3, 49, LARGE_MARGIN),
        pytest.param(
            *(3, 107, (*LARGE_MARGIN, "--loss.batchnorm", "frozen", "--loss.second_order", "true")), marks=NIGHTLY
        ),
        (3, 107, (*LARGE_MARGIN, *MEDIAN)),
        pytest.param(
            *(3, 107, ("--loss.kind", "hinge", "--training.accumulate", "3", "--training.augment", "crop_flip")),
            marks=NIGHTLY,
        ),
        pytest.param(
            *(3, 49, ("--loss.kind", "squared_hinge", "--training.accumulate", "5", "--training.clip_norm", "0.5")),
            marks=NIGHTLY,
        ),
        (3, 49, SENSITIVITY),
        (3, 49, ADVERSARIAL),
        pytest.param(*(3, 107, ("--loss.kind", "fgsm_training", "--data.label_noise", "0.2")), marks=NIGHTLY),
        (3, 49, ONE_TO_N),
        pytest.param(*(3, 107, ADVERSARIAL[:2]), marks=NIGHTLY),
        (3, 49, AUTO),
    ],
)
def test_epochs_of_several_processes_are_those_of_one(processes, size, count, arguments):
    alone = Trainer(settings(*arguments), digits(count))
    start = weights(alone)
    alone.run()
    assert (weights(alone) - start).abs().max() > 1e-3
    found = processes(size).run(train, arguments, count)
    for value, records in found:
        assert torch.equal(value, found[0][0]) and records == found[0][1]
        torch.testing.assert_close(value, weights(alone), rtol=1e-4, atol=1e-5)
        for record, expected in zip(records, history(alone), strict=True):
            assert record == {
                key: pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in expected.items() if key != "distance"
            } | {"distance": pytest.approx(expected["distance"], rel=1e-3, abs=1e-5)}


def refused(*arguments):
    """The words in which `train` was refused, the type first; the group stays as it is."""
    try:
        train(*arguments)
    except (ValueError, ElsewhereError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was not refused")


def drawn(rank, size):
    """What a process draws of order, of augmentation and of dropout, after the first weights."""
    trainer = Trainer(settings("--model.dropout", "0.5"), digits(49), None, Processes(rank, size))
    return weights(trainer), torch.rand(3, generator=trainer.order), torch.rand(3)


def test_first_weights_and_order_are_equal_and_what_a_process_draws_is_its_own(processes):
    found = processes(3).run(drawn)
    assert all(torch.equal(one[0], found[0][0]) and torch.equal(one[1], found[0][1]) for one in found)
    assert len({tuple(one[2].tolist()) for one in found}) == 3
    torch.manual_seed(2)
    assert torch.equal(found[2][2], torch.rand(3))


def test_parts_are_contiguous_and_cover_a_batch():
    for count in range(1, 8):
        for size in range(1, 5):
            parts = [Processes(rank, size).part(count) for rank in range(size)]
            assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
            sizes = [part.stop - part.start for part in parts]
            assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("size", [2, 3])
def test_a_resumed_run_is_bit_for_bit_the_run_on_as_many_processes(processes, size, tmp_path):
    arguments = ("--model.dropout", "0.3", "--optimiser.name", "adam", *TWO)
    straight = processes(size).run(train, arguments, 107, tmp_path / "a")
    processes(size).run(train, arguments, 107, tmp_path / "b", 1)
    resumed = processes(size).run(train, arguments, 107, tmp_path / "b", None, True)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(straight, resumed, strict=True))
    assert history_of(tmp_path / "a") == history_of(tmp_path / "b") == resumed[0][1]
    assert len(load_state(tmp_path / "b")["others"]) == size - 1
    assert Run.read(tmp_path / "b" / "run.json").machine["processes"] == size


def history_of(folder):
    records = Run.read(folder / "run.json").history
    return [{k: v for k, v in record.items() if k not in ("seconds", "ms_per_step")} for record in records]


def test_another_number_of_processes_goes_on_where_nothing_is_drawn(processes, tmp_path):
    processes(2).run(train, TWO, 107, tmp_path, 1)
    (value, _), *_ = processes(3).run(train, TWO, 107, tmp_path, None, True)
    alone = Trainer(settings(*TWO), digits(107))
    alone.run()
    torch.testing.assert_close(value, weights(alone), rtol=1e-4, atol=1e-5)
    again = Trainer(settings("--training.epochs", "3"), digits(107), tmp_path)
    assert again.resume() == 3 and again.epoch == 2


def test_another_number_of_processes_is_refused_where_they_draw(processes, tmp_path):
    arguments = ("--model.dropout", "0.3")
    processes(2).run(train, arguments, 49, tmp_path, 1)
    with pytest.raises(
        models.CheckpointError, match=r"is of 2 processes, which draw dropout masks of their own; resum"
    ):
        Trainer(settings(*arguments), digits(49), tmp_path).resume()
    words = "resume with --nproc-per-node 2 instead of 3, or start anew with --overwrite"
    assert all(words in error for _, error in processes(3).outcomes(train, arguments, 49, tmp_path, None, True))


def normalised(rank, size):
    trainer = Trainer(
        settings("--model.name", "resnet20", "--training.epochs", "1"), digits(48), None, Processes(rank, size)
    )
    trainer.run()
    return trainer.differs(), {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}


def test_batch_norm_has_the_statistics_of_process_0_and_the_command_says_so(processes):
    (said, buffers), (_, others) = processes(2).run(normalised)
    assert said.startswith(": batch norm over the part of a batch that each has")
    assert all(torch.equal(buffers[name], others[name]) for name in buffers)


def fails(rank, size, method, where):
    def work():
        if rank == where:
            raise ValueError("enough")
        return rank

    group = Processes(rank, size)
    try:
        value = getattr(group, method)("a check", work)
    except (ValueError, ElsewhereError) as error:
        value = f"{type(error).__name__}: {error}"
    return value, group.gathered(rank)


@pytest.mark.parametrize(("method", "values"), [("first", [0, 0]), ("together", [0, 1])])
def test_what_fails_on_one_process_fails_on_all(processes, method, values):
    assert processes(2).run(fails, method, 7) == [(value, [0, 1]) for value in values]
    failing = 0 if method == "first" else 1
    found = [value for value, _ in processes(2).run(fails, method, failing)]
    assert found[failing] == "ValueError: enough"
    assert found[1 - failing] == "ElsewhereError: another process ended with 1"


def test_an_error_of_the_step_keeps_its_words_and_one_of_the_group_names_the_phase():
    group = Processes(1, 2, timeout=5)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), group.phase("step 1 of epoch 1"):
        raise RuntimeError("shapes differ")
    words = r"^step 12 of epoch 3 did not end on all 2 processes within 5 s: Timed out waiting 5000ms$"
    with pytest.raises(ProcessesError, match=words), group.phase("step 12 of epoch 3"):
        raise RuntimeError("[/a/gloo/pair.cc:7] Timed out waiting 5000ms")


# the command line

ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "", "MASTER_PORT": ""}, "WORLD_SIZE is 2, but RANK, MASTER_PORT must be set too, as torchrun does"),
        ({"RANK": "one"}, "RANK, WORLD_SIZE and LOCAL_RANK must be integers, got RANK=one"),
        ({"RANK": "2"}, "RANK must be from 0 to WORLD_SIZE - 1 = 1 and LOCAL_RANK at least 0, got 2"),
        ({"MASTER_PORT": "free"}, "the 2 processes (WORLD_SIZE) of this command did not meet at localhost:"),
    ],
)
def test_an_environment_that_is_not_whole_is_refused(monkeypatch, capsys, change, words):
    for name, value in (ENVIRONMENT | change).items():
        monkeypatch.setenv(name, str(free_port()) if value == "free" else value)
    monkeypatch.setattr("margin_kernels.experiments.training.processes.MEET", 1.0)
    assert cli.main(["train"]) == 1
    assert capsys.readouterr().err.startswith(f"margin-kernels train: {words}")


@pytest.mark.parametrize("command", ["sweep", "evaluate", "report", "demo", "info"])
def test_commands_of_one_process_say_so(command):
    with pytest.raises(ValueError, match=r"one process must run this command, got 2 \(WORLD_SIZE\): only train takes"):
        run_command(command, [], Processes(0, 2))


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def environment(**variables):
    """One thread, and this package also where another one is installed."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | variables


def start(*arguments, size=2):
    run = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [*run, *COMMAND[2:], "train", *SMALL, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def end(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def wait_for(path):
    until = time.monotonic() + 90
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert path.exists()


def whole(folder):
    """No unfinished file, and the files of one run."""
    return sorted(path.name for path in folder.iterdir()) == sorted(
        ["checkpoint.pt", "config.yaml", "lock", "metrics.csv", "run.json"]
    )


def test_torchrun_trains_one_run_and_a_second_one_of_the_folder_is_refused_once(tmp_path):
    folder = tmp_path / "run"
    status, out, err = end(start(*SGD, "--training.epochs", "2", "--out", str(folder)))
    assert status == 0, err
    lines = out.splitlines()
    assert lines[0] == "2 processes" and [line.split()[0] for line in lines[1:]] == ["epoch", "epoch", "done", "next:"]
    assert "Warning" not in err
    cfg = config.parse([*SMALL, *SGD, "--training.epochs", "2"])
    alone = Trainer(cfg, data.of(cfg.data))
    alone.run()
    model, _ = models.load_model(folder)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    status, out, err = end(start("--out", str(folder)))
    assert status == 1 and out == ""
    assert err.count("already holds a run; continue it with --resume") == 1
    assert err.count("exitcode  : 1 ") == 2 and "margin_kernels/" not in err  # no traceback of ours


def test_sigterm_ends_all_processes_and_the_run_goes_on(tmp_path):
    process = start("--training.epochs", "100000", "--out", str(tmp_path / "run"))
    wait_for(tmp_path / "run" / "checkpoint.pt")
    process.send_signal(signal.SIGTERM)
    status, _, err = end(process)
    assert status != 0
    (line,) = [line for line in err.splitlines() if line.startswith("margin-kernels")]
    assert line.startswith("margin-kernels train: interrupted in ") and "`--resume` continues" in line
    assert whole(tmp_path / "run") and load_state(tmp_path / "run")["epoch"] >= 1


@contextmanager
def pair(*arguments):
    """Two processes without torchrun: process 0 keeps what they leave word in."""
    variables = ENVIRONMENT | {"MASTER_PORT": str(free_port())}
    each = [
        subprocess.Popen(
            [*COMMAND, "train", *SMALL, "--training.epochs", "100000", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**variables | {"RANK": str(rank)}),
        )
        for rank in range(2)
    ]
    try:
        yield each
    finally:
        for process in each:
            process.kill()


def test_a_process_that_hangs_ends_the_others_with_the_phase_and_its_number(tmp_path):
    with pair("--timeout", "10", "--out", str(tmp_path / "run")) as (writer, hanging):
        wait_for(tmp_path / "run" / "checkpoint.pt")
        hanging.send_signal(signal.SIGSTOP)
        status, _, err = end(writer)
    assert status == 1
    (line,) = [line for line in err.splitlines() if line.startswith("margin-kernels")]
    assert "epoch" in line or "random states" in line or "buffers" in line
    assert "did not end on all 2 processes within 10 s: " in line and line.endswith("(no answer from process 1)")
    assert whole(tmp_path / "run")


def test_a_process_that_is_killed_ends_the_others_with_the_phase(tmp_path):
    with pair("--out", str(tmp_path / "run")) as (writer, killed):
        wait_for(tmp_path / "run" / "checkpoint.pt")
        killed.kill()
        status, _, err = end(writer)
    assert status == 1 and "Traceback" not in err
    assert "did not end on all 2 processes, as one of them has ended: " in err and "(no answer from process 1)" in err
    assert whole(tmp_path / "run")

"""Records in one file: what was put is what is read, shared values stand once, and nothing is lost when processes write
at once or are killed."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT
from support.finished_cells import filled

from margin_kernels.experiments import objectives
from margin_kernels.experiments.config import OPTIONS_OF_LOSS, Config, from_dict, own_options, to_dict
from margin_kernels.experiments.results import (
    RECORDS,
    Records,
    Tried,
    changed_settings,
    common,
    differences,
    merged,
    sealed_line,
)
from margin_kernels.experiments.sweeps.job import Choice, Job

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("ab\n\u2028", max_size=3)
)
VALUES = st.dictionaries(
    st.sampled_from("abcd"),
    st.recursive(LEAVES | st.lists(LEAVES, max_size=2), lambda inner: st.dictionaries(st.sampled_from("abc"), inner)),
)


def exact(values):
    """Text that tells 1 from 1.0 and from True."""
    return json.dumps(values, sort_keys=True)


@given(VALUES, VALUES)
def test_differences_and_shared_values_give_the_record_back(values, shared):
    assert exact(merged(json.loads(json.dumps(differences(values, shared))), shared)) == exact(values)
    assert differences(values, values) == {}


def test_only_what_differs_is_written_and_what_only_the_shared_values_have_is_named():
    shared = {"config": {"loss": {"kind": "a", "p": 2}, "seed": 0}, "gpu": "x"}
    values = {"config": {"loss": {"kind": "a", "p": 2.0}, "seed": 0}}
    assert differences(values, shared) == {"config": {"loss": {"p": 2.0}}, "absent": [["gpu"]]}
    assert common(shared, values) == {"config": {"loss": {"kind": "a"}, "seed": 0}}
    assert common(shared) == shared


@pytest.fixture
def file(tmp_path):
    return Records(tmp_path / RECORDS)


def test_what_is_put_is_read_back_with_every_digit(file):
    written = [
        filled(),
        filled(1, after="plain__seed0"),
        filled(2, "hinge", attacker="plain", timing={"ratio": 1 / 7}),
    ]
    for own in written:
        file.put(own)
    assert Records(file.path).all() == file.all() == written
    assert file["plain__few_samples__seed1"] == written[1] and "plain__few_samples__seed7" not in file
    assert file["hinge__few_samples__seed2"].measurements["clean"] == 1 / 3
    assert type(file["plain__few_samples__seed0"].evaluation["histograms"]["rho_adv"][0]) is int


def test_what_is_not_finite_is_null(file):
    own = filled()
    own.evaluation["deepfool_norm"] = math.nan
    file.put(own)
    assert file[own.cell].evaluation["deepfool_norm"] is None


def test_another_cell_is_one_more_line_of_what_is_its_own(file):
    file.put(filled())
    before = file.path.read_text()
    assert before.count("\n") == 2 and list(json.loads(before.splitlines()[0])) == ["shared", "crc32"]
    file.put(filled(1))
    after = file.path.read_text()
    assert after.startswith(before) and after.count("\n") == 3
    line = after.splitlines()[-1]
    assert line.startswith('{"cell":"plain__few_samples__seed1",') and '"machine"' not in line
    assert not {"network", "versions", "machine", "parameters", "config"} & json.loads(line).keys()


def test_the_line_of_another_machine_and_version_carries_them(file):
    file.put(filled())
    other = filled(1, machine={"processor": "Q", "cores": 2, "device": "cpu"}, versions={"torch": "3"}, parameters=7)
    file.put(other)
    line = json.loads(file.path.read_text().splitlines()[-1])
    assert line["machine"] == {"processor": "Q"} and line["versions"] == {"torch": "3"} and line["parameters"] == 7
    assert line["absent"] == [["machine", "torch_threads"]]
    assert Records(file.path)[other.cell] == other
    assert Records(file.path)["plain__few_samples__seed0"] == filled()


def test_the_first_line_has_the_options_that_all_cells_of_the_sweep_have(file):
    settings = [own_options(filled().config), own_options(replace(filled().config, name="b"))]
    settings[1]["training"]["seed"] = 4
    file.put(filled(), common(*settings))
    shared = json.loads(file.path.read_text().splitlines()[0])["shared"]
    assert shared["config"]["data"]["name"] == "digits" and shared["config"]["training"]["epochs"] == 3
    assert "seed" not in shared["config"]["training"] and "name" not in shared["config"]
    assert file.all() == [filled()]


def test_a_cell_that_is_measured_anew_takes_the_place_of_its_line(file):
    for seed in (0, 1, 2):
        file.put(filled(seed))
    before = file.path.read_text().splitlines()
    anew = filled(1, evaluation={"clean": 0.5})
    file.put(anew)
    after = file.path.read_text().splitlines()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, False, True]
    assert file.all() == [filled(0), anew, filled(2)]


@pytest.mark.parametrize("kept", [5, 0.5, -2])
def test_a_torn_last_line_is_not_read_and_the_next_record_overwrites_it(file, kept):
    file.put(filled())
    whole = file.path.read_bytes()
    file.put(filled(1))
    line = file.path.read_bytes()[len(whole) :]
    kept = kept if isinstance(kept, int) else int(kept * len(line))
    file.path.write_bytes(whole + line[:kept])
    assert Records(file.path).all() == [filled()]
    file.put(filled(2))
    assert Records(file.path).all() == [filled(), filled(2)] and file.path.read_bytes().startswith(whole)


def test_a_record_without_its_newline_counts(file):
    """A killed process has written all but the last character, or an editor has taken it."""
    for seed in (0, 1):
        file.put(filled(seed))
    whole = file.path.read_text()
    file.path.write_text(whole.removesuffix("\n"))
    assert Records(file.path).all() == [filled(0), filled(1)]
    file.put(filled(2))
    assert file.all() == [filled(0), filled(1), filled(2)] and file.path.read_text().startswith(whole)


def test_a_torn_first_line_is_written_again(file):
    file.path.write_text('{"shared":{"config":{"da')
    assert file.all() == []
    file.put(filled())
    assert Records(file.path).all() == [filled()]


def test_a_line_that_is_no_record_is_named(file):
    file.put(filled())
    file.path.write_text(file.path.read_text() + "nonsense\n")
    with pytest.raises(ValueError, match=r"records.jsonl, line 3: not a record"):
        file.all()
    first, line, _ = file.path.read_text().splitlines(keepends=True)
    file.path.write_text(first + 2 * line)
    with pytest.raises(ValueError, match=r"line 3: a second record of plain__few_samples__seed0; delete one"):
        file.all()
    file.path.write_text(sealed_line('{"cell":"a"}') + "\n")
    with pytest.raises(ValueError, match=r"records.jsonl, line 1 must hold the shared values, got cell"):
        file.all()


WRITER = """
import sys
from pathlib import Path
from support.finished_cells import filled
from margin_kernels.experiments.results import Records
first = int(sys.argv[2])
for seed in range(first, first + 20):
    Records(Path(sys.argv[1])).put(filled(seed))
"""


def test_two_processes_that_write_at_once_lose_nothing_and_write_the_first_line_once(file):
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(file.path), str(first)], cwd=ROOT / "tests")
        for first in (0, 100)
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    seeds = sorted(own.seed for own in file.all())
    assert seeds == [*range(20), *range(100, 120)]
    assert all(own == filled(own.seed) for own in file.all())
    assert file.path.read_text().count('"shared"') == 1


def test_a_job_is_read_as_it_was_written(tmp_path):
    tried = [Tried({"loss.gamma": 1}, 2 / 3, True, [0, 1]), Tried({"loss.gamma": 2}, 1 / 3, False, [0, 1])]
    settings = from_dict({"model": {"initial": "cells/a"}, "loss": {"kind": "hinge"}, "training": {"threads": 1}})
    place = {"cell": "b__seed1", "model": "b", "point": "few", "seed": 1, "values": {"data.seed": 1}}
    files = {"records": "records.jsonl", "candidates": "candidates.jsonl", "common": {"loss": {"kind": "hinge"}}}
    job = Job(**place, **files, after="a__seed1", attacker=None, config=settings, choice=Choice("c", "d", ["e"], tried))
    job.write(tmp_path)
    assert Job.read(tmp_path) == job and job.place == {**place, "after": "a__seed1", "attacker": None}
    replace(job, choice=None, trained=True).write(tmp_path)
    assert Job.read(tmp_path) == replace(job, choice=None, trained=True)


def test_every_loss_says_which_options_it_reads():
    assert OPTIONS_OF_LOSS.keys() == objectives.OBJECTIVES.keys()
    fields = set(to_dict(Config())["loss"])
    assert all(set(names) < fields for names in OPTIONS_OF_LOSS.values())


def test_a_record_keeps_the_options_of_its_own_loss():
    settings = from_dict({"loss": {"kind": "adversarial_margin", "adversarial": {"weight": 3.0}, "gamma": 7.0}})
    assert set(own_options(settings)["loss"]) == {"kind", "cross_entropy_epochs", "adversarial"}
    assert own_options(settings)["loss"]["adversarial"]["weight"] == 3.0
    assert own_options(Config())["loss"] == {"kind": "cross_entropy", "cross_entropy_epochs": 0}


def test_settings_count_as_changed_where_the_loss_reads_them():
    own = filled()

    def changed(**loss):
        return changed_settings(own, replace(own.config, loss=replace(own.config.loss, **loss)), None, None)

    assert changed() == [] and changed(gamma=3.0) == [] and changed(kind="hinge") == ["loss.kind"]
    assert changed(cross_entropy_epochs=2) == ["loss.cross_entropy_epochs"]
    assert changed_settings(own, own.config, "a", "b") == ["evaluation.attacker", "model.initial"]
    large = replace(own, config=replace(own.config, loss=replace(own.config.loss, kind="large_margin")))
    asked = replace(large.config, loss=replace(large.config.loss, gamma=3.0))
    assert changed_settings(large, asked, None, None) == ["loss.gamma"]

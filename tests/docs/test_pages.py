"""Tables of the pages are those of the committed results, and these those of the committed records."""

import csv
import dataclasses
import fnmatch
import re

import pytest
import tables
from support import ROOT

from margin_kernels.experiments import config, models, sweeps
from margin_kernels.experiments.results import RECORDS, Records, summary

RESULTS = ROOT / "benchmarks" / "results"
SWEEPS = sorted(path.parent for room in ("papers", "presets") for path in (RESULTS / room).glob("*/records.jsonl"))


@pytest.fixture(scope="module")
def results():
    return tables.all_tables()


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_of_a_page_are_those_of_the_results(page, results):
    text = page.read_text()
    assert text.count("<!-- table ") == text.count("<!-- /table -->") == len(tables.BLOCK.findall(text)) >= 1
    assert tables.filled(text, results) == text, "python benchmarks/tables.py --write"


def test_every_page_with_a_table_of_the_results_is_looked_at():
    written_elsewhere = {
        "gradients.md",
        "processes.md",
    }  # by benchmarks/architectures.py, by tests/support/many_processes.py
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *RESULTS.rglob("*.md")]
    found = {page for page in pages if "<!-- table " in page.read_text() and page.name not in written_elsewhere}
    assert found == set(tables.PAGES)
    assert sum(page.read_text().count("<!-- table ") for page in found) > 60


def test_the_table_of_options_has_every_option_with_its_default():
    shown = tables.options()
    assert set(shown) >= {"options/data", "options/loss", "options/loss.sensitivity", "options/evaluation"}
    for section, name in ((config.LossConfig, "loss"), (config.TrainingConfig, "training")):
        for field in dataclasses.fields(section):
            if not dataclasses.is_dataclass(field.default_factory):
                (row,) = [
                    line for line in shown[f"options/{name}"].splitlines() if line.startswith(f"| `{field.name}` |")
                ]
                default, meaning = row.strip("| ").split(" | ", 2)[1:]
                assert len(meaning) > 5 and "`" in default
    assert "| `gamma` | `1.0` | desired distance to the boundary" in shown["options/loss"]


def test_a_stale_table_is_replaced_and_an_unknown_one_refused():
    page = "a\n<!-- table x/y -->\n\n| old |\n\n<!-- /table -->\nb\n<!-- table z -->\n<!-- /table -->"
    expected = "a\n<!-- table x/y -->\n\n| 1 |\n\n<!-- /table -->\nb\n<!-- table z -->\n\n| 2 |\n\n<!-- /table -->"
    assert tables.filled(page, {"x/y": "| 1 |", "z": "| 2 |"}) == expected
    with pytest.raises(KeyError, match="z"):
        tables.filled(page, {"x/y": "| 1 |"})


def test_every_sweep_has_its_table_on_the_page():
    assert len(SWEEPS) > 10
    for folder in SWEEPS:
        page = (folder.parent / "README.md").read_text()
        assert f"<!-- table {folder.parent.name}/{folder.name}" in page


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_a_summary_is_that_of_the_records(folder):
    records = sorted(Records(folder / RECORDS).all(), key=lambda record: record.seed)
    found = list(csv.DictReader((folder / "summary.csv").open()))
    assert {(row["model"], row["point"]) for row in found} == {record.place for record in records}
    for row in found:
        own = [record for record in records if record.place == (row["model"], row["point"])]
        (expected,) = summary.rows(own[: int(row["seeds"])])  # seeds beyond the budget's may lie beside them
        assert expected["seeds"] == int(row["seeds"])
        for measure in ("error", "fgsm_error", "fgsm_gap_error", "ifgsm_gap_error", "deepfool_norm", "rho_adv"):
            ours, theirs = expected.get(f"{measure}_mean"), row.get(f"{measure}_mean")
            if ours is None:
                assert not theirs
            else:
                assert float(theirs) == pytest.approx(ours, rel=1e-9)


def legend():
    """Keys of the papers and letters of shapes, as docs/papers.md explains them."""
    papers, shapes = (ROOT / "docs" / "papers.md").read_text().split("Any other letter")
    return set(re.findall(r"^\| \[([A-Z])\]", papers, re.MULTILINE)), set(
        re.findall(r"^\| \[([A-Z])\]", shapes, re.MULTILINE)
    )


def test_every_letter_in_brackets_is_a_paper_or_a_shape_of_the_legend():
    papers, shapes = legend()
    assert papers >= {"A", "E", "M"} and shapes >= {"N", "C"} and not papers & shapes
    folders = ("margin_kernels", "csrc", "python", "benchmarks", "docs", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")] + list(ROOT.glob("*.md"))
    kinds = (".py", ".md", ".yaml", ".cpp", ".h", ".cu", ".cuh")
    found = {
        (letter, path)
        for path in files
        if path.suffix in kinds
        for letter in re.findall(r"(?<![\w)\]])\[([A-Z])\]", path.read_text())
    }
    assert {letter for letter, _ in found} >= papers
    assert not [(letter, path) for letter, path in found if letter not in papers | shapes]


def test_the_legend_names_configs_and_sweeps_that_there_are():
    named = re.findall(r"`([a-z0-9_*]+)`", (ROOT / "docs" / "papers.md").read_text())
    known = [*config.shipped(), *sweeps.shipped(), *models.MODELS]
    assert len(named) > 10 and not [name for name in named if not fnmatch.filter(known, name)]

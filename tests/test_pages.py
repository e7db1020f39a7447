"""Tables of the READMEs are those of the committed results, and these those of the committed records."""

import csv
import importlib.util
import json
from pathlib import Path

import pytest

from margin_kernels.experiments.results import summary

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)

SWEEPS = sorted(path.parent for path in (ROOT / "benchmarks" / "results" / "papers").glob("*/records"))


@pytest.fixture(scope="module")
def results():
    return tables.all_tables()


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_tables_of_a_page_are_those_of_the_results(page, results):
    text = page.read_text()
    assert text.count("<!-- table ") == text.count("<!-- /table -->") == len(tables.BLOCK.findall(text)) >= 3
    assert tables.filled(text, results) == text, "python benchmarks/tables.py --write"


def test_a_stale_table_is_replaced_and_an_unknown_one_refused():
    page = "a\n<!-- table x/y -->\n\n| old |\n\n<!-- /table -->\nb\n<!-- table z -->\n<!-- /table -->"
    expected = "a\n<!-- table x/y -->\n\n| 1 |\n\n<!-- /table -->\nb\n<!-- table z -->\n\n| 2 |\n\n<!-- /table -->"
    assert tables.filled(page, {"x/y": "| 1 |", "z": "| 2 |"}) == expected
    with pytest.raises(KeyError, match="z"):
        tables.filled(page, {"x/y": "| 1 |"})


def test_every_sweep_has_its_table_on_the_page():
    page = (ROOT / "benchmarks" / "results" / "papers" / "README.md").read_text()
    assert len(SWEEPS) > 10
    for folder in SWEEPS:
        assert f"<!-- table papers/{folder.name}" in page


@pytest.mark.parametrize("folder", SWEEPS, ids=lambda folder: folder.name)
def test_a_summary_is_that_of_the_records(folder):
    records = [json.loads(path.read_text()) for path in (folder / "records").glob("*.json")]
    records.sort(key=lambda record: record["seed"])
    found = list(csv.DictReader((folder / "summary.csv").open()))
    assert {(row["model"], row["point"]) for row in found} == {(r["model_label"], r["point"]) for r in records}
    for row in found:
        own = [r for r in records if (r["model_label"], r["point"]) == (row["model"], row["point"])]
        (expected,) = summary.rows(own[: int(row["seeds"])])  # seeds beyond the budget's may lie beside them
        assert expected["seeds"] == int(row["seeds"])
        for measure in ("error", "fgsm_error", "fgsm_gap_error", "ifgsm_gap_error", "margin", "rho_adv"):
            ours, theirs = expected.get(f"{measure}_mean"), row.get(f"{measure}_mean")
            if ours is None:
                assert not theirs
            else:
                assert float(theirs) == pytest.approx(ours, rel=1e-9)

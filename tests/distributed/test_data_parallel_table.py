"""The table of losses and ways to train on several processes, its columns of DistributedDataParallel: every cell is
exact, or refused as it says; and the page shows the table."""

import pytest
from support.many_processes import DOCS, WAYS, cells, cells_of, check_cell, filled, table


@pytest.mark.parametrize(("name", "column"), cells_of(sharded=False))
def test_a_cell_of_a_replicated_task(processes, name: str, column: str) -> None:
    check_cell(processes, name, column)


def test_the_page_shows_the_table() -> None:
    page = DOCS.read_text()
    assert filled(page) == page, "PYTHONPATH=tests python -m support.many_processes"
    assert table() in page


def test_every_cell_is_in_one_of_the_two_files() -> None:
    found = [tuple(parameters.values) for sharded in (False, True) for parameters in cells_of(sharded)]
    assert sorted(found) == sorted(cells()) and len({way for _, way in found}) == len(WAYS)

"""The table of losses and ways to train on several processes, its columns of fully_shard_task: every cell is exact,
or refused as it says."""

import pytest
from support.many_processes import cells_of, check_cell


@pytest.mark.parametrize(("name", "column"), cells_of(sharded=True))
def test_a_cell_of_a_sharded_task(processes, name: str, column: str) -> None:
    check_cell(processes, name, column)

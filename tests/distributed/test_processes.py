"""What the tests of several processes rest on."""

import os

import pytest
import torch
from support.many_processes import batch, task_of
from support.processes import Processes
from torch import distributed


def sum_of_ranks(rank: int, size: int, factor: float) -> float:
    value = torch.tensor(factor * rank)
    distributed.all_reduce(value)
    return float(value)


def one_fails(rank: int, size: int) -> int:
    if rank == 1:
        raise ValueError("rank 1 has enough")
    return rank


def test_processes_answer_and_a_failure_leaves_the_next_call_alone(processes) -> None:
    assert processes(3).run(sum_of_ranks, 2.0) == [6.0, 6.0, 6.0]
    found = processes(3).outcomes(one_fails)
    assert [value for value, _ in found] == [0, None, 2]
    assert found[1][1].startswith("ValueError: rank 1 has enough")
    assert processes(3).run(sum_of_ranks, 1.0) == [3.0, 3.0, 3.0]


def one_stays_away(rank: int, size: int, name: str, dies: bool) -> str:
    """The error of process 0, which takes a step, while process 1 takes none."""
    task = task_of(name, "world")
    x, y = batch()
    if rank == 1:
        if dies:
            os._exit(3)
        return "away"
    try:
        task(x, y)
    except RuntimeError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(("name", "dies"), [("1-to-N", False), ("auto", True)], ids=["hangs", "dies"])
def test_the_error_of_a_missing_process_names_the_collective(name: str, dies: bool) -> None:
    two = Processes(2, seconds=5)
    try:
        (error, _), _ = two.outcomes(one_stays_away, name, dies)
    finally:
        two.stop()
    assert error.startswith("the check of a batch did not end on all processes: one of them has died, hangs, or takes")

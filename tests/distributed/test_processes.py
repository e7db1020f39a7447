"""What the tests of several processes rest on."""

import torch
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

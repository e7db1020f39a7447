"""Margin losses on models that several processes share: second order, searches and the 1-to-N loss in every cell of the
table."""

import pytest
from support.tensor_parallel import OTHERS, cells_of, check_cell


@pytest.mark.parametrize(("size", "layout", "taps", "loss", "passes", "what"), cells_of(*OTHERS))
def test_another_loss_trains_a_shared_model_as_in_one_process_or_is_refused(
    processes, size, layout, taps, loss, passes, what
) -> None:
    check_cell(processes, size, layout, taps, loss, passes, what)

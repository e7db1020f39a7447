"""Progress tells no time left before it has measured something other than the warm-up."""

import io

import pytest
from rich.console import Console

from margin_kernels.experiments.sweeps import Cell
from margin_kernels.experiments.sweeps.run import costs_of
from margin_kernels.experiments.training import Meter, progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes when it is told to."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_first_amount_is_warm_up_and_tells_no_time(clock):
    with Meter(101, "train", Console(file=io.StringIO())) as meter:
        assert meter.left() is None and meter.line() == "train: 0/101 (0%), 0 s, time left not known yet"
        clock[0] += 10  # the first step, with everything that is done once
        meter.advance()
        assert meter.left() is None and "time left not known yet" in meter.line()
        clock[0] += 1
        meter.advance()
        assert meter.left() is None  # a second, after ten
        clock[0] += 9
        meter.advance(9)
        assert meter.left() == pytest.approx(90.0)
        assert meter.line() == "train: 11/101 (11%), 1.0/s, 20 s, 90 s left"


def test_two_amounts_at_once_are_no_rate(clock):
    with Meter(10, "2/10 cells", Console(file=io.StringIO()), steps=False) as meter:
        clock[0] += 60
        meter.advance(1)
        clock[0] += 0.2
        meter.advance(1)  # of a second process
        assert meter.left() is None
        clock[0] += 59.8
        meter.advance(0)
        assert meter.left() == pytest.approx(8 * 60.0)
        assert meter.line() == "2/10 cells: 20%, 120 s, 8 min left"


def test_a_terminal_shows_the_same_time_left(clock):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Meter(101, "train", console) as meter:
        clock[0] += 1
        meter.advance()
        clock[0] += 1
        meter.advance()
        (task,) = meter.bar.tasks
        assert progress.Left(meter).render(task).plain == "99 s left"


def test_cells_count_by_their_estimated_time_or_alike():
    cells = [Cell(name, name, "", {}, 0, None, None) for name in ("a", "b")]
    assert costs_of(cells, {"a": 2.0, "b": 30.0}) == {"a": 2.0, "b": 30.0}
    assert costs_of(cells, {"a": 2.0, "b": None}) == costs_of(cells, {}) == {"a": 1.0, "b": 1.0}
    assert costs_of([], {}) == {}

"""benchmarks/ptx_model.py, whose file must be that of the counts and registers that are committed beside it."""

import json

import ptx_model


def test_the_predicted_times_are_those_of_the_counts():
    quoted = json.loads(ptx_model.FILE.read_text())
    assert quoted["predicted"] == ptx_model.predicted(), "python benchmarks/ptx_model.py"
    assert "nothing has run on a GPU" in quoted["gpu"]


def test_a_time_is_the_longest_of_three():
    """A kernel with 512 threads and 4 loads: 1 GB at 4.3 TB/s; its latency; as many instructions as take longer."""
    sizes = {"n": 1e5, "length": 2500, "bytes": 4}
    row = {"kernel": "dual_norm_kernel", "classes": {"float32": 1, "move": 10**9}}
    found = ptx_model.kernel_time(row, sizes, sizes, 512)
    assert (found["bound"], found["bytes"], found["microseconds"]) == ("memory", 10**9, round(1e9 / 4.3e6, 3))
    assert ptx_model.kernel_time(row, sizes, sizes, 64)["microseconds"] == round(1e9 / (132 * 64 * 64) * 0.6, 3)
    row["classes"]["float32"] = 10**9
    assert ptx_model.kernel_time(row, sizes, sizes, 512)["microseconds"] == round(1e9 / (0.6 * 528 * 1980), 3)


def test_a_share_below_what_is_wanted_has_a_reason():
    for row in ptx_model.predicted():
        assert row["share"] <= 1.001 and bool(row["reason"]) == (row["share"] < ptx_model.WANTED)

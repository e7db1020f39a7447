"""`pytest --backend NAME` runs the op tests on one backend; by default on every one that runs on this machine.

Where there is a GPU the same tests run on it too: with the default device set to cuda they create their tensors there.
Without one, `--backend triton` runs the Triton kernels on CPU tensors through Triton's interpreter.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

_COMMAND_LINE = " ".join(sys.argv).replace("=", " ")
if "--backend triton" in _COMMAND_LINE and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton, and margin_kernels, are imported

from margin_kernels import backends  # noqa: E402

pytest.register_assert_rewrite("support")  # its assertions then show the values, as those of a test file do

PROGRESS_SECONDS = 10  # between two lines of `progress`
ON_CPU = ("cpu", "reference")
ON_GPU = ("cuda", "triton", "reference")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=backends.BACKENDS, help="run the op tests on this backend only")
    parser.addoption("--every", type=int, default=1, metavar="N", help="of the tests in tests/ops every N-th one")


@pytest.hookimpl(trylast=True)  # what is deselected otherwise does not count
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("--every")
    if every <= 1:
        return
    ops = [item for item in items if item.path.parent.name == "ops"]
    left_out = [item for turn, item in enumerate(ops) if turn % every]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    runs = [pytest.param((name, "cpu"), id=name) for name in ON_CPU]
    if torch.cuda.is_available():
        runs += [pytest.param((name, "cuda"), id=f"{name}-gpu", marks=pytest.mark.gpu) for name in ON_GPU]
    chosen = metafunc.config.getoption("--backend")
    if chosen:
        # One that cannot run here stays, so that the skip names the reason.
        runs = [run for run in runs if run.values[0][0] == chosen] or [pytest.param((chosen, "cpu"), id=chosen)]
    metafunc.parametrize("backend", runs, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend that can run here, with the device of its tensors as the default; else a skip that names the reason."""
    name, device = request.param
    reason = backends.why_not(name, "competitors", (torch.zeros(1, 2, device=device),))
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    if device == "cpu":
        yield name
        return
    torch.set_default_device(device)
    yield name
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def progress(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """A long test calls progress(total) as each case starts: "case 400 of 2000, 35 s" is on the terminal now and then.

    It is written past pytest's capture. A worker of xdist, which has no terminal of its own, writes nothing.
    """
    capture = request.config.pluginmanager.getplugin("capturemanager")
    silent = hasattr(request.config, "workerinput")
    start = said = time.monotonic()
    count = 0

    def case(total: int) -> None:
        nonlocal count, said
        count += 1
        now = time.monotonic()
        if silent or now - said < PROGRESS_SECONDS:
            return
        said = now
        with capture.global_and_fixture_disabled():
            print(f"\ncase {count} of {total}, {now - start:.0f} s", flush=True)

    return case


@pytest.fixture(scope="module")
def processes() -> Iterator[Callable[[int], Any]]:
    """processes(size) -> a gloo group of that size, started when a test of the file first asks for it."""
    from support.processes import Processes

    groups: dict[int, Processes] = {}
    yield lambda size: groups.setdefault(size, Processes(size))
    for group in groups.values():
        group.stop(20)

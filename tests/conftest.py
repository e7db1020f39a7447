"""`pytest --backend NAME` runs the op tests on one backend; by default on every one that runs on this machine."""

import os
from pathlib import Path

import pytest
import torch

from margin_kernels import backends

CPU_BACKENDS = ("cpu", "reference")
GPU_BACKENDS = ("cuda", "triton", "reference")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backend", choices=backends.BACKENDS, help="run the op tests on this backend only")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--backend")
        metafunc.parametrize("backend", [chosen] if chosen else list(CPU_BACKENDS), indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that can run here; a skip that names the reason where it cannot."""
    reason = backends.why_not(request.param, "competitors", (torch.zeros(1, 2),))
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def data_root() -> Path | None:
    """The folder with mnist/, fashion_mnist/ and cifar10/, or None."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    root = Path(os.environ.get("MARGIN_KERNELS_DATA", default))
    return root if root.is_dir() else None

"""No call of functional waits for a GPU: none reads a tensor of one on the host or copies to it from pageable memory.

The calls run on fake tensors of a GPU that need not be there, and an op that only allocates its outputs; a mode sees
what functional itself asks of PyTorch.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from margin_kernels import functional

READS = ("aten._local_scalar_dense.default", "aten.item.default", "aten.is_nonzero.default", "aten.nonzero.default")


class Waits(TorchDispatchMode):
    """The names of operations that the host waits for."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [item for item in (*args, out) if isinstance(item, torch.Tensor)]
        between = len({tensor.device.type for tensor in tensors if tensor.dim() or tensor is out}) > 1
        if between or str(func) in READS:
            self.found.append(str(func))
        return out


def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(sizes, device="cuda", dtype=dtype)


def classes(*sizes: int) -> torch.Tensor:
    return empty(*sizes, dtype=torch.int64)


# A call of each op with everything it takes, and the shapes of what the op returns.
CALLS = {
    "competitors": (
        lambda: functional.competitors(empty(5, 7), classes(5), 2),
        [(5, 2), (5,), (5,), (0,), (5, 2), (5, 3), (5,)],
    ),
    "dual_norm": (lambda: functional.dual_norm([empty(5, 3, 4), empty(5, 3, 2)], "inf"), (5, 3, 2)),
    "row_distance": (lambda: functional.row_distance(empty(7, 4), classes(5, 3), classes(5), 2), (5, 3)),
    "margin_hinge": (lambda: margin_hinge([1.0, 2.0]), [(5,), (5, 3, 2)]),
    "margin_hinge, numbers": (lambda: margin_hinge(1.0), [(5,), (5, 3, 2)]),
    "one_to_n": (lambda: functional.one_to_n(empty(5, 7), classes(5), 0.5, reduction="none"), [(5,), (7,), (0,)]),
    "deepfool_step": (
        lambda: functional.deepfool_step(empty(5, 3), empty(5, 3, 4), empty(5, dtype=torch.bool), 2),
        [(5, 4), (5,), (5,), (5,)],
    ),
}


def margin_hinge(each) -> torch.Tensor:
    gap, norm = empty(5, 3), empty(5, 3, 2)
    return functional.margin_hinge(gap, norm, each, cap=each, layer_weights=each, min_norm=each, reduction="none")


@pytest.mark.parametrize("call", CALLS)
def test_the_host_waits_for_nothing(call, monkeypatch):
    run, shapes = CALLS[call]

    def op(*_):
        return empty(*shapes) if isinstance(shapes, tuple) else tuple(empty(*shape) for shape in shapes)

    monkeypatch.setattr(functional, "choose", lambda *_: ("cuda", op))
    with FakeTensorMode(), Waits() as waits:
        run()
    assert waits.found == []


@pytest.mark.parametrize("wait", [lambda: torch.tensor([1.0, 2.0], device="cuda"), lambda: empty(1).cpu()])
def test_a_wait_is_seen(wait):
    with FakeTensorMode(), Waits() as waits:
        wait()
    assert waits.found == ["aten._to_copy.default"]

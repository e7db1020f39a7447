"""The ops on DTensors: values, first and second derivatives of every op for every placement, as on the whole tensors.

And what sharding.py says of single tensors and graphs: borders where a process is left with a part.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from support.processes import NIGHTLY

from margin_kernels import OneToNLoss, sharding
from margin_kernels import functional as F

SIZES = (2, pytest.param(3, marks=NIGHTLY))
PLACEMENTS = ("Shard(0)", "Shard(1)", "Replicate()", "Partial()")
TOLERANCE = 1e-12


def samples() -> dict[str, torch.Tensor]:
    """Sizes that neither 2 nor 3 processes part evenly."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "logits": normal(7, 5),
        "target": torch.randint(5, (7,), generator=generator),
        "index": torch.randint(5, (7, 2), generator=generator),
        "gap": normal(7, 2),
        "gradients": normal(7, 2, 4),
        "others": normal(7, 2, 5),
        "rows": normal(5, 4),
        "norm": normal(7, 2, 3).abs() + 0.5,
    }


def competitors(t, backend):
    found = F.competitors(t["logits"], t["target"], 2, uniform=True, backend=backend)
    return found.nll.mean() + found.gap.square().mean() + found.phi.mean() + found.uniform.mean()


def one_to_n(t, backend):
    return F.one_to_n(t["logits"], t["target"], cross_entropy=True, backend=backend)


def dual_norm(t, backend):
    return F.dual_norm([t["gradients"], t["others"]], 3, backend=backend).square().mean()


def row_distance(t, backend):
    return F.row_distance(t["rows"], t["index"], t["target"], 3, backend=backend).square().mean()


def margin_hinge(t, backend):
    return F.margin_hinge(t["gap"], t["norm"], 2.0, aggregation="sum", backend=backend)


def deepfool_step(t, backend):
    found = F.deepfool_step(t["gap"], t["gradients"], None, 3, backend=backend)
    return found.step.square().mean() + found.distance.mean()


OPS = {
    "competitors": (competitors, ("logits",)),
    "one_to_n": (one_to_n, ("logits",)),
    "dual_norm": (dual_norm, ("gradients", "others")),
    "row_distance": (row_distance, ("rows",)),
    "margin_hinge": (margin_hinge, ("gap", "norm")),
    "deepfool_step": (deepfool_step, ("gap", "gradients")),
}


def derivatives(loss, inputs):
    """The loss, its gradients in the inputs and those of their squares."""
    from torch.distributed.tensor import DTensor

    def full(tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    first = torch.autograd.grad(loss, inputs, create_graph=True)
    second = torch.autograd.grad(sum(full(g).square().sum() for g in first), inputs, allow_unused=True)
    return [full(tensor).detach() for tensor in (loss, *first, *second) if tensor is not None]


def op_on_dtensors(
    rank: int, size: int, op: str, placement: str, backend: str, targets: str
) -> tuple[list[float], bool]:
    """The differences to the op on plain tensors, and whether the gradients are held as the inputs are."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    how = {"Shard(0)": Shard(0), "Shard(1)": Shard(1), "Replicate()": Replicate(), "Partial()": Partial()}[placement]

    def distributed(tensor):
        if isinstance(how, Partial):
            parts = tensor * (rank + 1) / sum(range(size + 1))
            return DTensor.from_local(parts, mesh, [how])
        return distribute_tensor(tensor, mesh, [how])

    function, names = OPS[op]
    plain = {name: tensor.requires_grad_(name in names) for name, tensor in samples().items()}
    shared = dict(plain)
    for name in names:
        shared[name] = distributed(plain[name].detach()).requires_grad_()
    if targets == "DTensor":
        for name in ("target", "index"):
            shared[name] = distribute_tensor(plain[name], mesh, [Shard(0)])
    expected = derivatives(function(plain, "auto"), [plain[name] for name in names])
    loss = function(shared, backend)
    inputs = [shared[name] for name in names]
    gradients: Any = torch.autograd.grad(loss, inputs, retain_graph=True)
    held = all(g.placements == (Replicate() if isinstance(how, Partial) else how,) for g in gradients)
    found = derivatives(loss, inputs)
    assert len(found) == len(expected)
    return [float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)], held


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("op", OPS)
def test_an_op_on_dtensors_is_the_op_on_the_whole_tensors(processes, op, placement, size) -> None:
    for differences, held in processes(size).run(op_on_dtensors, op, placement, "auto", "plain"):
        assert max(differences) <= TOLERANCE
        assert held


@pytest.mark.parametrize("placement", PLACEMENTS[:2])
@pytest.mark.parametrize("op", OPS)
def test_targets_may_be_dtensors_and_every_backend_takes_them(processes, op, placement) -> None:
    for differences, _ in processes(2).run(op_on_dtensors, op, placement, "reference", "DTensor"):
        assert max(differences) <= TOLERANCE


def targets_of_one_process(rank: int, size: int) -> str:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    logits = distribute_tensor(samples()["logits"], mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"target must have shape \[7\]") as error:
        F.competitors(logits, samples()["target"].tensor_split(size)[rank])
    return str(error.value)


def test_plain_targets_of_one_process_beside_sharded_logits_are_refused(processes) -> None:
    assert processes(2).run(targets_of_one_process) == [
        "target must have shape [7] to match logits, got [4]",
        "target must have shape [7] to match logits, got [3]",
    ]


def second_derivative_through_from_local(rank: int, size: int) -> tuple[bool, float]:
    """Of f = sum tanh(x W): whether d f / d x can be differentiated where x is handed over by from_local, and what
    d / dx of || d f / d x ||^2 is off by where x is a DTensor."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (4, 6)))
    columns = distribute_tensor(w, mesh, [Shard(1)])

    def gradient(x, to_dtensor, w):
        return torch.autograd.grad(torch.tanh(to_dtensor(x) @ w).sum(), x, create_graph=True)[0]

    def second(x, w):
        return torch.autograd.grad(gradient(x, lambda x: x, w).square().sum(), x)[0]

    handed = gradient(x.clone().requires_grad_(), lambda x: DTensor.from_local(x, mesh, [Replicate()]), columns)
    given = second(distribute_tensor(x, mesh, [Replicate()]).requires_grad_(), columns).full_tensor()
    return handed.requires_grad, float((given - second(x.clone().requires_grad_(), w)).abs().max())


def test_the_second_derivative_that_pytorch_loses_is_still_lost(processes) -> None:
    """When this fails PyTorch has mended from_local, and sharding.check_order may go."""
    for kept, difference in processes(2).run(second_derivative_through_from_local):
        assert not kept
        assert difference <= TOLERANCE


def borders(rank: int, size: int) -> dict[str, str | None]:
    """What is said of logits made in these ways."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    whole = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def held(*placements):
        return distribute_tensor(whole, mesh, placements).requires_grad_()

    def columns():
        return held(Shard(1)).to_local()

    made = {
        "a DTensor": lambda: held(Shard(1)),
        "its values": lambda: held(Shard(1)).full_tensor(),
        "replicated": lambda: held(Replicate()).to_local(),
        "columns": columns,
        "behind an operation": lambda: columns() * 2,
        "rows": lambda: held(Shard(0)).to_local(),
        "partial": lambda: DTensor.from_local(whole.clone().requires_grad_(), mesh, [Partial()]).to_local(),
        "partial gradient": lambda: held(Replicate()).to_local(grad_placements=[Partial()]),
        "gathered again": lambda: DTensor.from_local(columns(), mesh, [Shard(1)]),
        "beside a part": lambda: held(Replicate()).to_local() + columns().sum(),
    }
    said: dict[str, str | None] = {}
    for name, make in made.items():
        try:
            OneToNLoss()(make(), torch.zeros(6 // size if name == "rows" else 6, dtype=torch.int64))
            said[name] = None
        except ValueError as error:
            said[name] = str(error)
    return said


def test_logits_that_hold_a_part_are_refused_and_whole_ones_are_not(processes) -> None:
    for said in processes(2).run(borders):
        wrong = {name: sentence for name, sentence in said.items() if sentence is not None}
        assert set(said) - set(wrong) == {"a DTensor", "its values", "replicated", "gathered again"}
        assert all("a part of the logits on each process" in sentence for sentence in wrong.values())
        assert all("use_local_output=False" in sentence for sentence in wrong.values())
        assert "DTensor.to_local() with placements Shard(dim=1)" in wrong["columns"]
        assert "Partial(sum)" in wrong["partial gradient"]


def without_layouts(rank: int, size: int) -> str:
    """What is said where another PyTorch names the layouts otherwise."""
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (size,))
    held: Any = distribute_tensor(samples()["logits"], mesh, [Replicate()]).requires_grad_()
    logits = held.to_local()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sharding.LAYOUTS, sharding.TO_LOCAL, (lambda node: node.specification,))
        with pytest.raises(ValueError, match="does not show the layouts of DTensors") as error:
            OneToNLoss()(logits, samples()["target"])
    return str(error.value)


def test_layouts_that_cannot_be_read_are_refused(processes) -> None:
    assert all("use torch 2.13" in said for said in processes(2).run(without_layouts))


def test_the_import_does_not_bring_dtensors() -> None:
    code = "import sys, margin_kernels; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What the op tests cannot see of the Triton backend: compilation for a GPU without one, targets that only a GPU lets
through, opcheck, rows that several programs share, and why the backend does not run."""

import ast
import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import ROOT
from torch.library import opcheck

from margin_kernels import BackendError, backends, functional
from margin_kernels import triton as triton_backend
from margin_kernels.testing import sample_gradients, sample_logits

installed = pytest.mark.skipif(triton_backend.NOT_INSTALLED is not None, reason=str(triton_backend.NOT_INSTALLED))
interpreter = pytest.mark.skipif(not triton_backend.INTERPRETED, reason="needs --backend triton (TRITON_INTERPRET=1)")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=clean | environment, capture_output=True, text=True, timeout=900
    )


@installed
@interpreter  # minutes, and once is enough: `make test-triton` has it, `make test` has not
@pytest.mark.parametrize("op", triton_backend.OPS)
def test_every_kernel_compiles_for_sm_90_without_spills(op):
    result = run_python("-m", "margin_kernels.triton.compile_check", op)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(op)]
    assert {row[1] for row in rows} >= {"_forward", "_backward"} or op in ("one_to_n", "deepfool_step")
    assert {row[2] for row in rows} == {"float64", "float32", "bfloat16", "float16"}
    for row in rows:
        registers, spills, _, float64 = map(int, row[-4:])
        assert 0 < registers < 255 and spills == 0
        assert (float64 == 0) == (row[2] != "float64"), row  # an eps or a delta in float64 promotes nothing


@installed
@interpreter
def test_a_schedule_of_eps_or_delta_compiles_every_kernel_once():
    code = """
import torch
from margin_kernels.testing import sample_gradients, sample_logits
from margin_kernels.triton.compile_check import compile_only, forward_and_backward

logits, target = sample_logits(2, 10)
with compile_only() as launched:
    def entries():
        found = {kernel.__module__.split(".")[-1] + kernel.__name__: kernel for kernel, _ in launched}
        return {name: len(kernel.device_caches[0][0]) for name, kernel in found.items()}

    def hinge(eps, aggregation):
        leaves = sample_gradients(2, 3).requires_grad_(), sample_gradients(2, 3, 5).requires_grad_()
        forward_and_backward("margin_hinge", (*leaves, *[torch.ones(5)] * 4, eps, aggregation, "mean"))

    for value in (1e-6, 0.1, 0.0, 1.0, 1e-40, 1e300, float("inf")):
        hinge(value, "max")
        for bound in ("positive", "symmetric"):
            forward_and_backward("one_to_n", (logits.requires_grad_(), target, value, bound, True))
    print(entries())
    hinge(1e-6, "sum")
    print(entries())
"""
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    one, other = map(ast.literal_eval, result.stdout.splitlines())
    names = ("columns", "merge", "losses", "weights", "class_sums", "backward")
    assert one == {f"one_to_n_{name}": 1 for name in names} | {"margin_hinge_forward": 1, "margin_hinge_backward": 1}
    assert other["margin_hinge_forward"] == other["margin_hinge_backward"] == 2  # so the entries do count


@installed
def test_every_launch_is_on_the_device_of_its_tensor(monkeypatch):
    from margin_kernels.triton.launch import launch

    current = ["cuda:0"]

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **constants: launches.append((grid, arguments, current[-1]))

    launches = []
    monkeypatch.setattr(torch.cuda, "device", device)
    tensor = SimpleNamespace(is_cuda=True, device="cuda:1")
    launch(Kernel(), (3, 2), tensor, 7)
    launch(Kernel(), (3, 0), tensor, 7)
    assert launches == [((3, 2), (7,), "cuda:1")] and current == ["cuda:0"]
    on_cpu = SimpleNamespace(is_cuda=False, device="cpu")
    launch(Kernel(), (1,), on_cpu)
    assert launches[1:] == [((1,), (), "cuda:0")]


def test_no_kernel_is_launched_but_by_launch():
    """A launch is a call of what is subscripted with a grid: no other file has one."""
    folder = ROOT / "margin_kernels" / "triton"
    calls = {}
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text())
        calls[file.name] = sum(isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript) for n in ast.walk(tree))
    assert calls.pop("launch.py") == 2 and set(calls.values()) == {0}


class Reads:
    """How often each element of a tensor is read by the kernels that the interpreter runs."""

    def __init__(self, monkeypatch, tensor):
        from triton.runtime.interpreter import InterpreterBuilder

        self.counts = torch.zeros(tensor.shape, dtype=torch.int64)
        flat, first, size = self.counts.view(-1), tensor.data_ptr(), tensor.element_size()
        assert tensor.is_contiguous()
        load = InterpreterBuilder.create_masked_load

        def counted(builder, pointers, mask, *arguments):
            places = torch.from_numpy(pointers.data[mask.data].astype("int64")) - first
            places = places[(places >= 0) & (places < flat.numel() * size)] // size
            flat.index_add_(0, places, torch.ones_like(places))
            return load(builder, pointers, mask, *arguments)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)


@interpreter
@pytest.mark.parametrize("classes,k", [(100, 5), (2048, 3), (5001, 1), (5001, 4), (70001, 3)])
@pytest.mark.parametrize("uniform", [False, True])
def test_competitors_read_a_row_once(monkeypatch, classes, k, uniform):
    logits, target = sample_logits(2, classes)
    reads = Reads(monkeypatch, logits)
    functional.competitors(logits, target, k, uniform=uniform, backend="triton")
    assert reads.counts.min() == 1
    again = reads.counts.sum(1) - classes
    programs = -(-classes // 16384) if classes > 65536 else 1
    labels = programs + (programs > 1)  # each program reads the label's logit, and so does the one that merges
    # A lane of each program, behind every competitor but the last, reads its part of the row once more.
    lane = 0 if classes <= 2048 else -(-min(classes, 16384) // 2048)
    assert (again >= labels).all() and (again <= labels + programs * (k - 1) * lane).all()


def test_importing_the_package_does_not_import_triton():
    result = run_python("-c", "import margin_kernels, sys; print('triton' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


@installed
def test_a_cpu_tensor_is_refused_outside_the_interpreter():
    code = (
        "import torch, margin_kernels as mk\n"
        "try: mk.functional.competitors(torch.eye(3), torch.arange(3), backend='triton')\n"
        "except mk.BackendError as error: print(error)"
    )
    said = run_python("-c", code).stdout
    assert said.startswith(
        "backend 'triton' cannot run competitors: the Triton kernels run on CUDA tensors and got one"
    )
    assert "set TRITON_INTERPRET=1 before margin_kernels is imported" in said


def test_a_missing_triton_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: None)
    reason = triton_backend._why_not_installed()
    assert reason == "triton is not installed: pip install 'triton>=3.6' (Linux)"
    monkeypatch.setattr(triton_backend, "NOT_INSTALLED", reason)
    with pytest.raises(BackendError, match=r"backend 'triton' cannot run competitors: triton is not installed: pip"):
        functional.competitors(torch.eye(3), torch.arange(3), backend="triton")


@pytest.mark.parametrize("version,usable", [("3.5.1", False), ("3.6.0", True), ("3.10.0+git12", True), ("4.0", True)])
def test_an_old_triton_is_named_with_the_remedy(monkeypatch, version, usable):
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(triton_backend.metadata, "version", lambda name: version)
    reason = triton_backend._why_not_installed()
    assert reason is None if usable else reason == "triton 3.5.1 is older than 3.6: pip install 'triton>=3.6' (Linux)"


@interpreter
def test_functorch_wrappers_are_refused():
    logits, target = sample_logits(3, 4)
    with pytest.raises(BackendError, match=r"torch\.func transforms: pass backend='reference'"):
        torch.func.vmap(lambda z, y: functional.competitors(z[None], y[None], backend="triton").nll)(logits, target)


@interpreter
def test_auto_does_not_take_the_interpreter():
    assert backends.choose("competitors", (torch.zeros(1, 2),))[0] != "triton"


@interpreter
def test_a_target_outside_the_classes_gives_nan():
    """The checks of the public functions let it through on a GPU alone, where they do not read it."""
    from margin_kernels.triton import ops

    logits, target = sample_logits(4, 100)
    target[1], target[2] = 100, -1
    logits.requires_grad_()
    gap, nll, phi, _, index = ops.competitors(logits, target, 2)
    bad = torch.tensor([False, True, True, False])
    assert torch.equal(nll.isnan(), bad) and torch.equal(gap.isnan().all(1), bad)
    assert torch.equal(phi.isnan(), bad)
    assert index[1].tolist() == index[2].tolist() == [1, 2]  # legal, and those of the reference
    (grad,) = torch.autograd.grad(nll.sum() + gap.sum(), logits, create_graph=True)
    assert torch.equal(grad.isnan().all(1), bad) and grad[~bad].isfinite().all()
    (second,) = torch.autograd.grad(grad.sum(), logits)
    assert torch.equal(second.isnan().all(1), bad)

    loss = ops.one_to_n(logits, target, 1.0, "symmetric", False)
    assert loss.isnan().all()

    rows, pairs = sample_gradients(10, 33).requires_grad_(), torch.tensor([[1, 2], [3, 10], [-1, 0]])
    norm = ops.row_distance(rows, pairs, torch.tensor([0, 1, 12]), 2)
    assert norm.isnan().tolist() == [[False, False], [False, True], [True, True]]
    weight = torch.where(norm.isnan(), float("nan"), 1.0)
    (grad,) = torch.autograd.grad(norm, rows, weight)
    assert grad.isfinite().all() and (grad[4:] == 0).all() and grad[:4].abs().sum(1).gt(0).all()


@interpreter
@pytest.mark.parametrize("k", [1, 3])
def test_rows_of_many_classes_are_shared_by_several_programs(k):
    logits, target = sample_logits(2, 70001)
    logits[0, [5, 40000, 69999]] = logits[0].max() + 1  # ties in three chunks
    logits = logits.requires_grad_()
    ours, truth = (functional.competitors(logits, target, k, backend=b) for b in ("triton", "reference"))
    assert torch.equal(ours.competitor, truth.competitor) and torch.equal(ours.gap, truth.gap)
    assert torch.allclose(ours.nll, truth.nll, rtol=1e-6)
    a, b = (torch.autograd.grad(r.nll.sum() + r.gap.sum(), logits)[0] for r in (ours, truth))
    assert torch.allclose(a, b, atol=1e-6)
    with torch.no_grad():
        logits[1, 69000] = float("nan")
    assert functional.competitors(logits, target, k, backend="triton").nll.isnan().tolist() == [False, True]


@interpreter
@pytest.mark.parametrize("p", [1, 1.25, 2, 3, float("inf")])
@pytest.mark.parametrize("largest", [0, 33000, 69999])
def test_long_rows_are_shared_by_several_programs(p, largest):
    g = sample_gradients(2, 1, 70000)
    g[0, 0, largest] = 1e20
    norms = functional.dual_norm([g], p, backend="triton")
    assert torch.allclose(norms, functional.dual_norm([g.double()], p, backend="reference").float(), rtol=2e-6)
    g[1, 0, largest] = float("nan")
    assert functional.dual_norm([g], p, backend="triton").isnan().flatten().tolist() == [False, True]


@interpreter
def test_more_layers_than_one_launch_holds():
    layers = [sample_gradients(2, 3, length, seed=length) for length in range(1, 19)]
    norms = functional.dual_norm(layers, 2, backend="triton")
    assert torch.allclose(norms, functional.dual_norm(layers, 2, backend="reference"), rtol=1e-6)
    alone = functional.dual_norm(layers[11:12], 2, backend="triton")
    assert torch.equal(alone[..., 0], norms[..., 11])  # the other layers of a launch change no bit


def op_samples():
    """(name, arguments) of every custom op, forward and backward, away from kinks."""
    from margin_kernels.triton import ops  # noqa: F401  # registers the ops

    library = torch.ops.margin_kernels_triton
    logits, target = sample_logits(3, 5)
    logits.requires_grad_()
    gap, nll, phi, uniform, index, normalizer = library.competitors(logits, target, 2, 3, True)
    layers = [sample_gradients(2, 2, 5).requires_grad_(), sample_gradients(2, 2, 2, 2, seed=1).requires_grad_()]
    norms = library.dual_norm(layers, 3.0, 2).detach()
    gaps, sizes = torch.randn(3, 2, requires_grad=True), (0.5 + torch.rand(3, 2, 2)).requires_grad_()
    hinge = (
        gaps,
        sizes,
        torch.tensor([0.5, 1.0]),
        torch.tensor([0.7, 0.9]),
        None,
        torch.tensor([0.6, 0.0]),
        1e-6,
        "max",
        "mean",
    )
    rows = sample_gradients(5, 4).requires_grad_()
    distances = library.row_distance(rows, index, target, 3.0).detach()
    _, column, row_sums = library.one_to_n(logits, target, 1.4567, "positive", True)
    gradients, active = sample_gradients(3, 2, 4).requires_grad_(), torch.tensor([True, False, True])
    step, distance, choice, norm = library.deepfool_step(gaps, gradients, active, 3.0)

    def like(tensor):
        return torch.randn_like(tensor).requires_grad_()

    return [
        ("competitors", (logits, target, 2, -100, False)),
        ("competitors", (logits, target, 2, 3, True)),
        (
            "competitors_backward",
            (like(gap), like(nll), like(phi), like(uniform), logits, target, index, normalizer.detach()),
        ),
        ("dual_norm", (layers, 3.0, 2)),
        ("dual_norm_backward", (like(norms), layers, norms, 3.0, 2)),
        ("row_distance", (rows, index, target, 3.0)),
        ("row_distance_backward", (like(distances), rows, index, target, distances, 3.0)),
        ("margin_hinge", hinge),
        ("margin_hinge_backward", (torch.randn(3, requires_grad=True), *hinge, True)),
        ("one_to_n", (logits, target, 1.4567, "positive", True)),
        (
            "one_to_n_backward",
            (like(nll), logits, target, column.detach(), row_sums.detach(), 1.4567, "positive", True),
        ),
        ("deepfool_step", (gaps, gradients, active, 3.0)),
        (
            "deepfool_step_backward",
            (like(step), like(distance), gaps, gradients, choice, norm.detach(), active, 3.0),
        ),
    ]


@interpreter
@pytest.mark.parametrize("which", range(2 * len(triton_backend.OPS) + 1))
def test_opcheck(which):
    name, arguments = op_samples()[which]
    results = opcheck(getattr(torch.ops.margin_kernels_triton, name).default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@interpreter
def test_every_custom_op_is_checked():
    from margin_kernels.triton import ops  # noqa: F401

    schemas = torch._C._jit_get_all_schemas()
    declared = {s.name.split("::")[1] for s in schemas if s.name.startswith("margin_kernels_triton::")}
    assert declared == {name for name, _ in op_samples()}

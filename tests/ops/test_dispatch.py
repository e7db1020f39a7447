"""The compiled ops as PyTorch sees them: schemas, shape functions, torch.compile, torch.func, choice of backend."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.op_samples import op_samples
from torch.library import opcheck

import margin_kernels
from margin_kernels import BackendError, backends, functional
from margin_kernels.testing import sample_gradients, sample_logits

needs_extension = pytest.mark.skipif(backends.EXTENSION is None, reason=str(backends.EXTENSION_ERROR))


@needs_extension
@pytest.mark.parametrize("which", range(14))
def test_opcheck(which):
    name, arguments = op_samples()[which]
    results = opcheck(getattr(torch.ops.margin_kernels, name).default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@needs_extension
def test_every_schema_is_checked():
    declared = {s.name.split("::")[1] for s in torch._C._jit_get_all_schemas() if s.name.startswith("margin_kernels::")}
    assert declared == {name for name, _ in op_samples()}


def margin_loss(logits, target, layers, backend="auto"):
    result = functional.competitors(logits, target, 2, uniform=True, backend=backend)
    norm = functional.dual_norm(layers, 2, backend=backend)
    step = functional.deepfool_step(result.gap, layers[-1], None, 3, backend=backend)
    total = functional.margin_hinge(result.gap, norm, 1.0, backend=backend) + result.nll.mean()
    total = total + 0.5 * result.phi.mean() + result.uniform.mean()
    total = total + functional.row_distance(logits.t(), result.competitor[:, :1], target, 3, backend=backend).mean()
    return total + functional.one_to_n(logits, target, backend=backend) + step.distance.mean() + step.step.mean()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph_with_the_gradients_of_eager(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(margin_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (4, 6):
        logits, target = sample_logits(n, 7)
        layers = [sample_gradients(n, 2, 5), sample_gradients(n, 2, 3, 3, seed=1)]
        leaves = [logits.requires_grad_(), *(g.requires_grad_() for g in layers)]
        ours = compiled(logits, target, layers, backend)
        eager = margin_loss(logits, target, layers, backend)
        assert torch.allclose(ours, eager)
        for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(eager, leaves), strict=True):
            assert b.abs().max() > 0 and torch.allclose(a, b, atol=1e-7)


def test_inductor_runs_the_ops(backend):
    torch._dynamo.reset()
    logits, target = sample_logits(5, 9)
    logits.requires_grad_()
    layers = [sample_gradients(5, 2, 6)]
    ours = torch.compile(margin_loss, fullgraph=True)(logits, target, layers, backend)
    eager = margin_loss(logits, target, layers, backend)
    assert torch.allclose(ours, eager)
    assert torch.allclose(torch.autograd.grad(ours, logits)[0], torch.autograd.grad(eager, logits)[0], atol=1e-7)


def test_torch_func_transforms_run_on_the_reference():
    logits, target = sample_logits(4, 6, torch.float64)

    def nll_and_gap(z, y):
        result = functional.competitors(z[None], y[None], 2, backend="reference")
        return result.nll[0] + result.gap.sum() + 2 * result.phi[0]

    per_sample = torch.func.vmap(torch.func.grad(nll_and_gap))(logits, target)
    logits.requires_grad_()
    result = functional.competitors(logits, target, 2, backend="reference")
    (whole,) = torch.autograd.grad(result.nll.sum() + result.gap.sum() + 2 * result.phi.sum(), logits)
    assert torch.allclose(per_sample, whole)


@needs_extension
def test_a_named_backend_that_cannot_run_says_why_and_what_to_do():
    logits, target = sample_logits(2, 3)
    why = "got one on cpu: move it" if backends.HAS_CUDA else "without CUDA: reinstall with"
    with pytest.raises(BackendError, match=rf"backend 'cuda' cannot run competitors: .* {why}"):
        functional.competitors(logits, target, backend="cuda")
    with pytest.raises(BackendError, match=r"torch\.func transforms: pass backend='reference'"):
        torch.func.vmap(lambda z, y: functional.competitors(z[None], y[None], backend="cpu").nll)(logits, target)
    with pytest.raises(ValueError, match="backend must be one of auto, cuda, cpu, triton, reference, got 'gpu'"):
        functional.competitors(logits, target, backend="gpu")


def test_the_environment_changes_auto_only(monkeypatch):
    tensors = (torch.zeros(1, 2),)
    monkeypatch.setenv("MARGIN_KERNELS_BACKEND", "reference")
    assert backends.choose("competitors", tensors)[0] == "reference"
    if backends.EXTENSION is not None:
        assert backends.choose("competitors", tensors, "cpu")[0] == "cpu"
    monkeypatch.setenv("MARGIN_KERNELS_BACKEND", "abacus")
    with pytest.raises(ValueError, match="got 'abacus'"):
        backends.choose("competitors", tensors)


@needs_extension
def test_the_pybind_functions_are_differentiable():
    logits, target = sample_logits(3, 5)
    logits.requires_grad_()
    gap, nll, *_ = backends.EXTENSION.competitors(logits, target, 2)
    (grad,) = torch.autograd.grad(gap.sum() + nll.sum(), logits)
    result = functional.competitors(logits, target, 2, backend="reference")
    assert torch.allclose(grad, torch.autograd.grad(result.gap.sum() + result.nll.sum(), logits)[0], atol=1e-6)


def output_of(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@needs_extension
def test_an_extension_built_for_another_torch_is_named_with_the_remedy():
    out = output_of(
        "import torch, warnings; torch.__version__ = '9.9.9'; seen = warnings.catch_warnings(record=True).__enter__(); "
        "warnings.simplefilter('always'); import margin_kernels as mk; print(seen[-1].message); "
        "print(mk.functional.competitors(torch.eye(3), torch.tensor([0, 1, 2])).nll)"
    )
    version = torch.__version__.split("+")[0]
    assert (
        f"margin_kernels._C was built for torch {version} and this is torch 9.9.9: reinstall with 'pip install" in out
    )
    assert "0.5514" in out  # the reference still runs


def test_a_missing_extension_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(backends.pkgutil, "iter_modules", lambda path: [])
    extension, reason = backends._load_extension()
    assert extension is None
    assert reason.startswith("the compiled extension margin_kernels._C was not built: reinstall with 'pip install")


@needs_extension
def test_an_extension_built_before_an_op_existed_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(backends, "EXTENSION", SimpleNamespace(build_info=backends.EXTENSION.build_info))
    logits, target = sample_logits(4, 5)
    with pytest.raises(BackendError, match=r"_C was built from a source without one_to_n: reinstall with 'pip install"):
        functional.one_to_n(logits, target, backend="cpu")
    expected = functional.one_to_n(logits, target, backend="reference")
    assert torch.equal(functional.one_to_n(logits, target), expected)  # "auto" still runs


@needs_extension
def test_results_are_the_same_for_every_instruction_set():
    """MARGIN_KERNELS_ISA asks for less than the processor has; only the last digits may differ."""
    code = (
        "import torch, margin_kernels as mk; from margin_kernels.testing import *; "
        "z, y = sample_logits(5, 333); r = mk.functional.competitors(z, y, 3, uniform=True, backend='cpu'); "
        "g = sample_gradients(2, 2, 5001); "
        "n = torch.stack([mk.functional.dual_norm([g], p, backend='cpu') for p in (4 / 3, 1.5, 1.75, 2, 3, 4, 5)]); "
        "l = mk.functional.one_to_n(z, y, reduction='none', backend='cpu'); "
        "d = mk.functional.row_distance(z, y[:, None] % 5, y % 4, 3, backend='cpu'); "
        "s = mk.functional.deepfool_step(r.gap[:2, :2], g, None, 3, backend='cpu'); "
        "print([*r.competitor.flatten().tolist(), *r.gap.flatten().tolist(), *r.nll.tolist(), "
        "*r.phi.tolist(), *r.uniform.tolist(), *n.flatten().tolist(), "
        "*l.tolist(), *d.flatten().tolist(), *s.distance.tolist(), *s.step[:, :40].flatten().tolist()])"
    )
    first, *others = (eval(output_of(code, MARGIN_KERNELS_ISA=isa)) for isa in ("", "avx2", "baseline"))
    for other in others:
        assert other == pytest.approx(first, rel=1e-6)


def test_info_says_what_runs_here_and_why_the_rest_does_not():
    out = output_of("import runpy; runpy.run_module('margin_kernels.info', run_name='__main__')")
    assert f"margin_kernels {margin_kernels.__version__}" in out and f"torch          {torch.__version__}" in out
    assert "reference" in out and "cuda" in out and "competitors" in out

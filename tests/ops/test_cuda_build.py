"""An extension that was compiled with the CUDA kernels, linked and imported: what can be seen of it without a GPU.

Fake tensors on the device "cuda" have shapes and dtypes, and no numbers: no kernel is launched.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.op_samples import op_samples
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from margin_kernels import backends

pytestmark = pytest.mark.skipif(not backends.HAS_CUDA, reason="margin_kernels._C was built without CUDA")

SAMPLES = range(14)  # of op_samples
CPU_ONLY = {"convolution_input_gradient"}


def fake(argument: Any) -> Any:
    """The same shapes, strides and dtypes on the device "cuda"; to be called under FakeTensorMode."""

    def on_cuda(tensor: Tensor) -> Tensor:
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
        return twin.requires_grad_(tensor.requires_grad)

    return tree_map_only(Tensor, on_cuda, argument)


def metadata(values: Any) -> list[tuple[torch.Size, torch.dtype, bool]]:
    return [(t.shape, t.dtype, t.requires_grad) for t in tree_leaves(values) if isinstance(t, Tensor)]


def call_the_node_of(outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """What the autograd node of an op returns for gradients of ones, with its graph.

    The engine is not asked: for a tensor on "cuda" it wants a device.
    """
    node = next(t.grad_fn for t in outputs if t.grad_fn is not None)
    found = node(*(torch.ones_like(t) if t.requires_grad else None for t in outputs))
    return list(found) if isinstance(found, tuple) else [found]


def samples(dtype: torch.dtype) -> list[tuple[str, tuple[Any, ...]]]:
    def convert(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    return [(name, tree_map_only(Tensor, convert, arguments)) for name, arguments in op_samples()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("which", SAMPLES)
def test_shapes_and_dtypes_are_those_of_the_cpu(which: int, dtype: torch.dtype) -> None:
    name, arguments = samples(dtype)[which]
    op = getattr(torch.ops.margin_kernels, name).default
    outputs = op(*arguments)
    with FakeTensorMode():
        on_cuda = op(*fake(arguments))
        assert {t.device.type for t in tree_leaves(on_cuda)} == {"cuda"}
        assert metadata(on_cuda) == metadata(outputs)
        gradients = call_the_node_of(tree_leaves(on_cuda))
    truth = call_the_node_of(tree_leaves(outputs))
    assert [g is None for g in gradients] == [g is None for g in truth]
    assert metadata(gradients) == metadata(truth) and any(g is not None for g in truth)
    assert {g.device.type for g in gradients if g is not None} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_leaves_as_float32_and_its_gradients_as_they_came(dtype: torch.dtype) -> None:
    ops = torch.ops.margin_kernels
    with FakeTensorMode():
        logits = torch.empty(4, 7, dtype=dtype, device="cuda", requires_grad=True)
        target = torch.zeros(4, dtype=torch.int64, device="cuda")
        gradients = torch.empty(4, 2, 3, 5, dtype=dtype, device="cuda", requires_grad=True)
        gap, nll, phi, uniform, index, normalizer, valid = ops.competitors(logits, target, 2, -100, True)
        norm, gamma = ops.dual_norm([gradients], 2.0, 2), torch.ones(1, device="cuda")
        step, *rest = ops.deepfool_step(gap, gradients, None, 2.0)
        results = {
            "competitors": (gap, nll, phi, uniform, index, normalizer, valid),
            "dual_norm": (norm,),
            "row_distance": (ops.row_distance(logits, index, target, 2.0),),
            "margin_hinge": ops.margin_hinge(gap, norm, gamma, None, None, None, 1e-6, "max", "mean"),
            "one_to_n": ops.one_to_n(logits, target, 1.0, "symmetric", True),
            "deepfool_step": (step, *rest),
        }
        assert step.dtype == dtype and step.shape == (4, 3, 5)
        for op, outputs in results.items():
            floating = {t.dtype for t in outputs if t.is_floating_point() and t is not step}
            assert floating == {torch.float32} and all(t.is_cuda for t in outputs), op
            arriving = {g.dtype for g in call_the_node_of(outputs) if g is not None}
            # A gap and a norm are float32, as the ops gave them.
            assert arriving == {"margin_hinge": {torch.float32}, "deepfool_step": {torch.float32, dtype}}.get(
                op, {dtype}
            ), op


def test_every_sample_is_covered() -> None:
    assert len(op_samples()) == len(SAMPLES)


def test_every_op_has_a_cuda_kernel() -> None:
    names = {name for name, _ in op_samples()}
    missing = {n for n in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"margin_kernels::{n}", "CUDA")}
    assert missing == CPU_ONLY


def test_auto_takes_the_cuda_kernels_for_a_tensor_on_cuda() -> None:
    with FakeTensorMode():
        logits = torch.empty(2, 3, device="cuda")
        for op in ("competitors", "dual_norm", "row_distance", "margin_hinge", "one_to_n", "deepfool_step"):
            assert backends.choose(op, (logits,))[0] == "cuda"

"""The helpers that read PyTorch's private graph mean what they say; an unknown PyTorch is refused."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from margin_kernels import LargeMarginLoss, MarginTask
from margin_kernels.gradients import autograd_graph
from margin_kernels.gradients.autograd_graph import (
    Graph,
    made_before,
    saved,
    saved_dim,
    saved_dims,
    sequence_now,
    shape_of,
)
from margin_kernels.gradients.structure import by_sample, locate, per_sample

needs_extension = pytest.mark.skipif(autograd_graph.refusal() is not None, reason="the compiled extension is missing")


def graph() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Graph]:
    x = torch.arange(6.0).reshape(2, 3).requires_grad_()
    h = x * 2
    z = h.sin() + h.sum(-1, keepdim=True)
    return x, h, z, Graph(z)


def test_nodes_come_breadth_first_and_each_knows_its_readers() -> None:
    _, h, z, found = graph()
    names = [node.name() for node in found.nodes]
    assert names == ["AddBackward0", "SinBackward0", "SumBackward1", "MulBackward0", autograd_graph.LEAF]
    assert found.top is z.grad_fn and found.places[h.grad_fn] == 3
    readers = {(reader.name(), number) for reader, number in found.readers_of(get_gradient_edge(h))}
    assert readers == {("SinBackward0", 0), ("SumBackward1", 0)}
    assert found.above([h.grad_fn]) == set(found.nodes[:4])


@needs_extension
def test_signatures_are_equal_where_graphs_look_alike() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    class Same(Twice):
        pass

    def signature(function, *shape: int) -> bytes:
        x = torch.randn(shape or (2, 3), requires_grad=True)
        return Graph(function(x, torch.tanh(x))).signature

    functions = [
        lambda x, h: x - h,
        lambda x, h: h - x,
        lambda x, h: (x - h) * 2,
        lambda x, h: x.sin() - h,
        lambda x, h: x.cos() - h,
        lambda x, h: Twice.apply(x) - h,
        lambda x, h: Same.apply(x) - h,
        lambda x, h: x.unbind(0)[0] - h,
        lambda x, h: x.unbind(0)[1] - h,
        lambda x, h: x.detach() - h,
    ]
    found = [signature(function) for function in functions]
    assert all(found) and len(set(found)) == len(found)
    assert found == [signature(function) for function in functions]
    assert signature(functions[0], 3, 2) != found[0] != signature(functions[0], 2, 3, 1)
    *_, z, read = graph()
    assert read.nodes == autograd_graph._breadth_first(z)
    assert Graph(z).signature == read.signature != Graph(z, sequence_now()).signature


def test_shapes_and_saved_arguments() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    assert tuple(shape_of(x.unbind(1)[0].grad_fn, 2)) == (2, 4)
    assert saved_dim(x.softmax(-1).grad_fn, "dim", 3) == 2
    assert saved_dims(x.sum((-1, 0)).grad_fn, "dim", 3) == [2, 0]
    assert saved_dims(x.amax(()).grad_fn, "dim", 3) == [0, 1, 2]
    assert saved(x.sum(-1, keepdim=True).grad_fn, "keepdim") is True and saved(x.sin().grad_fn, "keepdim") is None


def test_the_time_of_making_tells_what_was_there_before() -> None:
    x = torch.ones(2, requires_grad=True)
    before = x * 2
    now = sequence_now()
    after = before * 2
    assert made_before(before.grad_fn, now) and not made_before(after.grad_fn, now)
    assert not made_before(get_gradient_edge(x).node, now)


def test_gradients_at_ends_are_those_of_torch() -> None:
    x, h, z, _ = graph()
    other = torch.zeros(2, requires_grad=True)
    ends, roots, seeds = [x, h, other], [get_gradient_edge(z), get_gradient_edge(h)], [torch.randn(2, 3) for _ in "ab"]
    for keep_graph in (True, False):
        expected = torch.autograd.grad(roots, ends, seeds, retain_graph=True, allow_unused=True)
        found = autograd_graph.gradients_at(ends, roots, seeds, keep_graph)
        assert found[2] is expected[2] is None
        assert all(torch.equal(a, b) for a, b in zip(found[:2], expected[:2], strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        autograd_graph.gradients_at(ends, roots, seeds, False)
    assert x.grad is None


@needs_extension
def test_hooks_are_seen_silenced_and_there_again() -> None:
    _, h, z, found = graph()
    assert found.hooked() == {}
    h.register_hook(lambda grad: 10 * grad)
    h.retain_grad()
    assert list(found.hooked()) == [h.grad_fn]
    with found.silenced():
        (silent,) = torch.autograd.grad(z.sum(), h, retain_graph=True)
    (loud,) = torch.autograd.grad(z.sum(), h, retain_graph=True)
    torch.testing.assert_close(loud, 10 * silent)
    h.grad = None
    z.sum().backward()
    torch.testing.assert_close(h.grad, loud)


@needs_extension
def test_hooks_of_torch_distributed_are_no_hooks_of_the_user() -> None:
    def hook(grad: torch.Tensor) -> None:
        return None

    hook.__module__ = "torch.distributed.fsdp"
    _, h, _, found = graph()
    h.register_hook(hook)
    assert found.hooked() == {}


@needs_extension
def test_a_tensor_at_an_edge_gets_its_gradient() -> None:
    x, h, _, found = graph()
    stand_in = found.tensor_at(h.grad_fn, 0)
    assert stand_in.shape == h.shape and stand_in.grad_fn is h.grad_fn
    (grad,) = torch.autograd.grad((3 * stand_in).sum(), x)
    assert torch.equal(grad, torch.full((2, 3), 6.0))


@needs_extension
def test_redirected_edges_lead_elsewhere_and_back() -> None:
    _, h, z, found = graph()
    end = torch.zeros(2, 3, requires_grad=True)
    with found.redirected([(1, 0, 0), (2, 0, -1)], [end]):
        (moved,) = torch.autograd.grad([GradientEdge(z.grad_fn, 0)], end, torch.ones(2, 3), retain_graph=True)
    torch.testing.assert_close(moved, h.detach().cos())
    (whole,) = torch.autograd.grad(z.sum(), h)
    torch.testing.assert_close(whole, h.detach().cos() + 3)


def test_where_the_batch_is() -> None:
    assert locate((4, 3, 5), 15, 4) == (0, 1)  # [N,T,E]
    assert locate((3, 4, 5), 5, 4) == (1, 1)  # [T,N,E]
    assert locate((12, 5), 15, 4) == (0, 3)  # [N*T,E]
    assert locate((12, 5), 5, 4) == (0, 1)  # [T*N,E]
    assert locate((2, 2, 5), 5, 4) is None  # spread over two dimensions
    tensor = torch.arange(60).reshape(12, 5)
    assert torch.equal(by_sample(tensor, 15, 4), tensor.reshape(4, 15))
    assert torch.equal(by_sample(tensor, 5, 4), tensor.reshape(3, 4, 5).movedim(1, 0).reshape(4, 15))
    factor = torch.tensor([1, 2, 3, 4])
    for stride in (15, 5):
        weighted = tensor * per_sample(factor, tensor.shape, stride)
        assert torch.equal(by_sample(weighted, stride, 4), by_sample(tensor, stride, 4) * factor[:, None])


def test_an_unknown_pytorch_takes_the_loop_and_says_so(monkeypatch) -> None:
    autograd_graph.refusal.cache_clear()
    monkeypatch.setattr(torch, "__version__", "3.0.0")
    try:
        task = MarginTask(nn.Linear(4, 3), LargeMarginLoss(), passes="split")
        x, y = torch.randn(2, 4), torch.tensor([0, 1])
        with pytest.raises(ValueError, match=r"the autograd graph of torch 3\.0\.0 was never checked"):
            task(x, y)
        task.passes = "auto"
        assert task(x, y)["loss"].requires_grad
    finally:
        autograd_graph.refusal.cache_clear()

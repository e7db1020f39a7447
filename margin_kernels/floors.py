"""The passes of a step, each by itself on graphs that are kept: what no step that needs them can undercut.

forward           logits with a graph
tangent           logits without one: the work of one tangent through the network
pass              gradients of a class difference at taps, or at the outputs of all layers with parameters; no weights
own pass          the same by the package, which has another kernel for the input of a thin convolution
weights           the gradients of the parameters of layers from those at the outputs of these layers, one engine run
backward          the gradients of all parameters
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.functional import one_hot
from torch.utils._pytree import tree_leaves, tree_map

from .gradients.loop import Passes as BackwardPasses
from .gradients.plan import Cotangents, make_plan
from .gradients.request import Captured, Request


def layers_with_parameters(model: nn.Module) -> list[nn.Module]:
    """The modules without submodules that own parameters."""
    return [m for m in model.modules() if not list(m.children()) and list(m.parameters(recurse=False))]


def class_difference(logits: Tensor, y: Tensor) -> Tensor:
    """The cotangent of the logits [N,C] that belongs to z[n,y_n + 1] - z[n,y_n]."""
    classes = logits.shape[1]
    return (one_hot((y + 1) % classes, classes) - one_hot(y, classes)).to(logits.dtype)


class _Call:
    """One call of a layer with parameters: what it was given, detached, and the edges of what it returned."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.module = module
        self.args, self.kwargs = tree_map(_detached, (args, kwargs))
        self.edges = [get_gradient_edge(tensor) for tensor in _with_graph(output)]

    def repeated(self) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of another call, from detached inputs, and those inputs whose gradients must be asked for."""
        inputs = [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        # The backward of group norm on the CPU fails for channels-last inputs unless their gradient is asked for.
        asked = [t for t in inputs if isinstance(self.module, nn.GroupNorm) and not t.is_contiguous()]
        for tensor in asked:
            tensor.requires_grad_()
        return _with_graph(self.module(*self.args, **self.kwargs)), asked


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _with_graph(output: Any) -> list[Tensor]:
    return [tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor) and tensor.requires_grad]


class Passes:
    """The passes of one network on one batch with labels y [N]; on a copy of its weights, for an optimiser's step ends
    the graphs that hold them.

    Args:
        model: the network
        y: labels [N]
        capture: of the copy -> its forward pass, with the taps
        autocast: around every forward pass
    """

    def __init__(
        self,
        model: nn.Module,
        y: Tensor,
        capture: Callable[[nn.Module], Captured],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.y, self.autocast = y, autocast
        self.model = model = copy.deepcopy(model)
        calls: list[_Call] = []
        handles = [
            module.register_forward_hook(lambda *call: calls.append(_Call(*call)), with_kwargs=True)
            for module in layers_with_parameters(model)
        ]
        with autocast():
            self.captured = capture(model)
        for handle in handles:
            handle.remove()
        self.outputs = [edge for call in calls for edge in call.edges]
        self.taps = [tap.edge for tap in self.captured.taps]
        self.seed = class_difference(self.captured.logits, y)
        self._keep_layers(calls)

    def _keep_layers(self, calls: list[_Call]) -> None:
        """Graphs of the layers alone, from detached inputs."""
        with self.autocast():
            repeated = [call.repeated() for call in calls]
        values = [value for outputs, _ in repeated for value in outputs]
        gradients = self.bare(self.outputs)  # None at outputs that the logits do not depend on
        self._at = [(v, g.detach()) for v, g in zip(values, gradients, strict=True) if g is not None]
        parameters = dict.fromkeys(p for call in calls for p in call.module.parameters(recurse=False))
        self._wanted = [p for p in parameters if p.requires_grad] + [t for _, asked in repeated for t in asked]

    def bare(self, edges: Sequence[GradientEdge]) -> Sequence[Tensor]:
        """Gradients of the class difference at `edges`, by PyTorch."""
        return torch.autograd.grad(self.captured.logits, edges, self.seed, retain_graph=True, allow_unused=True)

    def weights(self) -> Sequence[Tensor]:
        values, gradients = zip(*self._at, strict=True)
        return torch.autograd.grad(values, self._wanted, gradients, retain_graph=True, allow_unused=True)

    def backward(self) -> Sequence[Tensor]:
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.autograd.grad(self.captured.logits, wanted, self.seed, retain_graph=True, allow_unused=True)

    def own_pass(self) -> Callable[[], Any] | None:
        """The package's pass to all taps that need one, without the norms; None where none needs one."""
        plan = make_plan(self.captured, Request())
        if not plan.taps:
            return None
        cotangent, rows = Cotangents(self.captured, self.y, Request(), second_order=False).of(self.seed.argmax(1))
        seed = cotangent if rows is None else rows
        assert seed is not None
        passes = BackwardPasses(self.captured, plan.taps)
        seed = seed.detach().to(passes.start.dtype)

        def run() -> None:
            with torch.no_grad():
                passes.backward(seed, second_order=False)

        return run

    def output_bytes(self) -> int:
        """Bytes of one gradient at the output of every layer with parameters."""
        return sum(gradient.nbytes for _, gradient in self._at)

"""The passes of a step, each by itself on graphs that are kept: what no step that needs them can undercut.

forward           logits with a graph
tangent           logits without one: the work of one tangent through the network
pass to input     gradients of a class difference at all taps, no weight gradients; by PyTorch, and by the package,
pass to hidden    which has another kernel for the input of a thin convolution: the floor takes the faster
pass to outputs   the same at the outputs of all layers with parameters: what any backward goes through
weights           the gradients of all parameters from those at the outputs of their layers, one engine run
optimiser         SGD with momentum
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.functional import one_hot

from margin_kernels.gradients.loop import Passes as BackwardPasses
from margin_kernels.gradients.plan import Cotangents, make_plan
from margin_kernels.gradients.request import Captured, Request
from margin_kernels.task.capture import Taps

# By the package's own way to the taps.
OWN = "pass to input, own kernel"


def layers_with_parameters(model: nn.Module) -> list[nn.Module]:
    """The modules without submodules that own parameters."""
    return [m for m in model.modules() if not list(m.children()) and list(m.parameters(recurse=False))]


def class_difference(logits: Tensor, y: Tensor) -> Tensor:
    """The cotangent of the logits [N,C] that belongs to z[n,y_n + 1] - z[n,y_n]."""
    classes = logits.shape[1]
    return (one_hot((y + 1) % classes, classes) - one_hot(y, classes)).to(logits.dtype)


class Passes:
    """The passes of one network on one batch x, y with taps at the input and `hidden`; on a copy of its weights, for an
    optimiser's step ends the graphs that hold them."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        hidden: Sequence[str],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.trained, self.x, self.y, self.autocast = model, x, y, autocast
        self.model = model = copy.deepcopy(model)
        calls: list[tuple[nn.Module, Tensor, GradientEdge]] = []
        handles = [
            module.register_forward_hook(
                lambda m, inputs, output: calls.append((m, inputs[0].detach(), get_gradient_edge(output)))
            )
            for module in layers_with_parameters(model)
        ]
        with autocast():
            self.captured: Captured = Taps(model, ("input", *hidden)).capture(model, x)
        for handle in handles:
            handle.remove()
        self.outputs = [edge for _, _, edge in calls]
        self.taps = [tap.edge for tap in self.captured.taps]
        self.seed = class_difference(self.captured.logits, y)
        self._keep_layers([(module, a) for module, a, _ in calls])
        self._grads = [torch.full_like(p, 1e-3) for p in model.parameters()]

    def _keep_layers(self, calls: list[tuple[nn.Module, Tensor]]) -> None:
        """Graphs of the layers alone, from detached inputs."""
        with self.autocast():
            # The backward of group norm on the CPU fails for channels-last inputs unless their gradient is asked for.
            inputs = [a.requires_grad_(isinstance(m, nn.GroupNorm) and not a.is_contiguous()) for m, a in calls]
            self._values = [m(a) for (m, _), a in zip(calls, inputs, strict=True)]
        self._at_values = [g.detach() for g in self.bare(self.outputs)]
        self._wanted = [p for m, _ in calls for p in m.parameters(recurse=False)]
        self._wanted += [a for a in inputs if a.requires_grad]

    def bare(self, edges: Sequence[GradientEdge]) -> Sequence[Tensor]:
        """Gradients of the class difference at `edges`, by PyTorch."""
        return torch.autograd.grad(self.captured.logits, edges, self.seed, retain_graph=True)

    def forward(self) -> Tensor:
        with self.autocast():
            return self.model(self.x)

    def tangent(self) -> Tensor:
        with self.autocast(), torch.no_grad():
            return self.model(self.x)

    def weights(self) -> Sequence[Tensor]:
        return torch.autograd.grad(self._values, self._wanted, self._at_values, retain_graph=True)

    def backward(self) -> Sequence[Tensor]:
        parameters = list(self.model.parameters())
        return torch.autograd.grad(self.captured.logits, parameters, self.seed, retain_graph=True)

    def own_pass(self) -> Callable[[], Any]:
        """The package's pass to all taps that need one, without the norms."""
        plan = make_plan(self.captured, Request())
        cotangent, rows = Cotangents(self.captured, self.y, Request(), second_order=False).of(self.seed.argmax(1))
        seed = cotangent if rows is None else rows
        assert seed is not None
        passes = BackwardPasses(self.captured, plan.taps)
        seed = seed.detach().to(passes.start.dtype)

        def run() -> None:
            with torch.no_grad():
                passes.backward(seed, second_order=False)

        return run

    def runs(self, optimiser: torch.optim.Optimizer) -> dict[str, Callable[[], Any]]:
        def step() -> None:
            for parameter, grad in zip(self.trained.parameters(), self._grads, strict=True):
                parameter.grad = grad
            optimiser.step()
            optimiser.zero_grad()

        return {
            "forward": self.forward,
            "tangent": self.tangent,
            "pass to input": partial(self.bare, self.taps),
            OWN: self.own_pass(),
            "pass to hidden": partial(self.bare, self.taps[1:]),
            "pass to outputs": partial(self.bare, self.outputs),
            "weights": self.weights,
            "backward": self.backward,
            "optimiser": step,
        }

    def tap_bytes(self) -> int:
        """Bytes of one set of gradients at the taps."""
        return sum(g.nbytes for g in self.bare(self.taps))

    def output_bytes(self) -> int:
        """Bytes of one gradient at the output of every layer with parameters."""
        return sum(g.nbytes for g in self._at_values)

"""The passes of the steps of step.py, as margin_kernels.floors has them, by the names of its floors.

forward           logits with a graph
tangent           logits without one: the work of one tangent through the network
pass to input     gradients of a class difference at all taps, no weight gradients; by PyTorch, and by the package,
pass to hidden    which has another kernel for the input of a thin convolution: the floor takes the faster
pass to outputs   the same at the outputs of all layers with parameters: what any backward goes through
weights           the gradients of all parameters from those at the outputs of their layers, one engine run
optimiser         SGD with momentum
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from margin_kernels import floors
from margin_kernels.task.capture import Taps

# By the package's own way to the taps.
OWN = "pass to input, own kernel"


class Passes(floors.Passes):
    """The passes of one network on one batch x, y with taps at the input and `hidden`."""

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        hidden: Sequence[str],
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        taps = Taps(model, ("input", *hidden))
        super().__init__(model, y, lambda copied: taps.capture(copied, x), autocast)
        self.trained, self.x = model, x
        self._grads = [torch.full_like(p, 1e-3) for p in model.parameters()]

    def forward(self) -> Tensor:
        with self.autocast():
            return self.model(self.x)

    def tangent(self) -> Tensor:
        with self.autocast(), torch.no_grad():
            return self.model(self.x)

    def runs(self, optimiser: torch.optim.Optimizer) -> dict[str, Callable[[], Any]]:
        def step() -> None:
            for parameter, grad in zip(self.trained.parameters(), self._grads, strict=True):
                parameter.grad = grad
            optimiser.step()
            optimiser.zero_grad()

        own = self.own_pass()
        assert own is not None  # the input is tapped
        return {
            "forward": self.forward,
            "tangent": self.tangent,
            "pass to input": partial(self.bare, self.taps),
            OWN: own,
            "pass to hidden": partial(self.bare, self.taps[1:]),
            "pass to outputs": partial(self.bare, self.outputs),
            "weights": self.weights,
            "backward": self.backward,
            "optimiser": step,
        }

    def tap_bytes(self) -> int:
        """Bytes of one set of gradients at the taps."""
        return sum(g.nbytes for g in self.bare(self.taps))

"""The state of the random number generators that a forward pass draws from, saved to draw the same numbers again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .tracing import recording


class RandomState(NamedTuple):
    """States of the CPU generator and of the generator of `device`, None for inputs on the CPU."""

    cpu: Tensor
    device: torch.device | None = None
    state: Tensor | None = None

    @classmethod
    def now(cls, x: Any) -> RandomState:
        """The state from which the next forward pass of input x draws; reading it does not wait for a device. Empty
        while a step is recorded, which draws nothing: margin_kernels.compiled has seen to that."""
        if recording():
            return cls(torch.empty(0))
        cpu = torch.get_rng_state()
        on_device = (leaf.device for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.device.type == "cuda")
        device = next(on_device, None)
        return cls(cpu) if device is None else cls(cpu, device, torch.cuda.get_rng_state(device))

    def changed(self) -> bool:
        """Whether anything was drawn since."""
        if recording():
            return False
        if not torch.equal(self.cpu, torch.get_rng_state()):
            return True
        if self.device is None or self.state is None:
            return False
        return not torch.equal(self.state, torch.cuda.get_rng_state(self.device))

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None and self.state is not None:
            torch.cuda.set_rng_state(self.state, self.device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, this state: a forward pass draws the dropout masks it drew then. Afterwards the one before."""
        if recording():
            yield
            return
        saved = RandomState(torch.get_rng_state())
        if self.device is not None:
            saved = saved._replace(device=self.device, state=torch.cuda.get_rng_state(self.device))
        self.restore()
        try:
            yield
        finally:
            saved.restore()

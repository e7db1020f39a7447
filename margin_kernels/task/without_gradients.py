"""The end of a network in a forward pass without gradients: what of a margin loss is known there.

Near the logits z = W h + b the norms need no backward pass through the network, only W. So the final layer alone is run
once more, with a graph, on what went into it in the forward pass, and the taps on its input, on the pooling before it
and on the logits are measured there.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from ..gradients.request import Captured, Head, Tap
from ..tracing import is_plain
from .capture import OUTPUT, Taps, end_candidates, same_values
from .sharded import plain_type


class _Seen(NamedTuple):
    """A tensor that a forward pass made, and its version then."""

    tensor: Tensor
    version: int

    @classmethod
    def now(cls, tensor: Tensor) -> _Seen:
        return cls(tensor, tensor._version)

    def is_same(self, other: Tensor) -> bool:
        """Whether the other tensor holds the same entries in the same memory, which nobody has changed since."""
        tensor = self.tensor
        if tensor.data_ptr() != other.data_ptr() or tensor.numel() != other.numel() or tensor._version != self.version:
            return False
        alike = tensor.shape == other.shape and tensor.stride() == other.stride()
        return alike or (tensor.is_contiguous() and other.is_contiguous() and tensor.shape[0] == other.shape[0])


class _Call(NamedTuple):
    """One call of a module that may be the final layer or the pooling before it."""

    module: nn.Module
    input: _Seen
    output: _Seen


@contextmanager
def watching_the_end(model: nn.Module, taps: Taps) -> Iterator[End]:
    """Around one forward pass without gradients, of this thread.

    with watching_the_end(model, taps) as end:
        logits = model(x)
    captured = end.captured(logits)      the taps that are measured there, or None
    """
    end, thread = End(taps), threading.get_ident()

    def here(note: Any, *args: Any) -> None:
        if threading.get_ident() == thread:  # another may run the same model
            note(*args)

    hooks = [(name, partial(here, end.note), True) for name in end_candidates(model)]
    hooks += [(name, partial(here, end.keep, name), False) for name in taps.modules]
    handles = [model.get_submodule(name).register_forward_hook(hook, prepend=first) for name, hook, first in hooks]
    try:
        yield end
    finally:
        for handle in handles:
            handle.remove()


class End:
    """What one forward pass shows of the final layer, the pooling before it, and the taps."""

    def __init__(self, taps: Taps) -> None:
        self._taps = taps
        self._calls: list[_Call] = []
        self._tapped: dict[str, list[dict[str, _Seen]]] = {name: [] for name in taps.modules}
        self._rows: Tensor | None = None
        self._pooled: tuple[Tensor, Tensor] | None = None

    def note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A call of a module that may be the final layer or the pooling."""
        x = args[0] if len(args) == 1 else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or "forward" in vars(module):
            return
        if not x.is_inference() and not output.is_inference():
            self._calls.append(_Call(module, _Seen.now(x), _Seen.now(output)))

    def keep(self, base: str, module: nn.Module, args: Any, output: Any) -> None:
        """A call of a module that is tapped."""
        found = self._taps.tensors(base, len(self._tapped[base]), output)
        self._tapped[base].append({name: _Seen.now(t) for name, t in found.items() if not t.is_inference()})

    def captured(self, logits: Tensor) -> Captured | None:
        """The forward pass from the pooling on, with the taps that are there; None where there is none."""
        with torch.enable_grad():
            head, z = self._head(logits)
            z = logits.detach().requires_grad_() if z is None else z
            taps, chosen = [], []
            for i, name in enumerate(self._taps.names):
                tap = Tap(name, get_gradient_edge(z), logits.shape) if name == OUTPUT else self._tap(name, head)
                if tap is not None:
                    taps.append(tap)
                    chosen.append(i)
        if not taps:
            return None
        return Captured(z, taps, head, measuring=True, layers=len(self._taps.names), chosen=chosen)

    def _tap(self, name: str, head: Head | None) -> Tap | None:
        """A tap on the input of the final layer or of the pooling; None where it is neither."""
        seen = self._taps.picked(name, self._tapped)
        if head is None or seen is None:
            return None
        if self._pooled is not None and seen.is_same(self._pooled[0]):
            return Tap(name, get_gradient_edge(self._pooled[1]), seen.tensor.shape)
        if self._rows is not None and seen.is_same(self._rows):
            return Tap(name, get_gradient_edge(head.input), seen.tensor.shape)
        return None

    def _head(self, logits: Tensor) -> tuple[Head | None, Tensor | None]:
        """The final layer on a leaf in the place of its input, or of the pooling's, and what it gives."""
        for call in reversed(self._calls):
            module, x = call.module, call.input.tensor
            if plain_type(module) is not nn.Linear or x.dim() != 2 or not call.output.is_same(logits):
                continue
            assert isinstance(module, nn.Linear)
            if not call.input.is_same(x) or not is_plain(module.weight):
                return None, None
            self._rows = x
            entry: Tensor = x.detach().requires_grad_()
            pool = next((other for other in self._calls if other.module is not module and self._pools(other, x)), None)
            pooled, positions = None, 1
            if pool is not None:
                before = pool.input.tensor
                positions = before.numel() // x.numel()
                leaf = before.detach().requires_grad_()
                entry = leaf.flatten(2).mean(2).reshape(x.shape)
                self._pooled, pooled = (before, leaf), get_gradient_edge(leaf)
            z = F.linear(entry, module.weight.detach(), None if module.bias is None else module.bias.detach())
            return Head(module.weight.detach(), entry, same_values(entry), pooled, positions), z
        return None, None

    def _pools(self, call: _Call, x: Tensor) -> bool:
        """Whether a call made x [N,D] of [N,D,*] by a mean over all positions."""
        made, before = call.output.tensor, call.input
        if plain_type(call.module) is nn.Linear or made.dim() <= 2 or made.shape[2:].numel() != 1:
            return False
        return call.output.is_same(x) and before.is_same(before.tensor) and before.tensor.dim() == made.dim()

"""The end of a network in a forward pass without gradients: what of a margin loss is known there.

Near the logits z = W h + b the norms need no backward pass through the network, only W. So the final layer alone is run
once more, with a graph, on what went into it in the forward pass, and the taps on its input, on the pooling before it
and on the logits are measured there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


class End:
    """Watches forward passes without gradients for the final layer.

    end = End(taps)
    with end.watching(model):
        logits = model(x)
    captured = end.captured(logits)      the taps that are measured there, or None
    """

    def __init__(self, taps: Taps) -> None:
        self._taps = taps
        self._calls: list[_Call] = []
        self._tapped: dict[str, list[dict[str, _Seen]]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Around one forward pass."""
        self._calls, self._tapped = [], {name: [] for name in self._taps.modules}
        handles = [
            model.get_submodule(name).register_forward_hook(self._note, prepend=True) for name in end_candidates(model)
        ]
        handles += [model.get_submodule(name).register_forward_hook(self._keeper(name)) for name in self._taps.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = args[0] if len(args) == 1 else None
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or "forward" in vars(module):
            return
        if not x.is_inference() and not output.is_inference():
            self._calls.append(_Call(module, _Seen.now(x), _Seen.now(output)))

    def _keeper(self, base: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found = self._taps.tensors(base, len(self._tapped[base]), output)
            self._tapped[base].append({name: _Seen.now(t) for name, t in found.items() if not t.is_inference()})

        return keep

    def captured(self, logits: Tensor) -> Captured | None:
        """The forward pass from the pooling on, with the taps that are there; None where there is none."""
        calls, tapped, self._calls, self._tapped = self._calls, self._tapped, [], {}
        with torch.enable_grad():
            head, z = self._head(calls, logits)
            if z is None:
                z = logits.detach().requires_grad_()
            taps, chosen = [], []
            for i, name in enumerate(self._taps.names):
                edge = get_gradient_edge(z) if name == OUTPUT else None
                seen = None if edge is not None or head is None else self._taps.picked(name, tapped)
                if head is not None and seen is not None:
                    pooled, rows = self._pooled, self._rows
                    if pooled is not None and seen.is_same(pooled[0]):
                        edge = get_gradient_edge(pooled[1])
                    elif seen.is_same(rows):
                        edge = get_gradient_edge(head.input)
                if edge is not None:
                    shape = logits.shape if name == OUTPUT else seen.tensor.shape if seen is not None else logits.shape
                    taps.append(Tap(name, edge, shape))
                    chosen.append(i)
        if not taps:
            return None
        return Captured(z, taps, head, measuring=True, layers=len(self._taps.names), chosen=chosen)

    def _head(self, calls: Sequence[_Call], logits: Tensor) -> tuple[Head | None, Tensor | None]:
        """The final layer on a leaf in the place of its input, or of the pooling's, and what it gives."""
        self._pooled: tuple[Tensor, Tensor] | None = None
        for call in reversed(calls):
            module, x = call.module, call.input.tensor
            if plain_type(module) is not nn.Linear or x.dim() != 2 or not call.output.is_same(logits):
                continue
            assert isinstance(module, nn.Linear)
            if not call.input.is_same(x) or not is_plain(module.weight):
                return None, None
            self._rows = x
            entry: Tensor = x.detach().requires_grad_()
            pool = next((other for other in calls if other.module is not module and self._pools(other, x)), None)
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

"""What passes between a loss and the way its gradients are obtained.

A loss asks (Request), the task or the caller brings one forward pass (Captured: logits, taps, head), and
`margin_kernels.gradients.choose` returns the strategy that answers: D[n,j,l] and the loss with its way to the
parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .. import sharding
from .autograd_graph import Graph, same_edge
from .proofs import Proof, Proofs
from .structure import Structure, Where

# The edge of a linear layer's node that leads to its input.
HEAD_INPUT = {"AddmmBackward0": 1, "MmBackward0": 0}


@dataclass(frozen=True)
class Request:
    """What a loss measures, and what of it is differentiated.

    Attributes:
        p: norm of the distances, >= 1
        space: "logit": gaps of logits, "probability": of softmax scores
        layer_scale: None, or "numel": D divided by the number of elements of a sample's activation
        second_order: D is differentiated in the parameters, not a constant
        competitors: how many competitors the loss weighs for each sample
        soft: the one competitor is the log-sum-exp over the rivals, `phi` of functional.competitors
        outside: the part of the loss whose gradient in the logits is not a combination of those of the gaps, in words
            for the user; None where there is no such part
        backend: of every op
    """

    p: float = 2.0
    space: str = "logit"
    layer_scale: str | None = None
    second_order: bool = False
    competitors: int = 1
    soft: bool = False
    outside: str | None = None
    backend: str = "auto"


class Tap(NamedTuple):
    """One tapped activation h_l: its name, its edge in the autograd graph, its shape, and the dimension that the user
    says holds the batch (None: the graph is asked)."""

    name: str
    edge: GradientEdge
    shape: torch.Size
    batch_dim: int | None = None


class Head(NamedTuple):
    """The final linear layer z = W h + b: W [C,D], h [N,D], the edges that carry h, and the pooling that made it.

    `pooled` is the edge of the activation whose mean over `positions` positions is h, None where no pooling was found.
    """

    weight: Tensor
    input: Tensor
    edges: list[GradientEdge]
    pooled: GradientEdge | None = None
    positions: int = 1


@dataclass
class Captured:
    """One forward pass.

    Attributes:
        logits: [N,C], or [N] and [N,1] for a model with one logit
        taps: in the order of their names
        head: where it was found
        sources: marks of the nodes that stand for tensors without gradient, see `cut_sources`
        begin: sequence number of autograd when the forward pass began; None for tensors of the caller
        inputs: edges of the tensors with a graph of their own that were passed to the model
        remedy: how the user names the batch dimension of a tap, a format string with {name}
        agree: whether all processes take the strategy of that name; None where they need not
        slots: where `logits` are rows [N*P,C] of P positions of each sample, the forward pass seen from each of these
            positions, whose logits [N,C] are `logits[p::P]`
        measuring: whether the norms are only looked at, never differentiated
        layers, chosen: where the taps are some of those that a loss has options for: how many it has, and which
        proofs: what the graphs of earlier forward passes of the same task have shown, see `proofs`; added to
    """

    logits: Tensor
    taps: list[Tap]
    head: Head | None = None
    sources: Sequence[Tensor] = ()
    begin: int | None = None
    inputs: Sequence[GradientEdge] = ()
    remedy: str = 'MarginTask(..., batch_dim={{"{name}": d}})'
    agree: Callable[[str], bool] | None = None
    slots: Sequence[Captured] = ()
    measuring: bool = False
    layers: int | None = None
    chosen: list[int] | None = None
    proofs: Proofs[Proof] | None = None
    _structures: dict[tuple[str, ...], Structure] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.logits.requires_grad and sharding.possible():
            sharding.check_parts(self.graph, [(tap.name, tap.edge) for tap in self.taps])

    @property
    def batch(self) -> int:
        return self.logits.shape[0] // max(len(self.slots), 1)

    @cached_property
    def graph(self) -> Graph:
        """The graph that made the logits."""
        return Graph(self.logits, self.begin or 0)

    def head_depends_on_taps(self) -> bool:
        """Whether the head's weight or bias is made from tapped activations: then it has no closed form."""
        if self.head is None:
            return False
        tapped = {(tap.edge.node, tap.edge.output_nr) for tap in self.taps}
        top = get_gradient_edge(self.logits).node
        seen = set()
        # From the weight and the bias down: two nodes, but for a head whose weight is computed.
        open_ = [edge for number, edge in enumerate(top.next_functions) if number != HEAD_INPUT[top.name()]]
        while open_:
            edge = open_.pop()
            if edge in tapped:
                return True
            if edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                open_.extend(edge[0].next_functions)
        return False

    def structure(self, taps: Sequence[Tap]) -> Structure:
        """What the graph says about the samples between the logits and these taps."""
        names = tuple(tap.name for tap in taps)
        if names not in self._structures:
            self._structures[names] = Structure(self.graph, [tap.edge for tap in taps], self.batch)
        return self._structures[names]

    def strides(self, taps: Sequence[Tap]) -> list[int]:
        """The stride of the batch in each of `taps`, see `place`."""
        return [self.place(tap, taps) for tap in taps]

    def place(self, tap: Tap, taps: Sequence[Tap]) -> int:
        """The stride of the batch in a tap, one of `taps`. Raises ValueError where it is not proven and not given, or
        given and wrong."""
        if not self.graph.readers_of(tap.edge):
            raise ValueError(f"tap {tap.name!r} is outside the graph of the logits: they do not depend on it")
        where: Where | None = self.structure(taps).where.get((tap.edge.node, tap.edge.output_nr))
        shape = list(tap.shape)
        remedy = self.remedy.format(name=tap.name)
        if tap.batch_dim is not None:
            d = tap.batch_dim + (len(shape) if tap.batch_dim < 0 else 0)
            if not 0 <= d < len(shape) or shape[d] != self.batch:
                raise ValueError(
                    f"the batch_dim of tap {tap.name!r} must be a dimension of size {self.batch}, as the logits have "
                    f"rows, got {tap.batch_dim} for shape {shape}"
                )
            stride = prod(shape[d + 1 :])
            if where is not None and where.proven and where.stride != stride and self.batch > 1:
                raise ValueError(
                    f"the batch_dim of tap {tap.name!r} is given as {tap.batch_dim}, but the graph shows the batch "
                    f"elsewhere in its shape {shape}: leave batch_dim out"
                )
            return stride
        if prod(shape) % max(self.batch, 1) != 0 or len(shape) == 0:
            raise ValueError(
                f"tap {tap.name!r} has shape {shape}, which holds no batch of {self.batch} samples: tap a layer whose "
                "output has an entry for each sample"
            )
        if self.batch <= 1:
            return prod(shape[1:])
        if where is None or not where.proven:
            findings = self.structure(taps).findings
            why = f" ({findings[0]})" if findings else ""
            raise ValueError(
                f"the batch dimension of tap {tap.name!r} of shape {shape} is not proven by the graph{why}: name it, "
                f"{remedy}"
            )
        return where.stride


def explicit(logits: Tensor, activations: Sequence[Tensor], batch_dim: int | Sequence[int | None] | None) -> Captured:
    """Taps from tensors of the caller: activations [N,*] of one forward pass that led to logits [N,C].

    Raises TypeError for anything but tensors, ValueError for a tensor that is not part of an autograd graph.
    """
    if isinstance(activations, Tensor) or not isinstance(activations, Sequence):
        raise TypeError(f"activations must be a list of tensors, got {type(activations).__name__}")
    if len(activations) == 0:
        raise ValueError("activations must hold at least one tensor, got an empty list")
    dims = list(batch_dim) if isinstance(batch_dim, Sequence) else [batch_dim] * len(activations)
    if len(dims) != len(activations):
        raise ValueError(f"batch_dim must hold one number for each of {len(activations)} activations, got {len(dims)}")
    taps = []
    for i, activation in enumerate(activations):
        name = f"activations[{i}]"
        if not isinstance(activation, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(activation).__name__}")
        if not activation.requires_grad:
            raise ValueError(f"{name} does not require grad: call requires_grad_() on it before the forward pass")
        taps.append(Tap(name, get_gradient_edge(activation), activation.shape, dims[i]))
    return Captured(logits, taps, remedy="loss(logits, target, activations, batch_dim=d)")


def is_logits(tap: Tap, captured: Captured) -> bool:
    """Whether a tap is the logits themselves."""
    return same_edge(tap.edge, get_gradient_edge(captured.logits))

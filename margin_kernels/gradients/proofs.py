"""Proofs of the split backward that hold for the next forward pass as well.

A proof reads an autograd graph: types, edges and shapes of its nodes, which are its signature, and arguments that
single nodes have saved. The graph of the next forward pass mostly looks the same. So a task keeps what its graphs have
shown, by places in the order of their nodes:

    key          all that a proof starts from: signature, batch, taps, what enters with a graph of its own
    proof.read   every saved argument that the proof has read, with its value

A proof is taken again only for an equal key, and only if every argument of `read` has its value in the new graph too.
Both are compared in every step. Hooks and the types of parameters are in neither: the strategy looks at them each time.
Refusals are not kept.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from .autograd_graph import Graph, saved

# Kinds of graphs that a task remembers. Beyond, it begins anew: sequences of ever new lengths must not fill the memory.
MANY = 64


class Shown(Protocol):
    """What a graph has shown. read: (place, name, value) of saved arguments."""

    @property
    def read(self) -> tuple[tuple[int, str, Any], ...]: ...


S = TypeVar("S", bound=Shown)


class Proof(NamedTuple):
    """What a graph has shown to the split, nodes by their places.

    Attributes:
        read: (place, name, value) of saved arguments
        taps: the stride of the batch in each tap of a pass
        readers: for each tap who alone reads it, (place, number of the edge), see loop.sole_readers
        made: nodes of the forward pass
        inputs: (place, output, whether it is a leaf) at which the loss ends
        edges, strides: (place, output) where passes record gradients, and the stride of the batch there
        leaves_at_top: whether parameters feed the node of the logits
        sinks: (place, output) whose gradients nodes must compute though nobody reads them
        turned: edges that lead elsewhere while the weights get their gradients: (place of the node, number of its edge,
            number of an input, then of a sink, or -1 for nowhere)
    """

    read: tuple[tuple[int, str, Any], ...]
    taps: tuple[int, ...]
    readers: tuple[tuple[int, int] | None, ...]
    made: tuple[int, ...]
    inputs: tuple[tuple[int, int, bool], ...]
    edges: tuple[tuple[int, int], ...]
    strides: tuple[int, ...]
    leaves_at_top: bool
    sinks: tuple[tuple[int, int], ...]
    turned: tuple[tuple[int, int, int], ...]


class Proofs(Generic[S]):
    """The proofs of one task, or of one monitor."""

    def __init__(self) -> None:
        self._found: dict[Any, S] = {}

    def find(self, key: Any, graph: Graph) -> S | None:
        """The proof that holds for this graph, too."""
        proof = self._found.get(key)
        if proof is None or any(saved(graph.nodes[place], name) != value for place, name, value in proof.read):
            return None
        return proof

    def __reduce__(self) -> Any:
        """Copies and files have none: they are found again in a step."""
        return Proofs, ()

    def add(self, key: Any, proof: S) -> None:
        if len(self._found) >= MANY:
            self._found.clear()
        self._found[key] = proof

"""Weight gradients of a margin loss from the activation gradients that its norms were measured on.

With constant norms the loss depends on the network through the gaps alone, and backpropagation is linear and treats
samples one by one. With w[n,j] = d loss / d gap[n,j] and G_j the activation gradients of the pass of competitor j,

    d loss / d a[n] = sum_j w[n,j] G_j[n]        at every activation a of the network

is known as soon as the loss is, and only the gradients of the weights remain: one forward pass, k passes, and half a
backward pass, (k + 2) F where the loop takes (k + 3) F; for k = 1 the price of cross-entropy.

The graph of the forward pass is used as it is, for any network. Its spine are the nodes between the logits and the
taps; a node of the spine that a parameter feeds is an owner. Each pass also yields the gradients at the outputs of the
owners. In the backward of the loss these are combined, and one run of the engine starts at all owners together while
the edges from one node of the spine to the next are cut: what leaves the spine, weights and what lies behind the taps,
gets its gradient in the ordinary way, shared weights and any kind of layer included.

Exact where every sample is a row of its own in the output of each owner. Whether that is so is read off the shapes, and
tried out once for each kind of graph: a pass with the cotangents of every second sample must leave the rows of the
others 0, and their own rows as they were.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .backends import EXTENSION
from .taps import SAME_VALUES, Captured, Tap, graph_nodes, same_edge
from .tracing import recording

LEAF = "torch::autograd::AccumulateGrad"
# Nodes that must compute the gradient of their input: this one crashes without, for channels-last tensors on the CPU.
WITH_INPUT = {"NativeGroupNormBackward0"}
# Rounding between a pass and the same pass with half of the samples, relative to the largest gradient.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}

# The operations of a graph between logits and taps: name and number of dimensions of each.
Kind = tuple[tuple[str, int], ...]
# What one pass starts from: a cotangent of the logits, and rows at the input of the head; as in passes.py.
Seeds = tuple[Tensor | None, Tensor | None]
Measured = TypeVar("Measured")


# What the cotangents of passes in float16 are multiplied by, so that small gradients do not vanish in it; about what a
# sample's cotangent is multiplied by under the usual loss scale, 2^16 over the batch size.
FLOAT16_SCALE = 256.0


class NotExact(Exception):
    """Why the split backward would not give the gradient, or cannot be run."""


def available() -> bool:
    """Whether the compiled extension, which the split backward needs, is there."""
    return hasattr(EXTENSION, "RedirectedEdges") and not torch.compiler.is_compiling()


def pass_start(captured: Captured) -> Tensor:
    """Where passes start: the input of the head, or the logits where there is none."""
    return captured.logits if captured.head is None else captured.head.input


def pass_scale(captured: Captured) -> float:
    """The factor of the gradients that passes give."""
    return FLOAT16_SCALE if pass_start(captured).dtype == torch.float16 else 1.0


def split_or_loop(
    passes: str,
    build: Callable[[], Split],
    measure: Callable[[Split | None], Measured],
    asked: str = 'passes="split"',
) -> Measured:
    """measure(build()) for passes "split" and, where that is exact, "auto"; else measure(None).

    asked  what the user asked for where passes is "split"
    Raises ValueError with the reason where passes is "split" and NotExact says no.
    """
    if passes != "loop":
        try:
            return measure(build())
        except NotExact as reason:
            if passes == "split":
                raise ValueError(f"{asked} is not possible: {reason}") from reason
    return measure(None)


class Split:
    """The split backward of one forward pass. Raises NotExact with the reason where it has none.

    captured  the forward pass, whose logits the loss is computed from
    taps      the taps that the passes go to
    tried     kinds of graphs that were tried out, with the reason against or None; added to here
    edges     where the passes must take gradients besides: the outputs of the owners
    """

    # Whether the passes carry a graph.
    second_order = False

    def __init__(self, captured: Captured, taps: Sequence[Tap], tried: dict[Kind, str | None]) -> None:
        self._tried = tried
        self._logits = captured.logits
        self._scale = pass_scale(captured)
        self._nodes = graph_nodes(captured.logits)
        self._readers: dict[Any, list[tuple[Any, int, int]]] = defaultdict(list)
        for node in self._nodes:
            for number, (following, output) in enumerate(node.next_functions):
                if following is not None:
                    self._readers[following].append((node, number, output))
        self._spine = self._above(
            node for tap in taps for node, _, output in self._readers[tap.edge.node] if output == tap.edge.output_nr
        )
        # Not a parameter: what gives the model's input, or a frozen stem, its place in the graph.
        sources = {mark.grad_fn for mark in captured.sources}
        self._leaves = [
            node
            for node in self._nodes
            if node.name() == LEAF and not all(reader in sources for reader, _, _ in self._readers[node])
        ]
        self._trained = self._above(self._leaves)
        self.kind = self._kind()
        reason = self._tried.get(self.kind)
        if reason is not None:
            raise NotExact(reason)
        self._check_nodes(captured)
        self.edges: list[GradientEdge] = []
        self._open: set[tuple[Any, int]] = set()  # edges of the spine that stay: views above an owner
        self._top = self._nodes[0]
        self._owners = [node for node in self._nodes[1:] if node in self._spine and self._leaving(node)]
        for node in self._owners:
            self._add(node)
        # Behind the last taps the ordinary backward goes on, from gradients that are known as well.
        self._ends = {
            (tap.edge.node, tap.edge.output_nr): tap.edge
            for tap in taps
            if tap.edge.node not in self._spine and tap.edge.node in self._trained and tap.edge.node.name() != LEAF
        }
        self.edges += self._ends.values()
        self._kept: list[list[Tensor]] = []

    def _kind(self) -> Kind:
        return tuple((node.name(), len(_shape(node, 0))) for node in self._nodes if node in self._spine)

    @property
    def parameters(self) -> list[Tensor]:
        """The leaves of the graph: what the loss has gradients for."""
        return [leaf.variable for leaf in self._leaves]

    def _above(self, nodes: Iterable[Any]) -> set[Any]:
        """The nodes from which one of `nodes` is reached, these included."""
        open_ = list(nodes)
        found = set(open_)
        while open_:
            for reader, _, _ in self._readers[open_.pop()]:
                if reader not in found:
                    found.add(reader)
                    open_.append(reader)
        return found

    def _leaving(self, node: Any) -> list[int]:
        """The edges of a node of the spine that lead to parameters and not along the spine."""
        return [
            number
            for number, (following, _) in enumerate(node.next_functions)
            if following not in self._spine and following in self._trained
        ]

    def _check_nodes(self, captured: Captured) -> None:
        for node in self._spine:
            if "BatchNorm" in node.name() and getattr(node, "_saved_training", getattr(node, "_saved_train", True)):
                raise NotExact("batch norm in training mode couples the samples")
            if node.name() == "BackwardHookFunctionBackward":
                raise NotExact("a module has backward hooks, which would see the passes and not the loss")
        if captured.head is None:
            return
        below = get_gradient_edge(captured.head.input)
        for following, output in self._nodes[0].next_functions:
            if following in self._spine and not same_edge(GradientEdge(following, output), below):
                raise NotExact("the weight of the head depends on tapped activations")

    def _add(self, node: Any) -> None:
        """The edges at which the gradients of an owner are taken: its outputs, or those of views of them in which each
        sample is a row."""
        outputs = {output for _, _, output in self._readers[node]}
        for output in sorted(outputs):
            shape = _shape(node, output)
            if len(shape) > 0 and shape[0] == self._logits.shape[0]:
                edge = GradientEdge(node, output)
                if not any(same_edge(edge, known) for known in self.edges):
                    self.edges.append(edge)
                continue
            for reader, number, read in self._readers[node]:
                if read != output:
                    continue
                if reader.name() not in SAME_VALUES:
                    raise NotExact(
                        f"{node.name()} has an output of shape {list(shape)}, whose first dimension is not the batch "
                        f"({self._logits.shape[0]})"
                    )
                self._open.add((reader, number))
                if reader is not self._top:
                    self._add(reader)

    def seeds(self, seeds: Seeds) -> Seeds:
        """The cotangents that a pass is to start from."""
        return seeds

    def keep(
        self, measured: list[Tensor], kept: list[Tensor], every_second: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        """Takes note of one pass more: the gradients that are measured, those at `edges`, and how to repeat the pass
        with the cotangents of samples 0, 2, 4, ... alone. Returns the gradients to be measured. Raises NotExact where
        samples are coupled."""
        self._kept.append(kept)
        self._try_out(every_second)
        return measured

    def _try_out(self, every_second: Callable[[], list[Tensor]]) -> None:
        if self.kind in self._tried or len(self._logits) <= 1:
            return
        if recording():
            raise NotExact("no batch has shown so far that the samples are not coupled")
        apart, evidence = self._apart(every_second())
        if evidence and not apart:
            self._tried[self.kind] = "the samples are coupled: the gradients of some depend on others"
            raise NotExact(self._tried[self.kind])
        if evidence:
            self._tried[self.kind] = None

    def _apart(self, half: list[Tensor]) -> tuple[bool, bool]:
        """Whether `half` is the last pass kept with every second row 0, and whether the numbers tell: finite, and not
        all 0."""
        apart, evidence = True, False
        for whole, part in zip(self._kept[-1], half, strict=True):
            tolerance = ROUNDING.get(whole.dtype, 1e-3) * whole.abs().amax()
            zero = (part[1::2] == 0).all()
            apart = apart and bool(zero & ((part[::2] - whole[::2]).abs() <= tolerance).all())
            if not bool(whole.isfinite().all()):
                return True, False
            evidence = evidence or bool(whole.any())
        return apart, evidence

    def loss(self, value: Tensor, logits: Tensor, gap: Tensor | None, index: Tensor, target: Tensor) -> Tensor:
        """`value` [] or [N], computed from the leaf `logits` [N,C], with the network's parameters as its inputs.

        gap: the score gaps [N,k] that the passes differentiated, where w is their gradient; None: logit gaps between
        classes index [N,k] and target [N], where w is read off the gradient in the logits, other terms included.
        """

        def gradients(grad: Tensor) -> list[Tensor | None]:
            return self._gradients(value, logits, gap, index, target, grad)

        return _WeightGradients.apply(value.detach(), gradients, *self.parameters)

    def _keeps_graph(self) -> bool:
        """Whether somebody needs the graph after the backward that is running: a second backward, or another term on
        the logits."""
        keep: bool = torch._C._autograd._get_current_graph_task_keep_graph()
        return keep or torch._C._will_engine_execute_node(self._top)

    def _gradients(
        self, value: Tensor, logits: Tensor, gap: Tensor | None, index: Tensor, target: Tensor, grad: Tensor
    ) -> list[Tensor | None]:
        """The gradients of <grad, value> in the parameters."""
        keep_graph = self._keeps_graph()
        if gap is None:
            (outer,) = torch.autograd.grad(value, logits, grad, retain_graph=keep_graph)
            weights = outer.gather(1, index)
        else:
            weights, outer = torch.autograd.grad(value, (gap, logits), grad, retain_graph=keep_graph)
        weights = weights if self._scale == 1 else weights / self._scale
        roots, seeds = list(self.edges), self._combined(weights, keep_graph)
        if self._leaving(self._top) or any(reader is self._top for reader, _ in self._open):
            roots.append(get_gradient_edge(self._logits))
            seeds.append(outer)
        return self._run(roots, seeds, keep_graph)

    def _run(self, roots: list[GradientEdge], seeds: list[Tensor], keep_graph: bool) -> list[Tensor | None]:
        """What reaches the parameters from gradients at `roots`, without going along the spine."""
        if not roots:
            return [None] * len(self._leaves)
        stand_ins = [leaf.variable.detach().requires_grad_() for leaf in self._leaves]
        places, sinks = self._places(stand_ins)
        with redirected(self._logits, places):
            ends = [*stand_ins, *sinks]
            found = torch.autograd.grad(roots, ends, seeds, retain_graph=keep_graph, allow_unused=True)
        return list(found[: len(stand_ins)])

    def _combined(self, weights: Tensor, keep_graph: bool) -> list[Tensor]:
        """sum_j w[n,j] G_j[n] at every edge, in the dtype of G; in the memory of G_0 where it is G_0's alone."""
        first = self._kept[0] if self._kept else []
        in_place = not keep_graph and not recording()
        uses = Counter(gradient.untyped_storage().data_ptr() for gradient in first) if in_place else Counter()
        combined = []
        for i, gradient in enumerate(first):
            factors = [w.view(-1, *[1] * (gradient.dim() - 1)) for w in weights.unbind(1)]
            memory = gradient.untyped_storage()
            own = in_place and uses[memory.data_ptr()] == 1 and memory.nbytes() == gradient.numel() * gradient.itemsize
            own = own and (len(factors) == 1 or gradient.dtype == weights.dtype)  # half precision: summed in float32
            total = gradient.mul_(factors[0]) if own else gradient * factors[0]
            for kept, factor in zip(self._kept[1:], factors[1:], strict=True):
                total.addcmul_(kept[i], factor)
            combined.append(total.to(gradient.dtype))
        if not keep_graph:
            self._kept.clear()
        return combined

    def _places(self, stand_ins: list[Tensor]) -> tuple[list[tuple[int, int, Tensor | None]], list[Tensor]]:
        """The edges along the spine, which are to lead nowhere or to sinks, and those to leaves, to others without
        hooks."""
        sinks: list[Tensor] = []
        leaf = dict(zip(self._leaves, stand_ins, strict=True))
        places: list[tuple[int, int, Tensor | None]] = []
        for i, node in enumerate(self._nodes):
            for number, (following, output) in enumerate(node.next_functions):
                if following in leaf:
                    places.append((i, number, leaf[following]))
                elif following is None or node not in self._spine or (node, number) in self._open:
                    continue
                elif following in self._spine or following not in self._trained or (following, output) in self._ends:
                    if node.name() in WITH_INPUT:
                        like = following._input_metadata[output]
                        sink = torch.zeros((), dtype=like.dtype, device=like.device).expand(like.shape)
                        sinks.append(sink.requires_grad_())
                    places.append((i, number, sinks[-1] if node.name() in WITH_INPUT else None))
        return places, sinks


@contextmanager
def redirected(root: Tensor, places: list[tuple[int, int, Tensor | None]]) -> Iterator[None]:
    """The graph of `root` with other edges: of node i of graph_nodes(root) the edge of that number leads to where the
    tensor came from, or nowhere."""
    assert EXTENSION is not None
    edges = EXTENSION.RedirectedEdges(root, places)
    try:
        yield
    finally:
        edges.restore()


class _WeightGradients(torch.autograd.Function):
    """A value whose gradients in `leaves` a function of its own finds."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Callable[[Tensor], list[Tensor | None]], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError('the split backward has no second derivative (create_graph=True): use passes="loop"')
        return (None, None, *ctx.gradients(grad))


def _shape(node: Any, output: int) -> torch.Size:
    return node._input_metadata[output].shape

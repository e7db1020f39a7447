"""The autograd graph of PyTorch: the one file that touches its private attributes.

A graph is made of nodes. Node f of a forward operation holds an edge (node, output number) for each input, None where
the input has no gradient. Backward runs along the edges: from the logits to the activations and parameters.

    graph = Graph(logits)
    graph.nodes                all nodes, breadth first from the logits: the order that csrc/graph knows too
    graph.signature            types, edges and shapes of all nodes as bytes, to compare; b"" where not known
    graph.readers[node]        who reads the outputs of a node: (reader, number of the reader's edge, output)
    graph.edges[node]          the edges of a node;  graph.names[node]  what it is called

What is private in PyTorch and used here: `_input_metadata` (shape of each output of the forward operation), `_saved_*`
(arguments of the forward operation), `_sequence_nr`, the engine, and whether its backward will come to a node.
`refusal()` says why a PyTorch cannot be trusted with it; tests/gradients/test_autograd_graph.py holds each helper to
its meaning.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..backends import EXTENSION
from ..tracing import tracing

# Versions of PyTorch whose graphs were read and compared with the loop: from the first on, below the second.
TESTED = ((2, 11), (2, 15))
LEAF = "torch::autograd::AccumulateGrad"
# Dimensions are saved as they were written, and a negative one is shown as an unsigned 64-bit integer.
_UNSIGNED = 2**64
NODE_HOOKS = ("register_hook", "register_prehook")

Edge = tuple[Any, int]


@cache
def refusal() -> str | None:
    """Why the graphs of the running PyTorch are not read, or None."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not TESTED[0] <= version < TESTED[1]:
        first, last = (".".join(map(str, v)) for v in TESTED)
        return (
            f"the autograd graph of torch {torch.__version__} was never checked (from {first} to below {last} were): "
            'use passes="loop" or a checked version'
        )
    if not hasattr(EXTENSION, "RedirectedEdges"):
        return "the compiled extension is missing"
    node = torch.zeros(1, requires_grad=True).sum(0).grad_fn
    missing = [name for name in ("_input_metadata", "_sequence_nr", "_saved_dim") if not hasattr(node, name)]
    if not hasattr(torch._C, "_will_engine_execute_node"):
        missing.append("_will_engine_execute_node")
    if not hasattr(torch.autograd.Variable, "_execution_engine"):
        missing.append("_execution_engine")
    if missing:
        return f"the autograd graph of torch {torch.__version__} has no {missing[0]}"
    return None


def sees_hooks() -> bool:
    """Whether hooks of nodes can be listed and silenced: only compiled code can."""
    return hasattr(EXTENSION, "node_hooks")


class _HooksRefused(TorchFunctionMode):
    """Inside, an activation that gets a hook (register_hook, retain_grad) is an error."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.retain_grad or (func is Tensor.register_hook and not _of_distributed(args[1])):
            _refuse_hook(func.__name__)
        return func(*args, **kwargs)


def _refuse_hook(what: str) -> None:
    raise ValueError(
        f"hooks on activations ({what}) need the compiled extension, which keeps them out of the passes that measure "
        "margins: install with a C++ compiler, or remove the hook"
    )


def without_hooks(model: Any, x: Any = None) -> AbstractContextManager[Any]:
    """For a forward pass model(x) whose graph is measured. Where hooks cannot be silenced, a hook on an activation or
    on a node would run in every pass and change what it measures: there it raises ValueError, as it does for a backward
    hook of a module, of all modules, or of x."""
    if sees_hooks() or tracing():
        return nullcontext()
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if module._backward_hooks or module._backward_pre_hooks:
            _refuse_hook(f"a backward hook of module {name!r}")
    of_all = torch.nn.modules.module
    if of_all._global_backward_hooks or of_all._global_backward_pre_hooks:
        _refuse_hook("a backward hook of all modules")
    if any(isinstance(tensor, Tensor) and tensor._backward_hooks for tensor in tree_leaves(x)):
        _refuse_hook("a hook of the model's input")
    return _hooks_refused()


@contextmanager
def _hooks_refused() -> Iterator[None]:
    """Tensors tell of their hooks by torch's function mode, nodes only by the calls of C functions, which a profile
    function sees. Where a profiler is at work already, hooks of nodes are not seen."""

    def watch(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in NODE_HOOKS and isinstance(function.__self__, Node):
            _refuse_hook(f"{function.__name__} of a node")

    free = sys.getprofile() is None
    with _HooksRefused():
        if free:
            sys.setprofile(watch)
        try:
            yield
        finally:
            if free:
                sys.setprofile(None)


class Graph:
    """The graph that made a tensor, read once.

    Args:
        root: the tensor
        begin: a sequence number; the signature tells the nodes that were made before it
    """

    def __init__(self, root: Tensor, begin: int = 0) -> None:
        self.root = root
        self.nodes: list[Any] = []
        self.signature = b""
        if EXTENSION is not None and hasattr(EXTENSION, "read_graph"):
            self.nodes, self.signature = EXTENSION.read_graph(root, begin)
        else:
            self.nodes = _breadth_first(root)

    @cached_property
    def edges(self) -> dict[Any, tuple[Edge, ...]]:
        return {node: node.next_functions for node in self.nodes}

    @cached_property
    def names(self) -> dict[Any, str]:
        return {node: node.name() for node in self.nodes}

    @cached_property
    def readers(self) -> dict[Any, list[tuple[Any, int, int]]]:
        found: dict[Any, list[tuple[Any, int, int]]] = defaultdict(list)
        for node, edges in self.edges.items():
            for number, (following, output) in enumerate(edges):
                if following is not None:
                    found[following].append((node, number, output))
        return found

    @property
    def top(self) -> Any:
        """The node that made the tensor."""
        return self.nodes[0]

    def above(self, nodes: Iterable[Any]) -> set[Any]:
        """The nodes from which one of `nodes` is reached, these included."""
        open_ = list(nodes)
        found = set(open_)
        while open_:
            for reader, _, _ in self.readers.get(open_.pop(), ()):
                if reader not in found:
                    found.add(reader)
                    open_.append(reader)
        return found

    def path_to(self, edges: Iterable[GradientEdge]) -> set[Any]:
        """The nodes from the root to what reads one of these edges."""
        return self.above(reader for edge in edges for reader, _ in self.readers_of(edge))

    def readers_of(self, edge: GradientEdge) -> list[tuple[Any, int]]:
        """Who reads one output of a node: (reader, number of its edge)."""
        return [(node, number) for node, number, output in self.readers.get(edge.node, ()) if output == edge.output_nr]

    @cached_property
    def places(self) -> dict[Any, int]:
        """The number of each node in the order of `nodes`."""
        return {node: i for i, node in enumerate(self.nodes)}

    def hooked(self) -> dict[Any, list[Any]]:
        """Nodes with hooks of the user: activations with register_hook or retain_grad, modules with backward hooks.

        Hooks that torch.distributed registers for itself are part of the backward and do not count.
        """
        if not sees_hooks():
            return {}
        assert EXTENSION is not None
        found = {}
        for i, callables, others in EXTENSION.node_hooks(self.root):
            callables = [hook for hook in callables if not _of_distributed(hook)]
            if callables or others:
                found[self.nodes[i]] = callables
        return found

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Inside, the user's hooks on the nodes of this graph do not run: what passes measure is not theirs to see."""
        hooked = [self.places[node] for node in self.hooked()]
        if not hooked:
            yield
            return
        assert EXTENSION is not None
        for i, callables, _ in EXTENSION.node_hooks(self.root):
            if i in hooked and any(map(_of_distributed, callables)):
                raise ValueError(
                    f"a hook on {self.nodes[i].name()}, the output of a module that fully_shard shards by itself, "
                    "would run in every pass: put it on a layer inside, or do not shard that module by itself"
                )
        hooks = EXTENSION.SilencedHooks(self.root, hooked)
        try:
            yield
        finally:
            hooks.restore()

    @contextmanager
    def redirected(self, places: Sequence[tuple[int, int, int]], ends: Sequence[Tensor]) -> Iterator[None]:
        """Inside, edges lead elsewhere: (place of the node, number of its edge, number of the one of `ends` that it
        leads to, -1 for none)."""
        assert EXTENSION is not None
        edges = EXTENSION.RedirectedEdges(self.root, places, ends)
        try:
            yield
        finally:
            edges.restore()

    def tensor_at(self, node: Any, output: int) -> Tensor:
        """A tensor that is output `output` of a node of this graph, without its values."""
        assert EXTENSION is not None
        tensor: Tensor = EXTENSION.at_gradient_edge(self.root, self.places[node], output, like_output(node, output))
        return tensor

    def still_to_run(self, nodes: Iterable[Any]) -> bool:
        """In a backward: whether it, or another after it, comes to one of these nodes once more."""
        if torch._C._autograd._get_current_graph_task_keep_graph():
            return True
        return any(torch._C._will_engine_execute_node(node) for node in nodes)


def leaves_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each tensor a leaf of the same memory that requires a gradient and has no hooks."""
    assert EXTENSION is not None
    leaves: list[Tensor] = EXTENSION.leaves_like(tensors)
    return leaves


def _breadth_first(root: Tensor) -> list[Any]:
    """The nodes of a graph where there is no compiled code to list them."""
    nodes = [get_gradient_edge(root).node]
    seen = set(nodes)
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return nodes


def gradients_at(
    ends: Sequence[Tensor | GradientEdge],
    roots: Sequence[Tensor | GradientEdge],
    seeds: Sequence[Tensor],
    keep_graph: bool,
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad(roots, ends, seeds, retain_graph=keep_graph, create_graph=create_graph, allow_unused=True),
    without what that costs before the engine runs. The seeds have the shapes of the roots, which the engine checks."""
    engine = torch.autograd.Variable._execution_engine
    found: tuple[Tensor | None, ...] = engine.run_backward(
        tuple(roots), tuple(seeds), keep_graph, create_graph, tuple(ends), allow_unreachable=True, accumulate_grad=False
    )
    return found


def same_edge(one: GradientEdge, other: GradientEdge) -> bool:
    """Whether two edges are the same autograd variable."""
    return one.node is other.node and one.output_nr == other.output_nr


def shape_of(node: Any, output: int) -> torch.Size:
    """The shape of an output of the forward operation."""
    return node._input_metadata[output].shape


def shapes_of(node: Any) -> list[torch.Size]:
    """The shapes of all outputs of the forward operation."""
    return [output.shape for output in node._input_metadata]


def like_output(node: Any, output: int, zeros: dict[Any, Tensor] | None = None) -> Tensor:
    """A constant of the shape, dtype and device of an output that holds no memory of its own: the values of a leaf,
    else zeros. `zeros`, where it is given, keeps them for the next call."""
    if node.name() == LEAF:
        return node.variable.detach()
    like = node._input_metadata[output]
    key = like.dtype, like.device
    zero = None if zeros is None else zeros.get(key)
    if zero is None:
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        if zeros is not None:
            zeros[key] = zero
    return zero.expand(like.shape)


def saved(node: Any, name: str) -> Any:
    """An argument of the forward operation that is a number, a flag or a list of those; None where it has none.

    Not for tensors: reading a tensor that a checkpoint has dropped would run its forward pass again.
    """
    return getattr(node, f"_saved_{name}", None)


def saved_dim(node: Any, name: str, ndim: int) -> int:
    """A dimension that was given to the forward operation, from 0 on, of a tensor with ndim dimensions."""
    return _from_zero(saved(node, name), ndim)


def saved_dims(node: Any, name: str, ndim: int) -> list[int]:
    """Dimensions that were given to the forward operation; all where it was given none."""
    dims = saved(node, name)
    if dims is None or len(dims) == 0:
        return list(range(ndim))
    return [_from_zero(dim, ndim) for dim in dims]


def _from_zero(dim: int, ndim: int) -> int:
    dim = dim - _UNSIGNED if dim >= _UNSIGNED // 2 else dim
    return dim + ndim if dim < 0 else dim


def made_before(node: Any, sequence: int) -> bool:
    """Whether a node, which is no leaf, was made before that sequence number was current in this thread."""
    return node.name() != LEAF and node._sequence_nr() < sequence


def sequence_now() -> int:
    """The number that the next node of this thread gets, 0 where PyTorch does not say."""
    get = getattr(torch._C._autograd, "_get_sequence_nr", None)
    return 0 if get is None else get()


def _of_distributed(hook: Any) -> bool:
    return str(getattr(hook, "__module__", None) or type(hook).__module__).startswith("torch.distributed")

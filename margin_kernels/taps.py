"""Capture of named layers' activations, the points h_l at which G_l[n,j,:] = d gap[n,j] / d h_l[n] is taken.

A tap is not the activation but its edge in the autograd graph: the pair (node, output number) that produced it. The
edge keeps no activation alive and does not move when a later in-place operation (an in-place ReLU after a convolution,
say) rewrites the tensor. Two kinds of output need help, and the hook passes a replacement on:

    a view        in-place operations on a view rewrite the history of its base: a clone is passed on
    no gradient   frozen stems, and the model's input: an alias with a place in the graph is passed on, without a copy

Hooks live for one forward only, so the model stays clean (deepcopy, pickle, state dict), and the recomputation of
non-reentrant checkpointing, which happens later, runs without them and keeps the first capture.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from .backends import EXTENSION
from .tracing import is_plain, tracing

INPUT, OUTPUT = "input", "output"

# Autograd nodes that hand on the values of their first input in unchanged order.
SAME_VALUES = {
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "UnsqueezeBackward0",
    "CloneBackward0",
}


class Tap(NamedTuple):
    """One tapped activation h_l [N,*]: its name, its edge in the autograd graph and its shape."""

    name: str
    edge: GradientEdge
    shape: torch.Size


class Head(NamedTuple):
    """The final linear layer z = W h + b: W [C,D], h [N,D], the edges that carry h, and the pooling that made it.

    `pooled` is the edge of the activation whose mean over `positions` positions is h, None where no pooling was found.
    """

    weight: Tensor
    input: Tensor
    edges: list[GradientEdge]
    pooled: GradientEdge | None = None
    positions: int = 1


class Captured(NamedTuple):
    """One forward pass: logits [N,C], the taps in the order of their names, the head where it was found.

    `sources` marks the nodes that stand for tensors without gradient, see `cut_sources`.
    """

    logits: Tensor
    taps: list[Tap]
    head: Head | None = None
    sources: Sequence[Tensor] = ()


def same_edge(one: GradientEdge, other: GradientEdge) -> bool:
    """Whether two edges are the same autograd variable."""
    return one.node is other.node and one.output_nr == other.output_nr


def graph_nodes(tensor: Tensor) -> list[Any]:
    """The nodes of the autograd graph that made a tensor."""
    return nodes_behind(get_gradient_edge(tensor).node)


def nodes_behind(node: Any) -> list[Any]:
    """A node of the autograd graph and all that its backward leads to."""
    nodes: list[Any] = [node]
    seen = set(nodes)
    for node in nodes:
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return nodes


def explicit(logits: Tensor, activations: Sequence[Tensor]) -> Captured:
    """Taps from tensors that the caller kept: activations [N,*] of one forward pass that led to logits [N,C].

    Raises TypeError for anything but tensors, ValueError for a tensor that is not part of an autograd graph.
    """
    if isinstance(activations, Tensor) or not isinstance(activations, Sequence):
        raise TypeError(f"activations must be a list of tensors, got {type(activations).__name__}")
    if len(activations) == 0:
        raise ValueError("activations must hold at least one tensor, got an empty list")
    taps = []
    for i, activation in enumerate(activations):
        name = f"activations[{i}]"
        if not isinstance(activation, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(activation).__name__}")
        if not activation.requires_grad:
            raise ValueError(f"{name} does not require grad: call requires_grad_() on it before the forward pass")
        taps.append(Tap(name, get_gradient_edge(activation), activation.shape))
    return Captured(logits, taps)


def resolve(model: nn.Module, layers: Sequence[str] | str) -> tuple[str, ...]:
    """Names of taps from names and glob patterns: `*` and `?` stay within a part of a dotted name, `**` crosses dots.

    "input" and "output" are the model's input and its logits; "name:index" is one call of a module called repeatedly.
    Returns the names in the order given, patterns in the order of named_modules(), each once.
    Raises ValueError for an empty selection, and for a name or pattern that no module has, with the close names.
    """
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    modules = [name for name, _ in model.named_modules() if name]
    names: dict[str, None] = {}
    for layer in layers:
        if not isinstance(layer, str):
            raise TypeError(f"layers must be names, got {type(layer).__name__}")
        base, colon, _ = layer.partition(":")
        if colon and not re.fullmatch(r"[^:]+:\d+", layer):
            raise ValueError(f'layers has {layer!r}: a call of a reused module is written "name:index", as in "act:1"')
        if layer in (INPUT, OUTPUT) or base in modules:
            names[layer] = None
            continue
        matches = [] if colon else [name for name in modules if _pattern(layer).fullmatch(name)]
        if not matches:
            close = difflib.get_close_matches(base, [INPUT, OUTPUT, *modules], n=4, cutoff=0.4)
            known = f"close names: {', '.join(close)}" if close else f"known: {', '.join([INPUT, OUTPUT, *modules])}"
            raise ValueError(f"layers has {layer!r}, which names no module of {type(model).__name__}; {known}")
        names.update(dict.fromkeys(matches))
    if not names:
        raise ValueError('layers must name at least one tap, for example ("input", "output")')
    return tuple(names)


def _pattern(glob: str) -> re.Pattern[str]:
    parts = {"**": ".*", "*": r"[^.]*", "?": r"[^.]"}
    return re.compile("".join(parts.get(part) or re.escape(part) for part in re.split(r"(\*\*|\*|\?)", glob)))


class _InGraph(torch.autograd.Function):
    """Identity without a copy that gives a tensor a place in the graph; unlike on a leaf, in-place changes stay legal.

    The second output marks the node: nobody changes it in place, so its grad_fn stays.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return x.detach(), anchor.detach()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, None]:
        return None, None


def _in_graph(x: Tensor, sources: list[Tensor]) -> Tensor:
    """x where it requires grad, else an alias of x that does; `sources` receives the mark of its node."""
    if x.requires_grad:
        return x
    alias, mark = _InGraph.apply(torch.empty(0, requires_grad=True), x)
    sources.append(mark)
    return alias


def in_graph(x: Any) -> tuple[Any, list[Tensor]]:
    """A floating-point x with a place in the graph, and the marks of its node for `cut_sources`; anything else as it
    is."""
    sources: list[Tensor] = []
    return (_in_graph(x, sources) if isinstance(x, Tensor) and x.is_floating_point() else x), sources


def cut_sources(root: Tensor, captured: Captured) -> None:
    """Spare the backward of root the gradients of the model's input and of frozen stems, which nobody reads.

    A matter of time alone: without the compiled extension these gradients are computed and dropped.
    """
    cut_gradients = getattr(EXTENSION, "cut_gradients", None)
    if captured.sources and cut_gradients is not None and not tracing():
        cut_gradients(root, captured.sources)


class Taps:
    """The taps of one model: `capture` runs a forward pass and returns its logits, taps and head.

    model   nn.Module with one positional argument and logits [N,C] as output
    layers  names and glob patterns as in `resolve`
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | str) -> None:
        self.names = resolve(model, layers)
        modules = [name for name in self.names if name not in (INPUT, OUTPUT)]
        self._modules = tuple(dict.fromkeys(name.partition(":")[0] for name in modules))
        # The modules that the first forward showed to be head and pooling; None before it.
        self._ends: tuple[str, ...] | None = None

    def capture(self, model: nn.Module, x: Any) -> Captured:
        """Run model(x) with gradients and return logits [N,C], taps and head.

        Raises ValueError for an input that cannot be tapped, and for a layer that was not called, called several times
        without an index, run without gradients, or whose output is not a floating-point tensor.
        """
        calls: dict[str, list[Tap | None]] = defaultdict(list)
        sources: list[Tensor] = []
        ends = _Ends()
        if INPUT in self.names:
            x = _in_graph(_floating(x), sources)
        with _hooks(self._handles(model, calls, sources, ends)):
            logits = model(x)
        if not isinstance(logits, Tensor):
            raise ValueError(f"model must return its logits as one tensor [N,C], got {type(logits).__name__}")
        if not logits.requires_grad:
            raise ValueError("the logits do not require grad: they depend differentiably on no tap and no parameter")
        head = ends.head(logits)
        if self._ends is None:
            self._ends = ends.names
        taps = []
        for name in self.names:
            if name == INPUT:
                taps.append(Tap(name, get_gradient_edge(x), x.shape))
            elif name == OUTPUT:
                taps.append(Tap(name, get_gradient_edge(logits), logits.shape))
            else:
                taps.append(_pick(name, calls[name.partition(":")[0]]))
        return Captured(logits, taps, head, sources)

    def _handles(
        self, model: nn.Module, calls: dict[str, list[Tap | None]], sources: list[Tensor], ends: _Ends
    ) -> Iterator[RemovableHandle]:
        for name in self._modules:
            keep = partial(self._keep, name, calls[name], sources)
            yield model.get_submodule(name).register_forward_hook(keep)
        for name in _end_candidates(model) if self._ends is None else self._ends:
            # First of the module's hooks: it must see what the layer computed, not what other hooks made of it.
            note = partial(ends.note, name)
            yield model.get_submodule(name).register_forward_hook(note, prepend=True)

    def _keep(
        self, name: str, calls: list[Tap | None], sources: list[Tensor], module: nn.Module, args: Any, output: Any
    ) -> Tensor | None:
        if name not in self.names and f"{name}:{len(calls)}" not in self.names:
            calls.append(None)
            return None
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {name!r} returns {kind}; a tap must return one floating-point tensor [N,*]")
        if not torch.is_grad_enabled():
            raise ValueError(
                f"layer {name!r} runs without gradients, so it cannot be tapped: use non-reentrant checkpointing "
                "(use_reentrant=False), and freeze layers with requires_grad_(False) and not with torch.no_grad()"
            )
        kept = output.clone() if output._is_view() and output.requires_grad else _in_graph(output, sources)
        calls.append(Tap(name, get_gradient_edge(kept), kept.shape))
        return None if kept is output else kept


def _floating(x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise ValueError(f'the tap "input" needs a tensor as the model\'s input, got {type(x).__name__}')
    if not x.is_floating_point():
        raise ValueError(
            f'the tap "input" needs a floating-point input, got {x.dtype}: tap the embedding of the tokens instead'
        )
    return x


def _pick(name: str, calls: list[Tap | None]) -> Tap:
    base, _, index = name.partition(":")
    if not calls:
        raise ValueError(f"layer {base!r} was not called in this forward pass, so it cannot be tapped")
    listing = ", ".join(f'"{base}:{i}"' for i in range(len(calls)))
    if not index and len(calls) > 1:
        raise ValueError(f"layer {base!r} was called {len(calls)} times in one forward pass: name one of {listing}")
    if index and int(index) >= len(calls):
        raise ValueError(f"layer {name!r}: {base!r} was called {len(calls)} times in this forward pass: {listing}")
    tap = calls[int(index or 0)]
    assert tap is not None
    return tap._replace(name=name)


@contextmanager
def _hooks(handles: Iterator[RemovableHandle]) -> Iterator[None]:
    """Hooks that are gone when the forward pass ends, also by an exception."""
    registered: list[RemovableHandle] = []
    try:
        for handle in handles:
            registered.append(handle)
        yield
    finally:
        for handle in registered:
            handle.remove()


_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def _end_candidates(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) in (nn.Linear, *_POOLS)]


class _Ends:
    """What one forward pass shows about the layers that may be its head and the pooling before it.

    The head is the module of exactly type nn.Linear whose output is the logits, unchanged; the pooling is the adaptive
    average pooling to size 1 whose output reaches the head's input through views only. Both are read off the graph that
    is differentiated: where it shows anything else there is no closed form, and the taps get their pass.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._linear: list[tuple[str, Tensor, Tensor, GradientEdge]] = []
        self._pooled: list[tuple[str, GradientEdge, GradientEdge, int]] = []

    def note(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0] if len(args) == 1 else None
        if not isinstance(x, Tensor) or not x.requires_grad or not output.requires_grad or "forward" in vars(module):
            return
        if type(module) is nn.Linear:
            if x.dim() == 2 and is_plain(module.weight):
                self._linear.append((name, module.weight, x, get_gradient_edge(output)))
        elif output.dim() > 2 and output.shape[2:].numel() == 1 and x.dim() == output.dim():
            edges = get_gradient_edge(x), get_gradient_edge(output)
            self._pooled.append((name, *edges, x.shape[2:].numel()))

    def head(self, logits: Tensor) -> Head | None:
        """The head that this forward pass shows, and the names of its modules in `names`."""
        made = get_gradient_edge(logits)
        for name, weight, x, output in self._linear:
            if not same_edge(output, made):
                continue
            self.names = (name,)
            head = Head(weight, x, _same_values(x))
            for pool, before, after, positions in self._pooled:
                if any(same_edge(after, edge) for edge in head.edges):
                    self.names = (name, pool)
                    return head._replace(pooled=before, positions=positions)
            return head
        return None


def _same_values(x: Tensor) -> list[GradientEdge]:
    """The edge of x, then the edges from which x came through views alone."""
    edges = [get_gradient_edge(x)]
    while edges[-1].node.name() in SAME_VALUES:
        node, number = edges[-1].node.next_functions[0]
        if node is None:
            break
        edges.append(GradientEdge(node, number))
    return edges

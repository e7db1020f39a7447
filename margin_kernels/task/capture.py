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

import copy
import difflib
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from ..gradients.autograd_graph import same_edge, sequence_now, without_hooks
from ..gradients.proofs import Proof, Proofs
from ..gradients.request import HEAD_INPUT, Captured, Head, Tap
from ..sharding import whole
from ..tracing import is_plain
from .reading import Inputs, Reading
from .sharded import plain_type

INPUT, OUTPUT = "input", "output"
_T = TypeVar("_T")

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

# A module, one item of what it returns (a tuple, list or dict), one of its calls: "name[0]:1".
_NAME = re.compile(r"(?P<base>[^:\[\]]+)(?P<items>(?:\[[^\[\]]+\])*)(?::(?P<call>\d+))?")


class _Name(NamedTuple):
    """A tap's name in parts: the module, the way to one tensor of what it returns, and which call of the module."""

    base: str
    items: tuple[int | str, ...]
    call: int | None

    @classmethod
    def parse(cls, name: str) -> _Name:
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f'layers has {name!r}: a call of a reused module is written "name:index", as in "act:1", and one '
                'tensor of those that a module returns "name[index]", as in "lstm[0]"'
            )
        items = tuple(int(item) if item.isdigit() else item for item in re.findall(r"\[([^\[\]]+)\]", found["items"]))
        return cls(found["base"], items, None if found["call"] is None else int(found["call"]))


def resolve(model: nn.Module, layers: Sequence[str] | str) -> tuple[str, ...]:
    """Names of taps from names and glob patterns: `*` and `?` stay within a part of a dotted name, `**` crosses dots.

    "input" and "output" are the model's input and its logits; "name:index" is one call of a module called repeatedly,
    "name[index]" one of several tensors that a module returns. Returns the names in the order given, patterns in the
    order of named_modules(), each once.
    Raises ValueError for an empty selection, and for a name or pattern that no module has, with the close names.
    """
    layers = (layers,) if isinstance(layers, str) else tuple(layers)
    modules = [name for name, _ in model.named_modules() if name]
    names: dict[str, None] = {}
    for layer in layers:
        if not isinstance(layer, str):
            raise TypeError(f"layers must be names, got {type(layer).__name__}")
        base = _Name.parse(layer).base
        if layer == OUTPUT or is_input(layer) or base in modules:
            names[layer] = None
            continue
        matches = [name + layer.removeprefix(base) for name in modules if _pattern(base).fullmatch(name)]
        if not matches or ":" in layer:
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


def is_input(name: str) -> bool:
    """Whether a tap is the model's input, "input", or one of several, "input[image]"."""
    return name == INPUT or (name.startswith(f"{INPUT}[") and ":" not in name)


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


def in_graph(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """x with a place in the graph, and the marks of its node for `cut_sources`."""
    sources: list[Tensor] = []
    return _in_graph(x, sources), sources


class Taps:
    """The taps of one model: `capture` runs a forward pass and returns its logits, taps and head.

    Args:
        model: nn.Module
        layers: names and glob patterns as in `resolve`
        batch_dim: the batch dimension of taps where the graph does not show it: a number for all, or name -> number
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str] | str, batch_dim: int | Mapping[str, int] | None = None
    ) -> None:
        self.names = resolve(model, layers)
        self.batch_dim = _batch_dims(self.names, batch_dim)
        named = {name: _Name.parse(name) for name in self.names if name != OUTPUT}
        self._parsed = {name: parsed for name, parsed in named.items() if not is_input(name)}
        self._inputs = {name: parsed.items for name, parsed in named.items() if is_input(name)}
        self._of_module: dict[str, list[tuple[str, _Name]]] = defaultdict(list)
        for name, parsed in self._parsed.items():
            self._of_module[parsed.base].append((name, parsed))
        self.modules = tuple(self._of_module)
        self._proofs: Proofs[Proof] = Proofs()
        # The modules that the first forward showed to be head and pooling; None before it, and once another kind of
        # module has taken the place of one.
        self._ends: tuple[str, ...] | None = None

    @property
    def head(self) -> str:
        """The name of the module that the first forward showed to be the final layer."""
        return self._ends[0] if self._ends else ""

    def capture(self, model: nn.Module, inputs: Any, reading: Reading | None = None) -> Captured:
        """Run the model on inputs with gradients and return logits [N,*], taps and head.

        Raises ValueError for an input that cannot be tapped, and for a layer that was not called, called several times
        without an index, run without gradients, or whose output is not a floating-point tensor.
        """
        calls: dict[str, list[dict[str, Tap]]] = defaultdict(list)
        sources: list[Tensor] = []
        ends = _Ends()
        begin = sequence_now()
        inputs = inputs if isinstance(inputs, Inputs) else Inputs((inputs,), {})
        tensors = inputs.tensors()
        given = [get_gradient_edge(t) for t in tensors if t.grad_fn is not None]
        entries: dict[str, Tap] = {}
        for name, items in self._inputs.items():
            x = inputs.floating(items)
            aliased = _in_graph(x, sources)
            inputs = inputs if aliased is x else inputs.with_tensor(x, aliased)
            # Now, for a model that changes its input in place moves the tensor along the graph.
            entries[name] = Tap(name, get_gradient_edge(aliased), aliased.shape, self.batch_dim.get(name))
        if self._ends is not None and not _are_candidates(model, self._ends):
            self._ends = None
        with _hooks(self._handles(model, calls, sources, ends)), without_hooks(model, tensors):
            logits = whole((reading or Reading())(model, inputs))
        if not logits.requires_grad:
            raise ValueError("the logits do not require grad: they depend differentiably on no tap and no parameter")
        head = ends.head(logits)
        if self._ends is None:
            self._ends = ends.names
        taps = []
        for name in self.names:
            if name in entries:
                tap = entries[name]
            elif name == OUTPUT:
                tap = Tap(name, get_gradient_edge(logits), logits.shape, self.batch_dim.get(name))
            else:
                tap = self.pick(name, calls[self._parsed[name].base])
            taps.append(tap)
        captured = Captured(logits, taps, head, sources, begin, given, proofs=self._proofs)
        if captured.head_depends_on_taps():
            captured.head = None
        return captured

    def _handles(
        self, model: nn.Module, calls: dict[str, list[dict[str, Tap]]], sources: list[Tensor], ends: _Ends
    ) -> Iterator[RemovableHandle]:
        # Another thread may run the same model meanwhile, which then has these hooks as well.
        thread = threading.get_ident()

        def here(hook: Callable[..., Any], *args: Any) -> Any:
            return hook(*args) if threading.get_ident() == thread else None

        for name in self.modules:
            keep = partial(self.keep, name, calls[name], sources)
            yield model.get_submodule(name).register_forward_hook(partial(here, keep))
        for name in end_candidates(model) if self._ends is None else self._ends:
            # First of the module's hooks: it must see what the layer computed, not what other hooks made of it.
            note = partial(ends.note, name)
            yield model.get_submodule(name).register_forward_hook(partial(here, note), prepend=True)

    def keep(
        self,
        base: str,
        calls: list[dict[str, Tap]],
        sources: list[Tensor],
        module: nn.Module,
        args: Any,
        output: Any,
    ) -> Any:
        taps: dict[str, Tap] = {}
        passed_on = output
        for name, parsed in self._of_module[base]:
            if parsed.call in (None, len(calls)):
                items = _path(name, parsed.items, passed_on)
                tensor = _item(passed_on, items)
                tapped = self.tapped(name, tensor, sources)
                taps[name] = Tap(name, get_gradient_edge(tapped), tapped.shape, self.batch_dim.get(name))
                passed_on = passed_on if tapped is tensor else _with_item(passed_on, items, tapped)
        calls.append(taps)
        return None if passed_on is output else passed_on

    def tapped(self, name: str, output: Any, sources: list[Tensor]) -> Tensor:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            kind = f"a tensor of {output.dtype}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"layer {name!r} returns {kind}; a tap must be a floating-point tensor")
        if not torch.is_grad_enabled():
            raise ValueError(
                f"layer {name!r} runs without gradients, so it cannot be tapped: use non-reentrant checkpointing "
                "(use_reentrant=False), and freeze layers with requires_grad_(False) and not with torch.no_grad()"
            )
        return output.clone() if output._is_view() and output.requires_grad else _in_graph(output, sources)

    def tensors(self, base: str, call: int, output: Any) -> dict[str, Tensor]:
        """The tensors that the taps on one call of a module name in its output."""
        found = {}
        for name, parsed in self._of_module[base]:
            if parsed.call in (None, call):
                tensor = _item(output, _path(name, parsed.items, output))
                if isinstance(tensor, Tensor):
                    found[name] = tensor
        return found

    def picked(self, name: str, calls: Mapping[str, list[dict[str, _T]]]) -> _T | None:
        """What `calls` of a tap's module hold for it; None where it is no module's, or the call is none of them."""
        parsed = self._parsed.get(name)
        found = [] if parsed is None else calls[parsed.base]
        if parsed is None or (parsed.call is None and len(found) != 1) or (parsed.call or 0) >= len(found):
            return None
        return found[parsed.call or 0].get(name)

    def base(self, name: str) -> str:
        """The name of the module that a tap belongs to."""
        return self._parsed[name].base

    def pick(self, name: str, calls: list[dict[str, Tap]]) -> Tap:
        base, _, call = self._parsed.get(name, (name, (), None))
        if not calls:
            raise ValueError(f"layer {base!r} was not called in this forward pass, so it cannot be tapped")
        listing = ", ".join(f'"{name.partition(":")[0]}:{i}"' for i in range(len(calls)))
        if call is None and len(calls) > 1:
            raise ValueError(f"layer {base!r} was called {len(calls)} times in one forward pass: name one of {listing}")
        if call is not None and call >= len(calls):
            raise ValueError(f"layer {name!r}: {base!r} was called {len(calls)} times in this forward pass: {listing}")
        return calls[call or 0][name]


def _batch_dims(names: Sequence[str], given: int | Mapping[str, int] | None) -> dict[str, int]:
    if given is None:
        return {}
    if isinstance(given, int) and not isinstance(given, bool):
        return dict.fromkeys(names, given)
    if not isinstance(given, Mapping) or not all(isinstance(d, int) for d in given.values()):
        raise TypeError(f"batch_dim must be a dimension or a dict from names of taps to dimensions, got {given!r}")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"batch_dim must name taps ({', '.join(names)}), got {unknown[0]!r}")
    return dict(given)


def _path(name: str, items: tuple[int | str, ...], output: Any) -> tuple[int | str, ...]:
    """The way to one tensor of an output: as the name says, then always the first."""
    path: list[int | str] = list(items)
    found = output
    for item in items:
        try:
            found = found[item]
        except (TypeError, KeyError, IndexError) as error:
            raise ValueError(f"layer {name!r}: what the module returns has no item [{item}] ({error})") from error
    while isinstance(found, (tuple, list)) and len(found):
        path.append(0)
        found = found[0]
    return tuple(path)


def _item(output: Any, path: tuple[int | str, ...]) -> Any:
    for item in path:
        output = output[item]
    return output


def _with_item(output: Any, path: tuple[int | str, ...], tensor: Tensor) -> Any:
    """The output with another tensor at that place, of the same types."""
    if not path:
        return tensor
    item, rest = path[0], path[1:]
    inner = _with_item(output[item], rest, tensor)
    if isinstance(output, tuple):
        values = [inner if i == item else value for i, value in enumerate(output)]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    changed = copy.copy(output)
    changed[item] = inner
    return changed


@contextmanager
def _hooks(handles: Iterator[RemovableHandle]) -> Iterator[None]:
    """Hooks that are gone when the forward pass ends, also by an exception."""
    registered: list[RemovableHandle] = []
    try:
        for handle in handles:
            registered.append(handle)  # noqa: PERF402  # if one fails, those before it are removed
        yield
    finally:
        for handle in registered:
            handle.remove()


_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def end_candidates(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if _is_candidate(module)]


def _is_candidate(module: nn.Module) -> bool:
    return plain_type(module) in (nn.Linear, *_POOLS)


def _are_candidates(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether modules that were candidates still are: since then others may have taken their places."""
    try:
        return all(_is_candidate(model.get_submodule(name)) for name in names)
    except AttributeError:
        return False


class _Ends:
    """What one forward pass shows about the layers that may be its head and the pooling before it.

    The head is the module of exactly type nn.Linear whose output is the logits, unchanged; the pooling is the adaptive
    average pooling to size 1 whose output reaches the head's input through views only. Both are read off the graph that
    is differentiated: where it shows anything else there is no closed form, and the taps get their pass.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self._linear: list[tuple[str, Tensor, Tensor, GradientEdge, GradientEdge]] = []
        self._pooled: list[tuple[str, GradientEdge, GradientEdge, int]] = []

    def note(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0] if len(args) == 1 else None
        if not isinstance(x, Tensor) or not x.requires_grad or not output.requires_grad or "forward" in vars(module):
            return
        if isinstance(module, nn.Linear) and plain_type(module) is nn.Linear:
            if x.dim() == 2 and is_plain(module.weight):
                self._linear.append((name, module.weight, x, get_gradient_edge(x), get_gradient_edge(output)))
        elif output.dim() > 2 and output.shape[2:].numel() == 1 and x.dim() == output.dim():
            edges = get_gradient_edge(x), get_gradient_edge(output)
            self._pooled.append((name, *edges, x.numel() // output.numel()))

    def head(self, logits: Tensor) -> Head | None:
        """The head that this forward pass shows, and the names of its modules in `names`."""
        made = get_gradient_edge(logits)
        for name, weight, x, entry, output in self._linear:
            # Not where a hook has changed what the layer made, nor where its input was changed in place behind it.
            moved = not same_edge(output, made) or not same_edge(entry, get_gradient_edge(x))
            if moved or not _reads(made.node, entry):
                continue
            self.names = (name,)
            head = Head(weight, x, same_values(x))
            for pool, before, after, positions in self._pooled:
                if any(same_edge(after, edge) for edge in head.edges):
                    self.names = (name, pool)
                    return head._replace(pooled=before, positions=positions)
            return head
        return None


def _reads(node: Any, entry: GradientEdge) -> bool:
    """Whether a node is the product of a linear layer with the tensor at that edge, cast or not."""
    if node.name() not in HEAD_INPUT:
        return False
    following, output = node.next_functions[HEAD_INPUT[node.name()]]
    while following is not None and following.name() == "ToCopyBackward0":
        following, output = following.next_functions[0]
    return following is not None and same_edge(GradientEdge(following, output), entry)


def same_values(x: Tensor) -> list[GradientEdge]:
    """The edge of x, then the edges from which x came through views alone."""
    edges = [get_gradient_edge(x)]
    while edges[-1].node.name() in SAME_VALUES:
        node, number = edges[-1].node.next_functions[0]
        if node is None:
            break
        edges.append(GradientEdge(node, number))
    return edges

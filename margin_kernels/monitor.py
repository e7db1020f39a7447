"""MarginMonitor: the margins of every layer in an ordinary training step, from the gradients that it computes anyway.

A backward pass of cross-entropy brings to the logits g = s (p - e_y) for each sample, with s its factor (1 / N, class
weight, loss scale, accumulation), and to a layer the gradient s d nll / d h. That is -s (1 - p_y) d phi / d h with
phi the log-odds of the label, so that one read of what passes by gives

    d[n,l] = phi (1 - p_y) s / (eps (1 - p_y) s + || what arrives at h_l[n] ||_q)       in the p-norm, q = p / (p - 1)

the distance of LargeMarginLoss(competitors="soft"). The label is the only negative entry of g; s = -g_y / (1 - p_y);
and what is left of g beside s (p - e_y) shows where the loss was another one.

One logit f stands for the classes (0, f). All gradients of a sample then have one direction, so that with the label
given any loss of the logit will do: phi is f or -f, and |g| stands for (1 - p_y) s.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from . import functional
from .backends import EXTENSION
from .batchnorm import running_statistics, training_batchnorms
from .gradients.autograd_graph import Graph
from .gradients.loop import difference_norms
from .gradients.proofs import Proofs
from .gradients.request import Captured, Request, Tap
from .gradients.split import due
from .gradients.structure import by_sample
from .losses import base
from .losses.targets import two_classes
from .outputs import is_one_logit, with_zero
from .random_state import RandomState
from .reference.dual_norm import dual_exponent
from .sharding import gathered, whole
from .task.capture import INPUT, OUTPUT, Taps
from .task.layout import seen_from
from .task.reading import Output, Reading
from .tracing import is_plain, tracing

# What g differs from s (p - e_y), summed over the rivals and relative to the label's entry: up to `KNOWN` a margin
# counts as measured; from `OTHER` on, where rounding does not explain it, the loss was another one.
KNOWN, OTHER = 0.01, 0.03
# What rounding of p_y leaves in p_y - 1.
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Share of samples of another loss from which on nothing is summarised.
TOLERATED = 0.01
# A trial compares what arrives at the layers with what the logits alone send them.
TRIAL = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 1e-1, torch.bfloat16: 1e-1}
# Forward passes that may wait for their backward; of more the first are forgotten.
PENDING = 64
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
TWO_CLASSES = (
    "the gradients of one logit, or of two classes, do not show the labels: monitor.labels(y) between forward and "
    "backward"
)
CHANGED = (
    "the logits were changed in place after the model returned them, and the loss is that of others: change them in "
    "the model, or measure on a sub-batch with MarginMonitor(..., every=K)"
)
MODEL = "logits of the model"
IGNORED = -100  # the label of a sample with one logit that is left out
INSTEAD = "measure on a sub-batch with MarginMonitor(..., every=K)"
# What the gradient of the logits shows of each sample: s, phi, 1 - p_y, whether that is right, whether it is another
# loss, the norm of g, and 1 (a compiled model has empty rows).
FACTOR, PHI, REST, KNOWS, OTHER_LOSS, NORM, PRESENT = range(7)


@dataclass(frozen=True)
class MarginSummary:
    """Margins since the last `reset`, in the units of the activations. L layers, Q quantiles, B bins.

    Attributes:
        layers: names
        count, unknown: samples measured, and not, [L] int64
        mean, right: their mean, and the share with d > 0, [L] float64
        at, quantiles: of the quantiles, and they themselves at each layer [L,*]
        edges, histogram: of bins [L,B+1], and the samples in them [L,B] int64
    """

    layers: tuple[str, ...]
    count: Tensor
    unknown: Tensor
    mean: Tensor
    right: Tensor
    at: Tensor
    quantiles: Tensor
    edges: Tensor
    histogram: Tensor

    def frame(self) -> Any:
        """A pandas.DataFrame with a row for each layer."""
        import pandas

        columns = {"count": self.count, "unknown": self.unknown, "mean": self.mean, "right": self.right}
        rows = {name: values.tolist() for name, values in columns.items()}
        rows |= {f"q{100 * q:g}": self.quantiles[:, i].tolist() for i, q in enumerate(self.at.tolist())}
        return pandas.DataFrame(rows, index=pandas.Index(self.layers, name="layer"))


class MarginMonitor:
    """The margins of chosen layers in ordinary cross-entropy training, for no pass through the network.

        with MarginMonitor(model, ("layer1", "layer4")) as monitor:
            for x, y in loader:
                F.cross_entropy(model(x), y).backward()
                ...
        print(monitor.summary().frame())

    Gradients of parameters stay what they were, bit for bit. The labels are read off the gradient, but of two classes
    and of one logit, which do not show them: `monitor.labels(y)` between forward and backward. Reductions, class
    weights, loss scales, accumulation and DDP need no word: the factor of each sample is read off the gradient of the
    logits. A sample is unknown (NaN, counted) where that gradient does not determine its margin: ignored samples, and
    where 1 - p_y is lost in the rounding of the user's loss, which torch's cross-entropy in float32 does from a gap of
    about 10 on. Of one logit any loss will do, since all have the same direction.

    Args:
        model: nn.Module that returns logits [N,C], or one logit [N] or [N,1]; wrap or compile it afterwards.
        layers: names, patterns and calls of modules as in MarginTask; "input" is the model's input, whose gradient no
            ordinary step computes: it costs what the first layer's input gradient costs.
        p: norm of the distances, in [1, inf]; float("inf") or "inf".
        eps: added to the norm, > 0.
        batch_dim: which dimension of a layer's output is the batch, where the graph does not show it: a number for all
            layers, or {"name": number}. A compiled model needs it.
        batch_size: the largest batch of a compiled model, which cannot make room as it runs.
        every: None, or K: every K-th step the margins are measured by a forward and a backward pass of their own, on
            the first `samples` of its batch, with the weights after that step and running statistics. For losses whose
            gradient has another direction: label smoothing, mixup, other terms. It needs `labels`. Not for compiled or
            wrapped models.
        samples: size of the sub-batch.
        output: where the logits are in what the model returns: a key, an attribute or a position. None: it returns
            them, or something with `.logits` or the key "logits".

    Raises:
        ValueError, TypeError: wrong arguments; unknown layers; a layer whose batch dimension is not known; in
            `summary`, what the gradients showed: another loss than cross-entropy, one that reaches a layer around the
            logits, or one of logits that were changed in place behind the model.

    Training mode batch norm couples samples, as a mean over the batch does: what arrives at a layer before one is not
    the gradient of a sample's own loss alone (a warning, once).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | str,
        p: float | str = 2,
        eps: float = 1e-6,
        batch_dim: int | Mapping[str, int] | None = None,
        batch_size: int | None = None,
        every: int | None = None,
        samples: int = 32,
        output: Output = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if hasattr(model, "_orig_mod"):
            raise ValueError("model must not be compiled yet: give the monitor the model, and compile it afterwards")
        self.model = model
        self.p, self.eps = base.norm_exponent(p), base.positive("eps", eps)
        self.batch_size = None if batch_size is None else base.count("batch_size", batch_size)
        self.every = None if every is None else base.count("every", every)
        self.samples = base.count("samples", samples)
        self._reading = Reading(output, remedy='MarginMonitor(..., output="name")')
        self._taps = Taps(model, layers, batch_dim)
        self._handles: list[RemovableHandle] = []
        self._open: _Pass | None = None
        self._last: _Pass | None = None
        self._done: list[_Pass] = []
        self._proofs: Proofs[_Places] = Proofs()
        self._slots: dict[str, Tensor] = {}
        self._written: dict[str, Tensor] = {}
        self._steps, self._warned, self._paused = 0, False, False
        self.reset()

    @property
    def layers(self) -> tuple[str, ...]:
        return self._taps.names

    def attach(self) -> MarginMonitor:
        """Measure from now on, until `detach`. `with monitor:` does both."""
        if self._handles:
            raise ValueError("the monitor is attached already")
        model = self.model
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        if self.every is None:
            for name in self._taps.modules:
                self._handles.append(model.get_submodule(name).register_forward_hook(partial(self._tap, name)))
        if self.batch_size is not None:
            self._make_slots(self.batch_size)
        return self

    def detach(self) -> None:
        """Leave the model as it was. What was measured stays until `reset`."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._open = [], None
        self._collect()

    def __enter__(self) -> MarginMonitor:
        return self.attach()

    def __exit__(self, *args: object) -> None:
        self.detach()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files of a watched model hold its hooks, but are not watched: the passes that wait for their
        backward stay here, for their graphs cannot be copied."""
        waiting: dict[str, Any] = {"_open": None, "_last": None, "_done": [], "_slots": {}, "_written": {}}
        return {**vars(self), **waiting, "_paused": self._paused or bool(self._handles)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._handles and self.batch_size is not None:
            self._make_slots(self.batch_size)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, forward passes are not measured."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def labels(self, target: Tensor) -> None:
        """The labels [N] of the forward pass that ran last, before its backward. Labels outside [0, C) are ignored.

        For one logit [N] or [N,1]: 0 or 1, or -1 or +1, integers or floating, or a probability; -100 is ignored.

        Raises:
            ValueError: another number of labels than samples, or no forward pass that waits for its backward.
        """
        last = self._last
        if last is None:
            if self.every is None and not self._paused:
                raise ValueError("labels must follow a forward pass with gradients that the monitor watches")
            return
        if last.one_logit is not None:
            _, found = two_classes(last.one_logit, target.detach(), IGNORED)
            last.given = found.argmax(1) if found.is_floating_point() else found
            return
        if target.dim() != 1 or len(target) != last.samples or target.is_floating_point():
            raise ValueError(f"target must hold {last.samples} integers, got {list(target.shape)} of {target.dtype}")
        last.given = target

    def reset(self) -> None:
        """Forget what was measured: a new epoch."""
        self._distances: list[Tensor] = []
        self._seen = 0
        self._others: list[Tensor | int] = []
        self._around: str | None = None
        self._done, self._written = [], {}

    def distances(self) -> Tensor:
        """d [M,L] of the M samples since the last `reset`, float32 or float64, NaN where unknown."""
        self._collect()
        if not self._distances:
            return torch.empty(0, len(self.layers))
        self._distances = [torch.cat(self._distances)]
        return self._distances[0]

    def summary(
        self, bins: int = 40, quantiles: Sequence[float] = QUANTILES, all_processes: bool = False
    ) -> MarginSummary:
        """Count, mean, quantiles, histogram and share on the right side of every layer since the last `reset`.

        Args:
            bins: of each layer's histogram, between its smallest and largest margin
            quantiles: in [0, 1]
            all_processes: over the samples of all processes of torch.distributed, each of which must call this

        Raises:
            ValueError: nothing was measured; the loss was not cross-entropy; a term of the loss reaches a layer around
                the logits.
        """
        base.count("bins", bins)
        at = torch.tensor([base.fraction("quantiles", q) for q in quantiles], dtype=torch.float64)
        distances = self.distances().double().cpu()
        others, seen, around = sum(int(n) for n in self._others), self._seen, self._around
        if all_processes:
            distances, others, seen, around = _of_all(distances, others, seen, around)
        if around is not None:
            raise ValueError(around)
        if others > TOLERATED * seen:
            raise ValueError(
                f"the loss is not the cross-entropy of the logits for {others} of {seen} samples (label smoothing, "
                f"mixup, or a term of another kind): {INSTEAD}"
            )
        if not len(distances):
            raise ValueError(
                "no backward pass was seen since the last reset: attach the monitor before the forward pass, and "
                "before the first step of a compiled model"
            )
        return _summarise(self.layers, distances, at, bins)

    # What happens in a forward pass

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return ((self._probed(INPUT, args[0]), *args[1:]), kwargs) if INPUT in self.layers else None
        self._collect()
        self._open = self._last = None
        if self._paused or not torch.is_grad_enabled():
            return None
        self._steps += 1
        if self.every is not None:
            self._open = _Pass(self.p, (args, kwargs)) if self._steps % self.every == 0 else None
            return None
        self._open = _Pass(self.p)
        if INPUT not in self.layers:
            return None
        if not args:
            raise ValueError('the layer "input" needs the input of the model as its first positional argument')
        x = self._taps.tapped(INPUT, args[0], [])
        self._open.calls[INPUT].append({INPUT: Tap(INPUT, get_gradient_edge(x), x.shape)})
        return (x, *args[1:]), kwargs

    def _tap(self, name: str, module: nn.Module, args: Any, output: Any) -> Any:
        """The hook of a tapped module."""
        if torch.compiler.is_compiling():
            return self._probed(name, output)
        if self._paused or not torch.is_grad_enabled():
            return None
        # A recomputation, which has no open pass, makes the same tensors and is not measured.
        calls: list[dict[str, Tap]] = [] if self._open is None else self._open.calls[name]
        return self._taps.keep(name, calls, [], module, args, output)

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        if torch.compiler.is_compiling():
            logits = self._logits(output)
            if is_one_logit(logits) or logits.shape[1] == 2:
                raise ValueError(f"a compiled model must have more than two classes: {TWO_CLASSES}")
            slot = self._slot(MODEL)
            return _replaced(output, self._reading.output, _LogitProbe.apply(logits, slot, self.p))
        opened, self._open = self._open, None
        if opened is None or output is None:  # None: the model raised an error
            return None
        logits = self._logits(output)
        if not logits.requires_grad:
            return None
        if self.every is None:
            opened.watch(*self._located(logits, opened))
            if due(self._steps):  # of the other steps none looks at every module
                self._look(opened, logits)
        self._last, opened.samples, opened.version = opened, len(logits), logits._version
        opened.one_logit = logits.detach() if is_one_logit(logits) else None
        edge = get_gradient_edge(logits)
        edge.node.register_prehook(partial(opened.at_logits, logits.detach(), edge.output_nr))
        self._done = [*self._done[1 - PENDING :], opened]
        return None

    def _logits(self, made: Any) -> Tensor:
        """The logits [N,C], [N] or [N,1] in what the model returned."""
        logits = self._reading.logits(made)
        if logits.dim() > 2:
            raise ValueError(
                f"model must return logits [N,C], or one logit [N] or [N,1], to a monitor, got {list(logits.shape)}: "
                "what arrives at a layer is the sum over all predictions of a sample. Measure one of them with "
                "MarginTask(model, LargeMarginLoss(), layers, positions=1).evaluate(x, y)"
            )
        if logits.dim() == 0:
            raise ValueError("model must return logits [N,C], got a single number")
        return logits

    def _look(self, opened: _Pass, logits: Tensor) -> None:
        """What is done at the steps that are tried: the trial, and the warning about batch norm."""
        if not any(type(module).__name__.startswith("FSDP") for module in self.model.modules()):
            opened.trial = logits
        if not self._warned and training_batchnorms(self.model):
            self._warn("batch norm in training mode")

    def _located(self, logits: Tensor, opened: _Pass) -> tuple[list[Tap], tuple[int, ...]]:
        """The taps of a forward pass but for the logits, and the stride of the batch in each, proven once for each kind
        of graph."""
        inner = [name for name in self.layers if name != OUTPUT]
        taps = [
            self._taps.pick(name, opened.calls[INPUT if name == INPUT else self._taps.base(name)]) for name in inner
        ]
        taps = [tap._replace(batch_dim=self._taps.batch_dim.get(tap.name)) for tap in taps]
        captured = Captured(logits, taps, remedy='MarginMonitor(..., batch_dim={{"{name}": d}})')
        graph = captured.graph
        places = tuple((graph.places.get(tap.edge.node), tap.edge.output_nr, tap.shape) for tap in taps)
        key = graph.signature, captured.batch, graph.root.output_nr, places
        known = self._proofs.find(key, graph) if graph.signature else None
        if known is None:
            strides = tuple(captured.strides(taps))
            structure = captured.structure(taps)
            known = _Places(tuple((graph.places[node], name, value) for node, name, value in structure.read), strides)
            self._proofs.add(key, known)
            self._warn(next((str(found) for found in structure.findings if found.verdict == "couples"), None))
        return taps, known.strides

    def _warn(self, coupling: str | None) -> None:
        """Once, what couples the samples of a batch."""
        if coupling is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"the samples of a batch are coupled ({coupling}): what arrives at a layer before that is not the "
                "gradient of one sample's loss alone",
                stacklevel=7,
            )

    # A compiled model, whose backward cannot call back: what it finds are gradients of leaves

    def _make_slots(self, batch_size: int) -> None:
        special = [name for name in self.layers if name not in (INPUT, OUTPUT, *self._taps.modules)]
        if self.every is not None or special:
            what = f"layers has {special[0]!r}" if special else f"every is {self.every}"
            raise ValueError(
                f"batch_size must be None for all but whole modules and steps without passes of their own, but {what}"
            )
        inner = [name for name in self.layers if name != OUTPUT]
        missing = [name for name in inner if name not in self._taps.batch_dim]
        if missing:
            raise ValueError(
                f"batch_dim must name the batch dimension of {missing[0]!r} where batch_size is given, for the graph "
                "of a compiled model is not read: batch_dim=0, for example"
            )
        some = next((t for t in self.model.parameters() if t.is_floating_point()), torch.empty(0))
        wide = torch.float64 if some.dtype == torch.float64 else torch.float32
        for name in (*inner, MODEL):
            columns = (PRESENT + 1,) if name == MODEL else ()
            slot = torch.zeros(batch_size, *columns, dtype=wide, device=some.device, requires_grad=True)
            slot.register_post_accumulate_grad_hook(partial(self._arrived, name))
            self._slots[name] = slot

    def _slot(self, name: str) -> Tensor:
        if not self._slots:
            raise ValueError("batch_size must be the largest batch for a compiled model, got None")
        return self._slots[name]

    def _probed(self, name: str, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise ValueError(f"layer {name!r} must return one tensor in a compiled model, got {type(output).__name__}")
        return _Probe.apply(output, self._slot(name), self.p, self._taps.batch_dim[name])

    def _arrived(self, name: str, slot: Tensor) -> None:
        """A backward pass has written a slot; with the last one of a pass all are taken."""
        assert slot.grad is not None
        if name in self._written:
            self._written = {}
        self._written[name], slot.grad = slot.grad, None
        if len(self._written) == len(self._slots):
            found, self._written = self._written, {}
            rows = found[MODEL][:, PRESENT] > 0
            done = _Pass(self.p)
            done.found = found.pop(MODEL)[rows]
            done.norms = {layer: norms[rows] for layer, norms in found.items()}
            self._done.append(done)

    # What is made of a backward pass

    def _collect(self) -> None:
        """Take the passes whose backward has run."""
        done, self._done = self._done, []
        for one in done:
            if one.found is None:
                self._done.append(one)
            elif self.every is None:
                self._take(one)
            else:
                self._measure(one)

    def _take(self, done: _Pass) -> None:
        found = done.found
        assert found is not None
        if done.refused is not None:
            self._around = self._around or done.refused
            return
        for name in self.layers:
            if name != OUTPUT and name not in done.norms:
                self._around = (
                    self._around or f"no gradient arrived at layer {name!r} with that of the logits: {INSTEAD}"
                )
                return
        for name, expected in done.expected.items():
            if not expected.numel():  # an empty batch
                continue
            bound = TRIAL[done.dtype] * expected.abs().amax()
            if not bool(((done.norms[name] - expected).abs() <= bound).all() | ~expected.isfinite().all()):
                self._around = f"a term of the loss reaches layer {name!r} by another way than the logits: {INSTEAD}"
        norms = [found[:, NORM] if name == OUTPUT else done.norms[name] for name in self.layers]
        distances, others = _margins(found, norms, [done.least.get(name, 0.0) for name in self.layers], self.eps)
        self._distances.append(distances)
        self._others.append(others)
        self._seen += len(found)

    def _measure(self, done: _Pass) -> None:
        """Margins by a pass of our own, on the first samples of a batch."""
        assert done.arguments is not None
        args, kwargs = done.arguments
        if done.given is None:
            self._around = "every=K must be told the labels: monitor.labels(y) between forward and backward"
            return
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            raise ValueError("every must be None for a model that takes more than one tensor as its argument")
        x, given = args[0][: self.samples].detach(), done.given[: self.samples].to(args[0].device)
        request = Request(self.p, soft=True)
        still = running_statistics(training_batchnorms(self.model))
        with self.paused(), torch.enable_grad(), still, RandomState.now(x).replayed():
            captured = self._taps.capture(self.model, x, self._reading)
            if is_one_logit(captured.logits):
                captured = seen_from(captured, (), with_zero(captured.logits))
            label = given.clamp(0, captured.logits.shape[1] - 1)
            # The soft competitor has no number; against its own label an ignored sample has no direction.
            index = torch.where(given == label, -1, label).unsqueeze(1)
            norms = difference_norms(captured, label, index, request, False)[:, 0]
            phi = functional.competitors(captured.logits.detach(), label).phi
        distances = phi.unsqueeze(1) / (self.eps + norms)
        known = (norms > 0) & distances.isfinite() & (given == label).unsqueeze(1)
        self._distances.append(torch.where(known, distances, math.nan))
        self._seen += len(x)


class _Places(NamedTuple):
    """What a graph has shown. read: as in a Proof;  strides: of the batch in each tap"""

    read: tuple[tuple[int, str, Any], ...]
    strides: tuple[int, ...]


class _Pass:
    """One forward pass, and what its backward brings.

    Attributes:
        calls: base name of a layer -> its taps, call by call
        version: of the logits as the model returned them
        found: [N,7], what the gradient of the logits shows;  refused: why nothing is made of it, or None
        norms: layer -> norm of what arrived, [N];  least: what of it would be made of numbers without precision
        trial, expected: logits from which the norms are measured once more, and what that gave
    """

    def __init__(self, p: float, arguments: Any = None) -> None:
        self.p, self.arguments = p, arguments
        self.calls: dict[str, list[dict[str, Tap]]] = defaultdict(list)
        self.taps: list[Tap] = []
        self.strides: Sequence[int] = ()
        self.found: Tensor | None = None
        self.samples = 0
        self.one_logit: Tensor | None = None
        self.given: Tensor | None = None
        self.version = 0
        self.refused: str | None = None
        self.norms: dict[str, Tensor] = {}
        self.least: dict[str, float] = {}
        self.trial: Tensor | None = None
        self.expected: dict[str, Tensor] = {}
        self.dtype = torch.float32
        self._trying = False

    def watch(self, taps: list[Tap], strides: Sequence[int]) -> None:
        self.taps, self.strides = taps, strides
        for tap, stride in zip(taps, strides, strict=True):
            tap.edge.node.register_prehook(partial(self._at_layer, tap, stride))

    def at_logits(self, z: Tensor, output: int, grads: tuple[Tensor | None, ...]) -> None:
        g = grads[output]
        if g is None or self._trying:
            return
        with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
            if self.one_logit is None:
                self.found = _read(g.detach(), z, self.p, self.given)
            else:
                self.found = _read_one(g.detach(), z, self.given)
        shown = self.one_logit is None and z.shape[1] != 2
        self.refused = TWO_CLASSES if self.given is None and not shown else None
        if z._version != self.version:
            self.refused, self.trial = CHANGED, None  # nor is the trial's tensor the output of this node any more
        self.dtype = g.dtype
        self.norms = {}
        logits, self.trial = self.trial, None
        if logits is not None and self.taps:
            self._try(logits, g.detach())

    def _try(self, logits: Tensor, g: Tensor) -> None:
        self._trying = True
        try:
            # No saved tensor is read here: within a backward that would count as a use of a checkpointed one.
            with Graph(logits).silenced():
                edges = [tap.edge for tap in self.taps]
                gradients = torch.autograd.grad(logits, edges, g, retain_graph=True, allow_unused=True)
        finally:
            self._trying = False
        for tap, stride, gradient in zip(self.taps, self.strides, gradients, strict=True):
            if gradient is not None:
                self.expected[tap.name] = self._norm(gradient, stride)

    def _at_layer(self, tap: Tap, stride: int, grads: tuple[Tensor | None, ...]) -> None:
        g = grads[tap.edge.output_nr]
        if g is None or self._trying or self.found is None:
            return
        self.norms[tap.name] = self._norm(g.detach(), stride)
        q = dual_exponent(self.p)
        entries = max(g.numel() // max(len(self.found), 1), 1) ** (1 / q)
        self.least[tap.name] = torch.finfo(g.dtype).tiny * entries

    def _norm(self, g: Tensor, stride: int) -> Tensor:
        assert self.found is not None
        with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
            rows = by_sample(whole(g), stride, len(self.found))
            return functional.dual_norm([rows if rows.dim() > 1 else rows.unsqueeze(1)], self.p, batch_dims=1)[:, 0]


def _read(g: Tensor, z: Tensor, p: float, given: Tensor | None = None) -> Tensor:
    """[N,7] of what the gradient g [N,C] of logits z [N,C] shows, with the labels [N] where they are given."""
    g, z, given = gathered(g, z, given)
    rounding = max(ROUNDING[g.dtype], ROUNDING[z.dtype])
    if EXTENSION is not None and _readable(g, z):
        given = None if given is None else given.to(z.device)
        found: Tensor = EXTENSION.read_logit_gradient(g, z, given, p, KNOWN, OTHER, rounding)
        return found
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    norm = functional.dual_norm([g], p, batch_dims=1)[:, 0]
    g, z = g.to(wide), z.to(wide)
    if given is None:
        own, label = g.min(1)
        valid = torch.ones_like(label, dtype=torch.bool)
    else:
        given = given.to(z.device)
        label = given.clamp(0, z.shape[1] - 1)
        own, valid = g.gather(1, label.unsqueeze(1)).squeeze(1), label == given
    columns = label.unsqueeze(1)
    rivals = z.scatter(1, columns, -math.inf)
    largest = rivals.amax(1)
    e = torch.exp(rivals - largest.unsqueeze(1))  # 0 at the label
    total = e.sum(1)
    lead = z.gather(1, columns).squeeze(1) - largest
    phi = lead - torch.log(total)
    # 1 - p_y, from the larger of its two parts
    small = torch.exp(-lead.abs())
    rest = torch.where(lead >= 0, total * small / (1 + total * small), total / (total + small))
    factor = -own / rest
    residual = (g.scatter(1, columns, 0.0) - e * (-own / total).unsqueeze(1)).abs().sum(1)
    entry = own.abs()
    knows = valid & (own < 0) & (residual <= KNOWN * entry)
    other = valid & (((own < 0) & (residual > OTHER * entry + rounding * factor)) | (own > rounding * g.abs().sum(1)))
    columns_ = (factor, phi, rest, knows.to(wide), other.to(wide), norm.to(wide), torch.ones_like(phi))
    return torch.stack(columns_, 1)


def _read_one(g: Tensor, z: Tensor, given: Tensor | None) -> Tensor:
    """[N,7] of what the gradient g [N] or [N,1] of one logit z shows, with the labels [N]; of none where None."""
    g, z, given = gathered(g, z, given)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    size, f = g.reshape(-1).to(wide).abs(), z.reshape(-1).to(wide)
    given = torch.full_like(f, IGNORED) if given is None else given.to(z.device)
    one, nothing = torch.ones_like(f), torch.zeros_like(f)
    knows = ((given == 0) | (given == 1)) & (size > 0)
    return torch.stack((size, torch.where(given == 1, f, -f), one, knows.to(wide), nothing, size, one), 1)


def _margins(found: Tensor, norms: list[Tensor], least: list[float], eps: float) -> tuple[Tensor, Tensor | int]:
    """d [N,L] of what `_read` gave and the norms [N] of each layer, and how many samples had another loss."""
    if EXTENSION is not None and found.is_contiguous() and _readable(found, *norms):
        distances, others = EXTENSION.monitored_margins(found, norms, least, eps)
        return distances, others
    factor, phi, rest, knows = (found[:, i].unsqueeze(1) for i in (FACTOR, PHI, REST, KNOWS))
    measured = torch.stack(norms, 1)
    weight = rest * factor
    known = (knows > 0) & (measured > measured.new_tensor(least)) & measured.isfinite()
    return torch.where(known, phi * weight / (eps * weight + measured), math.nan), found[:, OTHER_LOSS].sum()


def _readable(*tensors: Tensor) -> bool:
    """Whether compiled code may read these tensors."""
    return not tracing() and all(tensor.device.type == "cpu" and is_plain(tensor) for tensor in tensors)


class _Probe(torch.autograd.Function):
    """h, whose backward gives the slot [batch_size] the norm of each sample's gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, slot: Tensor, p: float, dim: int) -> Tensor:
        ctx.p, ctx.dim, ctx.size = p, dim, slot.shape[0]
        return h.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows = g.movedim(ctx.dim, 0).flatten(1) if g.dim() > 1 else g.unsqueeze(1)
        norms = functional.dual_norm([rows], ctx.p, batch_dims=1)[:, 0]
        return g, F.pad(norms, (0, ctx.size - norms.shape[0])), None, None


class _LogitProbe(torch.autograd.Function):
    """z, whose backward gives the slot [batch_size, 7] what the gradient shows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, slot: Tensor, p: float) -> Tensor:
        ctx.p, ctx.size = p, slot.shape[0]
        ctx.save_for_backward(z)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        (z,) = ctx.saved_tensors
        found = _read(g, z, ctx.p)
        return g, F.pad(found, (0, 0, 0, ctx.size - found.shape[0])), None


def _replaced(made: Any, name: Output, logits: Tensor) -> Any:
    """What a model returned, with other logits at the place of that name."""
    if isinstance(made, Tensor):
        return logits
    name = "logits" if name is None else name
    if isinstance(made, tuple) and isinstance(name, str):
        return made._replace(**{name: logits})  # type: ignore[attr-defined]  # it has the name: a namedtuple
    if isinstance(made, tuple) or type(made) is list:
        entries = [*made]
        entries[int(name)] = logits
        return type(made)(*entries) if hasattr(made, "_fields") else type(made)(entries)
    if type(made) is dict:  # torch.compile cannot follow copy.copy of one
        return {**made, name: logits}
    changed = copy.copy(made)
    if isinstance(made, (Mapping, list)):
        changed[name] = logits
    else:
        setattr(changed, str(name), logits)
    return changed


def _of_all(distances: Tensor, others: int, seen: int, around: str | None) -> tuple[Tensor, int, int, str | None]:
    """What all processes have measured."""
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ValueError("all_processes must be False where torch.distributed is not initialized")
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (distances, others, seen, around))
    rows, counts, totals, reasons = zip(*found, strict=True)
    return torch.cat(rows), sum(counts), sum(totals), next((reason for reason in reasons if reason), None)


def _summarise(layers: tuple[str, ...], distances: Tensor, at: Tensor, bins: int) -> MarginSummary:
    rows = [_row(column[column.isfinite()], at, bins) for column in distances.unbind(1)]
    count = torch.tensor([row[0] for row in rows])
    mean, right, quantiles, histogram, edges = (torch.stack(column) for column in list(zip(*rows, strict=True))[1:])
    return MarginSummary(layers, count, len(distances) - count, mean, right, at, quantiles, edges, histogram)


def _row(known: Tensor, at: Tensor, bins: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Count, mean, right, quantiles, histogram and edges of one layer's margins."""
    if not len(known):
        nothing = known.new_full((), math.nan)
        return 0, nothing, nothing, nothing.expand(len(at)), at.new_zeros(bins).long(), nothing.expand(bins + 1)
    low, high = float(known.min()), float(known.max())
    edges = torch.linspace(low, high if high > low else low + 1, bins + 1, dtype=torch.float64)
    histogram = torch.histogram(known, edges).hist.long()
    # As torch.quantile, which takes at most 2^24 numbers.
    ordered, place = known.sort().values, at * (len(known) - 1)
    quantiles = torch.lerp(ordered[place.floor().long()], ordered[place.ceil().long()], place.frac())
    return len(known), known.mean(), (known > 0).double().mean(), quantiles, histogram, edges

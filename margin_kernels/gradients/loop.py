"""One backward pass for each competitor, and the ordinary backward of the loss.

    D[n,j,l] = || d (s[n,I_j] - s[n,y_n]) / d h_l[n] ||_q           of the soft competitor || d phi[n] / d h_l[n] ||_q

One backward pass of the DIFFERENCE per competitor gives every tap at once; naming the taps as `inputs` prunes the
weight gradients. The norms are taken right after each pass and the gradients dropped: at most one set of tap gradients
is alive. Where logit scores need nothing but ||W_i - W_y||_q, `row_distance` measures it without the rows [N,D]. The
user's hooks on activations do not run during the passes: they see the one backward of the loss.

    cost (k + 3) F, k competitors, F the forward pass; any network, first and second order. The reference of the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .. import functional
from ..backends import EXTENSION
from ..second_derivative import check_second_derivative, is_missing, sentence
from ..sharding import check_order, gathered
from ..tracing import tracing
from .autograd_graph import Graph, gradients_at
from .plan import Cotangents, Plan, Seeds, Source, make_plan, pass_start
from .request import Captured, Request, Tap
from .structure import by_sample
from .thin_convolution import ThinConvolution, may_be_read_by_one, thin_convolution

# Autograd nodes of the kernels behind scaled_dot_product_attention whose backward has no derivative.
FUSED_ATTENTION = re.compile(r"ScaledDotProduct\w*Attention\w*Backward\d+")
INSTEAD = "take first order"


class Loop:
    """Strategy "loop": a pass for each competitor, then the ordinary backward of the loss.

    Args:
        request: what the loss asks for
        captured: one forward pass
        logits: what the loss is computed from; not those of `captured` where the norms have a forward pass of their own
    """

    name = "loop"

    def __init__(self, request: Request, captured: Captured, logits: Tensor) -> None:
        self.request, self.captured, self.logits = request, captured, logits

    def norms(self, target: Tensor, index: Tensor) -> Tensor:
        """D [N,k,L], fp32 (fp64 for fp64), of competitors index [N,k] against target [N]; with second order it is
        differentiable in the parameters, else a constant."""
        return self._norms(target, index, self.request.second_order)

    def measured(self, target: Tensor, index: Tensor) -> Tensor:
        """D as a constant, whatever the order."""
        return self._norms(target, index, False)

    def _norms(self, target: Tensor, index: Tensor, second_order: bool) -> Tensor:
        slots = self.captured.slots
        if not slots:
            return difference_norms(self.captured, target, index, self.request, second_order)
        norms = [
            difference_norms(slot, target[p :: len(slots)], index[p :: len(slots)], self.request, second_order)
            for p, slot in enumerate(slots)
        ]
        return torch.stack(norms, 1).flatten(0, 1)

    def attach(self, loss: Tensor) -> Tensor:
        """The loss, whose backward no longer computes gradients that nobody reads."""
        cut_sources(loss, self.captured)
        return loss


def difference_norms(captured: Captured, target: Tensor, index: Tensor, request: Request, second_order: bool) -> Tensor:
    """D[n,j,l] [N,k,L] by one pass for each competitor.

    Raises ValueError for a tap outside the graph of the logits, a tap whose batch dimension is not known, an operation
    without second derivative where one is asked for, and reentrant checkpointing. Source: Elsayed et al. 2018, eq. 7.
    """
    plan = make_plan(captured, request)
    logits = captured.logits
    with without_autocast(logits.device.type), torch.set_grad_enabled(second_order):
        measured: Tensor | None = None
        if plan.rows and not plan.taps and request.space == "logit" and not request.soft:
            assert captured.head is not None
            weight = captured.head.weight if second_order else captured.head.weight.detach()
            measured = functional.row_distance(weight, index, target, request.p, backend=request.backend).unsqueeze(-1)
        elif plan.cotangent or plan.rows or plan.taps:
            cotangents = Cotangents(captured, target, request, second_order)
            passes = Passes(captured, plan.taps)
            norms = []
            for competitor in index.unbind(1):
                gradients, _ = pass_gradients(plan, passes, cotangents.of(competitor), second_order)
                norms.append(norms_of(gradients, plan, captured, request))
                del gradients
            measured = of_competitors(norms) if norms else logits.new_zeros(len(logits), 0, 1)
        return columns(measured, plan.sources, index, logits.dtype)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside, no cast to half precision on that type of device."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def pass_gradients(plan: Plan, passes: Passes, seeds: Seeds, second_order: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What dual_norm measures for one competitor: c and c W as the plan names them, then the taps; and the gradients at
    the other edges of the passes."""
    cotangent, rows = seeds
    named = (cotangent if plan.cotangent else None, rows if plan.rows else None)
    measured = [seed for seed in named if seed is not None]
    if not plan.taps:
        return measured, []
    seed = cotangent if rows is None else rows
    assert seed is not None
    seed = seed if plan.scale == 1 else seed * plan.scale
    gradients, others = passes.backward(seed.to(passes.start.dtype), second_order)
    return measured + gradients, others


def norms_of(gradients: list[Tensor], plan: Plan, captured: Captured, request: Request) -> Tensor:
    """[N, columns] of what `pass_gradients` gave: each sample's norm, wherever the batch is."""
    first = len(gradients) - len(plan.taps)
    rows = gradients[:first] + [
        by_sample(gradient, stride, captured.batch)
        for gradient, stride in zip(gradients[first:], plan.strides, strict=True)
    ]
    ordered = [rows[measured] for measured in plan.order]
    return functional.dual_norm(ordered, request.p, batch_dims=1, backend=request.backend)


def of_competitors(norms: list[Tensor]) -> Tensor:
    """[N,k,*] from the [N,*] of each competitor."""
    return norms[0].unsqueeze(1) if len(norms) == 1 else torch.stack(norms, 1)


def columns(measured: Tensor | None, sources: list[Source], index: Tensor, dtype: torch.dtype) -> Tensor:
    """[N,k,L] from the measured norms [N,k,*] and the constants, each times its scale."""
    if measured is not None and sources == [Source(column, 1.0) for column in range(measured.shape[-1])]:
        return measured
    found = []
    for column, scale in sources:
        if column is None or measured is None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            found.append(torch.full(index.shape, scale, dtype=wide, device=index.device))
        else:
            found.append(measured[..., column] * scale)
    return torch.stack(found, -1)


def pair_gradient(
    logits: Tensor, upper: Tensor, lower: Tensor, x: Tensor, second_order: bool = False, passes: Passes | None = None
) -> Tensor:
    """d (z[n,upper_n] - z[n,lower_n]) / d x[n], [N,*], of logits z [N,C] made from x [N,*]; the graph is kept.

    Args:
        logits: z [N,C]
        upper: classes, int64 [N]
        lower: classes, int64 [N]
        x: [N,*], in the graph of the logits
        second_order: True: the gradient carries a graph
        passes: backward passes to x, where they are known
    """
    with without_autocast(x.device.type), torch.set_grad_enabled(second_order):
        seed = (
            torch.zeros_like(logits)
            .scatter_(1, upper.unsqueeze(1), 1.0)
            .scatter_add_(1, lower.unsqueeze(1), torch.full_like(logits[:, :1], -1.0))
        )
        return (passes or passes_to(logits, x)).backward(seed, second_order, check=False)[0][0]


def passes_to(logits: Tensor, x: Tensor) -> Passes:
    """The passes from logits [N,C] to the x [N,*] that they were made from."""
    tap = Tap("x", get_gradient_edge(x), x.shape)
    return Passes(Captured(logits, [tap]), [tap])


def sole_readers(graph: Graph, taps: Sequence[Tap], batch: int) -> list[tuple[Any, int] | None]:
    """For each tap who alone reads it, of those that may be read by a thin convolution: (node, number of its edge).
    None for a tap that another lies behind: the pass itself reaches it, and by a second way to it its slope would be
    lost."""
    if not any(may_be_read_by_one(tap, batch) for tap in taps):
        return [None] * len(taps)
    behind = graph.path_to(tap.edge for tap in taps)
    readers = [graph.readers_of(tap.edge) for tap in taps]
    return [
        found[0] if len(found) == 1 and may_be_read_by_one(tap, batch) and tap.edge.node not in behind else None
        for tap, found in zip(taps, readers, strict=True)
    ]


class Passes:
    """Backward passes from the logits, or the head's input, to the taps and to other edges; looked up once for all
    competitors. `start` is the tensor that they start from. readers: as of `sole_readers`, where they are known."""

    def __init__(
        self,
        captured: Captured,
        taps: Sequence[Tap],
        others: Sequence[GradientEdge] = (),
        readers: Sequence[tuple[Any, int] | None] | None = None,
    ) -> None:
        self.start = pass_start(captured)
        self.taps = taps
        self._graph: Graph | None = None
        self._thin: list[ThinConvolution | None] = []
        if taps:
            self._graph = captured.graph
            if readers is None:
                readers = sole_readers(self._graph, taps, captured.batch)
            self._thin = [thin_convolution(reader, tap) for reader, tap in zip(readers, taps, strict=True)]
        self._edges = [tap.edge if thin is None else thin.output for tap, thin in zip(taps, self._thin, strict=True)]
        self._edges += others

    def backward(self, seed: Tensor, second_order: bool, check: bool = True) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of <seed, start> with respect to the taps, and at the other edges; no weight gradient is computed,
        and no hook of the user's runs. check: raise ValueError for an operation without second derivative too.
        Raises ValueError for a graph that PyTorch cannot give such gradients of."""
        assert self._graph is not None
        if second_order:
            self._check_attention()
            check_order(self._tapped_path())
        try:
            with self._graph.silenced():
                gradients = gradients_at(self._edges, [self.start], [seed], True, second_order)
        except RuntimeError as error:
            if check and second_order and is_missing(error):
                raise ValueError(sentence(str(error), INSTEAD)) from error
            if "use_reentrant" not in str(error):
                raise
            raise ValueError(
                "reentrant checkpointing cannot give activation gradients: call torch.utils.checkpoint.checkpoint with "
                f"use_reentrant=False (taps: {', '.join(tap.name for tap in self.taps)})"
            ) from error
        if second_order and check:
            for edge, gradient in zip(self._edges, gradients, strict=True):
                if gradient is not None:
                    check_second_derivative(gradient, edge, INSTEAD)
        found: list[Tensor] = []
        for tap, thin, gradient in zip(self.taps, self._thin, gathered(*gradients[: len(self.taps)]), strict=True):
            if gradient is None:
                raise ValueError(f"tap {tap.name!r} is outside the graph of the logits: they do not depend on it")
            found.append(gradient if thin is None else thin.input_gradient(gradient))
        others: list[Any] = list(gradients[len(self.taps) :])
        return found, others

    def _tapped_path(self) -> set[Any]:
        """The nodes from the logits to what reads a tap."""
        assert self._graph is not None
        return self._graph.path_to(tap.edge for tap in self.taps)

    def _check_attention(self) -> None:
        for node in self._tapped_path():
            if FUSED_ATTENTION.fullmatch(node.name()):
                raise ValueError(
                    f"a second derivative is asked for, and PyTorch has none of fused attention ({node.name()}): run "
                    "the step under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), or take first "
                    "order"
                )


def cut_sources(root: Tensor, captured: Captured) -> None:
    """Spare the backward of root the gradients of the model's input and of frozen stems, which nobody reads.

    A matter of time alone: without the compiled extension these gradients are computed and dropped.
    """
    cut_gradients = getattr(EXTENSION, "cut_gradients", None)
    if captured.sources and cut_gradients is not None and not tracing():
        cut_gradients(root, captured.sources)

"""Norms of the class-difference gradients, D[n,j,l] = || d (s[n,I_j] - s[n,y_n]) / d h_l[n] ||_q .

One backward pass of the DIFFERENCE per competitor gives every tap at once; naming the taps as `inputs` prunes the
weight gradients. The norms are taken right after each pass and the gradients dropped: at most one set of tap gradients
is alive. Passes in float16 start from a multiple of the cotangent, by which the norms are divided. Near the logits
z = W h + b no pass is needed. With c the derivative of the difference with respect to z [N,C], which is e_i - e_y for
logits and s_i (e_i - s) - s_y (e_y - s) for softmax scores s:

    tap on the logits                                G = c            D = 2^(1/q) for logits
    tap on h                                         G = c W          W_i - W_y for logits
    tap before global average pooling over S         G = c W / S      D = S^(1/q - 1) ||c W||_q

and the pass of deeper taps starts at h with the rows c W, which spares the head's backward and a cotangent [N,C].
Where logit scores need nothing but ||W_i - W_y||_q, `row_distance` measures it without the rows [N,D].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from . import functional
from .reference.dual_norm import dual_exponent
from .split_backward import NotExact, Seeds, Split, available, pass_scale, pass_start
from .taps import Captured, Tap, graph_nodes, nodes_behind, same_edge
from .thin_convolution import thin_convolution

PASSES = ("auto", "loop", "split")
# Autograd nodes of the kernels behind scaled_dot_product_attention whose backward has no derivative.
FUSED_ATTENTION = re.compile(r"ScaledDotProduct\w*Attention\w*Backward\d+")


def check_passes(passes: str) -> str:
    """`passes` where it is a mode that exists. Raises ValueError else."""
    if passes not in PASSES:
        raise ValueError(f'passes must be one of "auto", "loop", "split", got {passes!r}')
    return passes


class Source(NamedTuple):
    """Where D of one tap comes from: the column of the measured norms (None: D is `scale` itself), and its factor."""

    column: int | None
    scale: float


class Plan(NamedTuple):
    """What is measured for each competitor: the cotangent c and the rows c W where a tap needs them, then `taps`, by a
    pass that starts from `scale` times one of them."""

    sources: list[Source]
    cotangent: bool
    rows: bool
    taps: list[Tap]
    scale: float


def make_plan(captured: Captured, space: str, q: float, layer_scale: str | None = None) -> Plan:
    """Closed form or pass for each tap of `captured`. Raises ValueError for a tap whose first dimension is not N."""
    kinds = [_kind(tap, captured) for tap in captured.taps]
    cotangent = "logits" in kinds and space == "probability"
    rows = "head" in kinds or "pooled" in kinds
    first = cotangent + rows
    sources: list[Source] = []
    passed: list[Tap] = []
    for tap, kind in zip(captured.taps, kinds, strict=True):
        column: int | None = first - 1
        scale = 1.0
        if kind == "logits" and not cotangent:
            column, scale = None, 2.0 ** (1 / q)
        elif kind == "logits":
            column = 0
        elif kind == "pass":
            column, scale = first + len(passed), 1 / pass_scale(captured)
            passed.append(tap)
        elif kind == "pooled" and captured.head is not None:
            scale = captured.head.positions ** (1 / q - 1)
        if layer_scale == "numel":
            scale /= tap.shape[1:].numel()
        sources.append(Source(column, scale))
    return Plan(sources, cotangent, rows, passed, pass_scale(captured))


def split_taps(captured: Captured, logits: Tensor, space: str, p: float) -> list[Tap]:
    """The taps that the passes of a split backward go to. Raises NotExact where a loss of `logits`, measured on
    `captured`, has none."""
    if not available():
        raise NotExact("the compiled extension is missing, or torch.compile is at work")
    if captured.logits is not logits:
        raise NotExact('the norms are measured on a forward pass of their own (batchnorm="frozen")')
    plan = make_plan(captured, space, dual_exponent(p))
    if not plan.taps:
        raise NotExact("no tap needs a pass")
    return plan.taps


def _kind(tap: Tap, captured: Captured) -> str:
    logits, head = captured.logits, captured.head
    _check_batch(tap, logits)
    if same_edge(tap.edge, torch.autograd.graph.get_gradient_edge(logits)):
        return "logits"
    if head is not None and any(same_edge(tap.edge, edge) for edge in head.edges):
        return "head"
    if head is not None and head.pooled is not None and same_edge(tap.edge, head.pooled):
        return "pooled"
    return "pass"


def _check_batch(tap: Tap, logits: Tensor) -> None:
    if tap.shape[:1] != logits.shape[:1]:
        raise ValueError(
            f"tap {tap.name!r} has shape {tuple(tap.shape)}; its first dimension must be the batch ({logits.shape[0]})"
        )


class Cotangents:
    """c [N,C], c[n,:] = d (s[n,i] - s[n,y]) / d z[n,:], and the rows c W [N,D], one competitor i at a time; None where
    nothing needs them."""

    def __init__(self, captured: Captured, target: Tensor, space: str, second_order: bool) -> None:
        logits, head = captured.logits, captured.head
        self._columns = target.unsqueeze(1)
        self._scores: Tensor | None = None
        self._weight: Tensor | None = None
        if head is not None:
            self._weight = head.weight if second_order else head.weight.detach()
        if space == "probability":
            wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
            self._scores = torch.softmax(logits if second_order else logits.detach(), 1, dtype=wide)
            self._own = self._scores.gather(1, self._columns)
            self._weight = None if self._weight is None else self._weight.to(wide)
        elif self._weight is not None:
            self._own = self._weight.index_select(0, target)
        else:
            self._own = logits.new_zeros(logits.shape).scatter_(1, self._columns, -1.0)

    def of(self, index: Tensor) -> Seeds:
        """c [N,C] (None where nothing needs it) and c W [N,D] (None without a head) for competitors index [N]."""
        cotangent = None
        if self._scores is not None:
            cotangent = self._softmax(self._scores, index.unsqueeze(1))
        elif self._weight is None:
            cotangent = self._own.scatter(1, index.unsqueeze(1), 1.0)
        if self._weight is None:
            return cotangent, None
        if cotangent is None:
            return None, self._weight.index_select(0, index) - self._own
        return cotangent, cotangent @ self._weight

    def _softmax(self, scores: Tensor, column: Tensor) -> Tensor:
        other = scores.gather(1, column)
        at = torch.cat([column, self._columns], 1)
        return (scores * (self._own - other)).scatter_add(1, at, torch.cat([other, -self._own], 1))


def difference_norms(
    captured: Captured,
    target: Tensor,
    index: Tensor,
    p: float = 2,
    space: str = "logit",
    layer_scale: str | None = None,
    second_order: bool = False,
    split: Split | None = None,
    backend: str = "auto",
) -> Tensor:
    """D[n,j,l] = || d (s[n,I_j] - s[n,y_n]) / d h_l[n] ||_q, q dual to p.

    captured      one forward pass: logits z [N,C], L taps h_l [N,*], head
    target        int64 [N], values in [0, C);  index: competitors I, int64 [N,k]
    p             norm of the distances, >= 1
    space         "logit": s = z;  "probability": s = softmax(z)
    layer_scale   None, or "numel": D divided by the number of elements of h_l[n]
    second_order  True: D is differentiable in the parameters (create_graph), else a constant
    split         where the passes leave the gradients that a split backward needs, None: nowhere
    Returns [N,k,L], fp32 (fp64 for fp64). Raises ValueError for a tap outside the graph of the logits, a tap whose
    first dimension is not N, and reentrant checkpointing. Source: Elsayed et al. 2018, eq. 7.
    """
    plan = make_plan(captured, space, dual_exponent(p), layer_scale)
    logits = captured.logits
    with torch.autocast(logits.device.type, enabled=False), torch.set_grad_enabled(second_order):
        measured: Tensor | None = None
        if plan.rows and not plan.taps and space == "logit":
            assert captured.head is not None
            weight = captured.head.weight if second_order else captured.head.weight.detach()
            measured = functional.row_distance(weight, index, target, p, backend=backend).unsqueeze(-1)
        elif plan.cotangent or plan.rows or plan.taps:
            norms: list[Tensor] = []
            cotangents = Cotangents(captured, target, space, second_order and split is None)
            route = Route(captured, plan.taps, () if split is None else split.edges)
            for competitor in index.unbind(1):
                seeds = cotangents.of(competitor)
                if split is not None:
                    seeds = split.seeds(seeds)
                gradients, kept = _gradients(plan, route, seeds, second_order)
                if split is not None:
                    gradients = split.keep(gradients, kept, partial(_kept_of_every_second, plan, route, seeds))
                norms.append(functional.dual_norm(gradients, p, batch_dims=1, backend=backend))
                del gradients
            measured = torch.stack(norms, 1)
        return _columns(measured, plan.sources, index, logits.dtype)


def logit_norms(captured: Captured, p: float = 2, second_order: bool = False, backend: str = "auto") -> Tensor:
    """D[n,l] = || d z[n] / d h_l[n] ||_q of a model with one logit, z [N] or [N,1]; the rest as in difference_norms.

    Returns [N,L], fp32 (fp64 for fp64).
    """
    logits = captured.logits
    for tap in captured.taps:
        _check_batch(tap, logits)
    with torch.autocast(logits.device.type, enabled=False), torch.set_grad_enabled(second_order):
        captured = captured._replace(head=None)
        route, scale = Route(captured, captured.taps), pass_scale(captured)
        gradients, _ = route.backward(torch.full_like(logits, scale), second_order)
        return functional.dual_norm(gradients, p, batch_dims=1, backend=backend) / scale


def _gradients(plan: Plan, route: Route, seeds: Seeds, second_order: bool) -> tuple[list[Tensor], list[Tensor]]:
    """What dual_norm measures for one competitor, each [N,*]: c and c W as the plan names them, then the taps; and the
    gradients at the other edges of the route."""
    cotangent, rows = seeds
    named = (cotangent if plan.cotangent else None, rows if plan.rows else None)
    measured = [seed for seed in named if seed is not None]
    if not plan.taps:
        return measured, []
    seed = cotangent if rows is None else rows
    assert seed is not None
    seed = seed if plan.scale == 1 else seed * plan.scale
    gradients, kept = route.backward(seed.to(route.start.dtype), second_order)
    return measured + gradients, kept


def _kept_of_every_second(plan: Plan, route: Route, seeds: Seeds) -> list[Tensor]:
    """The gradients at the other edges of the route from the cotangents of samples 0, 2, 4, ... alone."""
    halved = []
    for seed in seeds:
        if seed is not None:
            seed = seed.detach().clone()
            seed[1::2] = 0
        halved.append(seed)
    return _gradients(plan, route, (halved[0], halved[1]), second_order=False)[1]


def pair_gradient(
    logits: Tensor, upper: Tensor, lower: Tensor, x: Tensor, second_order: bool = False, route: Route | None = None
) -> Tensor:
    """d (z[n,upper_n] - z[n,lower_n]) / d x[n], [N,*], of logits z [N,C] made from x [N,*]; the graph is kept.

    upper, lower  classes, int64 [N];  second_order  True: the gradient carries a graph;  route  from x, if it is known
    """
    with torch.autocast(x.device.type, enabled=False), torch.set_grad_enabled(second_order):
        seed = (
            torch.zeros_like(logits)
            .scatter_(1, upper.unsqueeze(1), 1.0)
            .scatter_add_(1, lower.unsqueeze(1), torch.full_like(logits[:, :1], -1.0))
        )
        return (route or route_from(logits, x)).backward(seed, second_order)[0][0]


def route_from(logits: Tensor, x: Tensor) -> Route:
    """The way of a pass from logits [N,C] to the x [N,*] that they were made from."""
    taps = [Tap("x", torch.autograd.graph.get_gradient_edge(x), x.shape)]
    return Route(Captured(logits, taps), taps)


class Route:
    """The way of a pass from the logits, or the head's input, to the taps, and to other edges whose gradients are kept;
    looked up once for all competitors."""

    def __init__(self, captured: Captured, taps: Sequence[Tap], kept: Sequence[GradientEdge] = ()) -> None:
        self.start = pass_start(captured)
        self.taps = taps
        self._nodes = graph_nodes(self.start) if taps else []
        self._thin = [thin_convolution(self._nodes, tap) for tap in taps]
        self._edges = [tap.edge if conv is None else conv.output for tap, conv in zip(taps, self._thin, strict=True)]
        self._edges += kept

    def backward(self, seed: Tensor, second_order: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Gradients of <seed, start> with respect to the taps, and at the edges that are kept; no weight gradient is
        computed. Raises ValueError for a graph that PyTorch cannot give such gradients of."""
        if second_order:
            self._check_attention()
        try:
            gradients = torch.autograd.grad(
                self.start, self._edges, seed, retain_graph=True, create_graph=second_order, allow_unused=True
            )
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise ValueError(
                "reentrant checkpointing cannot give activation gradients: call torch.utils.checkpoint.checkpoint with "
                f"use_reentrant=False (taps: {', '.join(tap.name for tap in self.taps)})"
            ) from error
        found: list[Tensor] = []
        for tap, conv, gradient in zip(self.taps, self._thin, gradients[: len(self.taps)], strict=True):
            if gradient is None:
                raise ValueError(f"tap {tap.name!r} is outside the graph of the logits: they do not depend on it")
            found.append(gradient if conv is None else conv.input_gradient(gradient))
        return found, list(gradients[len(self.taps) :])

    def _check_attention(self) -> None:
        ends = {edge.node for edge in self._edges}
        for node in self._nodes:
            if FUSED_ATTENTION.fullmatch(node.name()) and not ends.isdisjoint(nodes_behind(node)):
                raise ValueError(
                    f"a second derivative is asked for, and PyTorch has none of fused attention ({node.name()}): run "
                    "the step under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), or take first "
                    "order"
                )


def _columns(measured: Tensor | None, sources: list[Source], index: Tensor, dtype: torch.dtype) -> Tensor:
    """[N,k,L] from the measured norms [N,k,*] and the constants, each times its scale."""
    if measured is not None and sources == [Source(column, 1.0) for column in range(measured.shape[-1])]:
        return measured
    columns = []
    for column, scale in sources:
        if column is None or measured is None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            columns.append(torch.full(index.shape, scale, dtype=wide, device=index.device))
        else:
            columns.append(measured[..., column] * scale)
    return torch.stack(columns, -1)

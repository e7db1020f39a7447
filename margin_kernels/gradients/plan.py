"""Which norms need a backward pass, and which the last layer gives in closed form.

Near the logits z = W h + b no pass is needed. With c the derivative of the score difference with respect to z [N,C],
which is e_i - e_y for logits, s_i (e_i - s) - s_y (e_y - s) for softmax scores s, and q - e_y for the soft competitor,
q the softmax over the rivals alone:

    tap on the logits                                G = c            D = 2^(1/q) for one logit against another
    tap on h                                         G = c W          W_i - W_y for these
    tap before global average pooling over S         G = c W / S      D = S^(1/q - 1) ||c W||_q

and the pass of deeper taps starts at h with the rows c W, which spares the head's backward and a cotangent [N,C].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .. import functional
from ..backends import COMPILED, EXTENSION, choose
from ..reference.dual_norm import dual_exponent
from ..tracing import tracing
from .autograd_graph import same_edge
from .request import Captured, Request, Tap, is_logits

# What a pass starts from: a cotangent of the logits [N,C], and rows [N,D] at the input of the head.
Seeds = tuple[Tensor | None, Tensor | None]

# What the cotangents of passes in float16 are multiplied by, so that small gradients do not vanish in it; about what a
# sample's cotangent is multiplied by under the usual loss scale, 2^16 over the batch size.
FLOAT16_SCALE = 256.0


class Source(NamedTuple):
    """Where D of one tap comes from: the column of the measured norms (None: D is `scale` itself), and its factor."""

    column: int | None
    scale: float


class Plan(NamedTuple):
    """What is measured for each competitor: the cotangent c and the rows c W where a tap needs them, then `taps`, by a
    pass that starts from `scale` times one of them. `order`: which of these each column of the norms measures.
    `strides`: where the batch is in each of these taps."""

    sources: list[Source]
    order: list[int]
    cotangent: bool
    rows: bool
    taps: list[Tap]
    strides: Sequence[int]
    scale: float


def pass_start(captured: Captured) -> Tensor:
    """Where passes start: the input of the head, or the logits where there is none."""
    return captured.logits if captured.head is None else captured.head.input


def pass_scale(captured: Captured) -> float:
    """The factor of the gradients that passes give."""
    return FLOAT16_SCALE if pass_start(captured).dtype == torch.float16 else 1.0


def make_plan(
    captured: Captured, request: Request, strides: Callable[[list[Tap]], Sequence[int]] | None = None
) -> Plan:
    """Closed form or pass for each tap. strides: gives those of the batch in the taps of a pass; captured.strides.
    Raises ValueError for a tap whose batch dimension is not known."""
    q = dual_exponent(request.p)
    kinds = [_kind(tap, captured) for tap in captured.taps]
    passed = [tap for tap, kind in zip(captured.taps, kinds, strict=True) if kind == "pass"]
    cotangent = "logits" in kinds and (request.soft or request.space == "probability")
    rows = "head" in kinds or "pooled" in kinds
    first = cotangent + rows
    sources: list[Source] = []
    for tap, kind in zip(captured.taps, kinds, strict=True):
        column: int | None = first - 1
        scale = 1.0
        if kind == "logits" and not cotangent:
            column, scale = None, 2.0 ** (1 / q)
        elif kind == "logits":
            column = 0
        elif kind == "pass":
            column, scale = first + passed.index(tap), 1 / pass_scale(captured)
        elif kind == "pooled" and captured.head is not None:
            scale = captured.head.positions ** (1 / q - 1)
        if request.layer_scale == "numel":
            scale /= tap.shape.numel() // max(captured.batch, 1) or 1
        sources.append(Source(column, scale))
    # In the order of the taps, so that the norms mostly are D as they are.
    order = list(dict.fromkeys(source.column for source in sources if source.column is not None))
    places = {measured: column for column, measured in enumerate(order)}
    sources = [Source(None if column is None else places[column], scale) for column, scale in sources]
    found = (strides or captured.strides)(passed)
    return Plan(sources, order, cotangent, rows, passed, found, pass_scale(captured))


def _kind(tap: Tap, captured: Captured) -> str:
    head = captured.head
    if is_logits(tap, captured):
        return "logits"
    if head is not None and _among(tap.edge, head.edges):
        return "head"
    if head is not None and head.pooled is not None and same_edge(tap.edge, head.pooled):
        return "pooled"
    return "pass"


def _among(edge: GradientEdge, edges: list[GradientEdge]) -> bool:
    return any(same_edge(edge, other) for other in edges)


class Cotangents:
    """c [N,C], c[n,:] = d (s[n,i] - s[n,y]) / d z[n,:], and the rows c W [N,D], one competitor i at a time; None where
    nothing needs them. A sample against its own label has c = 0. The soft competitor is one, whatever its number;
    `direction` is its c where that is known."""

    def __init__(
        self,
        captured: Captured,
        target: Tensor,
        request: Request,
        second_order: bool,
        direction: Tensor | None = None,
    ) -> None:
        logits, head = captured.logits, captured.head
        self._target, self._columns = target, target.unsqueeze(1)
        self._scores: Tensor | None = None
        self._soft: Callable[[Tensor], Tensor] | None = None
        self._direction = direction
        self._weight: Tensor | None = None
        if head is not None:
            self._weight = head.weight if second_order else head.weight.detach()
        if request.soft:
            self._soft = partial(soft_cotangent, logits, target, second_order, request.backend)
            self._weight = None if self._weight is None else self._weight.to(logits.dtype)
        elif request.space == "probability":
            wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
            self._scores = torch.softmax(logits if second_order else logits.detach(), 1, dtype=wide)
            self._own = self._scores.gather(1, self._columns)
            self._weight = None if self._weight is None else self._weight.to(wide)
        elif self._weight is not None:
            self._own = self._weight.index_select(0, target)
        else:
            self._own = logits.new_zeros(logits.shape).scatter_(1, self._columns, -1.0)
            self._one = logits.new_ones(self._columns.shape)

    def of(self, index: Tensor) -> Seeds:
        """c [N,C] (None where nothing needs it) and c W [N,D] (None without a head) for competitors index [N]."""
        cotangent = self._direction
        if self._soft is not None and cotangent is None:
            cotangent = self._soft(index != self._target)
        if self._scores is not None:
            cotangent = self._softmax(self._scores, index.unsqueeze(1))
        elif cotangent is None and self._weight is None:
            cotangent = self._own.scatter_add(1, index.unsqueeze(1), self._one)
        if self._weight is None:
            return cotangent, None
        if cotangent is None:
            return None, self._weight.index_select(0, index) - self._own
        return cotangent, cotangent @ self._weight

    def _softmax(self, scores: Tensor, column: Tensor) -> Tensor:
        other = scores.gather(1, column)
        at = torch.cat([column, self._columns], 1)
        return (scores * (self._own - other)).scatter_add(1, at, torch.cat([other, -self._own], 1))


def soft_cotangent(logits: Tensor, target: Tensor, second_order: bool, backend: str, counted: Tensor) -> Tensor:
    """d (-phi[n]) / d z[n,:] = q - e_y, [N,C] in the dtype of the logits, 0 for samples that are not `counted` [N]; for
    a masked label, which has no phi, d nll[n] / d z[n,:], the same direction. With second order a function of the
    logits."""
    if not second_order and not tracing() and choose("competitors", (logits,), backend)[0] in COMPILED:
        assert EXTENSION is not None
        found: Tensor = EXTENSION.soft_cotangent(logits, target, counted)
        return found
    with torch.enable_grad():
        z = logits if second_order else logits.detach().requires_grad_()
        # NaN in the logits of samples that are not counted is nobody's.
        rows = functional.competitors(torch.where(counted.unsqueeze(1), z, 0), target, backend=backend)
        label_is_masked = counted & (rows.phi.detach() == -math.inf)
        weights = -counted.to(rows.phi.dtype), label_is_masked.to(rows.nll.dtype)
        return torch.autograd.grad((rows.phi, rows.nll), z, weights, create_graph=second_order)[0]

"""The split backward where the norms are differentiated too, for piecewise-linear networks.

There g = d gap / d h, the gradient whose norm is taken, depends on the weights through products of layers alone. Let
u = d loss / d g, let t be its tangent, what a displacement of h by u moves at every activation, and G the gradients of
the pass. Then <u, g> is the change of the gap by u, and at a layer with output W a + b

    d loss / d W = sum_n G[n] (x) (w[n] a[n] + t[n]),      d loss / d b = sum_n w[n] G[n],      w = d loss / d gap

    forward pass F, pass F, tangents F, weights F: 4 F where differentiating twice and going back takes 6 F.

The tangents come out of the graph of the pass, by its derivative in the gradients that go from layer to layer: for a
linear layer that is the layer itself. Exact where every operation is linear or piecewise linear in the activations and
parameters sit in linear layers and convolutions, or are added; refused elsewhere, by the name of the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .split_backward import Kind, NotExact, Seeds, Split, redirected
from .taps import SAME_VALUES, Captured, Tap, graph_nodes, same_edge

# Autograd nodes of operations that are (piecewise) linear in all their inputs.
LINEAR = SAME_VALUES | {
    "AdaptiveAvgPool2DBackward0",
    "AddBackward0",
    "AliasBackward0",
    "AvgPool2DBackward0",
    "CatBackward0",
    "ConstantPadNdBackward0",
    "HardtanhBackward0",
    "HardtanhBackward1",
    "LeakyReluBackward0",
    "LeakyReluBackward1",
    "MaxPool2DWithIndicesBackward0",
    "MeanBackward0",
    "MeanBackward1",
    "MkldnnMaxPool2DBackward0",
    "NativeDropoutBackward0",
    "PermuteBackward0",
    "ReluBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "SubBackward0",
    "SumBackward0",
    "SumBackward1",
    "ThresholdBackward0",
    "ThresholdBackward1",
    "ToCopyBackward0",
    "TransposeBackward0",
}
# Those that are linear in one input while the others stay as they are; batch norm with running statistics.
ONE_INPUT = {
    "BatchNormBackward0",
    "CudnnBatchNormBackward0",
    "DivBackward0",
    "MulBackward0",
    "NativeBatchNormBackward0",
}
# Those to which a parameter may be added: its gradient is that of the output.
ADDING = {"AddBackward0", "CatBackward0", "SubBackward0"}


class Places(NamedTuple):
    """The numbers of a layer's edges to its input, weight and bias."""

    input: int
    weight: int
    bias: int | None


LAYERS = {
    "ConvolutionBackward0": Places(0, 1, 2),
    "AddmmBackward0": Places(1, 2, 0),
    "MmBackward0": Places(0, 1, None),
}


class TangentSplit(Split):
    """The split backward of one forward pass of a piecewise-linear network, for one competitor and norms that are
    differentiated. Raises NotExact with the reason where it has none; arguments as for Split."""

    second_order = True

    def __init__(self, captured: Captured, taps: Sequence[Tap], tried: dict[Kind, str | None]) -> None:
        super().__init__(captured, taps, tried)
        if captured.head is None or self._top.name() not in LAYERS:
            raise NotExact("the logits do not come from a linear layer")
        if any(tap.edge.node in self._leaves for tap in taps):
            raise NotExact("the gradient in the tapped input is asked for as well")
        if self._open:
            raise NotExact("a layer has an input whose rows are not the samples")
        self._taps = taps
        self._outputs = {(edge.node, edge.output_nr): i for i, edge in enumerate(self.edges)}
        self._kept_outputs = len(self.edges)
        for node in self._nodes:
            if node in self._spine:
                self._check_linear(node)
        # Which of the tangents, at the taps and then at further edges, is the one at the input of a layer.
        self._inputs = {node: self._input(node) for node in self._owners if node.name() in LAYERS}

    def _check_linear(self, node: Any) -> None:
        name = node.name()
        along = [number for number, (following, _) in enumerate(node.next_functions) if following in self._spine]
        ends = [
            number
            for number, (following, output) in enumerate(node.next_functions)
            if following is not None and any(same_edge(tap.edge, GradientEdge(following, output)) for tap in self._taps)
        ]
        inputs = sorted({*along, *ends})
        leaving = self._leaving(node)
        if name in LAYERS:
            fits = inputs == [LAYERS[name].input] and getattr(node, "_saved_alpha", 1) == 1
        elif name in ONE_INPUT:
            fits = inputs == [0] or (name == "MulBackward0" and len(inputs) == 1)
            fits = fits and all(number in inputs for number in leaving)
        else:
            fits = name in LINEAR and (name in ADDING or all(number in inputs for number in leaving))
        if not fits:
            raise NotExact(f"{name} is not known to be linear in the activations and additive in parameters")

    def _input(self, node: Any) -> int:
        following, output = node.next_functions[LAYERS[node.name()].input]
        edge = GradientEdge(following, output)
        for i, tap in enumerate(self._taps):
            if same_edge(edge, tap.edge) and following not in self._spine:
                return i
        self.edges.append(edge)
        return len(self._taps) + len(self.edges) - self._kept_outputs - 1

    def seeds(self, seeds: Seeds) -> Seeds:
        cotangent, rows = seeds
        assert cotangent is None and rows is not None
        self._rows = rows.detach().requires_grad_()
        return None, self._rows

    def keep(
        self, measured: list[Tensor], kept: list[Tensor], every_second: Callable[[], list[Tensor]]
    ) -> list[Tensor]:
        self._kept.append([gradient.detach() for gradient in kept])
        self._try_out(every_second)
        self._passed, self._pass = measured, kept
        self._leaf_gradients = [gradient.detach().requires_grad_() for gradient in measured]
        return self._leaf_gradients

    def _gradients(
        self, value: Tensor, logits: Tensor, gap: Tensor | None, index: Tensor, target: Tensor, grad: Tensor
    ) -> list[Tensor | None]:
        keep_graph = self._keeps_graph()
        outer, *slopes = torch.autograd.grad(
            value, [logits, *self._leaf_gradients], grad, retain_graph=keep_graph, allow_unused=True
        )
        slopes = [torch.zeros_like(g) if u is None else u for u, g in zip(slopes, self._leaf_gradients, strict=True)]
        outer = torch.zeros_like(logits) if outer is None else outer
        rows, *between = self._tangents(slopes, keep_graph)
        w = outer.gather(1, index[:, :1]) / self._scale
        tangents = [*slopes[-len(self._taps) :], *between]  # rows are measured first, where they are
        found: dict[Any, Tensor | None] = dict.fromkeys(self._leaves)
        roots: list[GradientEdge] = []
        seeds: list[Tensor] = []

        def add(node: Any, number: int, gradient: Tensor) -> None:
            following, output = node.next_functions[number]
            if following in found:
                found[following] = _sum(found[following], gradient)
            else:
                roots.append(GradientEdge(following, output))
                seeds.append(gradient)

        leaving, places = self._leaving(self._top), LAYERS[self._top.name()]
        if places.weight in leaving:  # rows = W[i] - W[y]
            total = outer.t() @ _input_of(self._top)
            if rows is not None:
                total.index_add_(0, index[:, 0], rows.to(total.dtype))
                total.index_add_(0, target, -rows.to(total.dtype))
            add(self._top, places.weight, total.t())
        if places.bias in leaving:
            add(self._top, places.bias, outer.sum(0))
        for node, number in self._inputs.items():
            leaving, places = self._leaving(node), LAYERS[node.name()]
            gradient = self._kept[0][self._outputs[node, 0]]
            if places.weight in leaving:
                add(node, places.weight, _weight_gradient(node, gradient, w, tangents[number]))
            if places.bias in leaving:
                sums = gradient.flatten(2).sum(2) if gradient.dim() > 2 else gradient
                add(node, places.bias, (w.to(sums.dtype).t() @ sums).squeeze(0))
        for edge in self.edges[: self._kept_outputs]:
            if edge.node not in self._inputs:
                gradient = self._kept[0][self._outputs[edge.node, edge.output_nr]]
                roots.append(edge)
                seeds.append((gradient * w.view(-1, *[1] * (gradient.dim() - 1))).to(gradient.dtype))
        if not keep_graph:
            self._kept.clear()
        ran = self._run(roots, seeds, keep_graph)
        return [_sum(found[leaf], other) for leaf, other in zip(self._leaves, ran, strict=True)]

    def _tangents(self, slopes: list[Tensor], keep_graph: bool) -> list[Tensor | None]:
        """The tangents of `slopes` at the head's input and at `edges` behind the outputs: the derivative of the pass.

        The derivative of a convolution's input gradient always comes with one in its weight, which nobody wants here:
        its nodes in the graph of the pass are replaced by ones that convolve the tangent and do nothing else.
        """
        with torch.enable_grad():
            joined = _Joined.apply(slopes, *self._passed)
        made = {_key(get_gradient_edge(gradient)): gradient for gradient in self._pass[: self._kept_outputs]}
        nodes = graph_nodes(joined)
        instead: dict[Any, Tensor] = {}

        for node in nodes:
            _replace(node, made, instead)
        places: list[tuple[int, int, Tensor | None]] = [
            (i, number, instead[following])
            for i, node in enumerate(nodes)
            for number, (following, _) in enumerate(node.next_functions)
            if following in instead
        ]
        ends = [self._rows, *(instead.get(end.grad_fn, end) for end in self._pass[self._kept_outputs :])]
        with redirected(joined, places):
            return list(torch.autograd.grad(joined, ends, retain_graph=keep_graph, allow_unused=True))


def _replace(node: Any, made: dict[tuple[Any, int], Tensor], instead: dict[Any, Tensor]) -> None:
    """Adds to `instead` what takes the place of a node, where that is the one of a convolution's input gradient and
    made from one of the tensors `made`."""
    if node in instead or node.name() != "ConvolutionBackwardBackward0":
        return
    came_from = node.next_functions[0]
    if came_from not in made:
        return
    _replace(came_from[0], made, instead)  # a convolution of a convolution
    with torch.enable_grad():
        instead[node] = _Convolved.apply(instead.get(came_from[0], made[came_from]), node)


class _Joined(torch.autograd.Function):
    """A root whose derivative in each tensor is the given one."""

    @staticmethod
    def forward(ctx: Any, slopes: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.slopes = slopes
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (None, *ctx.slopes)


class _Convolved(torch.autograd.Function):
    """In place of a node for the input gradient of a convolution: its derivative in `gradient`, the convolution of the
    tangent. The value is not used."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, node: Any) -> Tensor:
        ctx.node = node
        ctx.set_materialize_grads(False)
        return gradient.new_zeros(()).expand(node._saved_input.shape)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor | None) -> tuple[Tensor | None, None]:
        if tangent is None:
            return None, None
        node = ctx.node
        options = node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_transposed
        weight, rest = node._saved_weight, (node._saved_output_padding, node._saved_groups)
        return torch.ops.aten.convolution(tangent, weight, None, *options, *rest), None


def _key(edge: GradientEdge) -> tuple[Any, int]:
    return edge.node, edge.output_nr


def _input_of(node: Any) -> Tensor:
    name = node.name()
    if name == "ConvolutionBackward0":
        return node._saved_input
    return node._saved_mat1 if name == "AddmmBackward0" else node._saved_self


def _weight_gradient(node: Any, gradient: Tensor, w: Tensor, tangent: Tensor | None) -> Tensor:
    """sum_n G[n] (x) (w[n] a[n] + t[n]) in the layout of the layer's weight."""
    a = _input_of(node)
    w = w.to(a.dtype).view(-1, *[1] * (a.dim() - 1))
    mixed = a * w if tangent is None else torch.addcmul(tangent, a, w)
    if node.name() != "ConvolutionBackward0":
        # Laid out as the matrix, mostly a transposed weight, so that it becomes the parameter's .grad without a copy.
        transposed = node._saved_mat2_sym_strides[0] == 1
        return (gradient.t() @ mixed).t() if transposed else mixed.t() @ gradient
    return torch.ops.aten.convolution_backward(
        gradient,
        mixed,
        node._saved_weight,
        None,
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        node._saved_groups,
        [False, True, False],
    )[1]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other

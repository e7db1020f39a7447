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

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .autograd_graph import Graph, same_edge, saved, shape_of
from .plan import Seeds
from .request import Captured, Request
from .split import GivenGradients, NotExact, Split, Trials
from .structure import per_sample

# Autograd nodes of operations that are (piecewise) linear in all their inputs.
LINEAR = {
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
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
    "RegisterPostBackwardFunctionBackward",
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
    """Strategy "tangent": the split backward of one forward pass of a piecewise-linear network, for one competitor and
    norms that are differentiated. Raises NotExact where it would not be exact; arguments as for Split."""

    name = "tangent"
    second_order = True

    def __init__(
        self,
        request: Request,
        captured: Captured,
        logits: Tensor,
        trials: Trials | None = None,
        refused: list[str] | None = None,
    ) -> None:
        super().__init__(request, captured, logits, trials, refused)
        if captured.head is None or self._graph.top.name() not in LAYERS:
            raise NotExact("the logits do not come from a linear layer")
        self._taps = self._plan.taps
        if any((tap.edge.node, tap.edge.output_nr) in self._ending for tap in self._taps):
            raise NotExact("the gradient in the tapped input is asked for as well")
        self._places_of = {(edge.node, edge.output_nr): i for i, edge in enumerate(self.edges)}
        self._recorded_outputs = len(self.edges)
        self._check_linear()
        # Which of the tangents, at the taps and then at further edges, is the one at the input of a layer.
        self._tangent_of = {node: self._input(node) for node in self._layer_nodes if node.name() in LAYERS}
        self._strides = [self._stride(edge) for edge in self.edges]

    def _check_request(self, request: Request, captured: Captured, logits: Tensor) -> None:
        super()._check_request(request, captured, logits)
        if request.soft:
            self._refuse("the soft competitor's cotangent depends on the logits, which tangents do not follow")
        if request.competitors != 1:
            self._refuse("it takes one competitor when norms are differentiated")

    def _check_linear(self) -> None:
        others = {node.name(): None for node in self._graph.nodes if node in self._along and not self._is_linear(node)}
        if others:
            names = ", ".join(others) + (" is" if len(others) == 1 else " are")
            raise NotExact(f"{names} not known to be linear in the activations and additive in parameters")

    def _is_linear(self, node: Any) -> bool:
        name = node.name()
        inputs, leaving = self._structure.edges(node), self._leaving(node)
        if name in LAYERS:
            places = LAYERS[name]
            factors = [saved(node, "alpha"), saved(node, "beta")]
            fits = inputs == [places.input] and all(factor is None or factor == 1 for factor in factors)
            if fits and places.bias in leaving:  # one number for each output channel
                bias = node.next_functions[places.bias]
                fits = shape_of(*bias) == shape_of(node, 0)[1:2]
        elif name in ONE_INPUT:
            fits = inputs == [0] or (name == "MulBackward0" and len(inputs) == 1)
            fits = fits and all(number in inputs for number in leaving)
        else:
            fits = name in LINEAR and (name in ADDING or all(number in inputs for number in leaving))
        return fits

    def _input(self, node: Any) -> int:
        following, output = node.next_functions[LAYERS[node.name()].input]
        edge = GradientEdge(following, output)
        for i, tap in enumerate(self._taps):
            if same_edge(edge, tap.edge) and following not in self._along:
                return i
        self.edges.append(edge)
        return len(self._taps) + len(self.edges) - self._recorded_outputs - 1

    def _seeds(self, seeds: Seeds) -> Seeds:
        cotangent, rows = seeds
        assert cotangent is None and rows is not None
        self._rows = rows.detach().requires_grad_()
        return None, self._rows

    def _record(self, measured: list[Tensor], recorded: list[Tensor]) -> list[Tensor]:
        self._recorded.append([gradient.detach() for gradient in recorded])
        self._passed, self._pass = measured, recorded
        self._leaf_gradients = [gradient.detach().requires_grad_() for gradient in measured]
        return self._leaf_gradients

    def _start(self) -> Tensor:
        return self.captured.logits.detach().requires_grad_()

    def attach(self, loss: Tensor) -> Tensor:
        """`loss`, computed from `logits` and the norms, as made by a node with the parameters as its inputs."""
        gradients = partial(self._gradients_of, loss, self.logits)
        self._logits = None
        total: Tensor = GivenGradients.apply(loss.detach(), gradients, *self.parameters)
        return total.clone()  # no view, so that a user may add to it in place

    def _gradients_of(self, loss: Tensor, logits: Tensor, grad: Tensor) -> list[Tensor | None]:
        """The gradients of <grad, loss> in `parameters`."""
        self._check_late_hooks()
        keep_graph = self._graph.still_to_run(self._made)
        top, index, target = self._graph.top, self._index, self._target
        outer, *slopes = torch.autograd.grad(
            loss, [logits, *self._leaf_gradients], grad, retain_graph=keep_graph, allow_unused=True
        )
        slopes = [torch.zeros_like(g) if u is None else u for u, g in zip(slopes, self._leaf_gradients, strict=True)]
        outer = torch.zeros_like(logits) if outer is None else outer
        rows, *between = self._tangents(slopes, keep_graph)
        w = (outer.gather(1, index[:, :1]) / self._plan.scale).squeeze(1)
        tangents = [*slopes[-len(self._taps) :], *between]  # rows are measured first, where they are
        found: dict[Any, Tensor | None] = dict.fromkeys(self._inputs)
        roots: list[GradientEdge] = []
        seeds: list[Tensor] = []

        def add(node: Any, number: int, gradient: Tensor) -> None:
            edge = node.next_functions[number]
            if edge in found:
                found[edge] = _sum(found[edge], gradient)
            else:
                roots.append(GradientEdge(*edge))
                seeds.append(gradient)

        leaving, places = self._leaving(top), LAYERS[top.name()]
        if places.weight in leaving:  # rows = W[i] - W[y]
            total = outer.t() @ _input_of(top)
            if rows is not None:
                total.index_add_(0, index[:, 0], rows.to(total.dtype))
                total.index_add_(0, target, -rows.to(total.dtype))
            add(top, places.weight, total.t())
        if places.bias in leaving:
            add(top, places.bias, outer.sum(0))
        for node, number in self._tangent_of.items():
            leaving, places = self._leaving(node), LAYERS[node.name()]
            place = self._places_of[node, 0]
            gradient, stride = self._recorded[0][place], self._strides[place]
            if places.weight in leaving:
                following, output = node.next_functions[places.input]
                a = _input_of(node)
                weights = per_sample(w, a.shape, self._stride(GradientEdge(following, output))).to(a.dtype)
                add(node, places.weight, _weight_gradient(node, gradient, a, weights, tangents[number]))
            if places.bias in leaving:
                sums = gradient.flatten(2).sum(2) if gradient.dim() > 2 else gradient
                factor = per_sample(w, sums.shape, stride // gradient.shape[2:].numel())
                column = factor.to(sums.dtype).expand(len(sums), 1)
                add(node, places.bias, (column.t() @ sums).squeeze(0))
        for place, edge in enumerate(self.edges[: self._recorded_outputs]):
            if edge.node not in self._tangent_of:
                gradient = self._recorded[0][place]
                roots.append(edge)
                seeds.append((gradient * per_sample(w, gradient.shape, self._strides[place])).to(gradient.dtype))
        if not keep_graph:
            self._recorded.clear()
        ran = self._run(roots, seeds, keep_graph)
        return [_sum(found[edge], other) for edge, other in zip(self._inputs, ran, strict=True)]

    def _tangents(self, slopes: list[Tensor], keep_graph: bool) -> list[Tensor | None]:
        """The tangents of `slopes` at the head's input and at `edges` behind the outputs: the derivative of the pass.

        The derivative of a convolution's input gradient always comes with one in its weight, which nobody wants here:
        its nodes in the graph of the pass are replaced by ones that convolve the tangent and do nothing else.
        """
        with torch.enable_grad():
            joined = GivenGradients.apply(slopes[0].new_zeros(()), lambda _: slopes, *self._passed)
        made = {_key(get_gradient_edge(gradient)): gradient for gradient in self._pass[: self._recorded_outputs]}
        graph = Graph(joined)
        instead: dict[Any, Tensor] = {}

        for node in graph.nodes:
            _replace(node, made, instead)
        numbers = {node: number for number, node in enumerate(instead)}
        places = [
            (place, number, numbers[following])
            for place, node in enumerate(graph.nodes)
            for number, (following, _) in enumerate(node.next_functions)
            if following in instead
        ]
        ends = [self._rows, *(instead.get(end.grad_fn, end) for end in self._pass[self._recorded_outputs :])]
        with graph.redirected(places, list(instead.values())), graph.silenced():
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


def _weight_gradient(node: Any, gradient: Tensor, a: Tensor, w: Tensor, tangent: Tensor | None) -> Tensor:
    """sum_n G[n] (x) (w[n] a[n] + t[n]) in the layout of the layer's weight; w broadcasts against a."""
    mixed = a * w if tangent is None else torch.addcmul(tangent, a, w.to(a.dtype))
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

"""Proof, read off the autograd graph, that samples do not meet between the taps and the logits.

In row-major order a tensor's entry at flat position i belongs to sample (i // stride) mod N: `stride` says where the
batch is. It is prod(shape[1:]) for [N,*], E for [T,N,E], and stays what it is through every view. From the logits,
where the batch is dimension 0, each node hands the place on to its inputs, and is one of

    row-local    the gradient that it gives sample n depends on sample n alone, and linearly
    couples      samples meet in it: a mean over the batch, a product of two activations, batch norm in training mode
    unknown      nothing is known of it: custom Functions, operations that PyTorch shows nothing of

by its name AND its saved arguments, never by numbers that passed through it. What is not in the table is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..sharding import BORDERS
from .autograd_graph import Edge, Graph, saved, saved_dim, saved_dims, shape_of, shapes_of

# User's autograd Functions that were declared row-local, by the name of their node.
_REGISTERED: set[str] = set()


class Where(NamedTuple):
    """Where the batch is in a tensor: the stride of a sample in row-major order, and whether that was proven."""

    stride: int
    proven: bool = True


class Finding(NamedTuple):
    """A node that is not row-local: "couples" or "unknown", its name and why in a sentence."""

    verdict: str
    node: str
    why: str

    def __str__(self) -> str:
        return f"{self.node}: {self.why}"


def register_row_local(function: str | type[torch.autograd.Function]) -> None:
    """Declares a custom autograd Function row-local, so that the proof goes through it.

    function: the Function or the name of its node in the graph ("MyFunctionBackward"; for an operation of torch.library
    "GeneratedBackwardFor_namespace_name_defaultBackward", as `explain` prints it). You promise: the backward is linear
    in the gradient, the gradient of sample n depends on sample n alone, and the batch stands where it stood: at
    the same place in inputs and outputs of equal shape, else at dimension 0.
    """
    if isinstance(function, type) and issubclass(function, torch.autograd.Function):
        function = f"{function.__name__}Backward"
    if not isinstance(function, str):
        raise TypeError(f"function must be a torch.autograd.Function or a node's name, got {type(function).__name__}")
    _REGISTERED.add(function)


def registered() -> frozenset[str]:
    """The names of the Functions that were declared row-local."""
    return frozenset(_REGISTERED)


def is_unknown_function(node: Any) -> bool:
    """Whether a node is a custom autograd Function, of Python or C++, whose backward may be anything."""
    custom = isinstance(node, torch.autograd.function.BackwardCFunction) or "CppNode" in node.name()
    return custom and node.name() not in _REGISTERED and node.name() not in _EXACT and node.name() != "_InGraphBackward"


def locate(shape: Sequence[int], stride: int, batch: int) -> tuple[int, int] | None:
    """The dimension that holds the batch, and the size of what stands inside the batch in that dimension: (d, inner)
    where sample = (index_d // inner) mod batch; None where no single dimension holds it."""
    inside = 1
    for d in range(len(shape) - 1, -1, -1):
        size = shape[d]
        if size > 1 and inside <= stride < inside * size:
            inner = stride // inside
            fits = stride % inside == 0 and size % (inner * batch) == 0
            return (d, inner) if fits else None
        inside *= size
    return None


def by_sample(tensor: Tensor, stride: int, batch: int) -> Tensor:
    """[N, rest]: the entries of each sample, in any order; the tensor itself where dimension 0 is the batch."""
    if batch <= 1:
        return tensor.reshape(batch, tensor.numel() // max(batch, 1)) if batch else tensor.flatten(1)
    at = locate(tensor.shape, stride, batch)
    if at is None:  # spread over several dimensions
        return tensor.reshape(-1, batch, stride).movedim(1, 0).reshape(batch, -1)
    d, inner = at
    if d == 0 and inner == 1 and tensor.shape[0] == batch:
        return tensor
    split = tensor.unflatten(d, (tensor.shape[d] // (inner * batch), batch, inner))
    return split.movedim(d + 1, 0).reshape(batch, -1)


def per_sample(factor: Tensor, shape: Sequence[int], stride: int) -> Tensor:
    """factor [N] as a tensor that multiplies each sample's entries in a tensor of that shape."""
    batch = len(factor)
    if batch == 1:
        return factor.view([1] * len(shape)) if len(shape) else factor[0]
    at = locate(shape, stride, batch)
    if at is None:  # spread over several dimensions
        outer = prod(shape) // (batch * stride)
        return factor.view(1, batch, 1).expand(outer, batch, stride).reshape(list(shape))
    d, inner = at
    if d == 0 and inner == 1 and shape[0] == batch:
        return factor.view(-1, *[1] * (len(shape) - 1))
    outer = shape[d] // (inner * batch)
    if inner != 1:
        factor = factor.repeat_interleave(inner)
    if outer != 1:
        factor = factor.repeat(outer)
    return factor.view([-1 if i == d else 1 for i in range(len(shape))])


class Structure:
    """What the graph between the logits and the taps says about the samples.

    Args:
        graph: of the logits [N,C] (or [N])
        ends: the edges of the taps
        batch: N

    Attributes:
        along: nodes between the logits and the taps: the tapped path
        where: (node, output) -> Where, of the outputs on the tapped path and of the taps; missing where it was lost
        findings: nodes that are not row-local, from the logits on
        read: (node, name, value) of every saved argument that the proof has read
    """

    def __init__(self, graph: Graph, ends: Sequence[GradientEdge], batch: int) -> None:
        self.graph, self.batch = graph, batch
        self._ends = {(edge.node, edge.output_nr) for edge in ends}
        self.along = graph.path_to(ends)
        self.where: dict[Edge, Where] = {}
        self.findings: list[Finding] = []
        self.read: list[tuple[Any, str, Any]] = []
        self._lost: set[Edge] = set()
        root = graph.root
        self.where[graph.top, root.output_nr] = Where(prod(root.shape[1:]))
        for node in self._ordered():
            self._pass_on(node)

    def refusal(self, trusting: bool = False) -> str | None:
        """Why samples may meet, in a sentence that names the node; None where they provably do not.

        trusting: only nodes that certainly couple samples count.
        """
        for finding in self.findings:
            if finding.verdict == "couples":
                return f"the samples are coupled: {finding}"
        if self.findings and not trusting:
            return f"that the samples are independent is not proven: {self.findings[0]}"
        return None

    def edges(self, node: Any) -> list[int]:
        """The numbers of a node's edges that lead along the tapped path or to a tap."""
        return [
            number
            for number, edge in enumerate(self.graph.edges[node])
            if edge[0] is not None and (edge[0] in self.along or edge in self._ends)
        ]

    def _ordered(self) -> Iterable[Any]:
        """The nodes of the tapped path, each after all that read it."""
        waiting = {node: sum(r in self.along for r, _, _ in self.graph.readers.get(node, ())) for node in self.along}
        open_ = [node for node, count in waiting.items() if count == 0]
        while open_:
            node = open_.pop()
            yield node
            for following, _ in self.graph.edges[node]:
                if following in waiting:
                    waiting[following] -= 1
                    if waiting[following] == 0:
                        open_.append(following)

    def _pass_on(self, node: Any) -> None:
        name = self.graph.names[node]
        rule = _rule(name)
        numbers = self.edges(node)
        if rule is None:
            self._find("unknown", name, _WHY.get(name, "nothing is known of this operation"))
        outputs = [
            (output, self.where[node, output], shape)
            for output, shape in enumerate(shapes_of(node))
            if (node, output) in self.where
        ]
        if not outputs and self.batch > 1:
            self._find("unknown", name, "where the batch is in its output is not known")
        for number in numbers:
            into = following, output = self.graph.edges[node][number]
            if self.batch <= 1:  # a single sample has nobody to meet
                self._place(into, Where(0), name)
                continue
            before = shape_of(following, output)
            for nr, where, shape in outputs:
                at = _At(node, nr, shape, where.stride, self.batch, number, numbers, before, self.read)
                self._place(into, self._through(at, rule, where), name)

    def _through(self, at: _At, rule: Rule | None, where: Where) -> Where | None:
        name = self.graph.names[at.node]
        try:
            return Where((rule or _assumed)(at), where.proven and rule is not None)
        except _Couples as reason:
            self._find("couples", name, str(reason))
            return None if reason.stride is None else Where(reason.stride, where.proven)
        except _Unknown as reason:
            self._find("unknown", name, str(reason))
            return None

    def _place(self, edge: Edge, where: Where | None, reader: str) -> None:
        """Notes where the batch is in what an edge leads to, which its readers must agree on."""
        known = self.where.get(edge)
        if where is None or edge in self._lost:
            return
        if known is not None and known.stride != where.stride:
            if known.proven and where.proven:
                self._find("couples", reader, "its input is read with the batch in two different dimensions")
                self._lost.add(edge)
                del self.where[edge]
                return
            where = known if known.proven else where
        self.where[edge] = Where(where.stride, where.proven or (known is not None and known.proven))

    def _find(self, verdict: str, node: str, why: str) -> None:
        finding = Finding(verdict, node, why)
        if finding not in self.findings:
            self.findings.append(finding)


class _Couples(Exception):
    """Samples meet; `stride`: where the batch is in the input all the same."""

    def __init__(self, why: str, stride: int | None = None) -> None:
        super().__init__(why)
        self.stride = stride


class _Unknown(Exception):
    """What happens to the samples is not known."""


class _At(NamedTuple):
    """One way through a node: from output `output`, of `shape`, where the batch has `stride`, to the input of edge
    `number`, whose shape is `into`; `numbers` are all edges of the node along the tapped path. Arguments that the node
    has saved are read by the methods, which note them in `read`."""

    node: Any
    output: int
    shape: torch.Size
    stride: int
    batch: int
    number: int
    numbers: list[int]
    into: torch.Size
    read: list[tuple[Any, str, Any]]

    def saved(self, name: str, node: Any = None) -> Any:
        """As `autograd_graph.saved`, of this node or of `node`."""
        node = self.node if node is None else node
        value = saved(node, name)
        self.read.append((node, name, value))
        return value

    def saved_dim(self, name: str, ndim: int) -> int:
        self.saved(name)
        return saved_dim(self.node, name, ndim)

    def saved_dims(self, name: str, ndim: int, node: Any = None) -> list[int]:
        self.saved(name, node)
        return saved_dims(self.node if node is None else node, name, ndim)

    def dim(self) -> tuple[int, int]:
        """(d, inner) of the output, see `locate`."""
        at = locate(self.shape, self.stride, self.batch)
        if at is None:
            raise _Unknown("the batch is spread over several dimensions")
        return at

    def at_dim(self, d: int, inner: int) -> int:
        """The stride of the batch in dimension d of the input, which must be as long as that of the output."""
        if not 0 <= d < len(self.into):
            raise _Couples("one value serves all samples")
        out = self.shape[self.dim()[0]]
        if self.into[d] != out:
            raise _Couples(
                "one value serves all samples"
                if self.into[d] == 1
                else f"the batch is {self.into[d]} long before it and {out} long behind it"
            )
        return inner * prod(self.into[d + 1 :])


Rule = Callable[[_At], int]


def _same_place(at: _At) -> int:
    """Entry by entry, an input with fewer dimensions or of size 1 repeated."""
    if at.into == at.shape:
        return at.stride
    d, inner = at.dim()
    return at.at_dim(d - (len(at.shape) - len(at.into)), inner)


def _view(at: _At) -> int:
    if prod(at.into) != prod(at.shape):
        raise _Unknown("a view of another size")
    return at.stride


def _assumed(at: _At) -> int:
    """Where the batch would be before an unknown node: where it is behind it, or dimension 0."""
    if at.into == at.shape:
        return at.stride
    if len(at.into) and at.into[0] == at.batch:
        return prod(at.into[1:])
    raise _Unknown("where the batch is in its input is not known")


def _permute(at: _At) -> int:
    d, inner = at.dim()
    return at.at_dim(at.saved_dims("dims", len(at.shape))[d], inner)


def _transpose(at: _At) -> int:
    d, inner = at.dim()
    ndim = len(at.shape)
    one, other = at.saved_dim("dim0", ndim), at.saved_dim("dim1", ndim)
    return at.at_dim({one: other, other: one}.get(d, d), inner)


def _transpose_matrix(at: _At) -> int:
    d, inner = at.dim()
    return at.at_dim(d if len(at.shape) < 2 else 1 - d, inner)


def _select(at: _At) -> int:
    """One index of a dimension; also each output of unbind."""
    d, inner = at.dim()
    return at.at_dim(d + (d >= at.saved_dim("dim", len(at.into))), inner)


def _stack(at: _At) -> int:
    d, inner = at.dim()
    along = at.saved_dim("dim", len(at.shape))
    if d == along:
        raise _Couples("it stacks tensors along the batch")
    return at.at_dim(d - (d > along), inner)


def _concatenate(at: _At) -> int:
    d, inner = at.dim()
    if d == at.saved_dim("dim", len(at.shape)):
        raise _Couples("it joins or parts the batch")
    return at.at_dim(d, inner)


def _slice(at: _At) -> int:
    d, inner = at.dim()
    if at.into[d] != at.shape[d]:
        raise _Couples("it takes a part of the batch")
    return at.at_dim(d, inner)


def _reduce(*names: str) -> Rule:
    """A sum, mean, maximum, norm, ... over the dimensions that `names[0]` says, kept with size 1 or gone."""

    def rule(at: _At) -> int:
        d, inner = at.dim()
        dims = at.saved(names[0])
        if isinstance(dims, int):
            gone = {at.saved_dim(names[0], len(at.into))}
        else:
            gone = set(at.saved_dims(names[0], len(at.into)))
        if not at.saved("keepdim"):
            d = [i for i in range(len(at.into)) if i not in gone][d]
        if d in gone:
            raise _Couples("it goes over the samples")
        return at.at_dim(d, inner)

    return rule


def _across(name: str) -> Rule:
    """Works along the dimensions that the argument `name` says, and keeps all: softmax, cumsum, sort, roll, gather."""

    def rule(at: _At) -> int:
        d, inner = at.dim()
        dims = at.saved(name)
        ndim = len(at.shape)
        over = [at.saved_dim(name, ndim)] if isinstance(dims, int) else at.saved_dims(name, ndim)
        if d in over:
            raise _Couples("it goes over the samples", at.stride if at.into == at.shape else None)
        if len(at.into) != ndim:
            raise _Unknown("it changes the number of dimensions")
        return at.at_dim(d, inner)

    return rule


def _inside(last: int) -> Rule:
    """Works on the last dimensions alone: pooling, padding, upsampling, batched matrices."""

    def rule(at: _At) -> int:
        d, inner = at.dim()
        if d >= len(at.shape) - last or len(at.into) != len(at.shape):
            raise _Couples("it works on the dimension that holds the batch")
        return at.at_dim(d, inner)

    return rule


def _first(edges: tuple[int, ...]) -> Rule:
    """[N,*] -> [N,*], each sample alone; only the inputs `edges` may come from the taps."""

    def rule(at: _At) -> int:
        if at.number not in edges:
            raise _Couples("its weights depend on the samples")
        d, inner = at.dim()
        if d != 0:
            raise _Unknown("the batch is not dimension 0")
        return at.at_dim(0, inner)

    return rule


def _product(left: int, right: int, batched: bool) -> Rule:
    """[.., M, P] = [.., M, K] [.., K, P]: edges `left` and `right`; others are added."""

    def rule(at: _At) -> int:
        if at.number not in (left, right):
            return _same_place(at)
        d, inner = at.dim()
        if batched and d == 0:
            return at.at_dim(0, inner)
        rows, columns = (1, 2) if batched else (0, 1)
        if d == rows and at.number == left:
            return at.at_dim(rows, inner)
        if d == columns and at.number == right:
            return at.at_dim(columns, inner)
        raise _Couples("it multiplies activations of different samples")

    return rule


def _matrix_vector(at: _At) -> int:
    d, inner = at.dim()
    if at.number == 0:
        return at.at_dim(d, inner)
    raise _Couples("it multiplies activations of different samples")


def _linear(at: _At) -> int:
    if at.number != 0:
        raise _Couples("its weights depend on the samples")
    return _inside(1)(at)


def _batch_norm(at: _At) -> int:
    if at.number != 0:
        raise _Couples("its weights depend on the samples")
    training = at.saved("training")
    if training is None:
        training = at.saved("train")
    d, inner = at.dim()
    if (training is None or training) and d != 1:  # at dimension 1: instance norm, a channel for each sample
        raise _Couples("batch norm in training mode couples the samples", at.at_dim(d, inner))
    return at.at_dim(d, inner)


def _layer_norm(at: _At) -> int:
    if at.number != 0:
        raise _Couples("its weights depend on the samples")
    shape = at.saved("normalized_shape")
    if shape is None:
        raise _Unknown("it does not say what it normalises")
    return _inside(len(shape))(at)


def _attention(at: _At) -> int:
    """[..,H,T,E] of queries, keys and values [..,H,*,E], and of a bias that may be shared by all."""
    d, inner = at.dim()
    if d > len(at.shape) - 3 or len(at.into) != len(at.shape):
        raise _Couples("the samples attend to each other")
    return at.at_dim(d, inner)


def _recurrent(at: _At) -> int:
    """Layers of mkldnn: input and output [T,N,*], states [N,H]."""
    if at.number in (1, 2, 3, 4):
        raise _Couples("its weights depend on the samples")
    if at.saved("batch_sizes"):
        raise _Unknown("its sequences are packed")
    d, inner = at.dim()
    if d != len(at.shape) - 2:
        raise _Couples("the samples are its time steps")
    return at.at_dim(len(at.into) - 2, inner)


def _recurrent_cudnn(at: _At) -> int:
    if at.number != 0 or at.output != 0:
        raise _Unknown("its states are read or given")
    if at.saved("batch_sizes"):
        raise _Unknown("its sequences are packed")
    d, inner = at.dim()
    if d != (0 if at.saved("batch_first") else 1):
        raise _Couples("the samples are its time steps")
    return at.at_dim(d, inner)


def _repeat(at: _At) -> int:
    d, inner = at.dim()
    if at.saved("repeats")[d] != 1:
        raise _Couples("it repeats the batch")
    return at.at_dim(d - (len(at.shape) - len(at.into)), inner)


def _unfold(at: _At) -> int:
    d, inner = at.dim()
    if d in (at.saved_dim("dimension", len(at.into)), len(at.shape) - 1):
        raise _Couples("it goes over the samples")
    return at.at_dim(d, inner)


def _complex(at: _At) -> int:
    """[*] complex <-> [*,2] real."""
    d, inner = at.dim()
    return at.at_dim(d, inner)


def _diagonal(at: _At) -> int:
    d, inner = at.dim()
    ndim = len(at.into)
    gone = {at.saved_dim("dim1", ndim), at.saved_dim("dim2", ndim)}
    if d == len(at.shape) - 1:
        raise _Couples("it takes a diagonal through the samples")
    return at.at_dim([i for i in range(ndim) if i not in gone][d], inner)


def _pad(at: _At) -> int:
    d, inner = at.dim()
    if at.into[d] != at.shape[d]:
        raise _Couples("it pads the batch")
    padded = len(at.shape) - 1 - d
    if len(at.saved("pad")) > 2 * padded and any(at.saved("pad")[2 * padded : 2 * padded + 2]):
        raise _Couples("it pads the batch")
    return at.at_dim(d, inner)


def _cell(at: _At) -> int:
    """Fused gates of a recurrent cell: [N,*] entry by entry, biases shared."""
    d, inner = at.dim()
    if d != 0 or len(at.into) != 2:
        raise _Couples("its biases depend on the samples")
    return at.at_dim(0, inner)


def _backward_hook(at: _At) -> int:
    """What PyTorch puts around a module with backward hooks, and FSDP2 before one: each input is an output."""
    if at.number != at.output:
        raise _Unknown("it hands on another of its inputs")
    return _same_place(at)


def _restrided(at: _At) -> int:
    """What adaptive_avg_pool2d writes for channels-last inputs: a fresh mean [N,C,1,1] with the same values under other
    strides. Any other as_strided is unknown."""
    n, c = (*at.shape, 0, 0)[:2]
    before = at.node.next_functions[at.number][0]
    pooled = before.name() == "MeanBackward1" and at.saved("keepdim", before) and len(at.into) == 4
    over = pooled and sorted(at.saved_dims("dim", 4, before)) == [2, 3]
    if not over or tuple(at.into) != (n, c, 1, 1) or tuple(at.saved("stride")) != (c, 1, c, c):
        raise _Unknown("as_strided says nothing of what its input was")
    return at.stride


# Entry by entry, with broadcasting; for every overload.
_POINTWISE = [
    "Abs",
    "Acos",
    "Acosh",
    "Add",
    "Addcdiv",
    "Addcmul",
    "Alias",
    "Angle",
    "Asin",
    "Asinh",
    "Atan",
    "Atan2",
    "Atanh",
    "Ceil",
    "Celu",
    "Clamp",
    "ClampMax",
    "ClampMin",
    "Clone",
    "Complex",
    "Conj",
    "CopyBackwards",
    "Copysign",
    "Cos",
    "Cosh",
    "Div",
    "Elu",
    "Erf",
    "Erfc",
    "Erfinv",
    "Exp",
    "Exp2",
    "Expand",
    "Expm1",
    "Floor",
    "Fmod",
    "Frac",
    "Gelu",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Hypot",
    "LeakyRelu",
    "Lerp",
    "Lgamma",
    "Log",
    "Log10",
    "Log1P",
    "Log2",
    "LogSigmoid",
    "Logaddexp",
    "Logaddexp2",
    "Logit",
    "MaskedFill",
    "Maximum",
    "Minimum",
    "Mish",
    "Mul",
    "NanToNum",
    "NativeDropout",
    "Neg",
    "Pow",
    "PreluKernel",
    "Real",
    "Imag",
    "Reciprocal",
    "Relu",
    "Remainder",
    "Round",
    "RreluWithNoise",
    "Rsqrt",
    "Rsub",
    "Sgn",
    "Sigmoid",
    "Sign",
    "Silu",
    "Sin",
    "Sinc",
    "Sinh",
    "Softplus",
    "Softshrink",
    "SpecialEntr",
    "SpecialErfcx",
    "SpecialLogNdtr",
    "SpecialNdtri",
    "SpecialXlog1Py",
    "Sqrt",
    "Sub",
    "Tan",
    "Tanh",
    "Threshold",
    "ToCopy",
    "Tril",
    "Triu",
    "Trunc",
    "Where",
    "Xlogy",
]

_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"),
        _view,
    ),
    **dict.fromkeys(_POINTWISE, _same_place),
}

# By the whole name: other overloads mean something else.
_EXACT: dict[str, Rule] = {
    "PermuteBackward0": _permute,
    "TransposeBackward0": _transpose,
    "TransposeBackward1": _transpose,
    "TBackward0": _transpose_matrix,
    "TBackward1": _transpose_matrix,
    "SelectBackward0": _select,
    "UnbindBackward0": _select,
    "StackBackward0": _stack,
    "SliceBackward0": _slice,
    **dict.fromkeys(
        ("CatBackward0", "SplitBackward0", "SplitWithSizesBackward0", "UnsafeSplitBackward0"), _concatenate
    ),
    **dict.fromkeys(
        (
            "AmaxBackward0",
            "AminBackward0",
            "KthvalueBackward0",
            "LinalgVectorNormBackward0",
            "LogsumexpBackward0",
            "MaxBackward0",
            "MeanBackward1",
            "MedianBackward1",
            "MinBackward0",
            "ModeBackward0",
            "NansumBackward0",
            "ProdBackward1",
            "StdBackward0",
            "StdMeanBackward0",
            "SumBackward1",
            "VarBackward0",
            "VarMeanBackward0",
        ),
        _reduce("dim"),
    ),
    **dict.fromkeys(
        (
            "CummaxBackward0",
            "CumminBackward0",
            "CumsumBackward0",
            "CumprodBackward0",
            "FftC2CBackward0",
            "FftC2RBackward0",
            "FftR2CBackward0",
            "GatherBackward0",
            "GluBackward0",
            "IndexSelectBackward0",
            "LogSoftmaxBackward0",
            "LogcumsumexpBackward0",
            "SafeSoftmaxBackward0",
            "ScatterAddBackward0",
            "ScatterBackward0",
            "ScatterBackward1",
            "SoftmaxBackward0",
            "SortBackward0",
            "SortBackward1",
            "TopkBackward0",
        ),
        _across("dim"),
    ),
    **dict.fromkeys(("RollBackward0", "FlipBackward0"), _across("dims")),
    **dict.fromkeys(
        (
            "AdaptiveMaxPool2DBackward0",
            "AdaptiveAvgPool2DBackward0",
            "AvgPool2DBackward0",
            "MaxPool2DWithIndicesBackward0",
            "MkldnnMaxPool2DBackward0",
            "ReflectionPad2DBackward0",
            "ReplicationPad2DBackward0",
            "UpsampleBicubic2DBackward0",
            "UpsampleBilinear2DBackward0",
            "UpsampleNearest2DBackward0",
            "UpsampleNearestExact2DBackward0",
            "UpsampleBicubic2DAaBackward0",
            "UpsampleBilinear2DAaBackward0",
        ),
        _inside(2),
    ),
    **dict.fromkeys(
        (
            "AdaptiveMaxPool3DBackward0",
            "AdaptiveAvgPool3DBackward0",
            "AvgPool3DBackward0",
            "MaxPool3DWithIndicesBackward0",
            "PixelShuffleBackward0",
            "PixelUnshuffleBackward0",
            "ReflectionPad3DBackward0",
            "ReplicationPad3DBackward0",
            "UpsampleNearest3DBackward0",
            "UpsampleNearestExact3DBackward0",
            "UpsampleTrilinear3DBackward0",
        ),
        _inside(3),
    ),
    **dict.fromkeys(
        (
            "ReflectionPad1DBackward0",
            "ReplicationPad1DBackward0",
            "UpsampleLinear1DBackward0",
            "UpsampleNearest1DBackward0",
            "UpsampleNearestExact1DBackward0",
        ),
        _inside(1),
    ),
    "ConstantPadNdBackward0": _pad,
    **dict.fromkeys(("ConvolutionBackward0", "ConvolutionOverrideableBackward0"), _first((0,))),
    "NativeGroupNormBackward0": _first((0,)),
    **dict.fromkeys(("Col2ImBackward0", "Im2ColBackward0", "ChannelShuffleBackward0"), _first((0,))),
    **dict.fromkeys(("GridSampler2DBackward0", "GridSampler3DBackward0"), _first((0, 1))),
    "MmBackward0": _product(0, 1, batched=False),
    "AddmmBackward0": _product(1, 2, batched=False),
    "BmmBackward0": _product(0, 1, batched=True),
    "BaddbmmBackward0": _product(1, 2, batched=True),
    "MvBackward0": _matrix_vector,
    "LinearBackward0": _linear,
    **dict.fromkeys(
        ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0"),
        _batch_norm,
    ),
    **dict.fromkeys(("NativeLayerNormBackward0", "FusedRmsNormBackward0"), _layer_norm),
    **dict.fromkeys(
        (
            "ScaledDotProductCudnnAttentionBackward0",
            "ScaledDotProductEfficientAttentionBackward0",
            "ScaledDotProductFlashAttentionBackward0",
            "ScaledDotProductFlashAttentionForCpuBackward0",
            "ScaledDotProductFusedAttentionOverrideableBackward0",
        ),
        _attention,
    ),
    "MkldnnRnnLayerBackward0": _recurrent,
    "CudnnRnnBackward0": _recurrent_cudnn,
    **dict.fromkeys(("ThnnFusedLstmCellBackward0", "ThnnFusedGruCellBackward0"), _cell),
    **dict.fromkeys(BORDERS, _same_place),
    "AsStridedBackward0": _restrided,
    "AsStridedBackward1": _restrided,
    "BackwardHookFunctionBackward": _backward_hook,
    "RegisterPostBackwardFunctionBackward": _backward_hook,  # of fully_shard, around each of its modules
    "RepeatBackward0": _repeat,
    "UnfoldBackward0": _unfold,
    "ViewAsComplexBackward0": _complex,
    "ViewAsRealBackward0": _complex,
    "DiagonalBackward0": _diagonal,
}
_WHY = {
    "CheckpointFunctionBackward": (
        "reentrant checkpointing shows nothing of what it holds: call torch.utils.checkpoint.checkpoint with "
        "use_reentrant=False"
    ),
    "torch::autograd::CopySlices": "something was written into a part of a tensor in place",
}
# Overloads of names above that are something else: a view in another dtype.
_NOT = {"ViewBackward1"}


def _rule(name: str) -> Rule | None:
    if name in _REGISTERED:
        return _assumed
    exact = _EXACT.get(name)
    if exact is not None or name in _NOT:
        return exact
    stem, backward, overload = name.rpartition("Backward")
    if name == "torch::autograd::CopyBackwards":
        return _same_place
    return _RULES.get(stem) if backward and overload.isdigit() else None

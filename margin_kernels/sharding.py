"""Tensors that several processes hold together: DTensors, and tensor parallelism.

A DTensor says for each dimension of a mesh of processes how they share it: Replicate (each has all of it), Shard(d)
(each has a slice of dimension d), Partial (it is the sum of theirs). Margins need whole rows, and 1-to-N whole columns:

    gathered    a DTensor -> the tensor that it stands for, the same on every process, differentiable twice. From there
                on every process computes the same numbers, and a mean is one over the whole batch. What flows back is
                the whole gradient on every process, of which each keeps the slice that it holds.

A model leaves that world by `to_local()` and enters it by `DTensor.from_local()`: ColwiseParallel hands a plain tensor
[N, D / 2] to the next module. The norm of what arrives there is that of a part, without a word. The graph shows it:

    node                      plain tensors                  layout that it names
    _ToTorchTensorBackward    what is made from its output   of the DTensor, and of the gradient where one was given
    _FromTorchTensorBackward  what leads to its input        the same

A plain tensor is whole where all layouts at the borders around it are Replicate. It is a part, and refused, elsewhere.

Second order. The backward of `from_local` moves gradients between the processes outside autograd (torch 2.13,
_FromTorchTensor.backward: "return the redistributed local tensor directly without differentiable backward"): its own
derivative is missing, silently. Norms that are differentiated are refused where one stands between a tap and the
logits. Where the model is given a DTensor and its layers return DTensors there is none, and second order is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from sys import modules
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd.graph import GradientEdge

from .process_group import Group
from .tracing import tracing

# Imported by those who use it; to import it here would take a second.
DTENSOR, COLLECTIVES = "torch.distributed.tensor", "torch.distributed._functional_collectives"
PLAIN = (Tensor, nn.Parameter)
TO_LOCAL, FROM_LOCAL, REDISTRIBUTE = "_ToTorchTensorBackward", "_FromTorchTensorBackward", "RedistributeBackward"
# Where a layout stands in these nodes: that of the tensor, and that of its gradient where the user gave one.
LAYOUTS = {
    TO_LOCAL: (lambda node: node.dtensor_spec.placements, lambda node: node.grad_placements),
    FROM_LOCAL: (lambda node: node.forward_input_placements, lambda node: node.grad_placements),
}
# The processes that share a tensor.
MESH = {TO_LOCAL: lambda node: node.dtensor_spec.mesh, FROM_LOCAL: lambda node: node.forward_input_device_mesh}
# Nodes of a border, and of a move between layouts: each hands every dimension on.
BORDERS = (TO_LOCAL, FROM_LOCAL, REDISTRIBUTE)
CALLS = {TO_LOCAL: "DTensor.to_local()", FROM_LOCAL: "DTensor.from_local()"}
REMEDY = "let the last layer return a DTensor (use_local_output=False), or all of it (output_layouts=Replicate())"
SECOND_ORDER = (
    "a second derivative is asked for, and PyTorch loses it where a plain tensor becomes a DTensor between a tap and "
    "the logits (DTensor.from_local, before a layer of parallelize_module): give the model a DTensor, "
    "distribute_tensor(x, mesh, [Replicate()]), and let its layers return DTensors (use_local_output=False), or take "
    'first order (second_order=False; gradient="envelope" or "first_order")'
)


def gathered(*tensors: Any) -> Sequence[Any]:
    """The tensors, each DTensor among them as the whole tensor that it stands for; anything else as it is.

    Every process of the DTensor's mesh must call this. Differentiable twice.
    """
    if tracing() or DTENSOR not in modules:
        return tensors
    return [tensor if type(tensor) in PLAIN else _gathered(tensor) for tensor in tensors]


def whole(tensor: Any) -> Any:
    """`gathered` of one tensor."""
    return gathered(tensor)[0]


def _gathered(tensor: Any) -> Any:
    tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    # One that is still on its way is no memory that a kernel may read; any operation but a view waits for it.
    return tensor.clone() if isinstance(tensor, modules[COLLECTIVES].AsyncCollectiveTensor) else tensor


def is_dtensor(tensor: Any) -> bool:
    return DTENSOR in modules and isinstance(tensor, modules[DTENSOR].DTensor)


def is_sharded(module: nn.Module) -> bool:
    """Whether torch.distributed.fsdp.fully_shard was applied to a module itself."""
    fsdp = modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def possible() -> bool:
    """Whether a graph may hold tensors of several processes."""
    return DTENSOR in modules and distributed.is_initialized() and not tracing()


def crosses(nodes: Iterable[Any]) -> bool:
    """Whether tensors pass between plain and DTensor at one of these nodes."""
    return possible() and any(node.name() in LAYOUTS for node in nodes)


def crossed(tensor: Tensor) -> bool:
    """Whether they do in the graph of a tensor."""
    return crosses(nodes_of(tensor))


def nodes_of(tensor: Tensor) -> list[Any]:
    """The nodes of a tensor's graph, none where it holds no tensors of several processes."""
    return _reached([tensor.grad_fn], lambda node: [to for to, _ in node.next_functions]) if possible() else []


def check_order(nodes: Iterable[Any]) -> None:
    """For a gradient through these nodes that is to be differentiated. Raises ValueError where that loses terms."""
    if possible() and any(node.name() == FROM_LOCAL for node in nodes):
        raise ValueError(SECOND_ORDER)


def whole_logits(logits: Any) -> Any:
    """The logits, gathered. Raises ValueError for a plain tensor that holds a part of them."""
    logits = whole(logits)
    if possible() and isinstance(logits, Tensor) and logits.grad_fn is not None:
        _check_logits(logits)
    return logits


def logits_without_graph(model: nn.Module, run: Callable[[], Any]) -> Any:
    """run(), a forward pass of a model under no_grad, gathered. A model that processes share is run with its graph,
    which shows parts: once is enough. Raises ValueError as `whole_logits`."""
    if not possible() or not any("_distribute_module_applied" in vars(module) for module in model.modules()):
        return whole(run())
    with torch.enable_grad():
        logits = whole_logits(run())
    return logits.detach() if isinstance(logits, Tensor) else logits


def check_holders(logits: Tensor, group: Group) -> None:
    """Raises ValueError for logits that several processes of `group` hold, where each is to bring its own samples."""
    if group.size == 1:
        return
    held = {
        rank
        for node in nodes_of(logits)
        if node.name() in MESH
        for rank in MESH[node.name()](node).mesh.flatten().tolist()
    }
    if len(held.intersection(group.ranks)) > 1:
        raise ValueError(
            "process_group must not hold processes that share the model (DTensor): each of them has the whole batch, "
            'and would count it once more. Give the dimension that divides the batch, mesh["data"], or None'
        )


def check_plain(x: Any) -> None:
    """Raises TypeError for an input that is a DTensor, where samples are moved one by one."""
    if is_dtensor(x):
        raise TypeError(
            "x must be a plain tensor for DeepFool, got a DTensor: give x.full_tensor(), and let the model distribute "
            "it (input_layouts=Replicate(), or the input_fn of distribute_module)"
        )


def check_parts(graph: Any, taps: Iterable[tuple[str, GradientEdge]]) -> None:
    """Raises ValueError for logits or a tap that hold a part.

    Args:
        graph: of the logits, an autograd_graph.Graph
        taps: name and edge of each
    """
    if not crosses(graph.nodes):
        return
    _check_logits(graph.root)

    def plain_readers(node: Any) -> Iterable[Any]:
        return () if node.name() in LAYOUTS else [reader for reader, _, _ in graph.readers.get(node, ())]

    for name, edge in taps:
        above = _reached([reader for reader, _ in graph.readers_of(edge)], plain_readers)
        part = _part(TO_LOCAL, _made_from(edge.node)) or _part(FROM_LOCAL, above)
        if part is not None:
            raise ValueError(
                f"tap {name!r} holds a part of its activation on each process ({part}): let its layer return a DTensor "
                "(use_local_output=False), or tap a layer before or behind it"
            )


def _check_logits(logits: Tensor) -> None:
    part = _part(TO_LOCAL, _made_from(logits.grad_fn))
    if part is not None:
        raise ValueError(f"logits {list(logits.shape)} are a part of the logits on each process ({part}): {REMEDY}")


def _made_from(node: Any) -> list[Any]:
    """The nodes behind a plain tensor down to the borders at which its region begins; a DTensor's own alone."""
    return _reached([node], lambda node: () if node.name() in LAYOUTS else [to for to, _ in node.next_functions])


def _reached(nodes: Iterable[Any], following: Callable[[Any], Iterable[Any]]) -> list[Any]:
    """These nodes and all that `following` leads to."""
    found = dict.fromkeys(node for node in nodes if node is not None)
    open_ = list(found)
    while open_:
        for node in following(open_.pop()):
            if node is not None and node not in found:
                found[node] = None
                open_.append(node)
    return list(found)


def _part(border: str, nodes: Iterable[Any]) -> str | None:
    """In words the first border of that kind among the nodes at which a process holds a part; None where there is
    none."""
    for node in nodes:
        for read in LAYOUTS[border] if node.name() == border else ():
            try:
                placements = read(node)
            except AttributeError as error:
                raise ValueError(
                    f"torch {torch.__version__} does not show the layouts of DTensors where torch 2.13 does ({error}): "
                    "use torch 2.13"
                ) from error
            if placements is not None and not all(placement.is_replicate() for placement in placements):
                return f"{CALLS[border]} with placements {', '.join(map(repr, placements))}"
    return None

"""Whether a gradient can be differentiated again; else an error that names the operation and the way out.

PyTorch raises only in the backward pass of the loss, far from the layer, and names a function of its own
("derivative for aten::hardsigmoid_backward is not implemented"). Here the graph of the gradient is read right after it
was computed: it holds a node that only raises where an operation has no second derivative.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from .tracing import tracing

# Nodes that raise when the backward pass reaches them.
RAISING = re.compile(
    r"torch::autograd::(NotImplemented|Error|DelayedError)|(Cdist|Pdist|CudnnRnn|EmbeddingBag|EmbeddingBagDense)"
    r"BackwardBackward\d+"
)
NAMED = re.compile(r"derivative for (?:aten::|')_?(\w+?)(?:_backward\w*)?'? is not implemented")
REMEDIES = (
    ("hardsigmoid", "write it as torch.clamp(x / 6 + 0.5, 0, 1)"),
    (
        "attention",
        "run the step under torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)",
    ),
    ("cdist", "write the distances with basic operations"),
    ("pdist", "write the distances with basic operations"),
    ("CuDNN", "run the step under torch.backends.cudnn.flags(enabled=False)"),
    ("out=", "write the layer (CrossMapLRN2d?) as nn.LocalResponseNorm or with basic operations"),
)


def check_second_derivative(gradient: Tensor, x: Tensor | GradientEdge, instead: str) -> None:
    """Raises ValueError where gradient [N, *], computed with create_graph from x [N, *], has no derivative.

    instead: words for what the user may ask for in its place
    """
    if tracing() or gradient.grad_fn is None:
        return
    node = _raising_node(gradient)
    if node is None:
        return
    try:
        torch.autograd.grad(gradient.sum(), x, retain_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(sentence(str(error), instead)) from error
    raise ValueError(sentence(f"a node {node} behind a function marked with once_differentiable", instead))


def sentence(message: str, instead: str) -> str:
    """The error for PyTorch's own message."""
    named = NAMED.search(message)
    first = message.strip().splitlines()[0]
    operation = named[1] if named else "an operation of the model"
    remedy = next((f"{advice}, or " for word, advice in REMEDIES if word in message), "")
    return f"a second derivative is needed, and PyTorch has none of {operation}: {remedy}{instead} (PyTorch: {first})"


def is_missing(error: Exception) -> bool:
    """Whether an error of autograd.grad with create_graph says that an operation cannot be differentiated twice."""
    message = str(error)
    return "is not implemented" in message or "don't support automatic differentiation" in message


def _raising_node(tensor: Tensor) -> str | None:
    """The name of a node in the tensor's graph that only raises, if there is one."""
    seen = {tensor.grad_fn}
    waiting = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if RAISING.fullmatch(node.name()):
            return node.name()
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return None

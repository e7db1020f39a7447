"""The derivative of a backward op, through the reference: the definition is differentiable to any order."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def second_derivative(
    definition: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    arriving: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """With g = d <definition(*inputs), grads> / d inputs, what a backward op returns: the derivatives of <g, arriving>
    in `grads` and in `inputs`, as plain PyTorch that can be differentiated again. A None among `grads` (an output that
    nothing depends on) or `arriving` counts as zero."""

    graph = torch.is_grad_enabled()

    def leaf(tensor: Tensor) -> Tensor:
        # An alias: what arrived may itself depend on the inputs (the loss squared, say), and a derivative in the inputs
        # themselves would run through that dependence a second time.
        return tensor.view_as(tensor) if graph and tensor.requires_grad else tensor.detach().requires_grad_()

    with torch.enable_grad():
        inputs = [leaf(tensor) for tensor in inputs]
        outputs = definition(*inputs)
        used = [(output, leaf(grad)) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
        weights = [grad for _, grad in used]
        first = torch.autograd.grad(
            [output for output, _ in used], inputs, weights, create_graph=True, allow_unused=True
        )
        pairs = [
            (g, v.to(g.dtype))
            for g, v in zip(first, arriving, strict=True)
            if g is not None and v is not None and g.requires_grad
        ]
        if not pairs:
            return [None for _ in grads], [None for _ in inputs]
        results = torch.autograd.grad(
            [g for g, _ in pairs], [*weights, *inputs], [v for _, v in pairs], create_graph=graph, allow_unused=True
        )
    by_grad = iter(results[: len(weights)])
    return [None if grad is None else next(by_grad) for grad in grads], list(results[len(weights) :])

"""The losses as one writes them first, and as published codes compute them: what the steps are measured against.

    naive_large_margin       (k + 1) L backward passes, one for each class and tap, each with a graph
    naive_gradient_penalty   C backward passes with a graph, of which the largest norm is differentiated
    one_to_n_table           an N x N table of negatives

Each gives the value, and the gradient, of the loss of margin_kernels that it stands beside.
"""

from collections.abc import Sequence

import torch
from compositions import hinge, one_to_n_pairs, vector_norms
from torch import Tensor, nn
from torch.nn.functional import relu

from margin_kernels.task.capture import resolve


def _tapped(model: nn.Module, x: Tensor, layers: Sequence[str]) -> tuple[Tensor, list[Tensor]]:
    """Logits and the activations at the taps, by forward hooks."""
    x = x.detach().requires_grad_()
    kept: dict[str, Tensor] = {"input": x}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda m, i, output, name=name: kept.update({name: output}))
        for name in layers
        if name != "input"
    ]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, [kept[name] for name in layers]


def naive_large_margin(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    layers: Sequence[str],
    gamma: float = 1.0,
    p: float = 2,
    k: int = 1,
    second_order: bool = False,
) -> Tensor:
    """LargeMarginLoss(gamma, p, top_k=k): each class's gradient at each tap by a pass of its own, with create_graph
    whether the norms are differentiated (second_order) or not."""
    logits, activations = _tapped(model, x, resolve(model, layers))
    label = y.unsqueeze(1)
    index = logits.detach().scatter(1, label, -torch.inf).topk(k, dim=1).indices
    gap = logits.gather(1, index) - logits.gather(1, label)
    norms = []
    for activation in activations:
        own = torch.autograd.grad(logits.gather(1, label).sum(), activation, create_graph=True)[0]
        others = [
            torch.autograd.grad(logits.gather(1, column.unsqueeze(1)).sum(), activation, create_graph=True)[0]
            for column in index.unbind(1)
        ]
        norms.append(torch.cat([vector_norms([other - own], p) for other in others], 1))
    norm = torch.stack(norms, 2)
    return hinge(gap, norm if second_order else norm.detach(), gamma).mean()


def naive_gradient_penalty(model: nn.Module, x: Tensor, y: Tensor, weight: float = 0.1) -> Tensor:
    """MarginSensitivityLoss(weight): the hinge and the largest squared norm of the gradients of all classes, taken by
    double backward."""
    x = x.detach().requires_grad_()
    logits = model(x)
    own = logits.gather(1, y.unsqueeze(1))
    gradients = torch.stack([torch.autograd.grad(z.sum(), x, create_graph=True)[0] for z in logits.unbind(1)], 1)
    differences = gradients - gradients[torch.arange(len(y), device=y.device), y].unsqueeze(1)
    largest = differences.flatten(2).square().sum(2).amax(1)
    best = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    return (relu(1 + best - own.squeeze(1)) + weight * largest).mean()


def one_to_n_table(model: nn.Module, x: Tensor, y: Tensor, delta: float = 1.0) -> Tensor:
    """OneToNLoss(delta) by a table of all pairs."""
    return one_to_n_pairs(model(x), y, delta)

"""Gradients of the parameters, by plain autograd."""

import torch
from torch import Tensor, nn

from margin_kernels import MarginTask


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """The gradient of `loss` in each parameter of `model`: zeros where it does not depend on one. The graph stays."""
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def flat_gradients(loss: Tensor, model: nn.Module) -> Tensor:
    """As `gradients`, as one vector."""
    return torch.cat([g.flatten() for g in gradients(loss, model)])


def step_gradients(task: MarginTask, x: Tensor, y: Tensor) -> list[Tensor | None]:
    """What a backward pass of three times the loss leaves in the parameters: None where nothing arrives."""
    (task(x, y)["loss"].sum() * 3).backward()
    return [parameter.grad for parameter in task.model.parameters()]


def assert_equal_with_gradients(actual: Tensor, expected: Tensor, model: nn.Module) -> None:
    """The same loss, and the same gradient in each parameter, to float64 rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for g, e in zip(gradients(actual, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)

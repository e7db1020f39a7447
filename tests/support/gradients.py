"""Gradients of the parameters, by plain autograd."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from margin_kernels import MarginTask
from margin_kernels.gradients.split import NODES
from margin_kernels.losses.base import MarginLoss


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    """The gradient of `loss` in each parameter of `model`: zeros where it does not depend on one. The graph stays."""
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def is_split(loss: Tensor) -> bool:
    """Whether the gradients of a loss come from a split backward: a node of it is in the graph of the loss."""
    seen = {loss.grad_fn}
    open_ = list(seen)
    while open_:
        node = open_.pop()
        if type(node).__name__ in NODES:
            return True
        met = {following for following, _ in node.next_functions if following is not None} - seen
        seen |= met
        open_ += met
    return False


def flat_gradients(loss: Tensor, model: nn.Module) -> Tensor:
    """As `gradients`, as one vector."""
    return torch.cat([g.flatten() for g in gradients(loss, model)])


def third_derivative(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of f [N] at x, each time of the sum of the values weighted by 1, 2, 3, ..."""
    x = x.clone().requires_grad_()
    value = f(x)
    for _ in range(3):
        weight = torch.arange(1.0, value.numel() + 1).view_as(value)
        (value,) = torch.autograd.grad((value * weight).sum(), x, create_graph=True)
    return value


def assert_split_is_as_exact_as_the_loop_under_autocast(
    build: Callable[[], nn.Module], loss: MarginLoss, layers: Sequence[str], x: Tensor, y: Tensor, dtype: torch.dtype
) -> None:
    """The gradients of split and loop in half precision, compared with the loop's in float32."""
    found = {}
    for passes in ("split", "loop", "exact"):
        model = build()
        with torch.autocast("cpu", dtype, enabled=passes != "exact"):
            out = MarginTask(model, loss, layers, "loop" if passes == "exact" else passes)(x, y)
        out["loss"].backward()
        found[passes] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    size = found["exact"].norm()
    assert (found["split"] - found["exact"]).norm() / size < 1.5 * (found["loop"] - found["exact"]).norm() / size + 1e-3


def step_gradients(task: MarginTask, x: Tensor, y: Tensor) -> list[Tensor | None]:
    """What a backward pass of three times the loss leaves in the parameters: None where nothing arrives."""
    (task(x, y)["loss"].sum() * 3).backward()
    return [parameter.grad for parameter in task.model.parameters()]


def assert_equal_with_gradients(actual: Tensor, expected: Tensor, model: nn.Module) -> None:
    """The same loss, and the same gradient in each parameter, to float64 rounding."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for g, e in zip(gradients(actual, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)

"""The baselines of the step table compute the losses that they stand beside: value and gradient, in float64."""

from collections.abc import Callable

import pytest
import torch
from baselines import naive_gradient_penalty, naive_large_margin, one_to_n_table
from torch import Tensor, nn

from margin_kernels import LargeMarginLoss, MarginSensitivityLoss, MarginTask, OneToNLoss
from margin_kernels.experiments import models
from margin_kernels.testing import assert_same_gradients

LAYERS = ("input", "relu1", "pool2", "relu3")


def assert_same(loss: nn.Module, baseline: Callable[[nn.Module, Tensor, Tensor], Tensor], layers=None) -> None:
    model = models.build("digits_cnn", (1, 8, 8), 10).double()
    x, y = torch.rand(12, 1, 8, 8, dtype=torch.float64), torch.randint(10, (12,))
    values, gradients = [], []
    for value in (MarginTask(model, loss, layers)(x, y)["loss"], baseline(model, x, y)):
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, list(model.parameters()), allow_unused=True))
    assert values[0] > 0
    torch.testing.assert_close(*values, rtol=1e-9, atol=0)
    assert_same_gradients(*gradients, least=3)


@pytest.mark.parametrize("p", [2, float("inf")])
@pytest.mark.parametrize("k", [1, 5, 9])
@pytest.mark.parametrize("second_order", [False, True])
def test_a_pass_for_each_class_and_tap_gives_the_large_margin_loss(p, k, second_order) -> None:
    loss = LargeMarginLoss(2.0, p, top_k=k, second_order=second_order)
    assert_same(loss, lambda *args: naive_large_margin(*args, LAYERS, 2.0, p, k, second_order), LAYERS)


def test_double_backward_of_every_class_gives_the_sensitivity_loss() -> None:
    assert_same(MarginSensitivityLoss(0.3), lambda *args: naive_gradient_penalty(*args, 0.3))


def test_the_table_of_pairs_gives_the_one_to_n_loss() -> None:
    assert_same(OneToNLoss(0.2), lambda *args: one_to_n_table(*args, 0.2))

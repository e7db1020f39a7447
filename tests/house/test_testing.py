"""The measure of error of the tests: what is wrong is infinitely wrong, or an assertion."""

import math

import pytest
import torch

from margin_kernels.testing import relative_error


def test_error_is_relative_to_the_largest_true_value():
    assert relative_error(torch.tensor([1.0, 4.5]), torch.tensor([1.0, 4.0])) == 0.125
    assert relative_error(torch.tensor([0.25]), torch.tensor([0.0])) == 0.25  # nothing to be relative to


@pytest.mark.parametrize("actual", [[1.0, math.inf], [math.nan, math.inf], [1.0, 2.0], [1.0, -math.inf]])
def test_infinity_and_nan_have_their_places(actual):
    truth = torch.tensor([1.0, math.inf])
    assert relative_error(torch.tensor(actual), truth) == (0.0 if actual == [1.0, math.inf] else math.inf)
    nothing = torch.full((2,), math.nan)
    assert relative_error(nothing, nothing) == 0.0


def test_another_shape_is_no_result():
    with pytest.raises(AssertionError, match=r"shape \[2\] where \[2, 1\] is right"):
        relative_error(torch.zeros(2), torch.zeros(2, 1))

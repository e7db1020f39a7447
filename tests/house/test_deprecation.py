"""Former names: accepted for one release with a warning, equal in result to the new ones."""

import pytest
import torch

import margin_kernels as mk


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)).double()


X = 3 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(64) % 5


def test_deepfool_counted_the_prediction_among_its_candidates() -> None:
    with pytest.warns(DeprecationWarning, match="candidates is now top_k, which counts 1 less"):
        former = mk.deepfool(network(), X, candidates=3)
    now = mk.deepfool(network(), X, top_k=2)
    assert torch.equal(former.perturbation, now.perturbation) and now.distance.gt(0).all()
    assert not torch.equal(now.perturbation, mk.deepfool(network(), X, top_k=1).perturbation)


@pytest.mark.parametrize(("loss", "less"), [(mk.AdversarialMarginLoss, 1), (mk.MarginSensitivityLoss, 0)])
def test_losses_take_the_former_name_as_argument_and_attribute(loss, less) -> None:
    with pytest.warns(DeprecationWarning, match="candidates is now top_k"):
        former = loss(candidates=3)
    assert former.top_k == 3 - less and repr(former) == repr(loss(top_k=3 - less))
    with pytest.warns(DeprecationWarning, match=r"candidates goes in 0\.2"):
        assert former.candidates == 3
    with pytest.warns(DeprecationWarning, match="top_k"):
        former.candidates = 2
    assert former.top_k == 2 - less
    with pytest.raises(TypeError, match="top_k and its former name candidates are both given"):
        loss(top_k=1, candidates=2)


def test_a_wrong_value_under_the_former_name_is_refused_under_the_new_one() -> None:
    with (
        pytest.warns(DeprecationWarning, match="candidates is now top_k"),
        pytest.raises(TypeError, match="top_k must be an integer, got bool"),
    ):
        mk.AdversarialMarginLoss(candidates=True)
    with (
        pytest.warns(DeprecationWarning, match="candidates is now top_k"),
        pytest.raises(ValueError, match="top_k must be >= 1, got 0"),
    ):
        mk.deepfool(network(), X, candidates=1)


def test_the_method_that_a_task_calls() -> None:
    logits = network()(X)
    with pytest.warns(DeprecationWarning, match="statistics"):
        former = mk.OneToNLoss().margins(logits, Y)
    assert torch.equal(former.loss, mk.OneToNLoss().statistics(logits, Y).loss)

"""DeepFool finds the exact distance where it is known, agrees with foolbox where it is not, and says so when it
fails."""

import math

import pytest
import torch
from torch import nn

from margin_kernels.deepfool import TOTAL_SLACK, deepfool


def linear_model(features=12, classes=6, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(features, classes).double()


def exact_distance(model, x, p):
    """Literal loop: min over j of (z_r - z_j) / ||W_r - W_j||_q."""
    q = {1: math.inf, 2: 2, math.inf: 1}[p]
    result = []
    for logits in model(x).detach():
        r = int(logits.argmax())
        result.append(
            min(
                float(
                    (logits[r] - logits[j]) / torch.linalg.vector_norm((model.weight[r] - model.weight[j]).detach(), q)
                )
                for j in range(len(logits))
                if j != r
            )
        )
    return torch.tensor(result, dtype=torch.double)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 32), nn.Tanh(), nn.Linear(32, 10)
    )


@pytest.fixture
def images():
    return torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("p", [2, math.inf, 1])
def test_a_linear_classifier_gives_the_exact_distance_in_one_step(p):
    model, x = linear_model(), torch.randn(40, 12, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    expected = exact_distance(model, x, p)
    step = deepfool(model, x, p=p, overshoot=1e-3, overshoot_mode="step")
    torch.testing.assert_close(step.distance / 1.001, expected, rtol=1e-10, atol=0)
    assert step.success.all() and (step.iterations == 1).all()
    total = deepfool(model, x, p=p, overshoot=0.02)
    torch.testing.assert_close(total.distance / 1.02 - TOTAL_SLACK, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.linalg.vector_norm(total.perturbation, p, 1), total.distance)
    assert torch.equal(model(x + total.perturbation).argmax(1), total.label)
    assert (total.label != model(x).argmax(1)).all()


@pytest.mark.parametrize("bounds", [None, (0.0, 1.0)])
@pytest.mark.parametrize(("steps", "candidates"), [(50, 10), (3, 4)])
def test_norms_equal_foolbox(network, images, bounds, steps, candidates):
    foolbox = pytest.importorskip("foolbox")
    low, high = bounds or (-100.0, 100.0)
    wrapped = foolbox.PyTorchModel(network.eval(), bounds=(low, high))
    labels = network(images).argmax(1)
    attack = foolbox.attacks.L2DeepFoolAttack(steps=steps, candidates=candidates, overshoot=0.02)
    theirs = attack.run(wrapped, images, foolbox.criteria.Misclassification(labels))
    ours = deepfool(network, images, max_iter=steps, candidates=candidates, bounds=bounds)
    norms = (theirs - images).flatten(1).norm(dim=1)
    torch.testing.assert_close(ours.distance, norms, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(images + ours.perturbation, theirs, atol=1e-5, rtol=1e-5)


def test_linf_norms_equal_foolbox(network, images):
    foolbox = pytest.importorskip("foolbox")
    wrapped = foolbox.PyTorchModel(network.eval(), bounds=(-100.0, 100.0))
    labels = network(images).argmax(1)
    theirs = foolbox.attacks.LinfDeepFoolAttack(steps=50).run(
        wrapped, images, foolbox.criteria.Misclassification(labels)
    )
    ours = deepfool(network, images, p=math.inf)
    torch.testing.assert_close(ours.distance, (theirs - images).flatten(1).abs().amax(1), atol=1e-5, rtol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(network, images):
    network, images = network.double(), images.double()
    together = deepfool(network, images)
    for i in range(len(images)):
        alone = deepfool(network, images[i : i + 1])
        torch.testing.assert_close(alone.perturbation[0], together.perturbation[i], rtol=1e-10, atol=1e-12)
        assert alone.iterations[0] == together.iterations[i] and alone.label[0] == together.label[i]
    assert len(set(together.iterations.tolist())) > 1  # samples that finish early were among them


def test_samples_on_the_wrong_side_move_to_their_target(network, images):
    prediction = network(images).argmax(1)
    target = torch.where(torch.arange(16) % 2 == 0, prediction, (prediction + 3) % 10)
    result = deepfool(network, images, target=target)
    right = target == prediction
    plain = deepfool(network, images)
    torch.testing.assert_close(result.distance[right], plain.distance[right], rtol=1e-4, atol=1e-6)
    assert torch.equal(result.label[~right & result.success], target[~right & result.success])
    assert result.success.all() and (result.distance[~right] >= plain.distance[~right] - 1e-4).all()


def test_bounds_hold(network, images):
    result = deepfool(network, images, bounds=(0.0, 1.0))
    moved = images + result.perturbation
    assert moved.min() >= -1e-7 and moved.max() <= 1 + 1e-7


def test_nan_logits_give_nan_distance_and_no_success(images):
    def model(x):
        logits = x.flatten(1)[:, :5] * 3
        return torch.where((torch.arange(len(x)) == 2)[:, None] & (len(x) == 16), math.nan, logits)

    result = deepfool(model, images)
    others = torch.arange(16) != 2
    assert result.distance[2].isnan() and not result.success[2] and result.iterations[2] == 0
    assert result.success[others].all() and not result.distance[others].isnan().any()


def test_logits_that_turn_nan_on_the_way_are_no_success(images):
    def model(x):
        logits = x.flatten(1)[:, :5] * 3
        return torch.where((x - images[: len(x)]).flatten(1).abs().amax(1)[:, None] > 0, math.nan, logits)

    result = deepfool(model, images)
    assert not result.success.any() and result.distance.isnan().all()


def test_a_constant_model_has_no_boundary(images):
    class Constant(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * 0 + torch.tensor([3.0, 2.0, 1.0])

    result = deepfool(Constant(), images, max_iter=4)
    assert not result.success.any() and (result.distance == 0).all() and (result.label == 0).all()


def test_the_network_receives_no_gradients(network, images):
    deepfool(network, images)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_an_empty_batch_is_empty(network):
    result = deepfool(network, torch.zeros(0, 1, 8, 8))
    assert result.perturbation.shape == (0, 1, 8, 8) and result.distance.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 0.5}, "p is 0.5; allowed: p >= 1"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"overshoot": -0.1}, "overshoot is -0.1"),
        ({"overshoot_mode": "once"}, "overshoot_mode is 'once'"),
        ({"candidates": 1}, "candidates is 1"),
        ({"bounds": (1.0, 0.0)}, "bounds is"),
        ({"target": torch.zeros(3, dtype=torch.long)}, "target is"),
    ],
)
def test_wrong_arguments_are_named(network, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        deepfool(network, images, **arguments)


def test_wrong_tensors_are_named(network):
    with pytest.raises(ValueError, match=r"x is torch.int64 \[4, 8\]"):
        deepfool(network, torch.zeros(4, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="the model returns 1 class"):
        deepfool(lambda x: x[:, :1], torch.rand(4, 8))
    with pytest.raises(ValueError, match=r"the model returns \[4\]"):
        deepfool(lambda x: x[:, 0], torch.rand(4, 8))

"""DeepFool finds the exact distance where it is known, agrees with foolbox where it is not, and says so when it
fails."""

import math
import warnings

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
    ours = deepfool(network, images, max_iter=steps, top_k=candidates - 1, bounds=bounds)
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
        ({"p": 0.5}, r"p must be >= 1 \(or inf\), got 0.5"),
        ({"p": math.nan}, r"p must be >= 1 \(or inf\), got nan"),
        ({"max_iter": 0}, "max_iter must be >= 1, got 0"),
        ({"overshoot": -0.1}, "overshoot must be finite and >= 0, got -0.1"),
        ({"overshoot": math.nan}, "overshoot must be finite and >= 0, got nan"),
        ({"overshoot": math.inf}, "overshoot must be finite and >= 0, got inf"),
        ({"overshoot_mode": "once"}, "overshoot_mode must be one of 'total', 'step', got 'once'"),
        ({"top_k": 0}, "top_k must be >= 1, got 0"),
        ({"step_limit": math.nan}, "step_limit must be > 0, got nan"),
        ({"step_limit": 0}, "step_limit must be > 0, got 0"),
        ({"bounds": (1.0, 0.0)}, r"bounds must be \(low, high\) with low < high, got \(1.0, 0.0\)"),
        ({"bounds": (0.0, math.nan)}, r"bounds must be \(low, high\) with low < high"),
        ({"bounds": (0.0, 0.5)}, r"x must lie in bounds \(0, 0.5\), got 0.[5-9]\d* in sample 0"),
        ({"target": torch.zeros(3, dtype=torch.long)}, r"target must have shape \[16\] to match x, got \[3\]"),
        ({"target": torch.arange(16)}, r"target must be in \[0, 10\), got 10 at row 10"),
        ({"target": torch.arange(16) - 1}, r"target must be in \[0, 10\), got -1 at row 0"),
    ],
)
def test_wrong_arguments_are_named(network, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        deepfool(network, images, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": "two"}, "p must be a number >= 1 or \"inf\", got 'two'"),
        ({"max_iter": 2.5}, "max_iter must be an integer, got float"),
        ({"top_k": True}, "top_k must be an integer, got bool"),
        ({"overshoot": "no"}, "overshoot must be a number, got 'no'"),
        ({"bounds": 1.0}, r"bounds must be \(low, high\) or None, got 1.0"),
        ({"target": torch.zeros(16)}, r"target must be int64 class indices, got torch.float32 \[16\]"),
        ({"target": [0] * 16}, "target must be int64 class indices, got list"),
    ],
)
def test_wrong_types_are_named(network, images, arguments, message):
    with pytest.raises(TypeError, match=message):
        deepfool(network, images, **arguments)


def test_wrong_tensors_are_named(network):
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor \[N, \*\], got torch.int64 \[4, 8\]"):
        deepfool(network, torch.zeros(4, 8, dtype=torch.long))
    with pytest.raises(ValueError, match="model must return logits of at least 2 classes, got 0"):
        deepfool(lambda x: x[:, :0], torch.rand(4, 8))
    with pytest.raises(
        ValueError, match=r"model must return logits \[N, C\] with N = 4, got torch.float32 \[4, 1, 8\]"
    ):
        deepfool(lambda x: x[:, None], torch.rand(4, 8))
    with pytest.raises(ValueError, match=r"model must return logits \[N, C\] with N = 4, got dict"):
        deepfool(lambda x: {"scores": x}, torch.rand(4, 8))
    with pytest.raises(ValueError, match=r"model must have had a forward pass, got .* 'weight'"):
        deepfool(nn.LazyLinear(3), torch.rand(4, 8))
    with pytest.raises(TypeError, match="model must be a module or a function, got str"):
        deepfool("model", torch.rand(4, 8))


def test_p_may_be_a_word(network, images):
    result, expected = deepfool(network, images, p="inf"), deepfool(network, images, p=math.inf)
    assert torch.equal(result.distance, expected.distance) and torch.equal(result.perturbation, expected.perturbation)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradient_modes_of_the_caller_do_not_matter(network, images, mode):
    target = (network(images).argmax(1) + torch.arange(16) % 2) % 10
    expected = deepfool(network, images, target=target)
    with mode():
        own_images, own_target = images.clone(), target.clone()
        assert own_images.is_inference() == (mode is torch.inference_mode)
        inside = deepfool(network, own_images, target=own_target)
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode) and not torch.is_grad_enabled()
    outside = deepfool(network, own_images, target=own_target)  # tensors made in inference mode, used outside
    for found in (inside, outside):
        for value, other in zip(found, expected, strict=True):
            assert torch.equal(value, other) and not value.requires_grad and not value.is_inference()


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        model = nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"model must be made outside of torch.inference_mode.*'weight'"):
        deepfool(model, torch.rand(4, 8))


def test_masked_classes_are_no_boundary(images):
    """A model with two masked classes moves samples as the model without them does."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    x = images.double()
    kept = torch.tensor([0, 2, 4])
    masked = torch.tensor([False, True, False, True, False])

    def without(x):
        return model(x)[:, kept]

    def with_mask(x):
        return model(x).masked_fill(masked, -math.inf)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return with_mask(x)

    for wrapped in (with_mask, Masked()):  # candidates one at a time, and in one batched pass
        for target in (None, torch.arange(16) % 3):
            expected = deepfool(without, x, target=target)
            found = deepfool(wrapped, x, target=None if target is None else kept[target])
            torch.testing.assert_close(found.distance, expected.distance, rtol=1e-12, atol=0)
            assert torch.equal(found.label, kept[expected.label]) and torch.equal(found.success, expected.success)
            assert found.success.all() and not masked[found.label].any()


def test_without_an_unmasked_other_the_distance_is_infinite(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double()

    def masked(x):  # sample 0: one class left; sample 1: target masked; sample 2: all masked
        hidden = torch.zeros(len(x), 4, dtype=torch.bool)
        if len(x) == 16:
            hidden[0, 1:], hidden[1, 3], hidden[2] = True, True, True
        return model(x).masked_fill(hidden, -math.inf)

    x = images.double()
    target = masked(x).argmax(1)
    target[1] = 3
    result = deepfool(masked, x, target=target)
    for n in (0, 1):
        assert math.isinf(result.distance[n]) and not result.success[n] and result.iterations[n] == 0
        assert not result.perturbation[n].any()
    assert result.label[0] == 0 and result.label[1] != 3
    assert result.distance[2].isnan() and not result.success[2]
    assert result.distance[3:].isfinite().all() and result.success[3:].all()


def test_infinite_logits_give_nan_distances(images):
    def model(x):
        logits = x.flatten(1)[:, :5] * 3
        return torch.where(
            (torch.arange(len(x)) == 2)[:, None] & (len(x) == 16) & (torch.arange(5) == 1), math.inf, logits
        )

    result = deepfool(model, images)
    assert result.distance[2].isnan() and not result.success[2] and result.success.sum() == 15


class Keeping(nn.Module):
    """Counts in a buffer and in Python, keeps features and their history."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 12)
        self.head = nn.Linear(12, 5)
        self.register_buffer("passes", torch.zeros(()))
        self.calls, self.sizes, self.features = 0, [], None

    def forward(self, x):
        self.passes += 1
        self.calls += 1
        self.features = self.body(x.flatten(1)).tanh()
        self.sizes.append(len(x))
        return self.head(self.features)


def test_the_model_is_left_as_it_was(images):
    torch.manual_seed(0)
    model = Keeping()
    model(images[:3])
    passes, features, sizes = model.passes, model.features, model.sizes
    result = deepfool(model, images)
    assert result.success.all()
    assert model.passes is passes and float(passes) == 1 and model.calls == 1
    assert model.features is features and model.sizes is sizes and sizes == [3]


def test_batch_norm_and_dropout_in_training_mode_warn(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match=r"batch norm in training mode.*Call model.eval\(\)") as caught:
        deepfool(model, images)
    assert len(caught) == 1 and caught[0].filename == __file__ and "random numbers" not in str(caught[0].message)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match="random numbers, as dropout in training mode draws them"):
        deepfool(lambda x: torch.dropout(x.flatten(1)[:, :5], 0.3, True), images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        deepfool(model.eval(), images)
        deepfool(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)).train(), images)  # no layer that knows a mode


def test_probabilities_warn(images):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.warns(UserWarning, match=r"seems to return probabilities.*Leave the softmax out.*\.log\(\)"):
        deepfool(nn.Sequential(model, nn.Softmax(1)), images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logarithms = deepfool(lambda x: model(x).softmax(1).log(), images)
    torch.testing.assert_close(logarithms.distance, deepfool(model, images).distance, rtol=1e-4, atol=1e-6)

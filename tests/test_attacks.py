"""Attacks do what their formulas say, agree with foolbox, and leave the network as they found it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from margin_kernels.experiments import attacks


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 16), nn.ReLU(), nn.Linear(16, 5)
    )


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 1, 8, 8, generator=generator), torch.randint(0, 5, (12,), generator=generator)


def foolbox_images(name, network, x, y, eps, **options):
    foolbox = pytest.importorskip("foolbox")
    wrapped = foolbox.PyTorchModel(network.eval(), bounds=(0, 1))
    _, clipped, _ = getattr(foolbox.attacks, name)(random_start=False, **options)(wrapped, x, y, epsilons=eps)
    return clipped


def test_fgsm_equals_foolbox(network, batch):
    ours = attacks.fgsm(network.eval(), *batch, eps=0.1).images
    torch.testing.assert_close(ours, foolbox_images("LinfFastGradientAttack", network, *batch, 0.1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("alpha", "steps"), [(0.02, 10), (0.1, 3)])
def test_ifgsm_equals_foolbox(network, batch, alpha, steps):
    ours = attacks.ifgsm(network.eval(), *batch, eps=0.1, alpha=alpha, steps=steps).images
    theirs = foolbox_images("LinfBasicIterativeAttack", network, *batch, 0.1, abs_stepsize=alpha, steps=steps)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_ifgsm_with_a_relative_step_equals_foolbox(network, batch):
    ours = attacks.ifgsm(network.eval(), *batch, eps=0.1, alpha=0.25 * 0.1, steps=7).images
    theirs = foolbox_images("LinfBasicIterativeAttack", network, *batch, 0.1, rel_stepsize=0.25, steps=7)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_attack_on_the_gap_equals_foolbox_with_that_loss(network, batch):
    foolbox = pytest.importorskip("foolbox")
    eagerpy = pytest.importorskip("eagerpy")

    class Gap(foolbox.attacks.LinfBasicIterativeAttack):
        def get_loss_fn(self, model, labels):
            def loss(inputs):
                logits, labels_ = model(inputs).raw, labels.raw
                best = torch.stack([row[torch.arange(5) != y].max() for row, y in zip(logits, labels_, strict=True)])
                return eagerpy.astensor((best - logits[torch.arange(len(labels_)), labels_]).sum())

            return loss

    wrapped = foolbox.PyTorchModel(network.eval(), bounds=(0, 1))
    _, theirs, _ = Gap(abs_stepsize=0.02, steps=10, random_start=False)(wrapped, *batch, epsilons=0.1)
    ours = attacks.ifgsm(network, *batch, eps=0.1, alpha=0.02, steps=10, objective="gap").images
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", ["ce", "gap"])
def test_pgd_is_the_literal_projected_iteration_from_a_uniform_start(network, batch, objective):
    (x, y), eps, alpha = batch, 0.15, 0.04
    generator = torch.Generator().manual_seed(5)
    current = (x + (2 * torch.rand(x.shape, generator=generator) - 1) * eps).clamp(0, 1)
    assert (current - x).abs().max() <= eps and (current - x).abs().mean() > 0.3 * eps
    network.eval()
    for _ in range(6):
        for n in range(len(x)):  # one image at a time
            leaf = current[n : n + 1].clone().requires_grad_(True)
            logits = network(leaf)[0]
            others = torch.cat([logits[: y[n]], logits[y[n] + 1 :]])
            value = (logits.logsumexp(0) if objective == "ce" else others.max()) - logits[y[n]]
            (gradient,) = torch.autograd.grad(value, leaf)
            moved = current[n] + alpha * gradient[0].sign()
            current[n] = torch.minimum(torch.maximum(moved, x[n] - eps), x[n] + eps).clamp(0, 1)
    ours = attacks.pgd(
        network, x, y, eps, alpha, steps=6, objective=objective, generator=torch.Generator().manual_seed(5)
    ).images
    torch.testing.assert_close(ours, current, atol=1e-6, rtol=0)


def test_zero_gradient_is_the_share_of_images_without_one(batch):
    class Half(nn.Module):
        """Logits that ignore dark images."""

        def forward(self, x):
            bright = F.relu(x.flatten(1).mean(1) - 0.5)
            return torch.stack([bright, -bright, 2 * bright, 0 * bright, bright.new_ones(len(bright))], 1)

    x = torch.stack([torch.full((1, 8, 8), v) for v in (0.1, 0.9, 0.2, 0.3)])
    assert attacks.fgsm(Half(), x, torch.zeros(4, dtype=torch.long), 0.1, "gap").zero_gradient == 0.75


def test_fgsm_step_is_the_sign_of_the_numerical_gradient(network, batch):
    network, (x, y) = network.double().eval(), (batch[0].double(), batch[1])
    moved = attacks.fgsm(network, x, y, eps=1e-3, bounds=(-1.0, 2.0)).images - x
    for pixel in (0, 13, 40):
        bump = torch.zeros(64, dtype=torch.double)
        bump[pixel] = 1e-6
        bump = bump.view(1, 1, 8, 8)
        slope = F.cross_entropy(network(x + bump), y, reduction="none") - F.cross_entropy(
            network(x - bump), y, reduction="none"
        )
        clear = slope.abs() > 1e-12
        assert torch.equal(moved.flatten(1)[clear, pixel].sign(), slope[clear].sign()) and clear.any()


def test_logit_gap_is_the_best_other_class_minus_the_own():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [2.0, 2.0, 0.0]])
    assert attacks.logit_gap(logits, torch.tensor([1, 0, 0])).tolist() == [-1.0, 2.0, 0.0]


def test_scaled_logits_stop_the_cross_entropy_attack_but_not_the_gap_attack(network, batch):
    class Scaled(nn.Module):
        def __init__(self, inner, factor):
            super().__init__()
            self.inner, self.factor = inner, factor

        def forward(self, x):
            return self.factor * self.inner(x)

    network.eval()
    x = batch[0]
    y = network(x).argmax(1)  # all right: the softmax of the scaled logits is exactly one
    plain = attacks.fgsm(network, x, y, 0.1, "gap")
    large = Scaled(network, 1e5)
    gap, entropy = attacks.fgsm(large, x, y, 0.1, "gap"), attacks.fgsm(large, x, y, 0.1, "ce")
    assert torch.equal(gap.images, plain.images) and gap.zero_gradient == 0
    assert entropy.zero_gradient == 1.0 and torch.equal(entropy.images, x)


def test_images_stay_in_the_ball_and_in_the_data_range(network, batch):
    x, y = batch
    for attack in (
        attacks.ifgsm(network, x, y, 0.2, objective="gap"),
        attacks.pgd(network, x, y, 0.2, generator=torch.Generator().manual_seed(0)),
    ):
        assert (attack.images - x).abs().max() <= 0.2 + 1e-7
        assert attack.images.min() >= 0 and attack.images.max() <= 1
        assert (attack.images - x).abs().amax((1, 2, 3)).min() > 0.1


def test_iterating_raises_the_objective_above_one_step(network, batch):
    network.eval()
    x, y = batch
    one = F.cross_entropy(network(attacks.fgsm(network, x, y, 0.2).images), y)
    many = F.cross_entropy(network(attacks.ifgsm(network, x, y, 0.2, steps=20).images), y)
    assert many > one > F.cross_entropy(network(x), y)


def test_the_network_is_left_as_it_was(network, batch):
    network.train()
    network[1].eval()  # a frozen submodule stays frozen
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = attacks.ifgsm(network, *batch, eps=0.1).images
    second = attacks.ifgsm(network, *batch, eps=0.1).images
    assert torch.equal(first, second)  # dropout was off
    assert network.training and network[3].training and not network[1].training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_impossible_settings_raise(network, batch):
    with pytest.raises(ValueError, match=r"steps \* alpha is 3 \* 0.01 = 0.03, less than eps = 0.1"):
        attacks.ifgsm(network, *batch, eps=0.1, alpha=0.01, steps=3)
    with pytest.raises(ValueError, match=r"eps is -0\.1"):
        attacks.fgsm(network, *batch, eps=-0.1)
    with pytest.raises(ValueError, match="objective is 'cw'; allowed: ce, gap"):
        attacks.fgsm(network, *batch, eps=0.1, objective="cw")

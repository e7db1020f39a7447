"""Attacks do what their formulas say, agree with foolbox, and leave the network as they found it."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from margin_kernels.experiments.evaluation import attacks


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 16), nn.ReLU(), nn.Linear(16, 5)
    )


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(12, 1, 8, 8, generator=generator), torch.randint(0, 5, (12,), generator=generator)


def foolbox_images(name, network, x, y, eps, **options):
    foolbox = pytest.importorskip("foolbox")
    wrapped = foolbox.PyTorchModel(network.eval(), bounds=(0, 1))
    _, clipped, _ = getattr(foolbox.attacks, name)(random_start=False, **options)(wrapped, x, y, epsilons=eps)
    return clipped


def test_fgsm_equals_foolbox(network, images):
    ours = attacks.fgsm(network.eval(), *images, eps=0.1).images
    torch.testing.assert_close(ours, foolbox_images("LinfFastGradientAttack", network, *images, 0.1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("alpha", "steps"), [(0.02, 10), (0.1, 3)])
def test_ifgsm_equals_foolbox(network, images, alpha, steps):
    ours = attacks.ifgsm(network.eval(), *images, eps=0.1, alpha=alpha, steps=steps).images
    theirs = foolbox_images("LinfBasicIterativeAttack", network, *images, 0.1, abs_stepsize=alpha, steps=steps)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_ifgsm_with_a_relative_step_equals_foolbox(network, images):
    ours = attacks.ifgsm(network.eval(), *images, eps=0.1, alpha=0.25 * 0.1, steps=7).images
    theirs = foolbox_images("LinfBasicIterativeAttack", network, *images, 0.1, rel_stepsize=0.25, steps=7)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_attack_on_the_gap_equals_foolbox_with_that_loss(network, images):
    foolbox = pytest.importorskip("foolbox")
    eagerpy = pytest.importorskip("eagerpy")

    class Gap(foolbox.attacks.LinfBasicIterativeAttack):  # type: ignore[name-defined]
        def get_loss_fn(self, model, labels):
            def loss(inputs):
                logits, labels_ = model(inputs).raw, labels.raw
                best = torch.stack([row[torch.arange(5) != y].max() for row, y in zip(logits, labels_, strict=True)])
                return eagerpy.astensor((best - logits[torch.arange(len(labels_)), labels_]).sum())

            return loss

    wrapped = foolbox.PyTorchModel(network.eval(), bounds=(0, 1))
    _, theirs, _ = Gap(abs_stepsize=0.02, steps=10, random_start=False)(wrapped, *images, epsilons=0.1)
    ours = attacks.ifgsm(network, *images, eps=0.1, alpha=0.02, steps=10, objective="gap").images
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("objective", ["ce", "gap"])
def test_pgd_is_the_literal_projected_iteration_from_a_uniform_start(network, images, objective):
    (x, y), eps, alpha = images, 0.15, 0.04
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


def test_zero_gradient_is_the_share_of_images_without_one(images):
    class Half(nn.Module):
        """Logits that ignore dark images."""

        def forward(self, x):
            bright = F.relu(x.flatten(1).mean(1) - 0.5)
            return torch.stack([bright, -bright, 2 * bright, 0 * bright, bright.new_ones(len(bright))], 1)

    x = torch.stack([torch.full((1, 8, 8), v) for v in (0.1, 0.9, 0.2, 0.3)])
    assert attacks.fgsm(Half(), x, torch.zeros(4, dtype=torch.long), 0.1, "gap").zero_gradient == 0.75


def test_fgsm_step_is_the_sign_of_the_numerical_gradient(network, images):
    network, (x, y) = network.double().eval(), (images[0].double(), images[1])
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


class Scaled(nn.Module):
    def __init__(self, inner, factor):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x):
        return self.factor * self.inner(x)


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("factor", [1e3, 1e5])
def test_scaled_logits_stop_neither_attack(network, images, factor, steps):
    """Where the gradient of cross-entropy is exactly 0, that of the log-odds is all but the gap's."""
    network.eval()
    x = images[0]
    y = network(x).argmax(1)  # all right: the softmax of the scaled logits is exactly one
    plain = attacks.ifgsm(network, x, y, 0.1, steps=steps, objective="gap")
    large = Scaled(network, factor)
    leaf = x.clone().requires_grad_()
    (vanished,) = torch.autograd.grad(F.cross_entropy(large(leaf), y, reduction="sum"), leaf)
    assert factor < 1e5 or not vanished.any()
    z = factor * network.double()(x.double()).detach()
    network.float()
    rest = (z - z.gather(1, y[:, None])).exp().sum(1) - 1  # of all competitors, relative to the label
    for objective in ("ce", "gap"):
        attack = attacks.ifgsm(large, x, y, 0.1, steps=steps, objective=objective)
        assert attack.zero_gradient == 0
        assert attack.saturated == pytest.approx(float((rest < 6e-8).float().mean())) and attack.saturated > 0.8
        same = (attack.images == plain.images).flatten(1).all(1)
        # two competitors that are all but level share the gradient of the log-odds
        assert same.float().mean() >= (1 if objective == "gap" or factor == 1e5 else 0.9)


@pytest.mark.parametrize("factor", [1.0, 30.0, 1000.0])
def test_the_attack_on_cross_entropy_has_the_direction_of_its_gradient(network, images, factor):
    """Against the gradient of cross-entropy in double precision, from a softmax that is not saturated there."""
    network.eval()
    x, y = images
    large = Scaled(network, factor).double()
    leaf = x.double().requires_grad_()
    nll = F.cross_entropy(large(leaf), y, reduction="none")
    (expected,) = torch.autograd.grad(nll.sum(), leaf)
    (gradient, logits) = attacks.attack_gradient(large, x.double(), y, "ce")
    p = logits.softmax(1)
    rest = 1 - p.gather(1, y[:, None])[:, 0]
    clear = rest > 1e-6  # 1 - p_y is right to ten digits there
    assert clear.sum() >= 5
    torch.testing.assert_close((rest.view(-1, 1, 1, 1) * gradient)[clear], expected[clear], rtol=1e-6, atol=1e-9)
    assert (gradient.flatten(1).abs().amax(1) > 0).all()


def test_log_odds_are_those_of_a_literal_softmax():
    logits = torch.tensor([[3.0, 1.0, -2.0], [0.0, 0.0, 0.0], [5.0, -math.inf, 1.0]], dtype=torch.float64)
    target = torch.tensor([0, 2, 2])
    phi = attacks.log_odds(logits, target)
    for n, y in enumerate(target.tolist()):
        p = float(logits[n].softmax(0)[y])
        assert float(phi[n]) == pytest.approx(math.log(p / (1 - p)))
    far = attacks.log_odds(torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([0]))
    assert float(far) == pytest.approx(40 - math.log(2)) and far.dtype == torch.float32
    half = attacks.log_odds(torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16), torch.tensor([0]))
    assert half.dtype == torch.float32 and float(half) == 8.0


def test_saturated_is_the_share_of_images_whose_label_has_all_the_probability():
    """1 - p_y of two logits (z, 0) is 1 / (1 + e^z): 6e-8 lies at z = 16.63."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [0.0]]))
    x = torch.tensor([16.5, 16.6, 16.7, 40.0, -40.0]).view(5, 1, 1, 1)
    y = torch.zeros(5, dtype=torch.long)
    for objective in ("ce", "gap"):
        attack = attacks.fgsm(model, x, y, 0.1, objective, bounds=(-50.0, 50.0))
        assert attack.saturated == pytest.approx(2 / 5) and attack.zero_gradient == 0


def test_images_stay_in_the_ball_and_in_the_data_range(network, images):
    x, y = images
    for attack in (
        attacks.ifgsm(network, x, y, 0.2, objective="gap"),
        attacks.pgd(network, x, y, 0.2, generator=torch.Generator().manual_seed(0)),
    ):
        assert (attack.images - x).abs().max() <= 0.2 + 1e-7
        assert attack.images.min() >= 0 and attack.images.max() <= 1
        assert (attack.images - x).abs().amax((1, 2, 3)).min() > 0.1


def test_iterating_raises_the_objective_above_one_step(network, images):
    network.eval()
    x, y = images
    one = F.cross_entropy(network(attacks.fgsm(network, x, y, 0.2).images), y)
    many = F.cross_entropy(network(attacks.ifgsm(network, x, y, 0.2, steps=20).images), y)
    assert many > one > F.cross_entropy(network(x), y)


def test_the_network_is_left_as_it_was(network, images):
    network.train()
    network[1].eval()  # a frozen submodule stays frozen
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = attacks.ifgsm(network, *images, eps=0.1).images
    second = attacks.ifgsm(network, *images, eps=0.1).images
    assert torch.equal(first, second)  # dropout was off
    assert network.training and network[3].training and not network[1].training
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_impossible_settings_raise(network, images):
    with pytest.raises(ValueError, match=r"steps \* alpha is 3 \* 0.01 = 0.03, less than eps = 0.1"):
        attacks.ifgsm(network, *images, eps=0.1, alpha=0.01, steps=3)
    with pytest.raises(ValueError, match=r"eps must be >= 0, got -0\.1"):
        attacks.fgsm(network, *images, eps=-0.1)
    with pytest.raises(ValueError, match="objective must be one of ce, gap"):
        attacks.fgsm(network, *images, eps=0.1, objective="cw")

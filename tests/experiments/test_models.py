"""Networks: the papers' sizes, readable taps, and a last hidden tap that is the head's own input."""

import pytest
import torch
from torch import nn

from margin_kernels.experiments import models

COLOUR = ("resnet20", "nin", "wrn28_2", "wrn28_10")
SHAPES = {"digits_cnn": (1, 8, 8), **dict.fromkeys(COLOUR, (3, 32, 32))}
SIZES = sorted(set(models.MODELS) - {"wrn28_10"})  # 36 million weights, in test_benchmark_networks.py


def network(name, shape=None, **options):
    torch.manual_seed(0)
    return models.build(name, shape or SHAPES.get(name, (1, 28, 28)), 10, **options)


def outputs(model, x):
    """Every module's output by name, and the input tensor of the head."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, (i[0], o)))
        for name, module in model.named_modules()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", sorted(set(SIZES) - {"nin", "wrn28_2"}))
def test_the_last_hidden_tap_is_the_input_tensor_of_a_linear_head(name):
    model = network(name)
    seen = outputs(model, torch.rand(2, *SHAPES.get(name, (1, 28, 28))))
    assert isinstance(model.head, nn.Linear)
    assert seen["head"][0] is seen[models.hidden_taps(name)[-1]][1]
    assert seen["head"][1] is seen[""][1]  # and the head's output is the logits


def test_the_logits_of_nin_are_the_means_of_the_maps_of_its_head():
    model = network("nin")
    seen = outputs(model, torch.rand(2, 3, 32, 32))
    assert seen["head"][0] is seen[models.hidden_taps("nin")[-1]][1] and seen["head"][1].shape == (2, 10, 8, 8)
    torch.testing.assert_close(seen[""][1], seen["head"][1].mean((2, 3)))
    assert seen["pool1"][1].shape == (2, 96, 16, 16)


@pytest.mark.parametrize("name", SIZES)
def test_a_centred_network_subtracts_its_mean_image_and_nothing_else(name):
    shape = SHAPES.get(name, (1, 28, 28))
    plain, centred = network(name).eval(), network(name, center=True).eval()
    mean = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    centred.center.mean.copy_(mean)
    x = torch.rand(3, *shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(centred(x), plain(x - mean))
    assert [n for n, _ in centred.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert set(centred.state_dict()) - set(plain.state_dict()) == {"center.mean"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # weights and biases counted by hand from the definitions
        ("mnist_cnn", 32 * 26 + 64 * 801 + 512 * 3137 + 512 * 513 + 10 * 513),
        ("lenet5", 32 * 26 + 64 * 801 + 512 * 3137 + 10 * 513),
        ("lenet", 20 * 26 + 50 * 501 + 500 * 801 + 10 * 501),
        ("mlp800", 800 * 785 + 800 * 801 + 10 * 801),
        ("mlp1000", 1000 * 785 + 2 * 1000 * 1001 + 10 * 1001),
        (
            "nin",
            192 * 76
            + 160 * 193
            + 96 * 161
            + 192 * (25 * 96 + 1)
            + 2 * 192 * 193
            + 192 * (9 * 192 + 1)
            + 192 * 193
            + 1930,
        ),
        # a 3x3 stem, 12 blocks of two 3x3 convolutions, 1x1 shortcuts where the width changes, no biases; two numbers
        # per channel before every convolution of a block and before the pool
        (
            "wrn28_2",
            9 * 3 * 16
            + 9 * (16 * 32 + 7 * 32**2 + 32 * 64 + 7 * 64**2 + 64 * 128 + 7 * 128**2)
            + (16 * 32 + 32 * 64 + 64 * 128)
            + 2 * (16 + 7 * 32 + 32 + 7 * 64 + 64 + 7 * 128 + 128)
            + 1290,
        ),
        # 19 convolutions without biases, two numbers per normalised channel, the head: option-A shortcuts have none
        (
            "resnet20",
            9 * (3 * 16 + 6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2) + 2 * (7 * 16 + 6 * 96) + 650,
        ),
    ],
)
def test_networks_have_the_size_of_their_definition(name, parameters):
    assert sum(p.numel() for p in network(name).parameters()) == parameters


@pytest.mark.parametrize(("init", "variance"), [("default", 1 / 3), ("lecun_uniform", 1), ("he_normal", 2)])
def test_first_weights_have_the_variance_of_their_initialisation(init, variance):
    for layer in network("mnist_cnn", init=init).modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = layer.weight.detach()
            inputs, entries = weight[0].numel(), weight.numel()
            assert float(weight.mean()) == pytest.approx(0, abs=5 * (variance / inputs / entries) ** 0.5)
            assert float(weight.var()) * inputs == pytest.approx(variance, rel=5 * (2 / entries) ** 0.5)
            assert bool(layer.bias.any()) == (init == "default")
            widest = float(weight.abs().max()) * inputs**0.5
            assert (widest <= (3 * variance) ** 0.5) == (init != "he_normal")


def test_mnist_cnn_also_takes_cifar_images():
    assert network("mnist_cnn", (3, 32, 32)).fc3.in_features == 64 * 8 * 8


def test_a_tap_after_the_pool_has_the_gradient_norm_of_the_one_before():
    model = network("mnist_cnn")
    seen = outputs(model, torch.rand(4, 1, 28, 28))
    before, after = seen["relu1"][1], seen["pool1"][1]
    gap = (seen["head"][1][:, 3] - seen["head"][1][:, 5]).sum()
    for p in (1, 2, float("inf")):
        norms = [g.flatten(1).norm(p, 1) for g in torch.autograd.grad(gap, (before, after), retain_graph=True)]
        torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=0)


def test_group_norm_does_not_couple_samples_and_batch_norm_does():
    x = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    group, batch = network("resnet20", norm="group").train(), network("resnet20", norm="batch").train()
    torch.testing.assert_close(group(x)[:2], group(x[:2]), rtol=1e-4, atol=1e-5)
    assert (batch(x)[:2] - batch(x[:2])).abs().max() > 1e-2


def test_dropout_stands_only_where_it_is_asked_for():
    assert not any(isinstance(m, nn.Dropout) for name in SIZES for m in network(name).modules())
    assert [m.p for m in network("mnist_cnn", dropout=0.2).modules() if isinstance(m, nn.Dropout)] == [0.2, 0.2]


@pytest.mark.parametrize("name", ["mlp800", "mlp1000", "lenet5", "lenet", "mnist_cnn"])
def test_dropout_stands_in_front_of_every_linear_layer_but_the_first(name):
    kinds = [type(m) for m in network(name, dropout=0.5).children()]
    linear = [i for i, kind in enumerate(kinds) if kind is nn.Linear]
    assert kinds[linear[0] - 1] is nn.Flatten and all(kinds[i - 1] is nn.Dropout for i in linear[1:])
    assert kinds.count(nn.Dropout) == len(linear) - 1


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"model.name must be one of digits_cnn, mnist_cnn.*, got 'vgg'"):
        models.build("vgg", (1, 8, 8), 10)
    with pytest.raises(ValueError, match=r"model.norm must be one of batch, group, got 'layer'"):
        network("resnet20", norm="layer")
    with pytest.raises(ValueError, match=r"model.init must be one of default, lecun_uniform, he_normal.*, got 'zero'"):
        network("mlp800", init="zero")

"""The papers' networks, by name, with readable tap names.

    digits_cnn   conv3x3x16 - relu - conv3x3x32 - pool - fc64 - fc10                          1x8x8
    mnist_cnn    conv5x5x32 - pool - conv5x5x64 - pool - fc512 - fc512 - fc10 ReLU            [E] [N]; even-sized images
    lenet5       conv5x5x32 - pool - conv5x5x64 - pool - fc512 - fc10 ReLU                    [M]
    lenet        conv5x5x20 - pool - conv5x5x50 - pool - fc500 - relu - fc10, no padding      [A]; convolutions without
                                                                                              ReLU
    mlp800       784-800-800-10 ReLU [A]          mlp1000   784-1000-1000-1000-10 ReLU [M]
    nin          Network in Network [M] [A]: mlpconv 5x5 192-160-96 - max pool - mlpconv 5x5 192-192-192 -
                 average pool - mlpconv 3x3 192-192-10 - global average pool                  3x32x32
    resnet20     CIFAR ResNet-20, batch or group norm [A]
    wrn28_2, wrn28_10      Wide ResNet of depth 28 and width 2 [N] or 10 [E], pre-activation, batch or group norm;
                 dropout in front of the head alone

`hidden_taps(name)` lists the outputs that "every hidden layer" means, the post-activation output of each weight
layer (of each block for resnet20 and nin). Where a non-overlapping max pool follows the activation the tap stands after
the pool: the pool hands every gradient entry to exactly one position, so the l_p norm of the gradient is the same on
both sides of it, and the smaller tensor costs a quarter of the memory. The last hidden tap is the input tensor of
`head`, but for the wide networks, which have the three evenly spaced taps of [E] with norm, ReLU and pool after them.
The head is an nn.Linear whose output is the logits, so the tap's norms are row differences of the weight; but for nin
it is a 1x1 convolution, and the logits are the means of its maps.

`init`: the first weights. "default" is PyTorch's, uniform in +- 1 / sqrt(inputs) with biases alike; the others have
biases 0 and a wider spread: "lecun_uniform" of variance 1 / inputs (Caffe's "xavier"), "he_normal" of 2 / inputs.

`center`: the first module subtracts the mean training image, a buffer of the network. Images, attacks and distances
stay in pixel units, and the tap "input" is what the network is given, before the subtraction.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from margin_kernels.task.capture import resolve

from ..config import Config, ConfigError, called, is_code

Shape = tuple[int, ...]


def _flat(layers: list[tuple[str, nn.Module]], shape: Shape) -> int:
    """Number of features that `layers`, ending in a flatten, make of one image."""
    with torch.no_grad():
        return int(nn.Sequential(OrderedDict(layers))(torch.zeros(1, *shape)).shape[1])


def _conv_net(
    shape: Shape,
    classes: int,
    convs: list[tuple[int, int, bool]],
    widths: list[int],
    padding: str,
    relu: bool,
    dropout: float,
) -> nn.Sequential:
    """convs: (channels, kernel, pool after it) per block; widths: hidden fully connected layers; ReLU after convs if
    `relu`."""
    layers: list[tuple[str, nn.Module]] = []
    channels = shape[0]
    for i, (width, kernel, pool) in enumerate(convs, 1):
        layers.append((f"conv{i}", nn.Conv2d(channels, width, kernel, padding=padding)))
        if relu:
            layers.append((f"relu{i}", nn.ReLU()))
        if pool:
            layers.append((f"pool{i}", nn.MaxPool2d(2)))
        channels = width
    layers.append(("flatten", nn.Flatten()))
    features = _flat(layers, shape)
    for i, width in enumerate(widths, len(convs) + 1):
        layers += [(f"fc{i}", nn.Linear(features, width)), (f"relu{i}", nn.ReLU())]
        if dropout > 0:
            layers.append((f"dropout{i}", nn.Dropout(dropout)))
        features = width
    layers.append(("head", nn.Linear(features, classes)))
    return nn.Sequential(OrderedDict(layers))


def digits_cnn(shape: Shape = (1, 8, 8), classes: int = 10, dropout: float = 0.0) -> nn.Module:
    return _conv_net(shape, classes, [(16, 3, False), (32, 3, True)], [64], "same", True, dropout)


def mnist_cnn(shape: Shape = (1, 28, 28), classes: int = 10, dropout: float = 0.0) -> nn.Module:
    return _conv_net(shape, classes, [(32, 5, True), (64, 5, True)], [512, 512], "same", True, dropout)


def lenet5(shape: Shape = (1, 28, 28), classes: int = 10, dropout: float = 0.0) -> nn.Module:
    return _conv_net(shape, classes, [(32, 5, True), (64, 5, True)], [512], "same", True, dropout)


def lenet(shape: Shape = (1, 28, 28), classes: int = 10, dropout: float = 0.0) -> nn.Module:
    return _conv_net(shape, classes, [(20, 5, True), (50, 5, True)], [500], "valid", False, dropout)


def mlp800(shape: Shape = (1, 28, 28), classes: int = 10, dropout: float = 0.0) -> nn.Module:
    return _conv_net(shape, classes, [], [800, 800], "same", True, dropout)


def mlp1000(shape: Shape = (1, 28, 28), classes: int = 10, dropout: float = 0.0) -> nn.Module:
    return _conv_net(shape, classes, [], [1000, 1000, 1000], "same", True, dropout)


def normalisation(kind: str, channels: int, groups: int = 32) -> nn.Module:
    """Batch norm, or group norm with `groups` groups or as many as divide both these and the channels."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(math.gcd(groups, channels), channels)
    raise ValueError(f"model.norm must be one of batch, group, got {kind!r}")


def nin(shape: Shape = (3, 32, 32), classes: int = 10, dropout: float = 0.0) -> nn.Module:
    """No ReLU after the head: means of rectified maps would give no gradient where a class's map is all negative. The
    pools, 3x3 with stride 2, halve the image (ceil_mode), as in the authors' Caffe definition; dropout after both."""
    blocks = [
        (5, (192, 160, 96), nn.MaxPool2d(3, 2, ceil_mode=True)),
        (5, (192, 192, 192), nn.AvgPool2d(3, 2, ceil_mode=True)),
        (3, (192, 192), None),
    ]
    layers: list[tuple[str, nn.Module]] = []
    channels, number = shape[0], 0
    for block, (size, widths, pool) in enumerate(blocks, 1):
        for i, width in enumerate(widths):
            number += 1
            kernel = size if i == 0 else 1
            layers.append((f"conv{number}", nn.Conv2d(channels, width, kernel, padding=kernel // 2)))
            layers.append((f"relu{number}", nn.ReLU()))
            channels = width
        if pool is not None:
            layers.append((f"pool{block}", pool))
            if dropout > 0:
                layers.append((f"dropout{block}", nn.Dropout(dropout)))
    layers += [
        ("head", nn.Conv2d(channels, classes, 1)),
        ("average", nn.AdaptiveAvgPool2d(1)),
        ("flatten", nn.Flatten()),
    ]
    return nn.Sequential(OrderedDict(layers))


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); the shortcut subsamples and pads channels with zeros
    (option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = normalisation(norm, outputs, 8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = normalisation(norm, outputs, 8)
        self.relu2 = nn.ReLU()
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.extra:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2)
            )
        return self.relu2(out + x)


def resnet20(shape: Shape = (3, 32, 32), classes: int = 10, dropout: float = 0.0, norm: str = "batch") -> nn.Module:
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False)),
        ("norm1", normalisation(norm, 16, 8)),
        ("relu1", nn.ReLU()),
    ]
    inputs = 16
    for stage, width in enumerate((16, 32, 64), 1):
        blocks = [BasicBlock(inputs, width, 1 if stage == 1 else 2, norm)] + [
            BasicBlock(width, width, 1, norm) for _ in range(2)
        ]
        layers.append((f"layer{stage}", nn.Sequential(*blocks)))
        inputs = width
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten())]
    if dropout > 0:
        layers.append(("dropout", nn.Dropout(dropout)))
    layers.append(("head", nn.Linear(inputs, classes)))
    return nn.Sequential(OrderedDict(layers))


class WideBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))); where the width changes, the shortcut is a 1x1 convolution of the
    first relu(norm(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: str) -> None:
        super().__init__()
        self.norm1, self.relu1 = normalisation(norm, inputs), nn.ReLU()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2, self.relu2 = normalisation(norm, outputs), nn.ReLU()
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu1(self.norm1(x))
        out = self.conv2(self.relu2(self.norm2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def wide_resnet(
    shape: Shape = (3, 32, 32),
    classes: int = 10,
    dropout: float = 0.0,
    norm: str = "batch",
    depth: int = 28,
    width: int = 2,
) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = [("conv", nn.Conv2d(shape[0], 16, 3, 1, 1, bias=False))]
    inputs = 16
    for stage, channels in enumerate((16 * width, 32 * width, 64 * width), 1):
        for block in range((depth - 4) // 6):
            stride = 2 if stage > 1 and block == 0 else 1
            layers.append((f"stage{stage}_{block}", WideBlock(inputs, channels, stride, norm)))
            inputs = channels
    layers += [("norm", normalisation(norm, inputs)), ("relu", nn.ReLU()), ("pool", nn.AdaptiveAvgPool2d(1))]
    layers.append(("flatten", nn.Flatten()))
    if dropout > 0:
        layers.append(("dropout", nn.Dropout(dropout)))
    layers.append(("head", nn.Linear(inputs, classes)))
    return nn.Sequential(OrderedDict(layers))


WIDE_TAPS = ("stage1_3", "stage2_3", "stage3_3")
MODELS: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "digits_cnn": (digits_cnn, ("relu1", "pool2", "relu3")),
    "mnist_cnn": (mnist_cnn, ("pool1", "pool2", "relu3", "relu4")),
    "lenet5": (lenet5, ("pool1", "pool2", "relu3")),
    "lenet": (lenet, ("pool1", "pool2", "relu3")),
    "mlp800": (mlp800, ("relu1", "relu2")),
    "mlp1000": (mlp1000, ("relu1", "relu2", "relu3")),
    "nin": (nin, ("relu3", "relu6", "relu8")),
    "resnet20": (resnet20, ("relu1", "layer1", "layer2", "layer3", "flatten")),
    "wrn28_2": (wide_resnet, WIDE_TAPS),
    "wrn28_10": (partial(wide_resnet, width=10), WIDE_TAPS),
}


def hidden_taps(name: str) -> tuple[str, ...]:
    """Names of the modules whose outputs are the hidden layers of the shipped model `name`, in forward order."""
    return _entry(name)[1]


def hidden_of(model: nn.Module, config: Config) -> tuple[str, ...]:
    """The hidden taps of the network of a config: of one of the user's what its attribute `hidden_taps` lists, or else
    what the layers of a large margin loss name besides input and output. Raises ConfigError where these say hidden and
    nothing says what that is."""
    name = config.model.name
    if not is_code(name):
        return hidden_taps(name)
    layers = config.loss.layers if config.loss.kind == "large_margin" else []
    own = getattr(model, "hidden_taps", None)
    own = own() if callable(own) else own
    if own is not None and (isinstance(own, str) or not all(isinstance(tap, str) for tap in own)):
        raise ConfigError(f"{name}: hidden_taps must be a list of names of modules, got {own!r:.100}")
    if own is None and "hidden" in layers:
        known = [module for module, _ in model.named_modules() if module]
        raise ConfigError(
            f"loss.layers has hidden, but {name} has no attribute hidden_taps: name its modules in loss.layers, of "
            f"{', '.join(known[:30])}{', ...' if len(known) > 30 else ''}"
        )
    names = [tap for tap in (layers if own is None else own) if tap not in ("input", "output")]
    return resolve(model, names) if names else ()


class Center(nn.Module):
    """x - mean, with the mean training image [C, H, W] as a buffer: zero until it is set."""

    mean: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean


INITS: dict[str, Callable[[Tensor], Any]] = {
    "lecun_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="linear"),
    "he_normal": partial(nn.init.kaiming_normal_, nonlinearity="relu"),
}


def _initialise(network: nn.Module, init: str) -> None:
    if init not in ("default", *INITS):
        raise ValueError(f"model.init must be one of default, {', '.join(INITS)}, got {init!r}")
    for layer in network.modules():
        if init != "default" and isinstance(layer, (nn.Conv2d, nn.Linear)):
            INITS[init](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def build(
    name: str, shape: Shape, classes: int, center: bool = False, init: str = "default", **options: Any
) -> nn.Module:
    """A freshly initialised network: [N, *shape] -> logits [N, classes]. `center` puts Center in front; `options`:
    dropout, and norm for the residual networks; of code of the user's `args`, its keywords. Raises ConfigError for what
    that code raises, or where it returns no module."""
    if is_code(name):
        network = called("model", name, options.pop("args", {}), {"shape": tuple(shape), "classes": classes})
        if not isinstance(network, nn.Module):
            raise ConfigError(f"model.name {name} must return a torch.nn.Module, got {type(network).__name__}")
        for option in (*options, *(["center"] if center else [])):
            raise ConfigError(f"model.{option} is for shipped networks: give {name} its options by model.args")
    else:
        network = _entry(name)[0](shape, classes, **options)
    _initialise(network, init)
    if center:
        return nn.Sequential(OrderedDict([("center", Center(shape)), *network.named_children()]))
    return network


def default_shape(name: str) -> Shape:
    """The shape of one image of the data set that network `name` is made for."""
    shape: Shape = inspect.signature(_entry(name)[0]).parameters["shape"].default
    return shape


def has_norm(name: str) -> bool:
    """Whether network `name` takes the option norm."""
    return not is_code(name) and "norm" in inspect.signature(_entry(name)[0]).parameters


def _entry(name: str) -> tuple[Callable[..., nn.Module], tuple[str, ...]]:
    if name not in MODELS:
        raise ValueError(f"model.name must be one of {', '.join(MODELS)}, or code as file.py:Class, got {name!r}")
    return MODELS[name]

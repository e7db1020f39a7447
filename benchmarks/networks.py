"""The networks of step.py, with their taps and batch sizes.

    mnist_cnn, mlp800, lenet, lenet5      1x28x28, 10 classes: margin_kernels.experiments.models
    resnet20_gn, resnet20_bn              3x32x32, 10 classes: the same, group or batch norm
    wrn28_10_gn, wrn28_10_bn              3x32x32, 10 classes: the same
    resnet50_gn, resnet50_bn              3x224x224, 1000 classes: bottleneck blocks, stride in the 3x3 convolution
    vit_b16                               3x224x224, 1000 classes: 12 pre-norm blocks of width 768 on 16x16 patches
    encoder                               64 tokens of width 256, 100 classes: PyTorch's TransformerEncoder, 4 layers

He, Zhang, Ren, Sun: Deep Residual Learning. CVPR 2016.
Dosovitskiy et al.: An Image is Worth 16x16 Words. ICLR 2021.  Wu, He: Group Normalization. ECCV 2018.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from margin_kernels.experiments import models
from margin_kernels.experiments.models import normalisation


class Bottleneck(nn.Module):
    """relu(norm(conv1x1(relu(norm(conv3x3(relu(norm(conv1x1(x)))))))) + shortcut(x)), with four times `width` channels
    out."""

    def __init__(self, inputs: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), normalisation(norm, width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), normalisation(norm, width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), normalisation(norm, outputs)
        self.relu1, self.relu2, self.relu3 = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            resize = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(resize, normalisation(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu2(self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x))))))
        return self.relu3(self.norm3(self.conv3(out)) + self.shortcut(x))


def resnet50(norm: str, classes: int = 1000) -> nn.Module:
    layers: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(3, 64, 7, 2, 3, bias=False)),
        ("norm", normalisation(norm, 64)),
        ("relu", nn.ReLU()),
        ("maxpool", nn.MaxPool2d(3, 2, 1)),
    ]
    inputs = 64
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            layers.append((f"stage{stage}_{block}", Bottleneck(inputs, width, stride, norm)))
            inputs = 4 * width
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("head", nn.Linear(inputs, classes))]
    return nn.Sequential(OrderedDict(layers))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), x [N, tokens, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Patches as tokens behind a class token, whose last state makes the logits."""

    def __init__(
        self, size: int = 224, patch: int = 16, width: int = 768, depth: int = 12, heads: int = 12, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class TokenClassifier(nn.Module):
    """The mean of the states of PyTorch's own encoder makes the logits; x [N, tokens, width]."""

    def __init__(self, width: int = 256, heads: int = 8, depth: int = 4, classes: int = 100) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, depth), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Network(NamedTuple):
    """A network of the table; the CPU batches keep a cross-entropy step at 0.1 to 0.2 TFLOP or below."""

    build: Callable[[], nn.Module]
    hidden: tuple[str, ...]  # the hidden taps, names or patterns
    shape: tuple[int, ...]
    classes: int
    cpu_batch: int
    gpu_batch: int


def _small(name: str) -> Network:
    return Network(partial(models.build, name, (1, 28, 28), 10), models.hidden_taps(name), (1, 28, 28), 10, 128, 1024)


def _resnet20(norm: str) -> Network:
    build = partial(models.build, "resnet20", (3, 32, 32), 10, norm=norm)
    return Network(build, models.hidden_taps("resnet20"), (3, 32, 32), 10, 64, 512)


def _wide(norm: str) -> Network:
    return Network(partial(models.build, "wrn28_10", (3, 32, 32), 10, norm=norm), ("stage*",), (3, 32, 32), 10, 4, 128)


def _resnet50(norm: str) -> Network:
    return Network(partial(resnet50, norm), ("stage?_?",), (3, 224, 224), 1000, 4, 64)


NETWORKS = {
    **{name: _small(name) for name in ("mnist_cnn", "mlp800", "lenet", "lenet5")},
    "resnet20_gn": _resnet20("group"),
    "resnet20_bn": _resnet20("batch"),
    "wrn28_10_gn": _wide("group"),
    "wrn28_10_bn": _wide("batch"),
    "resnet50_gn": _resnet50("group"),
    "resnet50_bn": _resnet50("batch"),
    "vit_b16": Network(VisionTransformer, ("blocks.*",), (3, 224, 224), 1000, 2, 64),
    "encoder": Network(TokenClassifier, ("encoder.layers.*",), (64, 256), 100, 32, 512),
}

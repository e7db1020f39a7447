"""Small networks with random weights, one for each kind of architecture, for benchmarks/architectures.py."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from margin_kernels.gradients import register_row_local

N, T, E, C = 6, 5, 8, 4  # samples, time steps or tokens, features, classes: all different, lest one passes for another


class Do(nn.Module):
    """function(self, x), with layers of its own."""

    def __init__(self, function: Callable[["Do", Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Doubled(torch.autograd.Function):
    """An operation of which nothing is known."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return 2 * h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Registered(Doubled):
    """The same, declared row-local."""


def residual(block: nn.Module) -> nn.Module:
    return Do(lambda self, h: h + self.layers[0](h), block)


def images(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, E, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(E, C))


def resnet(norm: Callable[[], nn.Module]) -> nn.Module:
    conv = lambda: nn.Conv2d(E, E, 3, padding=1, bias=False)  # noqa: E731
    return images(norm(), nn.ReLU(), residual(nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm())), nn.ReLU())


def convnext() -> nn.Module:
    inner = nn.Sequential(nn.LayerNorm(E), nn.Linear(E, 2 * E), nn.GELU(), nn.Linear(2 * E, E))
    mixed = Do(lambda self, h: self.layers[0](h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), inner)
    return images(residual(nn.Sequential(nn.Conv2d(E, E, 7, padding=3, groups=E), mixed)))


def mobilenet() -> nn.Module:
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(E, 2, 1), nn.ReLU(), nn.Conv2d(2, E, 1), nn.Sigmoid())
    depthwise, squeezed = nn.Conv2d(E, E, 3, padding=1, groups=E), Do(lambda self, h: h * self.layers[0](h), gate)
    return images(residual(nn.Sequential(nn.Conv2d(E, E, 1), nn.BatchNorm2d(E), nn.Hardswish(), depthwise, squeezed)))


def tokens(block: nn.Module, time: int = 1) -> nn.Module:
    """Of tokens with time in dimension `time`; of a block that returns several tensors the first is taken."""

    def forward(self: Do, x: Tensor) -> Tensor:
        h = self.layers[0](x, x, x) if isinstance(block, nn.MultiheadAttention) else self.layers[0](x)
        return self.layers[1]((h[0] if isinstance(h, tuple) else h).mean(time))

    return Do(forward, block, nn.Linear(E, C))


def encoder(first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=first)


def vit() -> nn.Module:
    def forward(self: Do, x: Tensor) -> Tensor:
        h = self.layers[0](x).flatten(2).transpose(1, 2)
        h = torch.cat([next(self.layers[3].parameters()).expand(len(x), 1, E), h], 1)
        return self.layers[2](self.layers[1](h)[:, 0])

    return Do(forward, nn.Conv2d(3, E, 4, 4), encoder(True), nn.Linear(E, C), nn.Embedding(1, E))


def attend(self: Do, x: Tensor) -> Tensor:
    """Attention written out, [N,T,E] -> [N,T,E], as in BERT: heads by view and permute, a mask that is added."""
    q, k, v = (layer(x).view(len(x), -1, 2, E // 2).permute(0, 2, 1, 3) for layer in self.layers)
    scores = q @ k.transpose(-1, -2) / E**0.5 + torch.zeros(len(x), 1, 1, x.shape[1], dtype=x.dtype)
    return (scores.softmax(-1) @ v).permute(0, 2, 1, 3).reshape(x.shape)


def attention() -> nn.Module:
    return Do(attend, *(nn.Linear(E, E) for _ in range(3)))


def bert() -> nn.Module:
    return nn.Sequential(nn.Embedding(20, E), residual(attention()), nn.LayerNorm(E), tokens(nn.Identity()))


def bert_of_transformers() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": E, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=C, **sizes))
    return Do(lambda self, x: self.layers[0](x).logits, model)


def swin() -> nn.Module:
    """Attention in windows of 4 x 4 positions of [N,E,8,8], shifted by 2."""

    def shifted(self: Do, h: Tensor) -> Tensor:
        h = h.permute(0, 2, 3, 1).roll((-2, -2), (1, 2))
        windows = h.reshape(len(h), 2, 4, 2, 4, E).transpose(2, 3).reshape(-1, 16, E)
        h = self.layers[0](windows).view(len(h), 2, 2, 4, 4, E).transpose(2, 3).reshape(h.shape)
        return h.roll((2, 2), (1, 2)).permute(0, 3, 1, 2)

    return images(residual(Do(shifted, attention())))


def mixture(function: Callable[[Do, Tensor], Tensor]) -> nn.Module:
    """A gate, a head and two experts."""
    return Do(function, nn.Linear(E, 2), nn.Linear(E, C), nn.Linear(E, E), nn.Linear(E, E))


def dense(self: Do, x: Tensor) -> Tensor:
    gate, head, *experts = self.layers
    return head((gate(x).softmax(1).unsqueeze(2) * torch.stack([expert(x) for expert in experts], 1)).sum(1))


def routed(self: Do, x: Tensor) -> Tensor:
    gate, head, one, other = self.layers
    first = gate(x).argmax(1) == 0
    h = torch.zeros_like(x).index_put((first,), one(x[first])).index_put((~first,), other(x[~first]))
    return head(h)


def between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """An MLP with a function of the hidden features in it."""
    return nn.Sequential(nn.Linear(E, E), nn.ReLU(), Do(lambda self, h: function(h)), nn.Linear(E, C))


def checkpointed(reentrant: bool) -> nn.Module:
    layers = nn.Linear(E, E), nn.Linear(E, C)
    return Do(lambda self, x: self.layers[1](checkpoint(self.layers[0], x, use_reentrant=reentrant).relu()), *layers)


def registered() -> nn.Module:
    register_row_local(Registered)
    return between(Registered.apply)

"""Networks, losses and taps drawn at random, and a literal loop that says what a step must give.

A network is a list of blocks on features [N,F], tokens [N,T,E] or images [N,C,H,W]. Some couple the samples, some
change from step to step. The literal loop uses nothing of the package but the options of a loss: plain autograd of each
score difference.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from margin_kernels import LargeMarginLoss

CLASSES = 4
STEPS = 3
Shape = tuple[int, ...]


class Do(nn.Module):
    """A function of the activations, with parameters of its own and `step`, the number of the training step."""

    def __init__(self, function: Callable[[Do, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.step = function, 0
        self.layers = nn.ModuleList(layers)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, h: Tensor) -> Tensor:
        return self.function(self, h)


def do(function: Callable[..., Tensor], *layers: nn.Module) -> nn.Module:
    return Do(function, *layers)


class Clamped(torch.autograd.Function):
    """A backward that is not linear: the gradient is clamped to `limit`."""

    @staticmethod
    def forward(ctx, h, limit):
        ctx.limit = limit
        return h.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-ctx.limit, ctx.limit), None


def hooked(self: Do, h: Tensor) -> Tensor:
    h = h * self.scale
    h.register_hook(lambda grad: 1.7 * grad)
    return h


def written(self: Do, h: Tensor) -> Tensor:
    h = h.clone()
    h[..., :1] = h[..., :1].tanh()
    return h


# Blocks that keep every shape: name -> builder from the shape of one sample; those in COUPLING mix samples.
ANY: dict[str, Callable[[Shape], nn.Module | None]] = {
    "tanh": lambda s: nn.Tanh(),
    "relu": lambda s: nn.ReLU(),
    "relu_": lambda s: nn.ReLU(inplace=True),
    "leaky": lambda s: nn.LeakyReLU(0.2),
    "gelu": lambda s: nn.GELU(),
    "silu": lambda s: nn.SiLU(),
    "softplus": lambda s: nn.Softplus(),
    "prelu": lambda s: nn.PReLU(),
    "scale": lambda s: do(lambda self, h: self.scale * h),
    "softmax": lambda s: do(lambda self, h: h + h.softmax(-1)),
    "normalize": lambda s: do(lambda self, h: F.normalize(h, dim=-1)),
    "layer norm": lambda s: nn.LayerNorm(s),
    "rms norm": lambda s: nn.RMSNorm(s[-1]),
    "linear": lambda s: nn.Linear(s[-1], s[-1]),
    "twice": lambda s: (lambda layer: do(lambda self, h: layer(torch.tanh(layer(h))), layer))(nn.Linear(s[-1], s[-1])),
    "residual": lambda s: do(lambda self, h: h + self.layers[0](torch.relu(h)), nn.Linear(s[-1], s[-1])),
    "gate": lambda s: do(lambda self, h: h * torch.sigmoid(self.layers[0](h)), nn.Linear(s[-1], s[-1])),
    "checkpoint": lambda s: do(
        lambda self, h: checkpoint(self.layers[0], h, use_reentrant=False),
        nn.Sequential(nn.Linear(s[-1], s[-1]), nn.Tanh()),
    ),
    "weight norm": lambda s: nn.utils.parametrizations.weight_norm(nn.Linear(s[-1], s[-1])),
    "cumsum": lambda s: do(lambda self, h: h.cumsum(-1) * 0.3),
    "sort": lambda s: do(lambda self, h: h.sort(-1).values),
    "roll features": lambda s: do(lambda self, h: h.roll(self.step + 1, -1)),
    "halves": lambda s: (
        do(lambda self, h: torch.cat([part * 1.1 for part in h.chunk(2, -1)], -1)) if s[-1] > 1 else None
    ),
    "max": lambda s: do(lambda self, h: h - 0.5 * h.amax(-1, keepdim=True)),
    "flatten and back": lambda s: do(lambda self, h: (2 * h.flatten(1)).view_as(h)),
    "all one dimension": lambda s: do(lambda self, h: torch.tanh(h.reshape(-1)).reshape(h.shape)),
    "batch last": lambda s: do(lambda self, h: (h.movedim(0, -1).contiguous() * 1.3).movedim(-1, 0)),
    "expand": lambda s: do(lambda self, h: h + h[..., :1].expand_as(h)),
    "written": lambda s: do(written),
    "hook": lambda s: do(hooked),
    "retain": lambda s: do(lambda self, h: (h := h * self.scale, h.retain_grad())[0]),
    "dropout": lambda s: nn.Dropout(0.3),
    "clamped": lambda s: do(lambda self, h: Clamped.apply(h, 0.05)),
    "mean of the batch": lambda s: do(lambda self, h: h - h.mean(0)),
    "part of the mean": lambda s: do(lambda self, h: h + self.gate * h.mean(0)),
    "mixup": lambda s: do(lambda self, h: (1 - self.gate) * h + self.gate * h.flip(0)),
    "shift": lambda s: do(lambda self, h: h + 0.5 * h.roll(self.step, 0)),
    "half the batch": lambda s: do(lambda self, h: h + 0.5 * h.roll(len(h) // 2, 0)),
    "batch softmax": lambda s: do(lambda self, h: h + h.softmax(0)),
    "permuted": lambda s: do(lambda self, h: 0.5 * h + 0.5 * h[torch.arange(len(h) - 1, -1, -1)]),
    "gram": lambda s: do(lambda self, h: h + 0.1 * (h.flatten(1) @ h.flatten(1).t() @ h.flatten(1)).view_as(h)),
    "sum": lambda s: do(lambda self, h: h + 0.01 * h.sum()),
    "standardized": lambda s: do(lambda self, h: h / h.std()),
}
COUPLING = {
    "mean of the batch", "part of the mean", "mixup", "shift", "half the batch", "batch softmax", "permuted", "gram",
    "sum", "standardized", "batch norm",
}  # fmt: skip

TOKENS: dict[str, Callable[[Shape], nn.Module | None]] = {
    "attention": lambda s: do(
        lambda self, h: h + self.layers[0](h, h, h, need_weights=False)[0],
        nn.MultiheadAttention(s[1], 2, batch_first=True),
    ),
    "attention, batch second": lambda s: do(
        lambda self, h: h + self.layers[0](*[h.transpose(0, 1)] * 3)[0].transpose(0, 1), nn.MultiheadAttention(s[1], 2)
    ),
    "encoder": lambda s: nn.TransformerEncoderLayer(s[1], 2, 8, dropout=0.0, batch_first=True),
    "encoder, batch second": lambda s: do(
        lambda self, h: self.layers[0](h.transpose(0, 1)).transpose(0, 1),
        nn.TransformerEncoderLayer(s[1], 2, 8, dropout=0.0),
    ),
    "attention over the batch": lambda s: do(
        lambda self, h: h + self.layers[0](h, h, h)[0], nn.MultiheadAttention(s[1], 2)
    ),
    "lstm": lambda s: nn.LSTM(s[1], s[1], batch_first=True),
    "gru, batch second": lambda s: do(
        lambda self, h: self.layers[0](h.transpose(0, 1))[0].transpose(0, 1), nn.GRU(s[1], s[1])
    ),
    "rnn": lambda s: nn.RNN(s[1], s[1], batch_first=True),
    "time major": lambda s: do(
        lambda self, h: self.layers[0](h.transpose(0, 1)).transpose(0, 1), nn.Sequential(nn.LayerNorm(s[1]), nn.Tanh())
    ),
    "windows": lambda s: (
        do(
            lambda self, h: torch.tanh(self.layers[0](h.reshape(-1, h.shape[1] // 2, h.shape[2]))).view_as(h),
            nn.Linear(s[1], s[1]),
        )
        if s[0] % 2 == 0
        else None
    ),
    "einsum": lambda s: do(lambda self, h: h + 0.3 * torch.einsum("nte,nse->nts", h, h) @ h),
    "convolution": lambda s: do(
        lambda self, h: self.layers[0](h.transpose(1, 2)).transpose(1, 2), nn.Conv1d(s[1], s[1], 3, padding=1)
    ),
    "class token": lambda s: do(lambda self, h: h - h[:, :1]),
    "unbound": lambda s: do(lambda self, h: torch.stack([torch.tanh(t) for t in h.unbind(1)], 1)),
}
IMAGES: dict[str, Callable[[Shape], nn.Module | None]] = {
    "conv": lambda s: nn.Conv2d(s[0], s[0], 3, padding=1),
    "thin conv": lambda s: nn.Conv2d(s[0], s[0], 5, padding=2),
    "transposed": lambda s: nn.ConvTranspose2d(s[0], s[0], 3, padding=1),
    "grouped": lambda s: nn.Conv2d(s[0], s[0], 3, padding=1, groups=s[0]),
    "channels last": lambda s: do(lambda self, h: h.contiguous(memory_format=torch.channels_last)),
    "group norm": lambda s: nn.GroupNorm(1, s[0]),
    "instance norm": lambda s: nn.InstanceNorm2d(s[0], affine=True),
    "batch norm, eval": lambda s: nn.BatchNorm2d(s[0]).eval(),
    "max pool": lambda s: nn.MaxPool2d(3, 1, 1),
    "average pool": lambda s: nn.AvgPool2d(3, 1, 1),
    "squeeze and excite": lambda s: do(
        lambda self, h: h * torch.sigmoid(self.layers[0](F.adaptive_avg_pool2d(h, 1))), nn.Conv2d(s[0], s[0], 1)
    ),
    "upsampled": lambda s: do(lambda self, h: F.avg_pool2d(F.interpolate(h, scale_factor=2, mode="bilinear"), 2)),
    "padded": lambda s: do(lambda self, h: F.pad(h, (1, 1, 1, 1), mode="reflect")[..., 1:-1, 1:-1]),
    "rolled": lambda s: do(lambda self, h: h.roll((1, 2), (2, 3))),
    "volume": lambda s: do(
        lambda self, h: self.layers[0](h.unsqueeze(1)).squeeze(1), nn.Conv3d(1, 1, 3, padding=1)
    ),
}  # fmt: skip
KINDS: dict[str, tuple[Shape, dict[str, Callable[[Shape], nn.Module | None]]]] = {
    "features": ((6,), ANY),
    "tokens": ((4, 4), {**ANY, **TOKENS}),
    "images": ((3, 5, 5), {**ANY, **IMAGES}),
}


class First(nn.Module):
    """The first tensor of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, h: Tensor) -> Tensor:
        out = self.module(h)
        return out[0] if isinstance(out, tuple) else out


@dataclass
class Case:
    """One drawn network with its taps; `build` makes it anew with the same weights."""

    kind: str
    blocks: tuple[str, ...]
    taps: tuple[str, ...]
    batch: int
    seed: int
    head: str = "linear"

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        shape, known = KINDS[self.kind]
        layers: list[nn.Module] = []
        for name in self.blocks:
            block = known[name](shape)
            layers.append(nn.Identity() if block is None else First(block))
        size = torch.Size(shape).numel()
        layers += [nn.Flatten(), nn.Linear(size, CLASSES)]
        if self.head == "scaled":
            layers.append(do(lambda self, h: self.scale * h))
        return nn.Sequential(*layers).double()

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (self.batch, *KINDS[self.kind][0])
        return [
            (
                torch.randn(shape, generator=generator, dtype=torch.float64),
                torch.randint(CLASSES, (self.batch,), generator=generator),
            )
            for _ in range(STEPS)
        ]

    @property
    def coupled(self) -> bool:
        return any(name in COUPLING or name == "attention over the batch" for name in self.blocks)


def step_of(model: nn.Module, number: int) -> None:
    """What changes between steps: shifts, and gates that open."""
    for module in model.modules():
        if isinstance(module, Do):
            module.step = number
            module.gate.fill_(0.4 * min(number, 1))


def draw(seed: int) -> Case:
    """The network of a seed."""
    choose = random.Random(seed)
    kind = choose.choice(list(KINDS))
    names = list(KINDS[kind][1])
    plain = [name for name in names if name not in COUPLING]
    blocks = [choose.choice(plain) for _ in range(choose.randint(1, 4))]
    if choose.random() < 0.3:
        blocks.insert(choose.randint(0, len(blocks)), choose.choice(names))
    linear = "conv" if kind == "images" else "linear"
    blocks.insert(choose.randint(0, len(blocks)), linear)
    # What is changed in place must not be needed by the backward of what made it.
    for i in reversed([i for i, name in enumerate(blocks) if name == "relu_" and i > 0 and blocks[i - 1] != linear]):
        blocks.insert(i, linear)
    candidates = ["input", *map(str, range(len(blocks)))]
    taps = tuple(choose.sample(candidates, choose.randint(1, min(3, len(candidates)))))
    batch = choose.choice([1, 2, 3, 4, 4, 5, 6])
    head = choose.choice(["linear", "linear", "scaled"])
    return Case(kind, tuple(blocks), taps, batch, seed % 10_000, head)


def literal(
    model: nn.Module, x: Tensor, y: Tensor, taps: tuple[str, ...], gamma: float, loss: LargeMarginLoss
) -> Tensor:
    """The large margin loss, mean over layers, maximum over competitors, by plain autograd of the summed gaps, and
    PyTorch's cross-entropy.

    A sample's norm is taken along dimension 0, which holds the batch at every tap of `Sequential` here.
    """
    kept: dict[str, Tensor] = {}
    x = x.clone().requires_grad_()

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            kept[name] = output
            return output.clone()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in taps if name != "input"]
    z = model(x.clone())
    for handle in handles:
        handle.remove()
    kept["input"] = x
    eps = 1e-6
    counted = y != loss.ignore_index
    label = torch.where(counted, y, 0)[:, None]
    masked = z.scatter(1, label, -float("inf"))
    index = masked.detach().topk(loss.top_k, 1).indices
    p, second_order = loss.p, loss.second_order
    q = float("inf") if p == 1 else (1.0 if p == float("inf") else p / (p - 1))
    distances = []
    for j in range(loss.top_k):
        shift = loss.soft_shift * math.log(z.shape[1] - 1)
        rival = masked.logsumexp(1) - shift if loss.competitors == "soft" else z.gather(1, index[:, j : j + 1])[:, 0]
        gap = torch.where(counted, rival - z.gather(1, label)[:, 0], 0.0)
        found = torch.autograd.grad(gap.sum(), [kept[t] for t in taps], retain_graph=True, create_graph=second_order)
        columns = []
        for g in found:
            g = g.reshape(len(z), -1)
            # A sample without a direction is left out.
            least = torch.linalg.vector_norm(g.detach(), q, dim=1) <= 100 * eps
            norm = torch.linalg.vector_norm(torch.where(least[:, None], 1.0, g), q, dim=1)
            columns.append(torch.where(least, float("inf"), -gap / (eps + norm)))
        distances.append(torch.stack(columns, 1))
    d = torch.stack(distances, 1)  # [N,k,L]
    nearest = d.gather(1, d.detach().argmin(1, keepdim=True))[:, 0]
    terms = (gamma - nearest).clamp(min=0).mean(1)
    weight = None if loss.class_weight is None else z.new_tensor(loss.class_weight)
    share = torch.where(counted, 1.0 if weight is None else weight[label[:, 0]], 0.0)
    ce = (
        F.cross_entropy(z, y, weight, ignore_index=loss.ignore_index, label_smoothing=loss.label_smoothing)
        if loss.cross_entropy_weight
        else 0.0
    )
    return (torch.where(counted, terms, 0.0) * share).sum() / share.sum() + loss.cross_entropy_weight * ce

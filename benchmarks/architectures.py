"""Which strategy each architecture gets, and the node of the autograd graph that refuses the others.

    python benchmarks/architectures.py            prints the table
    python benchmarks/architectures.py --write    puts it into docs/gradients.md, between its comments

Small networks with random weights, on the CPU in float32; the tap is the input, or the embedding: the longest path that
there is. Models of torchvision, timm and transformers have a table of their own, written where all are installed.
"""

import argparse
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import small_networks as small
import torch
from small_networks import C, E, N, T
from tables import table
from torch import Tensor, nn

import margin_kernels as mk

PAGE = Path(__file__).resolve().parents[1] / "docs" / "gradients.md"
BLOCK = re.compile(r"(<!-- table (architectures|packages) -->\n).*?(<!-- /table -->)", re.DOTALL)
NODE = re.compile(r"torch::autograd::\w+|\w+Backward\d*")
PACKAGED = [("torchvision", name) for name in ("resnet18", "mobilenet_v3_small", "swin_t", "convnext_tiny")]
PACKAGED += [("timm", name) for name in ("vit_tiny_patch16_224", "mixer_s32_224")]
IMAGE, SEQUENCE = (N, 3, 8, 8), (N, T, E)


@dataclass(frozen=True)
class Row:
    """One architecture: how it is built, the shape of its input, the tap, and how the task is told of the batch."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (N, E)
    train: bool = True
    layer: str = "input"
    batch_dim: int | None = None

    def batch(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        x = torch.randn(self.shape, dtype=dtype) if self.layer == "input" else torch.randint(0, 20, self.shape)
        return x, torch.arange(N) % C

    def task(self, passes: str = "auto", dtype: torch.dtype = torch.float32, second: bool = False) -> mk.MarginTask:
        torch.manual_seed(0)
        model = self.build().to(dtype).train(self.train)
        loss = mk.LargeMarginLoss(gamma=3.0, second_order=second)
        return mk.MarginTask(model, loss, (self.layer,), passes, batch_dim=self.batch_dim)


def packaged() -> list[Row]:
    """Models of torchvision, timm and transformers, in evaluation mode, where all are installed."""
    if not all(map(find_spec, ("torchvision", "timm", "transformers"))):
        return []
    makers = {"torchvision": import_module("torchvision.models").get_model, "timm": import_module("timm").create_model}
    pixels, build = (N, 3, 224, 224), small.bert_of_transformers
    return [
        *(
            Row(f"{package} {name}", partial(makers[package], name, num_classes=C), pixels, train=False)
            for package, name in PACKAGED
        ),
        Row("transformers BertForSequenceClassification", build, (N, T), False, "layers.0.bert.embeddings"),
    ]


def rows() -> list[Row]:
    """Every architecture of the first table."""
    mha, lstm, gru = (partial(kind, E) for kind in (nn.MultiheadAttention, nn.LSTM, nn.GRU))
    time_major = (T, N, E)
    return [
        Row("MLP, ReLU", lambda: nn.Sequential(nn.Linear(E, E), nn.ReLU(), nn.Linear(E, C))),
        Row("CNN, ReLU, max pooling", lambda: small.images(nn.ReLU(), nn.MaxPool2d(2)), IMAGE),
        Row("ResNet, batch norm, training mode", lambda: small.resnet(lambda: nn.BatchNorm2d(E)), IMAGE),
        Row("ResNet, batch norm, evaluation mode", lambda: small.resnet(lambda: nn.BatchNorm2d(E)), IMAGE, train=False),
        Row("ResNet, group norm", lambda: small.resnet(lambda: nn.GroupNorm(2, E)), IMAGE),
        Row("ConvNeXt block", small.convnext, IMAGE),
        Row("MobileNet block, squeeze and excitation, evaluation mode", small.mobilenet, IMAGE, train=False),
        Row("nn.MultiheadAttention, batch first", lambda: small.tokens(mha(2, batch_first=True)), SEQUENCE),
        Row("nn.MultiheadAttention, time first", lambda: small.tokens(mha(2), 0), time_major),
        Row("nn.TransformerEncoderLayer, batch first", lambda: small.tokens(small.encoder(True)), SEQUENCE),
        Row("nn.TransformerEncoderLayer, time first", lambda: small.tokens(small.encoder(False), 0), time_major),
        Row("nn.TransformerEncoderLayer, batch taken for time", lambda: small.tokens(small.encoder(False)), SEQUENCE),
        Row("vision transformer, class token", small.vit, IMAGE),
        Row("BERT-like attention, written out", small.bert, (N, T), layer="0"),
        Row("attention in shifted windows (Swin)", small.swin, IMAGE),
        Row("LSTM, batch first", lambda: small.tokens(lstm(E, batch_first=True)), SEQUENCE),
        Row("LSTM, time first", lambda: small.tokens(lstm(E), 0), time_major),
        Row("GRU, batch first", lambda: small.tokens(gru(E, batch_first=True)), SEQUENCE),
        Row("GRU, time first", lambda: small.tokens(gru(E), 0), time_major),
        Row("MLP on time-major tokens", lambda: small.tokens(nn.Sequential(nn.Linear(E, E), nn.ReLU()), 0), time_major),
        Row("mixture of experts, all weighted by a gate", lambda: small.mixture(small.dense)),
        Row("mixture of experts, samples sent to one by index", lambda: small.mixture(small.routed), batch_dim=0),
        Row("mixup inside: h + h.flip(0)", lambda: small.between(lambda h: 0.7 * h + 0.3 * h.flip(0))),
        Row("mixup inside: h + h[permutation]", lambda: small.between(lambda h: 0.7 * h + 0.3 * h[torch.randperm(N)])),
        Row("custom Function", lambda: small.between(small.Doubled.apply)),
        Row("custom Function, batch_dim=0", lambda: small.between(small.Doubled.apply), batch_dim=0),
        Row("custom Function, register_row_local", small.registered),
        Row("checkpoint, use_reentrant=False", lambda: small.checkpointed(False)),
        Row("checkpoint, use_reentrant=True", lambda: small.checkpointed(True)),
    ]


def node_of(reason: str) -> str:
    found = NODE.search(reason)
    return f"`{found[0]}`" if found else reason


def cells(row: Row) -> list[str]:
    """Name, loop, split, tangent: "yes", or the node that refuses."""
    found = {}
    for name, second in (("split", False), ("tangent", True)):
        try:
            explained = row.task(second=second).explain(*row.batch())
            found[name] = "yes" if explained.strategy == name else node_of(explained.refused[name])
            found.setdefault("loop", "yes")
        except ValueError as refusal:
            found[name] = node_of(str(refusal))
            found.setdefault("loop", found[name])
    return [row.name, found["loop"], found["split"], found["tangent"]]


def text(found: list[Row]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # batch norm in training mode, nested tensors of attention
        return table(["architecture", "loop", "split", "tangent"], [cells(row) for row in found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the tables into docs/gradients.md")
    options = parser.parse_args()
    tables = {name: text(found) for name, found in (("architectures", rows()), ("packages", packaged())) if found}
    if options.write:
        fill = lambda m: f"{m[1]}\n{tables[m[2]]}\n\n{m[3]}" if m[2] in tables else m[0]  # noqa: E731
        PAGE.write_text(BLOCK.sub(fill, PAGE.read_text()))
    else:
        print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()

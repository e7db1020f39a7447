"""The networks of the step table are the published ones."""

import pytest
import torch
from networks import NETWORKS, VisionTransformer, resnet50
from torch import nn

from margin_kernels.experiments.models import wide_resnet
from margin_kernels.task.capture import Taps

PARAMETERS = {
    "wrn28_10_gn": 36_479_194,
    "wrn28_10_bn": 36_479_194,
    "resnet50_gn": 25_557_032,
    "resnet50_bn": 25_557_032,
    "vit_b16": 86_567_656,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name) -> None:
    with torch.device("meta"):
        model = NETWORKS[name].build()
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    norms = (nn.GroupNorm, nn.LayerNorm) if name != name.removesuffix("_bn") else (nn.BatchNorm2d,)
    assert not any(isinstance(module, norms) for module in model.modules())


SMALL = {
    "wide ResNet": (lambda: wide_resnet(norm="group", depth=10, width=1), ("stage*",), 32, 3),
    "ResNet-50": (lambda: resnet50("batch", classes=10), ("stage?_?",), 64, 16),
    "vision transformer": (lambda: VisionTransformer(32, 16, 32, 2, 4, 10), ("blocks.*",), 32, 2),
}


@pytest.mark.parametrize("name", SMALL)
def test_the_hidden_taps_are_the_outputs_of_the_blocks(name) -> None:
    build, layers, size, blocks = SMALL[name]
    model = build()
    captured = Taps(model, layers).capture(model, torch.rand(2, 3, size, size))
    assert captured.logits.shape == (2, 10) and len(captured.taps) == blocks
    assert captured.head is not None or name == "vision transformer"

"""Second derivatives through attention: refused in words where PyTorch has none, right where it has."""

import pytest
import torch
import torch.nn.functional as F
from support.gradients import gradients
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from margin_kernels import AdversarialMarginLoss, LargeMarginLoss, MarginSensitivityLoss, MarginTask


class Attention(nn.Module):
    """Two heads over five tokens: PyTorch's fused kernel, or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.qkv, self.last, self.head = nn.Linear(8, 24), nn.Linear(40, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v) if self.fused else torch.softmax(q @ k.mT / 2, -1) @ v
        return self.head(torch.tanh(self.last(attended.transpose(1, 2).flatten(1))))


def attention_gradients(fused: bool, loss: nn.Module, layers: tuple[str, ...] | None) -> list[Tensor]:
    torch.manual_seed(0)
    model = Attention(fused).double()
    x, y = torch.randn(6, 5, 8, dtype=torch.float64), torch.randint(4, (6,))
    return gradients(MarginTask(model, loss, layers)(x, y)["loss"], model)


LOSSES = [
    (LargeMarginLoss(second_order=True, gamma=5.0), ("input", "last")),
    (MarginSensitivityLoss(), None),
    (AdversarialMarginLoss(), None),
]


@pytest.mark.parametrize(("loss", "layers"), LOSSES)
def test_fused_attention_is_refused_with_the_remedy(loss, layers):
    with pytest.raises(ValueError, match=r"ScaledDotProduct.*sdpa_kernel\(torch.nn.attention.SDPBackend.MATH\)"):
        attention_gradients(True, loss, layers)


@pytest.mark.parametrize(("loss", "layers"), LOSSES)
def test_the_remedy_gives_the_gradients_of_attention_written_out(loss, layers):
    with sdpa_kernel(SDPBackend.MATH):
        found = attention_gradients(True, loss, layers)
    for ours, wanted in zip(found, attention_gradients(False, loss, layers), strict=True):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "layers"),
    [(LargeMarginLoss(second_order=True, gamma=5.0), ("last",)), (LargeMarginLoss(gamma=5.0), ("input", "last"))],
)
def test_fused_attention_before_the_taps_or_in_first_order_is_no_obstacle(loss, layers):
    fused, written_out = (attention_gradients(fused, loss, layers) for fused in (True, False))
    for ours, wanted in zip(fused, written_out, strict=True):
        assert wanted.abs().max() > 1e-6
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)

"""The losses as nn.Module: loss(logits, target, ...) on tensors of one forward pass, or through MarginTask."""

from .large_margin import LargeMarginLoss, Margins

__all__ = ["LargeMarginLoss", "Margins"]

"""The losses as nn.Module: loss(logits, target, ...) on tensors of one forward pass, or through MarginTask."""

from .adversarial import AdversarialMarginLoss, AdversarialMargins
from .large_margin import LargeMarginLoss, Margins

__all__ = ["AdversarialMarginLoss", "AdversarialMargins", "LargeMarginLoss", "Margins"]

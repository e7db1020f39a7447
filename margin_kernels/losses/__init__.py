"""The losses as nn.Module: loss(logits, target, ...) on tensors of one forward pass, or through MarginTask."""

from .adversarial import AdversarialMarginLoss, AdversarialMargins
from .large_margin import LargeMarginLoss
from .margins import Margins
from .one_to_n import OneToNLoss, OneToNMargins
from .sensitivity import MarginSensitivityLoss, SensitivityMargins

__all__ = [
    "AdversarialMarginLoss",
    "AdversarialMargins",
    "LargeMarginLoss",
    "MarginSensitivityLoss",
    "Margins",
    "OneToNLoss",
    "OneToNMargins",
    "SensitivityMargins",
]

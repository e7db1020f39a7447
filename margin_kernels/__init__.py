"""Large-margin training for PyTorch classifiers at the price of cross-entropy."""

from . import functional
from .backends import BackendError
from .losses import LargeMarginLoss, MarginSensitivityLoss, OneToNLoss
from .task import MarginTask
from .version import __version__

__all__ = [
    "BackendError",
    "LargeMarginLoss",
    "MarginSensitivityLoss",
    "MarginTask",
    "OneToNLoss",
    "__version__",
    "functional",
]

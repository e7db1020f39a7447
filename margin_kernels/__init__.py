"""Large-margin training for PyTorch classifiers at the price of cross-entropy."""

from . import functional
from .backends import BackendError
from .losses import LargeMarginLoss
from .task import MarginTask
from .version import __version__

__all__ = ["BackendError", "LargeMarginLoss", "MarginTask", "__version__", "functional"]

"""Large-margin training for PyTorch classifiers at the price of cross-entropy."""

from . import functional
from .backends import BackendError
from .version import __version__

__all__ = ["BackendError", "__version__", "functional"]

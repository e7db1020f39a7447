"""Large-margin training for PyTorch classifiers at the price of cross-entropy."""

from . import functional, gradients, presets
from .backends import BackendError
from .bench import BenchRow, BenchTable, bench
from .deepfool import DeepFoolResult, deepfool
from .losses import AdversarialMarginLoss, LargeMarginLoss, MarginSensitivityLoss, OneToNLoss
from .memory import keep_freed_memory
from .monitor import MarginMonitor, MarginSummary
from .task import Explanation, MarginTask, SuggestedGamma, suggest_gamma
from .version import __version__

__all__ = [
    "AdversarialMarginLoss",
    "BackendError",
    "BenchRow",
    "BenchTable",
    "DeepFoolResult",
    "Explanation",
    "LargeMarginLoss",
    "MarginMonitor",
    "MarginSensitivityLoss",
    "MarginSummary",
    "MarginTask",
    "OneToNLoss",
    "SuggestedGamma",
    "__version__",
    "bench",
    "deepfool",
    "functional",
    "gradients",
    "keep_freed_memory",
    "presets",
    "suggest_gamma",
]


def __dir__() -> list[str]:
    """The public names: submodules that were imported on the way are not among them."""
    return sorted(__all__)

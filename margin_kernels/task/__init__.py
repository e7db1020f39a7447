"""Model and loss as one module."""

from .explain import Explanation
from .suggest_gamma import SuggestedGamma, suggest_gamma
from .task import MarginTask

__all__ = ["Explanation", "MarginTask", "SuggestedGamma", "suggest_gamma"]

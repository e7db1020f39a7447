"""Model and loss as one module."""

from .explain import Explanation
from .task import MarginTask

__all__ = ["Explanation", "MarginTask"]

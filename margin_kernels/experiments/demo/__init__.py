"""Two comparisons that need no data files: scikit-learn's digits, and two rectangles in the plane."""

from . import digits, plane

__all__ = ["digits", "plane"]

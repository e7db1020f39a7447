"""The command line `margin-kernels`."""

from .commands import main

__all__ = ["main"]

"""The op functions: importing this module compiles nothing, but imports triton and registers the custom ops."""

from .competitors import competitors
from .dual_norm import dual_norm
from .margin_hinge import margin_hinge

__all__ = ["competitors", "dual_norm", "margin_hinge"]

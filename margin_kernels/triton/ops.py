"""The op functions: importing this module compiles nothing, but imports triton and registers the custom ops."""

from .competitors import competitors
from .deepfool_step import deepfool_step
from .dual_norm import dual_norm
from .margin_hinge import margin_hinge
from .one_to_n import one_to_n
from .row_distance import row_distance

__all__ = ["competitors", "deepfool_step", "dual_norm", "margin_hinge", "one_to_n", "row_distance"]

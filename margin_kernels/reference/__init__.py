"""Plain PyTorch, differentiable to any order: THE definition of every op.

Oracle of the tests, baseline of the benchmarks, fallback where nothing compiled can run, and the backend for
torch.func transforms. Arguments are checked by `margin_kernels.checks` before they come here.
"""

from .competitors import competitors
from .deepfool_step import deepfool_step
from .dual_norm import dual_norm
from .margin_hinge import margin_hinge
from .one_to_n import one_to_n
from .row_distance import row_distance

__all__ = ["competitors", "deepfool_step", "dual_norm", "margin_hinge", "one_to_n", "row_distance"]

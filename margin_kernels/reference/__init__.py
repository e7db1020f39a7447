"""Plain PyTorch, differentiable to any order: THE definition of every op.

Oracle of the tests, baseline of the benchmarks, fallback where nothing compiled can run, and the backend for
torch.func transforms. Arguments are checked by `margin_kernels.checks` before they come here.
"""

from .competitors import competitors
from .dual_norm import dual_norm
from .margin_hinge import margin_hinge

__all__ = ["competitors", "dual_norm", "margin_hinge"]

"""What is minimised: the losses of a config as tasks."""

from .objective import (
    OBJECTIVES,
    LogitTask,
    build,
    check_parts,
    hinge,
    in_medians,
    kl_divergence,
    layers,
    per_tap,
    unit,
)

__all__ = [
    "OBJECTIVES",
    "LogitTask",
    "build",
    "check_parts",
    "hinge",
    "in_medians",
    "kl_divergence",
    "layers",
    "per_tap",
    "unit",
]

"""What is minimised: the losses of a config as tasks."""

from .objective import (
    OBJECTIVES,
    LogitTask,
    build,
    hinge,
    in_medians,
    kl_divergence,
    layers,
    of_the_whole_batch,
    per_tap,
    unit,
)

__all__ = [
    "OBJECTIVES",
    "LogitTask",
    "build",
    "hinge",
    "in_medians",
    "kl_divergence",
    "layers",
    "of_the_whole_batch",
    "per_tap",
    "unit",
]

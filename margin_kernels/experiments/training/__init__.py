"""The training loop, its checkpoints and its progress, and what a step costs."""

from .progress import Meter
from .timing import time_steps
from .trainer import EXPECTED, RESUMABLE, Trainer, TrainingError, build_optimiser, learning_rate, resolve_device

__all__ = [
    "EXPECTED",
    "RESUMABLE",
    "Meter",
    "Trainer",
    "TrainingError",
    "build_optimiser",
    "learning_rate",
    "resolve_device",
    "time_steps",
]

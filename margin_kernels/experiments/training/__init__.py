"""The training loop, its checkpoints and its progress, and what a step costs."""

from . import errors
from .checkpoint import load_state
from .progress import Meter, Output
from .timing import time_steps
from .trainer import EXPECTED, RESUMABLE, Trainer, TrainingError, build_optimiser, learning_rate, resolve_device

__all__ = [
    "EXPECTED",
    "RESUMABLE",
    "Meter",
    "Output",
    "Trainer",
    "TrainingError",
    "build_optimiser",
    "errors",
    "learning_rate",
    "load_state",
    "resolve_device",
    "time_steps",
]

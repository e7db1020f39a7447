"""The training loop, its checkpoints and its progress, and what a step costs."""

from . import errors
from .checkpoint import load_state
from .optimiser import build_optimiser, learning_rate
from .processes import ALONE, TIMEOUT, Processes, ProcessesError, join
from .progress import Meter, Output, duration
from .timing import TOLERANCE, of_its_own_loss, reliable, time_steps
from .trainer import EXPECTED, RESUMABLE, Trainer, TrainingError, resolve_device

__all__ = [
    "ALONE",
    "EXPECTED",
    "RESUMABLE",
    "TIMEOUT",
    "TOLERANCE",
    "Meter",
    "Output",
    "Processes",
    "ProcessesError",
    "Trainer",
    "TrainingError",
    "build_optimiser",
    "duration",
    "errors",
    "join",
    "learning_rate",
    "load_state",
    "of_its_own_loss",
    "reliable",
    "resolve_device",
    "time_steps",
]

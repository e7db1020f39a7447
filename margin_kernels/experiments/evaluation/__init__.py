"""What a trained network is worth: accuracy, attacks, distances to the decision boundary."""

from margin_kernels.modes import eval_mode

from . import attacks, by_name, histogram
from .attacks import ifgsm, logit_gap
from .distance import signed_distance, tap_names
from .measure import METHODS, SIDES, accuracy, boundary_norms, check_images, evaluate, hits

__all__ = [
    "METHODS",
    "SIDES",
    "accuracy",
    "attacks",
    "boundary_norms",
    "by_name",
    "check_images",
    "eval_mode",
    "evaluate",
    "histogram",
    "hits",
    "ifgsm",
    "logit_gap",
    "signed_distance",
    "tap_names",
]

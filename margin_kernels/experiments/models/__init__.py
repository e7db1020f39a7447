"""Networks by name, and trained ones as files."""

from .networks import MODELS, Center, build, default_shape, has_norm, hidden_of, hidden_taps, normalisation, wide_resnet
from .saved import CheckpointError, check_saved, check_weights, load_model, save_model, weights_digest

__all__ = [
    "MODELS",
    "Center",
    "CheckpointError",
    "build",
    "check_saved",
    "check_weights",
    "default_shape",
    "has_norm",
    "hidden_of",
    "hidden_taps",
    "load_model",
    "normalisation",
    "save_model",
    "weights_digest",
    "wide_resnet",
]

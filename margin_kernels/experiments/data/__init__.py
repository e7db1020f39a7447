"""Images and labels in train, validation and test splits."""

from ..config import DATASETS
from .dataset import augmented, flip_labels, load, of, units
from .idx import DataError
from .split import Dataset, Split

__all__ = ["DATASETS", "DataError", "Dataset", "Split", "augmented", "flip_labels", "load", "of", "units"]

"""Images and labels in train, validation and test splits."""

from .dataset import DATASETS, Dataset, Split, augmented, flip_labels, load, of, units
from .idx import DataError

__all__ = ["DATASETS", "DataError", "Dataset", "Split", "augmented", "flip_labels", "load", "of", "units"]

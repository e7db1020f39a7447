"""Models x points x seeds: sweep files, and the processes that train and evaluate their cells."""

from .file import Cell, Option, cell_name, chosen, find, labels, published, read, shipped, words
from .run import Options, Runner

__all__ = [
    "Cell",
    "Option",
    "Options",
    "Runner",
    "cell_name",
    "chosen",
    "find",
    "labels",
    "published",
    "read",
    "shipped",
    "words",
]

"""Models x points x seeds: sweep files, and the processes that train and evaluate their cells."""

from .cell import Cell, Option, cell_name, select, words
from .file import find, labels, published, read, shipped
from .job import Job
from .run import Options, Runner

__all__ = [
    "Cell",
    "Job",
    "Option",
    "Options",
    "Runner",
    "cell_name",
    "find",
    "labels",
    "published",
    "read",
    "select",
    "shipped",
    "words",
]

"""Models x points x seeds: sweep files, and the processes that train and evaluate their cells."""

from .cell import Cell, Option, cell_name, select, words
from .estimates import Estimate, duration, estimate
from .file import budget_of, find, labels, published, read, shipped
from .job import Job
from .run import Options, Runner

__all__ = [
    "Cell",
    "Estimate",
    "Job",
    "Option",
    "Options",
    "Runner",
    "budget_of",
    "cell_name",
    "duration",
    "estimate",
    "find",
    "labels",
    "published",
    "read",
    "select",
    "shipped",
    "words",
]

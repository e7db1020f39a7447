"""What runs and sweeps leave behind: files, and tables of means."""

from . import summary
from .files import finite, flatten, machine, versions, write_atomic, write_csv, write_json, write_text
from .summary import MEASURES, Measure, Record

__all__ = [
    "MEASURES",
    "Measure",
    "Record",
    "finite",
    "flatten",
    "machine",
    "summary",
    "versions",
    "write_atomic",
    "write_csv",
    "write_json",
    "write_text",
]

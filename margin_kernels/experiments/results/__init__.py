"""What runs and sweeps leave behind: files, records, and tables of means."""

from . import summary
from .files import finite, flatten, machine, versions, write_atomic, write_csv, write_json, write_text
from .lines import RECORDS, Records, common, differences, dumps, merged
from .record import SINGLE_SAMPLES, Epoch, Evaluation, Record, Run, Tried, changed_settings, differing
from .study import Study
from .summary import MEASURES, Measure

__all__ = [
    "MEASURES",
    "RECORDS",
    "SINGLE_SAMPLES",
    "Epoch",
    "Evaluation",
    "Measure",
    "Record",
    "Records",
    "Run",
    "Study",
    "Tried",
    "changed_settings",
    "common",
    "differences",
    "differing",
    "dumps",
    "finite",
    "flatten",
    "machine",
    "merged",
    "summary",
    "versions",
    "write_atomic",
    "write_csv",
    "write_json",
    "write_text",
]

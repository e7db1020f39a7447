"""What runs and sweeps leave behind: files, records, and tables of means."""

from . import shape, summary
from .checksum import ChecksumError, digest, sealed, sealed_line, unsealed
from .files import (
    finite,
    flatten,
    locked,
    machine,
    read_json,
    read_text,
    sweep_temporary,
    versions,
    write_atomic,
    write_csv,
    write_json,
    write_text,
)
from .lines import CANDIDATES, RECORDS, Records, common, differences, dumps, merged
from .record import SINGLE_SAMPLES, Epoch, Evaluation, Record, Run, Tried, changed_settings, differing
from .replaced import REPLACED, replacing, settle
from .study import Study
from .summary import MEASURES, Measure

__all__ = [
    "CANDIDATES",
    "MEASURES",
    "RECORDS",
    "REPLACED",
    "SINGLE_SAMPLES",
    "ChecksumError",
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
    "digest",
    "dumps",
    "finite",
    "flatten",
    "locked",
    "machine",
    "merged",
    "read_json",
    "read_text",
    "replacing",
    "sealed",
    "sealed_line",
    "settle",
    "shape",
    "summary",
    "sweep_temporary",
    "unsealed",
    "versions",
    "write_atomic",
    "write_csv",
    "write_json",
    "write_text",
]

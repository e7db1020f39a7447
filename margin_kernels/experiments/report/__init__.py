"""Pages, figures and tables of evaluated runs and of sweeps."""

from . import figures, page, study_page, table
from .page import write_bytes

__all__ = ["figures", "page", "study_page", "table", "write_bytes"]

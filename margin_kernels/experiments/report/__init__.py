"""Pages, figures and tables of evaluated runs and of sweeps."""

from . import attacked, figures, page, study_page, table
from .page import write_bytes

__all__ = ["attacked", "figures", "page", "study_page", "table", "write_bytes"]

"""Pages, figures and tables of evaluated runs and of sweeps."""

from . import attacked, choices, figures, labels, page, study_page, table, takeaway
from .page import write_bytes

__all__ = ["attacked", "choices", "figures", "labels", "page", "study_page", "table", "takeaway", "write_bytes"]

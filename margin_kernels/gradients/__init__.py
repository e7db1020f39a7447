"""How D and the gradients of the parameters are obtained: one replaceable strategy, chosen by `choose`."""

from .autograd_graph import refusal
from .choose import choose
from .request import Captured, Request
from .structure import register_row_local

__all__ = ["Captured", "Request", "choose", "refusal", "register_row_local"]

"""Chosen values and whether they lie at the edge of the grid they were chosen from, where a wider one may win."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..results import Tried

CHOSEN, EDGE, ONLY = "\N{CHECK MARK} chosen", "edge of the grid", "the only value tried"


def at_edge(options: Sequence[dict[str, Any]], chosen: dict[str, Any]) -> bool:
    """Whether a number of the chosen combination is the smallest or the largest of several that were tried."""
    for key, value in chosen.items():
        tried = {option[key] for option in options if _number(option.get(key))}
        if _number(value) and len(tried) > 1 and value in (min(tried), max(tried)):
            return True
    return False


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def marks(options: Sequence[Tried]) -> list[str]:
    """The mark of each option of one model: "" where it was not chosen."""
    values = [tried.values for tried in options]
    return [mark(tried.chosen, at_edge(values, tried.values), len(values)) for tried in options]


def mark(chosen: bool, edge: bool, tried: int) -> str:
    """What stands beside an option of `tried`."""
    if not chosen:
        return ""
    return ONLY if tried == 1 else f"{CHOSEN}, {EDGE}" if edge else CHOSEN


def sentence(found: Sequence[str]) -> str:
    """What is to be said of the marks of a table: how many choices are edges of their grids."""
    chosen = [text for text in found if CHOSEN in text]
    edges = sum(EDGE in text for text in chosen)
    if not edges:
        return ""
    return f"{edges} of {len(chosen)} choices lie at the edge of the grid: a wider one may win."

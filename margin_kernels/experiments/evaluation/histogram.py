"""Per-sample distances as counts in fixed bins: what a record keeps for its densities.

    edges_i = width sinh(u_i),  u equally spaced from -REACH to REACH        BINS bins, the outermost hold the rest

About as wide as `width / 13` near 0 and a thirteenth of the value far from it, so that distances of 0.01 and of 10 are
resolved alike. Negative: misclassified. The same bins for every record: those of several seeds are added up.
"""

from __future__ import annotations

from typing import Any

import numpy as np

REACH = 6.0
BINS = 160
# what the bins of each measure are linear below: l2 norms of perturbations of images in [0, 1], and relative ones
WIDTHS = {"deepfool_norm": 0.05, "rho_adv": 0.005}


def edges(measure: str) -> np.ndarray:
    """The edges [BINS + 1] of a measure's bins: up to 10.1 (deepfool_norm) and 1.01 (rho_adv)."""
    return WIDTHS[measure] * np.sinh(np.linspace(-REACH, REACH, BINS + 1))


def counts(values: Any, measure: str) -> list[int]:
    """How many of `values` [N] lie in each bin; None and NaN, where no boundary was found, are in none."""
    found = np.array(values, dtype=float)
    found = found[~np.isnan(found)]
    limits = edges(measure)
    return np.histogram(found.clip(limits[0], limits[-1]), limits)[0].tolist()


def density(total: np.ndarray, measure: str, resolution: float) -> tuple[np.ndarray, np.ndarray]:
    """Edges [B + 1] and density [B], with integral 1, of counts [BINS]; neighbouring bins are merged until each is at
    least as wide as `resolution`."""
    limits = edges(measure)
    if total.shape != (BINS,):
        raise ValueError(f"evaluation.histograms.{measure} must have {BINS} counts, got {list(total.shape)}")
    kept = [0]
    for i in range(1, BINS + 1):
        if limits[i] - limits[kept[-1]] >= resolution or i == BINS:
            kept.append(i)
    merged = np.add.reduceat(total, kept[:-1])
    return limits[kept], merged / (np.diff(limits[kept]) * total.sum())


def quantile(total: np.ndarray, measure: str, share: float) -> float:
    """The upper edge of the bin in which the share is reached."""
    reached = np.searchsorted(total.cumsum(), share * total.sum())
    return float(edges(measure)[1 + min(reached, BINS - 1)])

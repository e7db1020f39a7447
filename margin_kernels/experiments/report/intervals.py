"""95 % intervals of what the tables show.

    share p of N images     (p + z^2 / 2N -+ z sqrt(p (1 - p) / N + z^2 / 4N^2)) / (1 + z^2 / N)    Wilson, one seed
    mean of S seeds         mean -+ t s / sqrt(S), t that of Student's distribution with S - 1 degrees of freedom

The first is about other test images for this very network, the second about other seeds on these test images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.special import ndtri, stdtrit

from ..config import EvaluationConfig

LEVEL = 0.95

Interval = tuple[float, float]


def wilson(share: float, count: int, level: float = LEVEL) -> Interval:
    """Of a share of `count` images. Raises ValueError for a share that is none, and for no image."""
    if not (0 <= share <= 1 and count > 0):
        raise ValueError(f"a share must be between 0 and 1 and of at least one image, got {share} of {count}")
    z = float(ndtri((1 + level) / 2))
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    below = 1 + z * z / count
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


def student(values: Sequence[float], level: float = LEVEL) -> Interval | None:
    """Of the mean of independent values; None of fewer than two."""
    if len(values) < 2:
        return None
    mean = statistics.fmean(values)
    half = float(stdtrit(len(values) - 1, (1 + level) / 2)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def apart(one: Interval, other: Interval) -> bool:
    """Whether two intervals have no number in common."""
    return one[1] < other[0] or other[1] < one[0]


def counted(evaluation: dict[str, Any], asked: EvaluationConfig, part: str) -> int:
    """Test images of which a measurement is a share: `part` is clean, fgsm, ifgsm, worst or noise. An evaluation of an
    earlier version has no counts: they are what its config asks for."""
    samples = int(evaluation["samples"])
    fgsm = _at_most(asked.attack_samples, samples)
    found = {
        "fgsm": fgsm,
        "ifgsm": _at_most(asked.ifgsm_samples, fgsm),
        "noise": _at_most(asked.noise_samples, samples),
    }
    found |= {"clean": samples, **evaluation.get("counts", {})}
    found["worst"] = found["ifgsm"] or found["fgsm"]  # IFGSM attacks some of the images that FGSM does
    return int(found[part])


def _at_most(asked: int | None, there: int) -> int:
    return there if asked is None else min(asked, there)

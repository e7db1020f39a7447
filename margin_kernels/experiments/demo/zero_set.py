"""The decision boundary of a small ReLU network in the plane, exactly: the segments on which z_1 = z_0, and how far
from them points are.

    g(x) = z_1 - z_0, x in R^2        distance(x) = min over {b: g(b) = 0} of ||x - b||_2

A network of linear layers and ReLUs is affine on each convex polygon into which the lines of its neurons cut the plane:
a layer cuts the polygons of the layer before. On each polygon that is left, g = 0 is a segment. No gradient is followed
and nothing is linearised, so that what DeepFool reports can be held against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from torch import nn

Array = np.ndarray


def zero_set(model: nn.Sequential, box: float) -> Array:
    """The segments [S, 2, 2] (ends, coordinates) of g = 0 within [-box, box]^2, in float64; `model` consists of
    nn.Linear and nn.ReLU and maps [N, 2] to [N, 2]. Raises ValueError for another layer."""
    pieces = [(box * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]]), np.eye(2), np.zeros(2))]
    for layer in model:
        if isinstance(layer, nn.Linear):
            w, b = (tensor.detach().double().cpu().numpy() for tensor in (layer.weight, layer.bias))
            pieces = [(polygon, w @ slope, w @ offset + b) for polygon, slope, offset in pieces]
        elif isinstance(layer, nn.ReLU):
            pieces = [part for piece in pieces for part in _rectified(*piece)]
        else:
            raise ValueError(f"layers must be Linear or ReLU, got {type(layer).__name__}")
    found = []
    for polygon, slope, offset in pieces:
        ends = _crossing(polygon, polygon @ (slope[1] - slope[0]) + offset[1] - offset[0])
        if ends is not None:
            found.append(ends)
    return np.array(found).reshape(-1, 2, 2)


def distances(points: Array, segments: Array) -> Array:
    """Distance of each point [N, 2] to the nearest of the segments [S, 2, 2], [N]; inf where there is none."""
    if not len(segments):
        return np.full(len(points), math.inf)
    start, along = segments[:, 0], segments[:, 1] - segments[:, 0]
    length = np.maximum((along**2).sum(1), np.finfo(float).tiny)
    share = (((points[:, None] - start) * along).sum(2) / length).clip(0, 1)  # [N, S]: where the foot lies
    return np.linalg.norm(points[:, None] - start - share[..., None] * along, axis=2).min(1)


def _rectified(polygon: Array, slope: Array, offset: Array) -> Iterator[tuple[Array, Array, Array]]:
    """The polygons [V, 2] that the neurons x -> slope x + offset cut `polygon` into, with the maps behind the ReLU."""
    parts = [polygon]
    for w, b in zip(slope, offset, strict=True):
        parts = [half for part in parts for half in _cut(part, part @ w + b)]
    for part in parts:
        on = slope @ part.mean(0) + offset > 0
        yield part, slope * on[:, None], offset * on


def _cut(polygon: Array, values: Array) -> list[Array]:
    """`polygon` [V, 2] in two where an affine function, `values` [V] at its corners, changes sign."""
    if values.min() >= 0 or values.max() <= 0:
        return [polygon]
    return [_side(polygon, values), _side(polygon, -values)]


def _side(polygon: Array, values: Array) -> Array:
    """The part of `polygon` on which the affine function is not negative."""
    corners = []
    for i, j in _edges(polygon):
        if values[i] >= 0:
            corners.append(polygon[i])
        if values[i] * values[j] < 0:
            corners.append(_between(polygon, values, i, j))
    return np.array(corners)


def _crossing(polygon: Array, values: Array) -> Array | None:
    """The segment [2, 2] of `polygon` on which the affine function is 0, None where there is none."""
    ends = [polygon[i] for i in range(len(polygon)) if values[i] == 0]
    ends += [_between(polygon, values, i, j) for i, j in _edges(polygon) if values[i] * values[j] < 0]
    return np.array(ends[:2]) if len(ends) > 1 else None


def _edges(polygon: Array) -> list[tuple[int, int]]:
    return [(i, (i + 1) % len(polygon)) for i in range(len(polygon))]


def _between(polygon: Array, values: Array, i: int, j: int) -> Array:
    """The point of an edge at which the affine function is 0."""
    return polygon[i] + values[i] / (values[i] - values[j]) * (polygon[j] - polygon[i])

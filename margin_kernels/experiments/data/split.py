"""Images and labels: a split, and the three of a dataset."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """Images uint8 or fp32 [N, C, H, W] or [N, D] (uint8 is divided by 255 batch by batch) and labels int64 [N]; how
    the images were preprocessed."""

    images: Tensor
    labels: Tensor
    preprocess: str = "none"

    @property
    def bounds(self) -> tuple[float, float]:
        """What an attacked image is clipped to; whitened images have no bounds."""
        return (0.0, 1.0) if self.preprocess == "none" else (-math.inf, math.inf)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor | slice, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """fp32 images and labels of the samples at `index`, on `device`."""
        images, labels = self.images[index].to(device), self.labels[index].to(device)
        return (images.float().div_(255) if images.dtype == torch.uint8 else images), labels

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in their order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.batch(slice(start, start + size), device)

    def mean_image(self) -> Tensor:
        """Mean over the samples, fp32 [C, H, W]."""
        total = torch.zeros(self.images.shape[1:], dtype=torch.float64)
        for images, _ in self.batches(1000):
            total += images.sum(0, dtype=torch.float64)
        return (total / len(self)).float()

    def part(self, which: slice) -> Split:
        """The samples of a slice."""
        return replace(self, images=self.images[which], labels=self.labels[which])

    def head(self, count: int | None) -> Split:
        """The first `count` samples (all for None)."""
        return self if count is None else self.part(slice(count))


@dataclass(frozen=True)
class Dataset:
    """Three splits, the number of classes, and the shape of one image, (C, H, W), or (D,) of vectors."""

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    shape: tuple[int, ...]
    class_names: tuple[str, ...]

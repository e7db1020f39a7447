"""Global contrast normalisation and ZCA whitening, in which [M] has CIFAR-10.

    GCN   x' = scale (x - mean of x) / ||x - mean of x||_2, over all pixels of an image; 0 for a constant one
    ZCA   x'' = P (x' - m),   P = (S + bias I)^(-1/2) symmetric;   m, S mean and covariance of the training images

[M] names the two and gives no constants: scale 55, about sqrt(3072), which makes pixels of CIFAR-10 of unit size, and
bias 0.1 are those of pylearn2, which published numbers of that time go back to. A whitened image has no bounds of its
own: attacks are not clipped, and radii and norms are in its units.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 55.0
BIAS = 0.1
CHUNK = 2000  # images at a time: no second copy of the data set


class Whitening:
    """Whitening(images): fitted to training images uint8 or fp32 [N, C, H, W]; whitening(images) -> fp32 of that shape.

    Raises ValueError for no images and for images of another shape.
    """

    def __init__(self, images: Tensor) -> None:
        if not len(images):
            raise ValueError("whitening needs at least one training image")
        self.shape = images.shape[1:]
        count, size = len(images), self.shape.numel()
        total = torch.zeros(size, dtype=torch.float64)
        square = torch.zeros(size, size, dtype=torch.float64)
        for part in images.split(CHUNK):
            flat = contrast_normalised(part)
            total += flat.sum(0, dtype=torch.float64)
            square += flat.T @ flat
        mean = total / count
        values, vectors = torch.linalg.eigh(square / count - mean.outer(mean))
        # rounding may leave an eigenvalue of 0 a little below it
        scaled = vectors * (values.clamp_min(0) + BIAS).rsqrt()
        self.mean, self.matrix = mean.float(), (scaled @ vectors.T).float()

    def __call__(self, images: Tensor) -> Tensor:
        if images.shape[1:] != self.shape:
            raise ValueError(f"images are {list(images.shape[1:])} each, whitening was fitted to {list(self.shape)}")
        result = torch.empty(images.shape)
        for part, whitened in zip(images.split(CHUNK), result.split(CHUNK), strict=True):
            whitened.view(len(part), -1).copy_((contrast_normalised(part) - self.mean) @ self.matrix)
        return result


def contrast_normalised(images: Tensor) -> Tensor:
    """GCN of images uint8 or fp32 [N, C, H, W] -> fp32 [N, C H W]; the same whatever factor the pixels have."""
    flat = images.flatten(1).float()
    centred = flat - flat.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    # a constant image is 0 but for the rounding of its mean
    constant = norm <= 1e-6 * flat.norm(dim=1, keepdim=True)
    return torch.where(constant, 0, SCALE * centred / norm)

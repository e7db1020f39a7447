"""Inputs with labels, the same ones in every test. A file fixes what it needs: batch = partial(batches.normal, n=5)."""

import torch
from torch import Tensor


def normal(
    n: int = 6,
    shape: tuple[int, ...] = (6,),
    classes: int = 5,
    seed: int = 1,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """x [n, *shape], normal times `scale` and drawn in float64 for every dtype, and labels [n] below `classes`."""
    generator = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(classes, (n,), generator=generator)

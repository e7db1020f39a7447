"""Batch norm in training mode, which couples the samples of a batch, held at its running statistics for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def training_batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of the model that are in training mode."""
    # Not by modules(), whose generators inside generators cost as much as a layer.
    found, seen, open_ = [], {model}, [model]
    while open_:
        module = open_.pop()
        if isinstance(module, _BatchNorm) and module.training:
            found.append(module)
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                open_.append(child)
    return found


@contextmanager
def running_statistics(modules: list[_BatchNorm]) -> Iterator[None]:
    """Batch norms in eval mode, on copies of their statistics.

    Copies, because the backward reads the statistics again and the next forward changes them in place, which autograd
    does not notice.
    """
    saved: list[tuple[_BatchNorm, Tensor, Tensor]] = []
    for module in modules:
        if module.running_mean is None or module.running_var is None:
            raise ValueError('batchnorm="frozen" needs running statistics, and one has track_running_stats=False')
        saved.append((module, module.running_mean, module.running_var))
    try:
        for module, mean, variance in saved:
            module.training = False
            module.running_mean, module.running_var = mean.clone(), variance.clone()
        yield
    finally:
        for module, mean, variance in saved:
            module.training = True
            module.running_mean, module.running_var = mean, variance

"""One thread at a time for steps that change a model while they run: batch norms set to running statistics, buffers put
back. Ordinary steps do nothing of the kind, and several threads may take them on one model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

# The thread that changes a model right now.
_running: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_guard = threading.Lock()


def check_unchanged(model: nn.Module) -> None:
    """Raises RuntimeError where another thread changes the model right now."""
    if _running.get(model, threading.get_ident()) != threading.get_ident():
        raise RuntimeError(
            "another thread is in a step of this model that changes it meanwhile (AdversarialMarginLoss, or "
            'batchnorm="frozen"): give each thread a model of its own, copy.deepcopy(model), or take turns'
        )


@contextmanager
def exclusive(model: nn.Module) -> Iterator[None]:
    """Inside, this thread may change the model. Raises RuntimeError where another one does."""
    with _guard:
        check_unchanged(model)
        entered = model not in _running
        _running[model] = threading.get_ident()
    try:
        yield
    finally:
        if entered:
            with _guard:
                del _running[model]

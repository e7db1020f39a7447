"""checkpoint.pt: everything that a run needs to go on bit for bit. Weights, optimiser, scaler, random states, epoch,
history and config, by torch.save, loaded with weights_only=True."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..models import CheckpointError
from ..results import write_atomic


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes checkpoint.pt atomically."""
    write_atomic(folder / "checkpoint.pt", lambda file: torch.save(state, file))


def load_state(folder: Path) -> dict[str, Any]:
    """Reads checkpoint.pt onto the CPU."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise CheckpointError(f"{path}: nothing to resume; start without --resume.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated zip, a foreign pickle: torch raises several types and none names the file
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}: {error}).") from error

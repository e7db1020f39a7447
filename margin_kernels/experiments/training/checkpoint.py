"""checkpoint.pt: everything that a run needs to go on bit for bit. Weights, optimiser, scaler, random states, epoch,
history and config, by torch.save, loaded with weights_only=True; behind that their checksum."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from ..models import CheckpointError
from ..results import ChecksumError, sealed, unsealed, write_atomic

KEYS = {"config", "epoch", "history", "model", "optimiser", "scaler", "order", "random", "cuda_random"}


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes checkpoint.pt atomically."""
    content = io.BytesIO()
    torch.save(state, content)
    write_atomic(folder / "checkpoint.pt", lambda file: file.write(sealed(content.getvalue())))


def load_state(folder: Path) -> dict[str, Any]:
    """Reads checkpoint.pt onto the CPU. Raises CheckpointError where it is missing, damaged or of another program."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        raise CheckpointError(f"{path}: nothing to resume; start without --resume.")
    try:
        content = unsealed(path.read_bytes(), path)
    except ChecksumError as error:
        raise CheckpointError(f"{error}; start anew with --overwrite.") from None
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign pickle: torch raises several types and none names the file
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}).") from error
    if not isinstance(state, dict) or not set(state) >= KEYS:
        raise CheckpointError(f"{path}: not a checkpoint of this program; start anew with --overwrite.")
    return state

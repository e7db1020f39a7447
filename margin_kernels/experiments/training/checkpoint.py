"""checkpoint.pt: everything that a run needs to go on bit for bit. Weights, optimiser, scaler, random states, epoch,
history and config, by torch.save, loaded with weights_only=True; behind that their checksum."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from ..models import CheckpointError
from ..results import ChecksumError, sealed, unsealed, write_atomic
from ..results.checksum import MARK

SEAL = len(MARK) + 64  # bytes of the checksum at the end
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
        content = unsealed(_content(path), path)
    except ChecksumError as error:
        raise CheckpointError(f"{error}; start anew with --overwrite.") from None
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign pickle: torch raises several types and none names the file
        raise CheckpointError(f"{path}: not a readable checkpoint ({type(error).__name__}).") from error
    if not isinstance(state, dict) or not set(state) >= KEYS:
        raise CheckpointError(f"{path}: not a checkpoint of this program; start anew with --overwrite.")
    return state


def _content(path: Path) -> bytes:
    """The bytes of a file, read where its end is that of a checkpoint: a file of zeros may be larger than memory."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - SEAL))
        if MARK not in file.read(SEAL):
            return b""
    return path.read_bytes()


def check_optimiser(optimiser: torch.optim.Optimizer, fresh: torch.optim.Optimizer) -> None:
    """Raises ValueError where the state that was read is not one of `fresh`, which has taken one step: fused steps
    write to these tensors without a look at their shape."""
    for group, other in zip(optimiser.param_groups, fresh.param_groups, strict=True):
        changed = [key for key in other if key not in ("params", "lr") and group.get(key) != other[key]]
        if changed:
            raise ValueError(f"the optimiser must have the {', '.join(changed)} of the config")
    (names,) = {tuple(sorted(state)) for state in fresh.state.values()} or {()}
    for parameter in (one for group in optimiser.param_groups for one in group["params"]):
        state = optimiser.state.get(parameter) or {}  # none of a weight that has had no gradient
        if state and tuple(sorted(state)) != names:
            raise ValueError(f"the optimiser must have {', '.join(names) or 'nothing'} of a weight, got {list(state)}")
        for name, value in state.items():
            shape = torch.Size() if name == "step" else parameter.shape
            if not isinstance(value, torch.Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"the optimiser's {name} must be a tensor of shape {list(shape)}")

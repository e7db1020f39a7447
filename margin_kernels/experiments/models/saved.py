"""A trained network as files: model.safetensors, its weights, and model.json, the network's name, options, image shape
and classes, so that `load_model` needs no config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import nn

from ..results import write_atomic, write_json
from .networks import build


class CheckpointError(ValueError):
    """A checkpoint is missing, unreadable, or belongs to another run; the message says which and why."""


def save_model(folder: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Writes model.safetensors and model.json; `description` holds name, shape, classes, options (of models.build)."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_atomic(folder / "model.safetensors", lambda file: file.write(save(weights)))
    write_json(folder / "model.json", description)


def load_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a run's folder, in eval mode, and its description."""
    description_path, weights_path = folder / "model.json", folder / "model.safetensors"
    for path in (description_path, weights_path):
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; {folder} is not the folder of a trained run.")
    description = json.loads(description_path.read_text())
    model = build(description["name"], tuple(description["shape"]), description["classes"], **description["options"])
    model.load_state_dict(load_file(str(weights_path)))
    return model.eval(), description

"""A trained network as files: model.safetensors, its weights, and model.json, the network's name, options, image shape
and classes, so that `load_model` needs no config. The weights hold a checksum of both files."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..config import is_code, text_digest
from ..results import digest, read_json, write_atomic, write_json
from .networks import build


class CheckpointError(ValueError):
    """A checkpoint is missing, unreadable, or belongs to another run; the message says which and why."""


def save_model(folder: Path, model: nn.Module, description: dict[str, Any]) -> None:
    """Writes model.safetensors and model.json; `description` holds name, shape, classes, options (of models.build)."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_json(folder / "model.json", description)
    content = save(weights, {"sha256": digest(weights, read_json(folder / "model.json"))})
    write_atomic(folder / "model.safetensors", lambda file: file.write(content))


def check_saved(folder: Path) -> None:
    """Reads the weights of a run's folder. Raises CheckpointError as `load_model`, but runs no code of the user's: of
    such a network checksum and numbers alone are looked at."""
    weights, description = _read(folder)
    if is_code(str(description.get("name"))):
        check_weights(weights, weights)
    else:
        load_model(folder)


def _read(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the description of a run's folder, as their checksum says."""
    description_path, weights_path = _existing(folder, "model.json"), _existing(folder, "model.safetensors")
    description = read_json(description_path)
    with _opened(weights_path) as file:
        found = (file.metadata() or {}).get("sha256")
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if found is None:
        raise CheckpointError(f"{weights_path} must hold its checksum, which is missing; train it again.")
    if found != digest(weights, description):
        raise CheckpointError(
            f"{weights_path} is damaged, or not the one of {description_path}: it has another checksum; train it again."
        )
    return weights, description


def load_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a run's folder, in eval mode, and its description. The code that a network of the user's
    stands in is imported and called. Raises CheckpointError where a file is missing, damaged or of another program."""
    weights, description = _read(folder)
    description_path, weights_path = folder / "model.json", folder / "model.safetensors"
    try:
        if is_code(description["name"]):  # which meta tensors may not suit
            check_weights(weights, _described(description).state_dict())
        else:
            with torch.device("meta"):  # no memory: a description may ask for any size
                check_weights(weights, _described(description).state_dict())
        model = _described(description)
        model.load_state_dict(weights)
        if is_code(description["name"]) and description.get("code") != text_digest("model", description["name"]):
            warnings.warn(
                f"{folder}: the file of {description['name']} has another text than when these weights were trained: "
                "numbers may be those of another network",
                stacklevel=2,
            )
    except Exception as error:  # a description of another program: any type
        raise CheckpointError(
            f"{description_path}: not the network of {weights_path} ({type(error).__name__}: {error}); train it again."
        ) from error
    return model.eval(), description


def _described(description: dict[str, Any]) -> nn.Module:
    return build(description["name"], tuple(description["shape"]), description["classes"], **description["options"])


def check_weights(found: Mapping[str, Any], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError where `found` are not the tensors of a network by name, shape and type, or are not finite."""
    if found.keys() != expected.keys():
        raise ValueError(f"weights must be {', '.join(expected)}, got {', '.join(map(str, found)) or 'none'}")
    for name, tensor in expected.items():
        own = found[name]
        if not isinstance(own, Tensor) or own.shape != tensor.shape or own.dtype != tensor.dtype:
            about = f"{own.dtype} {list(own.shape)}" if isinstance(own, Tensor) else type(own).__name__
            raise ValueError(f"{name} must be {tensor.dtype} {list(tensor.shape)}, got {about}")
        if own.is_floating_point() and not bool(own.isfinite().all()):
            raise ValueError(f"{name} must be finite, got NaN or infinity")


def weights_digest(folder: Path) -> str:
    """The checksum that the weights of a run hold. Raises CheckpointError where there are none."""
    with _opened(_existing(folder, "model.safetensors")) as file:
        return str((file.metadata() or {}).get("sha256"))


def _existing(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / name}: missing; {folder} is not the folder of a trained run.")
    return folder / name


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises CheckpointError where it cannot be read."""
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error}); train it again.") from None

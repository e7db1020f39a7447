"""Checksums inside the files that a run goes on from or is judged by: a changed byte is told and never used.

checkpoint.pt        torch's bytes, then b"\\nsha256 " and 64 hexadecimal digits of all before
model.safetensors    "sha256" in its metadata, of model.json and each tensor (name, type, shape, bytes)
records.jsonl        the last key of every line, "crc32": 8 hexadecimal digits of the line without it
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MARK = b"\nsha256 "
_CRC = re.compile(r',"crc32":"([0-9a-f]{8})"\}$')


class ChecksumError(ValueError):
    """A file is not as it was written; the message names it and says what to do."""


def sealed(content: bytes) -> bytes:
    """`content` with its checksum behind it."""
    return content + MARK + hashlib.sha256(content).hexdigest().encode()


def unsealed(content: bytes, path: Path) -> bytes:
    """The inverse of `sealed`. Raises ChecksumError for content that is not as it was."""
    body, mark, digest = content.rpartition(MARK)
    if not mark:
        raise ChecksumError(f"{path} must end with its checksum: it is cut off, or of an earlier version")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ChecksumError(f"{path} is damaged: its content does not have the checksum that it ends with")
    return body


def digest(tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Of a network: its description and its weights."""
    found = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def sealed_line(line: str) -> str:
    """A line of JSON, an object that is not empty, with its checksum as the last key."""
    if not line.removeprefix("{").removesuffix("}").strip():
        raise ValueError("an empty line has no checksum")
    return f'{line[:-1]},"crc32":"{zlib.crc32(line.encode()):08x}"}}'


def unsealed_line(line: str) -> str:
    """The inverse of `sealed_line`. Raises ValueError where the checksum is missing or another one."""
    found = _CRC.search(line)
    if found is None:
        raise ValueError('it must end with "crc32", its checksum')
    body = line[: found.start()] + "}"
    if zlib.crc32(body.encode()) != int(found[1], 16):
        raise ValueError("it does not have the checksum that it ends with")
    return body

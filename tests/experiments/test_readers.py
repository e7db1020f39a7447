"""Readers of files that others wrote: whatever stands in them, they return what was asked for or say what is wrong.

`make test-fuzz` draws many more contents than `make test`.
"""

import gzip
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from margin_kernels.experiments import config, data, sweeps
from margin_kernels.experiments.data import cifar, idx

CASES = int(os.environ.get("MARGIN_KERNELS_FUZZ", "100"))
drawn = settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
INT = st.integers(-(2**31), 2**31 - 1)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
YAML = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=8), below, max_size=3),
    max_leaves=8,
)


def damaged(content: bytes, draw: st.DataObject) -> bytes:
    """`content` cut, prolonged, or with other bytes."""
    changed = bytearray(content)
    for at in draw.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        changed[at] = draw.draw(st.integers(0, 255))
    return bytes(changed[: draw.draw(st.integers(0, len(content)))]) + draw.draw(st.binary(max_size=8))


@drawn
@given(st.tuples(INT, INT, INT, INT), st.binary(max_size=64))
def test_idx_images_are_read_or_refused(header, content):
    try:
        images = idx.parse_images(struct.pack(">iiii", *header) + content, Path("file"))
    except idx.DataError as error:
        assert str(error).startswith("file")
    else:
        assert header[0] == 2051 and images.shape == header[1:] and images.tobytes() == content


@drawn
@given(st.tuples(st.sampled_from([2049, 2051]), INT | st.integers(0, 8)), st.binary(max_size=8))
def test_idx_labels_are_read_or_refused(header, content):
    try:
        labels = idx.parse_labels(struct.pack(">ii", *header) + content, Path("file"))
    except idx.DataError as error:
        assert str(error).startswith("file")
    else:
        assert header == (2049, len(content)) and labels.tobytes() == content and all(label < 10 for label in content)


@drawn
@given(st.data())
def test_damaged_idx_files_are_read_or_refused(tmp_path, draw):
    contents = {
        stem: struct.pack(">iiii", 2051, 6, 2, 2) + bytes(24)
        if "images" in stem
        else struct.pack(">ii", 2049, 6) + bytes(6)
        for stem in (idx.TRAIN_IMAGES, idx.TRAIN_LABELS, idx.TEST_IMAGES, idx.TEST_LABELS)
    }
    broken = draw.draw(st.sampled_from(sorted(contents)))
    zipped = draw.draw(st.booleans())
    for path in tmp_path.iterdir():
        path.unlink()
    for stem, content in contents.items():
        stored = gzip.compress(content) if zipped else content
        (tmp_path / (stem + ".gz" * zipped)).write_bytes(damaged(stored, draw) if stem == broken else stored)
    try:
        dataset = data.load("mnist", tmp_path, validation_size=2, verify=False)
    except ValueError as error:
        assert str(tmp_path) in str(error) or "data." in str(error)
    else:
        assert len(dataset.train.images) == len(dataset.train.labels) > 0 and dataset.test.labels.max() < 10


@drawn
@given(st.data())
def test_damaged_cifar_batches_are_read_or_refused(draw):
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [3, 9]}
    binary = draw.draw(st.booleans())
    content = bytes([3]) + bytes(3072) + bytes([9]) + bytes(3072) if binary else pickle.dumps(batch, protocol=2)
    try:
        images, labels = (cifar.parse_binary_batch if binary else cifar.parse_python_batch)(
            damaged(content, draw), "file"
        )
    except cifar.DataError as error:
        assert str(error).startswith("file")
    else:
        assert images.shape[1:] == (3, 32, 32) and len(images) == len(labels) and set(labels.tolist()) <= set(range(10))


def test_archives_and_files_that_unpack_to_too_much_are_refused_before_they_are_read(tmp_path, monkeypatch):
    for module in (idx, cifar):
        monkeypatch.setattr(module, "LARGEST", 10_000)
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(bytes(1_000_000)))
    with pytest.raises(idx.DataError, match=r"file.gz must have at most 10,000 bytes when it is unzipped, got more"):
        idx._content(path, "mnist", idx.TRAIN_IMAGES, verify=False)
    with pytest.raises(idx.DataError, match=r"md5 of mnist must be f68b3c2dcbeaaa9fbdd348bbdeb94873, got "):
        idx._content(path, "mnist", idx.TRAIN_IMAGES, verify=True)  # before anything is unzipped
    path.write_bytes(bytes(10_001))
    with pytest.raises(idx.DataError, match=r"file.gz must have at most 10,000 bytes, got 10,001"):
        idx._content(path, "mnist", idx.TRAIN_IMAGES, verify=False)
    archive = tmp_path / cifar.ARCHIVES[0]
    with tarfile.open(archive, "w:gz") as file:
        member = tarfile.TarInfo("data_batch_1")
        member.size = 20_000
        file.addfile(member, io.BytesIO(bytes(20_000)))
    with pytest.raises(cifar.DataError, match="must hold at most 10,000 bytes when it is unpacked, got more"):
        cifar._members(archive)


@drawn
@given(st.binary(max_size=60) | YAML.map(lambda value: yaml.safe_dump(value).encode()))
def test_yaml_files_are_mappings_or_refused(tmp_path, content):
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    try:
        assert isinstance(config.read_yaml(path), dict)
    except config.ConfigError as error:
        assert str(error).startswith(str(path))


@drawn
@given(st.sampled_from(config.keys()), YAML)
def test_any_value_of_a_key_is_taken_or_refused(key, value):
    section, _, name = key.rpartition(".")
    nested = {name: value}
    for part in reversed(section.split(".") if section else []):
        nested = {part: nested}
    try:
        config.check(config.typed(nested))
    except config.ConfigError as error:
        assert str(error)


@drawn
@given(st.dictionaries(st.sampled_from(sorted(sweeps.file.KEYS)), YAML, max_size=4))
def test_any_sweep_file_is_read_or_refused(tmp_path, content):
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump({"models": {"plain": {}}, **content}))
    try:
        assert all(cell.name for cell in sweeps.read(path))
    except config.ConfigError as error:
        assert str(error)

"""Data files are believed only after they were checked, and every refusal names the file, what was found and what
was expected."""

import gzip
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT

from margin_kernels.experiments import data
from margin_kernels.experiments.data import DataError, cifar, idx
from margin_kernels.experiments.data.whitening import Whitening

REAL = Path(os.environ.get("MARGIN_KERNELS_DATA", ROOT.parent / "shared" / "data"))


def real(name: str) -> Path:
    if not (REAL / name).is_dir():
        pytest.skip(f"no real {name}: set MARGIN_KERNELS_DATA to a folder that holds {name}/")
    return REAL / name


def images_content(pixels: np.ndarray) -> bytes:
    return struct.pack(">iiii", 2051, *pixels.shape) + pixels.tobytes()


def labels_content(labels: np.ndarray) -> bytes:
    return struct.pack(">ii", 2049, len(labels)) + labels.astype(np.uint8).tobytes()


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.arange(20) % 10


@pytest.fixture
def mnist_folder(tmp_path, pixels, labels):
    for stem in (idx.TRAIN_IMAGES, idx.TEST_IMAGES):
        (tmp_path / (stem + ".gz")).write_bytes(gzip.compress(images_content(pixels)))
    for stem in (idx.TRAIN_LABELS, idx.TEST_LABELS):
        (tmp_path / stem).write_bytes(labels_content(labels))  # gzipped images beside plain labels: both are read
    return tmp_path


def batch_dict(count=10, seed=0):
    rng = np.random.default_rng(seed)
    return {b"data": rng.integers(0, 256, (count, 3072), dtype=np.uint8), b"labels": list(range(10)) * (count // 10)}


@pytest.fixture
def cifar_folder(tmp_path):
    for seed, name in enumerate(cifar.BATCHES):
        (tmp_path / name).write_bytes(pickle.dumps(batch_dict(seed=seed), protocol=2))
    return tmp_path


def test_digits_splits_are_stratified_disjoint_and_repeatable():
    first, again = data.load("digits"), data.load("digits")
    for name in ("train", "validation", "test"):
        a, b = getattr(first, name), getattr(again, name)
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        assert a.images.min() == 0 and a.images.max() == 1 and a.images.dtype == torch.float32
        share = torch.bincount(a.labels, minlength=10) / len(a)
        assert (share - 0.1).abs().max() < 0.01
    assert [len(first.train), len(first.validation), len(first.test)] == [1077, 360, 360]
    # the digits have few exact duplicates; a leak of a whole split would show as hundreds
    train = {tuple(row) for row in first.train.images.flatten(1).tolist()}
    for split in (first.validation, first.test):
        assert sum(tuple(row) in train for row in split.images.flatten(1).tolist()) == 0


def test_idx_files_give_the_pixels_and_labels_written(mnist_folder, pixels, labels):
    dataset = data.load("mnist", mnist_folder, validation_size=5, verify=False)
    assert torch.equal(dataset.train.images, torch.from_numpy(pixels[:15, None]))
    assert torch.equal(dataset.validation.images, torch.from_numpy(pixels[15:, None]))
    assert torch.equal(dataset.validation.labels, torch.from_numpy(labels[15:]))
    x, y = dataset.train.batch(torch.tensor([3, 1]))
    assert torch.equal(x, torch.from_numpy(pixels[[3, 1], None]).float() / 255) and y.tolist() == [3, 1]


@pytest.mark.parametrize("layout", [".", "mnist", "MNIST/raw"])
def test_usual_folder_layouts_are_found(mnist_folder, tmp_path_factory, layout):
    root = tmp_path_factory.mktemp("parent")
    (root / layout).mkdir(parents=True, exist_ok=True)
    for path in mnist_folder.iterdir():
        (root / layout / path.name).write_bytes(path.read_bytes())
    assert len(data.load("mnist", root, validation_size=5, verify=False).train) == 15


def test_a_wrong_checksum_is_refused_by_name(mnist_folder):
    with pytest.raises(
        DataError, match=r"train-images.*md5 of mnist must be f68b3c2dcbeaaa9fbdd348bbdeb94873, got [0-9a-f]{32}"
    ):
        data.load("mnist", mnist_folder, validation_size=5)


def damaged(folder, stem, content):
    for path in (folder / stem, folder / (stem + ".gz")):
        path.unlink(missing_ok=True)
    (folder / stem).write_bytes(content)
    with pytest.raises(DataError) as caught:
        data.load("mnist", folder, validation_size=5, verify=False)
    assert str(folder / stem) in str(caught.value)
    return str(caught.value)


def test_truncated_foreign_and_mismatched_idx_files_are_refused(mnist_folder, pixels, labels):
    whole = images_content(pixels)
    message = damaged(mnist_folder, idx.TRAIN_IMAGES, whole[:-1])
    assert "truncated" in message and "15,695" in message and "15,696" in message
    assert "too long" in damaged(mnist_folder, idx.TRAIN_IMAGES, whole + b"\0")
    assert "magic number must be 2051, got 2049" in damaged(
        mnist_folder, idx.TRAIN_IMAGES, labels_content(np.zeros(99, int))
    )
    assert "an idx header must have 16 bytes, got 7" in damaged(mnist_folder, idx.TRAIN_IMAGES, whole[:7])
    (mnist_folder / idx.TRAIN_IMAGES).write_bytes(whole)
    assert "must have 20 labels, as many as" in damaged(mnist_folder, idx.TRAIN_LABELS, labels_content(labels[:19]))
    assert "labels must be in [0, 9], got 10" in damaged(
        mnist_folder, idx.TRAIN_LABELS, labels_content(np.full(20, 10))
    )


def test_a_truncated_gzip_and_a_missing_file_are_refused(mnist_folder):
    path = mnist_folder / (idx.TEST_IMAGES + ".gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="not a complete gzip file"):
        data.load("mnist", mnist_folder, validation_size=5, verify=False)
    path.unlink()
    with pytest.raises(DataError, match=r"t10k-images.*missing; the folder holds t10k-labels"):
        data.load("mnist", mnist_folder, validation_size=5, verify=False)
    with pytest.raises(DataError, match="does not exist"):
        data.load("mnist", mnist_folder / "nowhere")
    with pytest.raises(DataError, match="pass --data-dir"):
        data.load("mnist")


def test_cifar_layouts_agree(cifar_folder, tmp_path_factory):
    python = data.load("cifar10", cifar_folder, validation_size=10, verify=False)
    expected = np.concatenate([batch_dict(seed=i)[b"data"] for i in range(5)]).reshape(-1, 3, 32, 32)
    assert torch.equal(torch.cat([python.train.images, python.validation.images]), torch.from_numpy(expected))

    binary = tmp_path_factory.mktemp("binary")
    for i, name in enumerate(cifar.BATCHES):
        batch = batch_dict(seed=i)
        rows = np.concatenate([np.array(batch[b"labels"], np.uint8)[:, None], batch[b"data"]], 1)
        (binary / (name + ".bin")).write_bytes(rows.tobytes())
    archive = tmp_path_factory.mktemp("archive") / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar_folder, arcname=cifar.PYTHON_FOLDER)
    for source in (binary, archive, archive.parent):
        other = data.load("cifar10", source, validation_size=10, verify=False)
        for split in ("train", "validation", "test"):
            a, b = getattr(python, split), getattr(other, split)
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


class Bomb:
    def __reduce__(self):
        return (os.system, ("echo this must never run > /dev/null",))


def test_a_foreign_pickle_is_refused_before_it_runs():
    with pytest.raises(DataError, match=r"data_batch_1: the pickle asks for (posix|nt).system"):
        cifar.parse_python_batch(pickle.dumps(Bomb(), protocol=2), "data_batch_1")
    with pytest.raises(DataError, match=r"builtins.eval|__builtin__.eval"):
        cifar.parse_python_batch(b"c__builtin__\neval\n(S'1'\ntR.", "data_batch_1")


def test_damaged_cifar_batches_are_refused(cifar_folder):
    good = (cifar_folder / "data_batch_1").read_bytes()
    with pytest.raises(DataError, match="here: not a readable pickle"):
        cifar.parse_python_batch(good[:-100], "here")
    with pytest.raises(DataError, match="must hold a dict with b'data' and b'labels', got"):
        cifar.parse_python_batch(pickle.dumps([1, 2]), "here")
    short = batch_dict()
    short[b"labels"] = short[b"labels"][:-1]
    with pytest.raises(DataError, match="must have 10 labels, one per image, got 9"):
        cifar.parse_python_batch(pickle.dumps(short, protocol=2), "here")
    with pytest.raises(DataError, match="a multiple of 3073"):
        cifar.parse_binary_batch(b"\0" * 3072, "here")
    with pytest.raises(DataError, match=r"data_batch_1: md5 must be [0-9a-f]{32}, got [0-9a-f]{32}"):
        data.load("cifar10", cifar_folder, validation_size=10)
    (cifar_folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3: missing; found data_batch_1, data_batch_2, data_batch_4"):
        data.load("cifar10", cifar_folder, validation_size=10, verify=False)


def test_a_truncated_archive_is_refused(cifar_folder, tmp_path_factory):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.add(cifar_folder, arcname=cifar.PYTHON_FOLDER)
    archive = tmp_path_factory.mktemp("cut") / "cifar-10-python.tar.gz"
    archive.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    with pytest.raises(DataError, match="not a complete tar archive"):
        data.load("cifar10", archive, validation_size=10, verify=False)


def test_label_noise_moves_exactly_the_asked_share_to_other_classes():
    clean = data.load("digits")
    noisy, again = (data.load("digits", label_noise=0.4, seed=3) for _ in range(2))
    changed = clean.train.labels != noisy.train.labels
    assert int(changed.sum()) == round(0.4 * len(clean.train))
    assert noisy.train.labels.min() >= 0 and noisy.train.labels.max() <= 9
    assert torch.equal(noisy.train.labels, again.train.labels)
    assert torch.equal(clean.validation.labels, noisy.validation.labels)
    # every wrong class is drawn about equally often: 1..9 away, 431 flips
    shift = torch.bincount((noisy.train.labels - clean.train.labels)[changed] % 10, minlength=10)
    assert shift[0] == 0 and shift[1:].min() > 25


def test_a_training_fraction_keeps_the_same_samples_for_the_same_seed():
    part, again, other = (data.load("digits", train_fraction=0.125, seed=s) for s in (1, 1, 2))
    assert len(part.train) == int(0.125 * 1077)
    assert torch.equal(part.train.images, again.train.images)
    assert not torch.equal(part.train.images, other.train.images)


@pytest.mark.parametrize(
    "arguments", [{"name": "mnits"}, {"train_fraction": 0.0}, {"label_noise": 1.5}, {"train_fraction": 1e-9}]
)
def test_arguments_out_of_range_raise(arguments):
    with pytest.raises(ValueError, match=r"data\.(name|train_fraction|label_noise) must "):
        data.load(**arguments)


@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.13066), ("fashion_mnist", 0.28604)])
def test_the_real_idx_files_pass_their_checksums(name, mean):
    dataset = data.load(name, real(name))
    pixels = torch.cat([dataset.train.images, dataset.validation.images])
    assert len(pixels) == 60000 and len(dataset.test) == 10000 and len(dataset.validation) == 5000
    assert float(pixels.double().mean()) / 255 == pytest.approx(mean, abs=1e-5)
    assert data.load(name, real(name).parent).test.labels[:3].tolist() == dataset.test.labels[:3].tolist()


def test_an_unzipped_real_file_passes_by_content_and_a_changed_one_does_not(tmp_path):
    for path in real("mnist").iterdir():
        (tmp_path / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))
    data.load("mnist", tmp_path)
    content = bytearray((tmp_path / idx.TEST_LABELS).read_bytes())
    content[100] = (content[100] + 1) % 10
    (tmp_path / idx.TEST_LABELS).write_bytes(content)
    with pytest.raises(
        DataError, match=r"t10k-labels-idx1-ubyte: sha256 of mnist must be ff7bcfd4[0-9a-f]{56}, got [0-9a-f]{64}"
    ):
        data.load("mnist", tmp_path)


def test_fashion_files_are_not_taken_for_digits():
    with pytest.raises(DataError, match="this is the file of fashion_mnist"):
        idx.load_idx("mnist", real("fashion_mnist"))


def test_the_real_cifar_archive_passes_its_checksums():
    dataset = data.load("cifar10", real("cifar10"))
    assert (
        torch.bincount(dataset.train.labels).sum() == 45000
        and torch.bincount(dataset.test.labels).tolist() == [1000] * 10
    )
    pixels = torch.cat([dataset.train.images, dataset.validation.images]).double().mean((0, 2, 3)) / 255
    assert torch.allclose(pixels, torch.tensor([0.49140, 0.48216, 0.44653]).double(), atol=1e-5)


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
def test_augmented_images_are_shifted_and_mirrored_as_drawn(kind):
    x = torch.rand(64, 2, 6, 5, generator=torch.Generator().manual_seed(0))
    result = data.augmented(x, kind, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    shifts = torch.randint(0, 9, (2, 64, 1), generator=generator)[:, :, 0].tolist()
    mirrored = (torch.rand(64, generator=generator) < 0.5).tolist() if kind == "crop_flip" else [False] * 64
    assert len(set(zip(*shifts, strict=True))) > 30 and (kind == "crop" or 20 < sum(mirrored) < 44)
    for n, (down, right, mirror) in enumerate(zip(*shifts, mirrored, strict=True)):
        for row in range(6):
            for column in range(5):
                i, j = row + down - 4, column + right - 4
                expected = x[n, :, i, j] if 0 <= i < 6 and 0 <= j < 5 else torch.zeros(2)
                assert torch.equal(result[n, :, row, 4 - column if mirror else column], expected)


def test_images_stay_as_they_are_without_augmentation():
    x, generator = torch.rand(3, 1, 4, 4), torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert data.augmented(x, "none", generator) is x and torch.equal(generator.get_state(), before)
    with pytest.raises(ValueError, match=r"training.augment must be one of none, crop, crop_flip, got 'flip'"):
        data.augmented(x, "flip", generator)


def literal_whitening(train, images):
    """GCN and ZCA in fp64 by their formulas, image by image."""

    def normalised(batch):
        rows = []
        for image in batch.astype(np.float64):
            centred = image.ravel() - image.mean()
            rows.append(55 * centred / np.linalg.norm(centred))
        return np.array(rows)

    fitted = normalised(train)
    covariance = np.cov(fitted.T, bias=True)
    values, vectors = np.linalg.eigh(covariance + 0.1 * np.eye(len(covariance)))
    return (normalised(images) - fitted.mean(0)) @ (vectors / np.sqrt(values)) @ vectors.T


def test_whitening_is_that_of_a_literal_loop_whatever_the_type_of_the_pixels(pixels):
    rng = np.random.default_rng(1)
    train, other = (rng.integers(0, 256, (count, 3, 4, 4), dtype=np.uint8) for count in (400, 5))
    whitening = Whitening(torch.from_numpy(train))
    for images in (train, other):
        whitened = whitening(torch.from_numpy(images))
        assert whitened.shape == images.shape and whitened.dtype == torch.float32
        np.testing.assert_allclose(whitened.flatten(1).numpy(), literal_whitening(train, images), rtol=2e-4, atol=2e-4)
        scaled = whitening(torch.from_numpy(images).float() / 255)
        torch.testing.assert_close(scaled, whitened, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"images are \[3, 4, 5\] each, whitening was fitted to \[3, 4, 4\]"):
        whitening(torch.zeros(2, 3, 4, 5))
    with pytest.raises(ValueError, match="at least one training image"):
        Whitening(torch.zeros(0, 3, 4, 4))


def test_whitened_images_are_uncorrelated_and_a_constant_image_is_finite():
    torch.manual_seed(0)
    mixed = torch.randn(5000, 48) @ torch.randn(48, 48)  # strongly correlated pixels
    train = mixed.view(5000, 3, 4, 4)
    whitening = Whitening(train)
    flat = whitening(train).flatten(1).double()
    covariance = flat.T @ flat / len(flat)
    values = torch.linalg.eigvalsh(covariance)
    rows = train.flatten(1).double()
    rows = rows - rows.mean(1, keepdim=True)
    before = torch.linalg.eigvalsh(torch.cov((55 * rows / rows.norm(dim=1, keepdim=True)).T, correction=0))
    # each eigenvalue s of the normalised images becomes s / (s + 0.1); the mean of an image was taken off: one is 0
    torch.testing.assert_close(values, before / (before + 0.1), rtol=1e-3, atol=1e-5)
    assert values[0].abs() < 1e-5 and values[1:].min() > 0.3 and values.max() < 1 and before.max() > 10
    constant = torch.stack([torch.full((3, 4, 4), 0.3), torch.zeros(3, 4, 4)])
    whitened = whitening(constant)
    torch.testing.assert_close(
        whitened[0], whitened[1]
    )  # both are 0 before the mean of the training images is taken off
    assert whitened.isfinite().all()


def test_splits_are_whitened_by_the_training_images_that_are_kept(cifar_folder):
    options = {"validation_size": 10, "verify": False, "train_fraction": 0.5, "label_noise": 0.2, "seed": 3}
    plain = data.load("cifar10", cifar_folder, **options)
    whitened = data.load("cifar10", cifar_folder, preprocess="gcn_zca", **options)
    whitening = Whitening(plain.train.images)
    assert len(plain.train) == 20
    for name in ("train", "validation", "test"):
        split, expected = getattr(whitened, name), getattr(plain, name)
        assert torch.equal(split.images, whitening(expected.images)) and torch.equal(split.labels, expected.labels)
        assert (split.preprocess, expected.preprocess) == ("gcn_zca", "none")
        assert split.bounds == (-np.inf, np.inf) and expected.bounds == (0, 1)
    with pytest.raises(ValueError, match=r"data.preprocess must be one of none, gcn_zca, got 'zca'"):
        data.load("digits", preprocess="zca")

"""Image folders, arrays of numpy and CIFAR-100 are read as they were written, or refused by the name of the file."""

import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch

from margin_kernels.experiments import cli, data
from margin_kernels.experiments.config import DataConfig
from margin_kernels.experiments.data import DataError, cifar

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
DRAW = np.random.default_rng(0)


def pixels(*shape):
    return DRAW.integers(0, 256, shape, np.uint8)


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return array


@pytest.fixture
def folder(tmp_path):
    """Two classes, colour, 5 and 2 images each; {split: {class: [image]}} of what was written."""
    written = {
        split: {
            name: [save(tmp_path / split / name / f"{i}.png", pixels(4, 6, 3)) for i in range(count)]
            for name in ("b", "a")
        }
        for split, count in (("train", 5), ("test", 2))
    }
    return tmp_path, written


def test_an_image_folder_is_read_class_by_class(folder):
    path, written = folder
    dataset = data.load("image_folder", path, validation_size=4)
    assert (dataset.num_classes, dataset.class_names, dataset.shape) == (2, ("a", "b"), (3, 4, 6))
    expected = np.stack(written["test"]["a"] + written["test"]["b"])
    assert torch.equal(dataset.test.images, torch.from_numpy(expected).permute(0, 3, 1, 2))
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]
    assert len(dataset.train) == 6 and len(dataset.validation) == 4
    whole = np.stack(written["train"]["a"] + written["train"]["b"])
    held = torch.randperm(10, generator=torch.Generator().manual_seed(0))[:4].sort().values
    assert torch.equal(dataset.validation.images, torch.from_numpy(whole).permute(0, 3, 1, 2)[held])
    assert torch.equal(dataset.validation.labels, held // 5)


def test_val_is_the_test_split_where_there_is_no_other_and_else_the_validation_split(folder):
    path, _ = folder
    shutil.copytree(path / "test", path / "val")
    save(path / "val/a/x.png", pixels(4, 6, 3))
    (path / "train/a/notes.txt").write_text("no image")
    (path / "train/a/.hidden.png").write_text("no image")
    dataset = data.load("image_folder", path)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [10, 5, 4]
    shutil.rmtree(path / "test")
    dataset = data.load("image_folder", path, validation_size=3)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [7, 3, 5]


def test_grey_images_have_one_channel_and_sizes_are_made_equal_on_request(tmp_path):
    for split in ("train", "test"):
        for i, name in enumerate(("x", "y", "z")):
            save(tmp_path / split / name / "0.png", np.full((8, 8), 40 * i, np.uint8))
            save(tmp_path / split / name / "1.JPG", np.full((6, 10), 40 * i, np.uint8))
    with pytest.raises(DataError, match=r"1.JPG must be of 8x8 pixels as 0.png, got 10x6: set data.size"):
        data.load("image_folder", tmp_path, validation_size=1)
    dataset = data.of(DataConfig("image_folder", str(tmp_path), size=[4, 5], validation_size=1))
    assert dataset.shape == (1, 4, 5) and dataset.num_classes == 3
    assert torch.equal(dataset.test.images[:, 0, 0, 0] // 40, dataset.test.labels.to(torch.uint8))
    assert data.of(DataConfig("image_folder", str(tmp_path), size=4, validation_size=1)).shape == (1, 4, 4)


def break_folder(path, how):
    if how == "no test":
        shutil.rmtree(path / "test")
    elif how == "another class":
        save(path / "test/c/0.png", pixels(4, 6, 3))
    elif how == "an empty class":
        (path / "train/c").mkdir()
    elif how == "damaged":
        (path / "train/a/0.png").write_bytes((path / "train/a/0.png").read_bytes()[:60])
    elif how == "no image":
        (path / "train/a/0.png").write_text("hello")
    elif how == "16 bits":
        save(path / "train/a/0.png", DRAW.integers(0, 2**16, (4, 6)).astype(np.uint16))
    elif how == "no test image":
        shutil.rmtree(path / "test")
        (path / "test/a").mkdir(parents=True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no test", "must hold the folders train, and test or val, got train"),
        ("another class", r"test/c must have the name of a class of train, a, b"),
        ("an empty class", "train must hold a folder with images for each of at least 2 classes, got none in c"),
        ("damaged", r"train/a/0.png: not a readable image"),
        ("no image", r"train/a/0.png: not a readable image \(UnidentifiedImageError"),
        ("16 bits", r"train/a/0.png: an image must have 8 bits a channel .*, got I;16"),
        ("no test image", "test must hold images in folders of the classes a, b, got none"),
    ],
)
def test_a_folder_that_is_none_of_images_is_refused(folder, how, message):
    path, _ = folder
    break_folder(path, how)
    with pytest.raises(DataError, match=message):
        data.load("image_folder", path, validation_size=2)


def test_a_network_for_the_classes_of_a_folder_is_trained_and_measured(folder):
    path, _ = folder
    run = str(path / "run")
    options = [
        "--data.name",
        "image_folder",
        "--data-dir",
        str(path),
        "--data.validation_size",
        "4",
        "--model.name",
        "mlp800",
    ]
    options += ["--training.epochs", "1", "--evaluation.timing_repeats", "0", "--evaluation.deepfool_samples", "4"]
    assert cli.main(["train", *options, "--out", run]) == 0
    assert cli.main(["evaluate", run]) == 0


ARRAYS = {
    "x_train": pixels(9, 6, 5, 3),
    "y_train": np.arange(9) % 3,
    "x_test": pixels(6, 6, 5, 3),
    "y_test": np.arange(6) % 3,
}


def test_arrays_of_keras_are_read_channels_first(tmp_path):
    arrays = {**ARRAYS, "y_train": ARRAYS["y_train"][:, None]}
    np.savez(tmp_path / "data.npz", **arrays)
    for place in (tmp_path, tmp_path / "data.npz"):
        dataset = data.load("npz", place, validation_size=3)
        assert (dataset.shape, dataset.num_classes, dataset.class_names) == ((3, 6, 5), 3, ("0", "1", "2"))
        assert torch.equal(dataset.test.images, torch.from_numpy(ARRAYS["x_test"]).permute(0, 3, 1, 2))
        assert torch.equal(dataset.test.labels, torch.arange(6) % 3)
        x, _ = dataset.test.batch(slice(None))
        assert torch.equal(x, dataset.test.images.float() / 255)


@pytest.mark.parametrize("shape,expected", [((6, 5), (1, 6, 5)), ((3, 6, 5), (3, 6, 5)), ((7,), (7,))])
def test_other_layouts_of_arrays(tmp_path, shape, expected):
    floats = {name: DRAW.random((len(ARRAYS[name]), *shape)).astype(">f4") for name in ("x_train", "x_test")}
    held = {"x_val": floats["x_test"][:3], "y_val": ARRAYS["y_test"][:3]}
    np.savez(tmp_path / "data.npz", **{**ARRAYS, **floats, **held})
    dataset = data.load("npz", tmp_path)
    assert dataset.shape == expected and len(dataset.train) == 9
    assert torch.equal(
        dataset.validation.images.flatten(), torch.from_numpy(floats["x_test"][:3].astype("f4")).flatten()
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": pixels(6, 6, 5, 1)}, r"images of test must be \[3, 6, 5\], got \[1, 6, 5\]"),
        (
            {"x_train": pixels(9, 3, 5, 3)},
            r"x_train must be \[N, C, H, W\] or \[N, H, W, C\], and \[9, 3, 5, 3\] may be both",
        ),
        ({"x_train": pixels(9, 5, 5, 2)}, "x_train must have 1, 3 or 4 channels"),
        ({"x_train": ARRAYS["x_train"] * 1.0}, r"x_train: images must be in \[0, 1\], got 0 to 255: divide by 255"),
        ({"y_train": np.arange(8) % 3}, "x_train must have as many labels as images, got 8 and 9"),
        ({"y_train": np.full(9, {}, object)}, r"not a readable .npz file \(ValueError: Object arrays cannot be loaded"),
        ({"y_test": None}, "must hold x_train, y_train, x_test and y_test, got x_train, y_train, x_test"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, changes, message):
    arrays = {name: array for name, array in {**ARRAYS, **changes}.items() if array is not None}
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=message):
        data.load("npz", tmp_path, validation_size=3)


def test_a_file_that_is_none_of_arrays_is_refused(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK hello")
    with pytest.raises(DataError, match=r"a.npz: not a readable .npz file \(BadZipFile"):
        data.load("npz", tmp_path)
    (tmp_path / "b.npz").write_bytes(b"")
    with pytest.raises(DataError, match=r"must hold one .npz file, got 2: give the file itself"):
        data.load("npz", tmp_path)


@pytest.fixture
def cifar100(tmp_path):
    """Both layouts of 200 training and 100 test images, and what is in them."""
    found = {}
    python, binary = tmp_path / "cifar-100-python", tmp_path / "cifar-100-binary"
    python.mkdir()
    binary.mkdir()
    for name, count in (("train", 200), ("test", 100)):
        rows, fine = pixels(count, 3072), np.arange(count)[::-1] % 100
        found[name] = rows.reshape(-1, 3, 32, 32), fine
        batch = {b"data": rows, b"fine_labels": fine.tolist(), b"coarse_labels": [0] * count, b"filenames": []}
        (python / name).write_bytes(pickle.dumps(batch, protocol=2))
        prefix = np.stack([np.zeros(count, np.uint8), fine.astype(np.uint8)], 1)
        (binary / f"{name}.bin").write_bytes(np.concatenate([prefix, rows], 1).tobytes())
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(python, arcname="cifar-100-python")
    return tmp_path, found


@pytest.mark.parametrize("layout", ["cifar-100-python", "cifar-100-binary", "cifar-100-python.tar.gz"])
def test_cifar100_has_its_fine_labels_in_every_layout(cifar100, layout):
    folder, found = cifar100
    dataset = data.load("cifar100", folder / layout, validation_size=50, verify=False)
    assert (dataset.num_classes, len(dataset.class_names), dataset.shape) == (100, 100, (3, 32, 32))
    assert dataset.class_names[0] == "apple" and dataset.class_names[99] == "worm"
    for split, name, part in (
        (dataset.train, "train", slice(150)),
        (dataset.validation, "train", slice(150, 200)),
        (dataset.test, "test", slice(100)),
    ):
        assert np.array_equal(split.images.numpy(), found[name][0][part])
        assert np.array_equal(split.labels.numpy(), found[name][1][part])


def test_other_files_than_those_of_cifar100_are_refused(cifar100):
    folder, _ = cifar100
    with pytest.raises(DataError, match=r"train: md5 must be 16019d7e3df5f24257cddd939b257f8d, got"):
        data.load("cifar100", folder / "cifar-100-python")
    with pytest.raises(
        DataError, match=r"train.bin must hold 50,000 images, 500 of each class, got 200, 2 to 2 of a class"
    ):
        data.load("cifar100", folder / "cifar-100-binary")
    assert cifar.CIFAR100.md5["test"] == "f0ef6b0ae62326f3e7ffdfab6717acfc"
    with pytest.raises(DataError, match=r"must hold a dict with b'data' and b'fine_labels'"):
        cifar.parse_python_batch(pickle.dumps({b"data": 1, b"labels": 2}), "here", cifar.CIFAR100)
    with pytest.raises(DataError, match="must have a multiple of 3074 bytes, 2 labels and 3072 pixels each, got 3,073"):
        cifar.parse_binary_batch(b"\0" * 3073, "here", cifar.CIFAR100)
    with pytest.raises(DataError, match="cifar100: neither train"):
        cifar.find_source(folder / "x", cifar.CIFAR100)


def test_a_checksum_of_the_binary_layout_is_not_made_up():
    """The numbers of images alone are compared, and the docs say so."""
    assert not any(name.endswith(".bin") for name in cifar.CIFAR100.md5)
    assert "binary layout of cifar100 has none here" in " ".join(str(DataConfig.__doc__).split())
    balanced = np.arange(50_000) % 100
    cifar._check_numbers(balanced, "here", cifar.CIFAR100, 50_000)
    with pytest.raises(DataError, match="got 50,000, 499 to 501 of a class"):
        cifar._check_numbers(np.where(np.arange(50_000) == 0, 1, balanced), "here", cifar.CIFAR100, 50_000)

"""Builders of small data sets in the layouts that users have, and what several test files share."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is there: one thread for each of the processes that share the cores

import io
import pickle
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from PIL import Image

from resnet_cifar10 import photo
from torture.harness import Ended, call  # PyTorch is imported where it is needed: xdist's own process reads this file too

ROOT = Path(__file__).parent.parent  # of the repository
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]

# The same examples in every run, and no deadline: a slow machine is no failure.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")

SLOW = ["test_torture.py", "test_ray.py", "test_distributed.py", "test_tensorflow.py", "test_bench.py", "test_train.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take minutes, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


def run(*arguments: str | Path, status: int = 0) -> Ended:
    """Run the command line in this process, which saves its start; where it fails it says why in one line."""
    done = call(*arguments)
    if status:
        done.refused(status)
    assert done.status == status, done.err
    return done


@pytest.fixture(scope="module")
def quick_export() -> Iterator[None]:
    """Leave out the ONNX graph and the threshold that is found with it, for where no test looks at them."""
    from resnet_cifar10 import files, finish

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "export", lambda model, out: files.write(out, b"no graph"))
        patch.setattr(finish, "Classifier", lambda folder: None)
        patch.setattr(finish, "rejection_threshold", lambda classifier, images: 0.0)
        yield


COLOURS = ["red", "green", "blue"]
CONFIG = {
    "architecture": {"depth": 8, "classes": 3},
    "classes": COLOURS,
    "mean": [0.5] * 3,
    "std": [0.25] * 3,
    "temperature": 2.0,
    "rejection_threshold": -1.0,
    "class_directions": np.eye(3, 64).tolist(),
    "contrast_mean": [0.1] * 32,
    "contrast_std": [2.0] * 32,
    "data": "coloured noise",
    "accuracy": {"validation": None, "test": {"accuracy": 81.25, "n": 1600, "interval_95": [79.2, 83.1]}},
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of an untrained network of three classes."""
    import torch

    from resnet_cifar10.export import export
    from resnet_cifar10.model import ResNet
    from resnet_cifar10.storage import save_model

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save_model(folder, ResNet(8, 3), CONFIG)
    export(folder, folder / "model.onnx")
    return folder


def one_line(error: pytest.ExceptionInfo[ValueError]) -> str:
    """Return the sentence for the user: one line, without characters that a terminal would obey."""
    sentence = str(error.value)
    assert sentence and sentence.isprintable(), repr(sentence)
    return sentence


class _Python2Pickler(pickle._Pickler):
    """Writes text and bytes as the `str` of Python 2, which wrote the official files."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012  (the base class has it so)

    def save_python2_str(self, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)

    dispatch[str] = dispatch[bytes] = save_python2_str


def python2_pickle(value: Any) -> bytes:
    """Pickle as Python 2 and the NumPy of its time did."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def batch(images: np.ndarray, labels: list[int]) -> dict[str, Any]:
    """Build the content of one official batch: rows of 3,072 pixels, all red ones first, then green, then blue."""
    names = [f"picture_{i}.png" for i in range(len(labels))]
    data = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    return {"batch_label": "a batch", "labels": labels, "data": data, "filenames": names}


def write_archive(archive: Path, folder: Path) -> Path:
    """Pack a folder of batches under the name that it has in the official archive."""
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    return archive


def encoded(image: np.ndarray, kind: str, **options: Any) -> bytes:
    """Encode one image as the bytes of a PNG, JPEG, ... file."""
    return photo.encoded(Image.fromarray(image), kind, **options)


@pytest.fixture
def cifar_folder(tmp_path: Path) -> Path:
    """The extracted official folder with TRAIN in five batches, and TEST."""
    from torture.inputs import TEST, TRAIN

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in range(5):
        part = slice(10 * i, 10 * i + 10)
        (folder / f"data_batch_{i + 1}").write_bytes(python2_pickle(batch(TRAIN[0][part], TRAIN[1][part])))
    (folder / "test_batch").write_bytes(python2_pickle(batch(*TEST)))
    meta = {"num_cases_per_batch": 10, "label_names": CLASSES, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(python2_pickle(meta))
    return folder


@pytest.fixture
def cifar_archive(cifar_folder: Path, tmp_path: Path) -> Path:
    """The same as the official archive."""
    (tmp_path / "archive").mkdir()
    return write_archive(tmp_path / "archive" / "cifar-10-python.tar.gz", cifar_folder)


@pytest.fixture
def png_parquet(tmp_path: Path) -> Path:
    """The same as parquet files with PNG bytes, the training images in two files."""
    from torture.inputs import TEST, TRAIN, write_parquet

    folder = tmp_path / "parquet" / "plain_text"
    for name, (images, labels), part in (
        ("train-00000-of-00002", TRAIN, slice(0, 30)),
        ("train-00001-of-00002", TRAIN, slice(30, 50)),
        ("test-00000-of-00001", TEST, slice(0, 20)),
    ):
        blobs = [encoded(image, "PNG") for image in images[part]]
        write_parquet(folder / f"{name}.parquet", blobs, labels[part], CLASSES)
    return folder.parent


@pytest.fixture
def class_folders(tmp_path: Path) -> Path:
    """Folders of plain red, green and blue images in several formats and sizes: 6 train, 3 val and 3 test a class."""
    sizes = {"png": (32, 32), "jpg": (100, 60), "bmp": (31, 80), "webp": (64, 64), "gif": (200, 200), "tiff": (5, 5)}
    for part, count in (("train", 6), ("val", 3), ("test", 3)):
        for name, colour in (("blue", (0, 0, 250)), ("green", (0, 250, 0)), ("red", (250, 0, 0))):
            folder = tmp_path / "colours" / part / name
            folder.mkdir(parents=True)
            for kind, size in list(sizes.items())[:count]:
                Image.new("RGB", size, colour).save(folder / f"picture.{kind}")
    return tmp_path / "colours"

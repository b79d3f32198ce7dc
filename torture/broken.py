"""The product broken on purpose, once for each row at least: what the torture suite must notice."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import safetensors
import torch
from PIL import Image

from resnet_cifar10 import cli, files, infer, photo, run_folder, sources, storage, study, train
from resnet_cifar10.data import Split
from resnet_cifar10.settings import Setting

from . import inputs, training, web


@contextmanager
def _instead(old: Any, new: Any) -> Iterator[None]:
    """Replace a function or class in all rooms."""
    training.replace_everywhere(old, new)
    yield
    training.replace_everywhere(new, old)


@contextmanager
def _without_caps() -> Iterator[None]:
    with patch.object(sources, "MAX_PARQUET_BYTES", 1 << 60), patch.object(inputs, "MAKERS", (_bomb,)):
        yield


@contextmanager
def _lenient_settings() -> Iterator[None]:
    def extra(value: str) -> None:
        Setting.model_config["extra"] = value  # type: ignore[typeddict-item]
        Setting.model_rebuild(force=True)

    extra("ignore")
    yield
    extra("forbid")


def _write_in_place(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with vars(files).get("open", open)(path, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def _unverified(path: Path) -> tuple[storage.Tensors, dict[str, Any]]:
    with safetensors.safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
        return tensors, json.loads(file.metadata()["checkpoint"])["state"]


def _forgetful(learner: train.Learner, weights: storage.Tensors, moments: storage.Tensors) -> None:
    _RESTORE(learner, weights, moments)
    learner.optimizer.state.clear()


_RESTORE, _FAIL = train.Learner.restore, cli._fail


@contextmanager
def _never_locked(folder: Path, wait: bool = False) -> Iterator[None]:
    yield


def _unchecked(images: Any, labels: list[int], classes: tuple[str, ...], source: str, where: Path) -> Split:
    return Split(torch.from_numpy(images.copy()), torch.tensor(labels), classes, source)


def _bomb(rng: Any, folder: Path) -> tuple[Path, bool]:
    (folder / "train.parquet").write_bytes(inputs.parquet_bomb("dictionary"))
    return folder, False


BROKEN: dict[str, list[tuple[str, AbstractContextManager[Any]]]] = {  # each can be put in once
    "kill": [
        ("a resume that forgets the optimizer's state", patch.object(train.Learner, "restore", _forgetful)),
        ("a resume that begins anew", _instead(run_folder.load_checkpoint, lambda folder: (None, ""))),
    ],
    "write": [("a writer without rename", _instead(files.write, _write_in_place))],
    "signal": [
        ("always exit status 1", _instead(cli._fail, lambda message, status: _FAIL(message, 1))),
        ("signals are left alone", _instead(study.stop_requests, lambda: nullcontext([]))),
    ],
    "checkpoint": [("a checkpoint loader that does not verify", _instead(storage.read_tensors, _unverified))],
    "full": [("a writer without rename", _instead(files.write, _write_in_place))],
    "read-only": [("no check of the right to write", _instead(run_folder.check_room, lambda folder, parameters: None))],
    "file": [("no check of the path", _instead(run_folder.check_room, lambda folder, parameters: None))],
    "lock": [("a lock that never locks", _instead(run_folder.locked, _never_locked))],
    "refuse": [("no check of a checkpoint's tensors", _instead(storage.check_tensors, lambda where, wanted, tensors: None))],
    "settings": [("unknown keys are let through", _lenient_settings())],
    "data": [
        ("labels are not checked", _instead(sources._checked, _unchecked)),
        ("an archive reader without caps", _without_caps()),
    ],
    "payload": [("Python's own unpickler", _instead(sources._BatchUnpickler, pickle.Unpickler))],
    "model": [("an ONNX file's checksum is not looked at", patch.object(infer, "SEAL", b"nowhere"))],
    "photo": [("Pillow's errors are let through", _instead(photo.read_photo, lambda file: Image.open(file).convert("RGB")))],
    "web": [("a server that fails where it must refuse", patch.object(web, "SABOTAGE", "serve.HTTPException = ValueError; "))],
}

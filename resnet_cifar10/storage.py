"""Files and model folders: written atomically, checked when read, no pickle anywhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .infer import model_folder, read_config
from .model import ResNet

Tensors = dict[str, Tensor]


def write(path: Path, content: bytes | str) -> None:
    """Write a whole file or leave the old one: temporary file in the same folder, fsync, rename, fsync of the folder.

    Raises:
        OSError: Naming the file and the reason.

    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise OSError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):  # it is there only where something went wrong
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write plain values as readable JSON; NaN is refused."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Read a JSON object that has these keys.

    Raises:
        ValueError: Naming the file and the reason.

    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged: not a JSON object")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{path}: damaged: key '{missing[0]}' is missing")
    return value


def write_tensors(path: Path, tensors: Tensors, state: dict[str, Any]) -> None:
    """Write tensors and plain values as one safetensors file with their SHA-256; equal content gives equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"state": state, "sha256": sha256(tensors, state)}, sort_keys=True, allow_nan=False)
    write(path, safetensors.torch.save(tensors, {"checkpoint": text}))


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Read what write_tensors wrote.

    Raises:
        ValueError: If the file is missing, damaged or of another kind.

    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
            checkpoint = json.loads((file.metadata() or {}).get("checkpoint", "{}"))
        if checkpoint["sha256"] != sha256(tensors, checkpoint["state"]):
            raise ValueError("its SHA-256 does not match")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged: {error}") from None
    return tensors, checkpoint["state"]


def sha256(tensors: Tensors, state: dict[str, Any]) -> str:
    """Return the SHA-256 of tensors, with names, types and shapes, and plain values."""
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_tensors(where: str | Path, wanted: Mapping[str, Sequence[int]], tensors: Tensors) -> None:
    """Make sure that a file holds the tensors of these names and shapes, and no other.

    Raises:
        ValueError: Naming the file and the first tensor that is missing, of another shape or unknown.

    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        there, needed = found.get(name, "none"), tuple(wanted[name]) if name in wanted else "none"
        if there != needed:
            raise ValueError(f"{where}: tensor '{name}': found {there}, the network has {needed}")


# --- the model folder ---


def save_model(folder: Path, model: ResNet, config: dict[str, Any]) -> None:
    """Write model.safetensors and config.json; config["architecture"] holds the arguments of ResNet."""
    write_tensors(folder / "model.safetensors", model.state_dict(), {})
    write_json(folder / "config.json", config)


def load_model(model: str | Path) -> tuple[ResNet, dict[str, Any]]:
    """Read the network and configuration of a model folder, a finished run folder or a built-in name.

    Raises:
        ValueError: Naming the file and what is missing or does not fit.

    """
    folder = model_folder(model)
    config = read_config(folder)
    tensors, _ = read_tensors(folder / "model.safetensors")
    classes = config["architecture"].get("classes", 10)
    if classes != len(config["classes"]):
        raise ValueError(f"{folder / 'config.json'}: {len(config['classes'])} classes, but the network gives {classes}")
    try:
        network = ResNet(**config["architecture"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: key 'architecture': {error}") from None
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    check_tensors(folder / "model.safetensors", wanted, tensors)
    network.load_state_dict(tensors)
    return network.eval(), config

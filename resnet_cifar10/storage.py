"""Tensors and model folders: checked when read, no pickle anywhere."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import one_line
from .files import write, write_json
from .infer import model_folder, read_config
from .model import ResNet

Tensors = dict[str, Tensor]


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
    """Write model.safetensors and config.json; config["architecture"] holds the arguments of ResNet.

    What export and Classifier need besides, finish.finish measures.
    """
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
    defaults = {key: value.default for key, value in inspect.signature(ResNet).parameters.items()}  # older models lack some
    config["architecture"] = defaults | config["architecture"] | {"classes": len(config["classes"])}
    try:
        network = ResNet(**config["architecture"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / 'config.json'}: key 'architecture': {one_line(error)}") from None
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    check_tensors(folder / "model.safetensors", wanted, tensors)
    network.load_state_dict(tensors)
    return network.eval(), config

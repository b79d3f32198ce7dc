"""Run folders and model folders: written atomically, checked when read, no pickle anywhere."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
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

ROOM = 16  # times the weights: three checkpoints of up to four (weights, best, two of Adam), and the files of the model
LAST, PREVIOUS = "last.safetensors", "previous.safetensors"
METRICS = ("epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr",
           "train_seconds", "validation_seconds")  # fmt: skip
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
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(f"{path}: cannot be written: {error.strerror}") from None
        raise


def write_json(path: Path, value: Any) -> None:
    """Write plain values as readable JSON; NaN is refused."""
    write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: Naming the file and the reason.

    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


def write_tensors(path: Path, tensors: Tensors, state: dict[str, Any]) -> None:
    """Write tensors and plain values as one safetensors file with their SHA-256; equal content gives equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"state": state, "sha256": _sha256(tensors, state)}, sort_keys=True, allow_nan=False)
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
        if checkpoint["sha256"] != _sha256(tensors, checkpoint["state"]):
            raise ValueError("its SHA-256 does not match")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged: {error}") from None
    return tensors, checkpoint["state"]


def _sha256(tensors: Tensors, state: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_tensors(file: Path, wanted: Mapping[str, Sequence[int]], tensors: Tensors) -> None:
    """Make sure that a file holds the tensors of these names and shapes, and no other.

    Raises:
        ValueError: Naming the file and the first tensor that is missing, of another shape or unknown.

    """
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        there, needed = found.get(name, "none"), tuple(wanted[name]) if name in wanted else "none"
        if there != needed:
            raise ValueError(f"{file}: tensor '{name}': found {there}, the network has {needed}")


# --- the run folder ---


def check_room(folder: Path, parameters: int) -> None:
    """Make sure that a network of so many parameters can be saved into a folder, before hours go into its training.

    Raises:
        ValueError: Naming the folder, what was found and what is needed.

    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{there}: is a file; --out needs a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there}: cannot be written; --out needs a folder that can")
    free, needed = shutil.disk_usage(there).free, ROOM * 4 * parameters
    if free < needed:
        raise ValueError(f"{there}: found {free / 1e6:.1f} MB free; allowed: {needed / 1e6:.1f} MB or more for each run")


def save_checkpoint(folder: Path, tensors: Tensors, state: dict[str, Any]) -> None:
    """Write the newest checkpoint; the one before it is kept."""
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    write_tensors(folder / LAST, tensors, state)


def load_checkpoint(folder: Path) -> tuple[Tensors, dict[str, Any], str] | None:
    """Read the newest undamaged checkpoint of a run.

    Returns:
        Tensors, state and what a user must hear of ("" if nothing), or None for a run that has none yet.

    Raises:
        ValueError: If there are checkpoints, but all are damaged.

    """
    problems = []
    for file in (folder / LAST, folder / PREVIOUS):
        if not file.exists():
            continue
        try:
            tensors, state = read_tensors(file)
        except ValueError as error:
            problems.append(str(error))
            continue
        if problems:
            (folder / LAST).unlink()  # else it would become the one that is kept
        return tensors, state, "".join(f"{problem}; going on from {file.name}" for problem in problems)
    if problems:
        raise ValueError(f"{'; '.join(problems)}; remove {folder} to start this run anew")
    return None


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write metrics.csv whole, so that it never holds a torn row or a row twice."""
    text = io.StringIO()
    writer = csv.DictWriter(text, METRICS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(folder / "metrics.csv", text.getvalue())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read metrics.csv; a value that was not measured is None.

    Raises:
        ValueError: Naming the file and the reason.

    """
    file = folder / "metrics.csv"
    try:
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
        return [{key: int(row[key]) if key == "epoch" else float(row[key]) if row[key] else None for key in METRICS}
                for row in rows]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{file}: not the metrics of a run: {error}") from None


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

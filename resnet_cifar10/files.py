"""Whole files: written atomically, checked when read."""

from __future__ import annotations

import difflib
import errno
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from .errors import one_line, printable, short

Kind = TypeVar("Kind", bound=BaseModel)


def write(path: Path, content: bytes | str) -> None:
    """Write a whole file or leave the old one: temporary file in the same folder, fsync, rename, fsync of the folder.

    Raises:
        ValueError: If the user's choice of the file can't be written.
        OSError: If anything else went wrong, such as a full disk.

    """
    real = Path(os.path.realpath(path))  # of a link, the file
    temporary = real.with_name(f".{path.name}.tmp")
    try:
        if real.exists() and not (real.is_file() or real.is_dir()):  # which a rename would put an end to
            raise ValueError(f"{path}: is a device or a pipe; allowed: a file, or a name that is free")
        real.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
        folder = os.open(real.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        wrong = isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError | FileExistsError)
        wrong |= error.errno == errno.ENAMETOOLONG
        raise (ValueError if wrong else OSError)(f"{path}: cannot be written: {error.strerror}") from None
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
        raise ValueError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged: not a JSON object")
    if missing := [key for key in keys if key not in value]:
        raise ValueError(f"{path}: damaged: key '{missing[0]}' is missing")
    return value


def validated(kind: type[Kind], values: dict[str, Any], where: str) -> Kind:
    """Check plain values against a model of pydantic.

    Raises:
        ValueError: With `where` and what is wrong there.

    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        # an unknown key first: where one is misspelt, the right one is missing too
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"])
        message = f"key '{key}': found {short(first['input'])}; {first['msg'][0].lower()}{first['msg'][1:]}"
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key.lower(), kind.model_fields, n=1)
            help_with = f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(kind.model_fields)}"
            message = f"unknown key '{one_line(key)}'; {help_with}"
        elif first["type"] == "missing":
            message = f"key '{key}' is missing"
        elif first["type"] == "value_error":  # our own sentence
            message = str(first["ctx"]["error"])
        raise ValueError(f"{where}: {message}") from None


def check_writable(folder: Path) -> Path:
    """Make sure that a folder can be written, or made, before work goes into what it is to hold.

    Returns:
        The folder, or the nearest one above it that is there.

    Raises:
        ValueError: Naming the folder, or the one that stops it.

    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{there}: is a file; allowed: a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there}: cannot be written; allowed: a folder that can")
    return there


def portable(path: str | Path) -> str:
    """Show a path as typed, but of an absolute one only what does not name this machine's folders: the name; of a run, two."""
    if Path(path).is_relative_to(Path.cwd()):
        return printable(str(Path(path).relative_to(Path.cwd())))
    parts = Path(path).parts
    return printable("/".join(parts[-2 if parts[-1].startswith("seed-") else -1 :]) if Path(path).is_absolute() else str(path))


def check_file(path: Path, suffix: str) -> None:
    """Make sure that a file can be written, and that its name ends as its kind does: another one may be of another file.

    Raises:
        ValueError: Naming the file, or the folder that stops it.

    """
    if path.suffix.lower() != suffix or path.is_dir():
        raise ValueError(f"{path}: {'is a folder; ' * path.is_dir()}allowed: a file name that ends in {suffix}")
    check_writable(path.parent)

"""Settings x seeds: run what is not done yet."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from .export import export, write_card
from .machine import computes_in_bfloat16, environment, has_compiler, pick_device
from .settings import Setting
from .sources import load
from .storage import read_json, write_json
from .train import split_data, train


def study(settings: Sequence[Setting], data: str | Path, out: Path, device: str = "auto") -> None:
    """Train every setting with each of its seeds; what is done is skipped.

    Raises:
        ValueError: If settings, data, device and output folder do not fit together; before anything is written.

    """
    device = pick_device(device)
    print(f"reading {data}", flush=True)
    read = cache(partial(load, data))
    runs = [(s, seed, out / s.slug / f"seed-{seed}") for s in settings for seed in s.seeds]
    claims = []
    for setting, seed, folder in runs:
        training, validation = split_data(setting, seed, read)
        digests = {"training_sha256": training.sha256, "validation_sha256": validation.sha256}
        claim = {"setting": setting.model_dump(exclude={"seeds"}), "seed": seed, **digests}
        _check_claim(folder, claim)
        claims.append(claim)
    for (_, _, folder), claim in zip(runs, claims, strict=True):
        write_json(folder / "setting.json", claim)
    for number, (setting, seed, folder) in enumerate(runs, 1):
        done = (folder / "model" / "model.onnx").exists()
        print(f"run {number} of {len(runs)}: {setting.name}, seed {seed}: {'is done: ' if done else ''}{folder}", flush=True)
        if not done:
            with locked(folder):
                if not (folder / "result.json").exists():
                    train(setting, seed, read, folder, device, **_how(setting, device))
                write_card(folder / "model")
                export(folder / "model", folder / "model" / "model.onnx")


def _how(setting: Setting, device: str) -> dict[str, Any]:
    """Resolve what a setting leaves to the machine."""
    bfloat16 = setting.precision == "bfloat16" or (setting.precision == "auto" and computes_in_bfloat16(device))
    compiled = setting.compile and has_compiler()
    if setting.compile and not compiled:
        print("no C++ compiler (g++) found: the training step is not compiled and runs slower", flush=True)
    precision = "bfloat16" if bfloat16 else "float32"
    facts = environment(device) | {"precision": precision, "compiled": compiled}
    return {"bfloat16": bfloat16, "compiled": compiled, "environment": facts}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run folder for this process; the operating system frees the lock of a process that died.

    Raises:
        ValueError: Naming the process that holds it.

    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{folder}: process {file.read().strip()} is working on this run") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _check_claim(folder: Path, claim: dict[str, Any]) -> None:
    """Make sure that the folder is free or holds this very run."""
    if (folder / "setting.json").exists():
        found = read_json(folder / "setting.json")
        before, now = ({**value["setting"], **value, "setting": None} for value in (found, claim))
        if differ := [f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]]:
            raise ValueError(f"{folder}: holds another study ({'; '.join(differ)}); choose another --out")
    elif folder.is_dir() and (foreign := [entry.name for entry in folder.iterdir() if entry.name[0] != "."]):
        raise ValueError(f"{folder}: found {foreign[0]} and no setting.json; allowed: an empty folder or a run of this table")
    for parent in (out for out in folder.parents if out.exists()):
        if not parent.is_dir():
            raise ValueError(f"{parent}: is a file; --out needs a folder")

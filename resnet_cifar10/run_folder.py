"""The folder of one run: its lock, its metrics, its checkpoints, and how it goes on after an interruption.

In the order in which they are written: setting.json (study.claim), environment.json (resume), signals.json, metrics.csv and
last.safetensors after each epoch (save), best.safetensors and model/ at the end, result.json, which means done; or failed.json.
The lock of OUT guards the claims, the run's own all else.
"""

from __future__ import annotations

import csv
import fcntl
import io
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .files import check_writable, read_json, write, write_json
from .storage import read_tensors, write_tensors
from .train import Checkpoint

ROOM = 32  # times the weights in float32: 3 checkpoints x 4 tensors (weights, best, 2 of Adam) x 2 (float64), and the model
LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"
FAILED = "failed.json"  # of a run that failed: the reason, until it is tried again
METRICS = (
    "epoch",
    "train_loss",
    "train_accuracy",
    "validation_loss",
    "validation_accuracy",
    "lr",
    "train_seconds",
    "validation_seconds",
)


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[str]:
    """Hold the run folder for this process; the operating system frees the lock of a process that died.

    Yields:
        "", or the name of the process that holds it, where this one is not to wait for that.

    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.seek(0)
            yield file.read() or "another process"
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield ""
        finally:
            file.truncate(0)


def check_room(folder: Path, parameters: int) -> None:
    """Make sure that a network of so many parameters can be saved into a folder, before hours go into its training.

    Raises:
        ValueError: Naming the folder, what was found and what is needed.

    """
    there = check_writable(folder)
    free, needed = shutil.disk_usage(there).free, ROOM * 4 * parameters
    if free < needed:
        raise ValueError(f"{there}: found {free / 1e6:.1f} MB free; allowed: {needed / 1e6:.1f} MB or more for each run")


def resume(folder: Path, environment: dict[str, Any]) -> tuple[list[dict[str, Any]], Checkpoint | None, list[str]]:
    """Find out how far a run has come, and note the environment in which it goes on.

    Returns:
        Its metrics, its newest undamaged checkpoint (None: it is at its beginning) and what a user must hear of.

    Raises:
        ValueError: If metrics and checkpoint do not belong together, or all checkpoints are damaged.

    """
    rows: list[dict[str, Any]] = []
    not_bit_exact = ""
    checkpoint, problem = load_checkpoint(folder)
    if checkpoint:
        epoch = checkpoint.state.get("epoch", 0)
        rows = read_metrics(folder)[:epoch]
        if len(rows) != epoch:
            raise ValueError(f"{folder / 'metrics.csv'}: found {len(rows)} epochs, the checkpoint has {epoch}")
        before = read_json(folder / "environment.json")
        not_bit_exact = before.get("not_bit_exact", "")
        if changed := [key for key in environment if before.get(key) != environment[key] and key not in ("git_commit", "data")]:
            what = [key if key == "code_sha256" else f"{key} ({before.get(key)}, now {environment[key]})" for key in changed]
            reason = f"resumed after epoch {epoch} with a change of {', '.join(what)}"
            not_bit_exact = "; ".join(filter(None, [not_bit_exact, reason]))
    # with the reason: a run that is killed before its next checkpoint must not lose it
    write_json(folder / "environment.json", environment | {"not_bit_exact": not_bit_exact})
    mark = f"not bit-exact: {not_bit_exact}" if not_bit_exact else ""
    return rows, checkpoint, [line for line in (problem, mark) if line]


def save_best(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the weights of the best epoch."""
    write_tensors(folder / BEST, checkpoint.part("best"), {"epoch": checkpoint.state["best_epoch"]})


def has_checkpoint(folder: Path) -> bool:
    """Say whether a run has ended an epoch."""
    return (folder / LAST).exists() or (folder / PREVIOUS).exists()


def save(folder: Path, rows: list[dict[str, Any]], checkpoint: Checkpoint) -> None:
    """Save an epoch: metrics.csv and the newest checkpoint, which has the best weights too; the one before it is kept.

    Raises:
        OSError: If the folder is no longer there, or the disk does not take it.

    """
    if not (folder / "environment.json").exists():
        raise OSError(f"{folder}: was removed while it was worked on")
    write_metrics(folder, rows)  # before the checkpoint: what it does not know of is dropped on resume
    if (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    write_tensors(folder / LAST, checkpoint.tensors, checkpoint.state)


def note_failure(folder: Path, reason: str) -> None:
    """Leave the reason in the folder of a run that failed; the report tells it."""
    write_json(folder / FAILED, {"reason": reason})


def load_checkpoint(folder: Path) -> tuple[Checkpoint | None, str]:
    """Read the newest undamaged checkpoint of a run.

    Returns:
        The checkpoint, None for a run that has none yet, and what a user must hear of ("" if nothing).

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
        return Checkpoint(tensors, state, str(file)), f"{problems[0]}; going on from {file.name}" if problems else ""
    if problems:
        raise ValueError(f"{'; '.join(problems)}; remove {folder} to start this run anew")
    return None, ""


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
        found = [
            {key: int(row[key]) if key == "epoch" else float(row[key]) if row[key] else None for key in METRICS} for row in rows
        ]
        if [row["epoch"] for row in found] != list(range(1, len(found) + 1)):
            raise ValueError("epochs are missing")
        return found
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ValueError(f"{file}: not the metrics of a run: {error}") from None

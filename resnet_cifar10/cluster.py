"""A study on a Ray cluster: each run is one task, and all that it leaves is its folder, on storage that every node reaches."""

from __future__ import annotations

import logging
import os
import platform
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import cache, partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .errors import Interrupted, JobFailed, one_line
from .files import read_json
from .machine import keep_memory
from .run_folder import locked, note_failure, read_metrics
from .settings import Setting
from .sources import load
from .study import Task, claim, duration, pace, run, run_folders, stop_requests

MAX_RETRIES = 10  # of a run whose worker or node dies; each goes on after its last whole epoch
REFRESH_SECONDS = 2
LINE_SECONDS = 60  # between two lines of progress in a pipe

_load = cache(load)  # a worker process that Ray uses again keeps the data set


def study_on_ray(
    settings: Sequence[Setting], data: str, out: Path, device: str, address: str, cpus: int, gpus: float | None
) -> None:
    """Train every setting with each of its seeds as tasks of a Ray cluster; what is done is skipped.

    Args:
        settings: The rows of the table.
        data: As for sources.load; every node reads it.
        out: Where the run folders go, on storage that every node reaches under the same name.
        device: "auto", "cpu" or "cuda", of the nodes.
        address: Of the cluster; "auto" finds the one that this machine belongs to, "local" starts one here.
        cpus: Threads of each run.
        gpus: The part of a GPU that each run gets; None: half of one where there are any.

    Raises:
        ValueError: If settings, data, cluster and output folder do not fit together.
        JobFailed: If a run failed, after all the others have ended.
        Interrupted: After Ctrl-C or SIGTERM.

    """
    runs = run_folders(settings, out)
    with _ray(address) as ray, stop_requests() as received:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = gpus if gpus is not None else 0.5 * (device != "cpu" and any("GPU" in node for node in nodes))
        if device != "auto" and (device == "cuda") != (gpus > 0):
            raise ValueError(
                f"--device, --gpus: found {device!r} and {gpus:g} GPUs for a run; allowed: "
                "cuda with a part of one, cpu with none, or auto"
            )
        if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
            raise ValueError(f"--cpus, --gpus: found {cpus}, {gpus:g}; allowed: what one of the {len(nodes)} nodes has")
        print(f"reading {data}")
        claim(runs, partial(_load, data))
        todo = [one for one in runs if not (one[2] / "result.json").exists()]
        for *_, folder in todo:
            with locked(folder):  # empties the lock of a dead worker: what a lock says shows which runs are under way
                pass
        print(f"{len(runs)} runs, {len(runs) - len(todo)} are done; {len(nodes)} nodes; a run has {cpus} CPUs, {gpus:g} GPUs")
        # said here and not by .options(): only so has each run on a GPU a process of its own (Ray's issue 47767)
        task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=MAX_RETRIES)(_task)
        tasks = {task.remote(*one, data, cpus, "cuda" if gpus else "cpu", Path.cwd()): one for one in todo}
        failed: list[str] = []
        console = Console()
        said = 0.0
        with Live(console=console, transient=True, auto_refresh=False) as live:
            while tasks and not received:
                ended, _ = ray.wait(list(tasks), timeout=REFRESH_SECONDS)
                for ref in ended:
                    setting, seed, folder = tasks.pop(ref)
                    try:
                        print(_done(ray, ref, f"{setting.name}, seed {seed}", folder))
                    except JobFailed as error:
                        failed.append(one_line(error))
                        print(f"failed: {error}")
                table, summary = _progress(list(tasks.values()))
                if console.is_terminal:
                    live.update(Group(table, summary), refresh=True)
                elif time.monotonic() - said > LINE_SECONDS:
                    said = time.monotonic()
                    print(f"{len(runs) - len(tasks)} of {len(runs)} runs have ended; {summary}")
    if received:
        raise Interrupted(received[0])
    if failed:
        raise JobFailed(f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}")


def _done(ray: Any, ref: Any, name: str, folder: Path) -> str:
    """Say how a task has ended.

    Raises:
        JobFailed: With the reason; that a network could not be trained is left in its folder too.

    """
    try:
        test = ray.get(ref)["test"]
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, JobFailed):
            note_failure(folder, str(cause))
            raise cause from None
        told = cause if isinstance(cause, ValueError | OSError) else error  # of a bug we show where it is
        raise JobFailed(f"{name}: {told}") from None
    return f"{name}: done, test accuracy {test['accuracy']:.2f} %" if test else f"{name}: done"


def _progress(runs: Sequence[Task]) -> tuple[Table, str]:
    """Read from the folders of the runs that have not ended which of them run where, how far and until when."""
    table = Table("run", "where", "epoch", "validation", "until", box=None)
    paces, epochs_left = [], []
    for setting, seed, folder in runs:
        lock = folder / ".lock"
        where = lock.read_text() if lock.exists() else ""
        rows = []
        with suppress(ValueError):  # none yet, or a damaged file, which ends that run, not the others
            rows = read_metrics(folder)
        epochs_left.append(setting.epochs - len(rows))
        paces.append(pace(rows) if rows else None)
        if where:
            validation = f"{rows[-1]['validation_accuracy']:.2f} %" if rows and setting.validation_size else ""
            until = f"{datetime.now() + timedelta(seconds=paces[-1] * epochs_left[-1]):%a %H:%M}" if paces[-1] else ""
            table.add_row(Text(f"{setting.name}, seed {seed}"), where, f"{len(rows)}/{setting.epochs}", validation, until)
    known = [seconds for seconds in paces if seconds]
    left = "not known yet"
    if known and table.row_count:  # a run without an epoch yet is taken for a usual one
        total = sum((seconds or mean(known)) * epochs for seconds, epochs in zip(paces, epochs_left, strict=True))
        left = duration(total / table.row_count)
    return table, f"{table.row_count} running, {len(runs) - table.row_count} waiting, left {left}"


def _task(setting: Setting, seed: int, folder: Path, data: str, cpus: int, device: str, home: Path) -> dict[str, Any]:
    """Do one run on a node and return its result; where another worker has it, or is still dying, wait for that."""
    os.chdir(home)  # paths may be relative
    if not (folder / "setting.json").exists():
        raise JobFailed(f"{platform.node()} sees no {folder}; allowed: an --out on storage that every node reaches")
    torch.set_num_threads(cpus)
    keep_memory()
    with locked(folder, wait=True):
        done = folder / "result.json"
        return read_json(done) if done.exists() else run(setting, seed, partial(_load, data), folder, device)


@contextmanager
def _ray(address: str) -> Iterator[Any]:
    """Join a Ray cluster, or start one on this machine that leaves nothing behind."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # it would report to its makers
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"  # its future default; it warns of the other
    if address == "local":  # a token of its own, else Ray writes one into the home folder; as quick as without Ray
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(), "RAY_worker_niceness": "0"}
    elif address != "auto":
        host, _, port = address.rpartition("://")[2].rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray itself would try for minutes
        except (OSError, ValueError, OverflowError):
            raise ValueError(f"--ray: found {address!r}, where no cluster answers; allowed: HOST:PORT, auto or local") from None
    import ray  # after the settings above

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        own: Any = {"num_cpus": os.cpu_count(), "object_store_memory": 80_000_000, "_temp_dir": folder}
        try:
            ray.init(
                address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **(own if address == "local" else {}),
            )
        except Exception as error:  # Ray raises no other where its processes take longer to start than it waits
            ray.shutdown()
            kind = JobFailed if address == "local" else ValueError
            raise kind(f"--ray: found {address!r}; {one_line(error)}; the same command tries again") from None
        try:
            yield ray
        finally:
            ray.shutdown()

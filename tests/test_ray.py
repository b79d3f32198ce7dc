"""A study on a real Ray cluster of two nodes; LONG=1 runs twelve runs instead of two."""

import io
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import run
from rich.console import Console

from resnet_cifar10.cluster import _progress
from resnet_cifar10.run_folder import read_metrics
from resnet_cifar10.settings import Setting
from torture.training import contents

LONG = "LONG" in os.environ
SEEDS = 6 if LONG else 1
# Ray's own settings reach the nodes and the command alike.
ENVIRONMENT = os.environ | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(),
}
TABLE = f"""
[defaults]
model = "resnet8"
width = 8
batch_size = 128
lr = 0.05
epochs = {8 if LONG else 4}
validation_size = 200
precision = "float32"
compile = false
[[setting]]
name = "Crops"
[[setting]]
name = "Photos"
augmentation = "photo_flip"
"""


def outcome(out: Path) -> dict[str, object]:
    """Everything of a study that must not depend on where it ran; the graph is made of the weights."""
    return {
        f"{done.parent.relative_to(out)}/{name}": content
        for done in out.glob("*/seed-*/result.json")
        for name, content in contents(done.parent).items()
        if name[:6] != "model/" or "safetensors" in name
    }


def kill_group(node: subprocess.Popen[bytes], number: signal.Signals = signal.SIGKILL) -> None:
    os.killpg(node.pid, number)
    node.wait()


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """Start two nodes with a processor each; every process of a node is in the node's own process group."""
    ray = Path(sys.executable).with_name("ray")
    small = ["--num-cpus", "1", "--object-store-memory", "80000000", "--disable-usage-stats", "--block"]
    folder = tmp_path_factory.mktemp("r", numbered=True)

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        line = [ray, "start", *small, *arguments]
        with open(folder / f"{len(started)}.log", "wb") as log:
            return subprocess.Popen(line, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)

    started: list[subprocess.Popen[bytes]] = []
    started.append(start("--head", "--port", "0", "--include-dashboard", "false", "--temp-dir", str(folder)))
    try:
        while not (found := re.search(r"--address='([^']+)'", (folder / "0.log").read_text())):
            assert started[0].poll() is None, (folder / "0.log").read_text()
            time.sleep(0.2)
        started.append(start("--address", found[1], "--temp-dir", str(folder)))
        while "Ray runtime started" not in (folder / "1.log").read_text():
            assert started[1].poll() is None, (folder / "1.log").read_text()
            time.sleep(0.2)
        yield found[1], started
    finally:
        for node in reversed(started):
            if node.poll() is None:
                kill_group(node)


def start(settings: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = ["train", settings, "--data", "digits", "--out", out, "--seeds", str(SEEDS), *arguments]
    return subprocess.Popen(
        [sys.executable, "-m", "resnet_cifar10", *command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def working(out: Path, process: subprocess.Popen[str]) -> dict[int, Path]:
    """Wait until two runs have an epoch behind them and go on; give the process and the folder of each."""
    while process.poll() is None:
        held = {lock.parent: lock.read_text().split() for lock in out.glob("*/*/.lock")}
        found = {int(words[1]): folder for folder, words in held.items() if words}
        alive = {pid: folder for pid, folder in found.items() if Path(f"/proc/{pid}").exists()}
        if len(alive) == 2 and all((folder / "metrics.csv").exists() for folder in alive.values()):
            return alive
        time.sleep(0.05)
    raise AssertionError(process.communicate())


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.usefixtures("quick_export")
def test_workers_and_nodes_die_and_the_results_are_those_without_ray(
    tmp_path: Path, nodes: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    (address, started), settings = nodes, tmp_path / "table.toml"
    settings.write_text(TABLE)
    run("train", settings, "--data", "digits", "--out", tmp_path / "here", "--seeds", str(SEEDS))

    process = start(settings, tmp_path / "ray", "--ray", address)
    working(tmp_path / "ray", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "the same command again goes on" in errors

    process = start(settings, tmp_path / "ray", "--ray", address)
    alive = working(tmp_path / "ray", process)
    before = {folder: read_metrics(folder) for folder in alive.values()}
    by_head = {parent(parent(pid)) == started[0].pid: pid for pid in alive}
    os.kill(by_head[True], signal.SIGKILL)  # the worker of one node, and of the other the node itself
    os.kill(parent(by_head[False]), signal.SIGKILL)
    output, errors = process.communicate()
    assert process.returncode == 0, output + errors
    assert output.count(": done") == 2 * SEEDS
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "here")
    assert len([*tmp_path.glob("ray/*/*/result.json")]) == 2 * SEEDS
    for folder, rows in before.items():  # with their times: no epoch was done again, but one that had no checkpoint yet
        assert read_metrics(folder)[: len(rows) - 1] == rows[:-1]
        assert json.loads((folder / "environment.json").read_text())["not_bit_exact"] == ""

    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "ray").glob("*/*/*.safetensors")}
    process = start(settings, tmp_path / "ray", "--ray")  # on a cluster of its own
    output, errors = process.communicate()
    assert process.returncode == 0 and f"{2 * SEEDS} are done" in output, errors
    assert {file: file.stat().st_mtime_ns for file in written} == written


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--ray", "127.0.0.1:1"), "'127.0.0.1:1', where no cluster answers"),
        (("--ray", "nonsense"), "HOST:PORT"),
        (("--seed", "1", "--seeds", "2"), "--seeds"),
        (("--seeds", "99999999999"), "--seeds"),
    ],
)
def test_wrong_options_write_nothing(tmp_path: Path, arguments: tuple[str, ...], problem: str) -> None:
    (tmp_path / "table.toml").write_text(TABLE)
    refused = run("train", tmp_path / "table.toml", "--data", "digits", "--out", tmp_path / "runs", *arguments, status=2)
    assert problem in refused.err
    assert not (tmp_path / "runs").exists()


def test_damaged_metrics_end_their_own_run_alone(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("here 1")
    (tmp_path / "metrics.csv").write_text("damaged")
    table, left = _progress([(Setting(name="Torn [/b] :cat:", epochs=4), 0, tmp_path)])
    assert table.row_count == 1 and "not known yet" in left
    console = Console(record=True, force_terminal=True, width=100, file=io.StringIO())
    console.print(table)
    assert "Torn [/b] :cat:, seed 0" in console.export_text()  # a name is no markup


def test_more_than_a_node_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}] * 2)
    monkeypatch.setattr("resnet_cifar10.cluster._ray", lambda address: nullcontext(cluster))
    (tmp_path / "table.toml").write_text(TABLE)
    command = ("train", tmp_path / "table.toml", "--data", "digits", "--out", tmp_path / "runs", "--ray", "--cpus", "1000")
    assert "--cpus, --gpus: found 1000, " in run(*command, status=2).err and not (tmp_path / "runs").exists()

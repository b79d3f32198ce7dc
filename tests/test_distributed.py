"""One run on several processes under torchrun; LONG=1 adds four processes, nine kills and the death of a host."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import torch
from conftest import ROOT, encoded

from resnet_cifar10.data import Split, batches
from resnet_cifar10.run_folder import read_metrics
from resnet_cifar10.settings import load_settings
from resnet_cifar10.sources import load
from resnet_cifar10.study import split_data
from resnet_cifar10.train import Learner, train
from torture.inputs import noise, write_parquet
from torture.training import contents

LONG = "LONG" in os.environ
ENVIRONMENT = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
SEVERAL_HOSTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
EPOCHS = 3 if LONG else 2
TABLE = f"""
[[setting]]
name = "Shared"
model = "resnet8"
width = 8
batch_size = 8
lr = 0.02
epochs = {EPOCHS}
normalization = "sync_batch"
augmentation = "crop_flip"
validation_size = 38  # leaves 400 images, 50 steps an epoch
precision = "float64"
compile = false
"""
STARTED: list[Path] = []
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "3"]


PROGRAM = """
import time
from resnet_cifar10 import cli, files, finish
finish.export = lambda model, out: (time.sleep(2), files.write(out, b"no graph"))
finish.Classifier, finish.rejection_threshold = lambda folder: None, lambda classifier, images: 0.0
cli.main()
"""


def start(out: Path, *launcher: str, table: str = TABLE, **environment: str) -> subprocess.Popen[str]:
    here = out.parent
    for name, content in (("table.toml", table), ("program.py", PROGRAM)):
        (here / name).write_text(content)
    for part, count in (("train", 438), ("test", 20)):
        images, labels = noise(count, 1)
        write_parquet(here / "data" / f"{part}.parquet", [encoded(image, "PNG") for image in images], labels)
    program, settings, data = (str(here / name) for name in ("program.py", "table.toml", "data"))
    STARTED.append(out)
    return subprocess.Popen(
        [*launcher, program, "train", settings, "--data", data, "--out", str(out)],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """End what a test that failed has started: it would share the cores with the others."""
    yield
    while STARTED:
        out = STARTED.pop()
        for pid in processes_of(out):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def end(process: subprocess.Popen[str], out: Path) -> Path:
    """Wait for the end of a run, make sure that nothing of it is left, and give its folder."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert not processes_of(out)
    return out / "shared" / "seed-0"


def launch(out: Path, n: int) -> subprocess.Popen[str]:
    return start(out, *TORCHRUN, "--standalone", "--nproc-per-node", str(n))


def processes_of(out: Path, rank: int | None = None) -> list[int]:
    """Find the processes of a run, of one rank or all with their launchers."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"\0{out}\0" in (folder / "cmdline").read_text()
            if ours and (rank is None or f"\0RANK={rank}\0" in (folder / "environ").read_text()):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes."""
    out = tmp_path_factory.mktemp("undisturbed") / "runs"
    return end(launch(out, 2), out)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_each_image_is_seen_once_an_epoch_in_the_batch_of_a_single_process(n: int) -> None:
    values = torch.arange(101, dtype=torch.uint8)
    split = Split(values[:, None, None, None].expand(-1, 32, 32, 3), values.long() % 2, ("even", "odd"), "numbers")
    fill = torch.zeros(3, dtype=torch.uint8)

    def seen(rank: int, processes: int) -> list[list[int]]:
        parts = batches(split, 16, "none", 0, 1, fill, rank, processes)
        return [images[:, 0, 0, 0].tolist() for images, _ in parts]

    parts = [seen(rank, n) for rank in range(n)]
    whole = [sorted(chain(*batch)) for batch in zip(*parts, strict=True)]
    assert sorted(chain(*whole)) == values.tolist()
    assert whole == [sorted(batch) for batch in seen(0, 1)]


def test_the_loss_after_50_steps_does_not_depend_on_the_number_of_processes(tmp_path: Path, undisturbed: Path) -> None:
    two = read_metrics(undisturbed)[0]
    (setting,) = load_settings(undisturbed.parents[2] / "table.toml")
    images = split_data(setting, 0, partial(load, undisturbed.parents[2] / "data"))
    alone = Learner(setting, 0, images[0], "cpu", "float64", compiled=False)
    others = {1: next(train(alone, setting, 0, *images))[0]}  # in this process
    if LONG:
        others[4] = read_metrics(end(launch(tmp_path / "4", 4), tmp_path / "4"))[0]
    for n, other in others.items():
        for key in ("train_loss", "validation_loss"):
            difference = abs(other[key] / two[key] - 1)
            print(f"{n} and 2 processes: {key} {other[key]} differs by {difference:.1e}")
            assert difference < 1e-6
        assert other["train_accuracy"] == two["train_accuracy"]


@pytest.mark.parametrize("number", range(10 if LONG else 1))
def test_a_process_killed_at_a_random_moment_costs_nothing_but_time(tmp_path: Path, undisturbed: Path, number: int) -> None:
    out, chance = tmp_path / "runs", random.Random(number)
    metrics = out / "shared" / "seed-0" / "metrics.csv"
    epoch_seconds = read_metrics(undisturbed)[-1]["train_seconds"]
    process = launch(out, 2)
    while not (victim := processes_of(out, rank=1)):
        assert process.poll() is None
        time.sleep(0.1)
    if number % 2 == 0:  # in the second or third epoch, else while it starts or in the first
        while not metrics.exists():
            assert process.poll() is None
            time.sleep(0.05)
    if number:
        time.sleep(chance.uniform(0, 0.6 * (EPOCHS - 1)) * epoch_seconds)
    os.kill(victim[0], signal.SIGKILL)
    killed, epochs = time.monotonic(), len(read_metrics(metrics.parent)) if metrics.exists() else 0
    while not (set(processes_of(out, rank=1)) - set(victim)):
        assert time.monotonic() - killed < 60, "it hangs"
        time.sleep(0.1)
    print(f"killed after {epochs} epochs, restarted after {time.monotonic() - killed:.1f} s")
    assert contents(end(process, out)) == contents(undisturbed)


def test_a_run_that_fails_does_not_end_the_last_one_before_it_is_exported(tmp_path: Path) -> None:
    table = TABLE.replace(f"epochs = {EPOCHS}", "epochs = 1")
    settings = [table.replace("Shared", name) for name in ("Wild", "Tame")]
    for old, new in (("0.02", "100.0"), ("sync_batch", "none"), ("float64", "float32")):
        settings[0] = settings[0].replace(old, new)
    process = start(tmp_path / "runs", *TORCHRUN[:3], "--standalone", "--nproc-per-node", "2", table="".join(settings))
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 1 and output.count("error: 1 of 2 runs failed: Wild, seed 0: the loss is no") == 1, output
    assert (tmp_path / "runs/tame/seed-0/result.json").exists() and not (tmp_path / "runs/wild/seed-0/result.json").exists()


@pytest.mark.skipif(not LONG, reason="takes a minute; LONG=1 runs it")
def test_a_host_that_dies_and_comes_back_costs_nothing_but_time(tmp_path: Path, undisturbed: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    host = [
        *TORCHRUN,
        "--nnodes",
        "2",
        "--nproc-per-node",
        "1",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "run",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
        "--local-addr",
        "127.0.0.1",
    ]
    out = tmp_path / "runs"
    first = start(out, *host, **SEVERAL_HOSTS)
    time.sleep(2)  # so that this one has rank 0 and the rendezvous
    second = start(out, *host, **SEVERAL_HOSTS)
    while not (out / "shared/seed-0/metrics.csv").exists():
        assert first.poll() is None
        time.sleep(0.1)
    for pid in [second.pid, *processes_of(out, rank=1)]:
        os.kill(pid, signal.SIGKILL)
    second.communicate()
    second = start(out, *host, **SEVERAL_HOSTS)
    second.communicate(timeout=600)
    assert contents(end(first, out)) == contents(undisturbed)

"""Kills, full disks, damaged checkpoints and second processes: whatever happens, the run ends with the same bytes."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from resnet_cifar10 import files, run_folder, storage, study
from resnet_cifar10.export import export
from resnet_cifar10.sources import load
from resnet_cifar10.train import Checkpoint

from .harness import HANG_SECONDS, Command, Ended, Failed, Skipped, expect

EPOCHS = 4
TABLE = f"""
[[setting]]
name = "Small"
model = "resnet8"
batch_size = 20
lr = 0.05
epochs = {EPOCHS}
augmentation = "crop_flip_cutout"
lr_decay = "cosine"
validation_size = 40
precision = "float32"
compile = false
"""
TRAIN_IMAGES, TEST_IMAGES = 140, 40
REAL_EXPORTS = 0.1  # the share of the runs that write the ONNX graph themselves; the others write the bytes of the first
MOUNT_MB = 64


class Ground:
    """What all trials share: a small data set, a table, and a run that nothing disturbed, as a whole and after each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.table = folder, folder / "cifar-10-batches-py", folder / "table.toml"
        self.run, self.model = folder / "out/small/seed-0", folder / "out/small/seed-0/model"

    def build(self) -> None:
        """Write the data, train undisturbed, and keep a copy of the run folder after each epoch."""
        self.data.mkdir(parents=True)
        for part, count, names in (
            ("train", TRAIN_IMAGES, [f"data_batch_{i}" for i in range(1, 6)]),
            ("test", TEST_IMAGES, ["test_batch"]),
        ):
            split = load("digits", part)
            assert split is not None
            for name, chosen in zip(names, torch.arange(count).chunk(len(names)), strict=True):
                pixels = split.images[chosen].permute(0, 3, 1, 2).reshape(len(chosen), -1).numpy()
                batch = {"data": pixels, "labels": split.labels[chosen].tolist()}
                (self.data / name).write_bytes(pickle.dumps(batch, protocol=2))
        (self.data / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}, protocol=2))
        self.table.write_text(TABLE)
        self.whole_seconds = self._timed(self.folder / "out", real_export=True)
        self.contents = contents(self.run)
        self.seconds = self._timed(self.folder / "again", prepare=partial(copy_each_epoch, self.folder))
        self.same(self.folder / "again")

    def _timed(self, out: Path, **options: Any) -> float:
        started = time.monotonic()
        ended = self.train(out, **options).end(300)
        expect(ended.status == 0, ended.err)
        return time.monotonic() - started

    def train(
        self, out: Path, prepare: Callable[[], None] = lambda: None, real_export: bool = False, table: Path | None = None
    ) -> Command:
        """Start the training of the table into a folder."""

        def everything() -> None:
            if not real_export:
                exported = (self.model / "model.onnx").read_bytes()
                replace_everywhere(export, lambda model, out: files.write(out, exported))
            prepare()

        log = self.folder / f"log-{os.getpid()}-{next(LOGS)}"
        return Command(log, "train", table or self.table, "--data", self.data, "--out", out, prepare=everything)

    def finish(self, out: Path, *words: str, real_export: bool = False) -> Ended:
        """Run the same command again: it must go on, bring the same bytes, and say aloud just what it should."""
        run = out / "small/seed-0"
        epochs = kept(run)
        before = run_folder.read_metrics(run)[:epochs] if epochs else []
        ended = self.train(out, real_export=real_export).end(HANG_SECONDS * (3 if real_export else 1))  # a busy machine
        expect(ended.status == 0, f"it does not go on: exit status {ended.status}: {ended.err[-3000:]}")
        for word in words:
            expect(word in ended.out, f"{word!r} is not said in {ended.out[-3000:]!r}")
        expect(words or "damaged" not in ended.out, f"a kill has damaged a file: {ended.out[-3000:]}")
        expect("not bit-exact" not in ended.out and "with a change of" not in ended.out, ended.out[-3000:])
        self.same(out)
        expect(run_folder.read_metrics(run)[:epochs] == before, f"{epochs} epochs were kept, and done again")  # the times tell
        return ended

    def same(self, out: Path) -> None:
        """Expect the files of the undisturbed run, and no other."""
        found = contents(out / "small/seed-0")
        differ = [name for name in sorted(found.keys() | self.contents.keys()) if found.get(name) != self.contents.get(name)]
        expect(not differ, f"differs from the undisturbed run: {', '.join(differ)}")

    def whole(self, out: Path, ended: Ended) -> None:
        """Expect that of an interrupted run no file is half-written, and no epoch lost that it has told of."""
        folder = out / "small/seed-0"
        expect(kept(folder) >= ended.out.count(": epoch "), "an epoch that was told is lost")
        for file in (file for file in folder.rglob("*") if file.is_file() and file.name[0] != "."):
            if file.suffix == ".safetensors":
                storage.read_tensors(file)
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.name == "metrics.csv":
                run_folder.read_metrics(folder)
            else:
                name = str(file.relative_to(folder))
                expect(contents(folder)[name] == self.contents[name], f"{name} is half-written")

    def after_epoch(self, epoch: int, out: Path) -> Path:
        """Lay down the run as it was when it was killed right after an epoch; return the run folder."""
        shutil.copytree(self.folder / f"epoch-{epoch}", out)
        return out / "small/seed-0"


def kept(run: Path) -> int:
    """Return the epoch of the newest undamaged checkpoint of a run folder, 0 without one."""
    for name in (run_folder.LAST, run_folder.PREVIOUS):
        with contextlib.suppress(ValueError):
            return int(storage.read_tensors(run / name)[1]["epoch"])
    return 0


LOGS = itertools.count()
GROUND = Ground(Path())  # __main__ puts the real one here


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a run folder, without times; previous.safetensors may be one epoch older after a kill."""
    found: dict[str, Any] = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = str(file.relative_to(folder))
        if file.name == "metrics.csv":
            with open(file, newline="") as lines:
                found[name] = [row[:6] for row in csv.reader(lines)]
        elif file.suffix == ".json":
            found[name] = {key: value for key, value in json.loads(file.read_text()).items() if "minutes" not in key}
        elif file.name not in (".lock", run_folder.PREVIOUS):
            found[name] = file.read_bytes()
    return found


def replace_everywhere(old: Any, new: Any) -> None:
    """Replace a function in all rooms that have imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("resnet_cifar10"):
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def copy_each_epoch(ground: Path) -> None:
    """Copy the run once the checkpoint of an epoch is there: so SIGKILL would leave it."""
    save = run_folder.save

    def save_then_copy(folder: Path, rows: list[Any], checkpoint: Checkpoint) -> None:
        save(folder, rows, checkpoint)
        shutil.copytree(ground / "again", ground / f"epoch-{checkpoint.state['epoch']}")

    vars(study)["save"] = save_then_copy


# --- killed ---


def killed_anywhere(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """SIGKILL at a random moment."""
    for trial in range(count):
        out, real = folder / f"{trial}", rng.random() < REAL_EXPORTS
        while True:
            command = GROUND.train(out, real_export=real)
            time.sleep(rng.uniform(0, GROUND.whole_seconds if real else GROUND.seconds))
            command.signal(signal.SIGKILL)
            if (ended := command.end()).status == -signal.SIGKILL:
                break
            expect(ended.status == 0, f"it has failed by itself: {ended.err}")
            shutil.rmtree(out)  # it was done before: another moment
        GROUND.whole(out, ended)
        GROUND.finish(out, real_export=real)
        yield


class _Half:
    """A file whose process dies in the middle of a write."""

    def __init__(self, file: Any, die: Callable[[], None]) -> None:
        self.file, self.die = file, die

    def write(self, content: bytes) -> None:
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        self.die()
        self.file.write(content[len(content) // 2 :])

    def __enter__(self) -> _Half:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


POINTS = {"opened": 16, "half written": 16, "before fsync": 32, "before rename": 20, "after rename": 20, "pruning": 6}


def die_in_a_write(point: str, times: int) -> None:
    """Let this process be killed when it comes to a point of writing a file for the n-th time."""
    visits, replace, fsync = itertools.count(1), os.replace, os.fsync

    def die() -> None:
        if next(visits) == times:
            _die()

    def dying_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        opened = open(file, mode, *arguments, **options)  # noqa: SIM115  (the caller closes it)
        if "w" in mode and point == "opened":
            die()
        return _Half(opened, die) if "w" in mode and point == "half written" else opened

    def dying_replace(source: Any, target: Any) -> None:
        if point == "before rename" or (point == "pruning" and Path(target).name == run_folder.PREVIOUS):
            die()
        replace(source, target)
        if point == "after rename" or (point == "pruning" and Path(target).name == run_folder.PREVIOUS):
            die()

    def dying_fsync(number: int) -> None:
        if point == "before fsync":
            die()
        fsync(number)

    vars(files)["open"] = dying_open
    vars(os).update(replace=dying_replace, fsync=dying_fsync)


def killed_in_a_write(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """SIGKILL at a named point of the atomic writer; a batch goes through all points."""
    for trial, point in zip(range(count), itertools.cycle(POINTS), strict=False):
        out, times = folder / f"{trial}", rng.randint(1, POINTS[point])
        while (ended := GROUND.train(out, prepare=partial(die_in_a_write, point, times)).end()).status == 0:
            times = rng.randint(1, times - 1)  # there are not so many
            shutil.rmtree(out)
        expect(ended.status == -signal.SIGKILL, ended.err)
        try:
            GROUND.whole(out, ended)
            GROUND.finish(out)
        except (Failed, ValueError) as failure:
            raise Failed(f"killed {point}, time {times}: {failure}") from None
        yield


def interrupted(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """SIGTERM or Ctrl-C at a random moment, sometimes twice."""
    for trial in range(count):
        out, number = folder / f"{trial}", rng.choice((signal.SIGINT, signal.SIGTERM))
        while True:
            command = GROUND.train(out)
            time.sleep(rng.uniform(0.05, GROUND.seconds))
            command.signal(number)
            if twice := rng.random() < 0.3:
                time.sleep(rng.uniform(0, 0.05))
                command.signal(number)
            if (ended := command.end()).status != 0:
                break
            shutil.rmtree(out, ignore_errors=True)
        inside = ": epoch 1/" in ended.out and f": epoch {EPOCHS}/" not in ended.out
        # outside the epochs, and as it ends already, SIGTERM ends a process as it always does
        if (inside and not twice) or ended.status != -signal.SIGTERM:
            ended.refused(128 + number, "stopped")
        GROUND.whole(out, ended)
        GROUND.finish(out)
        yield


# --- damaged ---


def damage(rng: random.Random, content: bytes) -> bytes:
    """Truncate, zero, flip, insert or cut out: never the same content."""
    while True:
        changed, start = bytearray(content), rng.randrange(len(content))
        length = min(len(content) - start, rng.choice((1, 8, 100, 4096, len(content))))
        match rng.choice(("truncate", "zero", "flip", "flip", "flips", "insert", "cut")):
            case "truncate":
                del changed[start:]
            case "zero":
                changed[start : start + length] = bytes(length)
            case "flip":
                changed[start] ^= 1 << rng.randrange(8)
            case "flips":
                for _ in range(rng.randint(2, 50)):
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            case "insert":
                changed[start:start] = rng.randbytes(rng.randint(1, 100))
            case "cut":
                del changed[start : start + length]
        if changed != content:
            return bytes(changed)


def damaged_checkpoint(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """The newest checkpoint is not what was written."""
    for trial in range(count):
        newest = GROUND.after_epoch(rng.randint(2, EPOCHS), folder / f"{trial}") / run_folder.LAST
        newest.write_bytes(damage(rng, newest.read_bytes()))
        GROUND.finish(folder / f"{trial}", "damaged", f"going on from {run_folder.PREVIOUS}")
        yield


# --- no room, no right ---


@contextlib.contextmanager
def _mounted(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={MOUNT_MB}m", "torture", folder], capture_output=True, check=False
    ).returncode:
        raise Skipped("only root can mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def disk_full(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """Another process fills the disk at a random moment, and later makes room again."""
    for trial in range(count):
        with _mounted(folder / f"{trial}") as disk:
            while True:
                command = GROUND.train(disk / "out")
                time.sleep(rng.uniform(0, GROUND.seconds))
                filler = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY)
                try:
                    for size in (1 << 16, 1):
                        while True:
                            os.write(filler, bytes(size))
                            if size == 1:
                                os.lseek(filler, 4095, os.SEEK_CUR)
                except OSError:
                    os.close(filler)
                ended = command.end()
                (disk / "filler").unlink()
                if ended.status:
                    break
                shutil.rmtree(disk / "out")
            ended.refused(2 if "allowed" in ended.err else 1, str(disk))
            GROUND.whole(disk / "out", ended)
            GROUND.finish(disk / "out")
        yield


def read_only(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """The file system of a run that was killed has become read-only."""
    for trial in range(count):
        with _mounted(folder / f"{trial}") as disk:
            out = disk / "out"
            if epoch := rng.randint(0, EPOCHS):
                GROUND.after_epoch(epoch, out)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            before = contents(out)
            GROUND.train(out).end().refused(2, str(disk), "cannot be written")
            expect(contents(out) == before, "it has changed")
            subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
            GROUND.finish(out)
        yield


def under_a_file(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """A file stands where a folder of the run's path should be."""
    for trial in range(count):
        out = folder / f"{trial}"
        if epoch := rng.randint(0, EPOCHS):
            GROUND.after_epoch(epoch, out)
        (out / "small/seed-0").mkdir(parents=True, exist_ok=True)
        place = out / rng.choice((".", "small", "small/seed-0"))
        place.rename(folder / "aside")
        place.write_text("a file")
        GROUND.train(out).end().refused(2, str(place), "is a file")
        expect(place.read_text() == "a file", "the file has changed")
        place.unlink()
        (folder / "aside").rename(place)
        GROUND.finish(out)
        yield


# --- two at once, and what can't go on ---


def two_processes(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """Two start on one run folder: one works, one leaves, naming the other."""
    for trial in range(count):
        out = folder / f"{trial}"
        commands = [GROUND.train(out)]
        time.sleep(rng.choice((0, rng.uniform(0, 0.5 * GROUND.seconds))))
        commands.append(GROUND.train(out))
        ended = [command.end() for command in commands]
        done = [end.status for end in ended]
        expect(sorted(done) == [0, 1], f"exit statuses {done}: {[end.err for end in ended]}")
        worker = commands[done.index(0)].pid
        ended[done.index(1)].refused(1, f"process {worker} on")
        GROUND.same(out)
        yield


def _rewrite(file: Path, change: Callable[[storage.Tensors, dict[str, Any]], object]) -> None:
    """Change a checkpoint as a program would that writes it rightly, but leaves something out."""
    tensors, state = storage.read_tensors(file)
    change(tensors, state)
    storage.write_tensors(file, tensors, state)


def _drop_optimizer(tensors: storage.Tensors, state: dict[str, Any]) -> None:
    for name in [name for name in tensors if name.startswith("optimizer.")]:
        del tensors[name]


def _other_setting(file: Path) -> None:
    claim = json.loads(file.read_text())
    claim["setting"]["lr"] = 0.2
    file.write_text(json.dumps(claim))


CANNOT_GO_ON: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "optimizer state missing": (lambda run: _rewrite(run / run_folder.LAST, _drop_optimizer), ("seed-0", "optimizer.")),
    "a weight missing": (
        lambda run: _rewrite(run / run_folder.LAST, lambda t, s: t.pop("model.conv.weight")),
        ("model.conv.weight",),
    ),
    "a weight of another shape": (
        lambda run: _rewrite(run / run_folder.LAST, lambda t, s: t.update({"model.linear.bias": torch.zeros(3)})),
        ("model.linear.bias",),
    ),
    "the epoch missing": (lambda run: _rewrite(run / run_folder.LAST, lambda t, s: s.pop("epoch")), ("seed-0", "epoch")),
    "a foreign run": (lambda run: _other_setting(run / "setting.json"), ("holds another study", "lr was 0.2, is 0.05")),
    "foreign files": (lambda run: (run / "setting.json").rename(run / "thesis.txt"), ("no setting.json",)),
    "setting.json damaged": (lambda run: (run / "setting.json").write_text('{"sett'), ("setting.json",)),
    "setting.json of another kind": (lambda run: (run / "setting.json").write_text("[]"), ("setting.json",)),
    "metrics.csv lost": (lambda run: (run / "metrics.csv").unlink(), ("metrics.csv",)),
    "metrics.csv torn": (lambda run: (run / "metrics.csv").write_text("epoch,tr"), ("metrics.csv",)),
    "metrics.csv shorter": (
        lambda run: (run / "metrics.csv").write_text(",".join(run_folder.METRICS) + "\n"),
        ("metrics.csv",),
    ),
    "environment.json damaged": (lambda run: (run / "environment.json").write_text("{"), ("environment.json",)),
    "all checkpoints damaged": (
        lambda run: [(run / name).write_bytes(b"?") for name in (run_folder.LAST, run_folder.PREVIOUS)],
        ("anew",),
    ),
}


def _bytes(run: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in run.rglob("*") if file.is_file() and file.name != ".lock"}


def cannot_go_on(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """What must stop with its reason, and change nothing."""
    wild = folder / "wild.toml"
    wild.write_text(TABLE.replace("lr = 0.05", 'lr = 100.0\nnormalization = "none"'))
    GROUND.train(folder / "wild", table=wild).end().refused(1, "no longer finite", "lr")
    expect(not (folder / "wild/small/seed-0/result.json").exists(), "a result of a loss that is not finite")
    yield
    for number, (name, (change, words)) in enumerate(CANNOT_GO_ON.items()):
        out = folder / f"{number}"
        run = GROUND.after_epoch(2, out)
        change(run)
        before = _bytes(run)
        try:
            GROUND.train(out).end().refused(2, *words)
            expect(_bytes(run) == before, "it was changed")
        except Failed as failure:
            raise Failed(f"{name}: {failure}") from None
        yield
    yield from _elsewhere(folder / "elsewhere")


def _elsewhere(out: Path) -> Iterator[None]:
    """With other threads it goes on and says so, also after it was killed before it had finished an epoch."""
    GROUND.after_epoch(2, out)

    def elsewhere_and_die() -> None:
        torch.set_num_threads(2)
        run_folder.write_metrics = lambda *_: _die()

    GROUND.train(out, prepare=elsewhere_and_die).end()
    ended = GROUND.train(out, prepare=partial(torch.set_num_threads, 2)).end()
    expect(ended.status == 0, ended.err)
    marked = json.loads((out / "small/seed-0/environment.json").read_text())["not_bit_exact"]
    expect("a change of threads" in marked, f"environment.json says {marked!r}")
    yield

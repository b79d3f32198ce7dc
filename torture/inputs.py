"""Settings, data, model folders and photos that lie, are damaged or mean harm."""

from __future__ import annotations

import builtins
import functools
import gzip
import importlib
import io
import itertools
import json
import os
import pickle
import random
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st
from PIL import Image

from resnet_cifar10 import files, run_folder, sources
from resnet_cifar10.data import Split
from resnet_cifar10.photo import encoded
from resnet_cifar10.settings import Setting

from . import training
from .harness import Failed, call, expect
from .training import damage

# --- settings, by hypothesis ---

KEYS = sorted(Setting.model_fields)
NEVER_RIGHT = ["nan", "-inf", "-1", "1e400", "1979-05-27", "{}", "[{}]", "[[]]", '"\\u0000"', "0x" + "f" * 3000, '{x = "y"}']
ROW = '[[setting]]\nname = "My row"\n'


@st.composite
def wrong_tables(draw: st.DrawFn) -> tuple[bytes, str]:
    """Draw a settings table with one mistake, and what its sentence must name."""
    key = draw(st.sampled_from([key for key in KEYS if key != "name"]))
    match draw(st.sampled_from(["value", "value", "typo", "twice", "encoding", "huge", "edit"])):
        case "value":
            names = key == "start_from"  # almost any text could be one
            value = draw(st.sampled_from(["nan", "-1", "{}", '""'] if names else NEVER_RIGHT))
            return f"{ROW}{key} = {value}\n".encode(), key
        case "typo":
            at, letter = draw(st.integers(0, len(key) - 1)), draw(st.characters(codec="ascii", categories=["Ll"]))
            wrong = draw(st.sampled_from([key[:at] + key[at + 1 :], key[:at] + letter + key[at:]]))
            hypothesis.assume(wrong and wrong not in KEYS)
            return f"{ROW}{wrong} = 1\n".encode(), f"'{wrong}'"
        case "twice":
            return f"{ROW}{key} = 1\n{key} = 2\n".encode(), "not a TOML"
        case "encoding":
            text = ROW + f"# {draw(st.text(st.characters(min_codepoint=0x80, max_codepoint=0xFF)))}é\n"
            return text.encode(draw(st.sampled_from(["utf-16", "utf-32", "latin-1"]))), "not a TOML"
        case "huge":
            n = draw(st.integers(20_000, 200_000))
            value = draw(st.sampled_from(["[" * n + "]" * n, "{a = " * n + "1" + "}" * n, "9" * n, f'"{"x" * n * 60}"']))
            return f"{ROW}{key} = {value}\n".encode(), "not a TOML"
        case _:
            content = f"[defaults]\nlr = 0.1\n\n{ROW}epochs = 3\nseeds = [1, 2]\n".encode()
            at, piece = draw(st.integers(0, len(content))), draw(st.binary(max_size=4))
            return content[:at] + piece + content[at + draw(st.integers(0, 4)) :], ""


def settings(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """Feed mistakes to the train command, whose data is missing: so no mutation ever starts a training."""
    problems: list[str] = []
    nowhere = folder / "nowhere"

    @hypothesis.seed(rng.getrandbits(64))
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(wrong_tables())
    def example(case: tuple[bytes, str]) -> None:
        content, word = case
        (file := folder / "table.toml").write_bytes(content)
        try:
            ended = call("train", file, "--data", nowhere, "--out", folder / "out")
            ended.refused(2, word, str(file) if word else str(folder))
            expect(os.listdir(folder) == ["table.toml"], f"it wrote {os.listdir(folder)}")
            problems.append("")
        except Exception as failure:  # whatever it is, it is what the table did
            problems.append(f"{content[:300]!r}: {type(failure).__name__}: {failure}")

    example()
    for problem in itertools.islice(problems, count):
        if problem:
            raise Failed(problem)
        yield
    raise Failed(f"hypothesis found {len(problems)} of {count} examples")


# --- data ---


class Call:
    """Pickles as an instruction to call a function while it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _pickled(data: bytes) -> bytes:
    """Pickle a batch by hand whose "data" is built by these instructions."""
    return b"\x80\x04}" + _text("data") + data + b"s" + _text("labels") + b"]s."


OBJECTS = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t"
    + _text("b")
    + b"tR(K\x01(K\x01tcnumpy\ndtype\n("
    + _text("O8")
    + b"K\x00K\x01tR(K\x03"
    + _text("|")
    + b"NNN"
    + b"J\xff\xff\xff\xff" * 2
    + b"K\x3ftb\x89]"
)
BAD_BATCHES: dict[str, bytes | dict[str, Any]] = {
    "label too high": {"labels": [10] * 10},
    "label negative": {"labels": [-1] * 10},
    "label huge": {"labels": [2**70] * 10},
    "labels of text": {"labels": ["cat"] * 10},
    "fewer labels": {"labels": [0] * 9},
    "labels missing": {"labels": None},
    "no image": {"data": np.zeros((0, 3072), np.uint8), "labels": []},
    "pixels missing": {"data": None},
    "grey": {"data": np.zeros((10, 1024), np.uint8)},
    "one dimension": {"data": np.zeros(30_720, np.uint8)},
    "floats": {"data": np.zeros((10, 3072), np.float32)},
    "objects": {"data": np.full((10, 3072), None)},
    "records": {"data": np.zeros(10, [("a", "u1", 3072)])},
    "strided": {"data": np.zeros((3072, 10), np.uint8).T[:, ::2]},
    "a list": {"data": [[0] * 3072] * 10},
    "a number": pickle.dumps(1),
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "empty": b"",
    "only a head": b"\x80\x02",
    "an unknown instruction": b"\x80\x02\xff.",
    "tuples in tuples as a key": b"\x80\x02}(" + b")" + b"\x85" * 2_000_000 + b"K\x01u.",
    "objects in objects": _pickled(OBJECTS * 200_000 + b"K\x01" + b"atb" * 200_000),
    "lists in lists": _pickled(b"]" * 300_000 + b"a" * 299_999),
    "a promise of a terabyte": _pickled(b"\x8e" + struct.pack("<Q", 1 << 40) + b"x"),
    "a promise of a terabyte of room": _pickled(b"\x96" + struct.pack("<Q", 1 << 40) + b"x"),
    "an array of a terabyte": _pickled(b"cnumpy\nndarray\n(J\x00\x00\x00\x40J\x00\x04\x00\x00\x86tR"),
    "an array in a terabyte": _pickled(
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(\x8a\x05\x00\x00\x00\x00\x40t" + _text("b") + b"tR"
    ),
    "a memo of a gigabyte": b"\x80\x02}r\x00\x00\x00\x08.",
    "a persistent id": _pickled(b"K\x01Q"),
    "an extension": _pickled(b"\x82\x01"),
    "a frame too long": b"\x80\x04\x95" + b"\xff" * 8,
}


def noise(count: int, seed: int) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Images uint8 [N, 32, 32, 3] of noise and labels 0, 1, ... 9, 0, ..."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8), [i % 10 for i in range(count)]


TRAIN, TEST = noise(50, 1), noise(20, 2)
NAMES = [*sources.BATCHES["train"], "test_batch"]


def good_batches() -> dict[str, bytes]:
    """Pickle the small data set as the official batches."""
    files = {"batches.meta": pickle.dumps({"label_names": list("0123456789")}, protocol=2)}
    for number, name in enumerate(NAMES):
        part = slice(10 * number, 10 * number + 10)
        images, labels = TEST if name == "test_batch" else (TRAIN[0][part], TRAIN[1][part])
        pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)
        files[name] = pickle.dumps({"data": pixels, "labels": labels}, protocol=2)
    return files


def tar_of(files: dict[str, bytes], change: Callable[[tarfile.TarInfo], object] = lambda member: None) -> bytes:
    """Pack files as the official archive has them, uncompressed; `change` may make a member lie."""
    packed = b""
    for name, content in files.items():
        member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
        member.size = len(content)
        change(member)
        packed += member.tobuf(tarfile.GNU_FORMAT) + (content + bytes(-len(content) % 512) if member.size else b"")
    return packed + bytes(1024)


def _lying_member(rng: random.Random, target: Path) -> bytes:
    """Pack one member that is a link, a device, twice there, elsewhere, or larger than it says."""
    victim, kind = (
        rng.choice(NAMES),
        rng.choice(("link", "hard link", "fifo", "device", "up", "absolute", "twice", "size", "sparse")),
    )

    def change(member: tarfile.TarInfo) -> None:
        if not member.name.endswith(victim):
            return
        kinds = {
            "link": tarfile.SYMTYPE,
            "hard link": tarfile.LNKTYPE,
            "fifo": tarfile.FIFOTYPE,
            "device": tarfile.CHRTYPE,
            "sparse": tarfile.GNUTYPE_SPARSE,
        }
        member.type = kinds.get(kind, member.type)
        member.linkname = str(target) if kind in ("link", "hard link") else ""
        member.size = {"size": 1 << 40}.get(kind, 0 if kind in ("link", "hard link", "fifo", "device") else member.size)
        member.name = {"up": f"../{victim}", "absolute": str(target.with_name(victim))}.get(kind, member.name)

    packed = tar_of(good_batches(), change)
    return packed[:-1024] + tar_of({victim: b"again"}) if kind == "twice" else packed


ZEROS = gzip.compress(bytes(1 << 20), 9)  # a megabyte in a kilobyte; gzip files can be put end to end


def _bomb(rng: random.Random) -> bytes:
    """Pack zeros: a hundred kilobytes become more than a gigabyte."""
    head = tarfile.TarInfo(rng.choice(("cifar-10-batches-py/data_batch_1", "movie")))
    head.size = rng.choice((1 << 20, 90 << 20, 1100 << 20))
    return gzip.compress(head.tobuf()) + ZEROS * 1100


def archive(rng: random.Random, folder: Path) -> tuple[Path, bool]:
    """Write a bad archive; say whether any damage to it must be noticed."""
    file = folder / "cifar-10-python.tar.gz"
    match rng.choice(
        ("bytes", "bytes", "bytes", "tar", "tar", "pickle", "pickle", "batch", "batch", "member", "member", "lacks")
    ):
        case "bytes":
            file.write_bytes(damage(rng, gzip.compress(tar_of(good_batches()), 1)))
            return file, True
        case "tar":
            packed = damage(rng, tar_of(good_batches()))
        case "pickle":
            files, name = good_batches(), rng.choice([*NAMES, "batches.meta"])
            packed = tar_of(files | {name: damage(rng, files[name])})
        case "batch":
            packed = tar_of(good_batches() | {rng.choice(NAMES): bad_batch(rng)})
        case "member":
            packed = _lying_member(rng, folder / "target")
        case _:
            files = good_batches()
            del files[rng.choice(list(files))]
            packed = tar_of(files)
    file.write_bytes(_bomb(rng) if rng.random() < 0.005 else gzip.compress(packed, 1))
    return file, False


def bad_batch(rng: random.Random) -> bytes:
    """Choose one of the bad batches."""
    bad = rng.choice(list(BAD_BATCHES.values()))
    return bad if isinstance(bad, bytes) else bad_batch_of(bad)


def bad_batch_of(bad: dict[str, Any]) -> bytes:
    """Pickle a batch with these things instead of the right ones."""
    images, labels = noise(10, 3)
    batch = {"data": images.reshape(10, 3072), "labels": labels} | bad
    return pickle.dumps({key: value for key, value in batch.items() if value is not None}, protocol=2)


def batch_folder(rng: random.Random, folder: Path) -> tuple[Path, bool]:
    """Write the extracted folder with one bad file."""
    files, name = good_batches(), rng.choice([*NAMES, "batches.meta"])
    for other, content in files.items():
        (folder / other).write_bytes(content)
    (folder / name).unlink()
    match rng.choice(("bytes", "batch", "folder", "link to itself", "missing", "sparse")):
        case "bytes":
            (folder / name).write_bytes(damage(rng, files[name]))
        case "batch":
            (folder / name).write_bytes(bad_batch(rng))
        case "folder":
            (folder / name).mkdir()
        case "link to itself":
            (folder / name).symlink_to(name)
        case "sparse":
            with open(folder / name, "wb") as file:
                file.truncate(1 << 40)
    return folder, False


def parquet(rng: random.Random, folder: Path) -> tuple[Path, bool]:
    """Write parquet files, one of them bad."""
    file = folder / rng.choice(("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"))
    kind = rng.choice(
        ("bytes", "bytes", "bytes", "image", "pixels", "label", "columns", "types", "dictionary", "rows", "names")
    )
    for name, (images, labels) in (("train", TRAIN), ("test", TEST)):
        blobs = [encoded(Image.fromarray(image), "PNG") for image in images[:10]]
        write_parquet(folder / f"{name}-00000-of-00001.parquet", blobs, labels[:10])
    good = [encoded(Image.fromarray(image), rng.choice(("PNG", "JPEG"))) for image in TEST[0][:4]]
    match kind:
        case "bytes":
            file.write_bytes(damage(rng, file.read_bytes()))
        case "image":
            write_parquet(file, [*good, damage(rng, good[0])], [0, 1, 2, 3, 4])
        case "pixels":
            write_parquet(file, [*good, png(rng.choice((300, 30_000, 2_000_000_000)), 30_000, b"")], [0, 1, 2, 3, 4])
        case "label":
            write_parquet(file, good, [0, 1, 2, rng.choice((-1, 10, None, 1 << 60))])
        case "columns":
            pq.write_table(pa.table({rng.choice(("img", "image", "label", "x")): [1, 2], "label": ["a", "b"]}), file)
        case "types":
            pq.write_table(pa.table({"img": [{"bytes": rng.choice((1, "text", [b"x"]))}] * 2, "label": [0.5, 1.5]}), file)
        case "dictionary" | "rows":
            file.write_bytes(parquet_bomb(kind))
        case "names":
            write_parquet(file, good, [0, 1, 2, 3], rng.choice(([], ["a"], "ab", {"a": 1}, [1, 2, 3, 4], ["a", "a", "b", "c"])))
    return folder, False


def parquet_bomb(kind: str) -> bytes:
    """Make a parquet file of a hundred million rows, or of thousands that name one large picture; made once."""
    if not (file := training.GROUND.folder / f"{kind}.parquet").exists():
        rows, blob, parts = (1 << 22, b"x", 24) if kind == "rows" else (40, bytes(3_000_000), 25)
        indices = pa.array(np.zeros(rows, np.int32))
        images = pa.StructArray.from_arrays(
            [pa.DictionaryArray.from_arrays(indices, pa.array([blob])).cast(pa.binary())], ["bytes"]
        )
        labels = pa.array(np.zeros(rows, np.int64))
        table = pa.table({"img": images, "label": labels}).replace_schema_metadata(with_names(tuple("0123456789")))
        with pq.ParquetWriter(made := io.BytesIO(), table.schema, compression="zstd") as writer:
            for _ in range(parts):
                writer.write_table(table)
        files.write(file, made.getvalue())
    return file.read_bytes()


def with_names(names: Any) -> dict[str, str]:
    """Make the metadata in which the `datasets` library of Hugging Face keeps the names of the classes."""
    return {"huggingface": json.dumps({"info": {"features": {"label": {"names": names}}}})}


def write_parquet(file: Path, blobs: list[bytes], labels: list[Any], names: Any = tuple("0123456789")) -> None:
    """Write what the `datasets` library of Hugging Face writes."""
    schema = pa.schema(
        [("img", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())], metadata=with_names(names)
    )
    rows = pa.array([{"bytes": blob, "path": None} for blob in blobs], schema.field("img").type)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays([rows, pa.array(labels[: len(blobs)], pa.int64())], schema=schema), file)


def class_folders(rng: random.Random, folder: Path) -> tuple[Path, bool]:
    """Write folders of images by class with something odd in them."""
    for part, name, i in itertools.product(("train", "test"), ("cat", "dog"), range(2)):
        (folder / part / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(TRAIN[0][i]).save(folder / part / name / f"{i}.png")
    place = folder / rng.choice(("train", "test")) / rng.choice(("cat", "dog"))
    odd = place / rng.choice(("1.png", "new.jpg", "Thumbs.db"))
    odd.unlink(missing_ok=True)
    match rng.choice(("bytes", "photo", "folder", "fifo", "link to itself", "link to nothing", "no class", "no image")):
        case "bytes":
            odd.write_bytes(rng.randbytes(rng.randint(0, 100)))
        case "photo":
            odd.write_bytes(photo(rng))
        case "folder":
            odd.mkdir()
        case "fifo":
            os.mkfifo(odd)
        case "link to itself":
            odd.symlink_to(odd.name)
        case "link to nothing":
            odd.symlink_to("/nothing/there")
        case "no class":
            shutil.rmtree(place)
        case "no image":
            for file in place.iterdir():
                file.unlink()
    return folder, False


MAKERS = (archive, archive, batch_folder, parquet, class_folders)


RIGHT = {
    part: Split(torch.from_numpy(images), torch.tensor(labels), tuple("0123456789"), "").sha256
    for part, (images, labels) in (("train", TRAIN), ("test", TEST))
}


def data(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """Read bad data sets; nothing may be written, and what is accepted must be images with labels of its classes."""
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    for trial in range(count):
        where = folder / f"{trial}"
        where.mkdir()
        make = rng.choice(MAKERS)
        path, exact = make(rng, where)
        before = sorted(folder.rglob("*"))
        for part in ("train", "test"):
            try:
                split = sources.load(path, part)
            except ValueError as error:
                expect(str(folder) in str(error) or str(error).startswith("key"), f"{make.__name__}: no file is named: {error}")
                expect(" ".join(str(error).split()).isprintable(), f"{make.__name__}: a terminal would obey {error!r}")
            else:
                _expect_split(split, RIGHT[part] if exact else None, make.__name__)
        ended = call("evaluate", training.GROUND.model, "--data", path, "--json")
        if ended.status:
            ended.refused(2)
        else:
            expect(0 <= json.loads(ended.out)["accuracy"] <= 100, ended.out)
        expect(sorted(folder.rglob("*")) == before, f"{make.__name__}: it wrote a file")
        shutil.rmtree(where)
        yield


def _expect_split(split: Split | None, sha256: str | None, what: str) -> None:
    if split is None:
        return
    shape, labels = tuple(split.images.shape), split.labels
    expect(split.images.dtype == torch.uint8 and shape == (len(labels), 32, 32, 3) and len(labels), f"{what}: images {shape}")
    expect(bool(((labels >= 0) & (labels < len(split.classes))).all()), f"{what}: labels outside the classes")
    expect(all(isinstance(name, str) for name in split.classes), f"{what}: classes {split.classes}")
    expect(sha256 in (None, split.sha256), f"{what}: other data than was written")


# --- pickles that want to run something ---

MARKER = Path("executed")  # relative: a child has its own folder
PAYLOADS: dict[str, Callable[[], Any]] = {
    "os.system": lambda: Call(os.system, f"touch {MARKER}"),
    "os.mkdir": lambda: Call(os.mkdir, str(MARKER)),
    "os.popen": lambda: Call(os.popen, f"touch {MARKER}"),
    "os.open": lambda: Call(os.open, str(MARKER), os.O_CREAT),
    "os.symlink": lambda: Call(os.symlink, "x", str(MARKER)),
    "posix_spawn": lambda: Call(os.posix_spawn, "/usr/bin/touch", ["touch", str(MARKER)], {}),
    "eval": lambda: Call(builtins.eval, f"open('{MARKER}', 'w')"),
    "exec": lambda: Call(builtins.exec, f"open('{MARKER}', 'w')"),
    "open": lambda: Call(builtins.open, str(MARKER), "w"),
    "__import__": lambda: Call(builtins.__import__, "antigravity"),
    "getattr": lambda: Call(getattr, "text", "upper"),
    "check_output": lambda: Call(subprocess.check_output, ["touch", str(MARKER)]),
    "Popen": lambda: Call(subprocess.Popen, ["touch", str(MARKER)]),
    "copyfile": lambda: Call(shutil.copyfile, "/proc/self/status", str(MARKER)),
    "run_path": lambda: Call(runpy.run_path, str(MARKER)),
    "import_module": lambda: Call(importlib.import_module, "antigravity"),
    "partial": lambda: functools.partial(os.mkdir, str(MARKER)),
    "Path.touch": lambda: Call(Path.touch, MARKER),
    "np.save": lambda: Call(np.save, str(MARKER), 1),
    "np.savetxt": lambda: Call(np.savetxt, str(MARKER), [1]),
    "np.memmap": lambda: Call(np.memmap, str(MARKER), "u1", "w+", 0, (1,)),
    "np.load": lambda: Call(np.load, str(MARKER), None, True),
    "torch.save": lambda: Call(torch.save, 1, str(MARKER)),
    "torch.load": lambda: Call(torch.load, str(MARKER)),
    "warnings": lambda: Call(warnings.warn, f"open('{MARKER}', 'w')"),
}


def payloads(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """Put each payload into batches, archive, checkpoints, first weights and a model folder; every reader must refuse it."""
    audit: list[str] = []
    sys.addaudithook(
        lambda event, arguments: audit.append(event) if event in ("os.system", "subprocess.Popen", "os.mkdir") else None
    )
    os.chdir(folder)
    for number, (name, payload) in enumerate(itertools.islice(itertools.cycle(PAYLOADS.items()), count)):
        where = folder / f"{number}"
        where.mkdir()
        content = pickle.dumps({"data": payload(), "label_names": list("0123456789")}, protocol=rng.choice((2, 4)))
        torch.save({"state": payload()}, zipped := where / "zipped.pt")
        hostile, victim = [content, zipped.read_bytes()], rng.choice(("data_batch_3", "batches.meta", "test_batch"))
        packed = where / "a.tar.gz"
        packed.write_bytes(gzip.compress(tar_of(good_batches() | {victim: content})))
        batches = where / "batches"
        batches.mkdir()
        for other, good in (good_batches() | {victim: content}).items():
            (batches / other).write_bytes(good)
        model = shutil.copytree(training.GROUND.model, where / "model")
        run, before = training.GROUND.after_epoch(2, where / "out"), len(audit)
        for path, part in itertools.product((packed, batches), ("train", "test")):
            try:
                sources.load(path, part)
            except ValueError as error:
                expect(victim in str(error) and "no CIFAR batch needs" in str(error), error)
            else:
                expect(victim not in (*sources.BATCHES[part], "batches.meta"), f"{name}: {path} was read")
        for weights in hostile:
            (model / "model.safetensors").write_bytes(weights)
            call("evaluate", model, "--data", training.GROUND.data, "--json").refused(2, "model.safetensors")
            (model / "model.onnx").write_bytes(weights)
            call("infer", "x.png", "--model", model).refused(2, "model.onnx")
            model.joinpath("model.pt").write_bytes(weights)
            call("evaluate", model / "model.pt", "--data", training.GROUND.data).refused(2, "model.pt")
        for checkpoint, weights in zip((run_folder.LAST, run_folder.PREVIOUS), hostile, strict=True):
            (run / checkpoint).write_bytes(weights)
        expect(len(audit) == before, f"{name}: executed {audit[before:]}")
        training.GROUND.train(where / "out").end().refused(2, run_folder.LAST)
        expect(not list(folder.rglob(MARKER.name)), f"{name}: executed")
        shutil.rmtree(where)
        yield


# --- model folders ---


def _hostile_safetensors(rng: random.Random) -> bytes:
    header: Any = rng.choice(
        [
            {"a": {"dtype": "F32", "shape": [1 << 40, 1 << 30], "data_offsets": [0, 4]}},
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 62]}},
            {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
            {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"},
            {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
            {"__metadata__": {"checkpoint": "[" * 100_000}},
            {"__metadata__": {"checkpoint": "null"}},
            {"__metadata__": {"checkpoint": '{"sha256": 1, "state": ' + "[" * 900 + "]" * 900 + "}"}},
            {},
            [],
            1,
        ]
    )
    text = json.dumps(header).encode()
    length = rng.choice((len(text), len(text), len(text) + 1, 1 << 62, (1 << 64) - 1, 0))
    return struct.pack("<Q", length) + text + b"\0\0\0\0"


def _hostile_config(rng: random.Random) -> bytes:
    config = json.loads((training.GROUND.model / "config.json").read_text())
    key = rng.choice(list(config))
    value: Any = rng.choice(
        [None, True, -1, 0, 1e308, 10**400, "", "x" * 100_000, [], {}, [None] * 3, ["a", "a"], ["\x1b[2J", "b"]]
    )
    if rng.random() < 0.4:
        key = rng.choice(list(config["architecture"]))
        config["architecture"][key] = rng.choice([value, 10**9, 1202, "layer", "pre"])
    elif rng.random() < 0.2:
        del config[key]
    else:
        config[key] = value
    return rng.choice(
        (json.dumps(config).encode(), b"[" * 100_000, b'{"classes":' * 50_000, json.dumps(config).encode("utf-16"))
    )


def models(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """Use damaged model folders: the answers must be those of the undamaged one, or a clear line."""
    picture = folder / "x.png"
    Image.fromarray(TEST[0][0]).save(picture)

    def answers(model: Path) -> list[tuple[int, Any]]:
        found = []
        for command in (("infer", picture, "--model", model), ("evaluate", model, "--data", training.GROUND.data)):
            ended = call(*command, "--json")
            if ended.status:
                ended.refused(2, str(folder))
            answer = json.loads(ended.out) if not ended.status else None
            found.append((ended.status, answer if command[0] == "infer" else answer and answer["confusion"]))
        return found

    right = answers(shutil.copytree(training.GROUND.model, folder / "right"))
    for trial in range(count):
        model = shutil.copytree(training.GROUND.model, folder / f"{trial}")
        file = model / rng.choice(("model.safetensors", "model.onnx", "model.onnx", "config.json"))
        hostile = {"model.safetensors": _hostile_safetensors, "config.json": _hostile_config}.get(file.name)
        content = damage(rng, file.read_bytes())
        if hostile and rng.random() < 0.4:
            content = hostile(rng)
        file.write_bytes(content)
        for (status, answer), (_, wanted) in zip(answers(model), right, strict=True):
            expect(status == 2 or answer == wanted or file.name == "config.json", f"{file.name}: another answer: {answer}")
        shutil.rmtree(model)
        yield


# --- photos ---


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, extra: bytes = b"", pixels: bytes = bytes(50_000), depth: int = 8, colour: int = 2) -> bytes:
    """Write a PNG of any bytes; by itself it claims a size, with hardly a pixel in it."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")


@functools.cache
def _photos() -> list[bytes]:
    """One photo of each format and of every odd mode."""
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    frames = [pixels.rotate(i) for i in range(3)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a photo"
    return [
        encoded(pixels, "JPEG"),
        encoded(pixels, "JPEG", progressive=True, exif=exif),
        encoded(pixels.convert("CMYK"), "JPEG"),
        encoded(pixels, "PNG", exif=exif),
        encoded(pixels.convert("P"), "PNG"),
        encoded(pixels.convert("1"), "PNG"),
        encoded(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
        encoded(pixels.convert("RGBA"), "PNG"),
        encoded(pixels, "WEBP"),
        encoded(pixels, "WEBP", lossless=True),
        encoded(frames[0], "WEBP", save_all=True, append_images=frames),
        encoded(frames[0].convert("P"), "GIF", save_all=True, append_images=frames),
        encoded(pixels, "BMP"),
        encoded(pixels.convert("P"), "BMP"),
        *(encoded(pixels, "TIFF", compression=c) for c in (None, "tiff_lzw", "tiff_deflate", "jpeg")),
        encoded(frames[0], "TIFF", save_all=True, append_images=frames),
        encoded(pixels.convert("I;16"), "TIFF"),
    ]


@functools.cache
def _bombs() -> list[bytes]:
    """Small files that want much memory or time."""
    whole = encoded(Image.new("L", (3000, 3000), 128), "JPEG", progressive=True)
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return [
        png(60_000, 60_000, b""),
        png(9_000, 9_000, b""),
        png(2_147_483_647, 1, b""),
        png(0, 0, b""),
        png(10, 10, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))) * 3),
        png(10, 10, _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(80_000_000)))),
        encoded(Image.new("1", (9_000, 9_000)), "PNG"),
        encoded(Image.new("RGB", (8_000, 8_000)), "WEBP", lossless=True),
        encoded(Image.new("1", (9_000, 9_000)), "TIFF", compression="group4"),
        encoded(Image.new("1", (15_000, 15_000)), "PNG"),
        whole[:-2] + scan * ((900_000 - len(whole)) // len(scan)) + b"\xff\xd9",
        b"GIF89a"
        + struct.pack("<HHBBB", 65_535, 65_535, 0, 0, 0)
        + b","
        + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0)
        + b"\x02\0;",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2_000_000_000, -2_000_000_000, 1, 24, 0, 0, 0, 0, 0, 0),
    ]


def photo(rng: random.Random) -> bytes:
    """Damage a photo byte by byte or in its structure."""
    good = rng.choice(_photos())
    match rng.choice(("bytes", "bytes", "bytes", "head", "chunks", "other", "tail")):
        case "head":  # the numbers that say how large it is, and where the rest is
            changed = bytearray(good)
            for _ in range(rng.randint(1, 6)):
                changed[rng.randrange(min(len(good), 120))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            return bytes(changed)
        case "chunks":  # a PNG whose chunks are swapped, doubled, dropped or changed, with right checksums
            whole, at, chunks = rng.choice([photo for photo in _photos() if photo[1:4] == b"PNG"]), 8, []
            while at < len(whole):
                size = struct.unpack(">I", whole[at : at + 4])[0]
                chunks.append((whole[at + 4 : at + 8], whole[at + 8 : at + 8 + size]))
                at += 12 + size
            chunks += [*rng.sample(chunks, rng.randint(0, 1)), (rng.randbytes(4), rng.randbytes(9))]
            rng.shuffle(chunks)
            chunks.sort(key=lambda chunk: chunk[0] != b"IHDR" and rng.random() < 0.9)
            return whole[:8] + b"".join(
                _chunk(kind, damage(rng, body) if body and rng.random() < 0.2 else body) for kind, body in chunks
            )
        case "other":  # the start of one format and the rest of another
            other = rng.choice(_photos())
            return good[: rng.randrange(200)] + other[rng.randrange(len(other)) :]
        case "tail":
            return good + rng.randbytes(rng.choice((1, 1000)))
        case _:
            return damage(rng, good)


def photos(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """Classify damaged photos, many with one command: each gets a prediction or a line, a good one among them its answer."""
    good = folder / "good.png"
    Image.fromarray(TEST[0][0]).save(good)
    files = [folder / f"{number}.jpg" for number in range(count)]
    for file in files:
        file.write_bytes(rng.choice(_bombs()) if rng.random() < 0.01 else photo(rng))
    ended = call("infer", *files, good, "--model", training.GROUND.model, "--json")
    expect(ended.status in (0, 2), f"exit status {ended.status}: {ended.err[-2000:]}")
    answers = {answer["file"]: answer for answer in json.loads(ended.out)}
    expect(str(good) in answers, "the good photo has no answer")
    lines = [line for line in ended.err.splitlines() if line and not re.fullmatch(r"photos: .* % done, .* left", line)]
    expect(
        len(answers) + len(lines) == count + 1,
        f"{len(answers)} answers and {len(lines)} lines for {count + 1} photos: {lines[:3]}",
    )
    for file in files:
        named = [line for line in lines if line.startswith(f"error: {file}: ") and line.isprintable()]
        expect(str(file) in answers or len(named) == 1, f"{file.name}: neither an answer nor one clear line: {named}")
        answer = answers.get(str(file), {"probabilities": {"": 1.0}})
        expect(abs(sum(answer["probabilities"].values()) - 1) < 1e-4, f"{file.name}: probabilities {answer}")
    yield from itertools.repeat(None, count)

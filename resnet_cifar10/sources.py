"""Every source of labelled images on disk, read into the one shape of data.Split."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import pickletools
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from .data import Split, hold_out
from .decode import decode
from .download import ARCHIVE
from .errors import one_line
from .infer import SIZE, check_class_names

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": [], "test": ["test_batch"]}
MAX_ROWS = 1_000_000  # of one parquet file
MAX_PARQUET_BYTES = 500_000_000  # of all encoded images of a split
MAX_BATCH_BYTES = 100_000_000  # of one batch of the archive; the real ones have 31 MB
MAX_TUPLES = 100  # in one batch; the real ones have six, and tuples in tuples end Python's stack
MAX_ARCHIVE_BYTES = 1_000_000_000  # unpacked; the real one has 186 MB


def load(path: str | Path, split: str, processes: int = 1) -> Split | None:
    """Read one split, "train", "val" or "test", of a data set; None where the source has no such split.

    Args:
        path: "digits"; the archive cifar-10-python.tar.gz or a folder with it; its extracted folder, whole or in
            part; a folder with Hugging Face parquet files; or a folder train/<class>/*, optionally val/ and test/.
        split: Only this split is read.
        processes: That decode at once. With more than one, call it from a module that can be imported.

    Raises:
        ValueError: With one line that names the file, what was found and what is allowed.

    """
    if split not in BATCHES:
        raise ValueError(f"split: found {split!r}; allowed: {', '.join(BATCHES)}")
    path = Path(path)
    if str(path) == "digits" and not path.exists():
        return _digits(split)
    for folder in (path, path / "cifar-10-batches-py"):
        if any((folder / name).is_file() for names in BATCHES.values() for name in names):
            return _from_folder(folder, split)
    archive = path / ARCHIVE if path.is_dir() else path
    if archive.is_file() and archive.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _from_archive(archive, split)
    if not path.is_dir():
        raise ValueError(f"{path}: no such data; allowed: a folder, {ARCHIVE}, or 'digits'")
    if any(path.rglob("*.parquet")):
        return _from_parquet(path, split, processes)
    inside = sorted(entry for entry in path.iterdir() if entry.name[0] != ".")
    for entry in inside:
        if entry.is_dir() and entry.name.lower().startswith(("train", "val", "test")) and entry.name not in BATCHES:
            raise ValueError(f"{path}: found {entry.name}; allowed: train, val and test, spelt like this")
    if any((path / part).is_dir() for part in BATCHES):
        return _from_class_folders(path, split, processes)
    found = ", ".join(entry.name for entry in inside[:5]) or "an empty folder"
    if meant := [entry for entry in inside if (entry / "train").is_dir()]:
        raise ValueError(f"{path}: found {found}; did you mean {meant[0]}?")
    allowed = f"{ARCHIVE}, data_batch_1..5 and test_batch, parquet files, or train/<class>/* (to evaluate, test/<class>/*)"
    raise ValueError(f"{path}: found {found}; allowed: {allowed}")


def _checked(images: NDArray[Any], labels: list[int], classes: tuple[str, ...], source: str, where: Path) -> Split:
    if not labels:
        raise ValueError(f"{where}: holds no image")
    if not all(type(label) is int and 0 <= label < len(classes) for label in labels):
        raise ValueError(f"{where}: found a label that is not one of 0..{len(classes) - 1} ({len(classes)} classes)")
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.tensor(labels), classes, source)


# --- the official archive and its folder: pickled batches, read by an unpickler that knows four harmless names ---


class _Array:
    """Stands for an array, or its type, while a pickle is read: no code of NumPy runs on what a stranger wrote."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def pixels(self) -> NDArray[Any]:
        """Rebuild an array of bytes, out of its shape and that many bytes."""
        _, shape, kind, by_columns, content = self.state
        if kind.arguments[0] != "u1":
            raise ValueError("no array of bytes")
        content = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _BatchUnpickler(pickle.Unpickler):
    """Builds plain values and stand-ins for arrays; any other name in a pickle is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy._core.multiarray", "_reconstruct"): _Array,  # its name since NumPy 2
            ("numpy", "ndarray"): _Array,
            ("numpy", "dtype"): _Array,
            ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it asks for {module + '.' + name!r}, which no CIFAR batch needs")
        return known[module, name]


def _unpickle(content: bytes, where: str) -> dict[str, Any]:
    try:
        tuples = 0
        for instruction, argument, _ in pickletools.genops(content):
            tuples += instruction.name.startswith("TUPLE")
            if tuples > MAX_TUPLES or ("PUT" in instruction.name and (argument or 0) > 1_000_000):
                raise ValueError("more tuples or numbered objects than any batch has")  # they could exhaust stack or memory
        batch = _BatchUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a hostile pickle can raise anything
        raise ValueError(f"{where}: not a CIFAR-10 batch: {str(error) or type(error).__name__}") from None
    if not isinstance(batch, dict):
        raise ValueError(f"{where}: not a CIFAR-10 batch: found {type(batch).__name__}, not a dictionary")
    return batch


def _from_pickles(members: dict[str, bytes], where: Path, split: str) -> Split | None:
    names: tuple[str, ...] = CIFAR10_CLASSES
    if "batches.meta" in members:
        meta = _unpickle(members["batches.meta"], f"{where}: batches.meta")
        check_class_names(meta.get("label_names"), f"{where}: batches.meta: key 'label_names'")
        names = tuple(meta["label_names"])
    images, labels = [], []
    for name in (name for name in BATCHES[split] if name in members):
        batch = _unpickle(members[name], f"{where}: {name}")
        try:
            pixels, batch_labels = batch["data"].pixels(), batch["labels"]
            if pixels.shape != (len(batch_labels), 3 * SIZE * SIZE) or not isinstance(batch_labels, list):
                raise ValueError(f"found {pixels.shape}")
        except Exception:  # whatever stands in the place of an array
            raise ValueError(f"{where}: {name}: allowed: 'data' uint8 [N, 3072] and a list of N 'labels'") from None
        images.append(pixels.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1))  # stored channel by channel
        labels += batch_labels
    return _checked(np.concatenate(images), labels, names, "CIFAR-10", where) if images else None


def _from_folder(folder: Path, split: str) -> Split | None:
    files = [folder / name for name in (*BATCHES[split], "batches.meta") if (folder / name).is_file()]
    if large := [file for file in files if file.stat().st_size > MAX_BATCH_BYTES]:
        raise ValueError(f"{large[0]}: larger than {MAX_BATCH_BYTES:,} bytes")
    return _from_pickles({file.name: file.read_bytes() for file in files}, folder, split)


def _from_archive(archive: Path, split: str) -> Split | None:
    """Read members in memory, in one pass; nothing is extracted, so no name or link in it can do harm."""
    members: dict[str, bytes] = {}
    try:
        open_it: Any = open if archive.suffix == ".tar" else gzip.open
        with open_it(archive, "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                if tar.offset + member.size > MAX_ARCHIVE_BYTES:
                    raise ValueError(f"{archive}: larger than {MAX_ARCHIVE_BYTES:,} bytes when unpacked")
                name = Path(member.name).name
                if member.isfile() and name in (*BATCHES[split], "batches.meta"):
                    if member.size > MAX_BATCH_BYTES or name in members:
                        raise ValueError(f"{archive}: {name} is there twice or larger than {MAX_BATCH_BYTES:,} bytes")
                    members[name] = tar.extractfile(member).read()  # type: ignore[union-attr]  # it is a file
            while stream.read(1 << 20) and stream.tell() < MAX_ARCHIVE_BYTES:
                pass  # to the end: only there does gzip check what it has read
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{archive}: damaged or truncated archive: {error}") from None
    if missing := {*BATCHES[split], "batches.meta"} - members.keys():
        raise ValueError(f"{archive}: damaged or truncated archive: lacks {', '.join(sorted(missing))}")
    return _from_pickles(members, archive, split)


# --- Hugging Face parquet ---


def _from_parquet(folder: Path, split: str, processes: int) -> Split | None:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    blobs: list[bytes] = []
    labels: list[int] = []
    total = 0
    parts = {"train": "train", "val": "val", "validation": "val", "test": "test"}
    part_of = {
        file: parts.get(file.name.replace(".", "-").split("-")[0], parts.get(file.parent.name))
        for file in sorted(folder.rglob("*.parquet"))
    }
    if not any(part_of.values()):
        raise ValueError(f"{min(part_of)}: neither it nor its folder is named after a split; allowed: train, validation, test")
    files = [file for file, part in part_of.items() if part == split]
    if not files:
        return None
    named: dict[tuple[str, ...], Path] = {}
    for file in (file for file, part in part_of.items() if part):  # of all splits: a label means the same in each
        try:
            features = json.loads((pq.read_schema(file).metadata or {})[b"huggingface"])["info"]["features"]
            said = features["label"]["names"]
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{file}: not a parquet file with class names, as Hugging Face writes them: {one_line(error)}"
            ) from None
        check_class_names(said, f"{file}: 'names'")
        named.setdefault(tuple(said), file)
    if len(named) > 1:
        first, other, *_ = named.values()
        raise ValueError(f"{other}: its class names are not those of {first}")
    for file in files:
        try:
            table = pq.ParquetFile(file)
            image_column = "img" if "img" in table.schema_arrow.names else "image"
            if table.metadata.num_rows > MAX_ROWS:
                raise ValueError(f"found {table.metadata.num_rows:,} rows; allowed: at most {MAX_ROWS:,}")
            # all rows can hold one large image: small parts bound the memory
            for part in table.iter_batches(64, columns=[image_column, "label"]):
                images_here = [blob or b"" for blob in pc.struct_field(part.column(image_column), "bytes").to_pylist()]
                blobs += images_here
                total += sum(map(len, images_here))
                if total > MAX_PARQUET_BYTES:
                    raise ValueError(f"found more than {MAX_PARQUET_BYTES:,} bytes of images")
                labels += part.column("label").to_pylist()
        except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{file}: not a parquet file with 'img' or 'image' and 'label': {one_line(error)}") from None
    (names,) = named
    images = decode(blobs, f"{folder}: split '{split}'", processes)
    qualities = {_jpeg_quality(blob) for blob in blobs[:: len(blobs) // 100 + 1]} - {0}
    what = "CIFAR-10" if names == CIFAR10_CLASSES else folder.resolve().name
    copy = f" (JPEG quality {max(qualities)} copy)" if len(qualities) == 1 else " (JPEG copy)" if qualities else ""
    return _checked(images, labels, names, what + copy, folder)


def _jpeg_quality(content: bytes) -> int:
    """Recover the quality setting from the sum of the luminance table (jcparam.c of libjpeg): 3,688 at 50; 0: no usual JPEG."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            percent = 100 * sum(image.quantization[0]) / 3688  # type: ignore[attr-defined]
    except (OSError, AttributeError, KeyError):
        return 0
    return round(100 - percent / 2 if percent < 100 else 5000 / percent)


# --- folders of images by class, and the digits inside scikit-learn ---


def _from_class_folders(path: Path, split: str, processes: int) -> Split | None:
    parts = {
        part: sorted(entry.name for entry in (path / part).iterdir() if entry.is_dir() and entry.name[0] != ".")
        for part in BATCHES
        if (path / part).is_dir()
    }
    if split not in parts:
        return None
    first, classes = next(iter(parts.items()))
    check_class_names(classes, f"{path / first}: its folders")
    if parts[split] != classes:
        differ = ", ".join(sorted(set(parts[split]) ^ set(classes)))
        raise ValueError(f"{path / split}: its classes are not those of {first}/: {differ}")
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((path / split / name).iterdir())
        if file.name[0] != "." and file.name not in ("Thumbs.db", "desktop.ini")
    ]
    if empty := set(range(len(classes))) - {label for _, label in files}:
        raise ValueError(f"{path / split / classes[min(empty)]}: holds no image")
    if others := [file for file, _ in files if not file.is_file()]:  # a pipe would be waited for
        raise ValueError(f"{others[0]}: is not a file; allowed: images")
    images = decode([file for file, _ in files], str(path), processes)
    return _checked(images, [label for _, label in files], tuple(classes), path.resolve().name, path)


def _digits(split: str) -> Split | None:
    """8x8 grey digits as 32x32 RGB; a fixed stratified fifth is the test split."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("digits: needs scikit-learn: pip install 'resnet-cifar10[demo]'") from None
    if split == "val":
        return None
    grey, labels = load_digits(return_X_y=True)
    small = [Image.fromarray(g) for g in (grey.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)]
    images = np.stack([np.asarray(g.resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB")) for g in small])
    everything = _checked(images, labels.tolist(), tuple("0123456789"), "digits (scikit-learn)", Path("digits"))
    train, test = hold_out(everything.labels, len(labels) // 5, seed=0)
    return everything.subset(train if split == "train" else test)

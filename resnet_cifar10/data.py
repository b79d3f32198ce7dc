"""Labelled images as one uint8 tensor: every source on disk, the held-out split, batches with augmentation."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .infer import read_photo, square

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ARCHIVE = "cifar-10-python.tar.gz"
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"], "val": []}
SIZE = 32
CROP_PADDING = 4  # pixels on each side before the random crop (He et al. 2015, section 4.2)
CUTOUT_SIZE = 8  # side of the erased square; 16 in DeVries & Taylor 2017, who train longer and wider networks
MIXUP_ALPHA = 0.2  # Zhang et al. 2018, section 3.1
MAX_BATCH_BYTES = 100_000_000  # of one member of an archive; the real ones have 31 MB
MAX_IMAGE_PIXELS = 1 << 16  # of one image in a parquet file


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, 32, 32, 3], labels int64 [N] into classes, and where they came from."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> Split:
        """Keep the images at these indices."""
        return Split(self.images[indices], self.labels[indices], self.classes, self.source)

    @property
    def sha256(self) -> str:
        """The checksum of pixels, labels and class names: equal data give equal checksums."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


def load(path: str | Path, split: str) -> Split | None:
    """Read the split "train", "val" or "test" of a data set.

    Args:
        path: "digits"; the archive cifar-10-python.tar.gz or a folder with it; its extracted folder, whole or in
            part; a folder with Hugging Face parquet files; or a folder train/<class>/*, optionally val/ and test/.
        split: Only this split is read.

    Returns:
        The images, or None where the source has no such split ("val" mostly).

    Raises:
        ValueError: With one line that names the file, what was found and what is allowed.

    """
    path = Path(path)
    if str(path) == "digits" and not path.exists():
        return _digits(split)
    if path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return _from_archive(path, split)
    if not path.is_dir():
        raise ValueError(f"{path}: no such data; allowed: a folder, {ARCHIVE}, or 'digits'")
    for folder in (path, path / "cifar-10-batches-py"):
        if any((folder / name).is_file() for names in BATCHES.values() for name in names):
            return _from_batches(folder, split)
    if (path / ARCHIVE).is_file():
        return _from_archive(path / ARCHIVE, split)
    if any(path.rglob("*.parquet")):
        return _from_parquet(path, split)
    if any((path / part).is_dir() for part in ("train", "val", "test")):
        return _from_class_folders(path, split)
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "an empty folder"
    raise ValueError(f"{path}: found {found}; allowed: {ARCHIVE}, data_batch_1..5 and test_batch, "
                     "parquet files, or train/<class>/*")  # fmt: skip


def hold_out(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices into (train, validation): stratified, of exactly this validation size, a function of the seed.

    Args:
        labels: int64 [N].
        size: The number of validation images; 0 holds nothing out.
        seed: Another seed gives another split.

    Raises:
        ValueError: If a class would be left without a training image.

    """
    labels_np = labels.numpy()
    rng = np.random.default_rng([seed, 0])
    counts = np.bincount(labels_np)
    exact = counts * size / len(labels_np)
    quota = np.floor(exact).astype(int)
    quota[np.argsort(quota - exact, kind="stable")[: size - quota.sum()]] += 1  # largest remainders first
    if size and (quota >= counts).any():
        raise ValueError(f"key 'validation_size': found {size} of {len(labels_np)} images; "
                         "allowed: so many that every class keeps a training image")  # fmt: skip
    held = [rng.permutation(np.flatnonzero(labels_np == c))[:n] for c, n in enumerate(quota)]
    validation = np.sort(np.concatenate(held))
    train = np.setdiff1d(np.arange(len(labels_np)), validation)
    return torch.from_numpy(train), torch.from_numpy(validation)


def mean_and_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each colour, of uint8 [N, 32, 32, 3], in units of 0..1."""
    counts = [torch.bincount(images[..., c].flatten(), minlength=256).double() for c in range(3)]
    value = torch.arange(256).double() / 255
    mean = [float((n * value).sum() / n.sum()) for n in counts]
    std = [float(((n * (value - m) ** 2).sum() / n.sum()).sqrt()) for n, m in zip(counts, mean, strict=True)]
    return mean, [max(s, 1e-3) for s in std]  # a colour that never varies is not divided by zero


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Map uint8 [N, 32, 32, 3] to float32 [N, 3, 32, 32] (channels_last in memory) with mean 0 and deviation 1."""
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def batches(split: Split, batch_size: int, augmentation: str, seed: int, epoch: int,
            fill: Tensor) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield the augmented batches of one epoch; each image once, the last batch may be smaller.

    Order and augmentation are a function of (seed, epoch) alone: a resumed run needs no state of a generator.

    Args:
        split: The training images, on the device where the batches are wanted.
        batch_size: Images a batch.
        augmentation: "none", or parts joined by "_": crop, flip (He et al. 2015, section 4.2), cutout
            (DeVries & Taylor 2017), mixup (Zhang et al. 2018).
        seed: Of the run.
        epoch: Counted from 1.
        fill: uint8 [3], the colour of the padding: the mean, which is zero once normalised.

    Yields:
        images uint8 [B, 32, 32, 3] and the class probabilities that are the target, float32 [B, classes].

    """
    device, n, parts = split.images.device, len(split), augmentation.split("_")
    rng = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1))

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (n,), generator=rng).to(device)

    order = torch.randperm(n, generator=rng).to(device)
    pad = CROP_PADDING if "crop" in parts else 0
    top, left, flip = draw(0, 2 * pad + 1), draw(0, 2 * pad + 1), draw(0, 2 if "flip" in parts else 1).bool()
    hole_y, hole_x = draw(0, SIZE), draw(0, SIZE)
    mix = torch.from_numpy(np.random.default_rng([seed, epoch]).beta(MIXUP_ALPHA, MIXUP_ALPHA, n)).float().to(device)

    span = torch.arange(SIZE, device=device)
    padded = fill.repeat(n, SIZE + 2 * pad, SIZE + 2 * pad, 1)
    padded[:, pad : pad + SIZE, pad : pad + SIZE] = split.images
    one_hot = torch.eye(len(split.classes), device=device)
    for start in range(0, n, batch_size):
        i = order[start : start + batch_size]
        rows = top[i, None] + span
        columns = left[i, None] + torch.where(flip[i, None], span.flip(0), span)
        images = padded[i[:, None, None], rows[:, :, None], columns[:, None, :]]
        targets = one_hot[split.labels[i]]
        if "cutout" in parts:
            inside_y = (span - hole_y[i, None]).abs() * 2 <= CUTOUT_SIZE
            inside_x = (span - hole_x[i, None]).abs() * 2 <= CUTOUT_SIZE
            images = torch.where((inside_y[:, :, None] & inside_x[:, None, :])[..., None], fill, images)
        if "mixup" in parts:
            share = mix[start]  # one for the batch, with the same batch in reverse order
            images = (share * images + (1 - share) * images.flip(0)).round().to(torch.uint8)
            targets = share * targets + (1 - share) * targets.flip(0)
        yield images, targets


def _split_of(images: np.ndarray[Any, Any], labels: list[int], classes: tuple[str, ...], source: str, where: Path) -> Split:
    labels_np = np.asarray(labels)
    if not len(labels_np):
        raise ValueError(f"{where}: holds no image")
    if labels_np.dtype.kind not in "iu" or labels_np.min() < 0 or labels_np.max() >= len(classes):
        raise ValueError(f"{where}: found a label that is not one of 0..{len(classes) - 1} ({len(classes)} classes)")
    return Split(torch.from_numpy(images), torch.from_numpy(labels_np.astype(np.int64)), classes, source)


# --- the official archive and its folder: pickled batches, read by an unpickler that knows four harmless names ---


class _BatchUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain values only; any other name in a pickle is refused before it is looked up."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs")


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def _parse_batch(content: bytes, where: str) -> dict[str, Any]:
    try:
        batch = _BatchUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a hostile pickle can raise anything
        raise ValueError(f"{where}: not a CIFAR-10 batch: {error or type(error).__name__}") from None
    if not isinstance(batch, dict):
        raise ValueError(f"{where}: not a CIFAR-10 batch: found {type(batch).__name__}, not a dictionary")
    return batch


def _from_pickles(read: Callable[[str], bytes | None], where: Path, split: str, source: str) -> Split | None:
    meta = read("batches.meta")
    names = _parse_batch(meta, f"{where}: batches.meta").get("label_names") if meta else CIFAR10_CLASSES
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names) or len(names) < 2:
        raise ValueError(f"{where}: batches.meta: 'label_names' is not a list of class names")
    images, labels = [], []
    for name in BATCHES[split]:
        content = read(name)
        if content is None:
            continue
        batch = _parse_batch(content, f"{where}: {name}")
        pixels, batch_labels = batch.get("data"), batch.get("labels")
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2
                and pixels.shape[1] == 3 * SIZE * SIZE and isinstance(batch_labels, list)
                and len(batch_labels) == len(pixels) and all(type(label) is int for label in batch_labels)):  # fmt: skip
            raise ValueError(f"{where}: {name}: allowed: 'data' uint8 [N, 3072] and N whole-number 'labels'")
        images.append(pixels.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1))  # stored channel by channel
        labels += batch_labels
    if not images:
        return None
    return _split_of(np.ascontiguousarray(np.concatenate(images)), labels, tuple(names), source, where)


def _from_batches(folder: Path, split: str) -> Split | None:
    def read(name: str) -> bytes | None:
        file = folder / name
        if file.is_file() and file.stat().st_size > MAX_BATCH_BYTES:
            raise ValueError(f"{file}: larger than {MAX_BATCH_BYTES:,} bytes")
        return file.read_bytes() if file.is_file() else None

    return _from_pickles(read, folder, split, "CIFAR-10 (python batches)")


def _from_archive(archive: Path, split: str) -> Split | None:
    """Read members in memory, one pass over the archive; nothing is extracted, so no name in it can do harm."""
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(archive, "r|*") as tar:
            for member in tar:
                name = Path(member.name).name
                if not member.isfile() or name not in (*BATCHES[split], "batches.meta"):
                    continue
                if member.size > MAX_BATCH_BYTES or name in members:
                    raise ValueError(f"{archive}: {name} is there twice or larger than {MAX_BATCH_BYTES:,} bytes")
                file: IO[bytes] | None = tar.extractfile(member)
                assert file is not None, "isfile() said so"
                members[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{archive}: damaged or truncated archive: {error}") from None
    return _from_pickles(members.get, archive, split, "CIFAR-10 (python archive)")


# --- Hugging Face parquet ---


def _from_parquet(folder: Path, split: str) -> Split | None:
    import pyarrow as pa  # noqa: PLC0415  (a second to import, and only this source needs it)
    import pyarrow.parquet as pq  # noqa: PLC0415

    files = sorted(file for file in folder.rglob("*.parquet") if file.name.split("-")[0].split(".")[0] == split)
    if not files:
        return None
    blobs: list[bytes | None] = []
    labels: list[int] = []
    names = CIFAR10_CLASSES
    for file in files:
        try:
            table = pq.read_table(file)
            image_column = next((c for c in ("img", "image") if c in table.column_names), None)
            if image_column is None or "label" not in table.column_names:
                raise ValueError(f"found columns {', '.join(table.column_names)}; allowed: 'img' or 'image', and 'label'")
            info = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
            label_feature = info.get("info", {}).get("features", {}).get("label", {})
            names = tuple(label_feature.get("names") or names)
            blobs += [row and row.get("bytes") for row in table.column(image_column).to_pylist()]
            labels += table.column("label").to_pylist()
        except (pa.ArrowException, OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{file}: not a parquet file of images: {error}") from None
    images = np.empty((len(blobs), SIZE, SIZE, 3), np.uint8)
    qualities: set[int] = set()
    for i, blob in enumerate(blobs):
        try:
            with Image.open(io.BytesIO(blob or b""), formats=("JPEG", "PNG")) as image:
                if image.width * image.height > MAX_IMAGE_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels")
                if image.format == "JPEG" and len(qualities) < 2:
                    qualities.add(_jpeg_quality(image))
                pixels = image if image.mode == "RGB" else image.convert("RGB")
                images[i] = square(pixels, SIZE) if pixels.size != (SIZE, SIZE) else pixels
        except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
            raise ValueError(f"{folder}: image {i} of split '{split}' does not decode: {error}") from None
    what = "CIFAR-10" if names == CIFAR10_CLASSES else folder.resolve().name
    jpeg = f" (JPEG quality {qualities.pop()} copy)" if len(qualities) == 1 else " (JPEG copy)" if qualities else ""
    return _split_of(images, labels, names, what + jpeg, folder)


def _jpeg_quality(image: Image.Image) -> int:
    """Recover the quality setting from the sum of the luminance table, 3,688 at quality 50 (libjpeg, jcparam.c)."""
    percent = 100 * sum(image.quantization[0]) / 3688  # type: ignore[attr-defined]
    return round(100 - percent / 2 if percent < 100 else 5000 / percent)


# --- folders of images by class, and the digits inside scikit-learn ---


def _from_class_folders(path: Path, split: str) -> Split | None:
    if not (path / split).is_dir():
        return None
    parts = [part for part in ("train", "val", "test") if (path / part).is_dir()]
    by_part = {part: sorted(e.name for e in (path / part).iterdir() if e.is_dir() and e.name[0] != ".") for part in parts}
    classes = by_part[parts[0]]
    if len(classes) < 2:
        raise ValueError(f"{path / parts[0]}: found {len(classes)} class folders; allowed: two or more")
    if by_part[split] != classes:
        differ = ", ".join(sorted(set(by_part[split]) ^ set(classes)))
        raise ValueError(f"{path / split}: its classes are not those of {parts[0]}/: {differ}")
    images, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(file for file in (path / split / name).iterdir() if file.is_file() and file.name[0] != ".")
        if not files:
            raise ValueError(f"{path / split / name}: holds no image")
        images += [np.asarray(square(read_photo(file), SIZE)) for file in files]
        labels += [label] * len(files)
    return _split_of(np.stack(images), labels, tuple(classes), path.resolve().name, path)


def _digits(split: str) -> Split | None:
    """8x8 grey digits as 32x32 RGB; a fixed stratified fifth is the test split."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415  (only this source needs it)
    except ImportError:
        raise ValueError("digits: needs scikit-learn: pip install 'resnet-cifar10[demo]'") from None
    if split == "val":
        return None
    grey, labels = load_digits(return_X_y=True)
    scaled = (grey.reshape(-1, 8, 8) * (255 / 16)).round().astype(np.uint8)
    images = np.repeat(np.stack([np.asarray(Image.fromarray(g).resize((SIZE, SIZE), Image.Resampling.BILINEAR))
                                 for g in scaled])[..., None], 3, axis=3)  # fmt: skip
    everything = _split_of(images, labels.tolist(), tuple("0123456789"), "digits (scikit-learn)", Path("digits"))
    train, test = hold_out(everything.labels, len(labels) // 5, seed=0)
    return everything.subset(train if split == "train" else test)

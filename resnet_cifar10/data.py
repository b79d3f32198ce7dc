"""Labelled images as one uint8 tensor: the held-out split, normalisation, batches with augmentation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .infer import SIZE
from .photo_like import photo_like
from .settings import AUGMENTATIONS

CROP_PADDING = 4  # pixels on each side before the random crop (He et al. 2015, section 4.2)
CUTOUT_SIZE = 8  # side of the filled square; DeVries & Taylor 2017 take 16 for wider networks and longer runs
MIXUP_ALPHA = 0.2  # Zhang et al. 2018, section 3.1


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, 32, 32, 3], their labels int64 [N] into classes, and where they came from."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        """Refuse with a ValueError what would be learned wrongly, or not before hours."""
        right = self.images.dtype == torch.uint8 and self.images.shape == (len(self.labels), SIZE, SIZE, 3)
        if not (right and self.labels.dtype == torch.int64 and ((self.labels >= 0) & (self.labels < len(self.classes))).all()):
            found = ", ".join(f"{each.dtype} {list(each.shape)}" for each in (self.images, self.labels))
            raise ValueError(
                f"{self.source}: found images and labels {found}; allowed: uint8 [N, {SIZE}, {SIZE}, 3] and int64 [N], "
                f"0 to {len(self.classes) - 1}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> Split:
        """Keep the images at these indices."""
        images = torch.from_numpy(self.images.numpy()[indices.numpy()])  # five times as fast as PyTorch
        return replace(self, images=images, labels=self.labels[indices])

    def to(self, device: str) -> Split:
        """Copy images and labels to a device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    @property
    def sha256(self) -> str:
        """The checksum of pixels, labels and class names: equal data give equal checksums."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()


def hold_out(labels: Tensor, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split the indices of labels int64 [N] into (train, validation): stratified, a function of the seed.

    Raises:
        ValueError: If a class would be left without a training image.

    """
    classes = labels.numpy()
    rng = np.random.default_rng([seed, 0])
    counts = np.bincount(classes)
    exact = counts * size / len(classes)
    quota = np.floor(exact).astype(int)
    quota[np.argsort(quota - exact, kind="stable")[: size - quota.sum()]] += 1  # the largest remainders first
    if (quota >= counts)[counts > 0].any():
        raise ValueError(
            f"key 'validation_size': found {size}; allowed: fewer of the {len(classes)} images, "
            f"so that every class keeps one for training, such as {len(classes) // 5}"
        )
    held = [rng.permutation(np.flatnonzero(classes == c))[:n] for c, n in enumerate(quota)]
    validation = np.sort(np.concatenate(held))
    return torch.from_numpy(np.setdiff1d(np.arange(len(classes)), validation)), torch.from_numpy(validation)


def mean_and_std(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each colour of uint8 [N, 32, 32, 3], in units of 0..1."""
    value = torch.arange(256).double() / 255  # counted by value: 50,000 images as float64 would take over 1 GB
    shares = [torch.bincount(images[..., c].flatten(), minlength=256).double() * 3 / images.numel() for c in range(3)]
    mean = [float((share * value).sum()) for share in shares]
    std = [float((share * (value - m) ** 2).sum().sqrt()) for share, m in zip(shares, mean, strict=True)]
    return mean, [max(s, 1e-3) for s in std]  # a colour that never varies is not divided by zero


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Map uint8 [N, 32, 32, 3] to float32 [N, 3, 32, 32] (channels_last in memory) with mean 0 and deviation 1."""
    return ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def moved(images: Tensor, i: Tensor, top: Tensor, left: Tensor, flip: Tensor, hole: Sequence[Tensor], fill: Tensor) -> Tensor:
    """Take the images at the indices i [B] out of uint8 [N, 32, 32, 3]: shifted, mirrored, a square erased.

    Top and left, in pixels, flip, and the row and column of the hole's middle (or none) are [B, 1]; `fill` is the colour of
    what is missing.
    """
    span = torch.arange(SIZE, device=images.device)
    rows, columns = top + span, left + torch.where(flip, span.flip(0), span)
    outside_rows, outside_columns = ((place < 0) | (place >= SIZE) for place in (rows, columns))
    missing = outside_rows[:, :, None] | outside_columns[:, None, :]
    if hole:
        in_rows, in_columns = ((2 * (span - middle) + 1).abs() < CUTOUT_SIZE for middle in hole)
        missing |= in_rows[:, :, None] & in_columns[:, None, :]
    rows, columns = rows.clamp(0, SIZE - 1), columns.clamp(0, SIZE - 1)
    return torch.where(missing[..., None], fill, images[i[:, None, None], rows[:, :, None], columns[:, None, :]])


def batches(
    split: Split, batch_size: int, augmentation: str, seed: int, epoch: int, fill: Tensor, rank: int = 0, processes: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the augmented batches of one epoch: each image once, the last batch may be smaller.

    Order and augmentation are a function of (seed, epoch) alone, so a resumed run needs no state of a generator. Which images
    photo alters, and which ones photo and mixup put together, depends on the number of processes too.

    Args:
        split: The training images, on the device where the batches are wanted.
        batch_size: Images a batch.
        augmentation: "none", or parts joined by "_": crop, flip (He et al. 2015, section 4.2), altflip (each image
            mirrored in every second epoch: Jordan 2024, section 3.6), photo, cutout (DeVries & Taylor 2017), mixup
            (Zhang et al. 2018).
        seed: Of the run.
        epoch: Counted from 1.
        fill: uint8 [3], the colour of the padding: the mean, which normalisation makes zero.
        rank: Of this process among those that share the batches.
        processes: Their number, p; each takes every p-th image of a batch.

    Yields:
        images uint8 [B, 32, 32, 3] and the class probabilities to learn, float32 [B, classes].

    """
    device, n, parts = split.images.device, len(split), augmentation.split("_")
    if unknown := set(parts) - {"none", *AUGMENTATIONS}:
        raise ValueError(f"augmentation: found {min(unknown)!r}; allowed: 'none', or {', '.join(AUGMENTATIONS)} joined by '_'")
    entropy = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    rng = torch.Generator().manual_seed(int(entropy >> np.uint64(1)))

    def draw(below: int) -> Tensor:
        return torch.randint(below, (n, 1), generator=rng).to(device)

    # one generator for all, the noise of photo last: a new draw comes after these, and only where its part is asked for
    order = torch.randperm(n, generator=rng).to(device)
    pad = CROP_PADDING if "crop" in parts else 0
    top, left, flip = draw(2 * pad + 1) - pad, draw(2 * pad + 1) - pad, draw(2 if "flip" in parts else 1).bool()
    if "altflip" in parts:
        flip ^= torch.from_numpy((np.random.default_rng([seed, 0]).integers(2, size=(n, 1)) + epoch) % 2 == 1).to(device)
    hole_y, hole_x = draw(SIZE), draw(SIZE)
    uniform = torch.rand(n, 17, generator=rng).to(device)  # all that photo_like draws of each image; also where it is not used
    noise_rng = rng if device.type == "cpu" else torch.Generator(device).manual_seed(rng.initial_seed())  # not copied
    mixing = np.random.default_rng([seed, epoch])  # PyTorch draws Beta from its global generator only

    one_hot = torch.eye(len(split.classes), device=device)
    for start in range(0, n, batch_size):
        i = order[start : start + batch_size][rank::processes]
        if "photo" in parts:  # every second image, so that the network stays good on images as they are
            for offset in (top, left):  # which are not shifted here, photo_like does that
                offset.index_fill_(0, i[::2], 0)
        hole = (hole_y[i], hole_x[i]) if "cutout" in parts else ()
        images = moved(split.images, i, top[i], left[i], flip[i], hole, fill)
        targets = one_hot[split.labels[i]]
        if "photo" in parts:
            half = images[::2]
            noise = torch.randn(processes * len(half), 3, SIZE, SIZE, generator=noise_rng, device=device)[rank::processes]
            images[::2] = photo_like(half, uniform[start + rank :: processes][: len(half)], noise)
        if "mixup" in parts:  # with the same batch in reverse order
            share = mixing.beta(MIXUP_ALPHA, MIXUP_ALPHA)
            images = (share * images + (1 - share) * images.flip(0)).round().to(torch.uint8)
            targets = share * targets + (1 - share) * targets.flip(0)
        yield images, targets

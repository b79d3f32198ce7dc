"""Decode many images to 32x32: JPEGs of that size at once in this process, all others with Pillow in several."""

from __future__ import annotations

import io
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from .errors import JobFailed, without_ctrl_c
from .infer import SIZE
from .photo import read_photo, square
from .progress import progress

CHUNK_BYTES = 5_000_000  # of images that a process takes at once; fewer are not worth starting one


def decode(items: Sequence[bytes | Path], name: str, processes: int = 1) -> NDArray[np.uint8]:
    """Decode images given as bytes (JPEG or PNG) or as files (of any usual format) to uint8 [N, 32, 32, 3].

    With more than one process, call it from a module that can be imported, as for every use of multiprocessing.

    Raises:
        ValueError: Naming the images that do not decode, by their files or their numbers in `name`.
        JobFailed: If a process was ended, as for want of memory.

    """
    if not items:
        raise ValueError(f"{name}: holds no image")
    quick = isinstance(items[0], bytes) and _quick(items[0]) is not None  # all done before a process starts
    names = [f"{name}: image {i}" for i in range(len(items))]
    size = sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in items)
    if processes == 1 or size <= CHUNK_BYTES or quick:
        return _checked(map(_pixels, items, names), len(items))
    with ProcessPoolExecutor(processes, get_context("spawn"), _quiet) as pool:
        try:
            with without_ctrl_c():
                found = pool.map(_pixels, items, names, chunksize=max(1, len(items) * CHUNK_BYTES // size))
            return _checked(found, len(items))
        except BrokenProcessPool:
            raise JobFailed(f"{name}: a process that decoded its images was ended; is there enough memory?") from None


def _checked(found: Iterator[NDArray[np.uint8] | ValueError], count: int) -> NDArray[np.uint8]:
    images = [next(found) for _ in progress(range(count), "decoding images")]
    if errors := [image for image in images if isinstance(image, ValueError)]:
        raise ValueError(f"{errors[0]}" + (f"; and {len(errors) - 1} more, such as {errors[1]}" if errors[1:] else ""))
    return np.stack(images)  # type: ignore[arg-type]  # no error is among them


def _quiet() -> None:
    """Let Ctrl-C end this process without a traceback of its own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _pixels(item: bytes | Path, name: str) -> NDArray[np.uint8] | ValueError:
    if isinstance(item, bytes) and (small := _quick(item)) is not None:
        return small
    try:
        return np.asarray(square(read_photo(item if isinstance(item, Path) else io.BytesIO(item), name)))
    except ValueError as error:  # the others are looked at first, so that all can be said at once
        return error


def _quick(content: bytes) -> NDArray[np.uint8] | None:
    """Decode a JPEG of 32x32 pixels as Pillow would, in a seventh of the time; None: something else, or damaged."""
    if b"\xff\xe1" in content:  # EXIF or XMP data, which may ask to turn it
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        usual = (height, width) == (SIZE, SIZE) and colours in ("YCbCr", "Gray", "RGB")
        return simplejpeg.decode_jpeg(content) if usual else None
    except (ValueError, KeyError):  # KeyError: of a sampling that it has no name for
        return None

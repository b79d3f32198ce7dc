"""Many encoded images to small ones, in several processes: Python decodes one at a time in each."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .infer import SIZE
from .photo import read_photo, square

CHUNK = 2_500  # images that a process takes at once; fewer are not worth starting one
MAX_IMAGE_PIXELS = 1 << 16  # of one image in a parquet file

Pixels = np.ndarray[Any, np.dtype[np.uint8]]


def decode(items: Sequence[bytes | Path], name: str, processes: int = 1) -> Pixels:
    """Decode images given as bytes (JPEG or PNG) or as files (of any usual format) to uint8 [N, 32, 32, 3].

    With more than one process, call it from a module that can be imported, as for every use of multiprocessing.

    Raises:
        ValueError: Naming the image that does not decode, by its file or its number in `name`.

    """
    chunks = [(items[i : i + CHUNK], name, i) for i in range(0, len(items), CHUNK)]
    if processes == 1 or len(chunks) == 1:
        return np.concatenate([_decode(*chunk) for chunk in chunks])
    with ProcessPoolExecutor(min(processes, len(chunks)), get_context("spawn")) as pool:
        return np.concatenate([part.result() for part in [pool.submit(_decode, *chunk) for chunk in chunks]])


def _decode(items: Sequence[bytes | Path], name: str, first: int) -> Pixels:
    pixels = bytearray()
    for i, item in enumerate(items):
        image = read_photo(item) if isinstance(item, Path) else _small(item, f"{name}: image {first + i}")
        pixels += (image if image.size == (SIZE, SIZE) else square(image, SIZE)).tobytes()
    return np.frombuffer(pixels, np.uint8).reshape(-1, SIZE, SIZE, 3)


def _small(content: bytes, name: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels")
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
        raise ValueError(f"{name} does not decode: {error}") from None

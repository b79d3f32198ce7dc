"""Photos of the usual formats, read upright in RGB and reduced to the small views that the network sees."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .infer import SIZE

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
NEUTRAL = (127, 127, 127)  # what shows through the transparent parts of a photo


def read_photo(file: Path | io.BytesIO) -> Image.Image:
    """Read a photo of a usual format as upright RGB.

    Raises:
        ValueError: With the file and the reason: unreadable, not an image, damaged or too large.

    """
    name = file if isinstance(file, Path) else "standard input"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # over 89 million pixels
            warnings.filterwarnings("ignore", module="PIL")  # odd metadata of a photo is not our user's concern
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                image.draft("RGB", (16 * SIZE, 16 * SIZE))  # JPEG: decode at a fraction of the size where that is enough
                image.load()
                return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"not an image; allowed: {', '.join(FORMATS)}"
        raise ValueError(f"{name}: {reason}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65_535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, NEUTRAL)
        image.alpha_composite(rgba)
    return image.convert("RGB")


def square(image: Image.Image, size: int) -> Image.Image:
    """Cut out the centre square and reduce it to size x size by area averaging."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    resample = Image.Resampling.BOX if side >= size else Image.Resampling.BILINEAR
    return image.resize((size, size), resample, box=(left, top, left + side, top + side))


def views(photo: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Reduce a photo to the views whose probabilities are averaged: uint8 [V, 32, 32, 3]."""
    whole = photo.resize((SIZE, SIZE), Image.Resampling.BOX)
    upright = np.stack([np.asarray(square(photo, SIZE)), np.asarray(whole)])
    return np.concatenate([upright, upright[:, :, ::-1]])  # and mirrored

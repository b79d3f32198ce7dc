"""Photos of the usual formats, read upright in RGB and reduced to the small views that the network sees."""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from .errors import one_line
from .infer import SIZE

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_BYTES = 1_000_000_000  # of a file
MAX_SCANNED_PIXELS = 2_000_000_000  # of all scans of a JPEG: seconds
MARKER = re.compile(rb"\xff[^\x00-\xbf\xd0-\xd8\xff]")  # of a segment of a JPEG, with its length behind it
STARTS = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")  # of files of the FORMATS
APPLE = (b"ftyphe", b"ftypmif1", b"ftypavi")  # of the files that iPhones write, and of the like
NEUTRAL = (127, 127, 127)  # what shows through the transparent parts of a photo


def read_photo(file: str | Path | io.BytesIO, name: str = "standard input") -> Image.Image:
    """Read a photo of a usual format as upright RGB.

    Raises:
        ValueError: With the file (or the name of the bytes) and the reason: unreadable, not an image, damaged or too large.

    """
    file = Path(file) if isinstance(file, str) else file
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB, all that a PNG may say of itself
    try:
        if (size := file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes) > MAX_BYTES:
            raise ValueError(f"found {size:,} bytes or more; allowed: at most {MAX_BYTES:,}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")  # odd metadata of a photo is not our user's concern
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            logging.getLogger("PIL").setLevel(logging.CRITICAL)
            with Image.open(file, formats=FORMATS) as image:
                scanned = image.format in ("JPEG", "MPO")  # MPO: a JPEG with more pictures behind it, as phones write
                if scanned and _scans(file) * image.width * image.height > MAX_SCANNED_PIXELS:
                    raise ValueError("more scans than any camera writes")
                _check_tiff(getattr(image, "tag_v2", {}))
                fractions = [n for n in (8, 4, 2) if min(image.size) >= 16 * SIZE * n and not any(x % n for x in image.size)]
                if fractions:  # JPEG: decode at a fraction of the size where that is enough and leaves no rest at an edge
                    image.draft("RGB", (image.width // fractions[0], image.height // fractions[0]))
                image.load()
                return _upright_rgb(image)
    except Exception as error:  # Pillow's decoders raise many kinds on damaged bytes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
            found = re.search(r"\d+", reason)
            reason = f"too large: found {int(found[0] if found else 0):,} pixels; allowed: at most {Image.MAX_IMAGE_PIXELS:,}"
        elif isinstance(error, MemoryError):
            reason = "too large for the memory of this machine"
        elif isinstance(error, UnidentifiedImageError):
            with open(file, "rb") if isinstance(file, Path) else io.BytesIO(file.getbuffer()) as content:
                start = content.read(12)
            kind = "not an image" if start else "empty"
            kind = "damaged, or of a kind that is not read" if start.startswith(STARTS) else kind
            kind = "HEIC or AVIF" if start[4:].startswith(APPLE) else kind
            reason = f"{kind}; allowed: {', '.join(FORMATS)}"
        elif not isinstance(error, ValueError) and not getattr(error, "strerror", None):
            reason = f"damaged: {reason}"
        raise ValueError(f"{file if isinstance(file, Path) else name}: {one_line(reason)}") from None


def _check_tiff(tags: Mapping[int, Any]) -> None:
    """Refuse what a TIFF can hold beyond its size in pixels, and what Pillow reads wrongly."""
    known = ExifTags.Base
    tile = tags.get(known.TileWidth, 0) * tags.get(known.TileLength, 0)
    if tile > (Image.MAX_IMAGE_PIXELS or 0):
        raise Image.DecompressionBombError(f"{tile} in a tile")
    in_planes = tags.get(known.PlanarConfiguration) == 2 and tags.get(known.Compression, 1) == 1
    if in_planes and 16 in tags.get(known.BitsPerSample, ()):
        raise ValueError("found 16 bits in a plane for each colour; allowed there: compressed, or 8 bits")


def _scans(jpeg: Path | io.BytesIO) -> int:
    """Count the scans of a JPEG, up to its end: phones put films behind it. Thousands keep a decoder busy for minutes."""
    content, place, scans = jpeg.read_bytes() if isinstance(jpeg, Path) else jpeg.getvalue(), 0, 0
    while (found := MARKER.search(content, place)) and found[0] != b"\xff\xd9":
        scans += found[0] == b"\xff\xda"
        place = found.end() + int.from_bytes(content[found.end() : found.end() + 2])
    return scans


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Turn a loaded picture as its EXIF data say, and bring it to RGB of 8 bits.

    Raises:
        ValueError: If it has values of 32 bits, whose scale is unknown, or of 12.

    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    bits = 32 if image.mode in ("I", "F") else tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    with suppress(Exception):  # no EXIF data, or damaged ones, on which Pillow raises many kinds
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF" and bits != 16:
        raise ValueError(f"a grey picture of {bits} bits; allowed: 8 and 16 bits")
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        values += 128
        values //= 257  # rounded, in place: such a picture may have 89 million pixels
        if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:  # 0 is white
            values = 255 - values
        image = Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGBA", rgba.size, NEUTRAL)
        image.alpha_composite(rgba)
    return image.convert("RGB")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode an image as the bytes of a file of a kind: "PNG", "JPEG"."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def square(image: Image.Image) -> Image.Image:
    """Cut out the centre square and reduce it to 32x32."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return reduced(image, (left, top, left + side, top + side))


def reduced(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """Reduce a box (left, top, right, bottom) of an image to 32x32 by area averaging (a smaller one: bilinearly)."""
    smallest = min(box[2] - box[0], box[3] - box[1])
    return image.resize((SIZE, SIZE), Image.Resampling.BOX if smallest >= SIZE else Image.Resampling.BILINEAR, box=box)


def boxes(width: int, height: int) -> list[tuple[float, float, float, float]]:
    """Choose the parts of a photo that the network sees, as left, top, right, bottom, in pixels: most of it, a closer square.

    Chosen with benchmarks/framing.py among the whole, its squares and closer ones of both; the table is in docs/photos.md.
    """
    side = 0.75 * min(width, height)
    return [
        ((width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2)
        for w, h in ((0.85 * width, 0.85 * height), (side, side))
    ]


def views(photo: Image.Image) -> NDArray[np.uint8]:
    """Reduce every box of an RGB photo, then mirror it: uint8 [2 * boxes, 32, 32, 3]."""
    upright = np.stack([np.asarray(reduced(photo, box)) for box in boxes(*photo.size)])
    return np.concatenate([upright, upright[:, :, ::-1]])

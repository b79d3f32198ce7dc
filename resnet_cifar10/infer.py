"""Photos in, predictions out: NumPy, Pillow and ONNX Runtime only, no PyTorch."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

BUILT_IN = Path(__file__).parent / "models"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
NEUTRAL = (127, 127, 127)  # what shows through the transparent parts of a photo
SIZE = 32


@dataclass(frozen=True)
class Prediction:
    """What one photo shows. `membership`: higher = more likely one of the classes; `rejected`: below the threshold."""

    label: str
    probabilities: dict[str, float]
    membership: float
    rejected: bool

    def __str__(self) -> str:
        percent = f"{100 * self.probabilities[self.label]:.0f} %"
        if self.rejected:
            return f"none of these {len(self.probabilities)} (most like: {self.label}, {percent})"
        return f"{self.label}, {percent}"


def model_folder(model: str | Path) -> Path:
    """Find the model folder that a user means: a model folder, a finished run folder or a built-in name.

    Raises:
        ValueError: Naming what was found and what is allowed.

    """
    path = Path(model)
    for folder in (path, path / "model"):
        if (folder / "config.json").is_file():
            return folder
    if (path / "setting.json").is_file():
        raise ValueError(f"{path}: this run is not finished; the same train command again goes on with it")
    if (BUILT_IN / str(model) / "config.json").is_file():
        return BUILT_IN / str(model)
    names = ", ".join(sorted(entry.name for entry in BUILT_IN.iterdir())) if BUILT_IN.is_dir() else ""
    raise ValueError(f"{model}: no such model; allowed: a model folder, a finished run folder, or built-in: {names}")


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check config.json of a model folder.

    Raises:
        ValueError: Naming the file and the key that is missing or wrong.

    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a model configuration: {error}") from None
    checks = {
        "classes": lambda v: len(v) >= 2 and all(isinstance(name, str) for name in v),
        "mean": lambda v: len(v) == 3 and all(isinstance(x, float) for x in v),
        "std": lambda v: len(v) == 3 and all(isinstance(x, float) and x > 0 for x in v),
        "temperature": lambda v: isinstance(v, float) and v > 0,
        "rejection_threshold": lambda v: isinstance(v, float),
        "architecture": lambda v: isinstance(v, dict),
    }
    for key, is_right in checks.items():
        try:
            right = is_right(config[key])
        except (KeyError, TypeError):
            right = False
        if not right:
            raise ValueError(f"{file}: key '{key}' is missing or wrong")
    return config  # type: ignore[no-any-return]


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
        if isinstance(error, Image.UnidentifiedImageError):
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


class Classifier:
    """The network of a model folder in ONNX Runtime."""

    def __init__(self, model: str | Path = "resnet32") -> None:
        """Open the model.

        Raises:
            ValueError: If it is no model folder, or its files are damaged.

        """
        import onnxruntime  # noqa: PLC0415  (reading photos alone does not need it)

        folder = model_folder(model)
        self.config = read_config(folder)
        self.classes: list[str] = self.config["classes"]
        file = folder / "model.onnx"
        if not file.is_file():
            raise ValueError(f"{file}: missing; 'resnet-cifar10 export {model} --out {file}' writes it")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            self.session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
            shape = self.probabilities(np.zeros((1, SIZE, SIZE, 3), np.uint8)).shape
        except Exception as error:  # ONNX Runtime's errors share no base class below Exception
            raise ValueError(f"{file}: not an ONNX model: {' '.join(str(error).split())[:120]}") from None
        if shape != (1, len(self.classes)):
            raise ValueError(f"{file}: gives {shape[-1]} classes, config.json names {len(self.classes)}")

    def probabilities(self, images: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Map uint8 [N, 32, 32, 3] to calibrated probabilities float32 [N, classes]."""
        return self.session.run(["probabilities"], {"images": images})[0]  # type: ignore[no-any-return]

    def classify(self, photo: Image.Image) -> Prediction:
        """Average the probabilities of the photo's views; refuse it where the highest is below the threshold."""
        mean = self.probabilities(views(photo)).mean(axis=0, dtype=np.float64)
        best = int(mean.argmax())
        probabilities = dict(zip(self.classes, mean.tolist(), strict=True))
        membership = float(mean[best])
        return Prediction(self.classes[best], probabilities, membership, membership < self.config["rejection_threshold"])


def figure(photos: Sequence[tuple[str, Image.Image, Prediction]]) -> Image.Image:
    """Draw the grid of photos, each with its name, label and the bars of its three highest probabilities."""
    tile, margin, line = 240, 20, 24
    columns = min(4, len(photos))
    rows = -(-len(photos) // columns)
    cell_height = tile + 6 * line + margin
    canvas = Image.new("RGB", (columns * (tile + margin) + margin, rows * cell_height + margin), "white")
    draw = ImageDraw.Draw(canvas)
    bold, small = ImageFont.load_default(18), ImageFont.load_default(14)
    for i, (name, photo, prediction) in enumerate(photos):
        x, y = margin + i % columns * (tile + margin), margin + i // columns * cell_height
        thumbnail = ImageOps.contain(photo, (tile, tile))
        canvas.paste(thumbnail, (x + (tile - thumbnail.width) // 2, y + (tile - thumbnail.height) // 2))
        y += tile + 6
        verdict = "none of these" if prediction.rejected else prediction.label
        draw.text((x, y), verdict, "#b00020" if prediction.rejected else "#111111", bold)
        draw.text((x, y + line), name if len(name) <= 30 else name[:29] + "…", "#666666", small)
        highest = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:3]
        for row, (label, probability) in enumerate(highest, 2):
            top = y + row * line
            draw.rectangle((x + 90, top + 3, x + 90 + 110, top + 15), "#e6e6e6")
            draw.rectangle((x + 90, top + 3, x + 90 + round(110 * probability), top + 15), "#2a6fbb")
            draw.text((x, top), label, "#111111", small)
            draw.text((x + 206, top), f"{100 * probability:.0f} %", "#111111", small)
    return canvas

"""Photos and what the network says of them, drawn as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .infer import Prediction

Entry = tuple[str, Image.Image, Image.Image, Prediction]  # a photo's name, its tile, that of its heat map, the prediction
TILE, GAP, MARGIN, LINE, COLUMNS = 180, 6, 24, 24, 3  # pixels, and photos in a row
WIDTH = 2 * TILE + GAP  # of a photo and, to the right of it, where the network looked


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)  # which most systems have
    except OSError:
        return ImageFont.load_default(size)  # English letters


def entry(name: str, photo: Image.Image, heat: Image.Image, prediction: Prediction) -> Entry:
    """Keep what the figure shows of a photo, it and its heat map made small."""
    upright, hot = (ImageOps.pad(each, (TILE, TILE), color="white") for each in (photo.resize(heat.size), heat))
    return name, upright, hot, prediction


def figure(photos: Sequence[Entry]) -> Image.Image:
    """Draw the grid: of each photo the tiles of it and its heat map, label, name and bars of its highest probabilities."""
    columns = min(COLUMNS, len(photos))
    rows = math.ceil(len(photos) / columns)
    cell_height = TILE + 6 * LINE + MARGIN
    canvas = Image.new("RGB", (columns * (WIDTH + MARGIN) + MARGIN, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    bold, small = _font(18), _font(14)
    for i, (name, photo, heat, prediction) in enumerate(photos):
        x, y = MARGIN + i % columns * (WIDTH + MARGIN), MARGIN + i // columns * cell_height
        for place, picture in enumerate((photo, heat)):
            canvas.paste(picture, (x + place * (TILE + GAP), y))
        y += TILE + 6
        draw.text((x, y), prediction.verdict, "#b00020" if prediction.rejected else "#111111", bold)
        draw.text((x, y + LINE), name if len(name) <= 45 else "…" + name[-44:], "#666666", small)
        highest = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:3]
        for row, (label, probability) in enumerate(highest, 2):
            top = y + row * LINE
            draw.rectangle((x + 100, top + 3, x + 300, top + 15), "#e6e6e6")
            draw.rectangle((x + 100, top + 3, x + 100 + round(200 * probability), top + 15), "#2a6fbb")
            shown = label
            while draw.textlength(shown, small) > 94:  # the bars begin at 100
                shown = shown.rstrip("…")[:-1] + "…"
            draw.text((x, top), shown, "#111111", small)
            draw.text((x + 310, top), f"{100 * probability:.0f} %", "#111111", small)
    return canvas

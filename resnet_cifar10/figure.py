"""Photos and what the network says of them, drawn as one picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .infer import Prediction

TILE, MARGIN, LINE, COLUMNS = 240, 20, 24, 4  # pixels, and photos in a row


def figure(photos: Sequence[tuple[str, Image.Image, Prediction]]) -> Image.Image:
    """Draw the grid of photos, each with its label, its name and the bars of its three highest probabilities."""
    columns = min(COLUMNS, len(photos))
    rows = -(-len(photos) // columns)
    cell_height = TILE + 6 * LINE + MARGIN
    canvas = Image.new("RGB", (columns * (TILE + MARGIN) + MARGIN, rows * cell_height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    bold, small = ImageFont.load_default(18), ImageFont.load_default(14)
    for i, (name, photo, prediction) in enumerate(photos):
        x, y = MARGIN + i % columns * (TILE + MARGIN), MARGIN + i // columns * cell_height
        thumbnail = ImageOps.contain(photo, (TILE, TILE))
        canvas.paste(thumbnail, (x + (TILE - thumbnail.width) // 2, y + (TILE - thumbnail.height) // 2))
        y += TILE + 6
        verdict = f"none of these {len(prediction.probabilities)}" if prediction.rejected else prediction.label
        draw.text((x, y), verdict, "#b00020" if prediction.rejected else "#111111", bold)
        draw.text((x, y + LINE), name if len(name) <= 30 else name[:29] + "…", "#666666", small)
        highest = sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:3]
        for row, (label, probability) in enumerate(highest, 2):
            top = y + row * LINE
            draw.rectangle((x + 90, top + 3, x + 200, top + 15), "#e6e6e6")
            draw.rectangle((x + 90, top + 3, x + 90 + round(110 * probability), top + 15), "#2a6fbb")
            draw.text((x, top), label, "#111111", small)
            draw.text((x + 206, top), f"{100 * probability:.0f} %", "#111111", small)
    return canvas

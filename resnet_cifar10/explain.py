"""Where the network looked: the class-activation map of a photo, drawn over it (Zhou et al. 2016, section 2)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .infer import Classifier
from .photo import boxes, views

GRID = 16  # places of a side of the photo
LONGEST_SIDE = 640  # pixels of the drawn picture
OPACITY = 0.65  # of the colour over the photo
# Five colours of matplotlib's "inferno" (CC0), from cold to hot. Its lightness only rises, so it reads the same to
# colour-blind eyes and in grey: cold parts of the photo are darkened, hot ones glow.
COLOURS = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)])


def activation(classifier: Classifier, photo: Image.Image, label: str) -> NDArray[np.float32]:
    """Say how much each place of a photo spoke for a class: float32 [16, 16], in logits, the mean of the views that show it."""
    (maps,) = classifier.session.run(["activation_map"], {"images": views(photo)})
    upright, mirrored = np.split(maps[:, classifier.classes.index(label)], 2)  # each [boxes, 8, 8]
    width, height = photo.size
    places = (np.array(boxes(width, height)) * GRID / (width, height, width, height)).round().astype(int).tolist()
    total, seen = np.zeros((2, GRID, GRID), np.float32)
    for (left, top, right, bottom), view in zip(places, (upright + mirrored[:, :, ::-1]) / 2, strict=True):
        w, h = max(right - left, 1), max(bottom - top, 1)  # a square of a very long photo is thinner than a place
        total[top : top + h, left : left + w] += np.asarray(Image.fromarray(view).resize((w, h), Image.Resampling.BILINEAR))
        seen[top : top + h, left : left + w] += 1
    return total / seen.clip(1)


def heat_map(photo: Image.Image, activation: NDArray[np.float32]) -> Image.Image:
    """Lay an activation map [H, W] over its photo: what spoke against the class is cold, the highest place is hottest."""
    scale = min(1.0, LONGEST_SIDE / max(photo.size))
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))
    positive = activation.clip(min=0)
    levels = (255 * positive / (positive.max() or 1)).round().astype(np.uint8)
    heat = np.asarray(Image.fromarray(levels).resize(size, Image.Resampling.BILINEAR))
    stops = np.linspace(0, 255, len(COLOURS))
    table = np.stack([np.interp(np.arange(256), stops, channel) for channel in COLOURS.T], axis=1).round().astype(np.uint8)
    return Image.blend(photo.resize(size, Image.Resampling.BOX), Image.fromarray(table[heat]), OPACITY)

"""Where the network looked: the map of the right class, drawn at the right place in colours that everybody can read."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from resnet_cifar10.explain import activation, heat_map
from resnet_cifar10.infer import Classifier

GREY = Image.new("RGB", (160, 80), (128, 128, 128))


def lightness(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")).astype(int)


def test_the_brightest_place_is_where_the_map_is_highest() -> None:
    spot = np.zeros((8, 8), np.float32)
    spot[1, 6] = 3.0
    drawn = lightness(heat_map(GREY, spot))
    y, x = np.unravel_index(drawn.argmax(), drawn.shape)
    assert (y // 10, x // 20) == (1, 6)
    assert drawn[79, 0] < 128 < drawn[y, x]


def test_more_is_always_lighter_and_what_spoke_against_is_as_cold_as_nothing() -> None:
    ramp = np.tile(np.linspace(-1, 1, 8, dtype=np.float32), (8, 1))
    row = lightness(heat_map(GREY, ramp))[40]
    assert (row[:60] == row[0]).all()
    assert (np.diff(row[75:150:5]) > 0).all()
    assert np.array_equal(heat_map(GREY, -np.ones((8, 8), np.float32)), heat_map(GREY, np.zeros((8, 8), np.float32)))


def test_the_photo_stays_visible_under_the_colour() -> None:
    photo = Image.fromarray(np.kron([[0, 1] * 4, [1, 0] * 4] * 4, np.ones((20, 20))).astype(np.uint8) * 255).convert("RGB")
    for level in (0, 1):
        drawn = lightness(heat_map(photo, np.full((8, 8), level, np.float32)))
        assert abs(drawn[10, 10] - drawn[10, 30]) > 60


@pytest.mark.parametrize(("size", "drawn"), [((1280, 960), (640, 480)), ((90, 60), (90, 60)), ((1, 5000), (1, 640))])
def test_large_photos_are_reduced_to_640_pixels_and_small_ones_stay(size: tuple[int, int], drawn: tuple[int, int]) -> None:
    assert heat_map(Image.new("RGB", size), np.ones((8, 8), np.float32)).size == drawn


@pytest.mark.parametrize("size", [(1200, 60), (60, 1200), (2000, 40)])
def test_very_long_photos_are_explained_too(size: tuple[int, int]) -> None:
    assert activation(Classifier(), Image.new("RGB", size, (120, 140, 120)), "cat").shape == (16, 16)


def test_the_maps_of_all_views_are_laid_where_the_views_are() -> None:
    maps = np.zeros((4, 1, 8, 8), np.float32)
    maps[:2, 0, 1, 6] = maps[2:, 0, 1, 1] = 1  # top right, also in the mirrored views
    fake: Any = SimpleNamespace(classes=["cat"], session=SimpleNamespace(run=lambda *_: [maps]))
    heat = activation(fake, Image.new("RGB", (160, 160)), "cat")
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert y < 8 <= x


def test_it_looks_where_the_animal_is() -> None:
    with Image.open(f"{pytest.importorskip('skimage').data_dir}/chelsea.png") as cat:
        photo = Image.new("RGB", (900, 300), (120, 140, 120))
        photo.paste(cat, (450, 0))
    classifier = Classifier()
    for picture, step in ((photo, 1), (photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), -1)):
        heat = activation(classifier, picture, "cat").clip(min=0)[:, ::step]
        assert heat.shape == (16, 16)
        assert heat[:, 8:].sum() > 2 * heat[:, :8].sum()

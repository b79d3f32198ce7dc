"""Photos in, predictions out; and what is no photo."""

import ast
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import COLOURS, CONFIG, ROOT, run
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from resnet_cifar10.data import Split
from resnet_cifar10.export import describe
from resnet_cifar10.files import write, write_json
from resnet_cifar10.finish import member_photos, mistakes, rejection_threshold
from resnet_cifar10.infer import BUILT_IN, Classifier, Prediction
from resnet_cifar10.model import ResNet
from resnet_cifar10.photo import _scans, encoded, read_photo, square, views
from resnet_cifar10.settings import Setting
from resnet_cifar10.storage import load_model, save_model
from resnet_cifar10.study import run as train_run
from torture.harness import call
from torture.inputs import png


@pytest.fixture
def photo() -> Image.Image:
    """A picture that looks different from every side: red left, blue top right, green below it."""
    pixels = np.zeros((120, 160, 3), np.uint8)
    pixels[:, :80, 0] = 200
    pixels[:60, 80:, 2] = 250
    pixels[60:, 80:, 1] = 150
    return Image.fromarray(pixels)


def cli(*arguments: str | Path, stdin: bytes = b"") -> tuple[int, str, str]:
    """Run the command line in this process, which saves a second of start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        done = call(*arguments)
    return done.status, done.out, done.err


def test_the_command_line_works_without_pytorch(model: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    code = "import sys; sys.modules['torch'] = sys.modules['onnx'] = None; from resnet_cifar10 import cli, serve; cli.main()"
    arguments = ["infer", "photo.png", "--model", model, "--json", "--figure", "figure.png"]
    (home := tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env=os.environ | {"HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not [*home.iterdir()]
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads(done.stdout)
    assert list(answer) == ["file", "label", "probabilities", "membership", "rejected"]
    assert list(answer["probabilities"]) == COLOURS
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.getpixel((44, 114)) == (200, 0, 0)
    refused = subprocess.run(
        [sys.executable, "-c", code, "evaluate", model, "--data", "digits"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "needs torch, onnx: pip install 'resnet-cifar10[train]'" in refused.stderr


def saved(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    return io.BytesIO(encoded(image, kind, **options))


def sixteen_bit_png(pixels: np.ndarray) -> io.BytesIO:
    """Write uint8 [H, W, channels] as a PNG of 16 bits; Pillow cannot."""
    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + (row.astype(">u2") * 257).tobytes() for row in pixels)
    return io.BytesIO(png(width, height, pixels=rows, depth=16, colour={1: 0, 3: 2, 4: 6}[channels]))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_makes_no_difference(photo: Image.Image, orientation: int, kind: str) -> None:
    turned = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    stored = photo.transpose(turned[orientation]) if orientation > 1 else photo
    read = np.asarray(read_photo(saved(stored, kind, exif=exif, **options)))
    assert np.abs(read.astype(int) - np.asarray(photo)).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_exif_data_that_are_none_are_no_reason_to_refuse_a_photo(photo: Image.Image, kind: str) -> None:
    whole = Image.Exif()
    whole[0x0112], whole[0x9202] = 6, float("nan")  # the orientation and an aperture that nobody can write anew
    for exif, shape in ((b"Exif\0\0garbage garbage", (120, 160, 3)), (whole.tobytes(), (160, 120, 3))):
        assert np.asarray(read_photo(saved(photo, kind, exif=exif, dpi=(72, 72)))).shape == shape


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_lossless_formats_give_the_same_pixels(photo: Image.Image, kind: str) -> None:
    assert np.array_equal(read_photo(saved(photo, kind, **({"lossless": True} if kind == "WEBP" else {}))), photo)


def test_modes_become_the_colours_that_a_viewer_shows(photo: Image.Image) -> None:
    def reread(image: Image.Image, kind: str = "PNG") -> np.ndarray:
        return np.asarray(read_photo(saved(image, kind))).astype(int)

    grey = np.asarray(photo.convert("L"))
    assert np.array_equal(reread(Image.fromarray(grey)), np.repeat(grey[..., None], 3, 2))
    for mode in ("P", "PA"):
        assert np.array_equal(reread(photo.convert("P", palette=Image.Palette.ADAPTIVE).convert(mode), "TIFF"), photo)
    assert np.abs(reread(photo.convert("CMYK"), "TIFF") - np.asarray(photo)).max() <= 1
    assert np.abs(reread(photo.convert("CMYK"), "JPEG") - np.asarray(photo)).mean() <= 2
    assert np.array_equal(np.unique(reread(photo.convert("1"))), [0, 255])
    for alpha, shown in ((0, 127), (255, np.asarray(photo)), (128, (np.asarray(photo) + 127.0) / 2)):
        transparent = photo.convert("RGBA")
        transparent.putalpha(alpha)
        assert np.abs(reread(transparent) - shown).max() <= 1
    see_through = photo.convert("P", palette=Image.Palette.ADAPTIVE)
    see_through.info["transparency"] = see_through.getpixel((0, 0))
    assert (reread(see_through)[:, :80] == 127).all()


def test_sixteen_bits_are_scaled_to_eight(photo: Image.Image) -> None:
    rgb = np.asarray(photo)
    assert np.array_equal(read_photo(sixteen_bit_png(rgb)), photo)
    assert np.array_equal(read_photo(sixteen_bit_png(np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)]))), photo)
    grey = np.asarray(photo.convert("L"))
    assert np.array_equal(read_photo(sixteen_bit_png(grey[..., None])), np.repeat(grey[..., None], 3, 2))
    tiff = saved(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF")
    assert np.array_equal(read_photo(tiff), np.repeat(grey[..., None], 3, 2))
    zero_is_white = saved(Image.fromarray((255 - grey).astype(np.uint16) * 257), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(read_photo(zero_is_white), np.repeat(grey[..., None], 3, 2))
    entries = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: 3}  # two pixels of 12 bits, in three bytes
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries.items())
    twelve = b"II*\0" + struct.pack("<I", 12) + bytes(4) + struct.pack("<H", len(entries)) + directory + bytes(4)
    with pytest.raises(ValueError, match="12 bits; allowed: 8 and 16"):
        read_photo(io.BytesIO(twelve))
    for other in (np.int32, np.float32):  # no way to know what is white
        with pytest.raises(ValueError, match="32 bits; allowed: 8 and 16"):
            read_photo(saved(Image.fromarray(grey.astype(other)), "TIFF"))


def test_of_moving_pictures_the_first_counts(photo: Image.Image) -> None:
    for kind in ("GIF", "WEBP"):
        moving = saved(photo, kind, save_all=True, append_images=[Image.new("RGB", photo.size)] * 2, lossless=True)
        assert np.array_equal(read_photo(moving), photo)


def test_a_square_is_the_centre_averaged_over_its_area() -> None:
    pixels = np.zeros((64, 200, 3), np.uint8)
    pixels[:, :68] = 255  # outside the centre square
    pixels[::2, 68:132] = 100
    for lying_or_standing in (pixels, pixels.transpose(1, 0, 2)):
        assert (np.asarray(square(Image.fromarray(lying_or_standing))) == 50).all()
    unchanged = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    assert np.array_equal(square(unchanged), unchanged)


def test_a_photo_and_its_mirror_image_get_the_same_answer(model: Path, photo: Image.Image) -> None:
    classifier = Classifier(model)
    mirrored = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    one, other = (classifier.classify(views(p)).probabilities for p in (photo, mirrored))
    assert one == pytest.approx(other, abs=1e-5)
    upside_down = views(photo.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    assert np.abs(upside_down[:, ::-1].astype(int) - views(photo)).max() <= 1


def test_what_is_said_of_a_photo() -> None:
    assert str(Prediction("a", {"a": 0.614, "b": 0.386}, 0.7, rejected=False)) == "a, 61 %"
    assert str(Prediction("a", {"a": 0.614, "b": 0.386}, 0.7, rejected=True)) == "none of these 2 (most like: a, 61 %)"


def test_the_lines_of_readme_and_model_card_run_without_this_package(photo: Image.Image, tmp_path: Path) -> None:
    for name in ("model.onnx", "config.json"):
        (tmp_path / name).write_bytes((BUILT_IN / "resnet32" / name).read_bytes())
    (tmp_path / "resnet_cifar10.py").write_text("raise ImportError('this package must not be needed')")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    photo.save(tmp_path / "photo.jpg", exif=turned)
    classifier = Classifier("resnet32")
    with Image.open(tmp_path / "photo.jpg") as image:
        small = np.asarray(ImageOps.fit(ImageOps.exif_transpose(image), (32, 32), Image.Resampling.BOX))[None]
    expected = classifier.session.run(["probabilities"], {"images": small})[0][0]
    readme, card = (
        file.read_text().partition("```python\n")[2].partition("```")[0]
        for file in (ROOT / "README.md", BUILT_IN / "resnet32" / "README.md")
    )
    run = partial(subprocess.check_output, cwd=tmp_path, text=True)
    assert run([sys.executable, "-c", readme]).strip() == classifier.classes[expected.argmax()]
    prediction = classifier.classify(views(read_photo(tmp_path / "photo.jpg")))
    for threshold in (-1.0, 1.1):  # the card's lines give the answer of infer
        write_json(tmp_path / "config.json", classifier.config | {"rejection_threshold": threshold})
        probabilities, answer = run([sys.executable, "-c", card]).splitlines()
        assert ast.literal_eval(probabilities) == pytest.approx(prediction.probabilities, abs=1e-4)
        assert answer == ("none of these" if threshold > 1 else prediction.label)


def test_the_lines_of_readme_for_python_run(photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.jpg")
    lines = (ROOT / "README.md").read_text().rpartition("```python\n")[2].partition("```")[0]
    prediction = Classifier("resnet32").classify(views(read_photo(tmp_path / "photo.jpg")))
    printed = subprocess.check_output([sys.executable, "-c", lines], cwd=tmp_path, text=True)
    assert printed == f"{prediction} {prediction.probabilities}\n"


def test_five_percent_of_real_members_are_refused_as_photos(model: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    threshold = rejection_threshold(Classifier(model), images)
    assert rejection_threshold(Classifier(model), images) == threshold
    save_model(tmp_path, ResNet(8, 3), CONFIG | {"rejection_threshold": threshold})
    (tmp_path / "model.onnx").write_bytes((model / "model.onnx").read_bytes())
    classifier = Classifier(tmp_path)
    photos = list(member_photos(images))
    assert sum(classifier.classify(views(photo)).rejected for photo in photos) == 2
    assert {photo.size for photo in photos} >= {(128, 128), (171, 128), (128, 192), (228, 128)}


def test_membership_is_the_likeness_to_the_probable_classes_less_the_excess_of_contrasts(model: Path) -> None:
    network, _ = load_model(model)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8))
    with torch.inference_mode():
        features, contrasts, _ = describe(network, ((images.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2))
        probabilities = (network.linear(features) / 2).softmax(1)
    odd = (contrasts - 0.1) / 2
    expected = (probabilities * F.normalize(features)[:, :3]).sum(1) - 0.05 * torch.where(odd > 0, odd, 0).mean(1)
    assert (odd > 0).any() and (odd < 0).any()
    (membership,) = Classifier(model).session.run(["membership"], {"images": images.numpy()})
    assert membership == pytest.approx(expected.numpy(), abs=1e-5)


def test_mistakes_are_those_of_the_highest_confidence_first() -> None:
    split = Split(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ("cat", "dog"), "made up")
    found = mistakes(torch.tensor([[3.0, 0], [1, 0], [0, 1], [0, 2]]), split)
    assert [(one["index"], one["label"], one["predicted"]) for one in found] == [(3, "cat", "dog"), (2, "cat", "dog")]


def test_onnx_equals_pytorch_whatever_the_batch(model: Path) -> None:
    torch.manual_seed(0)
    network = ResNet(8, 3).eval()
    images = torch.randint(0, 256, (70, 32, 32, 3), dtype=torch.uint8)
    with torch.inference_mode():
        logits = network(((images.float() / 255 - 0.5) / 0.25).permute(0, 3, 1, 2))
    expected = (logits / 2.0).softmax(1).numpy()
    classifier = Classifier(model)
    for n in (1, 3, 70):
        (probabilities,) = classifier.session.run(["probabilities"], {"images": images[:n].numpy()})
        assert np.abs(probabilities - expected[:n]).max() < 1e-5


def test_what_is_no_number_is_not_exported(tmp_path: Path) -> None:
    network = ResNet(8, 3)
    network.linear.weight.data[0, 0] = torch.nan
    for key, value in (
        ("contrast_mean", [None] * 32),
        ("class_directions", [[0.0] * 64]),
        ("class_directions", [[0.0] * 64, [0.0]]),
    ):
        save_model(tmp_path, ResNet(8, 3), CONFIG | {key: value})
        assert f"key '{key}': found" in run("export", tmp_path, "--out", tmp_path / "a.onnx", status=2).err
    save_model(tmp_path, network, CONFIG)
    assert "differ by nan" in run("export", tmp_path, "--out", tmp_path / "a.onnx", status=1).err
    assert not (tmp_path / "a.onnx").exists()
    assert "allowed: a file name that ends in .onnx" in run("export", tmp_path, "--out", tmp_path / "config.json", status=2).err


def test_a_wider_network_is_finished_and_exported_too(tmp_path: Path) -> None:
    row = Setting.model_validate(
        {
            "name": "Wide",
            "model": "resnet8",
            "width": 24,
            "batch_size": 16,
            "epochs": 1,
            "validation_size": 16,
            "precision": "float32",
            "compile": False,
        }
    )
    images = torch.randint(0, 256, (64, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Split(images, torch.arange(64) % 4, tuple("abcd"), "made up")
    train_run(row, 0, lambda part: data if part == "train" else None, tmp_path)
    assert load_model(tmp_path)[1]["architecture"]["width"] == 24
    assert Classifier(tmp_path).classes == list("abcd")
    for graph in (tmp_path / "model" / "model.onnx", BUILT_IN / "resnet32" / "model.onnx"):
        assert b"export.py" not in graph.read_bytes()  # the folders of the machine that made it are nobody's concern


def test_the_activation_map_averages_to_the_logit(model: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    classifier = Classifier(model)
    probabilities, maps = classifier.session.run(["probabilities", "activation_map"], {"images": images})
    assert maps.shape == (2, len(COLOURS), 8, 8)
    torch.manual_seed(0)
    bias = ResNet(8, 3).linear.bias.detach().numpy()
    logits = (maps.mean(axis=(2, 3)) + bias) / 2.0
    assert np.allclose(torch.tensor(logits).softmax(1).numpy(), probabilities, atol=1e-5)


@pytest.mark.parametrize("kind", ["JPEG", "MPO"])
def test_a_picture_of_too_many_scans_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    file = tmp_path / "photo.jpg"
    more = {"save_all": True, "append_images": [Image.new("RGB", (64, 64))]} if kind == "MPO" else {}
    Image.new("RGB", (64, 64)).save(file, kind, progressive=True, **more)
    assert read_photo(file).size == (64, 64)
    monkeypatch.setattr("resnet_cifar10.photo.MAX_SCANNED_PIXELS", 64 * 64)  # one scan; this one has more
    with pytest.raises(ValueError, match="more scans than any camera writes"):
        read_photo(file)


def tiff(width: int, height: int, bits: int, planes: list[bytes], *, compressed: bool, tile: int = 0) -> io.BytesIO:
    """Write a TIFF with a plane for each colour, each in one strip or tile; Pillow does not."""
    planes = [zlib.compress(plane) if compressed else plane for plane in planes]
    count, (place, length) = len(planes), (324, 325) if tile else (273, 279)
    tags = {256: [width], 257: [height], 258: [bits] * count, 259: [8 if compressed else 1], 262: [2 if count == 3 else 1]}
    tags |= {277: [count], 284: [2], place: [0] * count, length: [len(plane) for plane in planes]}
    tags |= {322: [tile], 323: [tile]} if tile else {278: [height]}
    behind = 14 + 12 * len(tags)  # the entries: lists of numbers, then the pixels
    start = behind + sum(4 * len(numbers) for numbers in tags.values() if len(numbers) > 1)
    tags[place] = [start + sum(map(len, planes[:i])) for i in range(count)]
    entries = lists = b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"<{len(numbers)}I", *numbers)
        entries += struct.pack("<HHI", tag, 4, len(numbers))
        entries += struct.pack("<I", behind + len(lists)) if len(numbers) > 1 else packed
        lists += packed if len(numbers) > 1 else b""
    return io.BytesIO(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + lists + b"".join(planes))


def test_planes_of_sixteen_bits_are_read_rightly_or_not_at_all(photo: Image.Image) -> None:
    pixels = np.asarray(photo)
    wide = pixels.astype("<u2") * 257

    def in_planes(values: np.ndarray[Any, Any], *, compressed: bool) -> io.BytesIO:
        planes = [values[..., i].tobytes() for i in range(3)]
        return tiff(*photo.size, 8 * values.itemsize, planes, compressed=compressed)

    for values, compressed in ((pixels, False), (pixels, True), (wide, True)):
        assert np.array_equal(np.asarray(read_photo(in_planes(values, compressed=compressed))), pixels)
    with pytest.raises(ValueError, match="found 16 bits in a plane for each colour; allowed there: compressed, or 8 bits"):
        read_photo(in_planes(wide, compressed=False))


def test_the_tiles_of_a_picture_are_no_larger_than_a_picture_may_be() -> None:
    def tiled(side: int) -> io.BytesIO:
        return tiff(64, 64, 8, [bytes(64 * 64)], compressed=True, tile=side)

    assert read_photo(tiled(64)).size == (64, 64)
    with pytest.raises(ValueError, match="too large: found 2,116,000,000 pixels; allowed: at most 89,478,485"):
        read_photo(tiled(46_000))


@pytest.mark.parametrize("size", [(1031, 1101), (2048, 1536)])
def test_a_large_jpeg_is_decoded_small_only_where_that_loses_no_edge(size: tuple[int, int]) -> None:
    noise = Image.effect_noise((40, 30), 90).resize(size, Image.Resampling.BICUBIC).convert("RGB")
    read = read_photo(io.BytesIO(encoded(noise, "JPEG", quality=95)))
    assert read.size == (size if size[0] % 2 else (1024, 768))
    assert np.abs(views(read).astype(int) - views(noise)).max() <= 5


def test_a_png_may_say_a_lot_of_itself(photo: Image.Image) -> None:
    said = PngInfo()
    said.add_itxt("XML:com.adobe.xmp", " " * 2_000_000, zip=True)
    assert read_photo(saved(photo, "PNG", pnginfo=said)).size == photo.size


def test_what_stands_behind_a_picture_is_none_of_its_scans(photo: Image.Image) -> None:
    film = b"\xff\xda" * 1_000_000
    assert read_photo(io.BytesIO(encoded(photo, "JPEG", progressive=True) + film)).size == photo.size


def test_no_scan_is_hidden_in_what_a_decoder_skips(photo: Image.Image) -> None:
    whole = encoded(photo, "JPEG", progressive=True, restart_marker_blocks=1)
    start, restart = whole.index(b"\xff\xda"), whole.index(b"\xff\xd0")
    hiding = whole[:restart] + b"\xff\x02\xff\xff" + whole[restart:]  # a marker that has no length, and what would be one
    assert start < restart and np.array_equal(read_photo(io.BytesIO(hiding)), read_photo(io.BytesIO(whole)))
    assert _scans(io.BytesIO(hiding)) == _scans(io.BytesIO(whole)) == 10


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "empty; allowed: JPEG"),
        ("text.jpg", b"dear diary", "not an image; allowed: JPEG"),
        ("phone.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC or AVIF; allowed: JPEG"),
        ("missing.jpg", None, "No such file"),
        ("x" * 300, None, "xx: File name too long"),
        ("folder.png/", None, "holds no photo"),
        ("truncated.png", saved(Image.effect_noise((99, 99), 50), "PNG").getvalue()[:900], "truncated"),
        ("truncated.jpg", saved(Image.effect_noise((99, 99), 50), "JPEG").getvalue()[:900], "truncated"),
        ("none.gif", b"GIF89a\x10\x00\x10\x00\x00\x00\x00;", "damaged, or of a kind that is not read; allowed: JPEG"),
        ("cut.webp", saved(Image.effect_noise((99, 99), 50), "WEBP").getvalue()[:60], "damaged"),
        ("loop.jpg", Path("loop.jpg"), "symbolic links"),
    ],
)
def test_what_is_no_photo_gets_one_line_with_the_reason(
    model: Path, tmp_path: Path, name: str, content: bytes | Path | None, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    elif isinstance(content, Path):
        (tmp_path / name).symlink_to(content)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    status, output, errors = cli("infer", tmp_path / name, "--model", model)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert name.strip("/") in errors
    assert reason in errors
    assert capfd.readouterr().err == ""  # nor has a library in C anything to say


def test_among_bad_photos_the_good_ones_still_count(model: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"dear diary")
    status, output, errors = cli("infer", tmp_path, "-", "--model", model, "--json", "--figure", tmp_path / "figure.png")
    assert (status, errors.count("\n")) == (2, 2)
    assert "bad.jpg: not an image" in errors
    assert "standard input: empty" in errors
    assert [Path(answer["file"]).name for answer in json.loads(output)] == ["good.png"]
    assert (tmp_path / "figure.png").exists()


def test_a_closed_standard_input_is_an_empty_one() -> None:
    shell = ["sh", "-c", 'exec "$0" -m resnet_cifar10 infer - <&-', sys.executable]
    done = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("error: standard input: empty;")


def test_with_standard_error_closed_the_document_is_alone_on_standard_output(tmp_path: Path) -> None:
    shell = ["sh", "-c", 'exec "$0" -m resnet_cifar10 infer --json nothing.jpg 2>&-', sys.executable]
    done = subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "[]\n")


def test_a_picture_does_not_replace_a_photo_or_another_picture(model: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "a.png")
    before, out = (tmp_path / "a.png").read_bytes(), tmp_path / "folder/../a.png"
    (tmp_path / "folder").mkdir()
    new = tmp_path / "b.png"
    for wanted, said in (
        ([f"--explain={out}"], "a.png twice; allowed: a file that is nothing else"),
        ([f"--figure={out}"], "a.png twice; allowed: a file that is nothing else"),
        ([f"--figure={new}", f"--explain={new}"], "b.png twice; allowed: a file that is nothing else"),
    ):
        status, output, errors = cli("infer", tmp_path / "a.png", "--model", model, *wanted)
        assert (status, output, errors.count("\n")) == (2, "", 1) and said in errors
    assert (tmp_path / "a.png").read_bytes() == before and not new.exists()
    (tmp_path / "loop.png").symlink_to("loop.png")
    status, _, errors = cli("infer", tmp_path / "loop.png", "--model", model, "--figure", new)
    assert (status, errors.count("\n")) == (2, 1) and "loop.png: " in errors


def test_explain_draws_over_the_one_photo(model: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "a.png")
    assert cli("infer", tmp_path / "a.png", "--model", model, "--explain", tmp_path / "why.png")[0] == 0
    with Image.open(tmp_path / "why.png") as drawn:
        assert (drawn.format, drawn.size) == ("PNG", photo.size)
    status, output, errors = cli("infer", tmp_path, "--model", model, "--explain", tmp_path / "b.png")
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert "--explain: found 2 photos; allowed: one" in errors
    status, _, errors = cli("infer", *["a.jpg"] * 121, "--figure", "f.png")
    assert status == 2 and "--figure: found 121 photos; allowed: at most 120" in errors
    for option in ("--explain", "--figure"):
        status, _, errors = cli("infer", tmp_path / "a.png", "--model", model, option, tmp_path / "a.png" / "b.png")
        assert (status, errors.count("\n")) == (2, 1)
        assert "a.png: is a file; allowed: a folder" in errors


def test_a_picture_that_cannot_be_written_whole_leaves_the_old_one(model: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "a.png")
    (tmp_path / "old.png").write_bytes(b"old")
    command = f"ulimit -f 1; exec {sys.executable} -m resnet_cifar10 infer a.png --model {model} --figure old.png"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert (tmp_path / "old.png").read_bytes() == b"old"


def test_a_pipe_among_photos_is_not_waited_for(model: Path, photo: Image.Image, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    photo.save(tmp_path / "b.png")
    status, output, _ = cli("infer", tmp_path, "--model", model)
    assert (status, output.count("\n")) == (0, 1)


def test_a_name_that_no_disk_takes_or_no_terminal_shows_costs_no_other_photo(
    model: Path, photo: Image.Image, tmp_path: Path
) -> None:
    photo.save(tmp_path / "a.png")
    photo.save(tmp_path / "写真.png")
    command = [sys.executable, "-m", "resnet_cifar10", "infer", "x" * 300, "写真.png", "a.png", "--model", str(model)]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.findall(r"^(\S+): ", done.stdout, re.M) == ["\\u5199\\u771f.png", "a.png"]


def test_a_device_is_not_replaced_by_a_file(model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is a device or a pipe; allowed: a file"):
        write(tmp_path / "pipe", b"content")
    assert (tmp_path / "pipe").is_fifo()
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write(tmp_path / "link", b"content")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"content"
    with pytest.raises(ValueError, match="File name too long"):
        write(tmp_path / ("x" * 300), b"content")


@pytest.mark.parametrize("arguments", [("infer", ""), ("infer", "a.png", "--figure="), ("train", "a.toml", "--out=", "--ray=")])
def test_an_empty_argument_is_not_the_current_folder(arguments: tuple[str, ...]) -> None:
    assert cli(*arguments) == (2, "", "error: found an empty argument, perhaps a variable that is not set; allowed: a value\n")


@pytest.mark.parametrize("delay", [0.15, 0.45, 0.9])
def test_an_early_ctrl_c_ends_without_a_traceback(model: Path, photo: Image.Image, tmp_path: Path, delay: float) -> None:
    photo.save(tmp_path / "a.png")
    command = [sys.executable, "-m", "resnet_cifar10", "infer", *[str(tmp_path / "a.png")] * 5000, "--model", str(model)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        time.sleep(delay)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    stopped = running.returncode in (130, -signal.SIGINT) and errors in ("", "error: stopped\n")
    # a slow machine may not have come to the program yet: then Python itself says what it was doing
    assert stopped or (errors and str(ROOT / "resnet_cifar10") not in errors)


@pytest.mark.parametrize("late", [True, False])
def test_a_second_ctrl_c_ends_with_the_same_line(late: bool) -> None:
    """The second one comes as the first one's line is written, or while a library has swallowed the first one."""
    code = """
import os, signal, sys, time
from resnet_cifar10 import cli
def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)
def line(text, known=cli.printable):
    ctrl_c()
    return known(text)
def swallow(**options):
    try:
        ctrl_c()
    except SystemExit:
        ctrl_c()
    finally:
        return 0
if sys.argv.pop() == "True":
    cli.printable, cli.app = line, lambda **options: ctrl_c()
else:
    cli.app = swallow
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code, "infer", str(late)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: stopped\n")


def test_a_folder_and_standard_input(model: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "a.png")
    photo.save(tmp_path / "b.jpg")
    status, output, _ = cli("infer", tmp_path, "-", "--model", model, "--json", stdin=(tmp_path / "a.png").read_bytes())
    assert status == 0
    a, b, stdin = json.loads(output)
    assert (Path(a["file"]).name, Path(b["file"]).name, stdin["file"]) == ("a.png", "b.jpg", "-")
    assert a["probabilities"] == stdin["probabilities"]
    (tmp_path / "empty").mkdir()
    assert cli("infer", tmp_path / "empty", "--model", model)[0] == 2
    (tmp_path / "c.heic").touch()
    status, output, errors = cli("infer", tmp_path, "--model", model)
    assert (status, output.count("\n"), errors.count("\n")) == (0, 2, 1) and "do not end like photos: c.heic" in errors


def test_odd_names_are_shown_on_one_line_and_what_a_system_hides_is_no_photo(
    model: Path, photo: Image.Image, tmp_path: Path
) -> None:
    odd = os.fsdecode(b"\xff\x1b[31m.png")
    for name in (odd, "._hidden.png"):
        photo.save(tmp_path / name)
    (tmp_path / "album.jpg").mkdir()
    status, output, errors = cli("infer", tmp_path, "--model", model)
    assert (status, errors, output.count("\n")) == (0, "", 1)
    assert output.startswith(f"{tmp_path}/??[31m.png: ")


def test_a_model_of_others_sends_no_codes_to_the_terminal(model: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    shutil.copytree(model, tmp_path / "model")
    classes = [f"\x1b[2J{name}" for name in CONFIG["classes"]]
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG | {"classes": classes}))
    status, output, errors = cli("infer", tmp_path / "photo.png", "--model", tmp_path / "model")
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert "[2J" in errors and errors[:-1].isprintable()


def test_a_run_that_was_killed_while_it_was_finished_is_no_model(model: Path, photo: Image.Image, tmp_path: Path) -> None:
    photo.save(tmp_path / "photo.png")
    shutil.copytree(model, tmp_path / "run" / "model")
    (tmp_path / "run" / "setting.json").write_text("{}")
    status, _, errors = cli("infer", tmp_path / "photo.png", "--model", tmp_path / "run")
    assert (status, errors.count("\n")) == (2, 1)
    assert "this run is not finished" in errors


def test_a_picture_of_billions_of_pixels_is_refused_before_it_takes_memory(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, pixels=bytes(50_000_000)))
    code = """import atexit, re
from resnet_cifar10.cli import main
atexit.register(lambda: print(re.findall(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[0]))
main()"""
    command = [sys.executable, "-c", code, "infer", tmp_path / "bomb.png", "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "bomb.png: too large: found 3,600,000,000 pixels; allowed: at most 89,478,485" in done.stderr
    assert int(done.stdout) <= 300_000  # kilobytes at its peak


def test_a_broken_model_folder_is_refused_with_the_reason(
    model: Path, photo: Image.Image, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photo.save(tmp_path / "photo.png")
    broken = tmp_path / "model"
    save_model(broken, ResNet(8, 3), CONFIG)
    for file, content, reason in (
        ("model.onnx", None, "export"),
        ("model.onnx", b"no graph", "not an ONNX model"),
        ("model.onnx", (model / "model.onnx").read_bytes() + b"more", "SHA-256 does not match"),
        ("config.json", b"{", "config.json: cannot be read"),
        ("config.json", b'{"classes": ["a", "b"]}', "'architecture'"),
        ("config.json", json.dumps(CONFIG | {"rejection_threshold": []}).encode(), "'rejection_threshold'"),
        ("config.json", json.dumps(CONFIG | {"classes": ["a", "b", "a"]}).encode(), "'classes': found ['a', 'b', 'a']"),
        ("config.json", json.dumps(CONFIG | {"classes": ["a", "b", "c\nd"]}).encode(), "allowed: two or more"),
        ("config.json", json.dumps(CONFIG | {"rejection_threshold": math.nan}).encode(), "'rejection_threshold': found nan"),
    ):
        if content is not None:
            (broken / file).write_bytes(content)
        status, _, errors = cli("infer", tmp_path / "photo.png", "--model", broken)
        assert (status, errors.count("\n")) == (2, 1)
        assert reason in errors
    config = json.loads((model / "config.json").read_text())
    (broken / "model.onnx").write_bytes((model / "model.onnx").read_bytes())
    write_json(broken / "config.json", config | {"classes": config["classes"][::-1]})
    assert "its classes are not those of config.json" in cli("infer", tmp_path / "photo.png", "--model", broken)[2]
    (broken / "config.json").unlink()
    assert "config.json: missing" in cli("infer", tmp_path / "photo.png", "--model", broken)[2]
    assert "built-in" in cli("infer", tmp_path / "photo.png", "--model", "resnet999")[2]
    assert capfd.readouterr().err == ""  # nor has ONNX Runtime anything to say

"""Every source of images gives the same pixels, a hostile one gives one line; the held-out split; the batches of an epoch."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import pickle
import shutil
import tarfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASSES, ROOT, batch, encoded, one_line, python2_pickle, write_archive
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from resnet_cifar10 import photo
from resnet_cifar10.data import CROP_PADDING, CUTOUT_SIZE, Split, batches, hold_out, mean_and_std, normalise
from resnet_cifar10.decode import _quick, decode
from resnet_cifar10.errors import JobFailed
from resnet_cifar10.photo_like import photo_like
from resnet_cifar10.sources import load
from torture import inputs
from torture.inputs import TEST, TRAIN, write_parquet

CIFAR10 = ROOT.parent / "shared" / "data" / "cifar10"


def assert_holds(split: Split | None, images: np.ndarray, labels: list[int]) -> None:
    assert split is not None
    assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
    assert np.array_equal(split.images, images)
    assert split.labels.tolist() == labels


# --- sources ---


@pytest.mark.parametrize("source", ["cifar_folder", "cifar_archive", "png_parquet"])
def test_folder_archive_and_parquet_give_the_same_pixels(source, request):
    path = request.getfixturevalue(source)
    train, test = load(path, "train"), load(path, "test")
    assert_holds(train, *TRAIN)
    assert_holds(test, *TEST)
    assert load(path, "val") is None
    assert train.classes == test.classes == tuple(CLASSES)
    assert "CIFAR-10" in train.source and "JPEG" not in train.source


def test_parquet_files_as_the_hub_converts_them_are_told_by_their_folders(tmp_path, png_parquet):
    converted = tmp_path / "converted"
    for part in ("train", "test"):
        (converted / "plain_text" / part).mkdir(parents=True)
        for number, file in enumerate(sorted(png_parquet.rglob(f"{part}-*.parquet"))):
            shutil.copy(file, converted / "plain_text" / part / f"{number:04}.parquet")
    assert_holds(load(converted, "train"), *TRAIN)
    assert_holds(load(converted, "test"), *TEST)


def test_parquet_files_that_name_no_split_are_refused(tmp_path, png_parquet):
    (tmp_path / "own").mkdir()
    shutil.copy(next(png_parquet.rglob("test-*.parquet")), tmp_path / "own" / "pictures.parquet")
    with pytest.raises(ValueError, match=r"pictures\.parquet: .* allowed: train, validation, test"):
        load(tmp_path / "own", "train")


def test_equal_data_have_equal_checksums(cifar_folder, png_parquet):
    one, other = load(cifar_folder, "train"), load(png_parquet, "train")
    assert one.sha256 == other.sha256
    images, labels = one.images.clone(), one.labels.clone()
    images[7, 3, 5, 2] ^= 1
    labels[7] = 0
    for change in ({"images": images}, {"labels": labels}, {"classes": tuple("abcdefghij")}):
        assert dataclasses.replace(one, **change).sha256 != one.sha256


def test_the_folder_above_a_source_is_a_source_too(cifar_folder, cifar_archive):
    assert_holds(load(cifar_folder.parent, "train"), *TRAIN)
    assert_holds(load(cifar_archive.parent, "train"), *TRAIN)


def test_a_part_of_the_official_folder_is_read(cifar_folder):
    for name in ("data_batch_1", "data_batch_3", "data_batch_5", "batches.meta"):
        (cifar_folder / name).unlink()
    kept = [*range(10, 20), *range(30, 40)]
    assert_holds(load(cifar_folder, "train"), TRAIN[0][kept], [TRAIN[1][i] for i in kept])
    assert load(cifar_folder, "train").classes == tuple(CLASSES)


def test_batches_written_by_python_3_are_read(cifar_folder):
    (cifar_folder / "test_batch").write_bytes(pickle.dumps(batch(*TEST), protocol=2))
    assert_holds(load(cifar_folder, "test"), *TEST)


@pytest.mark.parametrize("quality", [75, 90, 30])
def test_a_jpeg_copy_says_so_with_its_quality(tmp_path, quality):
    blobs = [encoded(image, "JPEG", quality=quality) for image in TEST[0]]
    write_parquet(tmp_path / "test-00000-of-00001.parquet", blobs, TEST[1], CLASSES)
    test = load(tmp_path, "test")
    assert test.source == f"CIFAR-10 (JPEG quality {quality} copy)"
    assert_holds(test, np.stack([np.asarray(Image.open(io.BytesIO(blob))) for blob in blobs]), TEST[1])
    assert load(tmp_path, "train") is None


def test_parquet_of_other_classes_and_sizes(tmp_path):
    blobs = [encoded(np.full((50, 80, 3), (9, 200, 9), np.uint8), "PNG"), encoded(np.full((7, 7), 100, np.uint8), "PNG")]
    write_parquet(tmp_path / "moss" / "train.parquet", blobs, [1, 0], ["grey", "green"])
    train = load(tmp_path / "moss", "train")
    assert_holds(train, np.stack([np.full((32, 32, 3), (9, 200, 9)), np.full((32, 32, 3), 100)]), [1, 0])
    assert train.classes == ("grey", "green") and "CIFAR" not in train.source


@pytest.mark.parametrize(("part", "count"), [("train", 6), ("val", 3), ("test", 3)])
def test_class_folders_of_several_formats_and_sizes(class_folders, part, count):
    split = load(class_folders, part)
    assert split.classes == ("blue", "green", "red") and split.source == "colours"
    assert split.labels.tolist() == [0] * count + [1] * count + [2] * count
    assert split.images.shape == (3 * count, 32, 32, 3)
    colours = torch.tensor([(0, 0, 250), (0, 250, 0), (250, 0, 0)])[split.labels]
    assert int((split.images.int() - colours[:, None, None]).abs().max()) <= 4  # JPEG and lossy WebP are that near


def test_class_folders_keep_the_middle_of_an_image_and_its_orientation(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "train" / "a" / "wide.png")
    upright = Image.Exif()
    upright[0x0112] = 6  # the camera was turned: the picture is to be turned by 90 degrees clockwise
    Image.fromarray(pixels[:, :32]).save(tmp_path / "train" / "b" / "turned.png", exif=upright)
    images = load(tmp_path, "train").images.numpy()
    assert np.array_equal(images[0], pixels[:, 8:40])
    assert np.array_equal(images[1], np.rot90(pixels[:, :32], k=-1))


def test_class_folders_without_validation_or_test(class_folders):
    shutil.rmtree(class_folders / "val")
    shutil.rmtree(class_folders / "test")
    assert len(load(class_folders, "train")) == 18
    assert load(class_folders, "val") is None and load(class_folders, "test") is None
    (class_folders / "validation").mkdir()  # else its images would be left out without a word
    with pytest.raises(ValueError, match="found validation; allowed: train, val and test"):
        load(class_folders, "val")


def test_hidden_files_and_folders_are_neither_images_nor_classes(class_folders):
    (class_folders / "train" / ".checkpoints").mkdir()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):  # of the systems' file managers
        (class_folders / "train" / "red" / name).write_bytes(b"not an image")
    assert len(load(class_folders, "train")) == 18
    assert load(class_folders, "train").classes == ("blue", "green", "red")


def test_digits_are_split_into_four_fifths_and_a_stratified_fifth():
    train, test = load("digits", "train"), load("digits", "test")
    assert (len(train), len(test)) == (1438, 359)
    assert train.classes == test.classes == tuple("0123456789")
    for split in (train, test):
        assert split.images.dtype == torch.uint8 and split.images.shape[1:] == (32, 32, 3)
        assert (split.images == split.images[..., :1]).all() and split.images.max() == 255  # grey, black to white
    train_counts, test_counts = torch.bincount(train.labels), torch.bincount(test.labels)
    assert ((test_counts - (train_counts + test_counts) * 359 / 1797).abs() < 1).all()
    in_both = {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in test.images}
    assert not in_both
    assert load("digits", "val") is None
    assert load("digits", "test").sha256 == test.sha256


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not beside this repository")
def test_the_real_cifar10():
    train, test = load(CIFAR10, "train"), load(CIFAR10, "test")
    for split, n in ((train, 50_000), (test, 10_000)):
        assert split.images.shape == (n, 32, 32, 3)
        assert torch.bincount(split.labels).tolist() == [n // 10] * 10
        assert split.classes == tuple(CLASSES)
        assert split.source == "CIFAR-10 (JPEG quality 75 copy)"
    # The mean of the original pixels, which every publication gives, is that of a JPEG copy too.
    assert mean_and_std(train.images)[0] == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.002)


# --- sources that are wrong ---


def sentence(path: Path, split: str = "train") -> str:
    with pytest.raises(ValueError) as error:
        load(path, split)
    return one_line(error)


def test_a_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "absent") in sentence(tmp_path / "absent")


def test_a_folder_without_data_is_named_with_what_it_holds(tmp_path):
    assert str(tmp_path) in sentence(tmp_path) and "empty" in sentence(tmp_path)
    (tmp_path / "holiday.txt").touch()
    assert "holiday.txt" in sentence(tmp_path) and "cifar-10-python.tar.gz" in sentence(tmp_path)


def test_a_file_that_is_no_archive_is_named(tmp_path):
    for name in ("notes.txt", "cifar-10-python.tar.gz"):
        (tmp_path / name).write_bytes(b"not an archive" * 100)
        assert str(tmp_path / name) in sentence(tmp_path / name)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_truncated_archive_is_named(cifar_archive, split, share):
    content = cifar_archive.read_bytes()
    cifar_archive.write_bytes(content[: int(share * len(content))])
    assert str(cifar_archive) in sentence(cifar_archive, split)


def test_an_archive_that_ends_between_two_batches_never_gives_fewer_images(cifar_archive):
    with tarfile.open(cifar_archive) as tar:
        starts = {Path(member.name).name: member.offset for member in tar}
    plain, cut = gzip.decompress(cifar_archive.read_bytes()), cifar_archive.with_name("cut.tar")
    for name in ("data_batch_1", "data_batch_2", "data_batch_5"):
        for more in (0, 100):  # also inside the header of the next batch
            cut.write_bytes(plain[: starts[name] + more])
            assert str(cut) in sentence(cut)


def test_a_damaged_archive_is_named(cifar_archive):
    content = bytearray(cifar_archive.read_bytes())
    content[len(content) // 2] ^= 0xFF
    cifar_archive.write_bytes(content)
    assert str(cifar_archive) in sentence(cifar_archive)


# others, of the torture suite, in test_torture.py
WRONG_BATCHES = {"labels that are fractions": {"labels": [0.5] * 20}, "no dimension": {"data": np.array(3, np.uint8)}}


@pytest.mark.parametrize("change", WRONG_BATCHES.values(), ids=WRONG_BATCHES)
def test_a_wrong_batch_is_named(cifar_folder, change):
    content = {key: value for key, value in (batch(*TEST) | change).items() if value is not None}
    (cifar_folder / "test_batch").write_bytes(pickle.dumps(content, protocol=2).replace(b"numpy._core", b"numpy.core"))
    assert str(cifar_folder) in sentence(cifar_folder, "test")


@pytest.mark.parametrize("content", [b"", b"\x80\x02", b"text", b"\x80\x02]q\x00.", b"I1\n.", b"cno\n"], ids=repr)
@pytest.mark.parametrize("name", ["test_batch", "batches.meta"])
def test_a_file_that_is_no_batch_is_named(cifar_folder, name, content):
    (cifar_folder / name).write_bytes(content)
    assert str(cifar_folder) in sentence(cifar_folder, "test") and name in sentence(cifar_folder, "test")


@pytest.mark.parametrize("names", [None, "cat", ["cat"], [1, 2], {"a": 1}], ids=repr)
def test_wrong_class_names_are_named(cifar_folder, names):
    (cifar_folder / "batches.meta").write_bytes(python2_pickle({"label_names": names}))
    assert "label_names" in sentence(cifar_folder)


def named(module: str, name: str) -> bytes:
    """Pickle a dictionary whose "data" is the object of any module and name, however odd."""
    pieces = [pickle.PROTO + b"\x04", pickle.EMPTY_DICT, pickle.SHORT_BINUNICODE + b"\x04data"]
    for text in (module.encode(), name.encode()):
        pieces.append(pickle.SHORT_BINUNICODE + bytes([len(text)]) + text)
    return b"".join([*pieces, pickle.STACK_GLOBAL, pickle.SETITEM, pickle.STOP])


@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])  # every payload: row "payload" of the torture suite
def test_a_hostile_pickle_runs_nothing_and_is_named(cifar_folder, tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    hostile = {"data": inputs.PAYLOADS["os.system"](), "label_names": CLASSES}
    (cifar_folder / file).write_bytes(pickle.dumps(hostile, protocol=2))
    archive = write_archive(tmp_path / "hostile.tar.gz", cifar_folder)
    for path in (cifar_folder, archive):
        assert str(path) in sentence(path) and file in sentence(path) and "which no CIFAR batch needs" in sentence(path)
    assert not inputs.MARKER.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("numpy", "ndarray.tofile"),
        ("numpy", "dtype.__class__"),
        ("numpy.core.multiarray", "fromfile"),
        ("numpy.core.multiarray", "_reconstruct.__globals__"),
        ("_codecs", "lookup"),
        ("builtins", "__import__"),
        ("resnet_cifar10.sources", "load"),
        ("two\nlines", "and\nmore"),
        ("os", "\x1b[2Jsystem"),
    ],
)
def test_any_other_name_in_a_pickle_is_refused(cifar_folder, module, name):
    (cifar_folder / "data_batch_1").write_bytes(named(module, name))
    for part in (str(cifar_folder), "data_batch_1", "which no CIFAR batch needs"):
        assert part in sentence(cifar_folder)


def test_an_image_of_a_parquet_file_that_does_not_decode_is_named(tmp_path):
    good = encoded(TEST[0][0], "PNG")
    for damaged in (b"", b"not an image", good[:1000], encoded(TEST[0][0], "JPEG")[:400], None):
        write_parquet(tmp_path / "train.parquet", [good, good, damaged, good], [0, 1, 2, 3], CLASSES)
        assert str(tmp_path) in sentence(tmp_path) and "image 2: " in sentence(tmp_path)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [32, 40])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2, "quality": 75}, {"progressive": True}], ids=repr)
def test_a_jpeg_gives_the_pixels_that_pillow_gives(mode, size, options):
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    content = photo.encoded(Image.fromarray(noise).convert(mode), "JPEG", **options)
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    expected = expected if size == 32 else photo.square(expected)
    assert (_quick(content) is not None) == (size == 32 and mode != "CMYK")
    assert np.array_equal(decode([content], "jpeg")[0], np.asarray(expected))


def test_odd_jpegs_are_left_to_pillow_or_still_loaded(tmp_path):
    usual = encoded(TEST[0][0], "JPEG")
    lying = Image.Exif()
    lying[0x0112] = 3  # the orientation: upside down
    for options in ({"exif": lying}, {"xmp": b'<x tiff:Orientation="3"/>'}):
        turned = decode([encoded(TEST[0][0], "JPEG", **options)], "jpeg")[0]
        assert np.array_equal(turned, decode([usual], "jpeg")[0][::-1, ::-1])
    sampling = bytearray(usual)
    sampling[usual.index(b"\xff\xc0") + 11] = 0x14  # one that simplejpeg has no name for
    profile = usual[:2] + b"\xff\xe2\x00\x0eICC_PROFILE\0" + usual[2:]  # one that Pillow cannot open
    write_parquet(tmp_path / "train.parquet", [bytes(sampling), profile, usual], [0, 1, 2], CLASSES)
    assert len(load(tmp_path, "train")) == 3


def test_a_parquet_file_without_rows_is_named(tmp_path):
    write_parquet(tmp_path / "train.parquet", [], [], CLASSES)
    assert "holds no image" in sentence(tmp_path)


@pytest.mark.parametrize(("cap", "said"), [("MAX_ROWS", "allowed: at most 1"), ("MAX_PARQUET_BYTES", "more than 1 bytes")])
def test_a_parquet_file_of_too_much_is_refused(tmp_path, monkeypatch, cap, said):
    write_parquet(tmp_path / "train.parquet", [encoded(image, "PNG") for image in TEST[0][:2]], [0, 1], CLASSES)
    monkeypatch.setattr("resnet_cifar10.sources." + cap, 1)
    assert said in sentence(tmp_path)


@pytest.mark.parametrize("labels", [[0, 10], [0, -1], [0, None]], ids=repr)
def test_a_label_of_a_parquet_file_that_has_no_class_is_refused(tmp_path, labels):
    write_parquet(tmp_path / "train.parquet", [encoded(image, "PNG") for image in TEST[0][:2]], labels, CLASSES)
    assert "label" in sentence(tmp_path).replace(str(tmp_path), "")


def test_a_damaged_parquet_file_is_named(png_parquet):
    file = png_parquet / "plain_text" / "train-00001-of-00002.parquet"
    whole = file.read_bytes()
    for damaged in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-6], whole[:1000] + bytes(3000) + whole[4000:]):
        file.write_bytes(damaged)
        assert file.name in sentence(png_parquet)


def test_a_parquet_file_of_something_else_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for column in ({"price": [1.5]}, {"img": [1], "label": [0]}, {"img": ["text"], "label": [0]}, {"label": [0]}):
        pq.write_table(pa.table(column), tmp_path / "train.parquet")
        assert "train.parquet" in sentence(tmp_path)


def test_parquet_files_of_other_class_names_are_refused_whatever_split_is_read(tmp_path):
    for part, names in (("train", ["dark", "light"]), ("test", ["light", "dark"])):
        write_parquet(tmp_path / f"{part}.parquet", [encoded(image, "PNG") for image in TEST[0][:2]], [0, 1], names)
    for split in ("train", "test"):
        assert "train.parquet: its class names are not those of" in sentence(tmp_path, split)


def test_a_parquet_file_without_class_names_is_not_taken_for_cifar10(tmp_path):
    import pyarrow.parquet as pq

    write_parquet(tmp_path / "train.parquet", [encoded(image, "PNG") for image in TEST[0][:2]], [0, 1], ["a", "b"])
    pq.write_table(pq.read_table(tmp_path / "train.parquet").replace_schema_metadata(None), tmp_path / "train.parquet")
    assert "class names" in sentence(tmp_path)


@pytest.mark.parametrize("names", [["cat", "cat"], ["a\nb", "c"], ["a"], ["", "c"], "ab", [1, 2], None], ids=repr)
def test_class_names_of_a_parquet_file_are_checked(tmp_path, names):
    write_parquet(tmp_path / "train.parquet", [encoded(image, "PNG") for image in TEST[0][:2]], [0, 1], names)
    assert "train.parquet" in sentence(tmp_path) and "names" in sentence(tmp_path).replace(str(tmp_path), "")


def test_a_picture_in_a_parquet_file_is_read_as_one_in_a_folder(tmp_path):
    grey16 = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64)
    clear = Image.new("RGBA", (32, 32), (250, 0, 0, 0))
    turned = Image.fromarray(TEST[0][0])
    turned.getexif()[0x0112] = 6  # a quarter turn clockwise shows it upright
    blobs = []
    for number, image in enumerate([grey16, clear, turned]):
        blobs.append(photo.encoded(image, "PNG", exif=image.getexif()))
        (tmp_path / "folders" / "train" / f"class {number}").mkdir(parents=True)
        (tmp_path / "folders" / "train" / f"class {number}" / "a.png").write_bytes(blobs[-1])
    write_parquet(tmp_path / "parquet" / "train.parquet", blobs, [0, 1, 2], ["class 0", "class 1", "class 2"])
    images = load(tmp_path / "folders", "train").images
    assert torch.equal(load(tmp_path / "parquet", "train").images, images)
    assert images[1].unique().tolist() == [127] and torch.equal(images[2], torch.from_numpy(np.rot90(TEST[0][0], -1).copy()))


def test_several_processes_decode_as_one_does_and_name_the_image_that_fails(class_folders, monkeypatch):
    alone = load(class_folders, "train")
    monkeypatch.setattr("resnet_cifar10.decode.CHUNK_BYTES", 500)  # some images for each process
    together = load(class_folders, "train", processes=2)
    assert torch.equal(together.images, alone.images) and torch.equal(together.labels, alone.labels)
    (class_folders / "train" / "red" / "picture.tiff").write_bytes(b"no picture")
    with pytest.raises(ValueError) as error:
        load(class_folders, "train", processes=2)
    assert "red/picture.tiff: not an image" in one_line(error) and "more" not in one_line(error)
    (class_folders / "train" / "blue" / "picture.png").write_bytes(b"")
    for processes in (1, 2):
        with pytest.raises(ValueError, match=r"picture.+; and 1 more, such as .+picture") as error:
            load(class_folders, "train", processes)
        assert "red/picture.tiff: not an image" in one_line(error) and "blue/picture.png: empty" in one_line(error)


def test_a_decoding_process_that_is_killed_ends_the_job_with_a_sentence(class_folders, monkeypatch):
    def killed(pool, *work, **options):
        raise BrokenProcessPool

    monkeypatch.setattr("resnet_cifar10.decode.CHUNK_BYTES", 500)
    monkeypatch.setattr("resnet_cifar10.decode.ProcessPoolExecutor.map", killed)
    with pytest.raises(JobFailed, match="a process that decoded its images was ended; is there enough memory"):
        load(class_folders, "train", processes=2)


def test_an_image_of_a_class_folder_that_does_not_decode_is_named(class_folders):
    file = class_folders / "train" / "green" / "holiday.jpg"
    for content in (b"", b"not an image", encoded(TEST[0][0], "JPEG")[:400]):
        file.write_bytes(content)
        assert str(file) in sentence(class_folders)


def test_one_class_is_refused(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "train" / "cat" / "a.png")
    assert str(tmp_path / "train") in sentence(tmp_path) and "found ['cat']; allowed: two or more" in sentence(tmp_path)


def test_a_class_without_images_is_named(class_folders):
    shutil.rmtree(class_folders / "train" / "red")
    (class_folders / "train" / "red").mkdir()
    assert str(class_folders / "train" / "red") in sentence(class_folders)


@pytest.mark.parametrize("name", [b"K\xe4fer", b"two\nlines"])
def test_a_class_whose_name_cannot_be_written_down_is_refused(class_folders, name):
    for part in ("train", "val", "test"):
        os.rename(class_folders / part / "red", os.fsencode(class_folders / part) + b"/" + name)
    assert "allowed: two or more different names of printable characters" in sentence(class_folders)


@pytest.mark.parametrize("part", ["val", "test"])
def test_other_classes_than_in_train_are_named(class_folders, part):
    (class_folders / part / "red").rename(class_folders / part / "rouge")
    assert "red" in sentence(class_folders, part) and "rouge" in sentence(class_folders, part)


# --- the held-out split ---


@st.composite
def labels_and_size(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    counts = draw(st.lists(st.integers(4, 40), min_size=2, max_size=5))
    labels = draw(st.permutations([label for label, n in enumerate(counts) for _ in range(n)]))
    return torch.tensor(labels), draw(st.integers(0, len(labels) // 2))


@given(case=labels_and_size(), seed=st.integers(0, 2**32 - 1))
def test_held_out_images_are_stratified_disjoint_and_a_function_of_the_seed(case, seed):
    labels, size = case
    train, validation = hold_out(labels, size, seed)
    assert len(validation) == size
    assert sorted(train.tolist() + validation.tolist()) == list(range(len(labels)))
    exact = torch.bincount(labels) * size / len(labels)
    assert ((torch.bincount(labels[validation], minlength=len(exact)) - exact).abs() < 1 + 1e-4).all()
    again = hold_out(labels, size, seed)
    assert torch.equal(again[0], train) and torch.equal(again[1], validation)


def test_another_seed_holds_out_other_images():
    labels = torch.arange(1000) % 10
    held = [set(hold_out(labels, 500, seed)[1].tolist()) for seed in range(5)]
    assert len({frozenset(h) for h in held}) == 5
    assert 150 < len(held[0] & held[1]) < 350  # half of 500, were they drawn independently


@pytest.mark.parametrize("size", [99, 100, 101, 5000])
def test_a_class_keeps_an_image_for_training(size):
    with pytest.raises(ValueError) as error:
        hold_out(torch.arange(100) % 10, size, seed=0)
    assert "validation_size" in one_line(error) and str(size) in one_line(error)


# --- mean, deviation, normalisation ---


def test_mean_and_std_equal_numpy():
    images = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3)) * [1.0, 0.5, 0.1]
    images = images.astype(np.uint8)
    mean, std = mean_and_std(torch.from_numpy(images))
    assert mean == pytest.approx((images / 255).mean((0, 1, 2)), abs=1e-12)
    assert std == pytest.approx((images / 255).std((0, 1, 2)), abs=1e-12)


def test_normalised_images_have_mean_zero_and_deviation_one():
    images = torch.from_numpy(TRAIN[0] // 2 + 9)
    mean, std = (torch.tensor(values) for values in mean_and_std(images))
    x = normalise(images, mean, std)
    assert x.dtype == torch.float32 and x.shape == (50, 3, 32, 32)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert x.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert float(x[3, 1, 5, 7]) == pytest.approx(float((images[3, 5, 7, 1] / 255 - mean[1]) / std[1]), abs=1e-5)


def test_a_colour_that_never_varies_stays_finite():
    images = torch.full((4, 32, 32, 3), 200, dtype=torch.uint8)
    mean, std = (torch.tensor(values) for values in mean_and_std(images))
    assert normalise(images, mean, std).abs().max() < 1e-3


# --- batches ---

FILL = torch.tensor([250, 251, 252], dtype=torch.uint8)
CLASS_NAMES = tuple("abcdefghij")


def marked(n: int) -> Split:
    """Images whose pixels say which image (red), row (green) and column (blue) they are."""
    images = torch.empty(n, 32, 32, 3, dtype=torch.uint8)
    images[..., 0] = torch.arange(n)[:, None, None]
    images[..., 1] = 100 + torch.arange(32)[:, None]
    images[..., 2] = 100 + torch.arange(32)
    return Split(images, torch.arange(n) % 10, CLASS_NAMES, "marked")


def epoch_of(split: Split, augmentation: str, batch_size: int = 64, seed: int = 0, epoch: int = 1) -> list[torch.Tensor]:
    """Collect the batches of one epoch into images and targets."""
    return [torch.cat(parts) for parts in zip(*batches(split, batch_size, augmentation, seed, epoch, FILL), strict=True)]


def test_an_epoch_has_each_image_once_with_its_label():
    split = marked(150)
    sizes = [len(images) for images, _ in batches(split, 64, "none", 0, 1, FILL)]
    assert sizes == [64, 64, 22]
    images, targets = epoch_of(split, "none")
    which = images[:, 0, 0, 0].long()
    assert sorted(which.tolist()) == list(range(150)) and which.tolist() != list(range(150))
    assert torch.equal(images, split.images[which])
    assert targets.dtype == torch.float32
    assert torch.equal(targets, torch.eye(10)[split.labels[which]])


@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "crop_flip_cutout_mixup", "crop_flip_photo"])
def test_batches_are_a_function_of_seed_and_epoch(augmentation):
    split = marked(150)
    images, targets = epoch_of(split, augmentation, seed=3, epoch=7)
    again = epoch_of(split, augmentation, seed=3, epoch=7)
    assert torch.equal(images, again[0]) and torch.equal(targets, again[1])
    for seed, epoch in ((3, 8), (4, 7), (7, 3)):
        assert not torch.equal(images, epoch_of(split, augmentation, seed=seed, epoch=epoch)[0])


def test_the_global_random_state_is_neither_used_nor_changed():
    split = marked(20)
    torch.manual_seed(1)
    one = epoch_of(split, "crop_flip_cutout_mixup")[0]
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    torch.manual_seed(2)
    assert torch.equal(one, epoch_of(split, "crop_flip_cutout_mixup")[0])


@pytest.mark.parametrize("augmentation", ["crop", "flip", "crop_flip"])
def test_crop_and_flip_move_the_image_inside_a_frame_of_the_fill_colour(augmentation):
    split = marked(240)
    images, targets = epoch_of(split, augmentation)
    downs, rights, flips = [], [], []
    for image, target in zip(images, targets, strict=True):
        which, row, column = (int(value) for value in image[16, 16])  # four pixels of shift never reach the middle
        flip = bool(image[16, 15, 2] > image[16, 17, 2])
        down, right = row - 100 - 16, column - 100 - (15 if flip else 16)
        padded = FILL.repeat(40, 40, 1)
        padded[4:36, 4:36] = split.images[which]
        expected = padded[4 + down : 36 + down, 4 + right : 36 + right]
        assert torch.equal(image, expected.flip(1) if flip else expected)
        assert int(target.argmax()) == which % 10
        downs.append(down), rights.append(right), flips.append(flip)
    shifts = set(range(-CROP_PADDING, CROP_PADDING + 1)) if "crop" in augmentation else {0}
    assert set(downs) == set(rights) == shifts  # 240 draws miss one of nine with probability 1e-11
    assert (90 <= sum(flips) <= 150) if "flip" in augmentation else not any(flips)  # four standard deviations around 120
    assert "crop" not in augmentation or len(set(zip(downs, rights, strict=True))) > 40  # rows and columns move independently


def test_an_alternating_flip_mirrors_each_image_in_every_second_epoch():
    split = marked(240)

    def mirrored(epoch: int, seed: int = 0) -> list[bool]:
        images = epoch_of(split, "altflip", epoch=epoch, seed=seed)[0]
        by_image = images[images[:, 0, 0, 0].argsort()]
        assert torch.equal(
            torch.where((by_image[:, 16, 15, 2] > by_image[:, 16, 17, 2])[:, None, None, None], by_image.flip(2), by_image),
            split.images,
        )
        return (by_image[:, 16, 15, 2] > by_image[:, 16, 17, 2]).tolist()

    first, second = mirrored(1), mirrored(2)
    assert first == mirrored(3) == [not flip for flip in second] and second == mirrored(4)
    assert 90 <= sum(first) <= 150 and first != mirrored(1, seed=1)


def test_every_second_image_is_changed_as_in_photos():
    differ = (epoch_of(marked(150), "photo")[0] != epoch_of(marked(150), "none")[0]).flatten(1).any(1)
    assert differ.tolist() == [True, False] * 75


def test_a_photo_without_any_change_is_the_picture():
    middle = torch.full((50, 17), 0.5)
    middle[:, 13], middle[:, 14] = 0, 1  # the finest compression, nothing behind
    pictures = torch.from_numpy(TRAIN[0])
    assert (photo_like(pictures, middle, torch.zeros(50, 3, 32, 32)).int() - pictures.int()).abs().max() <= 3


@pytest.mark.parametrize("number", range(14))
def test_every_strength_of_a_photo_changes_the_picture(number):
    uniform = torch.full((1, 17), 0.5)
    uniform[:, 12], uniform[:, 13], uniform[:, 14] = 0, 0, 1
    picture, noise = torch.from_numpy(TRAIN[0][:1]), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    plain = photo_like(picture, uniform, noise)
    uniform[:, number] = 0.95
    assert not torch.equal(photo_like(picture, uniform, noise), plain)


def test_each_process_changes_its_images_like_other_photos(monkeypatch):
    drawn = []  # strengths and noise of each changed image
    monkeypatch.setattr("resnet_cifar10.data.photo_like", lambda images, *drawn_here: (drawn.append(drawn_here), images)[1])
    split = Split(torch.full((64, 32, 32, 3), 100, dtype=torch.uint8), torch.arange(64) % 10, CLASS_NAMES, "all alike")
    for rank in range(2):
        list(batches(split, 32, "photo", 0, 1, FILL, rank, 2))
    for numbers in map(torch.cat, zip(*drawn, strict=True)):
        assert len(numbers) == 32 == len(torch.unique(numbers.flatten(1), dim=0))


def test_behind_some_photos_lies_another_picture():
    black_or_white = torch.tensor([20, 235], dtype=torch.uint8).repeat(200)[:, None, None, None].expand(-1, 32, 32, 3)
    split = Split(black_or_white.contiguous(), torch.arange(400) % 2 + 1, CLASS_NAMES, "two colours")
    images, targets = next(batches(split, 400, "photo", 0, 1, FILL))
    grey = images[::2].float().mean(3)
    spread_of = grey.flatten(1).quantile(0.99, 1) - grey.flatten(1).quantile(0.01, 1)
    # three of five have one behind them, which may be of the same colour, or hidden
    assert 20 <= int((spread_of > 100).sum()) <= 90
    middle, white = grey[:, 12:20, 12:20].mean((1, 2)) > 128, targets[::2].argmax(1) == 2
    assert (middle == white).float().mean() > 0.95  # what the label names stays in front


def test_cutout_erases_one_square_somewhere():
    images, targets = epoch_of(marked(240), "cutout")
    erased = (images == FILL).all(3)
    whole_squares = 0
    for mask in erased:
        rows, columns = torch.nonzero(mask.any(1)).flatten(), torch.nonzero(mask.any(0)).flatten()
        height, width = int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1)
        assert int(mask.sum()) == height * width  # a rectangle without gaps
        assert height <= CUTOUT_SIZE and width <= CUTOUT_SIZE
        whole_squares += height == width == CUTOUT_SIZE
    assert whole_squares > 100  # three quarters times three quarters of 240; the others are cut by the border
    assert erased.any(0).all() and not erased.all(0).any()
    assert torch.equal(targets.sum(1), torch.ones(240))


def test_mixup_mixes_pixels_and_targets_in_the_same_shares():
    colours = torch.linspace(0, 250, 10).to(torch.uint8)
    split = Split(colours[:, None, None, None].expand(10, 32, 32, 3).contiguous(), torch.arange(10), CLASS_NAMES, "plain")
    shares = []
    for epoch in range(1, 31):
        images, targets = epoch_of(split, "mixup", batch_size=5, epoch=epoch)
        assert images.dtype == torch.uint8 and targets.dtype == torch.float32
        assert targets.sum(1).tolist() == pytest.approx([1.0] * 10) and (targets >= 0).all()
        assert ((targets > 0).sum(1) <= 2).all()
        expected = targets @ colours.float()
        assert float((images.float() - expected[:, None, None, None]).abs().max()) <= 0.51  # rounded to whole levels
        shares.append(round(float(targets.max(1).values.min()), 4))
    assert len(set(shares)) > 15 and sum(share > 0.9 for share in shares) >= 6  # beta(0.2, 0.2) is often near 0 or 1


def test_images_labels_and_words_that_would_be_learned_wrongly_are_refused() -> None:
    images, labels = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.tensor([0, 1, 1, 0])
    made = Split(images, labels, ("a", "b"), "made up")
    for wrong in (
        {"images": images.float()},
        {"images": images.permute(0, 3, 1, 2)},
        {"images": torch.zeros(4, 48, 48, 3, dtype=torch.uint8)},
        {"images": images[:3]},
        {"labels": labels + 1},
        {"labels": labels.int()},
    ):
        with pytest.raises(ValueError, match=r"made up: found .*allowed: uint8 \[N, 32, 32, 3\] and int64 \[N\], 0 to 1"):
            dataclasses.replace(made, **wrong)
    with pytest.raises(ValueError, match="found 'Crop'; allowed: 'none', or crop, flip"):
        next(batches(made, 2, "Crop_flip", 0, 1, images[0, 0, 0]))
    with pytest.raises(ValueError, match="found 'validation'; allowed: train, val, test"):
        load("digits", "validation")

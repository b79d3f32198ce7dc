"""Files as a crash, a full disk or another program leave them."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from resnet_cifar10 import files, run_folder, storage


def test_a_file_is_on_the_disk_before_its_name_is_and_the_name_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(number: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{number}')).name}")
        fsync(number)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append(f"rename to {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    files.write(tmp_path / "a.json", "new")
    assert calls == ["fsync .a.json.tmp", "rename to a.json", f"fsync {tmp_path.name}"]


def test_a_write_that_fails_names_the_file_and_leaves_the_old_one_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    files.write(file, "old")
    (tmp_path / ".a.json.tmp").mkdir()
    with pytest.raises(ValueError, match=r"a\.json: cannot be written: Is a directory"):
        files.write(file, "new")
    assert file.read_text() == "old"


def test_nothing_is_left_of_a_write_that_fails_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    files.write(tmp_path / "a.json", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"a\.json: cannot be written: No space left on device"):
        files.write(tmp_path / "a.json", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.json", "old")]


def test_equal_tensors_give_equal_bytes_and_a_changed_one_is_noticed(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(1)}
    for name, content in (("one", tensors), ("two", dict(reversed(tensors.items())))):
        storage.write_tensors(tmp_path / name, content, {"epoch": 1})
    content = bytearray((tmp_path / "one").read_bytes())
    assert (tmp_path / "two").read_bytes() == content
    read, state = storage.read_tensors(tmp_path / "one")
    assert state == {"epoch": 1} and all(torch.equal(read[name], tensors[name]) for name in tensors)
    content[-2] ^= 1
    (tmp_path / "one").write_bytes(content)
    with pytest.raises(ValueError, match="one: missing or damaged: its SHA-256 does not match"):
        storage.read_tensors(tmp_path / "one")


def test_room_and_place_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=32 * 4 * 100_000))
    run_folder.check_room(tmp_path / "runs" / "a", 100_000)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"found 12\.8 MB free; allowed: 12\.[89] MB or more"):
        run_folder.check_room(tmp_path / "runs", 100_001)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file: is a file"):
        run_folder.check_room(tmp_path / "file" / "runs", 1000)


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({}, r"'a': found none, the network has \(2,\)"),
        ({"a": torch.zeros(3)}, r"'a': found \(3,\), the network has \(2,\)"),
        ({"a": torch.zeros(2), "b": torch.tensor(0)}, r"'b': found \(\), the network has none"),
    ],
)
def test_other_tensors_are_named(tensors: storage.Tensors, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        storage.check_tensors(Path("last.safetensors"), {"a": (2,)}, tensors)


def test_json_in_json_without_end_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"a\.json: cannot be read"):
        files.read_json(tmp_path / "a.json")

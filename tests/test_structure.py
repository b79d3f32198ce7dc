"""The order of the rooms: imports point one way only."""

import ast
from pathlib import Path

import pytest

import resnet_cifar10

PACKAGE = Path(resnet_cifar10.__file__).parent
CORE = ("settings", "infer", "data", "model", "storage", "evaluate", "train")
ORDER = (*CORE, "photo", "explain", "figure", "serve", "machine", "decode", "sources", "download", "export", "study", "cluster",
         "results", "plots", "report", "cli", "__main__", "__init__")  # fmt: skip


def imports(room: str) -> set[str]:
    """The rooms that a room imports, also inside its functions."""
    tree = ast.parse((PACKAGE / f"{room}.py").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {name for node in found for name in ([node.module] if node.module else [alias.name for alias in node.names])}


def test_every_room_has_its_place() -> None:
    assert sorted(ORDER) == sorted(file.stem for file in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_what_stands_before_it(room: str) -> None:
    assert imports(room) <= set(ORDER[: ORDER.index(room)])


@pytest.mark.parametrize("room", CORE)
def test_the_core_needs_no_other_room(room: str) -> None:
    assert imports(room) <= set(CORE)


def test_inference_needs_no_pytorch() -> None:
    for room in ("infer", "photo", "explain", "figure", "serve"):
        assert "import torch" not in (PACKAGE / f"{room}.py").read_text()

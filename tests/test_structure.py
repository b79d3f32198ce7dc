"""The order of the modules: imports point one way only, and the core, which comes first, needs no other module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_cifar10

PACKAGE = Path(resnet_cifar10.__file__).parent
CORE = ("errors", "files", "settings", "infer", "photo_like", "data", "norms", "model", "storage", "evaluate", "muon", "train")
ORDER = (
    *CORE,
    "progress",
    "photo",
    "explain",
    "figure",
    "serve",
    "machine",
    "decode",
    "download",
    "sources",
    "export",
    "finish",
    "run_folder",
    "processes",
    "tensorflow_twin",
    "signals",
    "study",
    "cluster",
    "results",
    "findings",
    "plots",
    "report",
    "cli",
    "__main__",
    "__init__",
)


def imports(module: str) -> set[str]:
    """The modules that a module imports, also inside its functions."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {name for node in found for name in ([node.module] if node.module else [alias.name for alias in node.names])}


def test_every_module_has_its_place() -> None:
    assert sorted(ORDER) == sorted(file.stem for file in PACKAGE.glob("*.py"))


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_what_stands_before_it(module: str) -> None:
    assert imports(module) <= set(ORDER[: ORDER.index(module)])


def test_the_core_does_not_know_tensorflow() -> None:
    """Without the extra nothing imports it: one module does, and that one is imported in one function alone."""
    for module in set(ORDER) - {"tensorflow_twin"}:
        tree = ast.parse((PACKAGE / f"{module}.py").read_text())
        foreign = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in foreign for alias in node.names} | {getattr(node, "module", None) for node in foreign}
        assert not names & {"tensorflow", "keras"}
        assert ("tensorflow_twin" in names) == (module == "study")
        assert module not in CORE or "tensorflow" not in ast.dump(tree).lower()
    loaded = "import sys, resnet_cifar10.cli, resnet_cifar10.study; print({'tensorflow', 'keras'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "set()\n"

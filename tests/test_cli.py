"""The commands around training: evaluate, export, the built-in model, help and wrong use."""

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run
from PIL import Image

from resnet_cifar10.finish import write_card
from resnet_cifar10.infer import BUILT_IN
from resnet_cifar10.storage import load_model

SHARED = Path(__file__).parents[2] / "shared"
needs_cifar10 = pytest.mark.skipif(not (SHARED / "data/cifar10").is_dir(), reason="needs ../shared/data/cifar10")


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    (folder / "table.toml").write_text(
        '[[setting]]\nname = "D"\nmodel = "resnet8"\nwidth = 8\nepochs = 1\nvalidation_size = 100\ncompile = false\n'
    )
    run("train", folder / "table.toml", "--data", "digits", "--out", folder / "runs", "--seed", "4")
    return folder / "runs" / "d" / "seed-4"


def test_evaluate_gives_the_accuracy_of_the_run(digits_run: Path) -> None:
    result = json.loads((digits_run / "result.json").read_text())
    for model in (digits_run, digits_run / "model"):
        metrics = json.loads(run("evaluate", model, "--data", "digits", "--json").out)
        assert (metrics["accuracy"], metrics["n"], metrics["framework"]) == (result["test"]["accuracy"], 359, "pytorch")
        assert metrics["confusion"] == result["test"]["confusion"]
    low, high = metrics["interval_95"]
    said = run("evaluate", digits_run, "--data", "digits").out
    assert f"{metrics['accuracy']:.2f} %" in said and f"{low:.2f} to {high:.2f}" in said


@pytest.mark.parametrize(
    ("options", "runs"),
    [
        (["--setting", "setting-3", "--seeds", "2"], [("Setting #3", 200, [0, 1])]),
        (
            ["--setting", "Setting #1", "--setting", "Setting #3", "--seed", "4", "--epochs", "9"],
            [("Setting #1", 9, [4]), ("Setting #3", 9, [4])],
        ),
    ],
)
def test_what_is_trained_can_be_chosen(
    monkeypatch: pytest.MonkeyPatch, options: list[str], runs: list[tuple[Any, ...]]
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr("resnet_cifar10.study.study", lambda rows, *_: asked.extend((r.name, r.epochs, r.seeds) for r in rows))
    run("train", ROOT / "settings/assignment.toml", "--data", "digits", "--out", "runs", *options)
    assert asked == runs


def test_report_takes_words_a_baseline_and_a_zip(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "words.md").write_text("Three words here.")
    options = ["--words", tmp_path / "words.md", "--baseline", "D", "--goal", "100", "--zip", tmp_path / "1234_Name.zip"]
    done = run("report", digits_run.parents[1], "--out", tmp_path / "out", *options)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Three words here." in text
    assert "--baseline D" in text
    assert "At least 100 % were asked for: reached by no setting." in text
    assert "(n = 1)" in text
    with zipfile.ZipFile(tmp_path / "1234_Name.zip") as archive:
        assert archive.read("1234_Name/report/report.md").decode() == text
    assert f"packed: {tmp_path / '1234_Name.zip'}" in done.out


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        ("train settings/digits.toml --data digits --out OUT --ray", "ray", "ray"),
        ("train settings/digits.toml --data digits --out OUT --framework tensorflow", "keras", "tensorflow"),
        ("evaluate resnet32 --data digits", "safetensors", "train"),
        ("evaluate resnet32 --data digits --framework tensorflow", "tensorflow", "tensorflow"),
        ("report runs --out OUT", "jinja2", "report"),
        ("export resnet32 --out OUT/a.onnx", "onnxscript", "train"),
        ("serve", "uvicorn", "serve"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    done = run(*command.replace("OUT", str(tmp_path / "out")).split(), status=2)
    assert f"needs {package}: pip install 'resnet-cifar10[{extra}]'" in done.err
    assert not (tmp_path / "out").exists()


def test_a_model_card_shows_names_as_they_are(digits_run: Path, tmp_path: Path) -> None:
    config = json.loads((digits_run / "model" / "config.json").read_text())
    config |= {"classes": ["<b>bold", "$x$"], "setting": config["setting"] | {"name": "One *epoch* | [a](b)"}}
    write_card(tmp_path, config)
    card = (tmp_path / "README.md").read_text()
    assert "classes: \\<b\\>bold, \\$x\\$." in card and "| name | One \\*epoch\\* \\| \\[a\\](b) |" in card


def test_the_page_on_files_names_all_that_a_run_leaves(digits_run: Path) -> None:
    page = (ROOT / "docs/files.md").read_text()
    missing = [f.name for f in digits_run.rglob("*") if not f.name.startswith(".") and f"`{f.name}`" not in page]
    assert not missing


def test_the_lines_of_a_new_model_card_run(digits_run: Path, tmp_path: Path) -> None:
    lines = (digits_run / "model" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    for name in ("model.onnx", "config.json"):
        (tmp_path / name).write_bytes((digits_run / "model" / name).read_bytes())
    Image.new("RGB", (60, 40)).save(tmp_path / "photo.jpg")
    probabilities, answer = subprocess.check_output([sys.executable, "-c", lines], cwd=tmp_path, text=True).splitlines()
    assert list(ast.literal_eval(probabilities)) == [str(digit) for digit in range(10)]
    assert answer in {*"0123456789", "none of these"}


@pytest.mark.parametrize(
    "wrong",
    [
        ("evaluate", "resnet32", "--data", "x" * 300),
        ("export", "x" * 300, "--out", "here.onnx"),
        ("report", "x" * 300, "--out", "here"),
        ("report", ".", "--out", "x" * 300),
    ],
)
def test_a_path_that_no_disk_takes_is_wrong_input(
    wrong: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "too long" in run(*wrong, status=2).err
    assert not [*tmp_path.iterdir()]


def test_a_model_needs_neither_its_graph_nor_its_card_to_be_evaluated(digits_run: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((digits_run / "model" / name).read_bytes())
    assert json.loads(run("evaluate", tmp_path, "--data", "digits", "--json").out)["n"] == 359
    run("export", tmp_path, "--out", tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == (digits_run / "model" / "model.onnx").read_bytes()


def test_a_model_and_data_of_other_classes_do_not_go_together(digits_run: Path, class_folders: Path) -> None:
    refused = run("evaluate", digits_run, "--data", class_folders, status=2).err
    assert "red" in refused
    assert "9" in refused


def test_a_model_of_another_shape_is_refused_with_the_tensor(digits_run: Path, tmp_path: Path) -> None:
    config = json.loads((digits_run / "model" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((digits_run / "model" / "model.safetensors").read_bytes())
    for key, value, said in (
        ("depth", 14, r"tensor 'blocks\."),
        ("depth", "8", "key 'architecture': unsupported operand"),
        ("blok", "pre", "key 'architecture': .* unexpected keyword argument 'blok'"),
        ("width", -1, "key 'architecture'"),
    ):
        changed = config | {"architecture": config["architecture"] | {key: value}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=said):
            load_model(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["train", "settings/assignment.toml"], "--data"),
        (["fly"], "fly"),
        (["infer"], "photo"),
        (["train", "settings/digits.toml", "--data", "nowhere", "--out", "runs"], "nowhere"),
        (["train", "settings/digits.toml", "--data", "digits", "--out", "README.md/x"], "is a file"),
        (["train", "settings/digits.toml", "--data", "digits", "--out", "runs", "--device", "abacus"], "abacus"),
        (["train", "settings/digits.toml", "--data", "digits", "--out", "runs", "--epochs", "many"], "; found 'many'"),
        (["train", "settings/digits.toml", "--data", "digits", "--out", "runs", "--epochs", "0"], "'--epochs': Input"),
        (["train", "settings/digits.toml", "--data", "digits", "--out", "runs", "--cpus", "2"], "--cpus"),
        (["evaluate", "resnet999", "--data", "digits"], "resnet999"),
        (["serve", "--port", "70000"], "'--port': Input should be less than or equal to 65535; found '70000'"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], part: str) -> None:
    assert part in run(*arguments, status=2).err


def test_help_names_every_command() -> None:
    text = run().out
    for command in ("train", "evaluate", "infer", "report", "export", "serve", "data"):
        assert re.search(rf"(?m)^\s+{command}\s{{2,}}\S", text), command


@needs_cifar10
def test_the_built_in_model_has_the_accuracy_that_its_card_says_and_at_least_89_percent() -> None:
    metrics = json.loads(run("evaluate", "resnet32", "--data", SHARED / "data/cifar10", "--json").out)
    assert f"| test | {metrics['accuracy']:.2f} % |" in (BUILT_IN / "resnet32" / "README.md").read_text()
    assert metrics["accuracy"] >= 89.0
    assert metrics["n"] == 10_000
    assert metrics["data"] == "CIFAR-10 (JPEG quality 75 copy)"


def test_the_built_in_model_knows_a_cat_and_what_is_none_of_these() -> None:
    data = pytest.importorskip("skimage").data_dir
    files = [f"{data}/{name}" for name in ("chelsea.png", "coffee.png", "rocket.jpg")]
    cat, coffee, rocket = json.loads(run("infer", *files, "--json").out)
    assert (cat["label"], cat["rejected"]) == ("cat", False)
    assert coffee["rejected"] and rocket["rejected"]

"""The report: what a reader finds in it, and what it refuses to read or to claim."""

from __future__ import annotations

import base64
import html.parser
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
from conftest import CLASSES, encoded, one_line
from matplotlib.figure import Figure
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from resnet_cifar10 import plots, settings
from resnet_cifar10.evaluate import wilson_interval
from resnet_cifar10.files import write_json
from resnet_cifar10.findings import WORDS, cells
from resnet_cifar10.plots import INK, draw, label_ends, plot_differences
from resnet_cifar10.report import pack, report
from resnet_cifar10.results import Comparison, Row, read_rows, signed, welch
from resnet_cifar10.run_folder import METRICS, read_metrics, write_metrics
from resnet_cifar10.settings import Setting, slug

SOURCE = "CIFAR-10"


def split_metrics(percent: float, n: int) -> dict[str, Any]:
    """Metrics of n images, a tenth of each class; equally many of each are wrong, and all wrong cats are taken for dogs."""
    wrong = round(n * (100 - percent) / 1000)
    right, near, far = (np.diag([count] * 10) for count in (n // 10 - wrong, 2, wrong - 2))
    counts = right + np.roll(near, 1, axis=1) + np.roll(far, 2, axis=1)
    counts[3, 4], counts[3, 5] = 0, wrong
    recall = 100 * (1 - wrong * 10 / n)
    return {
        "accuracy": percent,
        "n": n,
        "interval_95": wilson_interval(percent, n),
        "top2_accuracy": 99.0,
        "negative_log_likelihood": 0.3,
        "calibration_error": 4.2,
        "temperature": 1.5,
        "negative_log_likelihood_scaled": 0.25,
        "calibration_error_scaled": 0.7,
        "data_sha256": "a",
        "confusion": counts.tolist(),
        "per_class": {name: {"precision": 90.0, "recall": recall, "n": n // 10} for name in CLASSES},
    }


def write_run(
    out: Path,
    setting: Setting,
    seed: int,
    test: float | None,
    validation: float = 90.0,
    epochs: int = 6,
    source: str = SOURCE,
    framework: str = "pytorch",
) -> Path:
    """Write the folder of a run that was best in epoch 5; without a test accuracy it is unfinished."""
    folder = out / slug(setting.name) / f"seed-{seed}"
    folder.mkdir(parents=True)
    accuracies = [50.0, 70.0, 80.0, 85.0, validation, validation - 2]
    rows = [(i + 1, 0.5, 95.0, 0.5, accuracies[i], setting.lr, 60.0, 30.0) for i in range(epochs)]
    row = setting.model_dump(exclude={"seeds"})
    write_json(folder / "setting.json", {"setting": row, "seed": seed, "framework": framework})
    write_metrics(folder, [dict(zip(METRICS, row, strict=True)) for row in rows])
    write_json(
        folder / "environment.json",
        {
            "data": source,
            "training_images": 45_000,
            "validation_images": 5_000,
            "processor": "Some CPU",
            "threads": 2,
            "torch": "2.13.0",
        },
    )
    if test is not None:
        write_json(
            folder / "result.json",
            {
                "parameters": 464_154,
                "best_epoch": 5,
                "epochs_run": 6,
                "stopped_early": False,
                "train_minutes": 9.0,
                "validation": split_metrics(validation, 5000),
                "test": split_metrics(test, 10_000),
            },
        )
    return folder


ONE = Setting(name="Setting #1", epochs=6, lr_decay="none", patience=3)
TWO = Setting(name="Setting #2", epochs=6, lr_decay="step")
THREE = Setting(name="Setting #3", epochs=6, lr_decay="step", model="resnet20")


def write_tiny_model(folder: Path) -> None:
    """Write a model folder whose network tells red, green and blue by the mean colour."""
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["float", "axes"], ["mean"], keepdims=0),
            helper.make_node("Mul", ["mean", "scale"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["probabilities"]),
            helper.make_node("ReduceMax", ["probabilities", "last"], ["membership"], keepdims=0),
            helper.make_node("Reshape", ["logits", "shape"], ["activation_map"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 32, 32, 3])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["N", 3]),
            helper.make_tensor_value_info("membership", TensorProto.FLOAT, ["N"]),
            helper.make_tensor_value_info("activation_map", TensorProto.FLOAT, ["N", 3, 1, 1]),
        ],
        [
            numpy_helper.from_array(np.array([1]), "last"),
            numpy_helper.from_array(np.array([1, 2]), "axes"),
            numpy_helper.from_array(np.array([0, 3, 1, 1]), "shape"),
            numpy_helper.from_array(np.array(0.02, np.float32), "scale"),
        ],
    )
    folder.mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx")
    colours = {"classes": ["red", "green", "blue"], "mean": [0.5] * 3, "std": [0.5] * 3, "data": "colours"}
    write_json(folder / "config.json", colours | {"architecture": {}, "temperature": 1.0, "rejection_threshold": 0.5})


def write_study(out: Path) -> Path:
    """Write three settings: three seeds, three seeds of the best, and one seed with another one unfinished."""
    for seed, (one, two) in enumerate([(89.6, 92.1), (90.2, 92.5), (90.8, 92.6)]):
        write_run(out, ONE, seed, one, validation=91)
        write_run(out, TWO, seed, two, validation=93)
    write_run(out, THREE, 0, 93.5, validation=92)
    write_run(out, THREE, 1, None, epochs=2)
    return out


@pytest.fixture
def sketched() -> None:
    """Ask for it where plots have to be made, though nobody looks at them."""


@pytest.fixture
def drawn() -> None:
    """Ask for it where the plots themselves matter."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the seconds of drawing plots that nobody looks at; `out` has them."""

    def quick(name: str, alt: str, size: tuple[float, float], paint: Callable[[Any], None]) -> plots.Picture:
        if "sketched" in request.fixturenames:
            paint(Figure(size))
        return plots.Picture(f"plots/{name}.png", alt, b"", "<svg></svg>")

    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(plots, "draw", quick)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path / "study")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of that study with two photos, which several tests read and none changes."""
    root = tmp_path_factory.mktemp("written")
    for name in ("red", "white"):
        Image.new("RGB", (40, 30), name).save(root / f"{name}_photo.png")
    photos = [root / "red_photo.png", root / "white_photo.png"]
    write_tiny_model(write_study(root / "study") / "setting-2" / "seed-0" / "model")
    return report([root / "study"], root / "out", photos).parent


class _Tables(html.parser.HTMLParser):
    """The text of every cell of every table, and all attributes that could load something."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.links: list[str] = []
        self.scopes: list[str | None] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for key, value in attributes if key in ("src", "href", "xlink:href", "srcset", "data")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
            self.inside = True
            self.scopes += [dict(attributes).get("scope")] if tag == "th" else []

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("th", "td")

    def handle_data(self, text: str) -> None:
        if self.inside:
            self.tables[-1][-1][-1] += text.replace("\N{NO-BREAK SPACE}", " ")


def test_the_table_has_the_14_columns_in_the_words_of_the_assignment(out: Path) -> None:
    parsed = _Tables((out / "report.html").read_text())
    head, *rows = parsed.tables[0]
    assert head == [
        "Setting",
        "Model",
        "Batch size",
        "Activation function",
        "Weight initialization",
        "Optimizer",
        "lr",
        "Epoch",
        "Normalization",
        "Weight decay",
        "Data augmentation",
        "lr decay",
        "Training time (m)",
        "Early stopping epoch",
        "Accuracy",
    ]
    assert rows[0] == [
        "Setting #1",
        "ResNet32",
        "128",
        "ReLU",
        "He_normal",
        "SGD (momentum)",
        "0.1",
        "6",
        "Batch Norm",
        "O",
        "O",
        "X",
        "9.0",
        "5",
        "90.20 ± 0.60\n(n = 3)",
    ]
    assert rows[1][0].split() == ["Setting", "#2", "best", "by", "validation"] and rows[1][11] == "O"
    assert None not in parsed.scopes

    text = (out / "report.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == head and lines[2][1:] == [*rows[0][1:-1], "90.20 ± 0.60<br>(n = 3)"]
    assert [len(line) for line in lines[:5]] == [15] * 5


@pytest.mark.usefixtures("sketched")
def test_an_unfinished_run_is_shown_and_not_counted(out: Path, study: Path, tmp_path: Path) -> None:
    page = (out / "report.html").read_text()
    row = _Tables(page).tables[0][3]
    assert row[0] == "Setting #3"
    assert row[-1].split("\n") == ["93.50", "(n = 1)", "seed 1 unfinished: epoch 2 of 6"]
    assert "Runs still unfinished: 1 of 8" in page

    for result in study.glob("*/*/result.json"):
        result.unlink()
    page = report([study], tmp_path / "out").read_text()
    assert "no run is finished" in page and "best by validation" not in page
    assert "No test images" not in page  # nothing is known of them yet
    states = ["seeds 0, 1 and 2 unfinished: epoch 6 of 6"] * 2 + ["seed 0 unfinished: epoch 6 of 6"]
    assert [row[-1].split("\n")[0] for row in _Tables(page).tables[0][1:]] == states


def test_the_only_finished_setting_is_not_called_the_best(tmp_path: Path) -> None:
    write_run(tmp_path / "study", ONE, 0, 90.0)
    write_run(tmp_path / "study", TWO, 0, None)
    page = report([tmp_path / "study"], tmp_path / "out").read_text()
    text = (tmp_path / "out" / "report.md").read_text()
    for written in (page, text):
        assert "In detail: Setting #1" in written and "best by validation" not in written and "The best setting" not in written


def test_a_run_that_is_not_bit_exact_is_told_also_while_it_is_unfinished(out: Path, tmp_path: Path) -> None:
    assert "none; each run equals an uninterrupted one" in (out / "report.md").read_text()
    folder = write_run(tmp_path / "study", ONE, 0, None)
    facts = json.loads((folder / "environment.json").read_text())
    write_json(folder / "environment.json", facts | {"not_bit_exact": "resumed after epoch 3 with a change of threads"})
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "seed 0, resumed after epoch 3 with a change of threads" in text


def test_the_best_is_chosen_by_validation_and_its_numbers_are_told(out: Path) -> None:
    text = (out / "report.md").read_text()
    assert (
        "Setting #2 is the best of 3 settings by validation accuracy (93.00 ± 0.00 % of 5,000 images; ranked by the seeds that "
        "all have). It classifies 92.40 ± 0.26 % of the 10,000 test images of CIFAR-10 correctly "
        "(mean ± standard deviation of 3 seeds; 95 % interval for other test images: 91.9 to 92.9 %)."
    ) in text
    assert "Setting #3 has the highest test accuracy, but the choice is made by validation" in text
    assert "Most often confused: cat taken for dog (79 of 1,000)." in text  # the other pairs are as many among themselves
    assert "| Setting | Calibration error (points) | scaled | Log-loss (nats) | scaled | Temperature |" in text
    assert "| Setting #2 | 4.2 | 0.7 | 0.300 | 0.250 | 1.50 |" in text


def comparisons(text: str) -> dict[tuple[str, str], list[str]]:
    """The table of comparisons in a report: (setting, against) and the other columns."""
    table = text.partition("| Setting | Against |")[2].partition("\n\n")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {(line[0], line[1]): line[2:] for line in lines}


def test_comparisons_name_the_differing_keys_and_what_the_seeds_can_tell(out: Path) -> None:
    text = (out / "report.md").read_text()
    found = welch([89.6, 90.2, 90.8], [92.1, 92.5, 92.6])
    assert found is not None
    p, low, high = found
    assert low < high < 0
    interval = f"−{-low:.2f} to −{-high:.2f}"
    # by hand, as of one seed each: 1.96 * sqrt(93.5 * 6.5 / 10,000 + 92.4 * 7.6 / 10,000) = 0.71
    assert comparisons(text) == {
        ("Setting #1", "Setting #2"): [
            "lr decay none instead of step and patience 3 instead of none",
            "−2.20",
            interval,
            f"{p:.2g}",
            "yes",
        ],
        ("Setting #3", "Setting #2"): [
            "model resnet20 instead of resnet32",
            "+1.10",
            "+0.39 to +1.81",
            "–",
            "one seed of Setting #3",
        ],
    }
    in_page = _Tables((out / "report.html").read_text()).tables[1]
    assert in_page[2] == ["Setting #1", "Setting #2", *comparisons(text)["Setting #1", "Setting #2"]]
    assert "Only one seed of Setting #3: how far another one would end" in text
    assert "Setting #1 95.0 against 91.0 % (+4.0 points)" in text


def test_the_classes_are_told_of_every_setting(out: Path) -> None:
    # 10 x the share of wrong images, for a tenth of the images is of each class
    text = (out / "report.md").read_text()
    assert "| Class, 1,000 test images each |" in text and "| cat | 90.2 | 92.4 | 93.5 | 90.0 |" in text


def test_what_cannot_be_told_of_a_class_does_not_count(tmp_path: Path) -> None:
    for seed, precision in ((0, None), (1, 60.0), (2, 80.0)):
        file = write_run(tmp_path / "study", ONE, seed, 90.0) / "result.json"
        test = json.loads(file.read_text())["test"]
        test["per_class"]["cat"] = {"recall": None, "precision": precision, "n": 0}
        change(file, test=test)
    assert "| cat (0) | – | 70.0 |" in report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()


def test_a_run_that_failed_is_told_with_the_reason(tmp_path: Path) -> None:
    for setting in (ONE, TWO):
        write_json(write_run(tmp_path / "study", setting, 0, None) / "failed.json", {"reason": f"{setting.name}, seed 0: boom"})
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "no run is finished. Runs that failed: 2 of 2; below the table stands why.**" in text
    assert (
        text.count("failed after epoch 6 of 6") == 2 and "- Failed: seed 0: boom\n" in text and "still unfinished" not in text
    )
    write_run(tmp_path / "study", THREE, 0, 90.0)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "Runs that failed: 2 of 3;" in text and "still unfinished" not in text


def test_who_reaches_the_goal_is_said(study: Path, tmp_path: Path) -> None:
    for goal, said in ((92.0, "reached by Setting #2 and Setting #3."), (99.0, "reached by no setting.")):
        text = report([study], tmp_path / "out", goal=goal).with_suffix(".md").read_text()
        assert f"At least {goal:g} % were asked for: {said}" in text and f"--goal {goal:g}\n" in text + "\n"
    for folder in study.glob("*/seed-*"):
        if (folder / "result.json").exists():
            change(folder / "result.json", validation=None)
    text = report([study], tmp_path / "out", goal=92).with_suffix(".md").read_text()
    assert "held out to choose by. At least 92 % were asked for: reached by Setting #2 and Setting #3." in text
    for folder in study.glob("*/seed-*"):
        if (folder / "result.json").exists():
            change(folder / "result.json", test=None)
    text = report([study], tmp_path / "out", goal=92).with_suffix(".md").read_text()
    assert "At least 92 % were asked for: only test images could tell." in text


def test_welch() -> None:
    # by hand: difference -3, standard error sqrt(2.5/5 + 10/5), 5.88 degrees of freedom, whose 97.5 % point is 2.459
    assert welch([1, 2, 3, 4, 5], [2, 4, 6, 8, 10]) == pytest.approx((0.107, -6.888, 0.888), abs=1e-3)
    assert welch([90.0, 90.0], [91.0, 91.0]) is None
    assert welch([90.0], [91.0, 91.2]) is None
    assert welch([90.0, 90.0], [91.0, 91.2]) == pytest.approx((0.0577, -2.371, 0.171), abs=1e-3)  # 11 errors of 0.1, 1 freedom


def test_differences_are_shown_with_their_intervals_and_the_words_of_interpretation(tmp_path: Path) -> None:
    change = ONE.model_copy(update={"name": "Wide steps", "lr": 0.5})
    for setting, values in ((ONE, (90.0, 90.2, 90.4)), (change, (88.0, 88.3, 88.2))):
        for seed, value in enumerate(values):
            write_run(tmp_path / "study", setting, seed, value)
    (tmp_path / "words.md").write_text("# Steps & their <size>\n\nLarge steps *overshoot*. <script>alert(1)</script>")
    page = report([tmp_path / "study"], tmp_path / "out", words=tmp_path / "words.md").read_text()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "in points: Wide steps −2.03 (−2.4" in page and "plots/differences.png" in text
    assert "<em>overshoot</em>" in page and "<script>alert" not in page
    assert "*overshoot*" in text and "--words" in text
    assert "<h1>Steps &amp; their &lt;size&gt;</h1>" in page and text.startswith("# Steps \\& their \\<size\\>\n")
    assert "Welch's t test" in text and "With one seed on a side" not in text
    (tmp_path / "words.md").write_text("\ufeff\n# A title alone")  # as Windows may write it
    assert "<h1>A title alone</h1>" in report([tmp_path / "study"], tmp_path / "out", words=tmp_path / "words.md").read_text()


def test_a_row_is_compared_with_the_baseline_and_with_every_row_that_it_repeats_with_one_more_change(tmp_path: Path) -> None:
    changed = {
        "Base": {},
        "Slow": {"lr": 0.01},
        "Bare": {"normalization": "none"},
        "Adam": {"optimizer": "adam"},
        "Slow and bare": {"lr": 0.01, "normalization": "none"},
    }
    for name, changes in changed.items():
        validation = 91.0 if name == "Base" else 90.0
        write_run(tmp_path / "study", ONE.model_copy(update={"name": name, **changes}), 0, 90.0, validation)
    report([tmp_path / "study"], tmp_path / "out")
    found = [" against ".join(pair) for pair in comparisons((tmp_path / "out" / "report.md").read_text())]
    assert sorted(found) == [
        "Adam against Base",
        "Bare against Base",
        "Slow against Base",
        "Slow and bare against Bare",
        "Slow and bare against Base",
        "Slow and bare against Slow",
    ]
    write_run(tmp_path / "study", ONE.model_copy(update={"name": "Slow", "lr": 0.01}), 1, 90.0, 90.0, framework="tensorflow")
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    twins = comparisons(text)["Slow (TensorFlow)", "Slow (PyTorch)"]
    assert (twins[0], twins[-1]) == ("framework TensorFlow instead of PyTorch", "one seed of each") and "Welch" not in text


def test_the_note_of_the_enlarged_plot_is_about_what_it_shows(tmp_path: Path) -> None:
    write_run(tmp_path / "study", ONE, 0, 90.0)
    long = write_run(tmp_path / "study", TWO.model_copy(update={"epochs": 40}), 0, 60.0)
    for accuracy, shown in ((60.0, False), (85.0, True)):
        rows = [read_metrics(long)[0] | {"epoch": 1 + i, "validation_accuracy": accuracy} for i in range(40)]
        write_metrics(long, rows)
        text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
        assert ("running means" in text) == shown


def test_many_settings_of_one_seed_are_counted(tmp_path: Path) -> None:
    for n in range(8):
        write_run(tmp_path / "study", ONE.model_copy(update={"name": f"Row {n}", "lr": (n + 1) / 10}), 0, 90.0, 90.0 - n)
    write_run(tmp_path / "study", ONE.model_copy(update={"name": "Row 0", "lr": 0.1}), 1, 91.0)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "Only one seed of 7 settings: how far another one would end" in text


def test_of_few_settings_the_best_is_compared_with_each(tmp_path: Path) -> None:
    best = TWO.model_copy(update={"name": "Best", "optimizer": "adam", "lr": 0.01, "epochs": 3})
    short = best.model_copy(update={"name": "Short", "model": "resnet20"})
    for setting, value in ((TWO, 90.0), (THREE, 89.0), (short, 88.0), (best, 92.0)):
        write_run(tmp_path / "study", setting, 0, value, validation=value)
    text = report([tmp_path / "study"], tmp_path / "out", baseline_name="Setting #2").with_suffix(".md").read_text()
    assert len(re.findall(r"^\| (Best|Short|Setting #3) \| (Best|Short|Setting #[23]) \|", text, re.MULTILINE)) == 5
    assert list(comparisons(text)) == [
        ("Best", "Setting #2"),
        ("Setting #3", "Setting #2"),
        ("Short", "Setting #2"),
        ("Best", "Short"),
        ("Best", "Setting #3"),
    ]
    three = "optimizer adam instead of sgd, lr 0.01 instead of 0.1 and epochs 3 instead of 6"
    assert comparisons(text)["Best", "Setting #2"][0] == three
    assert comparisons(text)["Short", "Setting #2"][0] == "model, optimizer, lr and epochs"


def test_of_two_settings_the_usual_one_is_the_baseline(tmp_path: Path) -> None:
    for row in (ONE.model_copy(update={"name": "Adam", "optimizer": "adam"}), ONE.model_copy(update={"name": "Reference"})):
        write_run(tmp_path / "study", row, 0, 90.0)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert [*comparisons(text)] == [("Adam", "Reference")]


def test_the_baseline_can_be_named(tmp_path: Path) -> None:
    write_study(tmp_path / "study")
    text = report([tmp_path / "study"], tmp_path / "out", baseline_name="Setting #3").with_suffix(".md").read_text()
    assert list(comparisons(text)) == [("Setting #2", "Setting #3"), ("Setting #1", "Setting #3"), ("Setting #2", "Setting #1")]
    assert "--baseline 'Setting #3'" in text
    with pytest.raises(ValueError, match="--baseline: found 'Setting #4'; allowed: 'Setting #1', 'Setting #2', 'Setting #3'"):
        report([tmp_path / "study"], tmp_path / "out", baseline_name="Setting #4")


@pytest.mark.usefixtures("sketched")
def test_where_signals_differ_between_the_networks_they_are_drawn(tmp_path: Path) -> None:
    plain = TWO.model_copy(update={"name": "Plain", "shortcut": "none"})
    for setting, factor in ((ONE, 1.0), (TWO, 1.0), (plain, 10.0)):
        sizes = {"activation": [1.0, 2.0, 2.0 * factor], "gradient": [3.0 * factor, 2.0, 2.0]}
        write_json(write_run(tmp_path / "study", setting, 0, 90.0) / "signals.json", sizes)
    page = report([tmp_path / "study"], tmp_path / "out").read_text()
    text = (tmp_path / "out" / "report.md").read_text()
    for written in (page, text):
        assert "in the last block: 2 (Setting #2 + 1 more) and 20 (Plain)" in written
        assert "in the first block: 1.5 (Setting #2 + 1 more) and 15 (Plain)" in written
        assert "Setting #2 also stands for Setting #1: nowhere apart" in written
    assert (tmp_path / "out" / "plots" / "signals-backward.png").exists()
    shutil.rmtree(tmp_path / "study" / "plain")
    deep = ONE.model_copy(update={"name": "Deep", "model": "resnet56"})  # depth alone explains nothing
    write_json(write_run(tmp_path / "study", deep, 0, 90.0) / "signals.json", {"activation": [1.0], "gradient": [1.0]})
    assert "How signals pass" not in report([tmp_path / "study"], tmp_path / "out").read_text()


@pytest.mark.usefixtures("sketched")
def test_many_settings_have_a_panel_each_instead_of_lines_that_nobody_can_tell_apart(tmp_path: Path) -> None:
    for number in range(7):
        write_run(tmp_path / "study", TWO.model_copy(update={"name": f"lr 0.{number}", "lr": 0.1 + number}), 0, 90.0)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "lr 0.5 90.0 % and lr 0.6 90.0 %](plots/all-settings.png)" in text and "Each setting in a panel of its own" in text
    assert not list((tmp_path / "out" / "plots").glob("*-lr-*.png")) and "### " not in text


def test_names_stand_where_their_lines_end() -> None:
    places: list[float] = []

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 50])
        axes.plot([0, 1], [0, 100])
        label_ends(axes, [(1, 50.0, "low", (INK, "-")), (1, 100.0, "high", (INK, "-"))])
        places.extend(text.xy[1] for text in axes.texts)

    draw("ends", "", (4, 3), paint)
    assert places == pytest.approx([0.5, 0.95], abs=0.03)


def test_the_most_confident_mistakes_are_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "study", ONE, 0, 90.0)
    png = base64.b64encode(encoded(np.full((32, 32, 3), 200, np.uint8), "PNG")).decode()
    result = json.loads((folder / "result.json").read_text())
    result["test"]["mistakes"] = [{"index": 7, "label": "cat", "predicted": "dog", "probability": 0.987, "png": png}]
    write_json(folder / "result.json", result)
    report([tmp_path / "study"], tmp_path / "out")
    assert "![The most confident mistakes: cat taken for dog]" in (tmp_path / "out" / "report.md").read_text()
    with Image.open(tmp_path / "out" / "plots" / "mistakes.png") as sheet:
        assert sheet.getpixel((40, 40)) == (200, 200, 200)
        assert sheet.convert("L").crop((0, 97, 120, sheet.height)).getextrema()[0] < 100  # its classes are written below


def test_the_page_is_one_file_and_the_markdown_finds_its_plots(out: Path) -> None:
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    links = _Tables(page).links
    assert len(links) > 2 and all(link.startswith(("data:", "#")) for link in links)
    assert "http" not in page and "<script" not in page and set(re.findall(r"url\((.)", page)) <= {"#"}
    assert page.count("<svg") == 7
    linked = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert sorted(linked) == sorted(str(file.relative_to(out)) for file in (out / "plots").iterdir()) and len(linked) == 8
    assert str(out.parent) not in page + text  # folders of this machine mean nothing elsewhere


def test_photos_are_classified_by_the_best_run(out: Path, study: Path, tmp_path: Path) -> None:
    text = (out / "report.md").read_text()
    assert "red_photo.png: red, 99 %; white_photo.png: none of these 3 (most like: " in text
    with Image.open(out / "plots/photos.png") as figure:
        assert figure.getpixel((110, 110)) == (255, 0, 0) != figure.getpixel((300, 110))  # beside it where the network looked
    with pytest.raises(ValueError) as error:
        report([study / "setting-3" / "seed-1"], tmp_path / "out", [out.parent / "red_photo.png"])
    assert "--photo-model" in one_line(error) and not (tmp_path / "out").exists()


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    setting = Setting(name="<script>alert(1)</script> | $x_1$ *a*", epochs=6)
    write_run(tmp_path / "study", setting, 0, 91.0, source="<b>data</b>")
    page = report([tmp_path / "study"], tmp_path / "out")
    assert "<script" not in page.read_text() and "<b>data" not in page.read_text()
    assert _Tables(page.read_text()).tables[0][1][0] == setting.name
    text = page.with_suffix(".md").read_text()
    assert not re.search(r"(?<!\\)<script|(?<!\\)<b>", text)
    assert [len(re.split(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")][:3] == [17] * 3


def test_a_jpeg_copy_is_told_and_original_pixels_are_not_warned_of(out: Path, tmp_path: Path) -> None:
    assert "Not the original pixels" not in (out / "report.html").read_text()
    write_run(tmp_path / "copy", ONE, 0, 89.0, source="CIFAR-10 (JPEG quality 75 copy)")
    page = report([tmp_path / "copy"], tmp_path / "out")
    assert all("detail that the copy has lost" in file.read_text() for file in (page, page.with_suffix(".md")))
    write_run(tmp_path / "own", ONE, 0, 89.0, source="pets (JPEG copy)")
    assert "CIFAR-10" not in report([tmp_path / "own"], tmp_path / "pets").read_text()
    assert "one seed; 95 % interval for other test images: 88.4 to 89.6 %" in page.with_suffix(".md").read_text()
    assert (
        "The number beside a name" in (out / "report.html").read_text() and "The number beside a name" not in page.read_text()
    )


@pytest.mark.usefixtures("drawn")
def test_equal_runs_give_equal_bytes(out: Path, tmp_path: Path) -> None:
    photos = [out.parent / "red_photo.png", out.parent / "white_photo.png"]
    again = report([out.parent / "study"], tmp_path / "out", photos).parent
    files = {file.relative_to(out) for file in out.rglob("*")}
    assert files == {file.relative_to(again) for file in again.rglob("*")}
    for file in files:
        assert (out / file).is_dir() or (out / file).read_bytes() == (again / file).read_bytes(), file


def test_the_archive_holds_sources_and_report_and_nothing_else(out: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    for name in (
        "pyproject.toml",
        "README.md",
        "resnet_cifar10/train.py",
        "resnet_cifar10/__pycache__/train.pyc",
        "settings/fast.toml",
        "tests/test_train.py",
        "torture/__main__.py",
        "benchmarks/bench.py",
        "docs/report.png",
        "resnet_cifar10/models/resnet32/model.safetensors",
        "reports/fast/report.md",
        "reports/fast/models/one/model.safetensors",
        "reports/demo/report.md",
        ".ci/run",
        "runs/fast/result.json",
        "data/test.parquet",
        ".venv/bin/python",
        ".git/config",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / ".ci/run").chmod(0o700)
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out/plots/photo-3.jpg").write_text("of an earlier report")
    pack(tmp_path / "1234_Name.zip", tmp_path / "out", root)
    with zipfile.ZipFile(tmp_path / "1234_Name.zip") as archive:
        names = {name.removeprefix("1234_Name/") for name in archive.namelist()}
        assert archive.read("1234_Name/report/report.html") == (out / "report.html").read_bytes()
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}  # equal files, equal bytes
        modes = {member.filename.removeprefix("1234_Name/"): member.external_attr >> 16 for member in archive.infolist()}
        assert modes == dict.fromkeys(names, 0o644) | {".ci/run": 0o755}
    plots = {f"report/plots/{file.name}" for file in (out / "plots").iterdir()}
    assert names == plots | {
        "pyproject.toml",
        "README.md",
        "resnet_cifar10/train.py",
        "settings/fast.toml",
        "tests/test_train.py",
        "torture/__main__.py",
        "benchmarks/bench.py",
        "docs/report.png",
        "resnet_cifar10/models/resnet32/model.safetensors",
        "reports/fast/report.md",
        ".ci/run",
        "report/report.html",
        "report/report.md",
    }


@pytest.mark.parametrize(
    ("out_zip", "folder", "root", "said"),
    [
        ("a.zip", "nothing", "checkout", "report.html: missing"),
        ("a.zip", "out", "nothing", "pyproject.toml: missing"),
    ],
)
def test_packing_refuses(tmp_path: Path, out_zip: str, folder: str, root: str, said: str) -> None:
    for file in ("out/report.html", "checkout/pyproject.toml"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    with pytest.raises(ValueError, match=said):
        pack(tmp_path / out_zip, tmp_path / folder, tmp_path / root)
    assert not (tmp_path / out_zip).exists()


def test_every_word_of_a_setting_has_its_words_in_the_report() -> None:
    for key in ("activation", "weight_init", "normalization", "optimizer"):
        assert set(get_args(settings.Setting.model_fields[key].annotation)) - {"sgd"} <= WORDS.keys()


RUN = Path("setting-1") / "seed-0"


def without(file: Path, key: str) -> None:
    write_json(file, {k: value for k, value in json.loads(file.read_text()).items() if k != key})


def change(file: Path, **values: Any) -> None:
    write_json(file, json.loads(file.read_text()) | values)


def edit(file: Path, old: str, new: str, count: int = -1) -> None:
    file.write_text(file.read_text().replace(old, new, count))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "holds no run"),
        (lambda study: (study / RUN / "result.json").write_text('{"best_epoch": 5'), "result.json: cannot be read"),
        (
            lambda study: (study / RUN / "signals.json").write_text('{"activation": [1], "gradient": []}'),
            "signals.json: damaged",
        ),
        (
            lambda study: (study / RUN / "signals.json").write_text('{"activation": {}, "gradient": []}'),
            "signals.json: damaged",
        ),
        (lambda study: (study / RUN / "setting.json").write_text("[]"), "setting.json: damaged"),
        (lambda study: change(study / RUN / "setting.json", seed="1"), "setting.json: damaged: key 'seed'"),
        (lambda study: (study / RUN / "metrics.csv").write_text("epoch\n1\n"), "metrics.csv: not the metrics"),
        (lambda study: (study / RUN / "metrics.csv").unlink(), "metrics.csv"),
        (lambda study: without(study / RUN / "result.json", "best_epoch"), "result.json: damaged: key 'best_epoch'"),
        (
            lambda study: change(study / RUN / "result.json", best_epoch="5"),
            "result.json: damaged: key 'best_epoch': found '5'",
        ),
        (lambda study: change(study / RUN / "result.json", test={"accuracy": 90}), "result.json: damaged: key 'test.n'"),
        (
            lambda study: edit(study / RUN / "result.json", '"n": 5000', '"n": "5000"'),
            "result.json: damaged: key 'validation.n': found '5000'",
        ),
        (
            lambda study: edit(study / RUN / "result.json", '"recall"', '"recalled"', 1),
            "result.json: damaged: key 'validation.per_class.airplane.recall' is missing",
        ),
        (
            lambda study: edit(study / RUN / "result.json", '"confusion": [', '"confusion": [[1],', 1),
            "result.json: damaged: key 'confusion': not as many rows and columns as classes",
        ),
        (
            lambda study: edit(study / RUN / "result.json", '"confusion"', '"mistakes": [1], "confusion"', 1),
            "result.json: damaged: key 'validation.mistakes.0'",
        ),
        (lambda study: without(study / RUN / "environment.json", "data"), "environment.json: damaged: key 'data'"),
        (lambda study: shutil.copytree(study / RUN, study / "copy"), "the same setting and seed"),
        (
            lambda study: write_run(study, Setting(name="Digits"), 0, 99.0, source="digits"),
            "different data (data set: digits; CIFAR",
        ),
        (
            lambda study: edit(study / RUN / "result.json", '"n": 10000', '"n": 9000'),
            "different data (number of test images: 9000; 10000)",
        ),
        (lambda study: edit(study / RUN / "result.json", '256": "a"', '256": "b"'), "different data (test images: b; a)"),
        (
            lambda study: [
                change(study / f"setting-{n}" / "seed-0" / "environment.json", training_sha256=str(n)) for n in (1, 2)
            ],
            "different data (training images, seed 0, 5000 held out: 1; 2)",
        ),
        (
            lambda study: edit(study / RUN / "result.json", '"cat"', '"lynx"'),
            "different data (validation classes: ['airplane', ",
        ),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_is_written(
    study: Path, tmp_path: Path, damage: Callable[[Path], Any], said: str
) -> None:
    damage(study)
    with pytest.raises(ValueError) as error:
        report([study], tmp_path / "out")
    assert said in one_line(error)
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(study: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="out: is a file"):
        report([study], tmp_path / "out")


@pytest.mark.usefixtures("sketched")
def test_a_study_without_validation_or_test_images_is_reported(tmp_path: Path) -> None:
    for setting in (ONE, TWO):
        folder = write_run(tmp_path / "study", setting, 0, 90.0)
        result = json.loads((folder / "result.json").read_text())
        write_json(folder / "result.json", result | {"validation": None, "test": None})
        unmeasured = {"validation_loss": None, "validation_accuracy": None}
        write_metrics(folder, [row | unmeasured for row in read_metrics(folder)])
    page = report([tmp_path / "study"], tmp_path / "out").read_text()
    assert "no validation images were held out" in page and "no test images" in page
    assert "There is nothing to compare yet" in page
    write_tiny_model(folder / "model")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    report([folder], tmp_path / "one", [tmp_path / "red.png"])
    text = (tmp_path / "one" / "report.md").read_text()
    assert "There is nothing to compare yet" in text and "plots/1-setting-2.png" in text
    assert "the last one: no images were held out" in text and "red.png: red, " in text


def test_equal_results_are_no_difference(tmp_path: Path) -> None:
    for setting, validation in ((ONE, 90.0), (TWO, 91.0)):
        write_run(tmp_path / "study", setting, 0, 90.0, validation=validation)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    (found,) = comparisons(text).values()
    assert "highest test accuracy" not in text and signed(-1e-9) == "+0.00"
    assert "best by validation" in text and "The best setting: Setting #2" in text
    assert found[1:3] == ["+0.00", "−0.83 to +0.83"]  # about 1.96 * sqrt(2 * 90 * 10 / 10,000) = 0.83


def test_all_of_a_few_images_right_is_no_certainty(tmp_path: Path) -> None:
    """By hand (Newcombe 1998, method 10): of 20 of 20 the interval begins at 20 / (20 + 1.96²) = 83.89 %."""
    for setting in (ONE, TWO):
        folder = write_run(tmp_path / "study", setting, 0, 100.0)
        result = json.loads((folder / "result.json").read_text())
        write_json(folder / "result.json", result | {"test": split_metrics(100.0, 20)})
    (found,) = comparisons(report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()).values()
    assert found[1:3] == ["+0.00", "−16.11 to +16.11"]


def test_of_equal_ones_none_is_the_best(tmp_path: Path) -> None:
    for setting in (ONE, TWO):
        write_run(tmp_path / "study", setting, 0, 90.0, validation=91.0)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert (
        "**Setting #1 and Setting #2 have the same validation accuracy, the highest of 2 settings (91.00 % of 5,000 images). "
        "Setting #1 " in text
    )
    assert "best by validation" not in text and "## In detail: Setting #1" in text


def test_settings_whose_seeds_overlap_are_not_told_apart(tmp_path: Path) -> None:
    for setting, values in ((ONE, (90.0, 91.0)), (TWO, (90.2, 91.1))):
        for seed, value in enumerate(values):
            write_run(tmp_path / "study", setting, seed, value, validation=value)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "The seeds cannot tell its test accuracy from that of Setting #1." in text
    assert "Its run with seed 0, on the 10,000 test images." in text  # the other one's validation images may be easier


def test_many_comparisons_are_counted_against_each_other(tmp_path: Path) -> None:
    values = {"Base": (89.0, 90.0, 91.0), "Far": (79.0, 80.0, 81.0), "Chance": (91.7, 92.8, 93.9), "Like": (89.5, 90.5, 91.5)}
    for name, lr in zip(values, (0.1, 0.2, 0.3, 0.4), strict=True):
        for seed, value in enumerate(values[name]):
            write_run(tmp_path / "study", TWO.model_copy(update={"name": name, "lr": lr}), seed, value)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    found = comparisons(text)
    assert found["Chance", "Base"] == ["lr 0.3 instead of 0.1", "+2.80", "+0.41 to +5.19", "0.031", "by itself only"]
    assert {row: values[-1] for (row, _), values in found.items()} == {"Chance": "by itself only", "Like": "no", "Far": "yes"}


@pytest.mark.parametrize(
    ("gains", "told"), [((8.0, 3.1, 2.75), ["yes"] * 3), ((8.0, 2.7, 2.5), ["yes", "by itself only", "by itself only"])]
)
def test_of_several_comparisons_each_is_counted_with_those_that_are_less_sure(
    tmp_path: Path, gains: tuple[float, ...], told: list[str]
) -> None:
    for number, gain in enumerate((0.0, *gains)):
        for seed, value in enumerate((79.0, 80.0, 81.0)):
            write_run(tmp_path / "study", TWO.model_copy(update={"name": f"N{number}", "lr": 0.1 + number}), seed, value + gain)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert [values[-1] for values in comparisons(text).values()] == told


def test_the_best_setting_is_not_that_of_the_luckiest_seed(tmp_path: Path) -> None:
    for setting, values in ((ONE, (90.0, 93.0)), (TWO, (92.0, 92.0))):
        for seed, value in enumerate(values):
            write_run(tmp_path / "study", setting, seed, 90.0, validation=value)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "Setting #2 is the best of 2 settings by validation accuracy (92.00 ± 0.00 % of 5,000 images)" in text


def test_runs_that_were_not_computed_alike_are_a_limit(tmp_path: Path) -> None:
    for seed, facts in enumerate([{"world_size": 1}, {"world_size": 2}, {}]):
        folder = write_run(tmp_path / "runs", ONE, seed, 90 + seed)
        change(folder / "environment.json", **facts, precision="float32")
    text = report([tmp_path / "runs"], tmp_path / "out").with_suffix(".md").read_text()
    limits = text.partition("## What these runs cannot show")[2]
    assert "Not all runs had as many processes (1 and 2; " in limits and "same precision" not in limits


def test_a_setting_is_compared_with_the_baseline_in_its_own_precision(tmp_path: Path) -> None:
    rows = {
        "Base": {},
        "Base, exact": {"precision": "float32"},
        "Slow": {"lr": 0.01},
        "Bare": {"lr": 0.01, "weight_decay": 0.0},
    }
    for name, changed in rows.items():
        folder = write_run(tmp_path / "study", ONE.model_copy(update={"name": name, **changed}), 0, 90.0)
        change(folder / "environment.json", precision="bfloat16" if name in ("Base", "Slow") else "float32")
    text = report([tmp_path / "study"], tmp_path / "out", baseline_name="Base").with_suffix(".md").read_text()
    assert {pair: found[0] for pair, found in comparisons(text).items()} == {
        ("Base, exact", "Base"): "precision float32 instead of bfloat16",
        ("Slow", "Base"): "lr 0.01 instead of 0.1",
        ("Bare", "Base, exact"): "lr 0.01 instead of 0.1 and weight decay 0.0 instead of 0.0001",
        ("Bare", "Slow"): "weight decay 0.0 instead of 0.0001 and precision float32 instead of bfloat16",
    }
    assert "or with Base, exact where a setting was computed in that precision" in text
    assert "not all was computed in the same precision: the differences of bare against slow contain that." in text.lower()


def test_of_many_settings_the_answer_says_which_differ_from_the_baseline(tmp_path: Path) -> None:
    gains = {"Base": 0.0, "Up": 3.0, "Far": -20.0, **{f"Like {n}": 0.1 * n for n in range(1, 6)}}
    for number, (name, gain) in enumerate(gains.items()):
        for seed, more in enumerate((-0.5, 0.0, 0.6)):
            row = ONE.model_copy(update={"name": name, "lr": 0.1 + 0.1 * number})
            folder = write_run(tmp_path / "study", row, seed, 70.0 + gain + more)
            change(folder / "environment.json", training_sha256=str(seed))
    text = report([tmp_path / "study"], tmp_path / "out", baseline_name="Base").with_suffix(".md").read_text()
    assert (
        " The seeds tell 2 of 7 settings from Base. Higher, in points of test accuracy: Up (+3.0). Lower, in points of test "
        "accuracy: Far (−20.0). Each was compared by itself; tested all at once, 2 are told apart.**"
    ) in text
    assert "Each seed holds out other images, the same ones in every setting" in text


def test_seeds_that_patience_ended_at_different_epochs_are_one_row(tmp_path: Path) -> None:
    for seed, epochs in enumerate((6, 5)):
        write_run(tmp_path / "study", ONE, seed, 90.0, epochs=epochs)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert (
        "3 epochs without a better validation accuracy (or an equal one and a lower loss), counted after the warm-up and the "
        "last decay of lr, and the run ends "
        "(seed 1 after epoch 5)" in text
    )
    write_run(tmp_path / "step", TWO.model_copy(update={"patience": 1}), 0, 90.0)
    text = report([tmp_path / "step"], tmp_path / "out").with_suffix(".md").read_text()
    assert "- Patience: 1 epoch without" in text


def test_what_stands_behind_table_and_runs_is_told(out: Path) -> None:
    text = (out / "report.md").read_text()
    assert (
        "- lr decay: Setting #1: constant lr. Setting #2 and Setting #3: times 0.1 at 50 and 75 % of the run "
        "(after 3 and 4.5 epochs)\n"
    ) in text
    assert "- Training images: 45,000\n- Validation images: 5,000\n- Test images: 10,000\n" in text


def test_the_cells_of_an_unusual_setting() -> None:
    odd = Setting(
        name="a", model="resnet20", width=32, block="pre", shortcut="none", momentum=0, weight_decay=0, augmentation="none"
    )
    assert list(cells(Row(0, "a", odd, [])).values()) == [
        "Plain20, width 32 (pre-activation)",
        "128",
        "ReLU",
        "He_normal",
        "SGD",
        "0.1",
        "200",
        "Batch Norm",
        "X",
        "X",
        "X",
        "–",
        "–",
        "",
    ]
    assert cells(Row(0, "a", odd.model_copy(update={"start_from": "resnet32"}), []))["Weight initialization"] == "Pretrained"


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions that paint each plot."""
    found: list[Any] = []
    monkeypatch.setattr(plots, "draw", lambda name, alt, size, paint: found.append(paint))
    return found


def test_true_classes_are_rows_and_the_named_ones_columns(painted: list[Any]) -> None:
    plots.plot_confusion({"per_class": {"cat": 0, "dog": 0}, "confusion": [[5, 3], [0, 7]], "n": 15}, "test")
    painted[0](figure := Figure())
    shown = [(*text.get_position(), text.get_text()) for text in figure.axes[0].texts]
    assert shown == [(0, 0, "5"), (1, 0, "3"), (1, 1, "7")]


def test_curves_count_epochs_from_one_and_the_dot_is_at_the_kept_one(tmp_path: Path, painted: list[Any]) -> None:
    plots.plot_one(read_rows([write_study(tmp_path)])[0])
    painted[0](figure := Figure())
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[0].lines]
    epochs = [1, 2, 3, 4, 5, 6]
    assert drawn[:3] == [(epochs, [95] * 6), (epochs, [50, 70, 80, 85, 91, 89]), ([5], [91])]
    heights = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    assert heights["training"] > heights["validation"]


def test_the_enlarged_plot_has_the_band_of_the_seeds(tmp_path: Path, painted: list[Any]) -> None:
    for seed, validation in enumerate((90.0, 93.0)):
        write_run(tmp_path, ONE, seed, 90.0, validation)
    plots.plot_all(read_rows([tmp_path]), enlarged=True)
    painted[0](figure := Figure())
    (band,) = figure.axes[0].collections
    heights = {round(float(y), 6) for x, y in band.get_paths()[0].vertices if x == 5}
    assert heights == {90.0, 93.0}


def test_a_choice_by_unequal_numbers_of_validation_images_is_called_rough(tmp_path: Path) -> None:
    write_run(tmp_path / "study", ONE, 0, 89.0)
    folder = write_run(tmp_path / "study", TWO, 0, 90.0)
    assert "rough" not in report([tmp_path / "study"], tmp_path / "out").read_text()
    result = json.loads((folder / "result.json").read_text())
    result["validation"]["n"] = 2000
    write_json(folder / "result.json", result)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert " % of 5,000 images; others have other ones: a rough choice)" in text


def test_settings_are_compared_by_the_seeds_that_all_have_for_each_holds_out_other_images(tmp_path: Path) -> None:
    for seed, validation in enumerate((80.0, 90.0)):  # seed 1 holds out the easier images
        write_run(tmp_path / "study", ONE, seed, 85.0, validation=validation)
    write_run(tmp_path / "study", TWO, 1, 85.0, validation=89.0)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "**Setting #1 is the best of 2 settings by validation accuracy (85.00 ± 7.07 % of 5,000" in text
    assert " images; ranked by the seeds that all have). It" in text
    shutil.rmtree(tmp_path / "study" / "setting-1" / "seed-1")
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "(89.00 % of 5,000 images; others have other ones: a rough choice)." in text


def test_a_setting_that_is_surely_better_on_the_test_images_than_the_best_by_validation_is_named(tmp_path: Path) -> None:
    for seed, more in enumerate((-0.1, 0.0, 0.1)):
        write_run(tmp_path / "study", ONE, seed, 89.0 + more, validation=91.0)
        write_run(tmp_path / "study", TWO, seed, 90.0 + more, validation=90.0)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "**Setting #1 is the best" in text
    assert "The test accuracy of Setting #2 is higher, as the seeds can tell.**" in text


def test_intervals_are_drawn_whole(tmp_path: Path, painted: list[Any]) -> None:
    rows = read_rows([write_study(tmp_path)])
    sure = Comparison(rows[1], rows[0], -50.0, (-51.0, -49.0), 0.001, stands=True)
    plot_differences(rows[0], [Comparison(rows[2], rows[0], -0.3, (-4.0, 3.4), 0.5), sure])
    painted[0](figure := Figure())
    drawn = [(line.get_marker(), *line.get_xdata()) for line in figure.axes[0].lines]
    assert drawn[:4] == [("|", -51.0, -49.0), ("o", -50.0), ("|", -4.0, 3.4), ("o", -0.3)]


def test_runs_of_two_frameworks_are_two_rows(tmp_path: Path) -> None:
    write_run(tmp_path / "study", ONE, 0, 89.0)
    write_run(tmp_path / "study", ONE, 1, 90.0, framework="tensorflow")
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "**Setting #1 (PyTorch)**" in text and "**Setting #1 (TensorFlow)**" in text
    assert "framework TensorFlow instead of PyTorch" in text


def test_the_first_seed_may_lack_test_images(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "study", ONE, 0, 90.0)
    write_json(folder / "result.json", json.loads((folder / "result.json").read_text()) | {"test": None})
    write_run(tmp_path / "study", ONE, 1, 90.0)
    write_run(tmp_path / "study", TWO, 0, 89.0, validation=89.0)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "It classifies 90.00 % of the 10,000 test images" in text


def test_settings_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    write_run(tmp_path / "short" / "runs", ONE, 0, 89.0)
    write_run(tmp_path / "long" / "runs", ONE.model_copy(update={"lr": 0.2}), 0, 90.0)
    report([tmp_path / "short", tmp_path / "long"], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "**Setting #1 (short/runs)**" in text and "**Setting #1 (long/runs)**" in text


def test_seeds_of_one_name_that_a_changed_table_trained_are_told_apart(tmp_path: Path) -> None:
    for seed, lr in enumerate((0.1, 0.2, 0.2)):
        write_run(tmp_path / "study", ONE.model_copy(update={"lr": lr}), seed, 89.0 + seed)
    text = report([tmp_path / "study"], tmp_path / "out").with_suffix(".md").read_text()
    assert "**Setting #1 (setting-1, seed 0)**" in text and "**Setting #1 (setting-1, seed 1 and 2)**" in text


@pytest.mark.usefixtures("drawn")
def test_letters_of_other_alphabets_are_drawn_where_the_font_has_them_and_else_nothing_is_said() -> None:
    missing, *shown = (bytes(plots.font(20).getmask(letter)) for letter in "\u0378éüßжλ")
    assert missing not in shown
    metrics = {"per_class": {"猫": 0, "\U0001f53a": 0}, "confusion": [[5, 3], [0, 7]], "n": 15}
    assert "猫" in plots.plot_confusion(metrics, "test").inline

"""The report of saved runs as one page and as Markdown, from table, findings, plots and photos; nothing is trained here."""

from __future__ import annotations

import base64
import io
import math
import os
import re
import shlex
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markdown_it import MarkdownIt
from PIL import Image, ImageDraw

from . import findings, plots
from .errors import markdown, printable
from .explain import activation, heat_map
from .figure import entry, figure
from .files import check_writable, portable, write
from .infer import Classifier
from .photo import read_photo, views
from .plots import INK, Picture, raster
from .progress import progress
from .results import FEW, Row, baseline_of, best_of, comparisons, equal_to, join, networks, read_rows
from .settings import slug

SOURCES = (
    "resnet_cifar10",
    "settings",
    "reports",
    "tests",
    "torture",
    "benchmarks",
    "docs",
    ".ci",
    ".gitignore",
    "README.md",
    "LICENSE",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "Makefile",
    "pyproject.toml",
    "constraints.txt",
)


CALIBRATION = (  # column, metric, digits after the point
    ("Calibration error (points)", "calibration_error", 1),
    ("scaled", "calibration_error_scaled", 1),
    ("Log-loss (nats)", "negative_log_likelihood", 3),
    ("scaled", "negative_log_likelihood_scaled", 3),
    ("Temperature", "temperature", 2),
)


def top_of(rows: Sequence[Row]) -> list[Row]:
    """Choose the finished rows within ten points of the best, whose curves are worth a closer look."""
    highest = [(row, float(row.curves("validation_accuracy").mean(0).max())) for row in rows if row.done]
    return [row for row, value in highest if value > max(value for _, value in highest) - 10]


def best_section(best: Row, rows: Sequence[Row]) -> dict[str, Any] | None:
    """Show the best setting: its classes beside those of the others, confusion and calibration; None without an evaluation."""
    run = best.done[0]  # seeds hold out other images, so that the best one there is no better than another
    split = "test" if run.result["test"] else "validation"
    m = run.result[split]
    if not m:
        return None
    names, counts = list(m["per_class"]), m["confusion"]
    shown = [row for row in rows if row.measured(split)] if len(rows) <= FEW else [best]
    first, *other_sizes = sorted({measured["n"] for measured in m["per_class"].values()})
    classes = [
        (
            f"{name} ({measured['n']:,})" if other_sizes else name,
            [_mean(row, split, name, "recall") for row in shown],
            _mean(best, split, name, "precision"),
        )
        for name, measured in m["per_class"].items()
    ]
    wrong = sorted((-count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count)
    top = [pair for pair in wrong[:3] if not wrong[3:] or pair[0] < wrong[3][0]]  # of equal ones all or none
    pairs = [f"{names[i]} taken for {names[j]} ({-count} of {sum(counts[i]):,})" for count, i, j in top]
    found = f"Most often confused: {join(pairs)}." if pairs else "No image was taken for another class."
    found = "No two classes were confused more often than others." if wrong and not top else found
    calibrated = [
        (row, [f"{np.mean([each[key] for each in row.measured(split)]):.{digits}f}" for _, key, digits in CALIBRATION])
        for row in shown
    ]
    return {
        "name": best.name,
        "shown": shown,
        "classes": classes,
        "heading": f"Class, {split} images" if other_sizes else f"Class, {first:,} {split} images each",
        "text": f"Its run with seed {run.seed}, on the {m['n']:,} {split} images. {found}",
        "calibration_columns": ["Setting", *(column for column, *_ in CALIBRATION)],
        "calibration": calibrated,
        "confusion": plots.plot_confusion(m, split),
        "mistakes_picture": contact_sheet(m["mistakes"]) if m.get("mistakes") else None,
    }


def _mean(row: Row, split: str, name: str, what: str) -> str:
    """Average a class's recall or precision over the seeds that have one, in percent."""
    values = [value for measured in row.measured(split) if (value := measured["per_class"][name][what]) is not None]
    return f"{np.mean(values):.1f}" if values else "–"


def contact_sheet(mistakes: Sequence[dict[str, Any]]) -> Picture:
    """Lay the images of mistakes (PNG, base64) side by side, six in a row, each enlarged three times and with its classes."""
    width, height = 120, 150
    sheet = Image.new("RGB", (6 * width, math.ceil(len(mistakes) / 6) * height), "white")
    pen, font = ImageDraw.Draw(sheet), plots.font(10)
    for i, mistake in enumerate(mistakes):
        place = (i % 6 * width, i // 6 * height)
        with Image.open(io.BytesIO(base64.b64decode(mistake["png"])), formats=("PNG",)) as image:
            sheet.paste(image.convert("RGB").resize((96, 96), Image.Resampling.NEAREST), place)
        percent = f"{100 * mistake['probability']:.1f}".replace("100.0", "> 99.9")
        label, taken = (plots.shortened(mistake[key], 18) for key in ("label", "predicted"))
        text = f"{label}\n→ {taken}\n{percent} %"
        pen.text((place[0], place[1] + 98), text, INK, font)
    told = join([f"{mistake['label']} taken for {mistake['predicted']}" for mistake in mistakes])
    return raster("mistakes", f"The most confident mistakes: {told}", sheet)


def classified(photos: Sequence[Path], photo_model: str | Path | None, best: Row | None) -> tuple[Picture | None, str]:
    """Classify photos: the figure of them; and by whom, in words."""
    if not photos:
        return None, ""
    if photo_model:
        model, by = photo_model, f"the model {portable(photo_model)}"
    elif best:
        model, by = best.done[0].folder, best.name
    else:
        raise ValueError("--photo: no run is the best one, to classify photos; name a model with --photo-model")
    entries = []
    classifier = Classifier(model)
    for file in progress(photos, "photos"):
        photo = read_photo(file)
        prediction = classifier.classify(views(photo))
        heat = heat_map(photo, activation(classifier, photo, prediction.label))
        entries.append(entry(printable(file.name), photo, heat, prediction))
    told = "; ".join(f"{name}: {prediction}" for name, *_, prediction in entries)
    note = (
        f"Classified by {by}, of {len(classifier.classes)} classes, trained on {classifier.config['data']}. "
        "Bright in the second picture: what spoke for the most likely class. "
        "“None of these”: its likeness to the classes, less a penalty for textures richer than usual, is below the model's "
        "threshold, whatever the percentages say."
    )
    return raster("photos", told, figure(entries)), note


def report(
    folders: Sequence[Path],
    out: Path,
    photos: Sequence[Path] = (),
    photo_model: str | Path | None = None,
    words: Path | None = None,
    baseline_name: str | None = None,
    goal: float | None = None,
) -> Path:
    """Write report.html (one file), report.md and plots/ into `out`, from the run folders under `folders`.

    The photos are classified by `photo_model`, or else by the best run; `words` is a Markdown file of interpretation, a "# ..."
    above which is the title; the others are compared with the setting `baseline_name`, or else with the one from which they
    differ least; `goal` is the test accuracy in percent that was asked for.

    Returns:
        The path of report.html.

    Raises:
        ValueError: If a run, a photo, the model or the words cannot be read, no finished setting has the baseline's name,
            or `out` is a file.

    """
    check_writable(out / "plots")
    rows = read_rows(folders)
    data = next((run.environment["data"] for row in rows for run in row.runs if run.environment), "unknown data")
    try:
        text_of_words = words.read_text("utf-8-sig").lstrip() if words else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--words: {words} cannot be read: {getattr(error, 'strerror', 'it is no text')}") from None
    heading = re.match(r"# (.+)(?:\n|$)", text_of_words)
    title = heading[1] if heading else f"Results on {data}"
    text_of_words = text_of_words[heading.end() :] if heading else text_of_words
    finished = [row for row in rows if row.done]
    named = {slug(row.name): row for row in finished}
    if baseline_name and slug(baseline_name) not in named:
        allowed = ", ".join(repr(row.name) for row in finished) or "none, no setting is finished"
        raise ValueError(f"--baseline: found {baseline_name!r}; allowed: {allowed}")
    best = best_of(rows)
    baseline = named[slug(baseline_name)] if baseline_name else baseline_of(finished)
    rivals = sum(bool(row.accuracies("validation")) for row in rows) - 1
    badge = best if best and rivals > 0 and not equal_to(best, rows) else None  # alone, or one of two, it is no best one
    compared = comparisons(rows, baseline, best)
    changes = [each for each in compared if each.main and each.p is not None]
    detail = best_section(best, rows) if best else None
    shown, photo_note = classified(photos, photo_model, best)
    started = [row for row in rows if row.curves("lr").size]
    validated = [row for row in started if np.isfinite(row.curves("validation_accuracy")).any()]
    many, top = len(validated) > FEW, top_of(validated)
    overview: list[Picture] = []
    if many:
        overview = [plots.plot_panels(validated, baseline)]
    elif len(validated) > 1:
        overview = [plots.plot_all(validated, enlarged=False)]
        overview += [plots.plot_all(top, enlarged=True)] if len(top) > 1 else []
    alone = [] if many else [(row, plots.plot_one(row)) for row in progress(started, "plots")]
    groups = networks(sorted(rows, key=lambda row: row is not baseline))  # where it is, the baseline names its line
    kinds = {repr(first.setting.architecture(0) | {"depth": 0, "width": 0}) for first, *_ in groups}  # size explains nothing
    options = [*folders, "--out", out, *(part for photo in photos for part in ("--photo", photo))]
    more = {"--photo-model": photo_model, "--words": words, "--baseline": baseline_name, "--goal": goal and f"{goal:g}"}
    options += [part for option, value in more.items() if value for part in (option, str(value))]
    content: dict[str, Any] = {
        "title": title,
        "data": data,
        "answer": findings.answer(rows, best, compared, data, goal),
        "best": badge,
        "detail": detail,
        "columns": list(findings.cells(rows[0])),
        "rows": [(row, list(findings.cells(row).values())) for row in rows],
        "legend": [line for line in findings.merged(rows, findings.meaning) if line[1] != "none"],
        "machine": findings.merged(rows, findings.provenance),
        "overview": overview,
        "many": many,
        "plots": alone,
        "comparison_columns": findings.COMPARISON_COLUMNS,
        "comparisons": [findings.comparison_cells(each) for each in compared],
        "findings": findings.findings(rows, best),
        "photos": shown,
        "notes": findings.notes(rows, top, baseline, groups, compared, data) | {"photos": photo_note},
        "differences": plots.plot_differences(baseline, changes) if changes and baseline else None,
        "signals": [plots.plot_signals(groups, back=back) for back in (False, True)] if len(kinds) > 1 else [],
        "words": text_of_words,
        "limits": findings.limits(rows, compared, data),
        "words_html": MarkdownIt("js-default", {"html": False}).render(text_of_words),
        "command": shlex.join(["resnet-cifar10", "report", *map(portable, options)]),
    }
    settings: Any = {
        "loader": jinja2.FileSystemLoader(Path(__file__).parent),
        "undefined": jinja2.StrictUndefined,
        "trim_blocks": True,
        "lstrip_blocks": True,
    }
    page = jinja2.Environment(autoescape=True, **settings).get_template("report.html.j2").render(content)
    page = re.sub(r"(?<=\d) (?=[%±])|(?<=±) (?=\d)", "\N{NO-BREAK SPACE}", page)  # no line ends within a figure
    markdown_of = jinja2.Environment(finalize=markdown, **settings)  # nosec B701  (Markdown, not HTML)
    text = markdown_of.get_template("report.md.j2").render(content)
    pictures = [*overview, *(plot for _, plot in alone), shown, *content["signals"], content["differences"]]
    pictures += [detail[key] for key in ("confusion", "mistakes_picture") if detail]
    for picture in filter(None, pictures):
        write(out / picture.file, picture.content)
    write(out / "report.md", text)
    write(out / "report.html", page)
    return out / "report.html"


def pack(out_zip: Path, report_folder: Path, package_root: Path) -> None:
    """Pack the sources and the report into one archive for handing in; equal files give equal bytes.

    Raises:
        ValueError: If there is no report or no source checkout.

    """
    for needed in (report_folder / "report.html", package_root / "pyproject.toml"):
        if not needed.is_file():
            raise ValueError(f"{needed}: missing; packing needs a written report and a checkout of the sources")
    pictures = re.findall(r"\]\((plots/[^)]+)\)", (report_folder / "report.md").read_text())  # not those of earlier reports
    files = {
        Path("report") / name: report_folder / name
        for name in ("report.html", "report.md", *pictures)
        if (report_folder / name).is_file()
    }
    for source in (package_root / name for name in SOURCES):
        for file in (source, *source.rglob("*")):
            inside = file.relative_to(package_root)
            weights = inside.parts[0] == "reports" and file.suffix == ".safetensors"  # three times as large as all the rest
            if file.is_file() and not weights and not {"__pycache__", "demo"} & set(inside.parts):
                files[inside] = file
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for inside, file in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{out_zip.stem}/{inside.as_posix()}")
            entry.external_attr = (0o755 if os.access(file, os.X_OK) else 0o644) << 16
            archive.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)
    write(out_zip, content.getvalue())

"""The report of saved runs: table, findings in words, plots, photos; nothing is trained here."""

from __future__ import annotations

import base64
import io
import math
import re
import shlex
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .infer import Classifier
from .names import printable
from .photo import read_photo, views
from .plots import INK, Picture, plot_all, plot_confusion, plot_differences, plot_one, plot_signals, raster
from .results import Row, Run, baseline_of, best_of, differing, join, networks, read_rows, spread, welch
from .storage import write

COLUMNS = ("Model", "Batch size", "Activation function", "Weight initialization", "Optimizer", "lr", "Epoch",
           "Normalization", "Weight decay", "Data augmentation", "lr decay", "Training time (m)",
           "Early stopping epoch", "Accuracy")  # fmt: skip
WORDS = {"relu": "ReLU", "leaky_relu": "Leaky ReLU", "gelu": "GELU", "silu": "SiLU", "he_normal": "He_normal",
         "xavier_normal": "Xavier_normal", "pytorch": "PyTorch default", "adam": "Adam", "adamw": "AdamW", "muon": "Muon",
         "batch": "Batch Norm", "sync_batch": "Batch Norm (synchronised)",
         "layer": "Layer Norm", "group": "Group Norm", "none": "None"}  # fmt: skip
AUGMENTATIONS = {"none": "none", "crop": "padding by 4 with a random 32×32 crop", "flip": "random horizontal flip",
                 "altflip": "each image mirrored in every second epoch",
                 "photo": "framing, focus, light, noise and compression of every second image changed as in photos",
                 "cutout": "a random square erased (cutout)", "mixup": "pairs of images mixed (mixup)"}  # fmt: skip
MANY = 5  # settings, from here on the findings name only the extremes
SOURCES = ("resnet_cifar10", "settings", "tests", "torture", "benchmarks", "docs", ".ci", ".gitignore", "README.md", "LICENSE",
           "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "constraints.txt")  # fmt: skip


def span(numbers: Iterable[int]) -> str:
    """Write the first and the last: "158–171", or "158" where all are the same."""
    values = sorted(numbers)
    return "–".join(f"{value:,}" for value in dict.fromkeys(values[:1] + values[-1:]))


def merged(rows: Sequence[Row], describe: Callable[[Row], dict[str, str]]) -> list[tuple[str, str]]:
    """Describe all rows term by term: in one text where they agree, else each by its name, the many last."""
    described = [(row.name, describe(row)) for row in rows]
    lines = []
    for term in described[0][1]:
        texts: dict[str, list[str]] = {}
        for name, terms in described:
            texts.setdefault(terms[term], []).append(name)
        ranked = sorted(texts.items(), key=lambda each: len(each[1]) > MANY)
        said = [f"{join(names)}: {text}" for text, names in ranked[:-1]]
        text, names = ranked[-1]
        said.append(text if not said else f"{join(names) if len(names) <= MANY else 'The others'}: {text}")
        lines.append((term, ". ".join(said)))
    return lines


def cells(row: Row, seeds: set[int]) -> list[str]:
    """Fill the 14 columns; `seeds` are those of all rows, of which this one may lack some."""
    s, tests, minutes = row.setting, row.accuracies("test"), [run.result["train_minutes"] for run in row.done]
    model = s.model.replace("resnet", "ResNet" if s.shortcut == "identity" else "Plain")
    sgd = "SGD (momentum)" if s.momentum else "SGD"
    accuracy = [spread(tests) + (f"\n(n = {len(tests)})" if len(tests) > 1 else "")] if tests else []
    accuracy += ["no test images"] if minutes and not tests else []
    accuracy += [(f"seed {run.seed} " if len(row.runs) > 1 else "") + f"unfinished: epoch {len(run.metrics)} of {s.epochs}"
                 for run in row.runs if not run.result]  # fmt: skip
    accuracy += [f"seed {seed} missing" for seed in sorted(seeds - {run.seed for run in row.runs})]
    return [model + (" (pre-activation)" if s.block == "pre" else ""), str(s.batch_size), WORDS[s.activation],
            WORDS[s.weight_init], WORDS.get(s.optimizer, sgd), f"{s.lr:g}", str(s.epochs), WORDS[s.normalization],
            "O" if s.weight_decay else "X", "X" if s.augmentation == "none" else "O", "X" if s.lr_decay == "none" else "O",
            f"{np.mean(minutes):.1f}" if minutes else "–", span(run.result["best_epoch"] for run in row.done) or "–",
            "\n".join(accuracy)]  # fmt: skip


def meaning(row: Row) -> dict[str, str]:
    """Say what stands behind the cells of a row."""
    s = row.setting
    momentum = f"momentum {s.momentum:g}{', Nesterov' if s.nesterov or s.optimizer == 'muon' else ''}"
    percent, epochs = (join([f"{m * whole:g}" for m in s.lr_milestones]) for whole in (100, s.epochs))
    decay = {"none": "constant lr", "step": f"times {s.lr_factor:g} at {percent} % of the run (epochs {epochs})",
             "cosine": "half a cosine down to 0", "linear": "a straight line down to 0"}[s.lr_decay]  # fmt: skip
    ended = [f"seed {run.seed} after epoch {len(run.metrics)}" for run in row.done if len(run.metrics) < s.epochs]
    counted = "" if s.lr_decay == "none" else ", counted from the last decay of lr on,"
    rule = f"{s.patience} epochs without a better validation accuracy{counted} end a run"
    rule += f" ({join(ended)})" if ended else ""
    kept = "the epoch whose weights were kept, that of the best validation accuracy (first–last where seeds differ)"
    if row.done and not row.accuracies("validation"):
        kept = "the last one: no images were held out to choose by"
    parameters = [f"{run.result['parameters']:,} parameters" for run in row.done[:1]]
    decayed = np.format_float_scientific(s.weight_decay, trim="-", exp_digits=1)
    decayed += " times lr of each weight in a step, apart from the gradient" if s.optimizer in ("adamw", "muon") else ""
    return {
        "Model": join([f"{s.depth} weighted layers", *parameters]),
        "First weights": f"those of {s.start_from}" if s.start_from else "random",
        "Optimizer": momentum if s.optimizer in ("sgd", "muon") else f"betas {s.momentum:g} and 0.999",
        "Weight decay": decayed if s.weight_decay else "none",
        "Data augmentation": join([AUGMENTATIONS[part] for part in s.augmentation.split("_")]),
        "lr decay": (f"linear warm-up over the first {100 * s.warmup:g} % of the run, then " if s.warmup else "") + decay,
        "Label smoothing": f"{s.label_smoothing:g}" if s.label_smoothing else "none",
        "Training time (m)": "training and validation, mean over the seeds; by the clock, beside whatever else ran",
        "Early stopping epoch": kept,
        "Patience": rule if s.patience else "none, the run goes on to its last epoch",
        "Accuracy": "percent of the test images, which are read once, at the end, with the kept weights; with several seeds "
                    "the mean ± sample standard deviation over n seeds",
    }  # fmt: skip


def answer(rows: Sequence[Row], best: Row | None, data: str) -> str:
    """Write the result in three or four sentences."""
    runs = [run for row in rows for run in row.runs]
    waiting = sum(not run.result for run in runs)
    last = f" Runs still unfinished: {waiting} of {len(runs)}; they are shown below and counted nowhere." if waiting else ""
    if best is None:
        reason = "no validation images were held out to choose by" if any(row.done for row in rows) else "no run is finished"
        return f"No setting can be called the best on {data} yet: {reason}.{last}"
    tests, validation = best.accuracies("test"), best.accuracies("validation")
    validated = [row for row in rows if row.accuracies("validation")]
    rivals, sizes = len(validated), sorted({run.result["validation"]["n"] for row in validated for run in row.done})
    text = f"{best.name} reaches {spread(validation)} % validation accuracy." if validation else f"{best.name} is finished."
    if rivals > 1:
        settings = f"{rivals} {'' if all(row.done for row in rows) else 'finished '}settings"
        rough = f"; a rough choice, for they hold out {join([f'{size:,}' for size in sizes], 'or')} images"
        text = (f"{best.name} is the best of {settings} by validation accuracy ({spread(validation)} %"
                f"{rough if len(sizes) > 1 else ''}).")  # fmt: skip
    if tests:
        test = best.done[0].result["test"]
        one_seed = "one seed; 95 % interval {:.1f} to {:.1f} %".format(*test["interval_95"])
        trust = f"mean ± standard deviation of {len(tests)} seeds" if len(tests) > 1 else one_seed
        text += f" It names {spread(tests)} % of the {test['n']:,} test images of {data} correctly ({trust})."
        others = [row for row in rows if row is not best and row.accuracies("test")]
        few = [row.name for row in others if min(len(row.accuracies("test")), len(tests)) < 2]
        compared = [(row.name, welch(row.accuracies("test"), tests)) for row in others if row.name not in few]
        alike = [name for name, tested in compared if tested is None or tested[0] >= 0.05]
        who = join(alike, "or") if len(alike) < 5 else f"{len(alike)} of the others"
        text += f" The seeds cannot tell it from {who}." if alike else ""
        text += f" Too few seeds to compare it with {join(few) if len(few) < 5 else f'{len(few)} others'}." if few else ""
    return text + last


def compare(row: Row, other: Row) -> str:
    """Say in what a row differs from another, what that gained and whether the seeds can tell."""
    keys, a, b = differing(row, other), row.accuracies("test"), other.accuracies("test")
    values = [(key.replace("_", " "), getattr(row.setting, key), getattr(other.setting, key)) for key in keys]
    values += [("framework", row.framework, other.framework)] if row.framework != other.framework else []
    changes = join([f"{key} ({value} instead of {before})" for key, value, before in values]).replace("None", "none")
    text = f"Differs in {changes or 'nothing but the name'}."
    if not a or not b:
        return f"{text} There is no test accuracy of {'one of the two' if a or b else 'either'} to compare."
    gain = float(np.mean(a) - np.mean(b))
    amount = "No difference" if f"{abs(gain):.2f}" == "0.00" else f"{abs(gain):.2f} points {'better' if gain > 0 else 'worse'}"
    text += f" {amount} ({np.mean(a):.2f} against {np.mean(b):.2f} %)."
    if len(a) < 2 or len(b) < 2:
        intervals = [each.done[0].result["test"]["interval_95"] for each in (row, other)]
        ranges = " and ".join(f"{low:.1f} to {high:.1f} %" for low, high in intervals)
        return (f"{text} One seed cannot tell the setting from chance: the choice of test images alone leaves {ranges} "
                "(95 % Wilson intervals), and the chance of the seed comes on top.")  # fmt: skip
    tested = welch(a, b)
    if tested is None:
        return f"{text} The seeds of neither vary, so no test can be made."
    p, low, high = tested
    interval = f"95 % interval {low:+.2f} to {high:+.2f} points".replace("-", "−")
    text += (f" The seeds {'can' if p < 0.05 else 'cannot'} tell the two apart ({interval}; {len(a)} against {len(b)} seeds, "
             f"Welch's t test, {'p < 0.001' if p < 0.001 else f'p = {p:.2g}'}).")  # fmt: skip
    return text + (" Which of the changes did it, this comparison does not tell." if len(values) > 1 and p < 0.05 else "")


def pairs(rows: Sequence[Row], baseline: Row | None) -> list[tuple[Row, Row]]:
    """Pair every finished row with the baseline, and with each other row that it repeats with one more change."""
    counted = [(row, len(differing(row, baseline))) for row in rows if row.done] if baseline else []
    return [(row, other) for row, changes in counted if row is not baseline for other, fewer in counted
            if other is baseline or (0 < fewer < changes and len(differing(row, other)) == 1)]  # fmt: skip


def findings(rows: Sequence[Row], best: Row | None, baseline: Row | None) -> list[tuple[str, str]]:
    """Write what the numbers carry, and no more: (lead, text)."""
    finished = [row for row in rows if row.done]
    found = [(f"{row.name} against {other.name}", compare(row, other)) for row, other in pairs(rows, baseline)]
    tested = [row for row in finished if row.accuracies("test")]
    highest = max(tested, key=lambda row: float(np.mean(row.accuracies("test"))), default=best)
    if best and highest and highest is not best:
        found.append(("Chosen by validation", f"{highest.name} has the highest test accuracy, but the choice is made by "
                      "validation accuracy, so that the test images stay unseen until the end."))  # fmt: skip
    gaps, flat = [], []
    for row in (row for row in finished if row.accuracies("validation")):
        kept = [run.metrics[run.result["best_epoch"] - 1] for run in row.done]
        train, seen = (float(np.mean([epoch[f"{part}_accuracy"] for epoch in kept])) for part in ("train", "validation"))
        gaps.append((train - seen, f"{row.name} {train:.1f} against {seen:.1f} % ({train - seen:+.1f} points)"))
        curves = [run.curve("validation_accuracy") for run in row.done]
        flat.append(f"{span(int((c >= c.max() - 1).argmax()) + 1 for c in curves)} of {row.setting.epochs} ({row.name})")
    if gaps:
        many, augmented = len(gaps) > MANY, any(row.setting.augmentation != "none" for row in finished)
        shown = join([text for _, text in ((min(gaps), max(gaps)) if many else gaps)])
        found.append(("Overfitting", f"Training against validation accuracy at the kept epoch{', least and most' * many}: "
                      f"{shown}. Training accuracy is counted during the epoch{', on augmented images' * augmented}."
                      .replace("(-", "(−")))  # fmt: skip
        if not many:
            text = f"Validation accuracy is first within a point of its best in epoch {join(flat)}."
            found.append(("Where the curves flatten", text))
    return found


def gains(rows: Sequence[Row], baseline: Row | None) -> list[tuple[Row, float, float, float]]:
    """List what each row gained over the baseline in points of test accuracy, with its 95 % interval, lowest first."""
    found, b = [], baseline.accuracies("test") if baseline else []
    for row in (row for row in rows if row is not baseline):
        a = row.accuracies("test")
        if tested := welch(a, b):
            found.append((row, float(np.mean(a) - np.mean(b)), *tested[1:]))
    return sorted(found, key=lambda gain: gain[1])


def limits(rows: Sequence[Row], data: str, tested: dict[str, float]) -> list[str]:
    """Say what these runs cannot show; `tested` are the p values of the comparisons."""
    seeds, epochs = [len(row.done) for row in rows if row.done], [row.setting.epochs for row in rows]
    said = ["One seed a setting: how far another one would end from it is not known."] if max(seeds, default=0) == 1 else []
    if max(seeds, default=0) > 1:
        said = [f"{span(seeds)} seeds a setting: an interval that includes 0 does not show that there is no difference."]
    if len(tested) > 1:
        ranked = sorted(tested, key=tested.__getitem__)
        stand = [tested[name] * (len(ranked) - i) < 0.05 for i, name in enumerate(ranked)]  # Holm 1979
        fallen = [name for i, name in enumerate(ranked) if tested[name] < 0.05 and not all(stand[: i + 1])]
        told = f"those of {join(fallen)} no longer tell" if fallen else "the same ones tell" if any(stand) else "none tells"
        said.append("Each comparison is tested by itself: of twenty without a true difference, one is expected to look real. "
                    f"Tested as {len(ranked)} at once (Holm's correction, 5 %), {told}.")  # fmt: skip
    return [*said, f"Runs of {span(epochs)} epoch{'s' if max(epochs) > 1 else ''}: what helps here may not help in more or "
            "fewer.", f"One data set: {data}. On other pictures the settings may rank differently."]  # fmt: skip


def machine(row: Row) -> dict[str, str]:
    """List the data, machine and versions of a row."""

    def seen(*keys: str) -> str:
        values = [[run.environment.get(key, "unknown") for key in keys] for run in row.runs if run.metrics]
        texts = [", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in each) for each in values]
        return " or ".join(dict.fromkeys(texts)) or "no epoch finished"

    processes, parts = seen("world_size"), {"batch": "each one's part of a batch", "sync_batch": "whole batches"}
    statistics = f", statistics of {parts[row.setting.normalization]}" if row.setting.normalization in parts else ""
    nothing = "none" if row.done else "none yet"
    marked = [f"seed {run.seed}, {run.result['not_bit_exact']}" for run in row.done if run.result.get("not_bit_exact")]
    return {
        "Data": seen("data"), "Training images": seen("training_images"), "Validation images": seen("validation_images"),
        "Test images": span(run.result["test"]["n"] for run in row.done if run.result["test"]) or nothing,
        "Processor": seen("processor"), "Device, threads": seen("device", "threads"), "Precision": seen("precision"),
        "Processes": processes + (statistics if processes != "1" and any(run.metrics for run in row.runs) else ""),
        "Framework": row.framework + (f" {seen('tensorflow')}" if row.framework == "TensorFlow" else ""),
        "PyTorch, Python": seen("torch", "python"),
        "Git commit of the code": re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", seen("git_commit")),
        "Not bit-exact": "; ".join(marked) or "no run: each equals an uninterrupted one on its machine",
    }  # fmt: skip


def top_of(rows: Sequence[Row]) -> list[Row]:
    """Choose the finished rows within ten points of the best, whose curves are worth a closer look."""
    highest = [(row, float(row.curves("validation_accuracy").mean(0).max())) for row in rows if row.done]
    return [row for row, value in highest if value > max(value for _, value in highest) - 10]


def best_run(best: Row) -> Run:
    """Choose the run of the best setting with the best validation accuracy."""
    return max(best.done, key=lambda run: (run.result["validation"] or {"accuracy": 0})["accuracy"])


def best_section(best: Row) -> dict[str, Any] | None:
    """Show the best run of the best setting: confusion, classes, calibration; None where nothing was evaluated."""
    run = best_run(best)
    split = "test" if run.result["test"] else "validation"
    m = run.result[split]
    if not m:
        return None
    names, counts = list(m["per_class"]), m["confusion"]
    wrong = sorted((-count, i, j) for i, row in enumerate(counts) for j, count in enumerate(row) if i != j and count)
    pairs = [f"{names[i]} taken for {names[j]} ({-count} of {sum(counts[i]):,})" for count, i, j in wrong[:3]]
    text = (f"Confidence and accuracy are {m['calibration_error']:.1f} points apart on average (expected calibration error) "
            f"and the log-loss is {m['negative_log_likelihood']:.3f}")
    text += (f"; dividing the logits by the temperature {m['temperature']:.2f}, found on validation images, brings that to "
             f"{m['calibration_error_scaled']:.1f} points and {m['negative_log_likelihood_scaled']:.3f}."
             if run.result["validation"] else ".")  # fmt: skip
    return {"name": best.name, "seed": run.seed, "split": split, "metrics": m, "confused": join(pairs),
            "calibration": text, "confusion": plot_confusion(m, split), "mistakes": m.get("mistakes", []),
            "mistakes_picture": contact_sheet(m["mistakes"]) if m.get("mistakes") else None}  # fmt: skip


def contact_sheet(mistakes: Sequence[dict[str, Any]]) -> Picture:
    """Lay the images of mistakes (PNG, base64) side by side, six in a row, each enlarged three times and with its classes."""
    width, height = 120, 136
    sheet = Image.new("RGB", (6 * width, math.ceil(len(mistakes) / 6) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, mistake in enumerate(mistakes):
        place = (i % 6 * width, i // 6 * height)
        with Image.open(io.BytesIO(base64.b64decode(mistake["png"])), formats=("PNG",)) as image:
            sheet.paste(image.convert("RGB").resize((96, 96), Image.Resampling.NEAREST), place)
        text = f"true: {mistake['label']}\n{mistake['predicted']}, {100 * mistake['probability']:.0f} %"
        pen.text((place[0], place[1] + 98), text, INK, font)
    told = join([f"{mistake['label']} taken for {mistake['predicted']}" for mistake in mistakes])
    return raster("plots/mistakes.png", f"The most confident mistakes: {told}", sheet)


def classified(photos: Sequence[Path], classifier: Classifier) -> list[dict[str, Any]]:
    """Classify photos: picture, verdict and the three highest probabilities in percent."""
    cards = []
    for number, file in enumerate(photos, 1):
        photo = read_photo(file)
        prediction = classifier.classify(views(photo))
        name = printable(file.name)
        shown = f"{name}: {prediction.verdict}"
        picture = raster(f"plots/photo-{number}.jpg", shown, ImageOps.contain(photo, (320, 320)))
        bars = sorted(((100 * p, name) for name, p in prediction.probabilities.items()), reverse=True)[:3]
        cards.append({"name": name, "prediction": prediction, "bars": bars, "picture": picture})
    return cards


def markdown(value: Any) -> Any:
    """Escape what Markdown would read as markup; a line break in a table cell becomes <br>."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return re.sub(r"([\\`*<>\[\]|~&]|(?<!\w)_|_(?!\w))", r"\\\1", value).replace("\n", "<br>")


def portable(path: str | Path) -> str:
    """Show a path as typed, but of an absolute one only what does not name this machine's folders."""
    if Path(path).is_relative_to(Path.cwd()):
        return str(Path(path).relative_to(Path.cwd()))
    return Path(path).name if Path(path).is_absolute() else str(path)


def report(folders: Sequence[Path], out: Path, photos: Sequence[Path] = (), photo_model: str | Path | None = None,
           words: Path | None = None, baseline_name: str | None = None) -> Path:  # fmt: skip
    """Write report.html (one file), report.md and plots/ into `out`, from the run folders under `folders`.

    The photos are classified by `photo_model`, or else by the best run; `words` is a Markdown file of interpretation; the
    others are compared with the setting `baseline_name`, or else with the one from which they differ least.

    Returns:
        The path of report.html.

    Raises:
        ValueError: If a run, a photo, the model or the words cannot be read, no finished setting has the baseline's name,
            or `out` is a file.

    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401
        from markdown_it import MarkdownIt
        from markupsafe import Markup
    except ImportError as error:
        raise ValueError(f"the report needs {error.name}: pip install 'resnet-cifar10[report]'") from None
    if any(path.exists() and not path.is_dir() for path in (out, out / "plots", *out.parents)):
        raise ValueError(f"{out}: is a file, or lies in one; allowed: a folder")
    rows = read_rows(folders)
    try:
        text_of_words = words.read_text() if words else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--words: {words} cannot be read: {getattr(error, 'strerror', 'it is no text')}") from None
    finished = {row.name: row for row in rows if row.done}
    if baseline_name and baseline_name not in finished:
        allowed = ", ".join(map(repr, finished)) or "none, no setting is finished"
        raise ValueError(f"--baseline: found {baseline_name!r}; allowed: {allowed}")
    best, baseline = best_of(rows), finished[baseline_name] if baseline_name else baseline_of(list(finished.values()))
    changes = gains(rows, baseline)
    tested = {f"{row.name} with {other.name}": welch(row.accuracies("test"), other.accuracies("test"))
              for row, other in pairs(rows, baseline)}  # fmt: skip
    section = best_section(best) if best else None
    model = photo_model or (best and best_run(best).folder)
    if photos and not model:
        raise ValueError("--photo: no run is the best one, to classify photos; name a model with --photo-model")
    classifier = Classifier(model) if photos and model else None
    cards = classified(photos, classifier) if classifier else []
    started = [row for row in rows if row.curves("lr").size]
    validated = [row for row in started if np.isfinite(row.curves("validation_accuracy")).any()]
    overview = [plot_all(validated, enlarged=False)] if len(validated) > 1 else []
    overview += [plot_all(top, enlarged=True)] if overview and (top := top_of(validated)) else []
    plots = [(row, plot_one(row)) for row in started]
    data = next((run.environment["data"] for row in rows for run in row.runs if run.environment), "unknown data")
    groups = networks(sorted(rows, key=lambda row: row is not baseline))  # where it is, the baseline names its line
    alike = [f"{first.name} also stands for {join([row.name for row in more])}" for first, *more in groups if more]
    options = [*folders, "--out", out, *(part for photo in photos for part in ("--photo", photo))]
    options += ["--photo-model", photo_model] if photo_model else []
    options += ["--words", words] if words else []
    options += ["--baseline", baseline_name] if baseline_name else []
    content: dict[str, Any] = {
        "data": data, "answer": answer(rows, best, data), "columns": COLUMNS, "best_row": best, "best": section,
        "finished": bool(finished), "several": any(len(row.runs) > 1 for row in rows),
        "rows": [(row, cells(row, {run.seed for each in rows for run in each.runs})) for row in rows],
        "legend": [line for line in merged(rows, meaning) if line[1] != "none"], "machine": merged(rows, machine),
        "overview": overview, "plots": plots, "findings": findings(rows, best, baseline), "photos": cards,
        "classified_by": f"the model {portable(photo_model)}" if photo_model else best and f"{best.name}, the best setting",
        "differences": plot_differences(baseline, changes) if changes and baseline else None, "baseline": baseline,
        "signals": [plot_signals(groups, back=back) for back in (False, True)] if len(groups) > 1 else [],
        "alike": ". ".join(alike),
        "words": Markup(text_of_words),  # nosec B704  (only the Markdown takes them as they are)
        "limits": limits(rows, data, {names: found[0] for names, found in tested.items() if found}),
        "words_html": MarkdownIt("js-default", {"html": False}).render(text_of_words), "classifier": classifier,
        "command": shlex.join(["resnet-cifar10", "report", *map(portable, options)]),
    }  # fmt: skip
    settings: Any = {"loader": jinja2.FileSystemLoader(Path(__file__).parent), "undefined": jinja2.StrictUndefined,
                     "trim_blocks": True, "lstrip_blocks": True}  # fmt: skip
    page = jinja2.Environment(autoescape=True, **settings).get_template("report.html.j2").render(content)
    markdown_of = jinja2.Environment(finalize=markdown, **settings)  # nosec B701  (Markdown, not HTML)
    text = markdown_of.get_template("report.md.j2").render(content)
    pictures = [*overview, *(plot for _, plot in plots), *(card["picture"] for card in cards)]
    pictures += [*content["signals"], content["differences"]]
    pictures += [section[key] for key in ("confusion", "mistakes_picture") if section]
    for picture in filter(None, pictures):
        write(out / picture.file, picture.content)
    write(out / "report.md", text)
    write(out / "report.html", page)
    return out / "report.html"


def check_archive(out_zip: Path) -> None:
    """Make sure that a file can be the archive, before a report is written for it."""
    if out_zip.suffix.lower() != ".zip" or out_zip.is_dir():
        raise ValueError(f"{out_zip}: allowed: a file name that ends in .zip")


def pack(out_zip: Path, report_folder: Path, package_root: Path) -> None:
    """Pack the sources and the report into one archive for handing in; equal files give equal bytes.

    Raises:
        ValueError: If there is no report or no source checkout, or `out_zip` is no name of a zip file.

    """
    for needed in (report_folder / "report.html", package_root / "pyproject.toml"):
        if not needed.is_file():
            raise ValueError(f"{needed}: missing; packing needs a written report and a checkout of the sources")
    check_archive(out_zip)
    files = {Path("report") / file.relative_to(report_folder): file
             for file in (*report_folder.glob("report.[hm]*"), *report_folder.glob("plots/*"))}  # fmt: skip
    for source in (package_root / name for name in SOURCES):
        for file in (source, *source.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                files[file.relative_to(package_root)] = file
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for inside, file in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(f"{out_zip.stem}/{inside.as_posix()}"), file.read_bytes(), zipfile.ZIP_DEFLATED)
    write(out_zip, content.getvalue())

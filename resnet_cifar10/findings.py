"""What the numbers of a study say, in words: no more than they carry."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from .evaluate import wilson_interval
from .files import portable
from .results import ALIKE, FEW, Comparison, Row, changes, differing, equal_to, join, shared_seeds, signed, spread, welch
from .settings import AUGMENTATIONS

COMPARISON_COLUMNS = ("Setting", "Against", "What differs", "Points", "95 % interval", "p", "Told apart")
WORDS = {
    "relu": "ReLU",
    "leaky_relu": "Leaky ReLU",
    "gelu": "GELU",
    "silu": "SiLU",
    "he_normal": "He_normal",
    "xavier_normal": "Xavier_normal",
    "pytorch": "PyTorch default",
    "adam": "Adam",
    "adamw": "AdamW",
    "muon": "Muon",
    "batch": "Batch Norm",
    "sync_batch": "Batch Norm (synchronised)",
    "layer": "Layer Norm",
    "group": "Group Norm",
    "none": "None",
}


def span(numbers: Iterable[float], form: str = ",") -> str:
    """Write the least and the greatest: "158–171", or "158" where they read the same; "" of none."""
    values = sorted(numbers)
    least, greatest = [f"{value:{form}}" for value in (values[0], values[-1])] if values else ["", ""]
    return least if least == greatest else f"{least}–{greatest}"


def named(names: Sequence[str], what: str = "settings") -> str:
    """Name settings as in a sentence, and count the many."""
    return join(names) if len(names) <= FEW else f"{len(names)} {what}"


def merged(rows: Sequence[Row], describe: Callable[[Row], dict[str, str]]) -> list[tuple[str, str]]:
    """Describe all rows term by term: in one text where they agree, else each by its name, the many last."""
    described = [(row.name, describe(row)) for row in rows]
    lines = []
    for term in described[0][1]:
        texts: dict[str, list[str]] = {}
        for name, terms in described:
            texts.setdefault(terms[term], []).append(name)
        ranked = sorted(texts.items(), key=lambda each: len(each[1]) if len(each[1]) > FEW else 0)
        said = [f"{join(names)}: {text}" for text, names in ranked[:-1]]
        text, names = ranked[-1]
        said.append(text if not said else f"{join(names) if len(names) <= FEW else 'The others'}: {text}")
        lines.append((term, ". ".join(said)))
    return lines


def cells(row: Row) -> dict[str, str]:
    """Fill the 14 columns of the table."""
    s, tests, minutes = row.setting, row.accuracies("test"), [run.result["train_minutes"] for run in row.done]
    model = s.model.replace("resnet", "ResNet" if s.shortcut == "identity" else "Plain")
    model += f", width {s.width}" if s.width != 16 else ""
    sgd = "SGD (momentum)" if s.momentum else "SGD"
    accuracy = [f"{spread(tests)}\n(n = {len(tests)})"] if tests else []
    accuracy += ["no test images"] if minutes and not tests else []
    slope = f" {s.leaky_slope:g}" if s.activation == "leaky_relu" else ""
    states: dict[str, list[str]] = {}
    for run in (run for run in row.runs if not run.result):
        state = f"{'failed after' if run.failed else 'unfinished:'} epoch {len(run.metrics)} of {s.epochs}"
        states.setdefault(state, []).append(str(run.seed))
    seeds = len(row.runs) > 1
    accuracy += [f"seed{'s' * (len(those) > 1)} {join(those)} {state}" if seeds else state for state, those in states.items()]
    return {
        "Model": model + (" (pre-activation)" if s.block == "pre" else ""),
        "Batch size": str(s.batch_size),
        "Activation function": WORDS[s.activation] + slope,
        "Weight initialization": "Pretrained" if s.start_from else WORDS[s.weight_init],
        "Optimizer": WORDS.get(s.optimizer, sgd),
        "lr": f"{s.lr:g}",
        "Epoch": str(s.epochs),
        "Normalization": WORDS[s.normalization],
        "Weight decay": "O" if s.weight_decay else "X",
        "Data augmentation": "X" if s.augmentation == "none" else "O",
        "lr decay": "X" if s.lr_decay == "none" else "O",
        "Training time (m)": span(minutes, ".1f") or "–",
        "Early stopping epoch": span(run.result["best_epoch"] for run in row.done) or "–",
        "Accuracy": "\n".join(accuracy),
    }


def meaning(row: Row) -> dict[str, str]:
    """Say what stands behind the cells of a row."""
    s = row.setting
    momentum = f"momentum {s.momentum:g}{', Nesterov' if s.nesterov or s.optimizer == 'muon' else ''}"
    percent, epochs = (join([f"{m * whole:g}" for m in s.lr_milestones]) for whole in (100, s.epochs))
    decay = {
        "none": "constant lr",
        "step": f"times {s.lr_factor:g} at {percent} % of the run (after {epochs} epochs)",
        "cosine": "half a cosine down to 0",
        "linear": "a straight line down to 0",
    }[s.lr_decay]
    ended = [f"seed {run.seed} after epoch {len(run.metrics)}" for run in row.done if len(run.metrics) < s.epochs]
    rule = f"{s.patience} epoch{'s' * (s.patience != 1)} without a better validation accuracy "
    rule += "(or an equal one and a lower loss), counted after the warm-up and the last decay of lr, and the run ends"
    rule += f" ({join(ended)})" if ended else ""
    kept = "the epoch whose weights were kept, that of the best validation accuracy (first–last where seeds differ)"
    if row.done and not row.accuracies("validation"):
        kept = "the last one: no images were held out to choose by"
    parameters = [f"{run.result['parameters']:,} parameters" for run in row.done[:1]]
    decayed = np.format_float_scientific(s.weight_decay, trim="-", exp_digits=1)
    decayed += ", decoupled: each step shrinks a weight by lr times this" if s.optimizer in ("adamw", "muon") else ""
    return {
        "Model": join([f"{s.depth} weighted layers", *parameters]),
        "First weights": f"those of {portable(s.start_from)}" if s.start_from else "random",
        "Optimizer": momentum if s.optimizer in ("sgd", "muon") else f"betas {s.momentum:g} and 0.999",
        "Weight decay": decayed if s.weight_decay else "none",
        "Data augmentation": join([AUGMENTATIONS.get(part, part) for part in s.augmentation.split("_")]),
        "lr decay": (f"linear warm-up over the first {100 * s.warmup:g} % of the run, then " if s.warmup else "") + decay,
        "Label smoothing": f"{s.label_smoothing:g}" if s.label_smoothing else "none",
        "Training time (m)": "minutes of training and validation by the clock, from the fastest to the slowest seed; they "
        "compare settings only where processor, threads, processes, precision and framework are the same (last section)",
        "Early stopping epoch": kept,
        "Patience": rule if s.patience else "none, the run goes on to its last epoch",
        "Failed": "; ".join(run.failed.removeprefix(f"{s.name}, ") for run in row.runs if run.failed) or "none",
        "Accuracy": "percent of the test images, which are classified once, at the end, with the kept weights; mean ± "
        "sample standard deviation where n, the number of seeds, is above 1",
    }


def answer(rows: Sequence[Row], best: Row | None, compared: Sequence[Comparison], data: str, goal: float | None) -> str:
    """Write the result in a few sentences; `goal` is the test accuracy in percent that was asked for."""
    runs = [run for row in rows for run in row.runs]
    tested, finished = [row for row in rows if row.accuracies("test")], any(row.done for row in rows)
    there = named([row.name for row in tested if goal and np.mean(row.accuracies("test")) >= goal]) or "no setting"
    there = f"reached by {there}" if tested else "only test images could tell"
    asked = f" At least {goal:g} % were asked for: {there}." if goal and finished else ""
    last = ""
    if failed := sum(bool(run.failed) for run in runs):
        last += f" Runs that failed: {failed} of {len(runs)}; below the table stands why."
    if waiting := sum(not run.result for run in runs) - failed:
        last += f" Runs still unfinished: {waiting} of {len(runs)}; they are shown below and counted nowhere."
    if best is None:
        reason = "no validation images were held out to choose by" if finished else "no run is finished"
        return f"No setting can be called the best on {data}: {reason}.{asked}{last}"
    tests, validation = best.accuracies("test"), best.accuracies("validation")
    validated = [row for row in rows if row.accuracies("validation")]
    rivals, sizes = len(validated), {measured["n"] for row in validated for measured in row.measured("validation")}
    seeds = shared_seeds(rows)
    text = f"{best.name} reaches {spread(validation)} % validation accuracy." if validation else f"{best.name} is finished."
    subject = "It"
    if rivals > 1:
        settings = f"{rivals} settings{'' if validated == list(rows) else ' with a finished run and validation images'}"
        images = f"{best.measured('validation')[0]['n']:,} images"
        images += "; others have other ones: a rough choice" if len(sizes) > 1 or not seeds else ""
        if seeds and any(len(row.done) > len(seeds) for row in validated):
            images += "; ranked by the seeds that all have"
        reached = f"({spread(validation)} % of {images})"
        text = f"{best.name} is the best of {settings} by validation accuracy {reached}."
        if equals := equal_to(best, rows):
            subject, names = best.name, join([row.name for row in (best, *equals)])
            text = f"{names} have the same validation accuracy, the highest of {settings} {reached}."
    if not tests:
        return text + asked + last
    test = best.measured("test")[0]
    trust = f"mean ± standard deviation of {len(tests)} seeds" if len(tests) > 1 else "one seed"
    low, high = wilson_interval(float(np.mean(tests)), test["n"])
    trust += f"; 95 % interval for other test images: {low:.1f} to {high:.1f} %"
    text += f" {subject} classifies {spread(tests)} % of the {test['n']:,} test images of {data} correctly ({trust})."
    text += asked
    others = [row for row in tested if row is not best]
    if len(others) > FEW:
        return text + _summary(compared) + last
    each = " (each compared by itself)" if len(others) > 1 else ""
    welched = [(row.name, found) for row in others if (found := welch(row.accuracies("test"), tests))]
    if alike := [name for name, (p, *_) in welched if p >= 0.05]:
        text += f" The seeds cannot tell its test accuracy from that of {join(alike, 'or')}{each}."
    if higher := [name for name, (_, low, _) in welched if low > 0]:
        text += f" The test accuracy of {join(higher)} is higher, as the seeds can tell{each}."
    return text + last


def _summary(compared: Sequence[Comparison]) -> str:
    """Say which of many settings the seeds tell from the baseline, the best and the worst first."""
    tested = [each for each in compared if each.main and each.p is not None]
    if not tested:
        return ""
    apart = [each for each in tested if each.told != "no"]
    text = f" The seeds tell {len(apart)} of {len(tested)} settings from {join(sorted({c.other.name for c in tested}), 'or')}."
    for which, found in (
        ("Higher", [each for each in apart if each.gain > 0]),
        ("Lower", [each for each in reversed(apart) if each.gain < 0]),
    ):
        shown = [f"{each.row.name} ({signed(each.gain, 1)})" for each in (found[:3] if found[FEW:] else found)]
        shown += [f"{len(found) - 3} others"] if found[FEW:] else []
        text += f" {which}, in points of test accuracy: {join(shown)}." if shown else ""
    return f"{text} Each was compared by itself; tested all at once, {sum(each.stands for each in apart)} are told apart."


def comparison_cells(compared: Comparison) -> list[str]:
    """Fill the COMPARISON_COLUMNS."""
    row, other, p = compared.row, compared.other, compared.p
    values = [(key.replace("_", " "), ours, theirs) for key, ours, theirs in differing(row, other)]
    many = len(values) > 3  # the legend has them
    differs = join([key if many else f"{key} {_shown(ours)} instead of {_shown(theirs)}" for key, ours, theirs in values])
    interval = " to ".join(signed(limit) for limit in compared.interval) if compared.interval else "–"
    shown = "–" if p is None else "< 0.001" if p < 0.001 else f"{p:.2g}"
    return [row.name, other.name, differs or "nothing but the name", signed(compared.gain), interval, shown, compared.told]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else str(value).lower()


def findings(rows: Sequence[Row], best: Row | None) -> list[tuple[str, str]]:
    """Write what the numbers carry, and no more: (lead, text)."""
    found, gaps = [], []
    tested, validated = ([row for row in rows if row.accuracies(split)] for split in ("test", "validation"))
    highest = max(tested, key=lambda row: (float(np.mean(row.accuracies("test"))), row is best), default=best)
    if best and highest and highest is not best:
        why = "the choice is made by validation accuracy, so that the test images stay unseen until the end"
        found.append(("Chosen by validation", f"{highest.name} has the highest test accuracy, but {why}."))
    for row in validated:
        kept = [run.metrics[run.result["best_epoch"] - 1] for run in row.done]
        train, seen = (float(np.mean([epoch[f"{part}_accuracy"] for epoch in kept])) for part in ("train", "validation"))
        gaps.append((train - seen, f"{row.name} {train:.1f} against {seen:.1f} % ({signed(train - seen, 1)} points)"))
    if gaps:
        many = len(gaps) > FEW
        shown = join([text for _, text in ((min(gaps), max(gaps)) if many else gaps)])
        text = (
            "A network usually does better on the images that it has learned from. Training against validation accuracy at the "
            f"kept epoch, both as measured while training{'; least and most' if many else ''}: {shown}. Training accuracy is "
            "counted during the epoch, while the network still learns, and, where there is augmentation, on altered images: "
            "on the same ones unaltered it is usually higher, and so is the gap."
        )
        found.append(("Overfitting", text))
    return found


def limits(rows: Sequence[Row], compared: Sequence[Comparison], data: str) -> list[str]:
    """Say what these runs cannot show."""
    single = [row.name for row in rows if len(row.done) == 1]
    epochs = [row.setting.epochs for row in rows]
    said = []
    if any(row.done for row in rows) and not any(row.accuracies("test") for row in rows):
        said.append("No test images: epochs, settings and temperatures were chosen by the same images; expect less of others.")
    if single:
        said.append(f"Only one seed of {named(single)}: how far another one would end from it is not known.")
    sizes = sorted({str(run.environment["world_size"]) for row in rows for run in row.done if "world_size" in run.environment})
    if len(sizes) > 1:
        said.append(f"Not all runs had as many processes ({join(sizes)}; see the last section): differences contain that.")
    mixed = [each for each in compared if each.row.precision != each.other.precision and changes(each.row, each.other)]
    if mixed:
        pairs = named([f"{each.row.name} against {each.other.name}" for each in mixed], "comparisons")
        said.append(f"Not all was computed in the same precision: the differences of {pairs} contain that.")
    if any(each.p is not None for each in compared):
        said.append(
            "An interval that includes 0 does not show that there is no difference. Where both sides have several seeds, the "
            "intervals are of the chance of the seeds alone, which they take as normally distributed; all settings were "
            "measured with the same test images."
        )
    return [
        *said,
        f"Runs of {span(epochs)} epoch{'s' if max(epochs) > 1 else ''}: what helps here may not help in more or fewer.",
        f"One data set: {data}. On other pictures the settings may rank differently.",
    ]


def notes(
    rows: Sequence[Row],
    top: Sequence[Row],
    baseline: Row | None,
    groups: Sequence[Sequence[Row]],
    compared: Sequence[Comparison],
    data: str,
) -> dict[str, str]:
    """Write what stands beside the pictures (the enlarged one shows `top`) and tables, for both forms of the report."""
    lines = objective = enlarged = seeds = once = split = ""
    if any(len({str(run.environment.get("training_sha256")) for run in row.runs}) > 1 for row in rows):
        split = "Each seed holds out other images, the same ones in every setting: bands and ± of validation contain that. "
    if any(len(row.runs) > 1 for row in rows):
        lines = (
            "Lines are means over the seeds, drawn as far as all seeds of a setting ran; bands reach from the lowest to the "
            f"highest seed. {split}"
        )
    if any(row.setting.label_smoothing or "mixup" in row.setting.augmentation for row in rows):
        objective = (
            "With label smoothing or mixed images the training loss contains them; it cannot be compared with the "
            "validation loss, which does not. "
        )
    if len({row.curves("lr").shape[1] for row in rows} - {0}) > 1:
        enlarged = " A dotted line only leads from the end of a curve to its name."
    if any(row.curves("lr").shape[1] >= 40 for row in top):  # in fewer epochs, a twentieth is one
        enlarged += (
            " In the enlarged plot thick lines are running means over a twentieth of the run, in which a jump looks like a "
            "slope that begins before it; thin lines are single epochs."
        )
    if any(each.p is not None for each in compared):
        seeds = (
            "Where both sides have several seeds, interval and p are of Welch's t test, and the last column says whether the "
            "seeds tell the two apart: yes, also when all comparisons of this table are tested at once (Holm's correction, "
            "5 %); by itself only: of twenty such tests of equal settings one is expected to say so; or no. "
        )
    if any(each.single for each in compared):
        once = (
            "With one seed on a side the interval is of the choice of test images alone, as if each side had classified other "
            "ones (that they were the same makes it too wide); another seed may end outside it. "
        )
    alike = [
        f" {first.name} also stands for {join([row.name for row in more])}: nowhere apart by more than a factor of {ALIKE}."
        for first, *more in groups
        if more
    ]
    unfinished = "" if all(row.done for row in rows) else "; of an unfinished setting it is the last of the curve"
    jpeg = (
        "These images are a JPEG-compressed copy. Published CIFAR-10 figures are for the original pixels, which keep "
        "detail that the copy has lost; the two must not be set side by side."
    )
    name = baseline.name if baseline else ""
    twins = sorted({each.other.name for each in compared if each.main} - {name})
    alone = f", or with {join(twins, 'or')} where a setting was computed in that precision" if twins else ""
    return {
        "jpeg": jpeg if data.startswith("CIFAR-10 (JPEG") else "",
        "overview": "The number beside a name is the validation accuracy of the kept weights, measured again in float32: it "
        f"can differ from their dot by some tenths of a point, and lie above the end of the curve{unfinished}.{enlarged}",
        "curves": f"{lines}{objective}A dot is the epoch whose weights were kept. All this was measured while training, in the "
        "run's own precision. The learning rate, below, stands on a logarithmic axis where it falls in steps.",
        "panels": f"Each setting in a panel of its own{f', {baseline.name} in grey' if baseline else ''}: means over the "
        f"seeds, bands from the lowest to the highest. {split}The number is the validation accuracy of the kept "
        f"weights{unfinished}.",
        "nothing": "There is nothing to compare yet: no two settings are finished and tested.",
        "comparisons": f"Points: the difference in test accuracy. The first comparisons are with {name}, which the others vary "
        f"(option --baseline){alone}. {seeds}{once}Where several things differ, a comparison does not tell which of them "
        "did it.",
        "signals": "How signals pass through the networks before the first step: the root mean square of what each block gives "
        "for one batch of training images, and of the loss's gradient there, both logarithmic, one seed each. A "
        f"straight slope is the same factor in every block.{''.join(alike)}",
        "mistakes": "Each with its true class, the class it was taken for, and the probability given to that.",
        "classes": "Accuracy of a class: the share of its images that were classified correctly. Precision: of the images "
        "given this name, the share that deserved it. Both are means over the seeds, where a setting has several.",
        "calibration": "Calibration error: how far, on average, the stated confidence is from the share that is right. Scaled: "
        "with the logits, of which the probabilities are made, divided by the temperature, which validation images gave. All "
        "are means over the seeds.",
        "differences": f"Mean difference in test accuracy against {name}{alone}, with its 95 % interval "
        "(Welch). Filled blue: the seeds tell the two apart, also when all comparisons are tested at once; "
        "hollow: by itself only; grey: they cannot. Settings with one seed stand in the table alone. The axis is "
        "logarithmic beyond 2 points.",
        "command": "This page and every figure on it were written from the saved runs, without training anything, by",
    }


def provenance(row: Row) -> dict[str, str]:
    """List the data, machine and versions of a row."""

    def seen(*keys: str) -> str:
        found = [run.environment for run in row.runs if run.environment]
        values = [[facts[key] for key in keys if key in facts] or ["unknown"] for facts in found]
        texts = [", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in each) for each in values]
        return " or ".join(dict.fromkeys(texts)) or "not begun"

    nothing = "none" if row.done else "none yet"
    exact = "none; each run equals an uninterrupted one on its machine" if any(run.metrics for run in row.runs) else nothing
    marked = [f"seed {run.seed}, {why}" for run in row.runs if (why := run.environment.get("not_bit_exact"))]
    return {
        "Data": seen("data"),
        "Training images": seen("training_images"),
        "Validation images": seen("validation_images"),
        "Test images": span(measured["n"] for measured in row.measured("test")) or nothing,
        "Processor": seen("processor", "instructions"),
        "Device, threads": seen("device", "threads"),
        "Precision": seen("precision"),
        "Processes": seen("world_size"),
        "Framework": row.framework + (f" {seen('tensorflow')}" if row.framework == "TensorFlow" else ""),
        "PyTorch, Python": seen("torch", "python"),
        "Git commit of the code": re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", seen("git_commit")),
        "Not bit-exact": "; ".join(marked) or exact,
    }

"""Saved runs, read and counted: rows of the table with their seeds, spread and tests."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, model_validator

from .errors import printable
from .evaluate import wilson_interval
from .files import read_json, validated
from .run_folder import FAILED, read_metrics
from .settings import Setting

FEW = 6  # settings: their lines can be told apart, all are named, and each is compared with the best
ALIKE = 1.35  # a factor between signals that a plot over orders of magnitude does not show


@dataclass(frozen=True)
class Run:
    """One setting with one seed. `result` is the content of result.json, {} while the run is unfinished or has failed."""

    folder: Path
    setting: Setting
    seed: int
    framework: str  # "PyTorch" or "TensorFlow"
    metrics: list[dict[str, Any]]
    result: dict[str, Any]
    failed: str  # the reason; "" for a run that has not failed
    environment: dict[str, Any]
    signals: NDArray[Any] | None  # [2, blocks] in the untrained network: outputs; gradients, the last block's as 1

    def curve(self, key: str) -> NDArray[Any]:
        """One column of metrics.csv as float [epochs]; NaN where nothing was measured."""
        return np.array([row[key] for row in self.metrics], float)


@dataclass(frozen=True)
class Row:
    """A setting with its runs, ordered by seed; the number, its place in the report, gives its colour in plots of curves."""

    number: int
    name: str
    setting: Setting
    runs: list[Run]

    @property
    def done(self) -> list[Run]:
        """The finished runs: only these count."""
        return [run for run in self.runs if run.result]

    @property
    def signals(self) -> NDArray[Any] | None:
        """Those of the first run that has them."""
        return next((run.signals for run in self.runs if run.signals is not None), None)

    @property
    def framework(self) -> str:
        """What its runs were trained with."""
        return self.runs[0].framework

    @property
    def precision(self) -> str:
        """What its finished runs were computed in; where that is not known, what the setting says."""
        return join(sorted({str(run.environment.get("precision", self.setting.precision)) for run in self.done})) or "auto"

    def measured(self, split: str, seeds: Collection[int] = ()) -> list[dict[str, Any]]:
        """The metrics of each finished run (of these seeds, if any are named) that had such a split."""
        return [run.result[split] for run in self.done if run.result[split] and (not seeds or run.seed in seeds)]

    def accuracies(self, split: str, seeds: Collection[int] = ()) -> list[float]:
        """Percent for each of these."""
        return [metrics["accuracy"] for metrics in self.measured(split, seeds)]

    def curves(self, key: str) -> NDArray[Any]:
        """Stack the finished runs (none: the longest run) as float [runs, epochs], as far as all of them go."""
        columns = [run.curve(key) for run in self.done] or [max((run.curve(key) for run in self.runs), key=len)]
        return np.stack([column[: min(map(len, columns))] for column in columns])


class _Class(BaseModel, strict=True):
    recall: float | None  # of no image
    precision: float | None  # of no image that was taken for it
    n: int


class _Mistake(BaseModel, strict=True):
    label: str
    predicted: str
    probability: float
    png: str


class _Measured(BaseModel, strict=True):  # what is needed of a split; the rest is for readers
    accuracy: float
    n: int
    interval_95: list[float]
    calibration_error: float
    calibration_error_scaled: float
    negative_log_likelihood: float
    negative_log_likelihood_scaled: float
    temperature: float
    per_class: dict[str, _Class]
    confusion: list[list[int]]
    mistakes: list[_Mistake] = []

    @model_validator(mode="after")
    def _is_square(self) -> _Measured:
        if {len(self.confusion), *map(len, self.confusion)} != {len(self.per_class)}:
            raise ValueError("key 'confusion': not as many rows and columns as classes")
        return self


class _Result(BaseModel, strict=True):
    best_epoch: int
    parameters: int
    train_minutes: float
    validation: _Measured | None
    test: _Measured | None


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        ValueError: Naming the damaged file.

    """
    claim = read_json(folder / "setting.json", ("setting", "seed", "framework"))
    if type(claim["seed"]) is not int:
        raise ValueError(f"{folder / 'setting.json'}: damaged: key 'seed'")
    setting = validated(Setting, claim["setting"], f"{folder / 'setting.json'}: damaged")
    result: dict[str, Any] = {}
    if (folder / "result.json").exists():
        result = read_json(folder / "result.json")
        validated(_Result, result, f"{folder / 'result.json'}: damaged")
    has_failed = not result and (folder / FAILED).exists()
    failed = printable(str(read_json(folder / FAILED, ("reason",))["reason"])) if has_failed else ""
    metrics = read_metrics(folder) if result or (folder / "metrics.csv").exists() else []
    if len(metrics) < result.get("best_epoch", 0):
        raise ValueError(f"{folder / 'metrics.csv'}: damaged: epochs are missing")
    environment: dict[str, Any] = {}
    if metrics or (folder / "environment.json").exists():
        environment = read_json(folder / "environment.json", ("data",))
    framework = "TensorFlow" if claim["framework"] == "tensorflow" else "PyTorch"
    signals = _read_signals(folder / "signals.json")
    return Run(folder, setting, claim["seed"], framework, metrics, result, failed, environment, signals)


def _read_signals(file: Path) -> NDArray[Any] | None:
    if not file.exists():
        return None
    found = read_json(file, ("activation", "gradient"))
    try:
        sizes = np.array([found["activation"], found["gradient"]], float).reshape(2, -1)
        sizes[1] /= sizes[1, -1]
        return sizes
    except (TypeError, ValueError, IndexError):
        raise ValueError(f"{file}: damaged: not two lists of numbers, equally long") from None


def read_rows(folders: Sequence[Path]) -> list[Row]:
    """Collect all runs under these folders, one row for each setting.

    Raises:
        ValueError: If a folder holds no run, a run is damaged or there twice, or the runs are on different data.

    """
    files: dict[Path, None] = {}
    for folder in folders:
        found = sorted(folder.rglob("setting.json"), key=lambda file: Path(re.sub(r"\d+", lambda m: m[0].zfill(9), str(file))))
        if not found:
            raise ValueError(f"{folder}: holds no run; allowed: what 'train --out' wrote, or a run folder in it")
        files |= dict.fromkeys(file.resolve() for file in found)
    groups: dict[tuple[str, str], dict[int, Run]] = {}
    for run in (read_run(file.parent) for file in files):
        seeds = groups.setdefault((run.setting.model_dump_json(), run.framework), {})
        if run.seed in seeds:
            raise ValueError(f"{run.folder}: the same setting and seed as {seeds[run.seed].folder}; give one of them")
        seeds[run.seed] = run
    rows = [[seeds[seed] for seed in sorted(seeds)] for seeds in groups.values()]
    _check_same_data([run for runs in rows for run in runs])
    names = [runs[0].setting.name for runs in rows]
    return [
        Row(number, name if names.count(name) == 1 else f"{name} ({_place(runs, rows)})", runs[0].setting, runs)
        for number, (name, runs) in enumerate(zip(names, rows, strict=True))
    ]


def _check_same_data(runs: Sequence[Run]) -> None:
    """Make sure that runs can be compared: one data set by its name, its classes and, where they must be alike, its images."""
    first: dict[str, tuple[Run, Any]] = {}
    for run in (run for run in runs if run.environment):
        held_out = f"training images, seed {run.seed}, {run.setting.validation_size} held out"
        facts = {"data set": run.environment["data"], held_out: run.environment.get("training_sha256")}
        for split in ("validation", "test"):
            if measured := run.result.get(split):
                facts[f"{split} classes"] = list(measured["per_class"])
        if test := run.result.get("test"):
            facts |= {"number of test images": test["n"], "test images": test.get("data_sha256")}
        for what, value in facts.items():
            other, found = first.setdefault(what, (run, value)) if value else (run, value)  # older runs lack checksums
            if found != value:
                raise ValueError(
                    f"{other.folder} and {run.folder} are on different data ({what}: {found}; {value}) and cannot be "
                    "compared; write a report of each"
                )


def _place(runs: Sequence[Run], rows: Sequence[Sequence[Run]]) -> str:
    """Tell a row from another of its name by the framework, or else by its folder, as far as the folders differ, and seeds."""
    run = runs[0]
    alike = [others[0] for others in rows if others[0].setting.name == run.setting.name]
    if len({other.framework for other in alike}) == len(alike):
        return run.framework
    place = str(run.folder.parents[1].relative_to(os.path.commonpath([str(other.folder.parents[1]) for other in alike])))
    place = run.folder.parent.name if place == "." else place
    shared = sum(other.folder.parent == run.folder.parent for other in alike) > 1  # the table was changed between two seeds
    return f"{place}, seed {join([str(each.seed) for each in runs])}" if shared else place


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float] | None:
    """Compare two means whose variances may differ (Welch 1947).

    Returns:
        The p value and the 95 % interval of mean(a) - mean(b); None with a single value or where nothing varies.

    """
    from scipy import stats

    if min(len(a), len(b)) < 2 or max(np.ptp(a), np.ptp(b)) == 0:
        return None
    with warnings.catch_warnings(action="ignore"):  # of equal values on one side
        tested = stats.ttest_ind(a, b, equal_var=False)
    low, high = tested.confidence_interval()
    return float(tested.pvalue), float(low), float(high)


def shared_seeds(rows: Sequence[Row]) -> set[int]:
    """Find the seeds that all validated rows have: each seed holds out other images, so these compare best; may be none."""
    seeds = [{run.seed for run in row.done} for row in rows if row.accuracies("validation")]
    return set.intersection(*seeds) if seeds else set()


def best_of(rows: Sequence[Row]) -> Row | None:
    """Choose by the mean validation accuracy over the shared seeds, or else over all; a single finished row needs no choice."""
    finished, seeds = [row for row in rows if row.done], shared_seeds(rows)
    candidates = [row for row in finished if row.accuracies("validation")] if len(finished) > 1 else finished
    return max(candidates, key=lambda row: float(np.mean(row.accuracies("validation", seeds) or 0)), default=None)


def equal_to(best: Row, rows: Sequence[Row]) -> list[Row]:
    """Find the other rows whose mean validation accuracy, by which the best one was chosen, is as high."""
    seeds = shared_seeds(rows)
    top, *means = (np.mean(row.accuracies("validation", seeds) or np.nan) for row in (best, *rows))
    return [row for row, value in zip(rows, means, strict=True) if row is not best and np.isclose(value, top)]


def differing(a: Row, b: Row) -> list[tuple[str, Any, Any]]:
    """List the keys in which two rows differ, each with the values of both; the precision is the one they were computed in."""
    ours, theirs = (
        row.setting.model_dump(exclude={"name"}) | {"framework": row.framework, "precision": row.precision} for row in (a, b)
    )
    return [(key, ours[key], theirs[key]) for key in ours if ours[key] != theirs[key]]


def changes(a: Row, b: Row) -> int:
    """Count the keys in which two rows differ, but for the precision, which the processor may have chosen."""
    return sum(key != "precision" for key, *_ in differing(a, b))


def baseline_of(rows: Sequence[Row]) -> Row | None:
    """Find the row that the others vary: the one from which they differ in the fewest keys, of equal ones the most usual."""

    def rank(row: Row) -> tuple[int, int]:
        return sum(changes(row, other) for other in rows), len(row.setting.model_dump(exclude_defaults=True))

    return min(rows, key=rank, default=None)


@dataclass
class Comparison:
    """What a setting gained over another, in points of test accuracy, and how sure that is."""

    row: Row
    other: Row
    gain: float
    interval: tuple[float, float] | None = None  # 95 %; None where the seeds of neither vary
    p: float | None = None  # of Welch's test; None without two seeds of each: the interval is of the choice of test images
    stands: bool = False  # p is below 5 % also if all comparisons are tested at once
    main: bool = False  # against the baseline, or against it in the row's own precision

    @property
    def single(self) -> list[str]:
        """Whose one seed leaves no test."""
        return [row.name for row in (self.row, self.other) if len(row.accuracies("test")) < 2]

    @property
    def told(self) -> str:
        """Whether the seeds tell the two apart."""
        if self.p is None:
            return f"one seed of {'each' if self.single[1:] else self.single[0]}" if self.single else "neither's seeds vary"
        return "yes" if self.stands else "by itself only" if self.p < 0.05 else "no"


def compare(row: Row, other: Row, main: bool = False) -> Comparison:
    """Compare two rows that were both tested."""
    a, b = row.accuracies("test"), other.accuracies("test")
    compared = Comparison(row, other, float(np.mean(a) - np.mean(b)), main=main)
    if tested := welch(a, b):
        compared.p, compared.interval = tested[0], tested[1:]
    elif compared.single:
        images, means = row.measured("test")[0]["n"], (float(np.mean(a)), float(np.mean(b)))
        (low, high), (other_low, other_high) = (np.subtract(wilson_interval(mean, images), mean) for mean in means)
        below, above = np.hypot(low, other_high), np.hypot(high, other_low)  # Newcombe 1998, method 10
        compared.interval = (compared.gain - float(below), compared.gain + float(above))
    return compared


def comparisons(rows: Sequence[Row], baseline: Row | None, best: Row | None) -> list[Comparison]:
    """Compare tested rows: each with the baseline and those that it repeats with one more change, of few the best with each.

    A row that was computed in another precision than the baseline is compared with the baseline in that, if there is one.
    Which ones stand the test of all at once is by Holm's correction, 5 % (Holm 1979).
    """
    if baseline is None or not baseline.accuracies("test"):
        return []
    tested_rows = [row for row in rows if row.accuracies("test")]
    count = {row.number: changes(row, baseline) for row in tested_rows}
    same = {row.precision: row for row in tested_rows if not count[row.number]} | {baseline.precision: baseline}
    chosen = best if len(rows) <= FEW else None

    def worth(row: Row, other: Row) -> bool:
        one_more_change = 0 < count[other.number] < count[row.number] and changes(row, other) == 1
        return row is chosen or (other is not chosen and one_more_change)

    found = []
    for row in (row for row in tested_rows if row is not baseline):
        main = same.get(row.precision, baseline) if count[row.number] else baseline
        found += [compare(row, main, main=True)]
        others = [other for other in tested_rows if other.number not in (row.number, main.number, baseline.number)]
        found += [compare(row, other) for other in others if worth(row, other)]
    tested = sorted((each.p, i) for i, each in enumerate(found) if each.p is not None)
    for rank, (p, i) in enumerate(tested):
        if p * (len(tested) - rank) >= 0.05:
            break  # nor does any less sure one stand
        found[i].stands = True
    return sorted(found, key=lambda each: (not each.main, -each.gain))


def _alike(a: Any, b: Any) -> bool:
    return a.shape == b.shape and bool((np.maximum(a, b) <= ALIKE * np.minimum(a, b)).all())


def networks(rows: Sequence[Row]) -> list[list[Row]]:
    """Group the rows whose untrained networks signals pass alike, nowhere different by more than the factor ALIKE."""
    groups: list[list[Row]] = []
    for row in (row for row in rows if row.signals is not None):
        if like := [group for group in groups if _alike(row.signals, group[0].signals)]:
            like[0].append(row)
        else:
            groups.append([row])
    return groups


def spread(values: Sequence[float]) -> str:
    """Write the mean and, from two values on, the sample standard deviation: "92.51 ± 0.12"."""
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def signed(points: float, digits: int = 2) -> str:
    """Write a difference with its sign."""
    return f"{points:+z.{digits}f}".replace("-", "−")


def join(words: Sequence[str], link: str = "and") -> str:
    """Join as in a sentence: "a, b and c", or "a; and b, c" where a word has a comma of its own."""
    nested = len(words) > 1 and any(", " in word for word in words)
    comma, last = ("; ", f"; {link} ") if nested else (", ", f" {link} ")
    return last.join(filter(None, [comma.join(words[:-1]), *words[-1:]]))

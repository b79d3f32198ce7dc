"""How fast it is, as ratios within one run: `make bench`, or bench.py --data DATA for CIFAR-10 itself.

Every contender is a process of its own, so that its peak memory is its own. Those of a group take turns, so that a drift of
the machine hits all alike; the first is the baseline. What this machine cannot show stands as "not measured".
"""

from __future__ import annotations

import argparse
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import contenders as c
import numpy as np
import skimage
import torch
from rich.console import Console
from rich.table import Table

from resnet_cifar10 import files
from resnet_cifar10.data import Split
from resnet_cifar10.machine import environment, has_compiler, pick_device
from resnet_cifar10.settings import Setting, slug
from resnet_cifar10.sources import CIFAR10_CLASSES, load
from resnet_cifar10.study import backend


class Group(NamedTuple):
    """Contenders that take turns, the baseline first."""

    title: str
    seconds: float  # on two cores of an AMD EPYC: how much of the whole it is
    turns: int  # after one that warms up; a single turn has none before it
    contenders: dict[str, partial[None]]


def groups(split: Split, test: Split, data: str, quick: bool, folder: Path) -> tuple[list[Group], dict[str, str]]:
    """Say what is measured, and what this machine cannot show with the reason."""
    steps, turns, singles, side, depths = (2, 1, 10, 256, [8]) if quick else (6, 3, 300, 2048, [20, 32, 56])
    resolve = partial(backend("pytorch").resolve, Setting(name="default"))  # as `train` does
    precision, compiled = resolve("cpu")
    missing, kinds, devices = {}, list(dict.fromkeys([precision, "float32"])), ["cpu", "cuda"]
    if precision != "bfloat16":
        missing["training in bfloat16"] = "no bfloat16 on this processor: float32 measured"
    if pick_device("auto") == "cpu":
        missing["training on a GPU"] = "no GPU here"
        devices.remove("cuda")
    if not data:
        missing["loading of the data, accuracy of int8"] = "they want --data"
    compiler = has_compiler() and not quick
    if not compiler:
        missing["all that is compiled"] = "no C++ compiler, or --quick"
    elif not compiled:
        missing["training on this CPU, compiled"] = "in float32 `train` does not compile"
    compiled = compiled and compiler

    def training(depth: int, device: str) -> Group:
        some = split.subset(torch.arange(c.BATCH * steps * (20 if device == "cuda" else 1)) % len(split))
        found = {"common recipe": partial(c.common_recipe, some, depth, device)}
        kind, usual = resolve(device)
        usual = usual and compiler
        for way in [usual, False] if usual and depth == 32 else [usual]:
            found[f"ours, {kind}{', compiled' if way else ''}"] = partial(c.ours, some, depth, device, kind, way)
        if device == "cpu":
            found["matrix product"] = partial(c.matrix_product, side, kinds)
        return Group(f"training ResNet-{depth}, {device}", 2 * depth, turns, found)

    few, depth, images = split.subset(torch.arange(c.BATCH * steps)), min(32, depths[-1]), test.images.numpy()
    how = few, depth, "cpu", precision
    starts = {f"ours{', compiled' * way}": partial(c.first_step, *how, way) for way in [False] + [True] * compiled}
    ways = {"PyTorch eager": partial(c.inference, images, singles, c.torch_network, False)}
    if compiler:
        ways["PyTorch compiled"] = partial(c.inference, images, singles, c.torch_network, True)
    if compiled:
        ways["PyTorch compiled, bfloat16"] = partial(c.inference, images, singles, c.torch_network, True, True)
    for name, file in ("ONNX Runtime", c.MODEL / "model.onnx"), ("ONNX Runtime, int8", folder / "int8.onnx"):
        ways[name] = partial(c.inference, images, singles, c.onnx_network, file)
    photo = Path(skimage.data_dir) / "rocket.jpg"
    infer = partial(c.program, [sys.executable, "-m", "resnet_cifar10", "infer", photo])
    programs = {
        "python -c 'import torch'": partial(c.program, [sys.executable, "-c", "import torch"]),
        "resnet-cifar10 infer photo.jpg": infer,
        "once started": partial(c.photo, photo, singles),
    }
    readers = {
        "Pillow, one after another": partial(c.loading, data, True),
        "ours": partial(c.loading, data, False),
    }
    return [
        Group("start to first training step", 80, 1, starts),
        *(training(depth, device) for device in devices for depth in depths),
        Group("where a training step goes", 20, 1, {"ours": partial(c.profile, *how, compiled)}),
        Group("evaluation", 40, 1, {"common recipe": partial(c.common_evaluation, test), "ours": partial(c.evaluation, test)}),
        Group("inference", 60, 1 if quick else 5, ways),
        Group("one photo", 15, turns, programs),
        *([Group("loading", 40, turns, readers)] if data else []),
    ], missing


def take_turns(connection: Any, pickled: bytes) -> None:
    """Run one contender in this process."""

    def report(metrics: c.Metrics) -> None:
        connection.send({c.MEMORY: c.peak_memory()} | metrics)
        connection.recv()

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    with suppress(EOFError):  # there is no next turn
        connection.recv()
        pickle.loads(pickled)(report=report)


def measure(group: Group, say: Callable[[str, float], None]) -> dict[str, list[c.Metrics]]:
    """Let the contenders of a group take turns; `say` is given what comes and the part of the group that is done."""
    warm = int(group.turns > 1)
    found: dict[str, list[c.Metrics]] = {name: [] for name in group.contenders}
    lines, processes = {}, []
    try:
        for name, contender in group.contenders.items():
            lines[name], other_end = c.CONTEXT.Pipe()
            processes.append(c.CONTEXT.Process(target=take_turns, args=(other_end, pickle.dumps(contender))))
            processes[-1].start()
            other_end.close()
        for turn in range(warm + group.turns):
            for number, (name, line) in enumerate(lines.items()):
                which = f"turn {turn + 1 - warm} of {group.turns}" if turn >= warm else "warm-up"
                say(f"{group.title}: {name}, {which}", (turn + number / len(lines)) / (warm + group.turns))
                line.send(None)
                found[name].append(line.recv())
    except EOFError:
        raise RuntimeError(f"{group.title}: '{name}' ended early; its message stands above") from None
    finally:
        for line in lines.values():
            line.close()
        for process in processes:
            process.join(5)
            process.kill()
    return {name: turns[warm:] for name, turns in found.items()}


def add_share_of_peak(found: dict[str, list[c.Metrics]]) -> None:
    """Add what part of the same turn's matrix product, of the same type, a training reaches."""
    for name, turns in found.items():
        kind = "bfloat16" if "bfloat16" in name else "float32"
        for turn, peak in zip(turns, found["matrix product"], strict=True):
            if "GFLOP/s" in turn:
                turn[f"% of the {kind} peak"] = 100 * turn.pop("GFLOP/s") / peak[f"{kind} peak, GFLOP/s"]


def summary(group: str, found: dict[str, list[c.Metrics]]) -> list[dict[str, Any]]:
    """Make a row of every measure: median, least, greatest; its peak memory; how many times as fast as the baseline."""
    rows, baseline = [], next(iter(found.values()))
    for name, turns in found.items():
        for measure in (key for key in turns[0] if key != c.MEMORY):
            values, power = [turn[measure] for turn in turns], 1 if measure.endswith("/s") else -1
            compared = turns is not baseline and measure in baseline[0] and "%" not in measure
            ratios = [(turn[measure] / base[measure]) ** power for turn, base in zip(turns, baseline, strict=True) if compared]
            rows.append(
                {
                    "group": group,
                    "contender": name,
                    "measure": measure,
                    "turns": len(turns),
                    "value": [median(values), min(values), max(values)],
                    "times_baseline": [median(ratios), min(ratios), max(ratios)] if ratios else None,
                    "peak_memory_mb": max(turn[c.MEMORY] for turn in turns),
                }
            )
    return rows


def spread(values: list[float] | None) -> str:
    """Write median, least and greatest with three digits."""
    middle, *ends = [f"{float(f'{value:.3g}'):,g}" for value in values or [0]]
    return "" if values is None else middle if len({middle, *ends}) == 1 else f"{middle} ({' to '.join(ends)})"


def show(result: dict[str, Any]) -> str:
    """Print the table, and return it as Markdown."""
    columns = "", "measure", "median (least to greatest)", "times as fast as the first", "peak memory"
    table = Table(*columns, title=result["title"])
    for before, row in zip([None, *result["rows"]], result["rows"], strict=False):
        if before is None or row["group"] != before["group"]:
            table.add_section()
            table.add_row(f"[bold]{row['group']}")
        figures = [spread(row[key]) for key in ("value", "times_baseline")]
        table.add_row("  " + row["contender"], row["measure"], *figures, f"{row['peak_memory_mb']:,.0f} MB")
    console = Console(record=True, width=None if sys.stdout.isatty() else 128)
    console.print(table)
    for what, why in result["not_measured"].items():
        console.print(f"{what}: not measured ({why})")
    for note in result["notes"]:
        console.print(note)
    return f"```\n{console.export_text()}```\n"


def draw(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Draw how many times as fast as its baseline everything is."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["times_baseline"]]
    middle, least, greatest = np.array([row["times_baseline"] for row in rows]).reshape(-1, 3).T
    figure = Figure((9, 1 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['group']}: {row['contender']}\n{row['measure']}" for row in rows]
    axes.barh(labels, middle, xerr=[middle - least, greatest - middle], color="#4477aa", capsize=2)
    axes.axvline(1, color="#222222", linewidth=1)
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="times as fast as the baseline of the group (the line)", title=title)
    figure.savefig(file, dpi=120)


def synthetic(images: int) -> Split:
    """Make images that take as long as those of CIFAR-10."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    return Split(torch.from_numpy(pixels), torch.from_numpy(rng.integers(0, 10, images)), CIFAR10_CLASSES, "made-up images")


def main() -> None:
    """Measure, print the table, and write it as JSON, Markdown and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="", help="CIFAR-10 in any form that 'train' reads; without it, images are made up")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for table and picture")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="only groups whose title holds this word")
    parser.add_argument("--quick", action="store_true", help="the smallest form, for tests: its figures mean nothing")
    args = parser.parse_args()
    started = time.perf_counter()
    split, test = (load(args.data, part, os.cpu_count() or 1) if args.data else synthetic(10_000) for part in ("train", "test"))
    if split is None or test is None:
        raise ValueError(f"--data: {args.data}: training or test images are missing")
    if args.quick:
        test = test.subset(torch.arange(256))
    machine = environment(pick_device("auto"))
    gpu = "" if machine["device"] == "cpu" else f", {machine['device']}"
    title = f"{machine['processor']}, {machine['threads']} threads{gpu}, torch {machine['torch']}, {date.today()}"
    rows, notes = [], [f"data: {split.source}"]
    with tempfile.TemporaryDirectory() as name:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{name}/inductor"  # nothing is compiled yet
        folder = Path(name)
        everything, missing = groups(split, test, args.data, args.quick, folder)
        chosen = [group for group in everything if not args.only or any(word in group.title for word in args.only)]
        if any(group.title == "inference" for group in chosen):
            c.quantise(split.images[: 8 if args.quick else 512].numpy(), folder / "int8.onnx")
            if args.data:
                notes.append(c.int8_accuracy(folder / "int8.onnx", split))
        measuring, before, whole = time.perf_counter(), 0.0, sum(group.seconds for group in chosen)
        for group in chosen:

            def say(text: str, share: float, group: Group = group, before: float = before) -> None:
                done, passed = before + share * group.seconds, time.perf_counter() - measuring
                left = (whole - done) * (passed / done if done else 1)  # at the speed of this machine, once it is known
                print(f"{text}; about {left / 60:.1f} min left", file=sys.stderr, flush=True)

            found = measure(group, say)
            before += group.seconds
            if "matrix product" in found:
                add_share_of_peak(found)
            rows += summary(group.title, found)
        notes.append(f"measured in {(time.perf_counter() - started) / 60:.1f} minutes")

    result = {"title": title, "quick": args.quick, "machine": machine, "rows": rows, "not_measured": missing, "notes": notes}
    file = args.out / f"{date.today()}-{slug(machine['processor'])}"
    files.write_json(file.with_suffix(".json"), result)
    files.write(file.with_suffix(".md"), show(result))
    draw(rows, title, file.with_suffix(".png"))
    print(f"written: {file}.json, .md and .png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

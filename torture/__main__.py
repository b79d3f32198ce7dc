"""The torture suite: python -m torture [--scale 1] [--seed N] [--only ROW ...] [--batch N] [--report FILE] [--broken].

Kills real trainings at random moments and compares the outcome bit for bit; feeds every door damaged and hostile input.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is there: a process with threads must not be forked

import argparse
import datetime
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import onnxscript  # noqa: F401  (the slow imports, once for all the children)
import torch
import torch._dynamo
import torch.onnx._internal.exporter._compat

from resnet_cifar10.machine import environment

from . import inputs, training, web
from .broken import BROKEN
from .harness import HANG_SECONDS, Outcome, Row, run

LINE_SECONDS = 20  # between two lines of progress
IDENTICAL = "final weights and metrics identical, every time"
CLEAR = "a clear line and exit status 2, or the right answer"
CASES = len(training.CANNOT_GO_ON) + 2
ROWS = [
    Row("kill", "SIGKILL at a random moment of training, then resume", IDENTICAL, 200, training.killed_anywhere),
    Row(
        "write",
        "SIGKILL inside a write (opened, half written, before fsync, before and after rename, while pruning)",
        "identical",
        60,
        training.killed_in_a_write,
        batch=6,
        least=6,
    ),
    Row(
        "signal",
        "Ctrl-C or SIGTERM at a random moment, then resume",
        "130 or 143, one line, identical",
        40,
        training.interrupted,
    ),
    Row(
        "checkpoint",
        "newest checkpoint truncated, zeroed, bit-flipped",
        "older one used, said aloud, identical",
        50,
        training.damaged_checkpoint,
    ),
    Row(
        "full",
        "disk full (a small tmpfs) at a random moment",
        "old state intact, clear error, goes on, identical",
        10,
        training.disk_full,
    ),
    Row("read-only", "read-only mount", "old state intact, clear error, goes on, identical", 10, training.read_only),
    Row("file", "path under a file", "old state intact, clear error, goes on, identical", 10, training.under_a_file),
    Row("lock", "two processes on one run folder", "one works, one leaves naming it", 20, training.two_processes),
    Row(
        "refuse",
        "non-finite loss, optimizer state missing, foreign run folder and the like",
        "stops or refuses with the reason",
        CASES,
        training.cannot_go_on,
        batch=CASES,
        least=CASES,
    ),
    Row(
        "settings",
        "settings mutated (typo, type, range, NaN, duplicate, encoding, huge) with hypothesis",
        "line naming file and key, status 2, nothing written",
        5000,
        inputs.settings,
        batch=50,
    ),
    Row(
        "data",
        "data archives truncated, bit-flipped, bombs, links and `..` members, wrong labels, shapes, missing classes",
        "clear error, or images with labels of its classes (damaged archives: the very data); nothing written; memory bounded",
        2000,
        inputs.data,
        batch=100,
        memory_mb=1500,
    ),
    Row(
        "payload",
        "pickles with payloads in CIFAR batches, checkpoints and models, renamed to `.pt`/`.safetensors`",
        "executed: 0",
        len(inputs.PAYLOADS),
        inputs.payloads,
        batch=len(inputs.PAYLOADS),
        least=len(inputs.PAYLOADS),
    ),
    Row(
        "model",
        "safetensors and ONNX model folders mutated",
        "clear error or equal model (`config.json`: no crash)",
        2000,
        inputs.models,
        batch=100,
        memory_mb=1000,
    ),
    Row(
        "photo",
        "photos mutated byte-wise and structurally",
        "a prediction or a clear line; no hang, no crash, memory bounded",
        5000,
        inputs.photos,
        batch=50,
        memory_mb=2000,
    ),
    Row(
        "web",
        "web requests: oversize, chunked, slow, malformed, traversal names, parallel",
        "4xx or an answer; next good request answered",
        2000,
        web.requests,
        batch=200,
    ),
]


def main() -> int:
    """Run the rows and say what came of them: 0 where nothing failed."""
    parser = argparse.ArgumentParser("torture", description=__doc__)
    parser.add_argument(
        "--scale", type=float, default=0.1, help="share of the full counts (1: an hour; default %(default)s: minutes)"
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, other moments and mutations")
    parser.add_argument("--only", choices=[row.key for row in ROWS], action="append", help="only this row; can be repeated")
    parser.add_argument("--batch", type=int, help="only this batch of the row, as printed with a failure")
    parser.add_argument("--report", type=Path, help="write the table to this file too")
    parser.add_argument("--broken", action="store_true", help="then break the product on purpose: each row must notice")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        training.GROUND = training.Ground(work / "ground")
        training.GROUND.build()
        return _torture(work, options) or (_broken(work, options.seed) if options.broken else 0)
    finally:
        for place in work.glob("*/*"):
            if place.is_mount():  # of a trial that was killed
                subprocess.run(["umount", "-l", place], check=False)
        shutil.rmtree(work, ignore_errors=True)


def _torture(work: Path, options: argparse.Namespace) -> int:
    started, outcomes = time.monotonic(), []
    rows = [row for row in ROWS if not options.only or row.key in options.only]
    said = time.monotonic()

    def show(outcome: Outcome) -> None:
        nonlocal said
        if time.monotonic() - said > LINE_SECONDS:
            said = time.monotonic()
            left = outcome.seconds / outcome.reached * (outcome.asked - outcome.reached)
            print(
                f"  {outcome.row.key}: {outcome.reached} of {outcome.asked}, {len(outcome.failures)} failures, "
                f"about {left / 60:.1f} min left of this row",
                flush=True,
            )

    for number, row in enumerate(rows, 1):
        print(f"{number} of {len(rows)}: {row.key}", flush=True)
        count = max(row.least, round(row.full * options.scale))
        outcomes.append(run(row, options.seed, count, work, options.batch, show))
        print(_line(outcomes[-1]), flush=True)
        for failure in outcomes[-1].failures:
            print(f"  FAILED: {failure}", flush=True)
        report = _report(outcomes, len(rows), options, time.monotonic() - started)
        if options.report:
            options.report.write_text(report)
        if outcomes[-1].stopped:
            break
    print(report)
    if outcomes[-1].stopped:
        return 130
    return int(any(outcome.failures for outcome in outcomes))


def _line(outcome: Outcome) -> str:
    counts = f"{outcome.reached} of {outcome.asked} reached, {len(outcome.failures)} failures, {outcome.seconds:.0f} s"
    return f"{outcome.row.key}: {outcome.row.what}: {counts}{_notes(outcome) and '; ' + _notes(outcome)}"


def _notes(outcome: Outcome) -> str:
    if outcome.skipped:
        return f"SKIPPED: {outcome.skipped}"
    if outcome.stopped:
        return "stopped by Ctrl-C"
    return f"peak {outcome.peak_mb:.0f} MB of {outcome.row.memory_mb}" if outcome.row.memory_mb else ""


VERSIONS = ("torch", "numpy", "pillow", "pyarrow", "safetensors", "onnxruntime", "starlette", "uvicorn", "hypothesis")
HEAD = ("what", "must be", "asked", "reached", "failures", "seconds", "note")


def _cells(outcome: Outcome) -> list[str]:
    numbers = (outcome.asked, outcome.reached, len(outcome.failures), round(outcome.seconds))
    return [outcome.row.what, outcome.row.must, *(f"{number:,}" for number in numbers), _notes(outcome)]


def _report(outcomes: list[Outcome], asked: int, options: argparse.Namespace, seconds: float) -> str:
    facts = environment("cpu")
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    rows = [f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD), *map(_cells, outcomes))]
    failures = [f"- {outcome.row.key}: {failure}" for outcome in outcomes for failure in outcome.failures]
    first, unfinished = training.GROUND, outcomes[-1].stopped or len(outcomes) < asked
    return f"""# Reliability

Written by `make torture` on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}: scale {options.scale:g} (1 is the full form), seed
{options.seed}, {seconds / 60:.0f} minutes, commit {facts["git_commit"][:12] or "unknown"}.
{facts["processor"]}, one core of {os.cpu_count()}, {platform.system()} {platform.release()}, Python {facts["python"]};
{versions}.

{chr(10).join(rows)}

{"Failures:" if failures else f"Stopped after {len(outcomes)} of {asked} rows." if unfinished else "No failures."}
{"".join(chr(10) + failure for failure in failures)}
- The training that is killed: ResNet-8, {training.TRAIN_IMAGES} images of handwritten digits, {training.EPOCHS} epochs,
  {first.seconds:.1f} s undisturbed. Nine in ten of the kills put the bytes of the first run's ONNX graph in place of the
  export, with which a run takes {first.whole_seconds:.1f} s; the tenth exports it.
- Identical: every file of the run folder has the same bytes; of `metrics.csv` and `result.json` all but the times. No other
  file is left.
- SIGKILL ends a process, not the machine: what the kernel holds survives it. That a file is on the disk before it is renamed
  is tested by the order of the calls, not by power cuts.
- Memory: how much the resident memory of the process grew at most within one trial. A hang is no answer for
  {HANG_SECONDS} seconds.
- Web requests: limits of the server set to {web.LIMITS}.
"""


def _broken(work: Path, seed: int) -> int:
    """Break one thing after the other in this process, which the trials inherit; its row must fail within some trials."""
    missed = 0
    cases = [(row, *variant) for row in ROWS for variant in BROKEN[row.key]]
    for number, (row, what, put_in) in enumerate(cases):
        (folder := work / f"broken-{number}").mkdir()
        with put_in, patch.object(training, "REAL_EXPORTS", 0):
            outcome = run(row, seed, min(row.full, 2 * row.batch if row.batch > 1 else 30), folder, stop_at_failure=True)
        caught = bool(outcome.failures)
        missed += not (caught or outcome.skipped)
        said = outcome.failures[0].splitlines()[0][:160] if caught else outcome.skipped
        print(
            f"{row.key}: {what}: {'caught' if caught else 'SKIPPED' if outcome.skipped else 'MISSED'} "
            f"after {outcome.reached} trials: {said}",
            flush=True,
        )
    return missed


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

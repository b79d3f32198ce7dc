"""Trials in forked children: everything is imported once, then each batch of trials runs in a process of its own.

A batch is a function of (seed, row, number of the batch) alone, so one command repeats it. A child that hangs, crashes or
takes too much memory costs one failure, and the next batch starts in a fresh one.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from resnet_cifar10.cli import main

HANG_SECONDS = 60  # longer than this without an answer is a failure
BACKSTOP_BYTES = 12 << 30  # of address space, so that a memory bomb ends its trial and not the machine


class Failed(Exception):
    """A trial did not end as it must."""


class Skipped(Exception):
    """This machine can't do what the trial needs."""


def expect(right: object, text: object) -> None:
    """Fail the trial with a text unless something is right."""
    if not right:
        raise Failed(str(text))


@dataclass(frozen=True)
class Row:
    """One row of the table.

    `trials` gets a generator of random numbers, how many trials to do, and a folder; it is a generator that yields once for
    each trial that went well, and raises Failed for one that did not. `full` trials make the full form, and never fewer
    than `least`; `memory_mb` bounds how much the peak of resident memory may grow in a trial.
    """

    key: str
    what: str
    must: str
    full: int
    trials: Callable[[random.Random, int, Path], Iterator[None]]
    batch: int = 1
    least: int = 1
    memory_mb: int | None = None


@dataclass
class Outcome:
    """What came of a row: the counts, the failures in words, seconds and the peak of memory."""

    row: Row
    asked: int
    reached: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_mb: float = 0.0
    skipped: str = ""
    stopped: bool = False


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status (negative: the signal that killed it) and what it printed."""

    status: int
    out: str
    err: str

    def refused(self, status: int, *words: str) -> None:
        """Expect this status and one clear line on standard error with these words."""
        expect(self.status == status, f"exit status {self.status}, not {status}: {self.err[-1500:]}{self.out[-500:]}")
        expect(self.err.startswith("error: ") and self.err.count("\n") == 1, f"not one clear line: {self.err[-1500:]!r}")
        expect(self.err[:-1].isprintable(), f"a terminal would obey {self.err[:300]!r}")
        for word in words:
            expect(word in self.err, f"{word!r} is not named in {self.err!r}")


def call(*arguments: str | Path) -> Ended:
    """Run the command line in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = ["resnet-cifar10", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        status = int(end.code or 0)
    finally:
        sys.argv = before
        for number, handler in handlers.items():  # a stopped command ignores both at its end, as children would then
            signal.signal(number, handler)
    return Ended(status, out.getvalue(), err.getvalue())


class Command:
    """The command line in a forked child."""

    def __init__(self, log: Path, *arguments: str | Path, prepare: Callable[[], None] = lambda: None) -> None:
        """Start it; `prepare` is called in the child first, for example to make it die at a chosen point."""
        self.log, self.started = log, time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 99
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
            sys.stdout, sys.stderr = open(f"{log}.out", "w"), open(f"{log}.err", "w")  # noqa: SIM115  (until the child ends)
            os.dup2(sys.stderr.fileno(), 2)  # for what is written past Python's buffers
            sys.argv = ["resnet-cifar10", *map(str, arguments)]
            prepare()
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def signal(self, number: int) -> None:
        """Send a signal to a child that has not been waited for."""
        os.kill(self.pid, number)

    def end(self, seconds: float = HANG_SECONDS) -> Ended:
        """Wait for its end."""
        limit = time.monotonic() + seconds
        while not (done := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > limit:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Failed(f"no end within {seconds:.0f} seconds")
            time.sleep(0.002)
        out, err = (file.read_text() if (file := Path(f"{self.log}.{kind}")).exists() else "" for kind in ("out", "err"))
        return Ended(os.waitstatus_to_exitcode(done[1]), out, err)


def run(
    row: Row,
    seed: int,
    count: int,
    work: Path,
    only: int | None = None,
    progress: Callable[[Outcome], None] = lambda outcome: None,
    stop_at_failure: bool = False,
) -> Outcome:
    """Run `count` trials of a row, or only one of its batches; Ctrl-C stops it with what was reached."""
    outcome = Outcome(row, count if only is None else row.batch)
    try:
        _run(outcome, seed, work, only, progress, stop_at_failure)
    except KeyboardInterrupt:
        outcome.stopped = True
    return outcome


def _run(
    outcome: Outcome, seed: int, work: Path, only: int | None, progress: Callable[[Outcome], None], stop_at_failure: bool
) -> None:
    row, count, started = outcome.row, outcome.asked, time.monotonic()
    batches = range(-(-count // row.batch)) if only is None else [only]
    for number in batches:
        asked = min(row.batch, count - number * row.batch) if only is None else row.batch
        folder = work / f"{row.key}-{number}"
        folder.mkdir()
        for problem, peak_mb in _batch(row, f"{seed}/{row.key}/{number}", asked, folder):
            outcome.peak_mb = max(outcome.peak_mb, peak_mb)
            if problem.startswith("skipped: "):
                outcome.skipped = problem.removeprefix("skipped: ")
                break
            outcome.reached += 1
            too_much = f"took {peak_mb:.0f} MB, the bound is {row.memory_mb}" if peak_mb > (row.memory_mb or math.inf) else ""
            if problem or too_much:
                text = " ".join((problem or too_much).split())
                outcome.failures.append(f"{text}; again: python -m torture --only {row.key} --seed {seed} --batch {number}")
            outcome.seconds = time.monotonic() - started
            progress(outcome)
            if outcome.failures and stop_at_failure:
                break  # which ends the child
        shutil.rmtree(folder, ignore_errors=True)
        if outcome.skipped or (outcome.failures and stop_at_failure):
            break


def _batch(row: Row, seed: str, count: int, folder: Path) -> Iterator[tuple[str, float]]:
    """Yield ("" or what went wrong, growth of memory in MB) for each trial of a batch; after a failure the batch ends."""
    receive, send = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.close(receive)
        os.setpgid(0, 0)
        _child(row, random.Random(seed), count, folder, send)
    os.close(send)
    trials, left = 0, b""
    try:
        while True:
            ready, _, _ = select.select([receive], [], [], 4 * HANG_SECONDS)
            piece = os.read(receive, 1 << 16) if ready else b""
            if not piece:
                break
            *lines, left = (left + piece).split(b"\n")
            for line in lines:
                trials += 1
                yield tuple(json.loads(line))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        os.close(receive)
    if trials < count and not (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 3):  # 3: it has said why
        hung = not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM)
        reason = f"no answer within {HANG_SECONDS} seconds" if hung else f"its process died: wait status {status}"
        yield f"trial {trials} of the batch: {reason}", 0.0


def _child(row: Row, rng: random.Random, count: int, folder: Path, send: int) -> None:
    if row.memory_mb:
        resource.setrlimit(resource.RLIMIT_AS, (BACKSTOP_BYTES, BACKSTOP_BYTES))
    status, problem, before, trials = 0, "", _reset_peak(), row.trials(rng, count, folder)
    for number in range(count):
        try:
            signal.alarm(0 if row.batch == 1 else HANG_SECONDS)  # a batch of one has limits of its own
            next(trials)
        except Skipped as reason:
            problem, status = f"skipped: {reason}", 3
        except Failed as failure:
            problem, status = f"trial {number} of the batch: {failure}", 3
        except BaseException:
            problem, status = f"trial {number} of the batch: {traceback.format_exc()[-3000:]}", 3
        signal.alarm(0)
        os.write(send, json.dumps([problem, (_memory_kb("VmHWM") - before) / 1024]).encode() + b"\n")
        if status:
            break
        before = _reset_peak()
    os._exit(status)


def _reset_peak() -> int:
    """Forget the peak of this process's resident memory and return what is resident now, in kB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory_kb("VmRSS")


def _memory_kb(kind: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))

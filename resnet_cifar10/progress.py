"""How far a job is, on standard error: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
LINE_SECONDS = 5  # between two lines


def progress(items: Sequence[Item], title: str) -> Iterator[Item]:
    """Yield the items and tell how many are done and how long the others will take."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, title, console=Console(stderr=True), transient=True)
        return
    started = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - said > LINE_SECONDS:
            left = (now - started) / done * (len(items) - done)
            print(f"{title}: {100 * done / len(items):.0f} % done, {left:.0f} s left", file=sys.stderr)
            said = now
        yield item

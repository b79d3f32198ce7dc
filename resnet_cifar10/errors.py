"""What ends a command besides wrong input (ValueError) and files (OSError), Ctrl-C kept away, and messages fit to be shown."""

import re
import reprlib
import signal
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

JOINERS = "\u200c\u200d"  # of letters and of emoji


class JobFailed(Exception):
    """The job can't be done: the loss is no longer finite, another process has ended, no mirror delivers the archive."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, whose number is the argument, ended the training; the run folder holds every whole epoch."""


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Start processes with Ctrl-C blocked, for it would end them with a traceback while Python starts; they may unblock it."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # whose own start would unblock it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def one_line(text: object) -> str:
    """Make a message of another library a short line of printable characters."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))
    return line if len(line) <= 160 else line[:157] + "..."


def printable(text: str) -> str:
    """Put question marks in the place of characters that would move a terminal's cursor or cannot be encoded."""
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c not in JOINERS else c for c in text)


def short(value: object) -> str:
    """Write any value in a few words."""
    try:
        return reprlib.repr(value)
    except ValueError:  # of an int with more digits than Python prints
        return "a huge number"


def markdown(value: Any) -> Any:
    """Escape what Markdown would read as markup; a line break in a table cell becomes <br>."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return re.sub(r"([\\`*<>\[\]|~&$]|(?<!\w)_|_(?!\w))", r"\\\1", value).replace("\n", "<br>")

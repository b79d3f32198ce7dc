"""Requests to the web page that are too large, too slow, malformed, hostile or many at once; on this machine's loopback."""

from __future__ import annotations

import json
import random
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from PIL import Image

from resnet_cifar10.photo import encoded

from . import training
from .harness import expect
from .inputs import TEST, photo

LIMITS = {"SECONDS": 2, "UPLOAD_BYTES": 300_000, "IN_FLIGHT": 6, "FILES": 3}  # tight, so that slow and large are quick to try
SABOTAGE = ""  # put into the server's process by broken.py
ANSWER_SECONDS = 30
GOOD = encoded(Image.fromarray(TEST[0][0]), "PNG")
PATIENCE = 0.5  # seconds in which a request that is whole has an answer, nearly always
SLOW = 0.01  # the share of requests that are never finished: each takes SECONDS


@contextmanager
def running(model: Path, **limits: float) -> Iterator[tuple[int, int]]:
    """Start a server with other limits on a free port: its port and its process id. It must not end with a traceback."""
    code = (
        f"import json, sys; from resnet_cifar10 import serve; vars(serve).update(json.loads(sys.argv[2])); {SABOTAGE}"
        "serve.serve(sys.argv[1], '127.0.0.1', 0)"
    )
    command = [sys.executable, "-c", code, str(model), json.dumps(limits)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            port = re.search(r":(\d+) ", process.stdout.readline())
            expect(port, "the server does not start")
            assert port
            yield int(port[1]), process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        expect("Traceback" not in errors, f"the server printed {errors[-3000:]}")
        expect(process.returncode == -signal.SIGTERM, f"the server ended with {process.returncode}")


def _send(port: int, request: bytes, patience: float = ANSWER_SECONDS) -> bytes:
    """Send bytes and return all that comes back; after so many seconds without an answer, say that no more will come."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_SECONDS) as connection:
        answer = b""
        try:
            connection.sendall(request)
            if not select.select([connection], [], [], patience)[0]:
                connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65_536):
                answer += piece
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has refused, and does not read the rest
        return answer


def _post(
    port: int, body: bytes, kind: str = "application/octet-stream", length: int | str | None = None, extra: str = ""
) -> bytes:
    size = len(body) if length is None else length
    return (
        f"POST /api/classify HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {size}\r\n{extra}\r\n"
    ).encode() + body


def _chunked(rng: random.Random, port: int, body: bytes) -> bytes:
    head = f"POST /api/classify HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    size, pieces = rng.choice((7, 1000, 100_000)), []
    for start in range(0, len(body), size):
        piece = body[start : start + size]
        pieces.append(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
    return head.encode() + b"".join(pieces) + rng.choice((b"0\r\n\r\n", b"0\r\n\r\n", b"zz\r\n", b"ffffffffffffffffff\r\n"))


def form(*files: tuple[str, bytes]) -> tuple[bytes, str]:
    """Write names and contents of files as a form, and its Content-Type."""
    parts = [
        f'--limit\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode() + content + b"\r\n"
        for name, content in files
    ]
    return b"".join(parts) + b"--limit--\r\n", "multipart/form-data; boundary=limit"


def _form(rng: random.Random, files: int) -> tuple[bytes, str]:
    names = (
        "a.jpg",
        "../../etc/passwd",
        "..\\..\\x",
        "/etc/passwd",
        "\x1b[2J",
        '"; filename="b',
        "x" * 5000,
        "",
        "a\0b",
        "%2e%2e%2f",
    )
    body, kind = form(*((rng.choice(names), rng.choice((GOOD, photo(rng), b""))) for _ in range(files)))
    return body, rng.choice((kind,) * 4 + ("multipart/form-data", "multipart/form-data; boundary="))


def _bad(rng: random.Random, port: int) -> bytes:
    """Make one bad request."""
    paths = (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/api/../../x",
        "/api/classify/..",
        "/\0",
        "/" + "a" * 70_000,
    )
    match rng.choice(("photo", "large", "claims", "chunked", "form", "path", "head", "bytes", "host", "method", "kind")):
        case "photo":
            return _post(
                port,
                photo(rng),
                extra=rng.choice(("", "Origin: http://evil.example\r\n", f"Origin: http://localhost:{port}\r\n")),
            )
        case "large":
            return _post(port, bytes(rng.randint(300_001, 2_000_000)))
        case "claims":
            return _post(port, GOOD, length=rng.choice((-1, "1e3", "9" * 30, "5, 6", "", 10, len(GOOD) + 50, "0x10")))
        case "chunked":
            return _chunked(rng, port, rng.choice((GOOD, bytes(400_000), photo(rng))))
        case "form":
            return _post(port, *_form(rng, rng.randint(0, 5)))
        case "path":
            return f"GET {rng.choice(paths)} HTTP/1.1\r\nHost: localhost:{port}\r\nConnection: close\r\n\r\n".encode()
        case "head":
            request = bytearray(_post(port, GOOD))
            for _ in range(rng.randint(1, 5)):
                request[rng.randrange(120)] = rng.randrange(256)
            return bytes(request)
        case "bytes":
            return rng.randbytes(rng.randint(1, 2000)) + b"\r\n\r\n"
        case "host":
            return _post(port, GOOD).replace(
                b"localhost", rng.choice((b"evil.example", b"", b"localhost.evil", b"[::", b"\xff"))
            )
        case "method":
            method = rng.choice(("PUT", "DELETE", "TRACE", "CONNECT", "GET", "\x00", "POST" * 1000))
            return _post(port, GOOD).replace(b"POST", method.encode(), 1)
        case _:
            return _post(
                port,
                GOOD,
                kind=rng.choice(("text/html", "image/../x", "", "application/json", "multipart/mixed", "x" * 60_000)),
            )


def _status(answer: bytes) -> int | None:
    """Read the status and check the answer; None where the server hung up without one."""
    if not answer:
        return None
    head = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    expect(head, f"no HTTP answer: {answer[:200]!r}")
    assert head
    expect(b"root:" not in answer and b"Traceback" not in answer, f"it tells too much: {answer[:500]!r}")
    return int(head[1])


def requests(rng: random.Random, count: int, folder: Path) -> Iterator[None]:
    """Send bad requests, every tenth time eight at once; after each the next good one must be answered."""
    with running(training.GROUND.model, **LIMITS) as (port, _), ThreadPoolExecutor(8) as pool:
        done = 0
        while done < count:
            batch = [_bad(rng, port) for _ in range(1 if rng.random() < 0.9 else min(8, count - done))]
            patience = PATIENCE
            if rng.random() < SLOW:  # never finished
                batch, patience = [_post(port, GOOD, length=len(GOOD) + 1)], ANSWER_SECONDS
            answers = list(pool.map(partial(_send, port, patience=patience), batch))
            for request, answer in zip(batch, answers, strict=True):
                status = _status(answer)
                expect(status is None or status in (200, 503) or 400 <= status < 500, f"status {status} for {request[:300]!r}")
            good = _send(port, _post(port, GOOD))
            expect(
                _status(good) == 200 and b'"probabilities"' in good,
                f"after {batch[0][:200]!r} a good photo gets {good[:300]!r}",
            )
            for _ in batch:
                done += 1
                if done < count:
                    yield
    yield  # the last one once the server has ended without a traceback

"""The web page and its interface: a real server in a process of its own, plain sockets, and a real browser."""

import base64
import io
import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COLOURS, CONFIG, encoded
from PIL import Image

from resnet_cifar10.infer import Classifier
from resnet_cifar10.model import ResNet
from resnet_cifar10.photo import read_photo, views
from resnet_cifar10.serve import serve
from resnet_cifar10.storage import save_model
from torture.inputs import png
from torture.web import form, running

STRICT = {"SECONDS": 3, "UPLOAD_SECONDS": 9, "UPLOAD_BYTES": 1_000_000, "IN_FLIGHT": 4, "FILES": 3, "CONNECTIONS": 40}
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
PHOTO = encoded(PIXELS, "PNG")
RAW = "application/octet-stream"
Answer = tuple[int, dict[str, str], Any]


@pytest.fixture(scope="module")
def port(model: Path) -> Iterator[int]:
    with running(model) as (port, _):
        yield port


@pytest.fixture(scope="module")
def strict(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server with tight limits whose model knows nothing of what it sees."""
    folder = tmp_path_factory.mktemp("strict")
    save_model(folder, ResNet(8, 3), CONFIG | {"rejection_threshold": 1.1, "accuracy": None})
    shutil.copy(model / "model.onnx", folder)
    with running(folder, **STRICT) as (port, _):
        yield port


def ask(port: int, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, {k.lower(): v for k, v in response.headers.items()}, json.loads(content) if is_json else content


def classify(port: int, body: Any = PHOTO, kind: str = RAW, query: str = "") -> Answer:
    return ask(port, "POST", f"/api/classify{query}", body, {"Content-Type": kind})


def good(port: int) -> dict[str, Any]:
    """Send a good photo, again as long as the server says to come back."""
    for _ in range(60):
        status, headers, answer = classify(port)
        if status != 503:
            break
        time.sleep(int(headers["retry-after"]))
    assert status == 200, answer
    assert set(answer["probabilities"]) == set(COLOURS)
    return answer  # type: ignore[no-any-return]


def slow_jpeg() -> bytes:
    """Make a JPEG of nine million pixels with almost as many scans as are allowed: a second or two of work in 40 KB."""
    whole = encoded(np.full((3000, 3000), 128, np.uint8), "JPEG", progressive=True)
    last_scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last_scan * 200 + b"\xff\xd9"


# --- answers ---


def test_the_answer_has_the_fields_of_infer(port: int, model: Path) -> None:
    status, _, raw = classify(port, kind="image/png")
    assert status == 200
    assert list(raw) == ["file", "label", "probabilities", "membership", "rejected"]
    expected = Classifier(model).classify(views(read_photo(io.BytesIO(PHOTO))))
    assert raw["label"] == expected.label
    assert raw["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
    status, _, one = classify(port, *form(("me.png", PHOTO)))
    assert (status, one) == (200, raw | {"file": "me.png"})


def test_several_files_give_a_list_in_their_order_with_the_bad_ones_named(port: int) -> None:
    status, _, answers = classify(port, *form(("a.png", PHOTO), ("b.png", b"dear diary"), ("c.jpg", encoded(PIXELS, "JPEG"))))
    assert status == 200
    assert [answer["file"] for answer in answers] == ["a.png", "b.png", "c.jpg"]
    assert ["error" in answer for answer in answers] == [False, True, False]
    assert answers[1]["error"].startswith("not an image; allowed: ")


def test_the_heat_map_comes_only_when_asked(port: int) -> None:
    _, _, answer = classify(port, query="?explain=1")
    start, _, content = answer["heat_map"].partition(",")
    assert start == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert (picture.format, picture.size) == ("JPEG", (80, 60))
    assert "heat_map" not in classify(port, query="?explain=0")[2]
    assert classify(port, query="?explain=true")[::2] == (400, {"error": "explain=true: allowed are 0 and 1"})


def test_which_model_and_how_good(port: int) -> None:
    status, _, answer = ask(port, "GET", "/api/model")
    assert status == 200
    assert {key: answer[key] for key in ("classes", "data", "accuracy", "architecture")} == {
        key: CONFIG[key] for key in ("classes", "data", "accuracy", "architecture")
    }
    assert ask(port, "GET", "/healthz")[::2] == (200, {"status": "ok"})


# --- what is no photo ---


@pytest.mark.parametrize(
    ("content", "kind", "status", "reason"),
    [
        (b"", RAW, 422, "empty"),
        (b"dear diary", "image/jpeg", 422, "not an image; allowed: JPEG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "image/heic", 422, "HEIC or AVIF; allowed: JPEG"),
        (encoded(PIXELS, "JPEG")[:1500], "image/jpeg", 422, "truncated"),
        (b"GIF89a\x10\x00\x10\x00\x00\x00\x00;", "image/gif", 422, ""),
        (png(60_000, 60_000), "image/png", 422, "pixels"),
        (PHOTO, "application/json", 415, "application/octet-stream"),
        (PHOTO, "application/x-www-form-urlencoded", 415, "multipart/form-data"),
        (*form(("", b"")), 422, "empty"),
        (*form(), 422, "no file"),
        (b'--limit\r\nContent-Disposition: form-data; name="f"\r\n\r\nwords\r\n--limit--\r\n', form()[1], 422, "no file"),
        (form(("a.png", PHOTO))[0], "multipart/form-data", 400, "boundary"),
        (b"no form at all", form()[1], 400, ""),
        (form(("a.png", PHOTO))[0], f"{form()[1]}; charset=undefined", 400, "charset"),
        (form(("a.png", PHOTO))[0][:-500], form()[1], 422, "no file"),
        (*form(*[("a.png", PHOTO)] * 21), 400, "20"),
    ],
)
def test_a_bad_upload_gets_a_sentence_and_the_next_one_an_answer(
    port: int, content: bytes, kind: str, status: int, reason: str
) -> None:
    found, headers, answer = classify(port, content, kind)
    assert (found, headers["content-type"]) == (status, "application/json")
    assert answer["error"].isprintable()
    assert answer["error"]
    assert reason in answer["error"]
    good(port)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\photos\\me.jpg", "me.jpg"),
        ("..", "-"),
        ("/", "-"),
        ("a\tb\u202eexe.jpg", "a?b?exe.jpg"),
        ("x" * 300, "x" * 100),
        ("<b>.png", "<b>.png"),
    ],
)
def test_of_a_file_name_only_the_last_part_comes_back(port: int, name: str, shown: str) -> None:
    assert classify(port, *form((name, PHOTO)))[2]["file"] == shown


def test_pages_that_do_not_exist_and_methods_that_do_not_fit(port: int) -> None:
    assert ask(port, "GET", "/nothing")[::2] == (404, {"error": "Not Found"})
    assert ask(port, "GET", "/api/classify")[0] == 405
    assert ask(port, "GET", "/../serve.py")[0] == 404


# --- size, time and number ---


def test_too_large_is_refused_however_it_is_sent(strict: int) -> None:
    megabytes = bytes(3_000_000)
    chunks = (megabytes[:100_000] for _ in range(30))  # chunked: no Content-Length
    for answer in (classify(strict, megabytes), classify(strict, chunks), classify(strict, *form(("a.jpg", megabytes)))):
        assert answer[::2] == (413, {"error": "at most 1 MB at once; several photos can come one by one"})
    good(strict)


def raw_request(port: int, body: bytes, length: int | str, *, hang_up: bool = False) -> bytes:
    """Send a request with any Content-Length and return all that comes back until the server hangs up."""
    head = f"POST /api/classify HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: {RAW}\r\nContent-Length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        answer = b""
        while not hang_up and (piece := connection.recv(65_536)):
            answer += piece
    return answer


def test_a_lying_content_length_harms_nobody(strict: int) -> None:
    raw_request(strict, PHOTO, len(PHOTO) + 1000, hang_up=True)
    assert raw_request(strict, PHOTO, len(PHOTO) + 1000).startswith(b"HTTP/1.1 408 ")
    more_than_said = raw_request(strict, PHOTO[:1000] + b"no request\r\n\r\n", 1000)
    assert re.findall(rb"HTTP/1.1 (\d+) ", more_than_said) == [b"422", b"400"]
    for nonsense in ("-1", "1e3", "99999999999999999999999", "5, 6"):
        assert raw_request(strict, b"hello", nonsense).startswith(b"HTTP/1.1 400 ")
    good(strict)


def test_an_upload_may_be_slow_but_not_for_ever(strict: int) -> None:
    def four_parts() -> Iterator[bytes]:
        for start in range(0, len(PHOTO), len(PHOTO) // 4 + 1):
            time.sleep(1.2)  # nearly five seconds in all; three without a word are too many
            yield PHOTO[start : start + len(PHOTO) // 4 + 1]

    assert classify(strict, four_parts())[0] == 200
    head = f"POST /api/classify HTTP/1.1\r\nHost: localhost:{strict}\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", strict), timeout=60) as connection:
        connection.sendall(head.encode())
        while not select.select([connection], [], [], 1)[0]:
            connection.sendall(b"x")
        assert b"408" in connection.recv(65_536)[:20]
    good(strict)


def test_what_follows_an_early_answer_ends_the_connection_without_a_traceback(strict: int) -> None:
    head = f"POST /api/classify HTTP/1.1\r\nHost: localhost:{strict}\r\nContent-Type: text/plain\r\n"
    with socket.create_connection(("127.0.0.1", strict), timeout=60) as connection:
        connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        assert connection.recv(65_536).startswith(b"HTTP/1.1 415 ")
        connection.sendall(b"zz\r\n")  # no chunk
        with suppress(ConnectionResetError):
            while connection.recv(65_536):
                pass
    good(strict)


def test_a_body_that_is_no_http_is_answered_once(strict: int) -> None:
    for line in ("GET / ", "POST /api/classify ", "POST /nowhere "):
        with socket.create_connection(("127.0.0.1", strict), timeout=60) as connection:
            head = f"{line}HTTP/1.1\r\nHost: localhost:{strict}\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.sendall(f"{head}zz\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(65_536), b""))
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
    good(strict)


def test_connections_that_ask_for_nothing_are_closed_and_too_many_at_once(strict: int) -> None:
    def closed(connection: socket.socket, within: float) -> bool:
        connection.settimeout(within)
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    started = time.monotonic()
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", strict))) for _ in range(50)]
        for connection in connections:
            with suppress(ConnectionError):
                connection.sendall(b"GET /healthz HT")
        assert all(closed(connection, 60) for connection in connections[40:])
        if time.monotonic() - started < 2:
            assert not any(closed(connection, 0.001) for connection in connections[:10])
        assert all(closed(connection, 60) for connection in connections)
    with socket.create_connection(("127.0.0.1", strict), timeout=60) as connection:
        connection.sendall(f"GET /healthz HTTP/1.1\r\nHost: localhost:{strict}\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65_536)
        connection.sendall(b"GET /healthz HT")
        assert closed(connection, 60)
    good(strict)


def test_a_client_that_reads_no_answer_is_given_up(strict: int) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", strict))
        connection.settimeout(60)
        with pytest.raises(ConnectionError):  # reset, while it still asks for the page
            for _ in range(100_000):
                connection.sendall(f"GET / HTTP/1.1\r\nHost: localhost:{strict}\r\n\r\n".encode())
                time.sleep(0.01)


def test_a_photo_that_takes_too_long_is_given_up(model: Path) -> None:
    with running(model, PHOTO_SECONDS=0.5) as (port, _), ThreadPoolExecutor() as pool:  # as many at once as there are workers
        answers = list(pool.map(lambda _: classify(port, slow_jpeg()), range(2)))
        assert [status for status, _, _ in answers] == [422, 422]
        assert [answer["error"] for _, _, answer in answers] == ["takes longer than 0.5 seconds to read"] * 2
        good(port)


def test_when_all_places_are_taken_the_next_is_told_to_come_back_and_none_is_lost(strict: int) -> None:
    def slow_upload() -> Callable[[], int]:
        connection = HTTPConnection("127.0.0.1", strict, timeout=60)
        connection.putrequest("POST", "/api/classify")
        connection.putheader("Content-Type", RAW)
        connection.putheader("Content-Length", str(len(PHOTO)))
        connection.endheaders(PHOTO[:-1])

        def finish() -> int:
            connection.send(PHOTO[-1:])
            with connection.getresponse() as response:
                status = response.status
            connection.close()
            return status

        return finish

    for _ in range(5):  # on a slow machine the first uploads can be given up before the last one has begun
        uploads = [slow_upload() for _ in range(4)]
        status, headers, answer = classify(strict)
        finished = [finish() for finish in uploads]
        if status == 503 and finished == [200] * 4:
            break
    assert (status, answer, finished) == (503, {"error": "too many photos at once"}, [200] * 4)
    assert int(headers["retry-after"]) >= 1
    good(strict)


def test_of_many_photos_from_32_clients_none_is_lost(model: Path) -> None:
    def client(requests: int) -> list[dict[str, Any]]:
        return [good(port) for _ in range(requests)]

    with running(model, IN_FLIGHT=24) as (port, _), ThreadPoolExecutor(32) as pool:
        answers = [answer for answers in pool.map(client, [4] * 32) for answer in answers]
        assert len(answers) == 128
        assert all(answer == answers[0] for answer in answers)
        assert good(port) == answers[0]
        assert ask(port, "GET", "/healthz")[0] == 200


def read(file: Path) -> str:
    """Read a file of /proc, whose process can end meanwhile."""
    try:
        return file.read_text()
    except OSError:
        return ""


def workers(server: int) -> set[int]:
    """Find the worker processes of a server; a thread of it may have started them."""
    children = " ".join(read(file) for file in Path(f"/proc/{server}/task").glob("*/children")).split()
    return {int(child) for child in children if "spawn_main" in read(Path(f"/proc/{child}/cmdline"))}


def kill(processes: set[int]) -> None:
    """Kill processes and wait until the last thread of each is gone."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    for process in processes:
        while any(") Z" not in stat for stat in map(read, Path(f"/proc/{process}/task").glob("*/stat")) if stat):
            time.sleep(0.01)


def test_a_worker_that_dies_is_replaced_and_all_end_with_the_server(model: Path) -> None:
    with running(model) as (port, server):
        expected = good(port)
        idle = workers(server)
        assert len(idle) == 2
        kill(idle)
        assert [good(port) for _ in range(3)] == [expected] * 3
        with ThreadPoolExecutor() as pool:
            busy = pool.submit(classify, port, slow_jpeg())
            while not busy.done():
                kill(workers(server))
                time.sleep(0.1)
        ended = "its decoder was ended from outside; is there enough memory?"  # as the kernel does where there is not
        assert busy.result()[::2] == (422, {"file": "-", "error": ended})
        assert good(port) == expected
        last = workers(server)
    assert last
    assert not last & idle
    assert not any(Path(f"/proc/{worker}").exists() for worker in last)


# --- other sites ---


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost:{port}", None, 200),
        ("127.0.0.1:{port}", "http://127.0.0.1:{port}", 200),
        ("LOCALHOST:{port}", "http://localhost:{port}", 200),
        ("[::1]:{port}", None, 200),
        ("192.0.2.7:{port}", "http://192.0.2.7:{port}", 200),
        (f"{platform.node()}.local:{{port}}", None, 200),
        ("evil.example", None, 403),
        ("evil.example:{port}", "http://evil.example:{port}", 403),
        ("localhost", None, 200),
        ("localhost:1", "http://localhost:1", 200),
        ("127.0.0.1.evil.example:{port}", None, 403),
        ("", None, 403),
        ("[::", None, 403),
        ("localhost:{port}", "http://evil.example", 403),
        ("localhost:{port}", "null", 403),
        ("localhost:{port}", "", 403),
        ("localhost:{port}", "http://localhost:1", 403),
        ("localhost:{port}", "https://localhost:{port}", 403),
    ],
)
def test_only_this_host_and_the_own_page(port: int, host: str, origin: str | None, status: int) -> None:
    headers = {"Host": host.format(port=port), "Content-Type": RAW}
    if origin is not None:
        headers["Origin"] = origin.format(port=port)
    found, _, answer = ask(port, "POST", "/api/classify", PHOTO, headers)
    assert (found, "error" in answer) == (status, status != 200)
    if origin is None:
        assert ask(port, "GET", "/", None, headers)[0] == status


def test_every_answer_says_what_a_browser_may_do_with_it(port: int) -> None:
    for method, path in (("GET", "/"), ("GET", "/nothing"), ("GET", "/api/model"), ("POST", "/api/classify"), ("PUT", "/")):
        _, headers, _ = ask(port, method, path)
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


# --- starting ---


def test_what_cannot_be_served_is_said_in_one_line(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for name, host, number, reason in (
            ("no-such-model", "127.0.0.1", 0, "no such model"),
            (str(model), "127.0.0.1", port, "in use"),
            (str(model), "192.0.2.1", 0, "192.0.2.1"),
        ):
            with pytest.raises(ValueError, match=reason) as error:
                serve(name, host, number)
            assert str(error.value).isprintable()


def test_ctrl_c_ends_the_server_without_a_word(model: Path) -> None:
    command = [sys.executable, "-m", "resnet_cifar10", "serve", "--model", str(model), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r":(\d+) ", process.stdout.readline())
        assert found
        good(int(found[1]))
        with socket.create_connection(("127.0.0.1", int(found[1]))) as connection:  # a photo is still on its way
            connection.sendall(
                f"POST /api/classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(PHOTO)}\r\n\r\n".encode()
            )
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_ctrl_c_in_a_terminal_reaches_no_worker_that_is_still_starting(model: Path, delay: float) -> None:
    command = [sys.executable, "-m", "resnet_cifar10", "serve", "--model", str(model), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 0


# --- in a browser ---


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with playwright.sync_playwright() as started:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = started.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, port: int, **options: Any) -> Iterator[Any]:
    """Open the page in a fresh window. It must fetch nothing from elsewhere and leave no error but the refused photos'."""
    context = browser.new_context(**options)
    page = context.new_page()
    addresses, errors = [], []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.goto(f"http://localhost:{port}/")
    page.get_by_text("ResNet-8").wait_for()
    yield page
    assert all(re.match(rf"(http|blob:http)://localhost:{port}/|data:", address) for address in addresses)
    assert [error for error in errors if "status of 422" not in error and "status of 503" not in error] == []
    context.close()


def file(name: str, content: bytes = PHOTO) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": content}


def cards(page: Any, count: int) -> list[str]:
    """Wait until so many photos are answered, and return what is written under them."""
    page.locator("#results > li:not([aria-busy])").nth(count - 1).wait_for()
    return page.locator("#results > li").all_inner_texts()  # type: ignore[no-any-return]


def test_a_chosen_photo_is_answered_and_explained(browser: Any, port: int) -> None:
    expected = good(port)
    with opened(browser, port) as page:
        page.get_by_label("Choose photos").set_input_files([file("me.png")])
        (card,) = cards(page, 1)
        verdict = f"{expected['label']}, {round(100 * expected['probabilities'][expected['label']])} %"
        assert page.get_by_role("heading", level=3).inner_text().lower() == verdict
        assert "me.png" in card
        rows = page.get_by_role("list", name="Probability of every class").get_by_role("listitem").all_inner_texts()
        assert [row.split()[0] for row in rows] == sorted(COLOURS, key=lambda name: -expected["probabilities"][name])
        heat = page.get_by_alt_text("bright where it spoke most")
        assert not heat.is_visible()
        page.get_by_role("button", name="Where it looked", pressed=False).click()
        heat.wait_for()
        assert heat.evaluate("image => image.naturalWidth") == 80
        page.get_by_role("button", name="Where it looked", pressed=True).click()
        heat.wait_for(state="hidden")
        about = page.locator("footer").inner_text()
        assert all(part in about for part in ("coloured noise", "81.3 %", "1,600 test images"))
        assert "stay on this machine" in page.locator("body").inner_text()


@pytest.mark.parametrize("kind", ["drop", "paste"])
def test_a_photo_can_be_dropped_and_pasted(browser: Any, port: int, kind: str) -> None:
    empty = """kind => document.body.dispatchEvent(kind === "drop" ? new DragEvent(kind, { dataTransfer: new DataTransfer(),
        bubbles: true }) : new ClipboardEvent(kind, { clipboardData: new DataTransfer(), bubbles: true }))"""
    give = """([kind, bytes]) => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "given.png", { type: "image/png" }));
        document.body.dispatchEvent(kind === "drop" ? new DragEvent(kind, { dataTransfer: data, bubbles: true })
            : new ClipboardEvent(kind, { clipboardData: data, bubbles: true }));
    }"""
    with opened(browser, port) as page:
        page.evaluate(empty, kind)
        page.locator("#note", has_text="That was no file" if kind == "drop" else "holds no picture").wait_for()
        page.evaluate(give, [kind, list(PHOTO)])
        (card,) = cards(page, 1)
        assert not page.locator("#note").is_visible()
        assert "given.png" in card
        assert "%" in card


def test_twelve_at_once_and_a_bad_one_among_them(browser: Any, port: int) -> None:
    names = [f"{i}.png" for i in range(12)]
    with opened(browser, port) as page:
        page.get_by_label("Choose photos").set_input_files(
            [file(name, b"dear diary" if name == "5.png" else PHOTO) for name in names]
        )
        written = cards(page, 12)
        assert [re.search(r"\d+\.png", card)[0] for card in written] == names  # type: ignore[index]
        assert ["%" in card for card in written] == [name != "5.png" for name in names]
        assert "not an image; allowed: JPEG" in written[5].replace("Not", "not")
        announced = page.get_by_role("log").locator("p").all_text_contents()
        assert len(announced) == 12
        assert sum("did not work: not an image" in sentence for sentence in announced) == 1
        page.get_by_role("button", name="Clear").click()
        assert page.locator("#results > li").count() == 0
        assert page.get_by_role("log").locator("p").count() == 0


def test_the_keyboard_is_enough(browser: Any, port: int) -> None:
    with opened(browser, port) as page:
        page.on("filechooser", lambda chooser: None)  # a slow browser catches choosers from here on
        page.keyboard.press("Tab")
        ring = page.locator("#choose + label").evaluate("label => getComputedStyle(label).outlineStyle")
        assert ring == "solid"
        with page.expect_file_chooser() as chooser:
            page.keyboard.press("Enter")
        chooser.value.set_files([file("me.png")])
        cards(page, 1)
        for _ in range(2):  # past "Clear"
            page.keyboard.press("Tab")
        page.keyboard.press("Space")
        page.get_by_role("button", name="Where it looked", pressed=True).wait_for()
        assert page.get_by_alt_text("bright where it spoke most").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_that_is_written_can_be_read(browser: Any, port: int, scheme: str) -> None:
    lowest = """() => {
        const brightness = colour => {
            const parts = colour.match(/[\\d.]+/g).map(part => part / 255);
            const linear = parts.map(part => part <= 0.04 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
            return 0.05 + 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        };
        const paper = element => {
            const colour = getComputedStyle(element).backgroundColor;
            return colour === "rgba(0, 0, 0, 0)" ? paper(element.parentElement) : colour;
        };
        const written = [...document.querySelectorAll("body *")].filter(element => element.checkVisibility()
            && [...element.childNodes].some(node => node.nodeType === Node.TEXT_NODE && node.data.trim()));
        const ratios = written.map(element => brightness(getComputedStyle(element).color) / brightness(paper(element)));
        return [brightness(paper(document.body)), Math.min(...ratios.map(ratio => Math.max(ratio, 1 / ratio)))];
    }"""
    with opened(browser, port, color_scheme=scheme) as page:
        page.get_by_label("Choose photos").set_input_files([file("a.png"), file("b.png", b"dear diary")])
        cards(page, 2)
        paper, contrast = page.evaluate(lowest)
    assert (paper > 0.5) == (scheme == "light")
    assert contrast >= 4.5  # WCAG 2.2, 1.4.3


def test_what_is_none_of_them_is_said_so_even_when_the_server_is_busy(browser: Any, strict: int) -> None:
    with opened(browser, strict, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as page:
        page.get_by_text("Take a photo").wait_for()
        page.get_by_label("Take a photo").set_input_files([file("camera.jpg")])
        page.get_by_label("Choose photos").set_input_files([file("large.jpg", bytes(1_000_001)), file("b.png"), file("c.png")])
        written = cards(page, 4)
        assert ["none of these 3" in card.lower() for card in written] == [False, True, True, True]
        assert ["(most like: " in card for card in written] == [False, True, True, True]
        assert "larger than 1 MB" in written[0].replace("Larger", "larger")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
        inside = """element => {
            const { top, bottom } = element.getBoundingClientRect();
            return top > -1 && bottom < innerHeight + 1;
        }"""
        assert page.locator("#results .picture").first.evaluate(inside)  # after a choice the page shows its first card
        page.locator(".why").last.click()
        assert page.locator(".heat").last.evaluate(inside)
        assert "does not say" in page.locator("footer").inner_text()

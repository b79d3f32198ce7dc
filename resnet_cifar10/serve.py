"""The web page and its JSON interface: photos in, predictions out, nothing stored, nothing fetched from the network.

Photos are decoded in processes of their own, because nothing else can stop a decoder that a file keeps busy, or survive one
that a file crashes.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import platform
import signal
import socket
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from hashlib import sha256
from io import BytesIO
from ipaddress import ip_address
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import h11
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import printable, without_ctrl_c
from .explain import activation, heat_map
from .infer import Classifier
from .photo import encoded, read_photo, views

UPLOAD_BYTES = 20_000_000  # of one request, counted as they arrive
FILES = 20  # of one request
SECONDS = 20.0  # for the next part of a request to come, and to wait for a worker
UPLOAD_SECONDS = 120.0  # for all of a request: 20 MB at 1.4 Mbit/s
PHOTO_SECONDS = 20.0  # of processor time, for each photo
WORKERS = 2  # processes; the largest photo that Pillow lets pass has 89 million pixels: 1.5 GB while it is read
IN_FLIGHT = 40  # requests that are received, waiting or worked on; more are told to come back
CONNECTIONS = 500  # open at once; more are closed, or the system's 1,024 files would be used up
COME_BACK = {"Retry-After": "1"}  # seconds
PAGE = Path(__file__).with_name("page.html")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",  # the page has its own
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def _answer(classifier: Classifier, content: bytes, explain: bool) -> dict[str, Any]:
    try:
        photo = read_photo(BytesIO(content))
    except ValueError as error:
        return {"error": str(error).removeprefix("standard input: ")}
    prediction = classifier.classify(views(photo))
    answer = asdict(prediction)
    if explain:
        picture = encoded(heat_map(photo, activation(classifier, photo, prediction.label)), "JPEG", quality=85)
        answer["heat_map"] = f"data:image/jpeg;base64,{b64encode(picture).decode()}"
    return answer


def _work(pipe: Connection, model: str, seconds: float) -> None:
    """Answer one photo after the other until the pipe closes; a photo that takes too long ends this process."""
    classifier = Classifier(model)
    while True:
        try:
            explain, content = bool(pipe.recv_bytes()), pipe.recv_bytes()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer = _answer(classifier, content, explain)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send_bytes(json.dumps(answer).encode())


class _Worker:
    """A process that classifies; after a photo that takes too long or crashes it comes a new one."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the server's threads and sockets
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, self.model, PHOTO_SECONDS), daemon=True)
        with without_ctrl_c():  # which is for the server
            self.process.start()
        theirs.close()

    def answer(self, content: bytes, explain: bool) -> dict[str, Any]:
        """Classify a photo: the fields of a prediction, or the key "error"."""
        if not self.process.is_alive():
            self.start()
        try:
            self.pipe.send_bytes(b"explain" if explain else b"")
            self.pipe.send_bytes(content)
            return json.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):  # the process has ended
            self.process.join()
            why = {
                -signal.SIGPROF: f"takes longer than {PHOTO_SECONDS:g} seconds to read",
                -signal.SIGKILL: "its decoder was ended from outside; is there enough memory?",
            }
            return {"error": why.get(self.process.exitcode or 0, "damaged: it crashed its decoder")}


class _Upload(Request):
    async def stream(self) -> AsyncIterator[bytes]:  # type: ignore[override]
        received, chunks = 0, super().stream()
        while True:
            async with asyncio.timeout(SECONDS):
                chunk = await anext(chunks, None)
            if chunk is None:
                return
            received += len(chunk)
            if received > UPLOAD_BYTES:
                raise HTTPException(413, f"at most {UPLOAD_BYTES // 1_000_000} MB at once; several photos can come one by one")
            yield chunk


async def _files(request: Request) -> list[tuple[str, bytes]]:
    """Read the files of a request and their names, which are for display only."""
    kind = request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind.startswith("image/") or kind == "application/octet-stream":
        return [("-", await request.body())]
    if kind != "multipart/form-data":
        raise HTTPException(415, f"Content-Type {kind}: allowed are image/*, application/octet-stream, multipart/form-data")
    try:
        form = await request.form(max_files=FILES, max_fields=FILES)
    except UnicodeError:
        raise HTTPException(400, "the form has an unknown charset") from None
    files = [(_shown(value.filename), await value.read()) for _, value in form.multi_items() if isinstance(value, UploadFile)]
    if not files:
        raise HTTPException(422, "the form holds no file")
    return files


def _shown(name: str | None) -> str:
    last = (name or "").replace("\\", "/").rpartition("/")[2]
    return printable(last).strip(". ")[:100] or "-"


def application(model: str, host: str) -> ASGIApp:
    """Make the ASGI application for a model. Host headers with other names than this machine's and `host` are refused.

    Raises:
        ValueError: If the model is missing or damaged.

    """
    config = Classifier(model).config
    MultiPartParser.spool_max_size = UPLOAD_BYTES  # no upload touches the disk
    slots, idle = asyncio.Semaphore(IN_FLIGHT), asyncio.Queue[_Worker]()
    html = PAGE.read_bytes()

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        workers = [_Worker(model) for _ in range(WORKERS)]
        for worker in workers:
            idle.put_nowait(worker)
        yield
        for worker in workers:
            worker.process.kill()
            worker.process.join()

    async def page(_: Request) -> Response:
        return Response(html, media_type="text/html", headers={"Content-Security-Policy": _policy(html)})

    async def about(_: Request) -> Response:
        known = {key: config.get(key) for key in ("architecture", "classes", "data", "accuracy")}
        return JSONResponse({**known, "upload_bytes": UPLOAD_BYTES})

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def classify(request: Request) -> Response:
        if slots.locked():
            raise HTTPException(503, "too many photos at once", COME_BACK)
        if (explain := request.query_params.get("explain", "0")) not in ("0", "1"):
            raise HTTPException(400, f"explain={printable(explain)[:20]}: allowed are 0 and 1")
        async with slots:
            try:
                async with asyncio.timeout(UPLOAD_SECONDS):
                    files = await _files(_Upload(request.scope, request.receive))
            except TimeoutError:
                reason = f"too slow: allowed are {SECONDS:g} seconds until more comes, and {UPLOAD_SECONDS:g} for all"
                raise HTTPException(408, reason, {"Connection": "close"}) from None
            answers = [{"file": name, **await answer(request, content, explain == "1")} for name, content in files]
        if len(answers) > 1:
            return JSONResponse(answers)
        return JSONResponse(answers[0], 422 if "error" in answers[0] else 200)

    async def answer(request: Request, content: bytes, explain: bool) -> dict[str, Any]:
        try:
            async with asyncio.timeout(SECONDS):
                worker = await idle.get()
        except TimeoutError:
            raise HTTPException(503, "too much to do at once", COME_BACK) from None
        try:
            if await request.is_disconnected():  # while it waited
                raise ClientDisconnect
            return await asyncio.to_thread(worker.answer, content, explain)
        finally:
            idle.put_nowait(worker)

    async def refuse(_: Request, error: Exception) -> Response:
        if isinstance(error, ClientDisconnect):
            return Response(status_code=400)  # for nobody
        assert isinstance(error, HTTPException)
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    routes = [
        Route("/", page),
        Route("/api/classify", classify, methods=["POST"]),
        Route("/api/model", about),
        Route("/healthz", health),
    ]
    handlers: Any = {HTTPException: refuse, ClientDisconnect: refuse}
    return _guarded(Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan), host)


def _policy(html: bytes) -> str:
    """Allow the page its own style and script, pictures that it has, requests to this server, and nothing else."""
    inline = (html.partition(b"<%b>" % tag)[2].partition(b"</%b>" % tag)[0] for tag in (b"style", b"script"))
    style, script = (b64encode(sha256(part).digest()).decode() for part in inline)
    return (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; img-src blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _guarded(app: ASGIApp, host: str) -> ASGIApp:
    """Refuse other host names (DNS rebinding) and what other sites' pages send; add the headers to every answer."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = _refusal(scope, host) if scope["type"] == "http" else None
        await (JSONResponse({"error": refusal}, 403) if refusal else app)(scope, receive, send_with_headers)

    return guarded


def _refusal(scope: Scope, host: str) -> str | None:
    headers = Headers(scope=scope)
    here, origin = headers.get("host", "").lower(), headers.get("origin")
    if not _is_ours(here, host):
        return f"Host {here}: this server is {_in_url(scope['server'][0].removeprefix('::ffff:'))}"
    if scope["method"] == "POST" and origin is not None and origin.lower() != f"http://{here}":
        return f"Origin {origin}: only this server's own page may send photos"
    return None


def _is_ours(here: str, host: str) -> bool:
    """Say whether a Host header has a name of this machine, or any address: a rebound name is no address."""
    try:
        name = urlsplit(f"//{here}").hostname or ""  # the port may be another one, where it is forwarded
        ours = ("localhost", platform.node().lower(), host.lower())
        return name.removesuffix(".local") in ours or name in ours or bool(ip_address(name))
    except ValueError:
        return False


def _in_url(address: str) -> str:
    return f"[{address}]" if ":" in address else address


class _Connection(H11Protocol):
    """A connection that is given up where the head of the next request, or a reader of an answer, takes too long."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._limit_time_to_next_request()
        if len(self.connections) > CONNECTIONS:
            transport.abort()

    def on_response_complete(self) -> None:
        self._limit_time_to_next_request()  # first, for the next request may have come already
        super().on_response_complete()

    def _limit_time_to_next_request(self) -> None:
        cycle = self.cycle
        self._give_up_if(lambda: self.cycle is cycle)  # it becomes another one as soon as a request has begun

    def pause_writing(self) -> None:
        super().pause_writing()
        self._give_up_if(lambda: self.flow.write_paused)

    def _give_up_if(self, stuck: Callable[[], bool]) -> None:
        self.loop.call_later(SECONDS, lambda: self.transport.abort() if stuck() else None)

    def send_400_response(self, msg: str) -> None:
        if self.cycle:
            self.cycle.disconnected = True  # the application's own answer would be a second one
        super().send_400_response(msg)

    def data_received(self, data: bytes) -> None:
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # what follows an early answer is no HTTP, and cannot be answered any more
            self.transport.abort()


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets
        address, port, *_ = sockets[0].getsockname()
        everywhere = ip_address(address).is_unspecified  # it stands for all addresses of this machine
        print(f"Open http://{'localhost' if everywhere else _in_url(self.config.host)}:{port} in a browser; Ctrl-C ends it.")
        if everywhere:
            print(f"Other devices open http://ADDRESS:{port} with this machine's address; all who reach it can use it.")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.force_exit = False  # which a second Ctrl-C would make it: then it waits for the photos that are being read

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # a request that is cut off is no error now
        await super().shutdown(sockets)


def serve(model: str, host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM; port 0 takes a free one.

    Raises:
        ValueError: If the model is missing or damaged, or the address cannot be used.

    """
    app = application(model, host)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)  # asyncio forgets it here: 40 ms an answer
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        raise ValueError(f"--host, --port: found {host}, {port}: {reason}; allowed: free ones of this machine") from None
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a bad form is its client's concern
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # by which uvicorn ends, and then raises it again
    config = uvicorn.Config(
        app,
        host,
        http=_Connection,
        ws="none",
        log_level="error",  # a warning is of what a client sent
        server_header=False,
        backlog=100,  # connections that asyncio accepts at once
        timeout_graceful_shutdown=3,
    )
    _Server(config).run(sockets=[listener])

"""Load the web page's interface: 32 clients send one photo 500 times in all; prints times and the peak memory of the server.

Call it as python benchmarks/page_load.py PHOTO.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy as np

CLIENTS, REQUESTS = 32, 500


def client(number: int, port: int, photo: bytes) -> list[float]:
    """Send a client's share of the requests, each again when the server says to come back; seconds of each."""
    found = []
    for _ in range(number, REQUESTS, CLIENTS):
        started, status = time.perf_counter(), 503
        while status == 503:
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("POST", "/api/classify?explain=1", photo, {"Content-Type": "image/jpeg"})
            status = connection.getresponse().status
            connection.close()
            time.sleep(status == 503)
        assert status == 200, status
        found.append(time.perf_counter() - started)
    return found


def peak_memory(process: int) -> int:
    """Sum the peak memory of a process and its children, in kilobytes; pages that they share count in each."""
    own = int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process}/status").read_text())[1])  # type: ignore[index]
    children = " ".join(file.read_text() for file in Path(f"/proc/{process}/task").glob("*/children")).split()
    return own + sum(peak_memory(int(child)) for child in children)


def main() -> None:
    """Start the server on a free port, load it and print one line."""
    photo = Path(sys.argv[1]).read_bytes()
    command = [sys.executable, "-m", "resnet_cifar10", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        port = int(re.search(r":(\d+) in", server.stdout.readline())[1])  # type: ignore[index]
        started = time.perf_counter()
        try:
            with ThreadPoolExecutor(CLIENTS) as pool:
                times = np.concatenate(list(pool.map(lambda number: client(number, port, photo), range(CLIENTS))))
            seconds, memory = time.perf_counter() - started, peak_memory(server.pid)
        finally:
            server.terminate()
    p50, p99 = np.quantile(times, (0.5, 0.99))
    print(
        f"{len(times)} requests, {CLIENTS} clients, none lost: {seconds:.1f} s; p50 {p50:.2f} s, p99 {p99:.2f} s; "
        f"peak memory {memory / 1000:.0f} MB (server and workers)"
    )


if __name__ == "__main__":
    main()

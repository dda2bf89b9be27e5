"""A real `flawsmith serve` in a process of its own, images in many formats, and how to ask."""

import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PREDICT = "/v1/predict"
COMMAND = (str(Path(sys.executable).with_name("flawsmith")), "serve")


def plate(defect: bool = True) -> NDArray[np.uint8]:
    """48 x 64, dark, with a brighter field if `defect`."""
    pixels = np.random.default_rng(0).integers(20, 60, (48, 64, 3), np.uint8)
    if defect:
        pixels[10:20, 30:50] = 220
    return pixels


def encoded(pixels: NDArray[Any] | Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(stream, format=form, **options)
    return stream.getvalue()


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 0

    def connect(self, timeout: float = 60) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=timeout)

    def ask(
        self, path: str = PREDICT, body: bytes | None = None, kind: str = "image/png", method: str = "", **headers: str
    ) -> Reply:
        connection = self.connect()
        try:
            sent = {"Content-Type": kind} if body is not None else {}
            connection.request(method or ("GET" if body is None else "POST"), path, body, sent | headers)
            answer = connection.getresponse()
            return Reply(answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()})
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """The value of a metric, with its labels as Prometheus writes them; 0 if it is not there."""
        for line in self.ask("/metrics").body.decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def wait_for(self, what: str, value: float, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while self.metric(what) != value:
            assert time.monotonic() < end, f"{what} is {self.metric(what)}, not {value}"
            time.sleep(0.05)


@contextmanager
def serving(*arguments: str | Path, folder: Path | None = None, **environment: str) -> Iterator[Server]:
    command = [*COMMAND, *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+:\d+", line)
        if found is None:
            _, told = process.communicate(timeout=30)
            raise AssertionError(f"no server: {line}{told}")
        yield Server(process, found.group())
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@contextmanager
def asking(server: Server, body: bytes, clients: int) -> Iterator[list[Reply]]:
    """Clients that ask without a pause until the block ends; their replies are complete then."""
    stop = threading.Event()
    replies: list[Reply] = []

    def client() -> None:
        while not stop.is_set():
            replies.append(server.ask(body=body))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield replies
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def form(content: bytes, field: str = "image", boundary: str = "edge") -> tuple[bytes, str]:
    """A multipart form with one file, and its content type."""
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{field}"; filename="a.png"\r\n\r\n'
    return head.encode() + content + f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"

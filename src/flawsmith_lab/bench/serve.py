"""Load on the web service over loopback: answers a second, p50, p95 and p99, refusals, and whether its memory grows.

    python -m flawsmith_lab.bench.serve MODEL IMAGE... [--clients 30] [--seconds 60]        (make bench-serve)

Each client keeps one connection and sends the next image when it has its answer, so there are always as many requests
as clients; beyond the service's queue they are answered with 429, which counts as no error. Half way through, MODEL is
written anew, which exchanges the model under full load. Clients run in the machine's own cores, beside the service.
The last line of stdout is JSON.
"""

import argparse
import http.client
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil

from flawsmith.devices import Compute
from flawsmith.errors import FlawsmithError, UserError
from flawsmith_lab.bench.measure import Target, describe, finish, guarded, machine

PREDICT = "/v1/predict"
GROWTH = 50.0  # MB that the service may grow by between the first and the last third of the load
SAMPLE_SECONDS = 0.5


@dataclass
class Load:
    """What clients saw; each has its own, so that none waits for another."""

    seconds: list[float] = field(default_factory=list)  # of answers with a verdict
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)  # no answer at all


def load(address: tuple[str, int], images: Sequence[bytes], clients: int, until: float) -> Load:
    """Ask from `clients` threads until the monotonic time `until`."""
    loads = [Load() for _ in range(clients)]
    threads = [
        threading.Thread(target=_client, args=(address, images, number, until, one))
        for number, one in enumerate(loads)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = Load()
    for one in loads:
        total.seconds += one.seconds
        total.statuses += one.statuses
        total.failures += one.failures
    return total


def _client(address: tuple[str, int], images: Sequence[bytes], number: int, until: float, seen: Load) -> None:
    connection = http.client.HTTPConnection(*address, timeout=60)
    turn = number
    while time.monotonic() < until:
        turn += 1
        began = time.perf_counter()
        try:
            connection.request("POST", PREDICT, images[turn % len(images)], {"Content-Type": "image/png"})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            seen.failures.append(f"{type(error).__name__}: {error}")
            connection.close()
            continue
        seen.statuses[answer.status] += 1
        if answer.status == 200:
            seen.seconds.append(time.perf_counter() - began)
        elif answer.status == 429:
            time.sleep(0.05)  # far sooner than Retry-After asks for
    connection.close()


@contextmanager
def service(model: Path, options: Sequence[str]) -> Iterator[tuple[tuple[str, int], psutil.Process]]:
    """A `flawsmith serve` in a process of its own: its address, and itself."""
    command = [str(Path(sys.executable).with_name("flawsmith")), "serve", str(model), "--port", "0", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http://\S+:\d+", process.stdout.readline() if process.stdout else "")
        if found is None:
            raise FlawsmithError("The service did not start; its reason stands above.")
        parts = urlsplit(found.group())
        yield (parts.hostname or "", parts.port or 0), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.communicate(timeout=60)


def watch(process: psutil.Process, stop: threading.Event) -> list[float]:
    """Resident megabytes of the service every SAMPLE_SECONDS until `stop`."""
    samples = []
    while not stop.wait(SAMPLE_SECONDS):
        samples.append(process.memory_info().rss / 1e6)
    return samples


def growth(samples: Sequence[float]) -> float:
    """Median of the last third minus that of the first: what a leak would show, and a single large image would not."""
    third = max(1, len(samples) // 3)
    return float(np.median(samples[-third:]) - np.median(samples[:third]))


def count_exchanges(address: tuple[str, int]) -> int:
    """How often the service has changed its model, the first one not counted."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    found = re.search(r'^flawsmith_model_changes_total\{outcome="done"\} (\S+)', page, re.MULTILINE)
    return int(float(found.group(1))) - 1 if found else 0


def _rewrite(model: Path, after: float) -> threading.Timer:
    """Put the same model in its own place after some seconds: the service takes it for another."""

    def act() -> None:
        other = model.with_name("other.onnx")
        shutil.copyfile(model, other)
        other.replace(model)

    timer = threading.Timer(after, act)
    timer.start()
    return timer


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the service, print what it took, and end with the JSON line.

    Raises:
        UserError: the model or an image is missing.
    """
    parser = argparse.ArgumentParser(prog="flawsmith_lab.bench.serve", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="a model.onnx of the export stage")
    parser.add_argument("images", type=Path, nargs="+", help="image files that are sent in turns")
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--without-exchange", action="store_true", help="leave the model in its place all the while")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workers", default="2", help="images judged at once; default: %(default)s")
    parser.add_argument("--threads", default="1", help="threads of one run; default: %(default)s")
    parser.add_argument("--queue", default="16", help="requests that wait; default: %(default)s")
    chosen = parser.parse_args(arguments)
    for path in (chosen.model, *chosen.images):
        if not path.is_file():
            raise UserError(f"{path} does not exist; name a model.onnx and image files.")
    images = [path.read_bytes() for path in chosen.images]
    found: dict[str, Any] = {"benchmark": "serve", "machine": machine(Compute.choose())}
    print(describe(found["machine"]))
    options = ["--workers", chosen.workers, "--threads", chosen.threads, "--queue", chosen.queue, "--poll", "0.5"]
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copy(chosen.model, Path(folder) / "model.onnx"))
        with service(model, options) as (address, process):
            load(address, images, chosen.clients, time.monotonic() + min(5.0, chosen.seconds))  # warm
            stop = threading.Event()
            watcher = threading.Thread(target=lambda: memory.extend(watch(process, stop)))
            watcher.start()
            timer = None if chosen.without_exchange else _rewrite(model, chosen.seconds / 2)
            began = time.monotonic()
            seen = load(address, images, chosen.clients, began + chosen.seconds)
            wall = time.monotonic() - began
            stop.set()
            watcher.join()
            if timer is not None:
                timer.join()
            exchanges = count_exchanges(address)
    p50, p95, p99 = (float(value) for value in np.percentile(np.array(seen.seconds or [0.0]) * 1000, (50, 95, 99)))
    errors = sum(count for status, count in seen.statuses.items() if status not in (200, 429)) + len(seen.failures)
    found |= {
        "clients": chosen.clients, "seconds": wall, "workers": int(chosen.workers), "threads": int(chosen.threads),
        "queue": int(chosen.queue), "answers_per_second": len(seen.seconds) / wall, "p50_ms": p50, "p95_ms": p95,
        "p99_ms": p99, "statuses": {str(key): count for key, count in sorted(seen.statuses.items())},
        "model_exchanges": exchanges, "errors": errors, "failures": seen.failures[:5],
        "memory_mb": float(np.median(memory or [0.0])), "memory_growth_mb": growth(memory or [0.0]),
    }  # fmt: skip
    print(f"{found['answers_per_second']:.1f} verdicts a second; p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms")
    print(f"statuses {found['statuses']}, {len(seen.failures)} without an answer, model exchanges: {exchanges}")
    print(Target("errors other than 429", -errors, 0).sentence())
    print(Target("memory growth in MB, negative", -found["memory_growth_mb"], -GROWTH).sentence())
    finish(found)


if __name__ == "__main__":
    guarded(main, "bench-serve")

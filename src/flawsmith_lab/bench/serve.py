"""Load on the web service over loopback: answers a second, p50, p95 and p99, refusals, and whether its memory grows.

    python -m flawsmith_lab.bench.serve MODEL IMAGE... [--clients 30] [--seconds 60]        (make bench-serve)

Each client keeps one connection and sends the next image when it has its answer. Half way through, MODEL is written
anew, which exchanges the model under full load.
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
from concurrent.futures import ThreadPoolExecutor
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

GROWTH = 50.0  # MB that the service may grow by between the first and the last third of the load
SAMPLE_SECONDS = 0.5
Address = tuple[str, int]


@dataclass
class Load:
    """What clients saw."""

    seconds: list[float] = field(default_factory=list)  # of answers with a verdict
    statuses: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)  # no answer at all


def load(address: Address, images: Sequence[bytes], clients: int, until: float) -> Load:
    """Ask from `clients` threads until the monotonic time `until`."""
    total = Load()
    with ThreadPoolExecutor(clients) as pool:
        for one in pool.map(lambda number: _client(address, images, number, until), range(clients)):
            total.seconds += one.seconds
            total.statuses += one.statuses
            total.failures += one.failures
    return total


def _client(address: Address, images: Sequence[bytes], turn: int, until: float) -> Load:
    connection, seen = http.client.HTTPConnection(*address, timeout=60), Load()
    while time.monotonic() < until:
        turn += 1
        began = time.perf_counter()
        try:
            connection.request("POST", "/v1/predict", images[turn % len(images)], {"Content-Type": "image/png"})
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
    return seen


@contextmanager
def service(model: Path, options: Sequence[str]) -> Iterator[tuple[Address, psutil.Process]]:
    """Run a `flawsmith serve` in a process of its own; yield its address, and itself.

    Raises:
        FlawsmithError: it did not start.
    """
    command = [str(Path(sys.executable).with_name("flawsmith")), "serve", str(model), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            found = re.search(r"http://\S+:\d+", process.stdout.readline() if process.stdout else "")
            if found is None:
                raise FlawsmithError("The service did not start; its reason stands above.")
            parts = urlsplit(found.group())
            yield (parts.hostname or "", parts.port or 0), psutil.Process(process.pid)
        finally:
            process.terminate()


def watch(process: psutil.Process, stop: threading.Event) -> list[float]:
    """Sample the service's resident megabytes every SAMPLE_SECONDS until `stop`."""
    samples = []
    while not stop.wait(SAMPLE_SECONDS):
        samples.append(process.memory_info().rss / 1e6)
    return samples or [0.0]


def growth(samples: Sequence[float]) -> float:
    """Median of the last third minus that of the first: what a leak would show, and a single large image would not."""
    third = max(1, len(samples) // 3)
    return float(np.median(samples[-third:]) - np.median(samples[:third]))


def count_exchanges(address: Address) -> int:
    """Ask the service how often it has changed its model, the first one not counted."""
    connection = http.client.HTTPConnection(*address, timeout=60)
    connection.request("GET", "/metrics")
    page = connection.getresponse().read().decode()
    connection.close()
    found = re.search(r'^flawsmith_model_changes_total\{outcome="done"\} (\S+)', page, re.MULTILINE)
    return int(float(found.group(1))) - 1 if found else 0


def rewrite(model: Path) -> None:
    """Put the same model in its own place: the service takes it for another."""
    Path(shutil.copyfile(model, model.with_name("other.onnx"))).replace(model)


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
    parser.add_argument("--workers", type=int, default=2, help="images judged at once; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="threads of one run; default: %(default)s")
    parser.add_argument("--queue", type=int, default=16, help="requests that wait; default: %(default)s")
    chosen = parser.parse_args(arguments)
    for path in (chosen.model, *chosen.images):
        if not path.is_file():
            raise UserError(f"{path} does not exist; name a model.onnx and image files.")
    images = [path.read_bytes() for path in chosen.images]
    found: dict[str, Any] = {"benchmark": "serve", "machine": machine(Compute.choose())}
    print(describe(found["machine"]))
    options = [f"--{name}={getattr(chosen, name)}" for name in ("workers", "threads", "queue")]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as beside:
        model = Path(shutil.copy(chosen.model, Path(folder) / "model.onnx"))
        with service(model, [*options, "--poll=0.5"]) as (address, process):
            load(address, images, chosen.clients, time.monotonic() + min(5.0, chosen.seconds))  # warm
            stop, began = threading.Event(), time.monotonic()
            watched = beside.submit(watch, process, stop)
            exchange = threading.Timer(chosen.seconds / 2, rewrite, [model])
            if not chosen.without_exchange:
                exchange.start()
            seen = load(address, images, chosen.clients, began + chosen.seconds)
            wall = time.monotonic() - began
            stop.set()
            memory = watched.result()
            exchanges = count_exchanges(address)
    p50, p95, p99 = (float(value) for value in np.percentile(np.array(seen.seconds or [0.0]) * 1000, (50, 95, 99)))
    errors = sum(count for status, count in seen.statuses.items() if status not in (200, 429)) + len(seen.failures)
    found |= {
        "clients": chosen.clients, "seconds": wall, "workers": chosen.workers, "threads": chosen.threads,
        "queue": chosen.queue, "answers_per_second": len(seen.seconds) / wall, "p50_ms": p50, "p95_ms": p95,
        "p99_ms": p99, "statuses": {str(key): count for key, count in sorted(seen.statuses.items())},
        "model_exchanges": exchanges, "errors": errors, "failures": seen.failures[:5],
        "memory_mb": float(np.median(memory)), "memory_growth_mb": growth(memory),
    }  # fmt: skip
    print(f"{found['answers_per_second']:.1f} verdicts a second; p50 {p50:.0f} ms, p95 {p95:.0f} ms, p99 {p99:.0f} ms")
    print(f"statuses {found['statuses']}, {len(seen.failures)} without an answer, model exchanges: {exchanges}")
    print(Target("errors other than 429", -errors, 0).sentence())
    print(Target("memory growth in MB, negative", -found["memory_growth_mb"], -GROWTH).sentence())
    finish(found)


if __name__ == "__main__":
    guarded(main, "bench-serve")

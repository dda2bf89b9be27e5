"""What the stack's tests share: settings of servers, workers that come and go, other folders' modules."""

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from flows.stack import Stack

# A heartbeat comes each 30 s, Prefect's least; a run that has none for FLAWSMITH_HEARTBEAT_WINDOW seconds has crashed.
# The server's loops are shortened so that a test does not wait for them.
FAST = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "5",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "5",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "FLAWSMITH_HEARTBEAT_WINDOW": "75",
    "OMP_NUM_THREADS": "1",
}


@contextlib.contextmanager
def at_work(stack: Stack, *checkouts: Any) -> Iterator[None]:
    """Workers `gpu-N`, one a checkout, and `control` in the first, and a server on which set-up has run."""
    stack.checkouts = [checkout.folder for checkout in checkouts]
    stack.up()
    try:
        yield
    finally:
        stack.checkouts = []
        stack.up(setup=False)


def kill(stack: Stack, name: str) -> None:
    """SIGKILL a program with all its children, as when its machine loses power; supervisord starts it again."""
    family = stack.supervisor.family([name])
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=30)


def load_module(name: str, path: Path) -> Any:
    """Another folder's test module: pytest gives no other way to share what it defines."""
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module

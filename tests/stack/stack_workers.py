"""Workers of the stack's tests: put to work, and killed."""

import contextlib
from collections.abc import Iterator
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

"""Runs a plan's stage runs, each in its own process and several at a time; any number of studies may share a store.

Who runs what is settled by the runs' lock files, and what is done by what lies in the store, so a study that was killed
goes on where it stood, and two studies on one folder share the work.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from flawsmith.files import write_json
from flawsmith.progress import bar
from flawsmith_lab.study.plan import Task
from flawsmith_lab.study.runner import BUSY
from flawsmith_lab.study.store import Failure, Store

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0  # a stage that is asked to end

log = logging.getLogger(__name__)


@dataclass
class _Child:
    task: Task
    process: subprocess.Popen[bytes]


def run_tasks(
    tasks: Sequence[Task], store: Store, root: Path, workers: int, on_finished: Callable[[Task], None]
) -> dict[tuple[str, str, str], Failure]:
    """Run all tasks that are not done yet; returns the failures by task key. `tasks` come after what they read.

    A task whose upstream failed is not tried. A failure of an earlier call is tried again, except a quality gate's.
    """
    began = time.time()
    running: dict[tuple[str, str, str], _Child] = {}
    finished = {task.key for task in tasks if store.is_done(task)}
    failures: dict[tuple[str, str, str], Failure] = {}
    shown = ExitStack()
    progress = shown.enter_context(bar(what="study", total=len(tasks), unit="stage", done=len(finished), leave=False))
    try:
        while True:
            for key, child in list(running.items()):
                if child.process.poll() is not None:
                    del running[key]
                    _close(child)
                    _note_death(child, store, began)
            waiting = 0
            for task in tasks:
                if task.key in finished or task.key in running or _is_stopped(task, failures):
                    continue
                if store.is_done(task):
                    finished.add(task.key)
                    progress.update()
                    log.info(
                        "[%d/%d] %s: %s, %.1f s", len(finished), len(tasks), task.category, task.stage,
                        store.cost(task)["seconds"],
                    )  # fmt: skip
                    on_finished(task)
                elif (failure := store.failure(task, began)) is not None:
                    failures[task.key] = failure
                    log.warning("%s: %s failed: %s", task.category, task.stage, failure.reason)
                else:
                    waiting += 1
                    ready = all(before.key in finished for before in task.upstream)
                    if ready and len(running) < workers and _is_free(store.beside(task, "lock")):
                        running[task.key] = _start(task, store, root, workers)
            if not waiting and not running:
                return failures
            time.sleep(POLL_SECONDS)
    finally:
        shown.close()
        _end(list(running.values()))


def _is_stopped(task: Task, failures: Mapping[tuple[str, str, str], Failure]) -> bool:
    return any(one.key in failures for one in (*task.upstream, task))


def _is_free(lock: Path) -> bool:
    """Whether nobody runs it now. The runner takes the lock for itself; a race costs one short process."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            return True
    except Timeout:
        return False


def _start(task: Task, store: Store, root: Path, workers: int) -> _Child:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if workers > 1:  # or each of them would take every core
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    with store.beside(task, "log").open("ab") as spoken:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "flawsmith_lab.study.runner", str(store.write_task(task, root))],
            env=environment,
            stdin=subprocess.PIPE,  # never written to: its end tells the runner that we are gone
            stdout=spoken,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches us alone, and we end it
        )
    return _Child(task, process)


def _note_death(child: _Child, store: Store, began: float) -> None:
    """Write a failure for a runner that could not do so itself."""
    status = child.process.returncode
    if status in (0, BUSY) or store.failure(child.task, began) is not None:
        return
    told = store.beside(child.task, "log")
    if status < 0:
        hint = ", mostly for want of memory" if -status == signal.SIGKILL else ""
        reason = f"killed by signal {-status} ({signal.Signals(-status).name}){hint}"
    else:
        lines = told.read_text(errors="replace").strip().splitlines()
        reason = f"ended with status {status}: {lines[-1] if lines else 'it said nothing'}"
    write_json(store.beside(child.task, "failed.json"), {"kind": "Died", "reason": f"{reason}; see {told.name}"})


def _end(children: Sequence[_Child]) -> None:
    """Ask all to end, then make them; a second Ctrl-C shortens the wait."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGTERM)
    try:
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(GRACE_SECONDS)
    finally:
        for child in children:
            if child.process.poll() is None:
                os.killpg(child.process.pid, signal.SIGKILL)
                child.process.wait()
            _close(child)


def _close(child: _Child) -> None:
    if child.process.stdin is not None:
        child.process.stdin.close()

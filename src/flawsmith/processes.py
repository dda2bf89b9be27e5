"""Other programs as children that never outlive us: their lines as they come, and their end whatever happens here."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Finished", "is_main_process", "stream", "world_size"]

GRACE_SECONDS = 10.0  # between asking a group of processes to end and ending it
KEPT_LINES = 200  # of a program's last words; what failed stands at the end
RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # set by torchrun and by kinds of MPI
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def is_main_process() -> bool:
    """Whether this process is the one of its training that writes files and records the run."""
    return _number(RANKS, 0) == 0


def world_size() -> int:
    """How many processes train together; 1 without a launcher."""
    return _number(SIZES, 1)


def _number(names: Sequence[str], otherwise: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()), otherwise)


@dataclass(frozen=True)
class Finished:
    """How a program ended.

    Attributes:
        status: its exit status; negative if a signal killed it.
        lines: the last lines it said.
        stdout: what it wrote to stdout, if that was asked for; else empty.
    """

    status: int
    lines: tuple[str, ...]
    stdout: str = ""


def stream(
    command: Sequence[str],
    root: Path,
    on_line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    keep_stdout: bool = False,
) -> Finished:
    """Run a command in `root` and hand over each line when it is written; `keep_stdout` keeps stdout apart.

    The command leads a process group of its own. The group is ended when this function is left, by an exception (a
    cancelled flow, Ctrl-C) too, and even when this process is killed with SIGKILL: a stage that nobody waits for must
    not go on writing beside the one that replaces it.
    """
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    own = str(Path(sys.executable).parent)  # this Python's programs come first
    path = os.pathsep.join([own, os.environ.get("PATH", os.defpath)])
    with tempfile.TemporaryFile() as kept:
        process = subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=kept if keep_stdout else subprocess.PIPE,
            stderr=subprocess.PIPE if keep_stdout else subprocess.STDOUT,
            start_new_session=True,
        )
        spoken = process.stderr if keep_stdout else process.stdout
        if spoken is None:  # cannot be: it was opened as a pipe
            raise RuntimeError("the command's output is no pipe")
        with _ended_with_us(process), spoken:
            for raw in spoken:
                # of a progress bar that redraws its line, what it showed last
                line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2].rstrip()
                lines.append(line)
                on_line(line)
            status = process.wait()
        kept.seek(0)
        return Finished(status, tuple(lines), kept.read().decode(errors="replace"))


@contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    # the guard's read ends when the other end of the pipe is closed, and the kernel closes it however we die
    guard = subprocess.Popen(
        ["/bin/sh", "-c", f"read -r _; kill -s KILL -- -{process.pid}"],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        if process.poll() is None:
            _signal_group(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        guard.kill()
        guard.wait()
        if guard.stdin is not None:
            guard.stdin.close()
        _signal_group(process.pid, signal.SIGKILL)  # what the leader left behind; mostly nobody is there any more
        process.wait()


def _signal_group(leader: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)

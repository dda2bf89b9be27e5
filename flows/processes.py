"""Processes that outlive the command that started them, and are stopped without ever hitting a stranger.

Each process gets a random mark in its environment, which its children inherit. A process is ours if it bears the mark:
a pid that was given to somebody else meanwhile never does, and a child whose parent was killed still does, whatever
session or group it has moved to.
"""

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import atomic_file, read_json, write_json

MARK = "FLAWSMITH_STACK_PROCESS"
MARK_LOOKS = 500  # for a second in all
LEFTOVER_GRACE = 5.0  # seconds that children get after their parent has gone
KILL_GRACE = 10.0
LOOPBACK = "127.0.0.1"

TUNING = ("PREFECT_FLOWS_", "PREFECT_LOGGING_", "PREFECT_SERVER_SERVICES_", "PREFECT_WORKER_")
PLACING = frozenset(
    f"FLAWSMITH_{name}" for name in ("ACTOR", "CHECKOUT", "DEPLOYED_FROM", "FLOW_RUN", "GPU", "STACK_PROCESS")
)


@dataclass(frozen=True)
class Part:
    """A process of the stack, as it is to run."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)  # added to the caller's cleaned environment
    folder: Path = Path()  # where it runs
    user: str | None = None  # None: as whoever calls

    @property
    def digest(self) -> str:
        """What would make a running process another one: its command, folder and own environment."""
        content = [self.command, sorted(self.environment.items()), str(self.folder), self.user]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Processes:
    """The processes of one state folder: `processes/<name>.json` says what was started, `logs/<name>.log` what it said.

    Args:
        state: the folder; made if missing.
        base: the environment that every process starts from.
    """

    def __init__(self, state: Path, base: Mapping[str, str]) -> None:
        self._state, self._base = state, dict(base)
        self._handles: dict[str, subprocess.Popen[bytes]] = {}  # our own children, to reap them

    def names(self) -> list[str]:
        """The processes that were started and not stopped since, running or not."""
        return sorted(path.stem for path in (self._state / "processes").glob("*.json"))

    def log(self, name: str) -> Path:
        return self._state / "logs" / f"{name}.log"

    def pid(self, name: str) -> int | None:
        """The process's pid, or None if it does not run."""
        handle = self._handles.get(name)
        if handle is not None and handle.poll() is None:  # a child of ours (and reaped, if it has died)
            return handle.pid
        mark, pid, _ = self._record(name)
        return pid if mark and _bears(pid, mark) else None

    def is_current(self, part: Part) -> bool:
        """Whether the part runs, and as it would be started now."""
        return self.pid(part.name) is not None and self._record(part.name)[2] == part.digest

    def start(self, part: Part) -> None:
        """Start a part that does not run; it survives this process. Its earlier log is kept as `<name>.log.1`.

        Raises:
            FlawsmithError: the command cannot be executed.
        """
        mark = secrets.token_hex(16)
        # the mark is on disk before the process exists, so that no interruption can lose it
        self._write(part.name, mark, 0, part.digest)
        log = self.log(part.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():
            log.replace(log.with_name(f"{log.name}.1"))
        try:
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    part.command,
                    cwd=part.folder,
                    env={**self._base, **part.environment, MARK: mark},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C in the terminal is for the caller alone
                    user=part.user,
                    group=part.user,
                    extra_groups=None if part.user is None else (),
                )
        except (OSError, subprocess.SubprocessError) as error:
            raise FlawsmithError(f"{part.command[0]} cannot be started ({error}).") from error
        self._handles[part.name] = process
        self._write(part.name, mark, process.pid, part.digest)
        # the kernel lets us go on a moment before the new program's environment can be read
        for _ in range(MARK_LOOKS):
            if _bears(process.pid, mark) or process.poll() is not None:
                break
            time.sleep(0.002)

    def wait(self, name: str, title: str, healthy: Callable[[], bool], seconds: float) -> None:
        """Wait until a started process is healthy.

        Raises:
            FlawsmithError: it has ended, or is not healthy after `seconds`; the message names its log.
        """
        deadline = time.monotonic() + seconds
        while not healthy():
            if self.pid(name) is None:
                raise FlawsmithError(f"{title} ended before it was ready; {self.log(name)} says why.")
            if time.monotonic() > deadline:
                raise FlawsmithError(f"{title} was not ready within {seconds:.0f} s; see {self.log(name)}.")
            time.sleep(0.25)

    def stop(self, parts: Mapping[str, tuple[signal.Signals, float]]) -> None:
        """Stop processes together, by name: each gets its signal and its seconds, then what is left is killed.

        What is stopped is forgotten, but for its log. A name that does not run is no error.
        """
        leaders: list[tuple[psutil.Process, float]] = []
        for name, (wish, grace) in parts.items():
            if (pid := self.pid(name)) is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    leader = psutil.Process(pid)
                    leader.send_signal(wish)
                    leaders.append((leader, grace))
        _await_end([leader for leader, _ in leaders], max((grace for _, grace in leaders), default=0.0))
        marks = {mark for name in parts if (mark := self._record(name)[0])}
        for wish, grace in ((signal.SIGTERM, LEFTOVER_GRACE), (signal.SIGKILL, KILL_GRACE)):
            left = _bearing(marks)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(wish)
            _await_end(left, grace)
        for name in parts:
            self._reap(name)
            self._path(name).unlink(missing_ok=True)

    def kill(self, name: str, with_children: bool = True) -> None:
        """SIGKILL, as a machine that loses power (or, without children, as the OOM killer) would; it stays recorded."""
        mark, pid, _ = self._record(name)
        left = _bearing({mark}) if with_children else [psutil.Process(pid)] if self.pid(name) else []
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _await_end(left, KILL_GRACE)
        self._reap(name)

    def family(self, name: str) -> list[psutil.Process]:
        """The process and all that descend from it, also those whose parent has died."""
        return _bearing({self._record(name)[0]})

    def _reap(self, name: str) -> None:
        """Take leave of a child that was ended; its last threads may take a moment longer than it."""
        if (handle := self._handles.pop(name, None)) is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                handle.wait(KILL_GRACE)

    def _path(self, name: str) -> Path:
        return self._state / "processes" / f"{name}.json"

    def _record(self, name: str) -> tuple[str, int, str]:
        """Mark, pid and digest; empty if nothing is recorded."""
        if not self._path(name).exists():
            return "", 0, ""
        content = read_json(self._path(name))
        return content["mark"], content["pid"], content["digest"]

    def _write(self, name: str, mark: str, pid: int, digest: str) -> None:
        write_json(self._path(name), {"mark": mark, "pid": pid, "digest": digest})


def _bears(pid: int, mark: str) -> bool:
    """Whether a living process has this mark."""
    try:
        process = psutil.Process(pid)
        return bool(process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE)
    except (psutil.Error, OSError, ValueError):
        return False


def _bearing(marks: set[str]) -> list[psutil.Process]:
    """The living processes that bear one of these marks."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # gone, or another user's
            if process.environ().get(MARK) in marks and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _await_end(processes: Iterable[psutil.Process], seconds: float) -> None:
    """Wait until all have ended, at most `seconds`."""
    deadline = time.monotonic() + seconds
    while any(map(_lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _lives(process: psutil.Process) -> bool:
    """A zombie has ended, whoever fails to reap it, but not before its last thread: until then it holds its port."""
    try:
        if not process.is_running():
            return False
        return bool(process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False


def write_private(path: Path, content: str) -> None:
    """Write a file that only its owner may read."""
    with atomic_file(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(content)


def free_port() -> int:
    """A port on the loopback interface that nothing listens on just now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def check_port(port: int, title: str, option: str) -> None:
    """Refuse a port on which somebody listens already.

    Raises:
        UserError: it is taken; the message says by whom, where the system tells.
    """
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex((LOOPBACK, port)):
            return
    raise UserError(
        f"Port {port}, wanted for {title}, is taken{_listener(port)}; stop that, or choose another port with "
        f"{option} N."
    )


def _listener(port: int) -> str:
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""


def clean_environment(binaries: Path) -> dict[str, str]:
    """The caller's environment without what would point Prefect, MLflow or a worker elsewhere.

    What only tunes Prefect stays. `binaries` comes first on PATH, so that a worker's `dvc` and `flawsmith` are those of
    the running Python. A proxy is told to leave the loopback interface alone.
    """
    environment = {
        key: value
        for key, value in os.environ.items()
        if key.startswith(TUNING) or not (key.startswith(("PREFECT_", "MLFLOW_")) or key in PLACING)
    }
    environment["PATH"] = os.pathsep.join([str(binaries), environment.get("PATH", os.defpath)])
    for name in ("no_proxy", "NO_PROXY"):
        environment[name] = ",".join(filter(None, [environment.get(name), LOOPBACK, "localhost"]))
    return environment

"""A thin use of supervisord: it starts, restarts and stops the programs of one state folder, and keeps their logs.

    supervisorctl -c .stack/supervisord.conf status        # its own command line works too

supervisord puts its address into the environment of its programs, and children inherit that. By this mark we find what
an ended worker or a killed supervisord has left behind, and never hit a stranger who was given an old pid.
"""

import contextlib
import hashlib
import os
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import Any
from xmlrpc.client import Fault, ServerProxy

import psutil
from jinja2 import Environment, StrictUndefined
from supervisor.xmlrpc import SupervisorTransport

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import atomic_file

MARK, NAME = "SUPERVISOR_SERVER_URL", "SUPERVISOR_PROCESS_NAME"
TEMPLATE = Path(__file__).with_name("supervisord.conf")
START_SECONDS = 60.0
LEFTOVER_SECONDS = 10.0  # what programs leave behind gets this long to end before it is killed


class Supervisor:
    """The supervisord of one state folder, running or not.

    Args:
        state: folder that holds its configuration and the logs; it exists when supervisord is configured.
        environment: what supervisord, and so every program, starts from.
    """

    def __init__(self, state: Path, environment: Mapping[str, str]) -> None:
        self._state, self._environment = state, dict(environment)
        self._config = state / "supervisord.conf"

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self._state / "logs" / f"{name}.log"

    def programs(self) -> dict[str, dict[str, Any]]:
        """What supervisord says of each program (`statename`, `pid`, `start`, `description`); empty without one."""
        try:
            return {item["name"]: item for item in self._ask("getAllProcessInfo")}
        except (OSError, Fault):
            return {}

    def pid(self, name: str) -> int | None:
        """The program's pid, or None if it does not run."""
        return self.programs().get(name, {}).get("pid") or None

    def runs(self) -> bool:
        """Whether supervisord answers."""
        with contextlib.suppress(OSError, Fault):
            return bool(self._ask("getPID"))
        return False

    def configure(self, values: Mapping[str, Any]) -> None:
        """Fill in supervisord.conf and make supervisord, started if need be, hold just its programs.

        What is no longer in it, or has changed, is stopped. Nothing is started.

        Args:
            values: what the template names, but for `socket`, `state`, `temporary` and `root`.

        Raises:
            UserError: a path cannot be written into the configuration.
            FlawsmithError: supervisord does not start.
        """
        runs, temporary = self.runs(), private_temporary()
        # in a folder with a short path, which the state folder's may not be
        name = hashlib.sha256(str(self._state).encode()).hexdigest()[:16]
        own = {
            "socket": self._socket() if runs else temporary / f"{name}.sock",
            "state": self._state, "temporary": temporary, "root": os.geteuid() == 0,
        }  # fmt: skip
        template = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # noqa: S701 - no HTML
        content = template.from_string(TEMPLATE.read_text()).render(_told({**values, **own}))
        write_private(self._config, content)
        if not runs:
            self._launch()
        ((added, changed, removed),) = self._ask("reloadConfig")
        self.stop([*changed, *removed])
        for name in [*changed, *removed]:
            self._ask("removeProcessGroup", name)
        for name in [*added, *changed]:
            self._ask("addProcessGroup", name)

    def start(self, name: str) -> None:
        """Start a program that does not run.

        Raises:
            FlawsmithError: its command cannot be executed.
        """
        try:
            self._ask("startProcess", name, False)
        except Fault as fault:
            raise FlawsmithError(f"{name} cannot be started ({fault.faultString}).") from fault

    def wait(self, name: str, title: str, healthy: Callable[[], bool], seconds: float) -> None:
        """Wait until a started program is healthy.

        Raises:
            FlawsmithError: it has ended, or is not healthy after `seconds`; the message names its log.
        """
        deadline, pid = time.monotonic() + seconds, self.pid(name)
        while not healthy():
            if pid is None or self.pid(name) != pid:
                raise FlawsmithError(f"{title} ended before it was ready; {self.log(name)} says why.")
            if time.monotonic() > deadline:
                raise FlawsmithError(f"{title} was not ready within {seconds:.0f} s; see {self.log(name)}.")
            time.sleep(0.25)

    def stop(self, names: Sequence[str]) -> None:
        """Stop programs together, with all that they and their earlier lives have started."""
        for name in names:
            with contextlib.suppress(OSError, Fault):  # it does not run
                self._ask("stopProcess", name, False)
        while any(self.pid(name) for name in names):  # supervisord kills what exceeds its seconds
            time.sleep(0.1)
        self._end(names)

    def shut_down(self) -> None:
        """End supervisord, and whatever bears its mark even if it does not run."""
        with contextlib.suppress(OSError, Fault, psutil.NoSuchProcess):
            process = psutil.Process(self._ask("getPID"))
            self._ask("shutdown")
            _await_end([process])
        self._end()

    def family(self, names: Iterable[str] | None = None) -> list[psutil.Process]:
        """The living processes of these programs (of all, if None), also those whose parent has died."""
        address, found = f"unix://{self._socket()}", []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # gone, or another user's
                environment = process.environ()
                ours = environment.get(MARK) == address and (names is None or environment.get(NAME) in names)
                if ours and _lives(process):
                    found.append(process)
        return found

    def _end(self, names: Iterable[str] | None = None) -> None:
        for end in (psutil.Process.terminate, psutil.Process.kill):
            left = self.family(names)
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    end(process)
            _await_end(left)

    def _launch(self) -> None:
        self.log("supervisord").parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "supervisor.supervisord", "--configuration", str(self._config)]
        done = subprocess.run(
            command, cwd=self._state, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not self.runs():  # the command leaves a daemon behind, which opens its socket a moment later
            if done.returncode or time.monotonic() > deadline:
                words = " ".join(done.stderr.split()) or f"see {self.log('supervisord')}"
                raise FlawsmithError(f"supervisord does not start: {words}.")
            time.sleep(0.05)

    def _socket(self) -> str:
        """The address that the last `configure` has written; empty before the first one."""
        written = ConfigParser(interpolation=None)
        written.read(self._config)
        return written.get("unix_http_server", "file", fallback="")

    def _ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of supervisord's XML-RPC interface; an OSError says that it does not run."""
        transport = SupervisorTransport(None, None, f"unix://{self._socket()}")
        with ServerProxy("http://localhost", transport=transport) as server:
            return getattr(server.supervisor, method)(*arguments)


def _told(value: Any) -> Any:
    """A value, or all in a collection, as supervisord's configuration wants it, which cannot quote some signs.

    Raises:
        UserError: it holds one of them.
    """
    if isinstance(value, Mapping):
        return {key: _told(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_told(item) for item in value]
    if not isinstance(value, str | Path):
        return value
    if any(sign in str(value) for sign in ('"', "\n", "\\", " ;", " #")):
        raise UserError(f"{str(value)!r} cannot be told to supervisord; choose a path without quotes, ` ;` and ` #`.")
    return str(value).replace("%", "%%")


def _await_end(processes: Iterable[psutil.Process]) -> None:
    deadline = time.monotonic() + LEFTOVER_SECONDS
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


def private_temporary() -> Path:
    """A folder for temporary files of this user alone, with a short path (sockets may lie in it).

    Prefect's workers share `runner_storage` in the system's folder, which belongs to the first user who ran one; every
    other user's worker dies there.

    Raises:
        UserError: somebody else owns it.
    """
    folder = Path(tempfile.gettempdir()) / f"flawsmith-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise UserError(f"{folder} belongs to somebody else; remove it, or set TMPDIR to a folder of your own.")
    return folder


def write_private(path: Path, content: str) -> None:
    """Write a file that only its owner may read."""
    with atomic_file(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(content)

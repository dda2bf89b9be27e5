"""The whole stack on one machine, as real processes: PostgreSQL (else SQLite), Prefect, MLflow and workers.

    python -m flows.stack up        # or `make up`; again: starts what has died, restarts what is to run differently
    set -a; . .stack/env            # points a shell's `prefect`, `dvc repro` and `flawsmith` to it
    python -m flows.stack down      # or `make down`; the data stay in .stack/

Everything listens on the loopback interface alone and asks nobody who they are: it is for one machine that its users
share. docs/deploy says what several machines need.
"""

import contextlib
import fcntl
import json
import logging
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from flawsmith.errors import FlawsmithError, UserError, refusal
from flawsmith.files import read_json, write_json
from flows import postgres
from flows.processes import LOOPBACK, Part, Processes, check_port, clean_environment, free_port, write_private

logger = logging.getLogger("flows.stack")

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PORTS = {"prefect": 4200, "mlflow": 5000}
POSTGRESQL, SQLITE = "postgresql", "sqlite"
READY_SECONDS = 180.0  # servers take some ten seconds on two idle cores; a busy machine gets much more
SETUP_SECONDS = 300.0
TITLES = {"postgres": "PostgreSQL", "prefect": "the Prefect server", "mlflow": "the MLflow server"}
SERVERS = tuple(TITLES)  # in the order they start
WORKER = "worker-"
WORKER_STOP = (signal.SIGTERM, 30.0)  # the worker ends its flow runs first
SERVER_STOP = (signal.SIGTERM, 20.0)
OWN_CHECKOUT = (
    "DVC runs one pipeline at a time in a folder; make another (`git worktree add ../second`) and give --checkout once "
    "for each worker."
)
QUERY_SECONDS = "PREFECT_WORKER_QUERY_SECONDS"  # how often a worker asks for work


@dataclass(frozen=True)
class Database:
    """Where the two servers keep their data; the addresses hold a password."""

    kind: str
    prefect: str
    mlflow: str


class Stack:
    """The stack of one state folder.

    Args:
        state: folder for data, logs and pids; made if missing.
        prefect_port: the Prefect server's port. Default: as the last time, else 4200.
        mlflow_port: the MLflow server's port. Default: as the last time, else 5000.
        postgres_port: PostgreSQL's port. Default: any free one, a new one at each start.
        checkouts: one worker on pool `gpu` for each of these checkouts, and one on pool `control` in the first; none
            starts the servers alone.
        with_postgres: False keeps the data in SQLite files even where PostgreSQL is installed.
        environment: added to every process's environment (tests make the server's loops faster).
    """

    def __init__(
        self,
        state: Path,
        *,
        prefect_port: int | None = None,
        mlflow_port: int | None = None,
        postgres_port: int | None = None,
        checkouts: Sequence[Path] = (),
        with_postgres: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.state = state.resolve()
        self.checkouts = [path.resolve() for path in checkouts]
        self._with_postgres, self._any_postgres_port = with_postgres, postgres_port is None
        self._remembered = self.state / "settings.json"
        earlier = read_json(self._remembered) if self._remembered.exists() else {}
        asked = {"prefect": prefect_port, "mlflow": mlflow_port, "postgres": postgres_port}
        self.ports: dict[str, int] = DEFAULT_PORTS | earlier.get("ports", {}) | {k: v for k, v in asked.items() if v}
        self.database: str | None = earlier.get("database")  # which kind holds the data; None before the first `up`
        self._base = clean_environment(Path(sys.executable).parent) | dict(environment or {})
        self.processes = Processes(self.state, self._base)

    @property
    def prefect_url(self) -> str:
        """The Prefect server's pages; the API is below `/api`."""
        return f"http://{LOOPBACK}:{self.ports['prefect']}"

    @property
    def mlflow_url(self) -> str:
        """The MLflow server: its pages and its tracking URI."""
        return f"http://{LOOPBACK}:{self.ports['mlflow']}"

    def variables(self) -> dict[str, str]:
        """What points a process to this stack."""
        return {
            "PREFECT_API_URL": f"{self.prefect_url}/api",
            "PREFECT_HOME": str(self.state / "prefect"),  # no profile, key or result of the user's own gets in between
            "MLFLOW_TRACKING_URI": self.mlflow_url,
        }

    def environment(self) -> dict[str, str]:
        """A whole environment for a command that is to use this stack."""
        return self._base | self.variables()

    def up(self, setup: bool = True) -> list[str]:
        """Start what does not run and restart what is to run differently, until all is healthy.

        Args:
            setup: make pools, limits, deployments and automations too, with `python -m flows.setup` of the first
                checkout (of this project, if there is none). Without them only a stack without workers can start.

        Returns:
            The names of the processes that were started, in order.

        Raises:
            UserError: a port is taken, or the checkouts cannot be used.
            FlawsmithError: something did not become healthy; what this call has started is stopped again.
        """
        self._check_checkouts()
        workers = self._workers()
        with self._alone(), self._undone_on_failure() as started:
            self._stop([name for name in self.processes.names() if name.startswith(WORKER) and name not in workers])
            database = self._start_database(started)
            servers = [self._prefect_part(database), self._mlflow_part(database)]
            if "postgres" in started:  # their pools and loops would stumble over the connections that are gone
                self._stop([part.name for part in servers])
            self._start_all(servers, started)
            self._wait_for_page("prefect", f"{self.prefect_url}/api/health")
            self._wait_for_page("mlflow", f"{self.mlflow_url}/health")
            if setup:
                logger.info("making pools, limits, deployments and automations")
                gpus = dict.fromkeys(part.environment.get("FLAWSMITH_GPU", "gpu-0") for part, _ in workers.values())
                self.set_up(self.checkouts[0] if self.checkouts else ROOT, list(gpus) or ["gpu-0"])
            for pool in dict.fromkeys(pool for _, pool in workers.values()):
                self._check_pool(pool)
            since = datetime.now(UTC)
            begun = self._start_all([part for part, _ in workers.values()], started)
            for name in begun:
                self._wait_for_worker(name, workers[name][1], since)
            write_private(self.state / "env", "".join(f"{k}={shlex.quote(v)}\n" for k, v in self.variables().items()))
        return started

    def down(self) -> list[str]:
        """Stop the processes of this stack, workers first, PostgreSQL last; the data stay.

        Returns:
            The names of the processes that ran.
        """
        if not self.state.is_dir():
            return []
        with self._alone():
            names = self.processes.names()
            running = [name for name in names if self.processes.pid(name) is not None]
            self._stop(names)
            (self.state / "env").unlink(missing_ok=True)
        return running

    def start_worker(
        self,
        pool: str,
        name: str,
        checkout: Path,
        gpu: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> int:
        """Start a worker and wait until it is online.

        Args:
            pool: the work pool it polls.
            name: its name; a worker of that name that runs already is left alone.
            checkout: where its flow runs work.
            gpu: the concurrency limit it computes under, e.g. `gpu-0`.
            environment: more variables for it and its flow runs.

        Returns:
            Its pid.

        Raises:
            UserError: there is no such pool.
            FlawsmithError: it did not come online; its log is named.
        """
        self._check_pool(pool)
        part = self._worker_part(pool, name, checkout.resolve(), {"FLAWSMITH_GPU": gpu} if gpu else {}, environment)
        with self._undone_on_failure() as started:
            since = datetime.now(UTC)
            if self._start_all([part], started):
                self._wait_for_worker(part.name, pool, since)
        pid = self.processes.pid(part.name)
        if pid is None:
            raise FlawsmithError(f"Worker {name} ended at once; {self.processes.log(part.name)} says why.")
        return pid

    def stop_worker(self, name: str) -> None:
        """Stop a worker as `down` does."""
        self._stop([WORKER + name])

    def kill_worker(self, name: str, with_children: bool = True) -> None:
        """SIGKILL a worker; with its flow runs and their stages too, as when its machine loses power."""
        self.processes.kill(WORKER + name, with_children)

    def set_up(
        self, checkout: Path, gpus: Sequence[str] = ("gpu-0",), environment: Mapping[str, str] | None = None
    ) -> None:
        """Run `python -m flows.setup` of a checkout against the stack's servers.

        Args:
            checkout: the project to deploy.
            gpus: the GPUs' concurrency limits to make.
            environment: more variables for it.

        Raises:
            FlawsmithError: it failed; the message names its log.
        """
        log = self.processes.log("setup")
        command = [sys.executable, "-m", "flows.setup", *(word for name in gpus for word in ("--gpu", name))]
        with log.open("wb") as stream:
            try:
                code = subprocess.run(
                    command, cwd=checkout, env=self.environment() | dict(environment or {}),
                    stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, timeout=SETUP_SECONDS,
                    check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise FlawsmithError(f"flows.setup took more than {SETUP_SECONDS:.0f} s; see {log}.") from error
        if code:
            lines = log.read_text(errors="replace").splitlines()
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
            raise FlawsmithError(f"flows.setup failed ({last}); {log} holds all it said.")

    def api(self, path: str, content: Any = None) -> Any:
        """Ask the Prefect server's API: POST with a content, GET without one.

        Raises:
            OSError: no answer, or one of an HTTP error status.
        """
        request = urllib.request.Request(  # noqa: S310 the scheme is ours
            f"{self.prefect_url}/api/{path}",
            data=None if content is None else json.dumps(content).encode(),
            headers={"Content-Type": "application/json"},
        )
        with _direct().open(request, timeout=30) as response:
            return json.loads(response.read() or b"null")

    def _check_pool(self, pool: str) -> None:
        """Refuse a pool that does not exist: a worker would wait for it, silently and for ever."""
        try:
            self.api(f"work_pools/{pool}")
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.NOT_FOUND:
                raise
            raise UserError(f"There is no work pool `{pool}`; make it with `python -m flows.setup` first.") from error

    def _check_checkouts(self) -> None:
        for path in self.checkouts:
            if not (path / "dvc.yaml").is_file():
                raise UserError(f"{path} holds no dvc.yaml, so no worker can work there; give a checkout's root.")
        if len(set(self.checkouts)) < len(self.checkouts):
            raise UserError(f"Two workers cannot share a checkout: {OWN_CHECKOUT}")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two commands at once on one state folder would start everything twice."""
        self.state.mkdir(parents=True, exist_ok=True)
        (self.state / "logs").mkdir(exist_ok=True)
        with (self.state / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"Another command is at work on {self.state}; wait until it has ended.") from error
            yield

    @contextlib.contextmanager
    def _undone_on_failure(self) -> Iterator[list[str]]:
        """Collect what is started, and stop just that if the block fails or is interrupted."""
        started: list[str] = []
        try:
            yield started
        except BaseException:
            if started:
                logger.info("stopping what was started")
            self._stop(started)
            raise

    def _stop(self, names: Sequence[str]) -> None:
        """Workers, then the web servers, then their database, each group together."""
        ways = {name: WORKER_STOP if name.startswith(WORKER) else SERVER_STOP for name in names}
        ways |= {name: postgres.STOP for name in names if name == "postgres"}
        for group in (
            [name for name in ways if name.startswith(WORKER)],
            [name for name in ways if name in ("prefect", "mlflow")],
            [name for name in ways if name == "postgres"],
        ):
            self.processes.stop({name: ways[name] for name in group})

    def _start_all(self, parts: Sequence[Part], started: list[str]) -> list[str]:
        """Start the parts that do not run as they should; return their names. They are not waited for."""
        begun = [part for part in parts if not self.processes.is_current(part)]
        self._stop([part.name for part in begun])
        for part in begun:
            if part.name in self.ports:
                check_port(self.ports[part.name], TITLES[part.name], f"--{part.name}-port")
        for part in begun:
            logger.info("starting %s", TITLES.get(part.name, part.name))
            started.append(part.name)
            self.processes.start(part)
        return [part.name for part in begun]

    def _start_database(self, started: list[str]) -> Database:
        """Start PostgreSQL, or settle for SQLite; what holds the data already is kept."""
        binaries = self._postgres_binaries()
        if binaries is None:
            self._remember(SQLITE)
            return Database(
                SQLITE,
                f"sqlite+aiosqlite:///{(self.state / 'prefect.db').as_posix()}",
                f"sqlite:///{(self.state / 'mlflow.db').as_posix()}",
            )
        if self._any_postgres_port and self.processes.pid("postgres") is None:
            self.ports["postgres"] = free_port()
        server = postgres.Postgres(self.state, binaries, self.ports["postgres"])
        server.initialise(self.processes.log("initdb"))
        self._remember(POSTGRESQL)
        if self._start_all([server.part()], started):
            self.processes.wait("postgres", TITLES["postgres"], server.answers, READY_SECONDS)
            server.create_databases()
        return Database(POSTGRESQL, server.url("postgresql+asyncpg", "prefect"), server.url("postgresql", "mlflow"))

    def _postgres_binaries(self) -> Path | None:
        """The PostgreSQL to use; None means SQLite.

        Raises:
            UserError: the data lie in PostgreSQL, which cannot be used now.
        """
        version_file = self.state / "postgres" / "PG_VERSION"
        if self.database == SQLITE:
            return None
        if self.database == POSTGRESQL:
            remedy = f"or remove {self.state} to start anew without what it holds"
            if not self._with_postgres:
                raise UserError(f"The data of this stack lie in PostgreSQL; leave out --no-postgres, {remedy}.")
            version = version_file.read_text().strip() if version_file.exists() else None
            found = postgres.find_binaries(version)
            if found is None:
                raise UserError(
                    f"The data of this stack lie in PostgreSQL {version or ''}, which is not installed; install it, "
                    f"{remedy}."
                )
            return found
        if not self._with_postgres:
            return None
        found = postgres.find_binaries()
        problem = "its server is not installed" if found is None else postgres.obstacle(self.state)
        if problem is not None:
            logger.warning("PostgreSQL is not used, because %s; the data go to SQLite files.", problem)
            return None
        return found

    def _remember(self, database: str) -> None:
        self.database = database
        write_json(self._remembered, {"database": database, "ports": self.ports})

    def _prefect_part(self, database: Database) -> Part:
        return Part(
            name="prefect",
            command=(
                sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK,
                "--port", str(self.ports["prefect"]),
            ),
            environment={
                "PREFECT_HOME": str(self.state / "prefect"),
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.prefect,
                "PREFECT_SERVER_UI_API_URL": f"{self.prefect_url}/api",
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                # in memory, as is the default, a restart would forget who holds a slot, and it would stay taken
                "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
                "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
                "DO_NOT_TRACK": "1",
            },
            folder=self.state,
        )  # fmt: skip

    def _mlflow_part(self, database: Database) -> Part:
        return Part(
            name="mlflow",
            command=(
                sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(self.ports["mlflow"]),
                "--workers", "1", "--serve-artifacts", "--artifacts-destination", str(self.state / "mlflow-artifacts"),
            ),
            environment={
                "MLFLOW_BACKEND_STORE_URI": database.mlflow,  # not on the command line: it holds the password
                "MLFLOW_DISABLE_TELEMETRY": "true",
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # judges of language models: processes nobody needs here
            },
            folder=self.state,
        )  # fmt: skip

    def _workers(self) -> dict[str, tuple[Part, str]]:
        """The wanted workers by process name, with their pools."""
        devices = visible_devices()
        wanted: dict[str, tuple[Part, str]] = {}
        for number, checkout in enumerate(self.checkouts):
            device = number % len(devices) if devices else number
            placed = {"FLAWSMITH_GPU": f"gpu-{device}"}  # workers that share a GPU share its limit
            if devices:
                placed["CUDA_VISIBLE_DEVICES"] = devices[device]
            part = self._worker_part("gpu", f"gpu-{number}", checkout, placed)
            wanted[part.name] = (part, "gpu")
        if self.checkouts:
            part = self._worker_part("control", "control", self.checkouts[0], {})
            wanted[part.name] = (part, "control")
        return wanted

    def _worker_part(
        self,
        pool: str,
        name: str,
        checkout: Path,
        placed: Mapping[str, str],
        environment: Mapping[str, str] | None = None,
    ) -> Part:
        # a worker on `gpu` computes: one run at a time; those on `control` mostly wait for others
        limit = ("--limit", "1") if pool == "gpu" else ()
        return Part(
            name=WORKER + name,
            command=(
                sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name,
                "--type", "process", "--no-create-pool-if-not-found", "--install-policy", "never", *limit,
            ),
            environment={
                **self.variables(),
                "FLAWSMITH_CHECKOUT": str(checkout),
                "TMPDIR": str(private_temporary()),
                QUERY_SECONDS: self._base.get(QUERY_SECONDS, "3"),  # Prefect's 10 s are meant for a server of many
                "DO_NOT_TRACK": "1",
                **placed,
                **(environment or {}),
            },
            folder=checkout,
        )  # fmt: skip

    def _wait_for_page(self, name: str, url: str) -> None:
        self.processes.wait(name, TITLES[name], partial(_answers, url), READY_SECONDS)

    def _wait_for_worker(self, name: str, pool: str, since: datetime) -> None:
        """Wait for a heartbeat of the worker: an earlier one of the same name would still count as online."""

        def online() -> bool:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                listed = self.api(f"work_pools/{pool}/workers/filter", {})
                return any(
                    WORKER + item["name"] == name
                    and item["status"] == "ONLINE"
                    and datetime.fromisoformat(item["last_heartbeat_time"]) >= since
                    for item in listed
                )
            return False

        self.processes.wait(name, f"Worker {name.removeprefix(WORKER)}", online, READY_SECONDS)


def private_temporary() -> Path:
    """A folder for temporary files of this user's workers alone, with a short path (sockets may lie in it).

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


def visible_devices() -> list[str]:
    """The GPUs to share out: those of CUDA_VISIBLE_DEVICES if set, else all that nvidia-smi lists."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [item.strip() for item in chosen.split(",") if item.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, _ in enumerate(filter(str.strip, listed.stdout.splitlines()))]


def _direct() -> urllib.request.OpenerDirector:
    """Requests to the loopback interface go past any proxy of the user's."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _answers(url: str) -> bool:
    try:
        with _direct().open(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, ValueError):  # refused, reset, timed out, or no HTTP yet
        return False


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

StateOption = Annotated[Path, typer.Option("--state", metavar="DIR", help="Folder for data, logs and pids.")]
DEFAULT_STATE = ROOT / ".stack"
HIGHEST_PORT = 65535


@app.command()
def up(
    state: StateOption = DEFAULT_STATE,
    prefect_port: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=HIGHEST_PORT, help="Default: as last time, else 4200.")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=HIGHEST_PORT, help="Default: as last time, else 5000.")
    ] = None,
    postgres_port: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=HIGHEST_PORT, help="Default: any free one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Workers on pool `gpu`. Default: one a checkout.")
    ] = None,
    checkout: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="A worker's checkout; repeatable. Default: this one.")
    ] = None,
    no_postgres: Annotated[
        bool, typer.Option("--no-postgres", help="SQLite files even where PostgreSQL is installed.")
    ] = False,
) -> None:
    """Start the stack, or what of it does not run, and wait until it is healthy."""
    stack = Stack(
        state,
        prefect_port=prefect_port,
        mlflow_port=mlflow_port,
        postgres_port=postgres_port,
        checkouts=worker_checkouts(workers, checkout or [ROOT]),
        with_postgres=not no_postgres,
    )
    begun = time.monotonic()
    started = stack.up()
    if started:
        print(f"The stack is up after {time.monotonic() - begun:.0f} s, its data in {stack.database}.")
    else:
        print(f"The stack runs already, its data in {stack.database}.")
    print(f"  Prefect  {stack.prefect_url}\n  MLflow   {stack.mlflow_url}")
    print(f"To use it from a shell:  set -a; . {shlex.quote(_short(stack.state / 'env'))}; set +a")


@app.command()
def down(state: StateOption = DEFAULT_STATE) -> None:
    """Stop the stack's processes, and no others; its data stay."""
    stopped = Stack(state).down()
    print(f"Stopped: {', '.join(stopped)}." if stopped else "Nothing of the stack runs.")


@app.command()
def status(state: StateOption = DEFAULT_STATE) -> None:
    """Say what runs. Exit 1 if nothing does, or something has died."""
    stack = Stack(state)
    names = stack.processes.names()
    found = {
        name: stack.processes.pid(name) for name in sorted(names, key=lambda name: (name.startswith(WORKER), name))
    }
    for name, pid in found.items():
        print(f"{name:16} {f'runs, pid {pid}' if pid else 'has died'}  {_short(stack.processes.log(name))}")
    if not found:
        print("Nothing of the stack runs.")
    if not found or None in found.values():
        raise typer.Exit(1)
    print(f"Prefect {stack.prefect_url}, MLflow {stack.mlflow_url}, data in {stack.database}.")


def worker_checkouts(workers: int | None, checkouts: Sequence[Path]) -> list[Path]:
    """The checkout of each gpu worker: all that are given, or the first `workers`.

    Raises:
        UserError: there are more workers than checkouts.
    """
    if workers is not None and workers > len(checkouts):
        raise UserError(f"{workers} workers need {workers} checkouts, not {len(checkouts)}: {OWN_CHECKOUT}")
    return list(checkouts if workers is None else checkouts[:workers])


def _short(path: Path) -> str:
    """The path as seen from here, where that is shorter."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main() -> None:
    """Run the command line; whatever goes wrong ends in one sentence on stderr and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _interrupt)  # a killed `up` cleans up as an interrupted one does
    try:
        app(prog_name="python -m flows.stack")
    except FlawsmithError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        if (refused := refusal(error)) is None:
            raise
        _fail(str(refused), refused.exit_code)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(sentence: str, code: int) -> NoReturn:
    print("flows.stack: " + " ".join(sentence.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

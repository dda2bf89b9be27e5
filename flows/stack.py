"""The whole stack on one machine, as real processes: PostgreSQL (else SQLite), Prefect, MLflow and workers.

    python -m flows.stack up        # or `make up`; again: starts what has died, restarts what is to run differently
    set -a; . .stack/env            # points a shell's `prefect`, `dvc repro` and `flawsmith` to it
    python -m flows.stack down      # or `make down`; the data stay in .stack/

supervisord.conf says how the programs run. Everything listens on the loopback interface alone and asks nobody who they
are: it is for one machine that its users share. docs/deploy says what several machines need.
"""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import httpx
import typer
from filelock import FileLock, Timeout

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import read_json, write_json
from flows import postgres
from flows.machine import LOOPBACK, check_port, clean_environment, command, free_port, visible_devices
from flows.postgres import Postgres
from flows.supervisor import Supervisor, write_private

logger = logging.getLogger("flows.stack")

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PORTS = {"prefect": 4200, "mlflow": 5000}
READY_SECONDS = 300.0  # servers take some ten seconds on two idle cores; a busy machine gets much more
SETUP_SECONDS = 300.0
TITLES = {"postgres": "PostgreSQL", "prefect": "the Prefect server", "mlflow": "the MLflow server"}
PAGES = {"prefect": "api/health", "mlflow": "health"}
WORKER = "worker-"
OWN_CHECKOUT = (
    "DVC runs one pipeline at a time in a folder; make another (`git worktree add ../second`) and give --checkout once "
    "for each worker."
)


class Stack:
    """The stack of one state folder.

    Args:
        state: folder for data, logs and configuration; made if missing.
        ports: of `prefect`, `mlflow` and `postgres`. Default of the first two: as the last time, else DEFAULT_PORTS; of
            PostgreSQL: any free one, a new one at each start.
        checkouts: one worker on pool `gpu` for each of these checkouts, and one on pool `control` in the first; none
            starts the servers alone.
        with_postgres: False keeps the data in SQLite files even where PostgreSQL is installed.
        environment: added to every process's environment.
    """

    def __init__(
        self,
        state: Path,
        *,
        ports: Mapping[str, int] | None = None,
        checkouts: Sequence[Path] = (),
        with_postgres: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.state = state.resolve()
        self.checkouts = [path.resolve() for path in checkouts]
        self._with_postgres, self._asked = with_postgres, dict(ports or {})
        self._remembered = self.state / "settings.json"
        earlier = read_json(self._remembered) if self._remembered.exists() else {}
        self._earlier: dict[str, int] = earlier.get("ports", {})
        self.ports: dict[str, int] = DEFAULT_PORTS | self._earlier | self._asked
        self.database: str | None = earlier.get("database")  # what holds the data; None before the first `up`
        self._base = clean_environment(Path(sys.executable).parent) | dict(environment or {})
        self._base.setdefault("PREFECT_WORKER_QUERY_SECONDS", "3")  # Prefect's 10 s are meant for a server of many
        self.supervisor = Supervisor(self.state, self._base)

    def url(self, server: str) -> str:
        """The address of `prefect` (its API is below `/api`) or `mlflow` (its tracking URI too)."""
        return f"http://{LOOPBACK}:{self.ports[server]}"

    def variables(self) -> dict[str, str]:
        """What points a process to this stack."""
        return {
            "PREFECT_API_URL": f"{self.url('prefect')}/api",
            "PREFECT_HOME": str(self.state / "prefect"),  # no profile, key or result of the user's own gets in between
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
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
            The names of the programs that were started, in order.

        Raises:
            UserError: a port is taken, or the checkouts cannot be used.
            FlawsmithError: something did not become healthy; what this call has started is stopped again.
        """
        self._check_checkouts()
        started: list[str] = []
        with self._alone():
            try:
                if not self.supervisor.runs():
                    self.supervisor.shut_down()  # what a killed supervisord has left
                database, workers = self._database(), self._workers()
                self._check_ports(["postgres", *PAGES] if isinstance(database, Postgres) else list(PAGES))
                write_json(self._remembered, {"database": self.database, "ports": self.ports})
                self._earlier = dict(self.ports)
                self.supervisor.configure(self._values(database, workers))
                if isinstance(database, Postgres):
                    self._start_postgres(database, started)
                self._start(PAGES, started)
                for name, page in PAGES.items():
                    self._wait(name, partial(_answers, f"{self.url(name)}/{page}"))
                if setup:
                    self._set_up([worker["placed"].get("FLAWSMITH_GPU") for worker in workers])
                since = datetime.now(UTC)
                for name in self._start([f"{WORKER}{worker['name']}" for worker in workers], started):
                    self._wait(name, partial(self._is_online, name.removeprefix(WORKER), since))
            except BaseException:
                if started:
                    logger.info("stopping what was started")
                self._stop(started)
                if not any(item["pid"] for item in self.supervisor.programs().values()):
                    self.supervisor.shut_down()
                raise
            write_private(self.state / "env", "".join(f"{k}={shlex.quote(v)}\n" for k, v in self.variables().items()))
        return started

    def down(self) -> list[str]:
        """Stop the programs of this stack, workers first, PostgreSQL last; the data stay.

        Returns:
            The names of the programs that ran.
        """
        if not self.state.is_dir():
            return []
        with self._alone():
            running = [name for name, found in self.supervisor.programs().items() if found["pid"]]
            self._stop(running)
            self.supervisor.shut_down()
            (self.state / "env").unlink(missing_ok=True)
        return running

    def api(self, path: str, content: Any = None) -> Any:
        """Ask the Prefect server's API: POST with a content, GET without one.

        Raises:
            httpx.HTTPError: no answer, or one of an error status.
        """
        method = "GET" if content is None else "POST"
        # trust_env: the loopback interface is not behind a proxy of the user's
        answer = httpx.request(method, f"{self.url('prefect')}/api/{path}", json=content, timeout=30, trust_env=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def _check_checkouts(self) -> None:
        for path in self.checkouts:
            if not (path / "dvc.yaml").is_file():
                raise UserError(f"{path} holds no dvc.yaml, so no worker can work there; give a checkout's root.")
        if len(set(self.checkouts)) < len(self.checkouts):
            raise UserError(f"Two workers cannot share a checkout: {OWN_CHECKOUT}")

    def _check_ports(self, names: Sequence[str]) -> None:
        """Refuse a port on which anybody but the stack's own server listens."""
        programs = self.supervisor.programs()
        for name in names:
            own = programs.get(name, {}).get("pid") and self._earlier.get(name) == self.ports[name]
            if not own:
                check_port(self.ports[name], TITLES[name], f"--{name}-port")

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two commands at once on one state folder would start everything twice."""
        self.state.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.state / "lock", timeout=0):
                yield
        except Timeout as error:
            raise UserError(f"Another command is at work on {self.state}; wait until it has ended.") from error

    def _start(self, names: Sequence[str] | Mapping[str, str], started: list[str]) -> list[str]:
        """Start the programs that do not run; return their names. They are not waited for."""
        programs = self.supervisor.programs()
        begun = [name for name in names if not programs[name]["pid"]]
        self.supervisor.stop(begun)  # one that supervisord is about to start again, and what is left of earlier lives
        for name in begun:
            logger.info("starting %s", TITLES.get(name, name))
            started.append(name)
            self.supervisor.start(name)
        return begun

    def _wait(self, name: str, healthy: Any) -> None:
        title = TITLES.get(name, f"Worker {name.removeprefix(WORKER)}")
        self.supervisor.wait(name, title, healthy, READY_SECONDS)

    def _stop(self, names: Sequence[str]) -> None:
        """Stop the workers, then the web servers, then their database, each group together."""
        self.supervisor.stop([name for name in names if name.startswith(WORKER)])
        self.supervisor.stop([name for name in names if name in PAGES])
        self.supervisor.stop([name for name in names if name == "postgres"])

    def _start_postgres(self, database: Postgres, started: list[str]) -> None:
        self._start(["postgres"], started)
        self._wait("postgres", database.answers)
        programs = self.supervisor.programs()
        # a server that is older than its database holds connections that are gone
        self.supervisor.stop([name for name in PAGES if programs[name]["start"] < programs["postgres"]["start"]])

    def _database(self) -> Postgres | str | None:
        """What holds the data: PostgreSQL of our own, the address of a given one, or None: SQLite."""
        self.database, binaries = postgres.choose(self.state, self.database, self._with_postgres)
        if binaries is None:
            return os.environ.get(postgres.GIVEN)
        if "postgres" not in self._asked and self.supervisor.pid("postgres") is None:
            self.ports["postgres"] = free_port()
        server = Postgres(self.state, binaries, self.ports["postgres"])
        server.initialise(self.supervisor.log("initdb"))
        return server

    def _workers(self) -> list[dict[str, Any]]:
        """The workers, as supervisord.conf wants them: one a checkout on pool `gpu`, and one on pool `control`."""
        devices, found = visible_devices(), []
        for number, checkout in enumerate(self.checkouts):
            device = number % len(devices) if devices else number
            placed = {"FLAWSMITH_GPU": f"gpu-{device}"}  # workers that share a GPU share its limit
            if devices:
                placed["CUDA_VISIBLE_DEVICES"] = devices[device]
            found.append({"name": f"gpu-{number}", "pool": "gpu", "checkout": checkout, "placed": placed})
        if found:
            found.append({"name": "control", "pool": "control", "checkout": self.checkouts[0], "placed": {}})
        return found

    def _values(self, database: Postgres | str | None, workers: list[dict[str, Any]]) -> dict[str, Any]:
        """What fills in supervisord.conf."""
        address = database.address if isinstance(database, Postgres) else database
        own = {"binaries": database.binaries, "data": database.data} if isinstance(database, Postgres) else None
        prefect, mlflow = f"sqlite+aiosqlite:///{self.state}/prefect.db", f"sqlite:///{self.state}/mlflow.db"
        if address:
            prefect, mlflow = f"postgresql+asyncpg://{address}/prefect", f"postgresql://{address}/mlflow"
        return {
            "python": sys.executable,
            "ports": self.ports,
            "prefect_url": self.url("prefect"),
            "mlflow_url": self.url("mlflow"),
            "postgres": own,
            "prefect_database": prefect,
            "mlflow_database": mlflow,
            "workers": workers,
        }

    def _set_up(self, gpus: Sequence[str | None]) -> None:
        """Run `python -m flows.setup` of the first checkout, with a limit for each of these GPUs."""
        logger.info("making pools, limits, deployments and automations")
        log = self.supervisor.log("setup")
        limits = [word for name in dict.fromkeys(filter(None, gpus)) for word in ("--gpu", name)]
        with log.open("wb") as stream:
            try:
                code = subprocess.run(
                    [sys.executable, "-m", "flows.setup", *limits],
                    cwd=self.checkouts[0] if self.checkouts else ROOT, env=self.environment(),
                    stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, timeout=SETUP_SECONDS, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise FlawsmithError(f"flows.setup took more than {SETUP_SECONDS:.0f} s; see {log}.") from error
        if code:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise FlawsmithError(f"flows.setup failed ({lines[-1] if lines else 'silently'}); {log} holds all it said.")

    def _is_online(self, worker: str, since: datetime) -> bool:
        """Whether a worker has sent a heartbeat since then: an earlier one of its name still counts as online."""
        with contextlib.suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
            return any(
                item["name"] == worker
                and item["status"] == "ONLINE"
                and datetime.fromisoformat(item["last_heartbeat_time"]) >= since
                for item in self.api(f"work_pools/{worker.partition('-')[0]}/workers/filter", {})
            )
        return False


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:  # refused, reset, timed out, or no HTTP yet
        return False


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
StateOption = Annotated[Path, typer.Option("--state", metavar="DIR", help="Folder for data, logs and settings.")]
DEFAULT_STATE = ROOT / ".stack"
PortOption = partial(typer.Option, metavar="N", min=1, max=65535)


@app.command()
def up(
    state: StateOption = DEFAULT_STATE,
    prefect_port: Annotated[int | None, PortOption(help="Default: as last time, else 4200.")] = None,
    mlflow_port: Annotated[int | None, PortOption(help="Default: as last time, else 5000.")] = None,
    postgres_port: Annotated[int | None, PortOption(help="Default: any free one.")] = None,
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
    checkouts = checkout or [ROOT]
    if workers is not None and workers > len(checkouts):
        raise UserError(f"{workers} workers need {workers} checkouts, not {len(checkouts)}: {OWN_CHECKOUT}")
    asked = {"prefect": prefect_port, "mlflow": mlflow_port, "postgres": postgres_port}
    ports = {name: port for name, port in asked.items() if port}
    stack = Stack(state, ports=ports, checkouts=checkouts[:workers], with_postgres=not no_postgres)
    begun = time.monotonic()
    started = stack.up()
    how = f"is up after {time.monotonic() - begun:.0f} s" if started else "runs already"
    print(f"The stack {how}, its data in {stack.database}.")
    print(f"  Prefect  {stack.url('prefect')}\n  MLflow   {stack.url('mlflow')}")
    print(f"To use it from a shell:  set -a; . {shlex.quote(os.path.relpath(stack.state / 'env'))}; set +a")


@app.command()
def down(state: StateOption = DEFAULT_STATE) -> None:
    """Stop the stack's processes, and no others; its data stay."""
    stopped = Stack(state).down()
    print(f"Stopped: {', '.join(stopped)}." if stopped else "Nothing of the stack runs.")


@app.command()
def status(state: StateOption = DEFAULT_STATE) -> None:
    """Say what runs. Exit 1 if nothing does, or something has died."""
    stack = Stack(state)
    programs = stack.supervisor.programs()
    for name, found in programs.items():
        print(f"{name:16} {found['statename'].lower():9} {found['description']:28} {stack.supervisor.log(name)}")
    if not programs:
        print("Nothing of the stack runs.")
    if not programs or any(found["statename"] != "RUNNING" for found in programs.values()):
        raise typer.Exit(1)
    print(f"Prefect {stack.url('prefect')}, MLflow {stack.url('mlflow')}, data in {stack.database}.")


def main() -> None:
    """Run the command line; whatever goes wrong ends in one sentence on stderr and an exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, _interrupt)  # a killed `up` cleans up as an interrupted one does
    command("flows.stack", partial(app, prog_name="python -m flows.stack"))


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()

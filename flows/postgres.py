"""A PostgreSQL server of our own in the state folder, from the binaries that are installed: nothing to configure.

It listens on the loopback interface alone, asks for a password that lies in a file only its owner can read, and holds
one database each for Prefect and MLflow. PostgreSQL refuses to run as root; root runs it as the user `postgres`.
"""

import logging
import os
import pwd
import re
import secrets
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flawsmith.errors import FlawsmithError, UserError
from flows.machine import LOOPBACK
from flows.supervisor import write_private

logger = logging.getLogger("flows.stack")

ROLE = "flawsmith"
SYSTEM_USER = "postgres"  # what packages of PostgreSQL create
DATABASES = ("prefect", "mlflow")
GIVEN = "FLAWSMITH_STACK_DATABASE"  # names a PostgreSQL that runs already: `USER:PASSWORD@HOST:PORT`
POSTGRESQL, SQLITE = "postgresql", "sqlite"


@dataclass(frozen=True)
class Postgres:
    """The server's place and address.

    Attributes:
        state: folder that holds `postgres/` (the data) and `postgres-password`.
        binaries: folder of initdb and postgres.
        port: TCP port on the loopback interface.
    """

    state: Path
    binaries: Path
    port: int

    @property
    def data(self) -> Path:
        """The folder of the data."""
        return self.state / "postgres"

    @property
    def address(self) -> str:
        """`ROLE:PASSWORD@HOST:PORT`: for environments of processes, never for a command line."""
        return f"{ROLE}:{(self.state / 'postgres-password').read_text().strip()}@{LOOPBACK}:{self.port}"

    def initialise(self, log: Path) -> None:
        """Make the data folder, unless it is there.

        Raises:
            FlawsmithError: initdb failed; the message names its log.
        """
        if (self.data / "PG_VERSION").exists():
            return
        shutil.rmtree(self.data, ignore_errors=True)  # what an interrupted initdb left
        self.data.mkdir(parents=True)
        log.parent.mkdir(exist_ok=True)
        password, handed = self.state / "postgres-password", self.state / "postgres-password.initdb"
        write_private(password, secrets.token_hex(24) + "\n")
        write_private(handed, password.read_text())
        command: list[str | Path] = [
            self.binaries / "initdb", "--pgdata", self.data, "--username", ROLE, "--pwfile", handed,
            "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C",
        ]  # fmt: skip
        try:
            if os.geteuid() == 0:
                shutil.chown(self.data, SYSTEM_USER, SYSTEM_USER)
                shutil.chown(handed, SYSTEM_USER, SYSTEM_USER)
            with log.open("wb") as stream:
                code = subprocess.run(
                    command, cwd=self.data, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, check=False,
                    **_unprivileged(),
                ).returncode  # fmt: skip
        finally:
            handed.unlink(missing_ok=True)
        if code:
            shutil.rmtree(self.data, ignore_errors=True)
            raise FlawsmithError(
                f"PostgreSQL's initdb failed; {log} says why. `--no-postgres` keeps the stack's data in SQLite files."
            )

    def answers(self) -> bool:
        """Whether the server accepts our password; it makes the databases that are missing."""
        import psycopg2

        try:
            connection = psycopg2.connect(f"postgresql://{self.address}/postgres?connect_timeout=3")
        except psycopg2.OperationalError:
            return False
        connection.autocommit = True  # CREATE DATABASE cannot run in a transaction
        with connection.cursor() as cursor:
            cursor.execute("SELECT datname FROM pg_database")
            for name in set(DATABASES) - {row[0] for row in cursor.fetchall()}:
                cursor.execute(f"CREATE DATABASE {name}")
        connection.close()
        return True


def choose(state: Path, kept: str | None, wanted: bool) -> tuple[str, Path | None]:
    """What holds the stack's data, and the binaries of a PostgreSQL of our own, if that does.

    Args:
        state: the state folder.
        kept: what holds them already; None before the first start.
        wanted: whether PostgreSQL may be used.

    Raises:
        UserError: what holds them cannot be used now.
    """
    anew = f"or remove {state} to start anew without what it holds"
    given = f"the PostgreSQL of {GIVEN}" if os.environ.get(GIVEN) else None
    if given:
        if kept not in (None, given):
            raise UserError(f"The data of this stack lie in {kept}; unset {GIVEN}, {anew}.")
        return given, None
    if kept == SQLITE or (kept is None and not wanted):
        return SQLITE, None
    if kept not in (None, POSTGRESQL):
        raise UserError(f"The data of this stack lie in {kept}; set that, {anew}.")
    if not wanted:
        raise UserError(f"The data of this stack lie in PostgreSQL; leave out --no-postgres, {anew}.")
    version = state / "postgres" / "PG_VERSION"
    needed = version.read_text().strip() if kept and version.exists() else None
    binaries = find_binaries(needed)
    if kept and binaries is None:
        raise UserError(
            f"The data of this stack lie in PostgreSQL {needed or ''}, which is not installed; install it, {anew}."
        )
    problem = None if kept else "its server is not installed" if binaries is None else obstacle(state)
    if problem is not None:
        logger.warning("PostgreSQL is not used, because %s; the data go to SQLite files.", problem)
        return SQLITE, None
    return POSTGRESQL, binaries


def find_binaries(version: str | None = None) -> Path | None:
    """The folder of the newest installed PostgreSQL server (of this major version, if given), or None."""
    folders = [Path(entry) for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if entry]
    folders += Path("/usr/lib/postgresql").glob("*/bin")  # Debian keeps servers off PATH
    folders += Path("/usr").glob("pgsql-*/bin")  # and so do PostgreSQL's packages for Red Hat
    found: list[tuple[int, Path]] = []
    for folder in dict.fromkeys(folders):
        if all(os.access(folder / name, os.X_OK) for name in ("initdb", "postgres")):
            said = subprocess.run([folder / "postgres", "--version"], capture_output=True, text=True, check=False)
            if (match := re.search(r"\) (\d+)", said.stdout)) and version in (None, match[1]):
                found.append((int(match[1]), folder))
    return max(found)[1] if found else None


def obstacle(state: Path) -> str | None:
    """Why PostgreSQL cannot run for this caller with its data in `state` (an existing folder), or None."""
    if os.geteuid() != 0:
        return None
    try:
        pwd.getpwnam(SYSTEM_USER)
    except KeyError:
        return f"it refuses to run as root, and there is no user `{SYSTEM_USER}`"
    if subprocess.run(["test", "-x", state], cwd="/", check=False, **_unprivileged()).returncode:
        return f"it refuses to run as root, and the user `{SYSTEM_USER}` cannot reach {state}"
    return None


def _unprivileged() -> Mapping[str, Any]:
    """The options of `subprocess.run` that let root's child be PostgreSQL's user."""
    return {"user": SYSTEM_USER, "group": SYSTEM_USER, "extra_groups": ()} if os.geteuid() == 0 else {}

"""A PostgreSQL server of our own in the state folder, from the binaries that are installed: nothing to configure.

It listens on the loopback interface alone, asks for a password that lies in a file only its owner can read, and holds
one database each for Prefect and MLflow. PostgreSQL refuses to run as root; root runs it as the user `postgres`.
"""

import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from flawsmith.errors import FlawsmithError
from flows.processes import LOOPBACK, Part, write_private

ROLE = "flawsmith"
SYSTEM_USER = "postgres"  # what packages of PostgreSQL create
DATABASES = ("prefect", "mlflow")
PROBE_SECONDS = 3
STOP = (signal.SIGINT, 60.0)  # a "fast" shutdown, as `pg_ctl stop -m fast` asks for, and its seconds


@dataclass(frozen=True)
class Postgres:
    """The server's place and address.

    Args:
        state: folder that holds `postgres/` (the data) and `postgres-password`.
        binaries: folder of initdb and postgres.
        port: TCP port on the loopback interface.
    """

    state: Path
    binaries: Path
    port: int

    @property
    def data(self) -> Path:
        return self.state / "postgres"

    def part(self) -> Part:
        """How the server starts. No unix socket: its path could be too long, and its folder not ours to write."""
        return Part(
            name="postgres",
            command=(
                str(self.binaries / "postgres"), "-D", str(self.data), "-h", LOOPBACK, "-p", str(self.port), "-k", "",
            ),
            folder=self.data,
            user=_system_user(),
        )  # fmt: skip

    def initialise(self, log: Path) -> None:
        """Make the data folder, unless it is there.

        Raises:
            FlawsmithError: initdb failed; the message names its log.
        """
        if (self.data / "PG_VERSION").exists():
            return
        user = _system_user()
        shutil.rmtree(self.data, ignore_errors=True)  # what an interrupted initdb left
        self.data.mkdir(parents=True)
        password, handed = self.state / "postgres-password", self.state / "postgres-password.initdb"
        write_private(password, secrets.token_hex(24) + "\n")
        write_private(handed, password.read_text())
        log.parent.mkdir(parents=True, exist_ok=True)
        try:
            if user is not None:
                shutil.chown(self.data, user, user)
                shutil.chown(handed, user, user)
            with log.open("wb") as stream:
                result = subprocess.run(
                    [
                        self.binaries / "initdb", "--pgdata", self.data, "--username", ROLE, "--pwfile", handed,
                        "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C",
                    ],
                    cwd=self.data, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, check=False,
                    user=user, group=user, extra_groups=None if user is None else (),
                )  # fmt: skip
        finally:
            handed.unlink(missing_ok=True)
        if result.returncode:
            shutil.rmtree(self.data, ignore_errors=True)
            raise FlawsmithError(
                f"PostgreSQL's initdb failed; {log} says why. `--no-postgres` keeps the stack's data in SQLite files."
            )

    def answers(self) -> bool:
        """Whether the server accepts our password."""
        import psycopg2

        try:
            psycopg2.connect(self._dsn("postgres")).close()
        except psycopg2.OperationalError:
            return False
        return True

    def create_databases(self) -> None:
        """Make the databases that are missing."""
        import psycopg2

        connection = psycopg2.connect(self._dsn("postgres"))
        try:
            connection.autocommit = True  # CREATE DATABASE cannot run in a transaction
            with connection.cursor() as cursor:
                cursor.execute("SELECT datname FROM pg_database")
                present = {row[0] for row in cursor.fetchall()}
                for name in DATABASES:
                    if name not in present:
                        cursor.execute(f"CREATE DATABASE {name}")
        finally:
            connection.close()

    def url(self, scheme: str, database: str) -> str:
        """The database's address, password included: for environments of processes, never for a command line."""
        return f"{scheme}://{ROLE}:{self._password()}@{LOOPBACK}:{self.port}/{database}"

    def _dsn(self, database: str) -> str:
        return f"{self.url('postgresql', database)}?connect_timeout={PROBE_SECONDS}"

    def _password(self) -> str:
        return (self.state / "postgres-password").read_text().strip()


def find_binaries(version: str | None = None) -> Path | None:
    """The folder of the newest installed PostgreSQL server (of this major version, if given), or None."""
    folders = [Path(entry) for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if entry]
    folders += Path("/usr/lib/postgresql").glob("*/bin")  # Debian keeps servers off PATH
    if config := shutil.which("pg_config"):
        asked = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False)
        folders += [Path(asked.stdout.strip())] if asked.returncode == 0 else []
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
    if _system_user() is None:
        return f"it refuses to run as root, and there is no user `{SYSTEM_USER}`"
    reach = subprocess.run(
        ["test", "-x", state], user=SYSTEM_USER, group=SYSTEM_USER, extra_groups=(), cwd="/", check=False
    )
    if reach.returncode:
        return f"it refuses to run as root, and the user `{SYSTEM_USER}` cannot reach {state}"
    return None


def _system_user() -> str | None:
    """Whom the server must run as: nobody special, unless we are root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(SYSTEM_USER).pw_name
    except KeyError:
        return None

"""One connection to MLflow: where its store is, whether it answers, and its errors in one sentence."""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flawsmith.errors import UserError

PROBE_SECONDS = 4.0
DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}


def tracking_uri(root: Path) -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI if set, else `mlflow.db` in the project's root."""
    return os.environ.get("MLFLOW_TRACKING_URI") or local_uri(root)


def local_uri(root: Path) -> str:
    """The project's own store."""
    return f"sqlite:///{(root / 'mlflow.db').resolve().as_posix()}"


def sqlite_file(uri: str) -> Path | None:
    """The file of a SQLite store, None for any other; it may not exist yet."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def check_store(root: Path) -> str:
    """The tracking URI (without its password), if the store answers within seconds; a SQLite file is not created.

    Raises:
        UserError: it does not answer.
    """
    uri = tracking_uri(root)
    database = sqlite_file(uri)
    if database is None or database.is_file():
        connect(uri)
    elif not os.access(database.parent, os.W_OK):
        raise UserError(f"{database} cannot be created; make its folder writable or set MLFLOW_TRACKING_URI.")
    return without_password(uri)


def connect(uri: str) -> Any:
    """An MLflow client whose store has answered once, within seconds.

    Raises:
        UserError: it does not answer, or MLflow is not installed.
    """
    for key, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's own 7 take minutes
    }.items():
        os.environ.setdefault(key, value)
    parts = urlsplit(uri)
    port = DATABASE_PORTS.get(parts.scheme.partition("+")[0])
    try:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient
    except ImportError as error:
        raise UserError(
            f"MLflow cannot be imported ({error}); `pip install 'flawsmith[pipeline]'`, or set `tracking.mode: off`."
        ) from error
    try:
        if port and parts.hostname:  # SQLAlchemy's store would try a dead one for minutes
            socket.create_connection((parts.hostname, parts.port or port), timeout=PROBE_SECONDS).close()
        if database := sqlite_file(uri):
            database.parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError, ImportError) as error:
        raise _unreachable(uri, error) from error
    return client


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into one sentence that names the store and the remedy.

    Raises:
        UserError: in their place.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise _unreachable(uri, error) from error


def _unreachable(uri: str, error: BaseException) -> UserError:
    return UserError(
        f"The MLflow tracking store {without_password(uri)} cannot be used ({short_reason(error, uri)}); start the "
        "server, correct MLFLOW_TRACKING_URI, or set `tracking.mode: off` in params.yaml."
    )


def short_reason(error: BaseException, uri: str) -> str:
    """The innermost cause in one line; MLflow wraps it in several, some of which repeat the URI with its password."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(uri, without_password(uri))[:300]


def without_password(uri: str) -> str:
    """The URI as it may be shown."""
    return re.sub(r"(://[^/@:]*):[^/@]*@", r"\1:***@", uri)

"""What the commands of flows/ share: errors as sentences, ports, GPUs, an environment that points nowhere else."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from flawsmith.errors import INTERRUPTED, FlawsmithError, UserError, refusal

LOOPBACK = "127.0.0.1"
TUNING = ("PREFECT_FLOWS_", "PREFECT_LOGGING_", "PREFECT_SERVER_SERVICES_", "PREFECT_WORKER_")
POINTING = ("PREFECT_", "MLFLOW_", "SUPERVISOR_")
PLACING = frozenset(f"FLAWSMITH_{name}" for name in ("ACTOR", "CHECKOUT", "DEPLOYED_FROM", "FLOW_RUN", "GPU"))


def command(name: str, call: Callable[[], object]) -> None:
    """Run a command line; whatever goes wrong ends in one sentence on stderr and an exit status."""
    try:
        call()
    except KeyboardInterrupt:  # one that came where typer does not catch it
        raise SystemExit(INTERRUPTED) from None
    except (FlawsmithError, OSError, httpx.TransportError) as error:
        told: Exception | None = error
        if isinstance(error, httpx.TransportError):
            server = os.environ.get("PREFECT_API_URL")
            told = UserError(
                f"{server} does not answer ({error}); start it with `make up`, or correct PREFECT_API_URL."
            )
        elif isinstance(error, OSError):
            told = refusal(error)
        if not isinstance(told, FlawsmithError):
            raise
        print(f"{name}: {' '.join(str(told).split())}", file=sys.stderr)
        raise SystemExit(told.exit_code) from error


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


def clean_environment(binaries: Path) -> dict[str, str]:
    """The caller's environment without what would point Prefect, MLflow or a worker elsewhere.

    What only tunes Prefect stays. `binaries` comes first on PATH, so that a worker's `dvc` and `flawsmith` are those of
    the running Python. A proxy is told to leave the loopback interface alone.
    """
    environment = {
        key: value
        for key, value in os.environ.items()
        if key.startswith(TUNING) or not (key.startswith(POINTING) or key in PLACING)
    }
    environment["PATH"] = os.pathsep.join([str(binaries), environment.get("PATH", os.defpath)])
    for name in ("no_proxy", "NO_PROXY"):
        environment[name] = ",".join(filter(None, [environment.get(name), LOOPBACK, "localhost"]))
    return environment


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
    holder = ""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                holder = f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    raise UserError(
        f"Port {port}, wanted for {title}, is taken{holder}; stop that, or choose another port with {option} N."
    )

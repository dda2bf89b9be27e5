"""The stack's processes themselves: start, health, restart, refusal, and an end that hits nobody else."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from stack_workers import kill

from flawsmith.errors import FlawsmithError, UserError
from flows import postgres
from flows.machine import LOOPBACK, free_port
from flows.stack import ROOT, Stack

SERVERS = ("prefect", "mlflow")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def pids(stack: Stack) -> dict[str, int]:
    return {name: found["pid"] for name, found in stack.supervisor.programs().items()}


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of the stack's business."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def make_stack(open_folder: Callable[[], Path]) -> Iterator[Callable[..., Stack]]:
    """Makes stacks on free ports in folders of their own, on SQLite, and takes them down."""
    made: list[Stack] = []

    def make(**options: Any) -> Stack:
        ports = {"prefect": free_port(), "mlflow": free_port()} | options.pop("ports", {})
        made.append(Stack(open_folder() / "state", ports=ports, with_postgres=False, **options))
        return made[-1]

    yield make
    for stack in made:
        stack.down()


def test_the_session_runs_on_postgresql_where_it_is_installed(stack: Stack) -> None:
    if postgres.find_binaries() is None:
        pytest.skip("no PostgreSQL server is installed; these tests run on SQLite")
    assert stack.database == "postgresql"
    password = stack.state / "postgres-password"
    assert password.stat().st_mode & 0o077 == 0
    assert (stack.state / "supervisord.conf").stat().st_mode & 0o077 == 0
    secret = password.read_text().strip()
    leaks = [
        process.pid for process in psutil.process_iter(["cmdline"]) if secret in " ".join(process.info["cmdline"] or [])
    ]
    assert not leaks, "a command line shows the password to every user"
    assert not any((stack.state / name).exists() for name in ("prefect.db", "mlflow.db"))


def test_nothing_listens_beyond_the_loopback_interface(stack: Stack) -> None:
    ours = {process.pid for process in stack.supervisor.family()}
    addresses = {
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.pid in ours
    }
    assert {port for _, port in addresses} >= {stack.ports["prefect"], stack.ports["mlflow"]}
    assert {ip for ip, _ in addresses} == {LOOPBACK}


def test_mlflow_keeps_runs_and_artifacts(stack: Stack, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=stack.url("mlflow"))
    run = client.create_run(client.create_experiment("stack"))
    (tmp_path / "note.txt").write_text("kept")
    client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["note.txt"]
    assert [path.read_text() for path in (stack.state / "mlflow-artifacts").rglob("note.txt")] == ["kept"]


def test_a_killed_server_comes_back_by_itself_and_up_again_changes_nothing(stack: Stack) -> None:
    before = pids(stack)
    kill(stack, "mlflow")
    while pids(stack)["mlflow"] in (0, before["mlflow"]):
        time.sleep(0.1)
    assert stack.up(setup=False) == []  # it waits until all is healthy
    assert listens(stack.ports["mlflow"])
    after = pids(stack)
    assert {name for name in after if after[name] != before[name]} == {"mlflow"}
    assert stack.up(setup=False) == []
    assert pids(stack) == after


def test_down_stops_just_its_own_processes_and_the_data_outlive_a_killed_supervisor(
    make_stack: Callable[..., Stack], sleeper: subprocess.Popen[bytes]
) -> None:
    first = make_stack()
    assert first.up(setup=False) == ["prefect", "mlflow"]
    assert first.database == "sqlite"
    first.api("flows/", {"name": "remembered"})
    ours = first.supervisor.family()
    assert len(ours) >= 2
    supervisord = psutil.Process(int((first.state / "supervisord.pid").read_text()))
    supervisord.kill()
    psutil.wait_procs([supervisord], timeout=10)

    again = Stack(first.state)  # as `make up` in another shell: it knows no more than the folder says
    again.up(setup=False)  # PostgreSQL is allowed now, but the data lie in SQLite
    assert (again.database, again.ports) == ("sqlite", first.ports)
    assert not set(ours) & set(again.supervisor.family()), "what the dead supervisor left was ended"
    assert [flow["name"] for flow in again.api("flows/filter", {})] == ["remembered"]

    assert sorted(Stack(first.state).down()) == sorted(SERVERS)
    assert sleeper.poll() is None
    assert again.supervisor.family() == []
    assert not any(listens(first.ports[name]) for name in SERVERS)
    assert not (first.state / "env").exists()
    assert Stack(first.state).down() == []


def test_a_taken_port_is_named_with_its_holder_and_nothing_stays_behind(make_stack: Callable[..., Stack]) -> None:
    with socket.create_server((LOOPBACK, 0)) as holder:
        port = holder.getsockname()[1]
        stack = make_stack(ports={"mlflow": port})
        with pytest.raises(
            UserError,
            match=rf"Port {port}, wanted for the MLflow server, is taken by .* \(pid {os.getpid()}\).*--mlflow-port N",
        ):
            stack.up(setup=False)
    assert stack.supervisor.family() == []
    assert not listens(stack.ports["prefect"])


def test_a_server_that_dies_at_once_is_named_and_all_is_stopped(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(environment={"PREFECT_SERVER_LOGGING_LEVEL": "no such level"})
    with pytest.raises(FlawsmithError, match=r"the Prefect server ended before it was ready; .*prefect\.log says why"):
        stack.up(setup=False)
    assert stack.supervisor.family() == []
    assert not stack.supervisor.runs()


def test_an_interrupted_up_stops_what_it_has_started(open_folder: Callable[[], Path]) -> None:
    state = open_folder() / "state"
    command = [
        sys.executable, "-m", "flows.stack", "up", "--state", str(state), "--workers", "0", "--no-postgres",
        "--prefect-port", str(free_port()), "--mlflow-port", str(free_port()),
    ]  # fmt: skip
    stack = Stack(state)
    # whoever runs the tests in the background ignores SIGINT, and children inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        while stack.supervisor.pid("mlflow") is None and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode == 130, said
        assert "stopping what was started" in said
        assert stack.supervisor.family() == []
        assert not stack.supervisor.runs()
    finally:
        process.kill()
        stack.down()


def test_the_command_brings_up_two_workers_and_takes_them_down(
    make_checkout: Callable[..., Any], open_folder: Callable[[], Path]
) -> None:
    """As users do it: from a checkout, with a second one beside it, and a shell that reads `env`."""
    first, second = make_checkout("up-first"), make_checkout("up-second")
    state = open_folder() / "state"

    def command(*words: str, succeeds: bool = True) -> str:
        done = first.run(
            sys.executable, "-m", "flows.stack", words[0], "--state", str(state), *words[1:], succeeds=succeeds
        )
        return str(done.stdout + done.stderr)

    places = ["--checkout", str(first.folder), "--checkout", str(second.folder)]
    ports = ["--prefect-port", str(free_port()), "--mlflow-port", str(free_port())]
    try:
        said = command("up", *places, *ports)
        assert f"http://{LOOPBACK}:{ports[1]}" in said
        assert f"http://{LOOPBACK}:{ports[3]}" in said
        shell = first.run("sh", "-c", f"set -a; . {state / 'env'}; set +a; prefect work-pool ls; env")
        assert f"PREFECT_API_URL=http://{LOOPBACK}:{ports[1]}/api" in shell.stdout
        assert "gpu" in shell.stdout
        assert "control" in shell.stdout

        stack = Stack(state)
        workers = {
            worker["name"]: worker["status"]
            for pool in ("gpu", "control")
            for worker in stack.api(f"work_pools/{pool}/workers/filter", {})
        }
        assert workers == dict.fromkeys(["gpu-0", "gpu-1", "control"], "ONLINE")
        environments = [psutil.Process(stack.supervisor.pid(f"worker-gpu-{number}")).environ() for number in (0, 1)]
        assert [item["FLAWSMITH_CHECKOUT"] for item in environments] == [str(first.folder), str(second.folder)]
        assert {item["MLFLOW_TRACKING_URI"] for item in environments} == {stack.url("mlflow")}
        limits = {limit["name"]: limit["limit"] for limit in stack.api("v2/concurrency_limits/filter", {})}
        assert {item["FLAWSMITH_GPU"] for item in environments} <= limits.keys()

        said = command("up", "--workers", "1")
        assert "runs already" in said
        said = command("status")
        assert "worker-gpu-0     running" in said
        assert "worker-gpu-1" not in said  # no longer wanted
    finally:
        stopped = command("down")
    assert "worker-gpu-0" in stopped
    assert "Nothing of the stack runs" in command("status", succeeds=False)

"""The stack's processes themselves: start, health, restart, refusal, and an end that hits nobody else."""

import json
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

from flawsmith.errors import FlawsmithError, UserError
from flows import postgres
from flows.processes import LOOPBACK, MARK, free_port
from flows.stack import ROOT, Stack

SERVERS = ("prefect", "mlflow")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((LOOPBACK, port)) == 0


def belonging(stack: Stack) -> list[psutil.Process]:
    return [process for name in stack.processes.names() for process in stack.processes.family(name)]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of the stack's business."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def make_stack(open_folder: Callable[[], Path]) -> Iterator[Callable[..., Stack]]:
    """Makes stacks on free ports in folders of their own, and takes them down."""
    made: list[Stack] = []

    def make(**options: object) -> Stack:
        ports = {"prefect_port": free_port(), "mlflow_port": free_port()}
        made.append(Stack(open_folder() / "state", **{**ports, **options}))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for stack in made:
        stack.down()


def test_the_session_runs_on_postgresql_where_it_is_installed(stack: Stack) -> None:
    if postgres.find_binaries() is None:
        pytest.skip("no PostgreSQL server is installed")
    assert stack.database == "postgresql"
    password = stack.state / "postgres-password"
    assert password.stat().st_mode & 0o077 == 0
    secret = password.read_text().strip()
    leaks = [
        process.pid for process in psutil.process_iter(["cmdline"]) if secret in " ".join(process.info["cmdline"] or [])
    ]
    assert not leaks, "a command line shows the password to every user"
    assert not any((stack.state / name).exists() for name in ("prefect.db", "mlflow.db"))


def test_nothing_listens_beyond_the_loopback_interface(stack: Stack) -> None:
    ours = {process.pid for process in belonging(stack)}
    addresses = {
        (connection.laddr.ip, connection.laddr.port)
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.pid in ours
    }
    assert {port for _, port in addresses} >= {stack.ports["prefect"], stack.ports["mlflow"]}
    assert {ip for ip, _ in addresses} == {LOOPBACK}


def test_prefects_scheduler_really_schedules(stack: Stack) -> None:
    flow = stack.api("flows/", {"name": "ticking"})
    deployment = stack.api(
        "deployments/",
        {
            "name": "ticking",
            "flow_id": flow["id"],
            "schedules": [{"schedule": {"cron": "* * * * *", "timezone": "UTC"}, "active": True}],
        },
    )
    asked = {"deployments": {"id": {"any_": [deployment["id"]]}}, "limit": 1}
    while not (runs := stack.api("flow_runs/filter", asked)):
        time.sleep(0.5)
    assert runs[0]["state_type"] == "SCHEDULED"
    assert runs[0]["auto_scheduled"]


def test_mlflow_keeps_runs_and_artifacts(stack: Stack, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=stack.mlflow_url)
    run = client.create_run(client.create_experiment("stack"))
    (tmp_path / "note.txt").write_text("kept")
    client.log_artifact(run.info.run_id, str(tmp_path / "note.txt"))
    assert [item.path for item in client.list_artifacts(run.info.run_id)] == ["note.txt"]
    assert [path.read_text() for path in (stack.state / "mlflow-artifacts").rglob("note.txt")] == ["kept"]


def test_up_again_changes_nothing(stack: Stack) -> None:
    before = {name: stack.processes.pid(name) for name in stack.processes.names()}
    assert stack.up(setup=False) == []
    assert {name: stack.processes.pid(name) for name in stack.processes.names()} == before
    assert all(before.values())


def test_a_killed_server_is_started_again_by_up_and_the_others_go_on(stack: Stack) -> None:
    before = {name: stack.processes.pid(name) for name in stack.processes.names()}
    stack.processes.kill("mlflow")
    assert stack.processes.pid("mlflow") is None
    assert not listens(stack.ports["mlflow"])
    assert stack.up(setup=False) == ["mlflow"]
    assert listens(stack.ports["mlflow"])
    after = {name: stack.processes.pid(name) for name in stack.processes.names()}
    assert {name for name in after if after[name] != before[name]} == {"mlflow"}


def test_a_worker_is_online_and_a_killed_one_leaves_nothing(stack: Stack, tmp_path: Path) -> None:
    stack.api("work_pools/", {"name": "tried", "type": "process"})
    pid = stack.start_worker("tried", "worker-a", tmp_path, gpu="gpu-7")
    (worker,) = stack.api("work_pools/tried/workers/filter", {})
    assert (worker["name"], worker["status"]) == ("worker-a", "ONLINE")
    environment = psutil.Process(pid).environ()
    assert environment["FLAWSMITH_GPU"] == "gpu-7"
    assert environment["FLAWSMITH_CHECKOUT"] == str(tmp_path)
    assert environment["MLFLOW_TRACKING_URI"] == stack.mlflow_url
    stack.kill_worker("worker-a")
    assert stack.processes.family("worker-worker-a") == []
    # the server believes for a while yet that the dead one is online; a new one must show a heartbeat of its own
    assert stack.start_worker("tried", "worker-a", tmp_path) != pid
    stack.stop_worker("worker-a")
    assert stack.processes.pid("worker-worker-a") is None
    assert "worker-worker-a" not in stack.processes.names()


def test_a_worker_without_its_pool_is_refused(stack: Stack, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no work pool `nowhere`; make it with `python -m flows\.setup`"):
        stack.start_worker("nowhere", "lost", tmp_path)
    assert "worker-lost" not in stack.processes.names()


def test_down_stops_just_its_own_processes_and_keeps_the_data(
    make_stack: Callable[..., Stack], sleeper: subprocess.Popen[bytes]
) -> None:
    """On SQLite. The record of one server holds a pid that a stranger has now; the server itself is still found."""
    first = make_stack(with_postgres=False)
    assert first.up(setup=False) == ["prefect", "mlflow"]
    assert first.database == "sqlite"
    first.api("flows/", {"name": "remembered"})
    ours = belonging(first)
    assert len(ours) >= 2
    record = first.state / "processes" / "prefect.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"pid": sleeper.pid}))

    fresh = Stack(first.state)  # as `make down` in another shell: it knows no more than the folder says
    fresh.down()
    assert sleeper.poll() is None
    assert [first.processes.pid(name) for name in SERVERS] == [None, None]
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ours)
    assert not any(listens(first.ports[name]) for name in SERVERS)
    assert not (first.state / "env").exists()
    assert fresh.down() == []

    again = Stack(first.state)
    again.up(setup=False)  # PostgreSQL is allowed now, but the data lie in SQLite
    try:
        assert again.database == "sqlite"
        assert again.ports == first.ports
        assert [flow["name"] for flow in again.api("flows/filter", {})] == ["remembered"]
    finally:
        again.down()


def test_a_taken_port_is_named_with_its_holder_and_nothing_stays_behind(make_stack: Callable[..., Stack]) -> None:
    with socket.create_server((LOOPBACK, 0)) as holder:
        port = holder.getsockname()[1]
        stack = make_stack(mlflow_port=port, with_postgres=False)
        with pytest.raises(
            UserError,
            match=rf"Port {port}, wanted for the MLflow server, is taken by .* \(pid {os.getpid()}\).*--mlflow-port N",
        ):
            stack.up(setup=False)
    assert stack.processes.names() == []
    assert not listens(stack.ports["prefect"])


def test_a_server_that_dies_at_once_is_named_and_all_is_stopped(make_stack: Callable[..., Stack]) -> None:
    stack = make_stack(with_postgres=False, environment={"PREFECT_SERVER_LOGGING_LEVEL": "no such level"})
    with pytest.raises(FlawsmithError, match=r"the Prefect server ended before it was ready; .*prefect\.log says why"):
        stack.up(setup=False)
    assert stack.processes.names() == []
    assert not any(listens(stack.ports[name]) for name in SERVERS)


def test_an_interrupted_up_stops_what_it_has_started(open_folder: Callable[[], Path]) -> None:
    state = open_folder() / "state"
    command = [
        sys.executable, "-m", "flows.stack", "up", "--state", str(state), "--workers", "0",
        "--prefect-port", str(free_port()), "--mlflow-port", str(free_port()),
    ]  # fmt: skip
    # whoever runs the tests in the background ignores SIGINT, and children inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        while not (state / "processes" / "mlflow.json").exists() and process.poll() is None:
            time.sleep(0.05)
        marks = {json.loads(path.read_text())["mark"] for path in (state / "processes").glob("*.json")}
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        left = list((state / "processes").glob("*.json"))
    finally:
        process.kill()
        Stack(state).down()
    assert process.returncode == 130, said
    assert "stopping what was started" in said
    assert len(marks) >= 2
    assert left == []
    for living in psutil.process_iter():
        try:
            assert living.environ().get(MARK) not in marks
        except psutil.Error:
            continue


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
        environments = [psutil.Process(stack.processes.pid(f"worker-gpu-{number}")).environ() for number in (0, 1)]
        assert [item["FLAWSMITH_CHECKOUT"] for item in environments] == [str(first.folder), str(second.folder)]
        limits = {limit["name"]: limit["limit"] for limit in stack.api("v2/concurrency_limits/filter", {})}
        assert {item["FLAWSMITH_GPU"] for item in environments} <= limits.keys()

        stack.kill_worker("gpu-1")
        assert "worker-gpu-1     has died" in command("status", succeeds=False)
        assert "starting worker-gpu-1" in command("up", *places)
        assert "worker-gpu-1     runs" in command("status")
        assert "runs already" in command("up", *places)
        assert "worker-gpu-1" not in command("up", "--workers", "1") + command("status")  # no longer wanted
    finally:
        stopped = command("down")
    assert "worker-gpu-0" in stopped
    assert "Nothing of the stack runs" in command("status", succeeds=False)

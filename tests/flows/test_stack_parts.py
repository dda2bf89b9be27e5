"""The parts of the local stack without its servers: supervisord and what it leaves behind, ports, GPUs, databases."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flawsmith.errors import FlawsmithError, UserError
from flows import postgres, stack, supervisor
from flows.machine import LOOPBACK, check_port, clean_environment, free_port, visible_devices
from flows.postgres import GIVEN
from flows.stack import ROOT, Stack
from flows.supervisor import Supervisor, private_temporary

# A parent whose child leaves its session, as the flow runs of a worker do.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
HEAD = (Path(supervisor.__file__).with_name("supervisord.conf")).read_text().partition("{% macro")[0]


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Supervisor]]:
    """Starts one program, `tried`, under a supervisord of its own."""
    found = Supervisor(tmp_path, os.environ)
    template = tmp_path / "template.conf"
    monkeypatch.setattr(supervisor, "TEMPLATE", template)

    def start(command: str) -> Supervisor:
        template.write_text(
            f"{HEAD}\n[program:tried]\ncommand={command}\nautostart=false\nstartsecs=1\nstopwaitsecs=1\n"
            "redirect_stderr=true\nstdout_logfile={{ state }}/logs/tried.log\n"
        )
        found.configure({})
        found.start("tried")
        return found

    yield start
    found.shut_down()


def first_line(log: Path) -> str:
    deadline = time.monotonic() + 30
    while not (log.exists() and "\n" in log.read_text()):
        assert time.monotonic() < deadline, f"nothing in {log}"
        time.sleep(0.02)
    return log.read_text().splitlines()[0]


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_stopping_ends_what_a_program_has_started_wherever_it_has_gone(
    supervised: Callable[..., Supervisor], tmp_path: Path
) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    running = supervised(f"{sys.executable} {script}")
    child, parent = int(first_line(running.log("tried"))), running.pid("tried")
    assert parent is not None
    os.kill(parent, signal.SIGKILL)
    while running.pid("tried") in (None, parent):  # supervisord starts it again
        time.sleep(0.05)
    assert lives(child)
    assert child in [process.pid for process in running.family(["tried"])]
    with subprocess.Popen(["sleep", "600"]) as stranger:
        Supervisor(tmp_path, os.environ).stop(["tried"])  # whoever comes later finds the same supervisord
        assert stranger.poll() is None
        stranger.kill()
    assert running.pid("tried") is None
    assert not lives(child)


def test_what_a_killed_supervisord_has_left_is_ended(
    supervised: Callable[..., Supervisor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LEFTOVER_SECONDS", 0.3)
    running = supervised("sh -c \"trap '' TERM; echo ready; while :; do sleep 0.1; done\"")
    first_line(running.log("tried"))
    pid = running.pid("tried")
    assert pid is not None
    os.kill(int((tmp_path / "supervisord.pid").read_text()), signal.SIGKILL)
    while running.runs():
        time.sleep(0.02)
    assert lives(pid)
    running.shut_down()
    assert not lives(pid)


def test_a_program_that_is_to_run_differently_is_stopped_and_one_that_is_not_goes_on(
    supervised: Callable[..., Supervisor],
) -> None:
    running = supervised("sleep 600")
    pid = running.pid("tried")
    running.configure({})
    assert running.pid("tried") == pid
    assert supervised("sleep 601").pid("tried") not in (None, pid)


def test_one_that_ends_early_or_never_gets_ready_is_named_with_its_log(supervised: Callable[..., Supervisor]) -> None:
    running = supervised("sleep 600")
    with pytest.raises(FlawsmithError, match=r"^The server was not ready within 1 s; see .*tried\.log\.$"):
        running.wait("tried", "The server", lambda: False, 1)
    running = supervised('sh -c "echo first; exit 3"')
    with pytest.raises(FlawsmithError, match=r"^The server ended before it was ready; .*tried\.log says why\.$"):
        running.wait("tried", "The server", lambda: False, 30)
    with pytest.raises(FlawsmithError, match=r"^tried cannot be started .*/no/such/server"):
        supervised("/no/such/server")


def test_a_path_that_supervisord_cannot_be_told_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="my #1 project"):
        Supervisor(tmp_path, os.environ).configure({"folder": [Path("/home/me/my #1 project")]})


def test_a_taken_port_is_refused_with_its_holder_and_the_option() -> None:
    check_port(free_port(), "the server", "--port")
    with socket.create_server((LOOPBACK, 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"^Port {port}, wanted for the server, is taken.*with --port N\.$"
        ) as refusal:
            check_port(port, "the server", "--port")
    if sys.platform == "linux":
        assert f"(pid {os.getpid()})" in str(refusal.value)


def test_the_callers_servers_and_places_are_not_inherited_but_tuning_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PREFECT_API_URL", "PREFECT_API_KEY", "PREFECT_HOME", "MLFLOW_TRACKING_URI", "FLAWSMITH_GPU"):
        monkeypatch.setenv(name, "elsewhere")
    monkeypatch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "30")
    monkeypatch.setenv("no_proxy", "plant.example")
    environment = clean_environment(Path("/opt/venv/bin"))
    assert "elsewhere" not in environment.values()
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert environment["no_proxy"] == "plant.example,127.0.0.1,localhost"
    assert environment["PATH"].split(os.pathsep)[0] == "/opt/venv/bin"


def test_several_workers_need_several_checkouts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 workers need 2 checkouts, not 1: .*--checkout"):
        stack.up(tmp_path / "state", workers=2)
    with pytest.raises(UserError, match="Two workers cannot share a checkout"):
        Stack(tmp_path / "state", checkouts=[ROOT, ROOT / "flows" / ".."]).up()
    with pytest.raises(UserError, match=r"holds no dvc\.yaml"):
        Stack(tmp_path / "state", checkouts=[tmp_path]).up()
    assert not (tmp_path / "state").exists()


def test_two_commands_at_once_are_refused(tmp_path: Path) -> None:
    stack = Stack(tmp_path / "state")
    with stack._alone(), pytest.raises(UserError, match=r"^Another command is at work on"):
        Stack(stack.state).down()
    assert stack.down() == []


@pytest.mark.parametrize(
    ("value", "devices"),
    [("", []), ("-1", []), ("0", ["0"]), ("2, 3", ["2", "3"]), ("GPU-ab,MIG-c", ["GPU-ab", "MIG-c"])],
)
def test_devices_are_those_the_user_chose(monkeypatch: pytest.MonkeyPatch, value: str, devices: list[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert visible_devices() == devices


def test_workers_spread_over_gpus_and_share_the_limit_of_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    workers = Stack(tmp_path, checkouts=[tmp_path / str(number) for number in range(3)])._workers()
    assert {worker["name"]: tuple(worker["placed"].values()) for worker in workers} == {
        "gpu-0": ("gpu-0", "4"),
        "gpu-1": ("gpu-1", "7"),
        "gpu-2": ("gpu-0", "4"),
        "control": (),
    }


def test_temporary_files_of_workers_lie_in_a_folder_of_their_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = private_temporary()
    assert folder.stat().st_mode & 0o077 == 0
    assert private_temporary() == folder
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="belongs to somebody else"):
        private_temporary()


def fake_postgres(folder: Path, version: int) -> Path:
    folder.mkdir(parents=True)
    for name in ("initdb", "postgres"):
        (folder / name).write_text(f"#!/bin/sh\necho 'postgres (PostgreSQL) {version}.4 (Somewhere)'\n")
        (folder / name).chmod(0o755)
    return folder


def test_the_newest_postgresql_is_used_or_the_one_that_the_data_need(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old, new = fake_postgres(tmp_path / "old", 93), fake_postgres(tmp_path / "new", 94)
    monkeypatch.setenv("PATH", os.pathsep.join([str(old), str(new), "/usr/bin", "/bin"]))
    assert postgres.find_binaries() == new
    assert postgres.find_binaries("93") == old
    assert postgres.find_binaries("92") is None


def test_data_stay_in_the_database_that_holds_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"database": "postgresql", "ports": {}}))
    with pytest.raises(UserError, match="lie in PostgreSQL; leave out --no-postgres"):
        Stack(tmp_path, with_postgres=False)._database()
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("92\n")
    with pytest.raises(UserError, match="lie in PostgreSQL 92, which is not installed"):
        Stack(tmp_path)._database()
    monkeypatch.setenv(GIVEN, "me:secret@db.example:5432")
    with pytest.raises(UserError, match=f"lie in postgresql; unset {GIVEN}"):
        Stack(tmp_path)._database()


def test_a_given_database_is_used_and_demanded_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(GIVEN, "me:secret@db.example:5432")
    given = Stack(tmp_path)
    values = given._values(given._database(), [])
    assert values["prefect_database"] == "postgresql+asyncpg://me:secret@db.example:5432/prefect"
    assert values["mlflow_database"] == "postgresql://me:secret@db.example:5432/mlflow"
    (tmp_path / "settings.json").write_text(json.dumps({"database": given.database, "ports": {}}))
    monkeypatch.delenv(GIVEN)
    with pytest.raises(UserError, match=f"lie in the PostgreSQL of {GIVEN}; set that"):
        Stack(tmp_path)._database()


def test_a_folder_that_may_not_be_written_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: str) -> None:
        raise PermissionError(13, "Permission denied", ".stack")

    monkeypatch.setattr(stack, "app", refuse)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            stack.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("flows.stack: .stack cannot be used: the rights to do so are missing")

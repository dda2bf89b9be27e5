"""Starting and stopping the stack's processes without ever hitting a stranger; what `up` decides before it starts."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flawsmith.errors import FlawsmithError, UserError
from flows import postgres, stack
from flows.processes import LOOPBACK, Part, Processes, check_port, clean_environment, free_port
from flows.stack import ROOT, Stack, private_temporary, visible_devices, worker_checkouts

SOON = (signal.SIGTERM, 5.0)
# A parent whose child leaves its session, as the flow runs of a worker do.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def part(*command: str, name: str = "tried", folder: Path = Path("/"), **environment: str) -> Part:
    return Part(name, command, environment, folder)


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path / "state", os.environ)
    yield found
    found.stop(dict.fromkeys(found.names(), SOON))


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of ours."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def first_line(log: Path) -> str:
    deadline = time.monotonic() + 30
    while not (log.exists() and "\n" in log.read_text()):
        assert time.monotonic() < deadline, f"nothing in {log}"
        time.sleep(0.02)
    return log.read_text().splitlines()[0]


def lives(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_what_was_started_is_found_by_who_comes_later(processes: Processes, tmp_path: Path) -> None:
    processes.start(part("sleep", "600"))
    later = Processes(tmp_path / "state", os.environ)
    assert later.pid("tried") == processes.pid("tried")
    assert later.is_current(part("sleep", "600"))
    assert not later.is_current(part("sleep", "601"))
    assert not later.is_current(part("sleep", "600", KEY="value"))
    later.stop({"tried": SOON})
    assert processes.pid("tried") is None
    assert processes.names() == []


@pytest.mark.parametrize("kill_parent_first", [False, True])
def test_stopping_ends_children_too_wherever_they_have_gone(processes: Processes, kill_parent_first: bool) -> None:
    processes.start(part(sys.executable, "-c", PARENT))
    child = int(first_line(processes.log("tried")))
    if kill_parent_first:
        processes.kill("tried", with_children=False)
        assert processes.pid("tried") is None
        assert lives(child)
        assert [process.pid for process in processes.family("tried")] == [child]
    processes.stop({"tried": SOON})
    assert not lives(child)


def test_killing_ends_all_and_keeps_the_record(processes: Processes) -> None:
    processes.start(part(sys.executable, "-c", PARENT))
    child = int(first_line(processes.log("tried")))
    processes.kill("tried")
    assert not lives(child)
    assert processes.pid("tried") is None
    assert processes.names() == ["tried"]


def test_a_stranger_with_a_recorded_pid_is_left_alone(
    processes: Processes, sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    processes.start(part("sleep", "600"))
    ours = processes.pid("tried")
    assert ours is not None
    record = tmp_path / "state" / "processes" / "tried.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"pid": sleeper.pid}))
    later = Processes(tmp_path / "state", os.environ)
    assert later.pid("tried") is None
    later.stop({"tried": SOON})
    assert sleeper.poll() is None
    assert not lives(ours)
    assert processes.pid("tried") is None


def test_what_ignores_its_signal_is_killed_after_its_grace(processes: Processes) -> None:
    processes.start(part("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"))
    pid = processes.pid("tried")
    assert pid is not None
    first_line(processes.log("tried"))
    processes.stop({"tried": (signal.SIGTERM, 0.2)})
    assert not lives(pid)


def test_one_that_ends_early_is_named_with_its_log_and_the_log_before_is_kept(processes: Processes) -> None:
    for said in ("first", "second"):
        processes.start(part("sh", "-c", f"echo {said}; exit 3"))
        with pytest.raises(FlawsmithError, match=r"^The server ended before it was ready; .*tried\.log says why\.$"):
            processes.wait("tried", "The server", lambda: False, 30)
    assert processes.log("tried").read_text() == "second\n"
    assert processes.log("tried").with_name("tried.log.1").read_text() == "first\n"


def test_one_that_never_gets_ready_is_named_with_its_log(processes: Processes) -> None:
    processes.start(part("sleep", "600"))
    with pytest.raises(FlawsmithError, match=r"^The server was not ready within 1 s; see .*tried\.log\.$"):
        processes.wait("tried", "The server", lambda: False, 1)


def test_a_command_that_is_missing_is_named(processes: Processes) -> None:
    with pytest.raises(FlawsmithError, match=r"^/no/such/server cannot be started"):
        processes.start(part("/no/such/server"))


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
        worker_checkouts(2, [ROOT])
    assert worker_checkouts(None, [ROOT, tmp_path]) == [ROOT, tmp_path]
    assert worker_checkouts(0, [ROOT]) == []
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
    wanted = Stack(tmp_path, checkouts=[tmp_path / str(number) for number in range(3)])._workers()
    placed = {
        name: (part.environment.get("FLAWSMITH_GPU"), part.environment.get("CUDA_VISIBLE_DEVICES"))
        for name, (part, _) in wanted.items()
    }
    assert placed == {
        "worker-gpu-0": ("gpu-0", "4"),
        "worker-gpu-1": ("gpu-1", "7"),
        "worker-gpu-2": ("gpu-0", "4"),
        "worker-control": (None, None),
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
        Stack(tmp_path, with_postgres=False).up()
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("92\n")
    with pytest.raises(UserError, match="lie in PostgreSQL 92, which is not installed"):
        Stack(tmp_path).up()


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

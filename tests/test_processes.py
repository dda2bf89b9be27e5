"""Children never outlive us, and their words arrive as they are spoken."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from flawsmith.processes import stream


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.05)
    return bool(true())


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shell(text: str) -> list[str]:
    return ["/bin/sh", "-c", text]


def test_lines_come_while_the_program_runs(tmp_path: Path) -> None:
    go = tmp_path / "go"
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        go.touch()  # the program waits for this: it would never end if lines came only at its end

    finished = stream(shell("echo first; while [ ! -e go ]; do sleep 0.05; done; echo second"), tmp_path, on_line)
    assert lines == ["first", "second"] == list(finished.lines)
    assert finished.status == 0


def test_a_progress_bar_is_one_line_of_what_it_showed_last(tmp_path: Path) -> None:
    finished = stream(
        shell(r"printf '10%%\r50%%\r100%%\n'; printf 'windows\r\n'; printf 'no end'"), tmp_path, lambda _: None
    )
    assert finished.lines == ("100%", "windows", "no end")


def test_stderr_is_heard_and_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    finished = stream(shell(r"printf 'a\377b\n' >&2; exit 7"), tmp_path, lambda _: None)
    assert finished.status == 7
    assert finished.lines == ("a\ufffdb",)


def test_stdout_is_kept_apart_even_when_it_is_larger_than_a_pipe(tmp_path: Path) -> None:
    code = "import sys; print('x' * 1_000_000); print('said', file=sys.stderr)"
    finished = stream([sys.executable, "-c", code], tmp_path, lambda _: None, keep_stdout=True)
    assert len(finished.stdout) == 1_000_001
    assert finished.lines == ("said",)


def test_a_killed_program_has_a_negative_status(tmp_path: Path) -> None:
    assert stream(shell("kill -9 $$"), tmp_path, lambda _: None).status == -signal.SIGKILL


def test_only_the_last_lines_are_kept(tmp_path: Path) -> None:
    heard: list[str] = []
    finished = stream(shell("seq 1 1000"), tmp_path, heard.append)
    assert len(heard) == 1000
    assert finished.lines[-1] == "1000"
    assert len(finished.lines) < 1000


def test_an_exception_ends_the_program_and_its_children(tmp_path: Path) -> None:
    pids: list[int] = []

    def on_line(line: str) -> None:
        pids.append(int(line))
        if len(pids) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(shell("echo $$; sleep 600 & echo $!; wait"), tmp_path, on_line)
    assert len(pids) == 2
    assert wait_until(lambda: not any(map(alive, pids)))


def test_children_that_the_program_leaves_behind_are_ended(tmp_path: Path) -> None:
    lines: list[str] = []
    stream(shell("sleep 600 >/dev/null 2>&1 & echo $!"), tmp_path, lines.append)
    assert wait_until(lambda: not alive(int(lines[0])))


def test_killing_us_with_sigkill_ends_the_program_and_its_children(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from flawsmith.processes import stream\n"
        "stream(['/bin/sh', '-c', 'echo $$; sleep 600 & echo $!; wait'], Path(), lambda line: print(line, flush=True))"
    )
    ours = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert ours.stdout is not None
    with ours, ours.stdout:
        pids = [int(ours.stdout.readline()) for _ in range(2)]
        assert all(map(alive, pids))
        os.kill(ours.pid, signal.SIGKILL)
    assert wait_until(lambda: not any(map(alive, pids)))


def test_the_environment_is_added_and_programs_of_this_python_come_first(tmp_path: Path) -> None:
    lines: list[str] = []
    stream(shell('echo "$GREETING"; command -v dvc'), tmp_path, lines.append, {"GREETING": "hello"})
    assert lines == ["hello", str(Path(sys.executable).parent / "dvc")]

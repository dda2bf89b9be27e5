"""The queue on the disk: order, bounds, kills, and files that are none."""

import subprocess
import sys
from pathlib import Path

import pytest

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.inference.spool import Spool

FILL = """
import os, signal, sys
from pathlib import Path
from flawsmith.inference.spool import Spool
spool = Spool(Path(sys.argv[1]))
for number in range(20):
    spool.put(f"message {number}")
spool.remove(5)
os.kill(os.getpid(), signal.SIGKILL)
"""


def texts(spool: Spool, count: int = 100) -> list[str]:
    return [message for _, message in spool.first(count)]


def test_messages_stay_in_order_until_they_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "new" / "spool"
    spool = Spool(path)
    for number in range(5):
        assert spool.put(f"message {number}")
    (_, first), (second, _) = spool.first(2)
    assert first == "message 0"
    spool.remove(second)
    assert (texts(spool), len(spool)) == (["message 2", "message 3", "message 4"], 3)
    spool.close()
    again = Spool(path)
    again.put("message 5")
    assert texts(again)[-2:] == ["message 4", "message 5"]
    again.remove(again.first(100)[-1][0])
    assert (texts(again), len(again)) == ([], 0)
    again.close()


def test_a_kill_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    done = subprocess.run([sys.executable, "-c", FILL, path], check=False)
    assert done.returncode == -9
    spool = Spool(path)
    assert texts(spool) == [f"message {number}" for number in range(5, 20)]
    spool.close()


def test_a_full_spool_takes_again_what_was_removed(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", limit=100_000)
    message = "x" * 1000
    count = 0
    while spool.put(message):
        count += 1
        assert count < 200
    assert count > 60
    assert (tmp_path / "spool").stat().st_size <= 100_000
    spool.remove(spool.first(10)[-1][0])
    assert spool.put("room again")
    assert (len(spool), texts(spool, 1000)[-1]) == (count - 9, "room again")
    spool.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    code = "import sys; from pathlib import Path; from flawsmith.inference.spool import Spool; Spool(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, spool.path], capture_output=True, text=True, check=False)
    assert f"UserError: Another process sends the results in {spool.path}" in done.stderr
    spool.close()
    Spool(tmp_path / "spool").close()


def test_a_file_that_is_no_spool_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "spool"
    path.write_text("a letter to my mother, " * 100)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"spool is damaged or no spool .*; remove it, or name another place\."):
        Spool(path)
    assert path.read_bytes() == before
    with pytest.raises(UserError, match="cannot be opened"):
        Spool(tmp_path)


def test_a_spool_that_cannot_be_used_any_more_says_so(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.close()
    with pytest.raises(FlawsmithError, match=r"spool cannot be read or written .*; see to its disk\."):
        spool.put("a message")

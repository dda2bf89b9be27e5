"""Where no terminal follows, lines say how far the work is; where one does, a bar is drawn."""

import io
import re
import time

import numpy as np
import pytest

from flawsmith import progress
from flawsmith.progress import bar, stage

STAMP = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr(progress, "sys", type("sys", (), {"stderr": io.StringIO()}))
    return progress.sys.stderr  # type: ignore[no-any-return]


def lines(stderr: io.StringIO) -> list[str]:
    return stderr.getvalue().splitlines()


def test_a_line_comes_often_enough() -> None:
    assert progress.EVERY < 30


def test_one_long_step_is_no_silence(stderr: io.StringIO) -> None:
    for _ in bar(range(3), "student", unit="step"):
        time.sleep(0.15)
    assert len(lines(stderr)) >= 6
    assert re.match(f"{STAMP}student 0 of 3 steps \\(0 %\\)$", lines(stderr)[0])
    assert re.match(f"{STAMP}student 2 of 3 steps \\(67 %\\), about 0 s left$", lines(stderr)[-1])
    assert not progress._speakers


@pytest.mark.parametrize(
    ("unit", "shown"), [("", "0 of 2 "), ("B", "0 of 2 B "), ("step", "0 of 2 steps "), ("patch", "0 of 2 patches ")]
)
def test_things_are_counted_in_the_plural(stderr: io.StringIO, unit: str, shown: str) -> None:
    for _ in bar(range(2), "memory", unit=unit):
        time.sleep(0.05)
    assert f"memory {shown}" in lines(stderr)[0]


def test_a_stage_names_itself_in_every_line_with_a_loop_or_without_and_ends_with_its_time(stderr: io.StringIO) -> None:
    with stage("distill", "bottle", (4, 6)):
        time.sleep(0.1)
        with bar(what="head", total=600, done=300) as shown:
            shown.update(60)
            shown.set_postfix(loss="0.5", refresh=False)
            time.sleep(0.1)
    found = lines(stderr)
    assert re.match(f"{STAMP}stage 4 of 6, distill bottle: at work for 0 s$", found[0])
    assert re.match(
        f"{STAMP}stage 4 of 6, distill bottle: head 360 of 600 \\(60 %\\), about 0 s left, loss=0.5$", found[-2]
    )
    assert re.match(f"{STAMP}stage 4 of 6, distill bottle: done in 0 s$", found[-1])


def test_a_stage_that_fails_is_not_said_to_be_done(stderr: io.StringIO) -> None:
    with pytest.raises(ValueError, match="no"), stage("distill", "bottle", (4, 6)):
        for _ in bar(iter("ab"), "letters"):
            time.sleep(0.1)
            raise ValueError("no")
    assert "done in" not in stderr.getvalue()
    assert "letters 0 so far" in lines(stderr)[-1]


def test_what_is_not_shown_says_nothing(stderr: io.StringIO) -> None:
    with stage("ddpm-train", "bottle", (1, 6), is_shown=False):
        assert list(bar([1, 2], is_shown=False)) == [1, 2]
        time.sleep(0.1)
    assert not lines(stderr)


def test_a_reader_that_has_gone_ends_nothing(stderr: io.StringIO) -> None:
    with bar(what="head", total=2):
        stderr.close()
        time.sleep(0.1)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with stage("distill", "bottle", (4, 6)):
        for _ in bar(range(5), "student"):
            pass
    assert "student: 100%|" in terminal.getvalue()
    assert terminal.getvalue().endswith("stage 4 of 6, distill bottle: done in 0 s\n")


@pytest.mark.parametrize("items", [np.arange(3), [], None], ids=["array", "empty", "none"])
def test_whatever_can_be_counted_can_be_followed(stderr: io.StringIO, items: object) -> None:
    assert len(list(bar(items, "maps", total=3))) == (3 if isinstance(items, np.ndarray) else 0)

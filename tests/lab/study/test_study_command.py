"""The command's own part: what it hands on, and how a bad call ends."""

import sys
from pathlib import Path
from typing import Any

import pytest
from study_samples import create_project

from flawsmith import cli
from flawsmith_lab.study import study
from flawsmith_lab.study.plan import Request


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """`flawsmith study ...` on a small project; returns exit status, stdout and stderr."""
    project = create_project(tmp_path / "project")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        words = ["flawsmith", "study", "--params", project.params, "--out", tmp_path / "out", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def asked(monkeypatch) -> list[Any]:
    """What `run_study` was called with; it answers that one of three cells failed."""
    found: list[Any] = []

    def run_study(request: Request, workers: int, command: str) -> study.Outcome:
        found.extend([request, workers, command])
        return study.Outcome(cells=3, failed=1, report=request.out / "report.html")

    monkeypatch.setattr(study, "run_study", run_study)
    return found


def test_options_reach_the_study_and_a_failed_cell_is_exit_1(call, asked, tmp_path):
    status, out, _ = call(
        "--data", "images", "--categories", "a,b", "-c", "c", "--seeds", "0,2", "--methods", "flawsmith,patchcore",
        "--set", "distill.batch=4", "--grid", "synthesize.strength=[0.1,0.2],[0.3,0.4]", "--part", "research,report",
        "--reference", "flawsmith", "--workers", "3",
    )  # fmt: skip
    request, workers, command = asked
    assert status == 1
    assert "2 of 3 cells have results" in out
    assert (request.data, request.categories, request.seeds) == (Path("images"), ("a", "b", "c"), (0, 2))
    assert (request.methods, request.parts) == (("flawsmith", "patchcore"), ("research", "report"))
    assert request.replaced == {"distill.batch": 4}
    assert request.grid == {"synthesize.strength": ([0.1, 0.2], [0.3, 0.4])}
    assert (request.reference, workers, request.out) == ("flawsmith", 3, tmp_path / "out")
    assert command.startswith("flawsmith study --params ")
    assert "'synthesize.strength=[0.1,0.2],[0.3,0.4]'" in command


def test_what_is_not_named_has_a_default(call, asked):
    call()
    request = asked[0]
    assert (request.data, request.categories, request.seeds) == (None, (), (0,))
    assert (request.methods, request.parts, request.grid) == (("flawsmith", "patchcore"), ("all",), {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seeds", "one"), "--seeds one: write whole numbers"),
        (("--methods", "magic"), "--methods magic: there is no such one"),
        (("--grid", "distill.batch"), "write it as section.key=value,value"),
    ],
)
def test_a_bad_call_ends_in_one_sentence_before_anything_is_written(call, tmp_path, arguments, words):
    status, _, err = call(*arguments)
    assert status == 2
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()

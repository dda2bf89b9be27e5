"""The night's decisions: who is broken, who is started again, what is told."""

from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from flows.artifacts import ending, nightly_report
from flows.nightly import TRIES, CategoryRun, verdict


def part(state: State[Any], category: str = "steel", tries: int = 1) -> CategoryRun:
    return CategoryRun(category, FlowRun(flow_id=uuid4(), state=state, name="nightly steel"), tries)


@pytest.mark.parametrize(
    ("state", "over", "good"),
    [
        (Completed(), True, True),
        (Completed(name="Kept"), True, True),
        (Failed(name="QualityGateFailed"), True, False),
        (Cancelled(), True, False),
        (Running(), False, False),
    ],
)
def test_a_category_is_over_when_its_run_is(state: State[Any], over: bool, good: bool) -> None:
    assert part(state).over is over
    assert part(state).good is good


def test_a_crashed_run_is_started_once_more_and_then_broken() -> None:
    assert not part(Crashed(), tries=1).over
    assert part(Crashed(), tries=1).may_try_again
    assert part(Crashed(), tries=TRIES).over
    assert not part(Crashed(), tries=TRIES).good


def test_a_failed_run_is_not_started_again() -> None:
    assert not part(Failed()).may_try_again


def test_one_broken_category_fails_the_night_and_each_is_told_by_its_end() -> None:
    state = verdict(
        [
            part(Completed(), "wool"),
            part(Failed(name="QualityGateFailed"), "steel"),
            part(Completed(name="Kept"), "tin"),
            part(Failed(name="Refused"), "zinc"),
            part(Failed(name="BadInput"), "lead"),
            part(Failed(name="CategoryBusy"), "brass"),
        ]
    )
    assert state.type is StateType.FAILED
    assert state.message == (
        "3 of 6 categories need a person. gate failed: steel; refused: zinc; failed: lead (BadInput); promoted: wool; "
        "kept: tin; skipped: brass."
    )


def test_a_night_in_which_the_champion_stays_is_a_good_night() -> None:
    state = verdict([part(Completed(name="Kept")), part(Completed(name="Unchanged"), "tin")])
    assert (state.type, state.message) == (StateType.COMPLETED, "kept: steel; unchanged: tin.")


def test_a_category_that_could_not_be_started_is_broken() -> None:
    state = verdict([CategoryRun("steel", trouble="there is no deployment retrain/retrain")])
    assert "failed: steel (there is no deployment retrain/retrain)" in (state.message or "")


FLOOR = {"name": "aupro_floor", "passed": False, "proof": False}
PROOF = {"name": "lineage", "passed": False, "proof": True}


@pytest.mark.parametrize(
    ("outcome", "champion", "checks", "name", "words"),
    [
        ("promoted", "", [], "Completed", "Version 2 is champion now"),
        ("unchanged", "2", [], "Unchanged", "why"),
        ("refused", "1", [FLOOR], "Kept", "Version 1 stays champion; version 2 does not pass aupro_floor: why"),
        ("refused", "", [FLOOR], "Refused", "There is no champion; version 2 does not pass aupro_floor: why"),
        (
            "refused",
            "1",
            [FLOOR, PROOF],
            "Refused",
            "Version 1 stays champion; version 2 does not pass aupro_floor, lin",
        ),
    ],
)
def test_a_retraining_ends_by_what_became_of_its_model(
    outcome: str, champion: str, checks: list[Any], name: str, words: str
) -> None:
    known = {"outcome": outcome, "version": "2", "previous_champion": champion, "checks": checks, "reason": "why"}
    assert ending(known)[0] == name
    assert words in ending(known)[1]


def test_the_report_has_a_line_a_category() -> None:
    rows = [
        {"category": "steel", "outcome": "promoted", "why": "first | light", "image_auroc": 0.99834,
         "run": "a", "link": "u"},
        {"category": "wool", "outcome": "failed", "why": "Crashed"},
    ]  # fmt: skip
    text = nightly_report(rows)
    assert "| `steel` | promoted | first \\| light | 0.9983 | [a](u) |" in text
    assert "| `wool` | failed | Crashed | - | - |" in text

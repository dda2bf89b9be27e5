"""The night's decisions: who is broken, who is started again, what is told."""

from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from flows.artifacts import nightly_report
from flows.nightly import TRIES, Part, verdict


def part(state: State[Any], category: str = "steel", tries: int = 1) -> Part:
    return Part(category, FlowRun(flow_id=uuid4(), state=state, name="nightly steel"), tries)


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


def test_one_broken_category_fails_the_night_and_is_named_alone() -> None:
    state = verdict([part(Completed(), "wool"), part(Failed(name="QualityGateFailed"), "steel")])
    assert state.type is StateType.FAILED
    assert state.message == "1 of 2 categories are broken: steel (QualityGateFailed)."


def test_a_night_in_which_the_champion_stays_is_a_good_night() -> None:
    assert verdict([part(Completed(name="Kept"))]).type is StateType.COMPLETED


def test_a_category_that_could_not_be_started_is_broken() -> None:
    state = verdict([Part("steel", trouble="there is no deployment retrain/retrain")])
    assert "steel (there is no deployment retrain/retrain)" in (state.message or "")


def test_the_report_has_a_line_a_category() -> None:
    rows = [
        {"category": "steel", "state": "Completed", "outcome": "promoted", "image_auroc": 0.99834,
         "run": "a", "link": "u"},
        {"category": "wool", "state": "Crashed"},
    ]  # fmt: skip
    text = nightly_report(rows)
    assert "| `steel` | Completed | promoted | 0.9983 | [a](u) |" in text
    assert "| `wool` | Crashed | - | - | - |" in text

"""The verdict is pure: which failures stop the pipeline, and what is said about them."""

import json
from itertools import product
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from triplet_sets import settings

from flawsmith.quality.verdict import IDS_SHOWN, MEASURED, NAMES_SHOWN, Outcome, Rule, decide, rules

RULES = rules(settings().validate)


def outcomes(failed: set[str] = frozenset(), ids: tuple[str, ...] = ("fit-00001",)) -> list[Outcome]:  # type: ignore[assignment]
    return [Outcome(rule, rule.name not in failed, ids if rule.name in failed else (), None) for rule in RULES]


@given(st.sets(st.sampled_from([rule.name for rule in RULES])))
def test_worst_failure_decides(failed: set[str]) -> None:
    verdict = decide(outcomes(failed), 12)
    severities = {rule.severity for rule in RULES if rule.name in failed}
    assert verdict.severity == ("critical" if "critical" in severities else "warning" if severities else None)
    assert verdict.passed == ("critical" not in severities)
    assert bool(verdict.reason()) == bool(failed)


@pytest.mark.parametrize(("own", "reported"), list(product([None, "warning", "critical"], repeat=2)))
def test_worse_of_two_views_counts(
    own: Literal["critical", "warning"] | None, reported: Literal["critical", "warning"] | None
) -> None:
    failed = {None: set(), "warning": {"ssim"}, "critical": {"decodable"}}[own]
    order = [None, "warning", "critical"]
    assert decide(outcomes(failed), 12, reported).severity == max(own, reported, key=order.index)


def test_nothing_checked_is_not_passed() -> None:
    assert not decide([], 12).passed


def test_every_measure_must_be_there_and_is_judged() -> None:
    """A bound is silent about NaN and about no rows at all, hence the not-null rules and the row count."""
    by_kind = {kind: {rule.column for rule in RULES if rule.kind == kind} for kind in ("range", "not null")}
    assert by_kind["range"] == by_kind["not null"] == {*MEASURED, "duplicates"}
    assert all(rule.severity == "critical" for rule in RULES if rule.kind != "range")
    assert [rule.kind for rule in RULES].count("row count") == 1
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize(
    ("key", "value", "rule", "bounds"),
    [
        ("min_triplets", 77, "triplet_count", (77, None)),
        ("mask_area", [0.001, 0.3], "mask_area", (0.001, 0.3)),
        ("min_change_inside", 0.07, "change_inside", (0.07, None)),
        ("min_visible_share", 0.7, "visible_share", (0.7, None)),
        ("max_change_outside", 0.07, "change_outside", (None, 0.07)),
        ("min_foreground_overlap", 0.7, "foreground_overlap", (0.7, None)),
        ("ssim", [0.1, 0.2], "ssim", (0.1, 0.2)),
        ("max_components", 7, "components", (None, 7)),
    ],
)
def test_bounds_come_from_the_settings(key: str, value: object, rule: str, bounds: tuple[float, float]) -> None:
    found = {item.name: item for item in rules(settings(**{key: value}).validate)}[rule]
    assert (found.low, found.high) == bounds


def test_share_of_duplicates_and_mostly_come_from_the_settings() -> None:
    found = {item.name: item for item in rules(settings(max_duplicate_share=0.25, mostly=0.6).validate)}
    assert found["duplicates"].mostly == 0.75
    assert {name for name, rule in found.items() if rule.mostly == 0.6} == {
        "visible_share", "foreground_overlap", "ssim", "components",
    }  # fmt: skip


def test_json_names_at_most_twenty_ids_but_counts_all() -> None:
    ids = tuple(f"fit-{index:05d}" for index in range(50))
    content = json.loads(json.dumps(decide(outcomes({"mask_area"}, ids), 60).to_json(), allow_nan=False))
    (entry,) = [item for item in content["expectations"] if not item["passed"]]
    assert entry["failing"] == 50
    assert entry["failing_ids"] == list(ids[:IDS_SHOWN])
    assert entry["bounds"] == [0.00005, 0.2]


def test_reason_names_only_the_worst_and_not_too_many() -> None:
    assert decide(outcomes({"ssim", "decodable"}), 12).reason() == "decodable (1 of 12 triplets, e.g. fit-00001)"
    every = decide(outcomes({rule.name for rule in RULES}), 12).reason()
    assert every.count(",") >= NAMES_SHOWN
    assert every.endswith(" more")


def test_reason_for_too_few_triplets() -> None:
    rule = Rule("triplet_count", "row count", "critical", "enough", low=100)
    assert "3 triplets, at least 100 are needed" in decide([Outcome(rule, False, (), 3)], 3).reason()

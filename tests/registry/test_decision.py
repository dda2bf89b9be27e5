"""What a decision may and may not do, whatever the figures."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith.evaluation.compare import ModelComparison, ModelScores
from flawsmith.evaluation.intervals import Estimate
from flawsmith.files import write_json
from flawsmith.registry.config import PromoteSettings
from flawsmith.registry.decision import Evidence, ModelFacts, decide, estimates_json

RULES = PromoteSettings(
    seed=0,
    bootstrap=1000,
    margin=0.02,
    pixel_margin=0.03,
    defect_margin=0.05,
    min_defect_images=5,
    min_image_auroc=0.8,
    min_aupro=0.5,
    max_false_alarm_rate=0.1,
    max_latency_ms=500.0,
    max_latency_ratio=1.5,
    latency_runs=30,
    max_megabytes=100.0,
    health_images=8,
    health_tolerance=1e-3,
)
GOOD_STANDING = ModelScores(
    values={
        "image_auroc": Estimate(0.95, 0.9, 0.98),
        "aupro": Estimate(0.8, 0.7, 0.9),
        "pixel_ap": Estimate(0.6, 0.5, 0.7),
    },
    by_defect={"dent": Estimate(0.9, 0.8, 1.0), "scratch": Estimate(0.99, 0.98, 1.0)},
    false_alarms=Estimate(0.05, 0.01, 0.12),
)
EVEN = Estimate(0.0, -0.01, 0.01)
ABSOLUTE = {
    "parity_certificate",
    "quality_gate",
    "ddpm_ready",
    "lineage",
    "not_rolled_back",
    "image_auroc_floor",
    "aupro_floor",
    "false_alarm_rate",
    "latency_ms",
    "size_megabytes",
}
RELATIVE = {
    "image_auroc_difference",
    "aupro_difference",
    "image_auroc_difference[dent]",
    "image_auroc_difference[scratch]",
    "latency_ratio",
}
SECOND = Evidence(
    challenger=ModelFacts("8", "c" * 64, 20.0, 40.0),
    champion=ModelFacts("7", "a" * 64, 20.0, 40.0),
    comparison=ModelComparison(
        counts={"dent": 12, "good": 40, "scratch": 9},
        calibration_images=32,
        challenger=GOOD_STANDING,
        champion=GOOD_STANDING,
        differences={"image_auroc": EVEN, "aupro": EVEN, "pixel_ap": EVEN},
        defect_differences={"dent": EVEN, "scratch": EVEN},
    ),
    labelled=True,
    parity=(),
    gate=(),
    ddpm=("Ready: plain samples are 23% of the way", 0.23, 0.75),
    missing_links=(),
    rolled_back="",
)
FIRST = replace(
    SECOND,
    champion=None,
    comparison=replace(SECOND.comparison, champion=None, differences={}, defect_differences={}),
)


def facts(evidence: Evidence, **changes: Any) -> Evidence:
    return replace(evidence, challenger=replace(evidence.challenger, **changes))


def standing(evidence: Evidence, key: str, estimate: Estimate) -> Evidence:
    before = evidence.comparison.challenger
    after = (
        replace(before, false_alarms=estimate)
        if key == "false_alarms"
        else replace(before, values={**before.values, key: estimate})
    )
    return replace(evidence, comparison=replace(evidence.comparison, challenger=after))


def difference(evidence: Evidence, key: str, estimate: Estimate) -> Evidence:
    changed = {**evidence.comparison.differences, key: estimate}
    return replace(evidence, comparison=replace(evidence.comparison, differences=changed))


def by_defect(evidence: Evidence, name: str, estimate: Estimate) -> Evidence:
    changed = {**evidence.comparison.defect_differences, name: estimate}
    return replace(evidence, comparison=replace(evidence.comparison, defect_differences=changed))


Change = Callable[[Evidence], Evidence]
SPOILT: dict[str, tuple[Change, str]] = {  # check → how to fail it alone, and the figure its reason must show
    "parity_certificate": (lambda e: replace(e, parity=("of another file",)), "of another file"),
    "ddpm_ready": (lambda e: replace(e, ddpm=("Not ready: 155 %", 1.55, 0.75)), "155 %"),
    "quality_gate": (lambda e: replace(e, gate=("mask_share (9 of 400 triplets)",)), "9 of 400"),
    "lineage": (lambda e: replace(e, missing_links=("artifacts/plate/distill",)), "artifacts/plate/distill"),
    "not_rolled_back": (lambda e: replace(e, rolled_back="misses oil stains"), "misses oil stains"),
    "image_auroc_floor": (lambda e: standing(e, "image_auroc", Estimate(0.75, 0.7, 0.81)), "0.750 [0.700, 0.810]"),
    "aupro_floor": (lambda e: standing(e, "aupro", Estimate(0.42, 0.4, 0.55)), "0.420 [0.400, 0.550]"),
    "false_alarm_rate": (lambda e: standing(e, "false_alarms", Estimate(0.125, 0.1, 0.2)), "12.5% of 32"),
    "latency_ms": (lambda e: replace(facts(e, latency_ms=501.5), champion=slow(e)), "501.5 ms"),
    "size_megabytes": (lambda e: facts(e, megabytes=100.5), "100.5 MB"),
    "image_auroc_difference": (
        lambda e: difference(e, "image_auroc", Estimate(-0.01, -0.021, 0.0)),
        "-0.010 [-0.021, +0.000]",
    ),
    "aupro_difference": (lambda e: difference(e, "aupro", Estimate(0.0, -0.031, 0.04)), "+0.000 [-0.031, +0.040]"),
    "image_auroc_difference[dent]": (
        lambda e: by_defect(e, "dent", Estimate(-0.1, -0.2, 0.0)),
        "dent (12 images) may be worse than the champion's by 0.05: difference -0.100 [-0.200, +0.000]",
    ),
    "image_auroc_difference[scratch]": (
        lambda e: by_defect(e, "scratch", Estimate(0.0, -0.051, 0.1)),
        "scratch (9 images)",
    ),
    "latency_ratio": (lambda e: facts(e, latency_ms=68.0), "1.70 times"),
}


def test_what_can_be_found_may_be_asked_not_to_get_worse() -> None:
    worse = replace(SECOND, a90_95={"diffusion": (12.0, 8.0), "own": (8.0, 8.0)})
    lost = replace(SECOND, a90_95={"own": (math.inf, 8.0)})
    assert decide(worse, RULES).promote
    assert decide(lost, RULES).promote
    asked = replace(RULES, max_a90_ratio=1.25)
    assert decide(SECOND, asked).promote
    refused = decide(worse, asked)
    assert {check.name for check in refused.checks if not check.passed} == {"a90_ratio[diffusion]"}
    assert "1.50 (1.25 or less)" in refused.reason.replace(", over the limit", "")
    (check,) = [check for check in decide(lost, asked).checks if not check.passed]
    assert check.value is None
    assert decide(worse, replace(RULES, max_a90_ratio=1.5)).promote


def slow(evidence: Evidence) -> ModelFacts | None:
    return replace(evidence.champion, latency_ms=400.0) if evidence.champion else None


def test_a_second_model_meets_every_check_and_a_first_one_only_the_absolute_ones() -> None:
    second, first = decide(SECOND, RULES), decide(FIRST, RULES)
    assert second.promote
    assert first.promote
    assert {check.name for check in second.checks} == ABSOLUTE | RELATIVE == set(SPOILT)
    assert {check.name for check in first.checks} == ABSOLUTE


@pytest.mark.parametrize("name", SPOILT)
def test_each_check_alone_refuses_and_says_why_with_its_figure(name: str) -> None:
    spoil, figure = SPOILT[name]
    found = decide(spoil(SECOND), RULES)
    assert not found.promote
    failed = [check for check in found.checks if not check.passed]
    assert [check.name for check in failed] == [name]
    assert figure in failed[0].detail
    assert found.reason == f"{failed[0].detail}."


@pytest.mark.parametrize("name", sorted(ABSOLUTE))
def test_an_absolute_check_refuses_a_first_model_and_one_that_is_better_than_the_champion(name: str) -> None:
    spoil = SPOILT[name][0]
    for evidence in (FIRST, difference(SECOND, "image_auroc", Estimate(0.2, 0.1, 0.3))):
        found = decide(spoil(evidence), RULES)
        assert not found.promote
        assert [check.name for check in found.checks if not check.passed] == [name]


def test_a_figure_on_its_bound_passes_and_a_difference_on_its_margin_does_not() -> None:
    edge = facts(standing(SECOND, "image_auroc", Estimate(0.8, 0.7, 0.9)), latency_ms=60.0, megabytes=100.0)
    assert decide(standing(edge, "false_alarms", Estimate(0.1, 0.0, 0.2)), RULES).promote
    assert not decide(difference(SECOND, "image_auroc", Estimate(0.0, -0.02, 0.02)), RULES).promote
    assert decide(difference(SECOND, "image_auroc", Estimate(0.0, -0.0199, 0.02)), RULES).promote


def test_each_difference_is_judged_by_its_own_margin() -> None:
    between = Estimate(0.0, -0.025, 0.025)  # more than the margin, less than those of pixels and defect types
    assert not decide(difference(SECOND, "image_auroc", between), RULES).promote
    assert decide(difference(SECOND, "aupro", between), RULES).promote
    assert decide(by_defect(SECOND, "dent", Estimate(0.0, -0.045, 0.1)), RULES).promote
    assert decide(difference(SECOND, "pixel_ap", Estimate(-0.5, -0.6, -0.4)), RULES).promote, "told, but not judged"


def test_without_any_margin_an_identical_model_is_not_worse_and_a_doubtful_one_may_be() -> None:
    strict = replace(RULES, margin=0.0, pixel_margin=0.0, defect_margin=0.0)
    same = Estimate(0.0, 0.0, 0.0)
    identical = SECOND
    for key in SECOND.comparison.differences:
        identical = difference(identical, key, same)
    for name in SECOND.comparison.defect_differences:
        identical = by_defect(identical, name, same)
    assert decide(identical, strict).promote
    assert not decide(difference(identical, "aupro", Estimate(0.0, -1e-9, 0.0)), strict).promote
    assert not decide(by_defect(identical, "dent", Estimate(0.0, -1e-9, 0.0)), strict).promote


def test_many_failures_are_told_by_the_first_three_and_a_count() -> None:
    ruined = SECOND
    for spoil, _ in SPOILT.values():
        ruined = spoil(ruined)
    found = decide(ruined, RULES)
    failed = [check for check in found.checks if not check.passed]
    assert len(failed) > 4
    assert found.reason.startswith("; ".join(check.detail for check in failed[:3]))
    assert found.reason.endswith(f"; and {len(failed) - 3} more.")
    assert failed[3].detail not in found.reason


def test_the_reason_of_a_promotion_names_the_champion_and_the_kind_of_images() -> None:
    assert "Not worse than version 7 on labelled test images: image AUROC 0.950 [0.900, 0.980]" in (
        decide(SECOND, RULES).reason
    )
    assert decide(FIRST, RULES).reason.startswith("First model: image AUROC 0.950")
    synthetic = decide(replace(SECOND, labelled=False), RULES)
    assert "no labelled test set" in synthetic.reason
    assert any("held-out synthetic images" in check.detail for check in synthetic.checks)


def test_a_champion_that_was_not_compared_with_is_never_replaced() -> None:
    """Evidence that names a champion and holds no difference from it proves nothing about it."""
    uncompared = replace(FIRST, champion=SECOND.champion)
    assert not decide(uncompared, RULES).promote


NAN = math.nan
WITH_NAN: dict[str, Change] = {
    "image AUROC": lambda e: standing(e, "image_auroc", Estimate(NAN, NAN, NAN)),
    "AUPRO": lambda e: standing(e, "aupro", Estimate(NAN, NAN, NAN)),
    "false alarms": lambda e: standing(e, "false_alarms", Estimate(NAN, NAN, NAN)),
    "difference": lambda e: difference(e, "image_auroc", Estimate(NAN, NAN, NAN)),
    "lower end alone": lambda e: difference(e, "aupro", Estimate(0.0, NAN, 0.1)),
    "defect type": lambda e: by_defect(e, "dent", Estimate(NAN, NAN, NAN)),
    "latency": lambda e: facts(e, latency_ms=NAN),
    "champion's latency": lambda e: replace(e, champion=replace(e.champion, latency_ms=NAN)),
    "size": lambda e: facts(e, megabytes=NAN),
}


@pytest.mark.parametrize("what", WITH_NAN)
def test_no_figure_that_is_nan_promotes_and_the_refusal_can_be_written_down(what: str, tmp_path: Path) -> None:
    """JSON knows no NaN: such a figure is null."""
    strict = replace(RULES, margin=0.0, pixel_margin=0.0, defect_margin=0.0)
    assert not decide(WITH_NAN[what](SECOND), strict).promote
    found = decide(WITH_NAN[what](SECOND), RULES)
    write_json(tmp_path / "decision.json", found.to_json())
    content = json.loads((tmp_path / "decision.json").read_text())
    assert content["promote"] is False
    assert {item["value"] for item in content["checks"] if not item["passed"]} == {None}


def test_a_decision_in_json_holds_every_check_and_its_figure() -> None:
    found = decide(SECOND, RULES)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["promote"] is True
    assert content["reason"] == found.reason
    by_name = {item["name"]: item for item in content["checks"]}
    assert by_name["image_auroc_floor"]["value"] == 0.95
    assert by_name["image_auroc_floor"]["bound"] == 0.8
    assert by_name["image_auroc_difference"]["value"] == -0.01
    assert by_name["image_auroc_difference"]["bound"] == -0.02
    assert by_name["latency_ratio"]["value"] == 1.0


def test_estimates_in_json_are_rounded_plain_numbers() -> None:
    assert estimates_json({"a": Estimate(1 / 3, 0.0, 1.0)}) == {"a": [0.333333, 0.0, 1.0]}
    assert estimates_json({"a": Estimate(NAN, NAN, 1.0)}) == {"a": [None, None, 1.0]}


shares = st.floats(0, 1)
gains = st.floats(0, 0.5)


@st.composite
def estimates(draw: st.DrawFn, low: float, high: float) -> Estimate:
    ends = sorted(draw(st.lists(st.floats(low, high), min_size=3, max_size=3)))
    return Estimate(ends[1], ends[0], ends[2])


@st.composite
def evidence(draw: st.DrawFn) -> Evidence:
    """Evidence near the bounds, with and without a champion."""
    made = draw(st.sampled_from([FIRST, SECOND]))
    made = standing(made, "image_auroc", draw(estimates(0.75, 1)))
    made = standing(made, "aupro", draw(estimates(0.4, 1)))
    made = standing(made, "false_alarms", draw(estimates(0, 0.15)))
    made = facts(made, latency_ms=draw(st.floats(1, 600)), megabytes=draw(st.floats(1, 110)))
    if made.champion:
        for key in made.comparison.differences:
            made = difference(made, key, draw(estimates(-0.05, 0.1)))
        for name in made.comparison.defect_differences:
            made = by_defect(made, name, draw(estimates(-0.08, 0.2)))
        made = replace(made, champion=replace(made.champion, latency_ms=draw(st.floats(1, 600))))
    objections = st.sampled_from([(), (), (), ("an objection",)])
    return replace(
        made,
        parity=draw(objections),
        gate=draw(objections),
        missing_links=draw(objections),
        rolled_back=draw(st.sampled_from(["", "", "", "too many false alarms"])),
    )


@st.composite
def improvements(draw: st.DrawFn) -> Change:
    """Something that only makes a challenger better."""

    def up(estimate: Estimate) -> Estimate:
        return Estimate(*(part + gain for part in estimate))

    gain, share = draw(gains), draw(shares)
    changes: dict[str, Change] = {
        "auroc": lambda e: standing(e, "image_auroc", up(e.comparison.challenger.values["image_auroc"])),
        "aupro": lambda e: standing(e, "aupro", up(e.comparison.challenger.values["aupro"])),
        "alarms": lambda e: standing(
            e, "false_alarms", Estimate(*(part * share for part in e.comparison.challenger.false_alarms))
        ),
        "latency": lambda e: facts(e, latency_ms=e.challenger.latency_ms * share),
        "size": lambda e: facts(e, megabytes=e.challenger.megabytes * share),
        "slower champion": lambda e: (
            replace(e, champion=replace(e.champion, latency_ms=e.champion.latency_ms * (1 + gain))) if e.champion else e
        ),
        "difference": lambda e: (
            difference(e, "image_auroc", up(e.comparison.differences["image_auroc"])) if e.champion else e
        ),
        "pixels": lambda e: difference(e, "aupro", up(e.comparison.differences["aupro"])) if e.champion else e,
        "one defect type": lambda e: (
            by_defect(e, "dent", up(e.comparison.defect_differences["dent"])) if e.champion else e
        ),
        "surer": lambda e: (
            difference(e, "image_auroc", narrower(e.comparison.differences["image_auroc"])) if e.champion else e
        ),
        "parity": lambda e: replace(e, parity=()),
        "gate": lambda e: replace(e, gate=()),
        "lineage": lambda e: replace(e, missing_links=()),
        "readmitted": lambda e: replace(e, rolled_back=""),
    }
    return changes[draw(st.sampled_from(sorted(changes)))]


def narrower(estimate: Estimate) -> Estimate:
    middle = estimate.value
    return Estimate(middle, (estimate.low + middle) / 2, (estimate.high + middle) / 2)


@given(evidence(), st.lists(improvements(), min_size=1, max_size=4))
def test_no_improvement_turns_a_promotion_into_a_refusal(before: Evidence, changes: list[Change]) -> None:
    after = before
    for change in changes:
        after = change(after)
    passed = {check.name for check in decide(before, RULES).checks if check.passed}
    assert passed <= {check.name for check in decide(after, RULES).checks if check.passed}
    assert decide(after, RULES).promote >= decide(before, RULES).promote


@given(evidence())
def test_it_promotes_exactly_if_every_check_passed(made: Evidence) -> None:
    found = decide(made, RULES)
    assert found.promote == all(check.passed for check in found.checks)
    assert found == decide(made, RULES)
    assert found.reason.endswith(".")
    for check in found.checks:
        assert check.detail
        if not check.passed and not found.reason.endswith(" more."):
            assert check.detail in found.reason


@given(evidence(), st.floats(0, 0.2))
def test_stricter_rules_promote_no_more(made: Evidence, step: float) -> None:
    strict = replace(
        RULES,
        margin=max(0.0, RULES.margin - step),
        pixel_margin=max(0.0, RULES.pixel_margin - step),
        defect_margin=max(0.0, RULES.defect_margin - step),
        min_image_auroc=RULES.min_image_auroc + step,
        min_aupro=RULES.min_aupro + step,
        max_false_alarm_rate=max(0.0, RULES.max_false_alarm_rate - step),
        max_latency_ms=RULES.max_latency_ms * (1 - step),
        max_latency_ratio=RULES.max_latency_ratio - step,
        max_megabytes=RULES.max_megabytes * (1 - step),
    )
    assert decide(made, RULES).promote >= decide(made, strict).promote


@pytest.mark.parametrize("evidence", [FIRST, SECOND], ids=["first", "second"])
def test_without_masks_images_decide_and_the_pixels_are_said_to_be_unchecked(evidence: Evidence) -> None:
    nan = Estimate(math.nan, math.nan, math.nan)
    bare = standing(evidence, "aupro", nan)
    differences = {key: nan if key != "image_auroc" else value for key, value in bare.comparison.differences.items()}
    bare = replace(bare, comparison=replace(bare.comparison, differences=differences, has_masks=False))
    decision = decide(bare, RULES)
    assert decision.promote
    details = {check.name: check.detail for check in decision.checks if check.name.startswith("aupro")}
    assert set(details.values()) == {"AUPRO is not checked: no defective test image has a mask"}
    assert len(details) == (1 if evidence is FIRST else 2)
    assert not decide(standing(bare, "image_auroc", Estimate(0.1, 0.1, 0.1)), RULES).promote

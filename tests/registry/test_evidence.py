"""Which certificates are proofs, and what a model's speed is."""

import math
from typing import Any

import numpy as np
import pytest

from flawsmith.registry.evidence import gate_objections, parity_objections

DIGEST = "d" * 64
PICTURE = np.full((3, 32, 32), 0.5, np.float32)


def certificate(**changes: Any) -> dict[str, Any]:
    """A certificate as `export` writes it."""
    figures = {"map_difference": 1e-5, "score_difference": 1e-6, "decision_flips": 0}
    return {
        "batches": {"1": figures, "8": dict(figures)},
        "model_digest": DIGEST,
        "tolerance": 1e-4,
        **changes,
    }


def with_figure(batch: str, key: str, value: float) -> dict[str, Any]:
    made = certificate()
    made["batches"] = {name: dict(figures) for name, figures in made["batches"].items()}
    made["batches"][batch][key] = value
    return made


def test_a_certificate_of_this_file_within_tolerance_is_a_proof() -> None:
    assert parity_objections(certificate(), DIGEST) == ()
    assert parity_objections(with_figure("8", "map_difference", 1e-4), DIGEST) == (), "on the tolerance is within it"


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (certificate(model_digest="e" * 64), "another file"),
        (certificate(model_digest=None), "another file"),
        ({key: value for key, value in certificate().items() if key != "model_digest"}, "another file"),
        (certificate(batches={}), "no comparison"),
        ({key: value for key, value in certificate().items() if key != "batches"}, "no comparison"),
        (with_figure("1", "decision_flips", 2), "disagree at batch 1 (2 flips"),
        (with_figure("8", "map_difference", 2e-4), "disagree at batch 8 (0 flips, difference 0.0002)"),
        (with_figure("8", "score_difference", 0.5), "disagree at batch 8 (0 flips, difference 0.5)"),
        (with_figure("1", "map_difference", math.nan), "batch 1"),
        (with_figure("1", "score_difference", math.nan), "batch 1"),
        (with_figure("1", "score_difference", math.inf), "batch 1"),
    ],
)
def test_each_way_in_which_a_certificate_proves_nothing_is_told(spoilt: dict[str, Any], words: str) -> None:
    (objection,) = parity_objections(spoilt, DIGEST)
    assert words in objection


def test_every_objection_against_a_certificate_is_told() -> None:
    spoilt = with_figure("1", "decision_flips", 1) | {"model_digest": ""}
    spoilt["batches"]["8"]["map_difference"] = 1.0
    assert len(parity_objections(spoilt, DIGEST)) == 3


def verdict(passed: bool, *expectations: tuple[str, bool, str, int]) -> dict[str, Any]:
    keys = ("name", "passed", "severity", "failing")
    return {
        "passed": passed,
        "triplets": 400,
        "expectations": [dict(zip(keys, item, strict=True)) for item in expectations],
    }


def test_a_passed_gate_leaves_no_objection_even_with_warnings() -> None:
    assert gate_objections(verdict(True, ("realism", False, "warning", 7))) == ()


def test_a_failed_gate_names_its_critical_failures_alone() -> None:
    failed = verdict(
        False,
        ("mask_share", False, "critical", 9),
        ("in_manifest", True, "critical", 0),
        ("realism", False, "warning", 7),
        ("unique", False, "critical", 3),
    )
    assert gate_objections(failed) == (
        "the quality gate failed: mask_share (9 of 400 triplets), unique (3 of 400 triplets)",
    )


@pytest.mark.parametrize("unproven", [{}, {"passed": False}, {"passed": "true"}, {"passed": None}, {"passed": 1}])
def test_a_gate_that_does_not_plainly_say_passed_has_not_passed(unproven: dict[str, Any]) -> None:
    assert gate_objections(unproven) == ("the quality gate failed: no expectation was checked",)

"""Which certificates are proofs, and what a model's speed is."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flawsmith.files import write_json
from flawsmith.registry.evidence import _a90_95, gate_objections, parity_objections

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


def test_a90_95_is_compared_where_both_versions_tell_the_same(tmp_path: Path) -> None:
    def version(name: str, **sources: tuple[float | None, float]) -> Path:
        told = {key: {"a90_95": size, "contrast": contrast, "unit": "px"} for key, (size, contrast) in sources.items()}
        write_json(tmp_path / name / "metrics.json", {"detection": told})
        return tmp_path / name

    champion = version("7", diffusion=(8.0, 10), own=(9.0, 10), pieces=(7.0, 10), cutpaste=(None, 10))
    challenger = version("8", diffusion=(6.0, 10), own=(None, 10), pieces=(5.0, 20), cutpaste=(5.0, 10))
    assert _a90_95(challenger, champion) == {"diffusion": (6.0, 8.0), "own": (math.inf, 9.0)}
    assert _a90_95(version("9"), champion).keys() == {"diffusion", "own", "pieces"}
    write_json(tmp_path / "6/metrics.json", {})  # registered before anything was tried
    assert _a90_95(challenger, tmp_path / "6") == {}

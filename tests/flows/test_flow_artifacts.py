"""What stands on a run's page."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flawsmith.dvc import StageOutcome
from flawsmith.quality.verdict import Outcome, Rule, decide
from flows import artifacts


def test_a_key_is_what_prefect_accepts() -> None:
    assert artifacts.slug("Brushed_metal 2") == "brushed-metal-2"


def test_stages_are_a_row_each() -> None:
    rows = artifacts.stage_rows([StageOutcome("distill@steel", "ran", 12.345)])
    assert rows == [{"stage": "distill@steel", "DVC": "ran", "seconds": 12.3}]


def test_metrics_stand_side_by_side(tmp_path: Path) -> None:
    (tmp_path / "detector.json").write_text(json.dumps({"aupro": 0.9, "image_auroc": 0.99}))
    (tmp_path / "patchcore.json").write_text(json.dumps({"aupro": 0.8}))
    assert artifacts.metric_rows(tmp_path) == [
        {"metric": "aupro", "detector": 0.9, "patchcore": 0.8},
        {"metric": "image_auroc", "detector": 0.99, "patchcore": None},
    ]


def test_failed_checks_stand_first() -> None:
    checks = [
        {"name": "size", "passed": True, "value": 1, "bound": 2, "detail": "ok"},
        {"name": "speed", "passed": False},
    ]
    rows = artifacts.check_rows({"checks": checks})
    assert [(row["check"], row["passed"]) for row in rows] == [("speed", "NO"), ("size", "yes")]


def test_the_gate_s_report_tells_what_the_gate_really_writes() -> None:
    """The verdict is made by the gate's own code, so the two cannot drift apart."""
    low = Rule("mask_area", "range", "critical", "the mask marks something", "mask_area", 0.001, 0.2)
    count = Rule("triplet_count", "row count", "critical", "there are enough triplets", low=100)
    fine = Rule("decodable", "true", "critical", "all are images", "decodable")
    outcomes = [
        Outcome(low, False, tuple(f"fit-{n:05d}" for n in range(30)), (0.0, 0.1)),
        Outcome(count, False, (), 40.0),
        Outcome(fine, True, (), None),
    ]
    text = artifacts.gate_report("steel", decide(outcomes, 40).to_json(), "host:/docs/index.html", "http://mlflow/run")
    assert (
        "| **mask_area**: the mask marks something | critical | 0 to 0.1 | 0.001 to 0.2 | 30 of 40 | `fit-00000`"
        in text
    )
    assert "| **triplet_count**: there are enough triplets | critical | 40 | at least 100 |" in text
    assert "decodable" not in text
    assert "host:/docs/index.html" in text
    assert "[http://mlflow/run](http://mlflow/run)" in text


def test_a_picture_is_made_small_enough(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2400, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "sheet.png")
    head, _, body = artifacts.data_uri(tmp_path / "sheet.png").partition(",")
    content = base64.b64decode(body)
    with Image.open(io.BytesIO(content)) as image:
        assert max(image.size) == artifacts.LONGEST_SIDE
    assert head == "data:image/jpeg;base64"
    assert len(content) < 1_000_000


def test_no_mlflow_server_means_no_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert artifacts.mlflow_run("flawsmith/steel", "validate", "run") is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    assert artifacts.mlflow_run("flawsmith/steel", "validate", "run") is None

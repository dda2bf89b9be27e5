"""A project folder whose params.yaml makes every stage a matter of moments."""

from pathlib import Path

import pytest
from small_settings import SMALL, Sections, write_params

DEMO: Sections = {
    "demo-data": {
        "image_size": 128, "train_good": 12, "test_good": 2, "test_per_defect": 1
    },
    "synthesize": {"windows": [32, 48], "batch": 2, "min_changed": 0.0},
}  # fmt: skip


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "project" / "params.yaml"
    gate = {key: value for key, value in SMALL["validate"].items() if "sample" in key}  # else its own bounds
    write_params(path, {**SMALL, "validate": {**gate, "min_triplets": 4, "worst": 4}}, DEMO)
    return path

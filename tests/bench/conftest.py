"""A project folder whose params.yaml makes every stage a matter of moments."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SMALL: dict[str, dict[str, Any]] = {
    "data": {"image_size": 64, "calibration_fraction": 0.3},
    "demo-data": {
        "surfaces": ["brushed_metal"], "image_size": 128, "train_good": 6, "test_good": 2, "test_per_defect": 1
    },
    "ddpm-train": {
        "crop": 32, "channels": [16, 16], "steps": 12, "batch": 2, "warmup": 2, "train_timesteps": 50,
        "readiness_samples": 4,
    },
    "synthesize": {
        "triplets": 8, "steps": 3, "windows": [32, 48], "batch": 2, "perlin_periods": [8, 16],
        "area": [0.0003, 0.2], "min_changed": 0.0, "validation_fraction": 0.25,
    },
    "validate": {"min_triplets": 4, "worst": 4},
    "distill": {
        "student_steps": 4, "head_steps": 4, "batch": 2, "bottleneck": 8, "decoder_channels": [8, 8],
        "head_channels": 8,
    },
    "evaluate": {"bootstrap": 20, "batch": 4, "gallery": 4, "baseline_vectors": 200, "parity_images": 8},
    "export": {"latency_runs": 3},
}  # fmt: skip


@pytest.fixture
def params(tmp_path: Path) -> Path:
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in SMALL.items():
        content[section].update(values)
    path = tmp_path / "project" / "params.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path

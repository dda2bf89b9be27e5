"""Settings small enough for seconds, and still the real method at every stage."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

Sections = Mapping[str, Mapping[str, Any]]

SHIPPED = Path(__file__).parents[1] / "params.yaml"
SMALL: dict[str, dict[str, Any]] = {
    "data": {"image_size": 64, "calibration_fraction": 0.3},
    "ddpm-train": {
        "crop": 32, "channels": [16, 16], "steps": 12, "batch": 2, "warmup": 2, "checkpoint_every": 3,
        "train_timesteps": 50, "readiness_samples": 4,
    },
    "synthesize": {
        "triplets": 8, "steps": 3, "windows": [32], "batch": 4, "perlin_periods": [8, 16], "area": [0.0003, 0.2],
        "min_changed": 0.2, "validation_fraction": 0.25,
    },
    "validate": {
        "max_sample_distance": [50.0, 100.0], "min_sample_novelty": [0.0, 0.0],
        "min_triplets": 4, "mask_area": [0.00005, 0.5], "min_change_inside": 0.0, "min_visible_share": 0.0,
        "max_change_outside": 1.0, "ssim": [-1.0, 1.0], "worst": 4,
    },
    "distill": {
        "student_steps": 4, "head_steps": 4, "batch": 2, "bottleneck": 8,
        "decoder_channels": [8, 8], "head_channels": 8, "memory": 200, "validate_every": 2, "checkpoint_every": 2,
    },
    "evaluate": {"bootstrap": 20, "batch": 4, "gallery": 4, "baseline_vectors": 200, "parity_images": 8,
                 "detection_defects": 10},
    "export": {"latency_runs": 3},
}  # fmt: skip


def dotted(sections: Sections) -> dict[str, Any]:
    """`{"data": {"scale": 1}}` as `{"data.scale": 1}`, what `load_settings` takes."""
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def write_params(path: Path, *replaced: Sections, base: Path = SHIPPED, **whole: Any) -> None:
    """Write a params.yaml: `base` with values of sections replaced, the last one said wins; keywords replace keys at
    the top."""
    content = yaml.safe_load(base.read_text()) | whole
    for sections in replaced:
        for section, values in sections.items():
            content.setdefault(section, {}).update(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False))

"""Run every stage in order on a small category made for it, without DVC."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from small_settings import SHIPPED, SMALL, dotted

from flawsmith.config import load_settings
from flawsmith.data.images import write_png
from flawsmith.layout import Layout
from flawsmith.stages import ddpm_train, distill, evaluate, export, synthesize, validate

BRIEF: dict[str, Any] = dotted(SMALL) | {
    "tracking.mode": "off",
    "ddpm-train.steps": 6,
    "synthesize.validation_fraction": 0.3,
    "distill.memory": 300,
}


def run_all(
    root: Path,
    category: str,
    picture: Callable[[int], NDArray[np.uint8]],
    hole: tuple[slice, slice],
    settings: Mapping[str, Any],
) -> Layout:
    """Write 12 normal images, 4 good test images and 4 with a bright hole at a place; then run the stages to export.

    Args:
        picture: seed → pixels (H, W, 3).
        settings: dotted keys that replace those of BRIEF.
    """
    folder = root / "data" / category
    for seed in range(12):
        write_png(folder / f"train/good/{seed:03d}.png", picture(seed))
    for seed in range(4):
        write_png(folder / f"test/good/{seed:03d}.png", picture(100 + seed))
        pixels = picture(200 + seed)
        mask = np.zeros(pixels.shape[:2], np.bool_)
        mask[hole] = True
        pixels[mask] = 250
        write_png(folder / f"test/hole/{seed:03d}.png", pixels)
        write_png(folder / f"ground_truth/hole/{seed:03d}_mask.png", mask)
    layout = Layout(load_settings(SHIPPED, {**BRIEF, "categories": [category], **settings}), category, root)
    for stage in (ddpm_train, synthesize, validate, distill, evaluate, export):
        stage.run(layout)
    return layout

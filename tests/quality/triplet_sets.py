"""Small triplets like those of the synthesize stage, and the gate's report on a set of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from flawsmith.config import Settings, load_settings
from flawsmith.data.images import FloatImage, Mask, read_image, write_png
from flawsmith.data.masks import read_mask
from flawsmith.data.triplets import part_path
from flawsmith.errors import QualityGateError
from flawsmith.files import read_json, write_json
from flawsmith.layout import Layout
from flawsmith.stages.validate import run

SIDE, COUNT = 64, 12
PARAMS = Path(__file__).parents[2] / "params.yaml"


def make_triplet(generator: np.random.Generator, side: int = SIDE) -> tuple[FloatImage, FloatImage, Mask]:
    """A grainy texture and the same with a darker blob; the mask is where pixels changed."""
    grain = ndimage.gaussian_filter(generator.normal(size=(side, side)), 1.5)
    normal = np.clip(0.55 + 0.25 * grain + generator.normal(0, 0.02, (3, side, side)), 0, 1).astype(np.float32)
    row, column = generator.uniform(0.3 * side, 0.7 * side, 2)
    rows, columns = np.mgrid[:side, :side]
    mask = np.hypot(rows - row, (columns - column) * generator.uniform(1, 2)) < generator.uniform(4, 8)
    defect = np.where(mask, 0.5 * normal, normal).astype(np.float32)
    return normal, defect, mask


def write_triplet(folder: Path, triplet_id: str, normal: FloatImage, defect: FloatImage, mask: Mask) -> None:
    for part, pixels in (("normal", normal), ("defect", defect), ("mask", mask)):
        write_png(part_path(folder, part, triplet_id), pixels)


def make_set(folder: Path, count: int = COUNT) -> list[str]:
    """Write `count` triplets and their manifest; return the ids."""
    generator = np.random.default_rng(5)
    ids = [f"{'val' if index % 6 == 5 else 'fit'}-{index:05d}" for index in range(count)]
    for triplet_id in ids:
        write_triplet(folder, triplet_id, *make_triplet(generator))
    write_manifest(folder, ids)
    return ids


def write_manifest(folder: Path, ids: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    manifest = pd.DataFrame({"triplet_id": pd.Series(ids, dtype="string"), "seed": np.arange(len(ids))})
    manifest.to_parquet(folder / "manifest.parquet", index=False)


def edit(folder: Path, triplet_id: str, change: Callable[[FloatImage, FloatImage, Mask], None]) -> None:
    """Change a triplet's arrays in place and write them back."""
    paths = [part_path(folder, part, triplet_id) for part in ("normal", "defect", "mask")]
    normal, defect, mask = read_image(paths[0]), read_image(paths[1]), read_mask(paths[2])
    change(normal, defect, mask)
    write_triplet(folder, triplet_id, normal, defect, mask)


@dataclass(frozen=True)
class Report:
    """What the stage left behind."""

    layout: Layout
    error: QualityGateError | None

    @property
    def folder(self) -> Path:
        return self.layout.stage("validate")

    @property
    def triplets(self) -> Path:
        return self.layout.stage("synthesize")

    @property
    def verdict(self) -> dict:
        return read_json(self.folder / "verdict.json")

    def failing(self, severity: str | None = None) -> dict[str, list[str]]:
        """Ids of failing triplets by the name of the expectation that failed."""
        return {
            item["name"]: item["failing_ids"]
            for item in self.verdict["expectations"]
            if not item["passed"] and severity in (None, item["severity"])
        }


def settings(**overrides: object) -> Settings:
    chosen = {
        "data.image_size": SIDE,
        "synthesize.windows": [SIDE],
        "tracking.mode": "off",
        "validate.min_triplets": 10,
    }
    return load_settings(PARAMS, chosen | {f"validate.{key}": value for key, value in overrides.items()})


def write_readiness(layout: Layout, distance: float, novelty: float) -> None:
    """What ddpm-train leaves of a model whose samples lie there."""
    found = {"relative_distance": distance, "neighbour_ratio": novelty, "verdict": f"Samples lie at {distance:.0%}."}
    write_json(layout.stage("ddpm-train") / "readiness.json", found)


def judge(
    root: Path,
    prepare: Callable[[Path], None] = lambda folder: None,
    ddpm: tuple[float, float] = (0.2, 1.5),
    **overrides: object,
) -> Report:
    """Write a good set, let `prepare` spoil it, run the stage; `ddpm` is how its samples fared."""
    layout = Layout(settings(**overrides), "tile", root)
    write_readiness(layout, *ddpm)
    make_set(layout.stage("synthesize"))
    prepare(layout.stage("synthesize"))
    try:
        run(layout)
    except QualityGateError as error:
        return Report(layout, error)
    return Report(layout, None)

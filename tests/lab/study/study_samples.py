"""A small project with one category for studies, and rows made by hand."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from small_settings import SMALL, Sections, write_params

from flawsmith.data.images import write_png
from flawsmith.evaluation.metrics import KEYS
from flawsmith_lab.study.plan import Cell, Request
from flawsmith_lab.study.results import MEASURED, Row

STEPS: Sections = {
    "ddpm-train": {"steps": 8},
    "distill": {"student_steps": 2, "head_steps": 2},
}


@dataclass(frozen=True)
class Project:
    """A folder with params.yaml and one category of noise with dents."""

    folder: Path

    @property
    def params(self) -> Path:
        return self.folder / "params.yaml"

    def request(self, **changes: Any) -> Request:
        asked: dict[str, Any] = {"categories": ("tiles",), "seeds": (0,), "methods": ("flawsmith",), "data": None}
        return Request(params=self.params, **({"out": self.folder / "out"} | asked | changes))


def create_project(folder: Path, normals: int = 12, tested: int = 2) -> Project:
    write_params(folder / "params.yaml", SMALL, STEPS, categories=["tiles"])
    tiles = folder / "data" / "tiles"
    for index in range(normals):
        write_png(tiles / f"train/good/{index:03d}.png", _surface(index)[0])
    for index in range(tested):
        write_png(tiles / f"test/good/{index:03d}.png", _surface(100 + index)[0])
        image, mask = _surface(200 + index, dented=True)
        write_png(tiles / f"test/dent/{index:03d}.png", image)
        write_png(tiles / f"ground_truth/dent/{index:03d}_mask.png", mask)
    return Project(folder)


def _surface(seed: int, dented: bool = False) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    gray = generator.integers(90, 130, (64, 64), np.uint8)
    mask = np.zeros((64, 64), np.bool_)
    if dented:
        mask[12:28, 12:40] = True
        gray[mask] = 200
    return np.repeat(gray[..., None], 3, axis=2), mask


def make_row(
    value: float = 0.9,
    *,
    draws: Any = None,
    failure: str = "",
    by_defect: Mapping[str, float] = MappingProxyType({"dent": 0.9}),
    **cell: Any,
) -> Row:
    """A row whose metrics are all `value`."""
    place = {"category": "tiles", "method": "flawsmith", "seed": 0, "part": "all", "grid": {}, **cell}
    cost = {"seconds": 2.0, "peak_mb": 100.0, "peak_device_mb": None, "device": "cpu", "threads": 1, "output": "d",
            "resumed": False}  # fmt: skip
    return Row(
        cell=Cell(**place, runs=()),
        metrics={} if failure else dict.fromkeys(MEASURED, value),
        by_defect={} if failure else by_defect,
        costs={"synthesize": cost, "distill": cost | {"seconds": 3.0, "peak_mb": 300.0}},
        draws={} if draws is None else dict.fromkeys(KEYS, np.asarray(draws, np.float64)),
        failed_stage="validate" if failure else "",
        failure=failure,
    )

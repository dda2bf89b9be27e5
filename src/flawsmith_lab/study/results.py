"""A study's rows, from what lies in its store: results.json and results.parquet."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from flawsmith.evaluation.metrics import KEYS
from flawsmith.files import atomic_file, read_json, write_json
from flawsmith_lab.study.plan import Cell, Plan

FALSE_ALARMS, DETECTIONS = "test_false_alarm_rate", "test_detection_rate"
MEASURED = (*KEYS, FALSE_ALARMS, DETECTIONS)


@dataclass(frozen=True)
class Row:
    """One cell and what came out.

    Attributes:
        metrics: each of MEASURED; empty for a cell that failed or is not done. NaN where images lack pixel labels.
        by_defect: defect type → image AUROC against all good images.
        costs: stage → what its run cost.
        draws: each of KEYS → bootstrap draws `(B,)`; empty unless images are the labelled test set, which rows share.
        failed_stage, failure: where and why the cell ended, or "".
        evaluation: the folder with report and scores, relative to the study's; "" for none.
    """

    cell: Cell
    metrics: Mapping[str, float]
    by_defect: Mapping[str, float]
    costs: Mapping[str, Mapping[str, Any]]
    draws: Mapping[str, NDArray[np.float64]]
    failed_stage: str = ""
    failure: str = ""
    evaluation: str = ""

    @property
    def seconds(self) -> float:
        """What the row would cost alone: shared stages count in full."""
        return float(sum(cost["seconds"] for cost in self.costs.values()))

    @property
    def peak_mb(self) -> float:
        """The highest resident memory of a stage, in MiB."""
        return max((float(cost["peak_mb"]) for cost in self.costs.values()), default=0.0)

    @property
    def is_done(self) -> bool:
        """Whether the cell has a result."""
        return bool(self.metrics)


def collect_rows(plan: Plan, failures: Mapping[Path, str]) -> tuple[Row, ...]:
    """Every cell's row, in the plan's order; `failures` are reasons by the folder of the run."""
    return tuple(_row(cell, failures) for cell in plan.cells)


def _row(cell: Cell, failures: Mapping[Path, str]) -> Row:
    costs = {run.stage: run.cost for run in cell.runs if run.is_done}
    broken = next((run for run in cell.runs if run.folder in failures), None)
    if broken is not None:
        return Row(cell, {}, {}, costs, {}, broken.stage, failures[broken.folder])
    last = cell.runs[-1]
    if not last.is_done:
        return Row(cell, {}, {}, costs, {})
    found = read_json(last.folder / "metrics.json")
    metrics = {key: math.nan if found[key] is None else float(found[key]) for key in MEASURED}
    by_defect = {name: float(values["image_auroc"]) for name, values in found["by_defect"].items()}
    draws: dict[str, NDArray[np.float64]] = {}
    if found["labelled"]:
        with np.load(last.folder / "draws.npz", allow_pickle=False) as kept:
            draws = {key: np.asarray(kept[key], np.float64) for key in KEYS if key in kept}
    place = "/".join(("store", *last.folder.parts[-3:]))
    return Row(cell, metrics, by_defect, costs, draws, evaluation=place)


def row_content(row: Row) -> dict[str, Any]:
    """A row as results.json has it; values that a failed cell lacks are null."""
    cell, costs = row.cell, row.costs
    return {
        "category": cell.category,
        "method": cell.method,
        "label": cell.label,
        "seed": cell.seed,
        "part": cell.part,
        "grid": dict(cell.grid),
        **{key: value if math.isfinite(value := row.metrics.get(key, math.nan)) else None for key in KEYS},
        "image_auroc_by_defect": dict(row.by_defect),
        "false_alarm_rate": row.metrics.get(FALSE_ALARMS),
        "detection_rate": row.metrics.get(DETECTIONS),
        "seconds": round(row.seconds, 3) if row.is_done else None,
        "peak_mb": row.peak_mb if row.is_done else None,
        "stage_seconds": {stage: cost["seconds"] for stage, cost in costs.items()},
        "stage_peak_mb": {stage: cost["peak_mb"] for stage, cost in costs.items()},
        "peak_device_mb": max((cost["peak_device_mb"] or 0 for cost in costs.values()), default=0) or None,
        "device": next(reversed([cost["device"] for cost in costs.values()]), None),
        "failed_stage": row.failed_stage or None,
        "failure": row.failure or None,
        "detector": costs.get("distill", {}).get("output"),
        "evaluation": row.evaluation or None,
    }


def write_results(out: Path, rows: Sequence[Row], commit: str, changed: bool) -> None:
    """Write results.json, and results.parquet: the same as a flat table.

    The table has a column a stage (`seconds_distill`) and a grid key (`grid_distill.batch`). Defects, and values of a
    grid key that are not all numbers, are JSON texts.
    """
    content = [{**row_content(row), "commit": commit, "commit_changed": changed} for row in rows]
    write_json(out / "results.json", content)
    texts = [
        {**row, "image_auroc_by_defect": json.dumps(row["image_auroc_by_defect"], sort_keys=True)} for row in content
    ]
    frame = pd.json_normalize(texts, sep="_").rename(columns=lambda name: name.removeprefix("stage_"))
    for key in {key for row in content for key in row["grid"]}:
        values = [row["grid"].get(key) for row in content]
        if not all(value is None or type(value) in (int, float) for value in values):
            frame[f"grid_{key}"] = [None if value is None else json.dumps(value) for value in values]
    with atomic_file(out / "results.parquet") as temporary:
        frame.to_parquet(temporary, index=False)

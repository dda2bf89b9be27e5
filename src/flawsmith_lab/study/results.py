"""A study's rows, from what lies in its store: results.json and results.parquet."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawsmith.evaluation.assess import KEYS
from flawsmith.files import atomic_file, read_json, write_json
from flawsmith_lab.study.plan import STAGES, Cell, Plan, Task
from flawsmith_lab.study.store import Failure, Store

FALSE_ALARMS, DETECTIONS = "test_false_alarm_rate", "test_detection_rate"


@dataclass(frozen=True)
class Row:
    """One cell and what came out.

    Attributes:
        metrics: each of KEYS and the rates at the threshold; empty for a cell that failed or is not done.
        by_defect: defect type → image AUROC against all good images.
        costs: stage → its `cost.json`.
        draws: each of KEYS → bootstrap draws `(B,)`; empty where images are not the labelled test set, which other
            rows share.
        failed_stage, failure: where and why the cell ended, or "".
        detector: digest of the trained detector's folder, as the exported model carries it; "" for none.
        evaluation: the folder with report and scores, relative to the study's; "" for none.
    """

    cell: Cell
    metrics: Mapping[str, float]
    by_defect: Mapping[str, float]
    costs: Mapping[str, Mapping[str, Any]]
    draws: Mapping[str, NDArray[np.float64]]
    failed_stage: str
    failure: str
    detector: str
    evaluation: str

    @property
    def seconds(self) -> float:
        """What the row would cost alone: shared stages count in full."""
        return float(sum(cost["seconds"] for cost in self.costs.values()))

    @property
    def peak_mb(self) -> float:
        return max((float(cost["peak_mb"]) for cost in self.costs.values()), default=0.0)

    @property
    def is_done(self) -> bool:
        return bool(self.metrics)


def collect_rows(plan: Plan, store: Store, failures: Mapping[tuple[str, str, str], Failure]) -> tuple[Row, ...]:
    """Every cell's row, in the plan's order."""
    return tuple(_row(cell, store, failures) for cell in plan.cells)


def _row(cell: Cell, store: Store, failures: Mapping[tuple[str, str, str], Failure]) -> Row:
    last = cell.tasks[-1]
    broken = next((task for task in cell.tasks if task.key in failures), None)
    costs = {task.stage: store.cost(task) for task in cell.tasks if store.is_done(task)}
    metrics: dict[str, float] = {}
    by_defect: dict[str, float] = {}
    draws: dict[str, NDArray[np.float64]] = {}
    done = broken is None and store.is_done(last)
    if done:
        found = read_json(store.output(last) / "metrics.json")
        metrics = {key: _number(found[key]) for key in (*KEYS, FALSE_ALARMS, DETECTIONS)}
        by_defect = {name: float(values["image_auroc"]) for name, values in found["by_defect"].items()}
        if found["labelled"]:
            draws = _read_draws(store.output(last) / "draws.npz")
    return Row(
        cell=cell,
        metrics=metrics,
        by_defect=by_defect,
        costs=costs,
        draws=draws,
        failed_stage=broken.stage if broken else "",
        failure=failures[broken.key].reason if broken else "",
        detector=str(costs.get("distill", {}).get("output", "")),
        evaluation=_relative(store, last) if done else "",
    )


def _number(value: float | None) -> float:
    """NaN for a figure of pixels where no image has a mask."""
    return math.nan if value is None else float(value)


def _read_draws(path: Path) -> dict[str, NDArray[np.float64]]:
    with np.load(path, allow_pickle=False) as found:
        return {key: np.asarray(found[key], np.float64) for key in KEYS if key in found}


def _relative(store: Store, task: Task) -> str:
    return store.output(task).relative_to(store.folder.parent).as_posix()


def row_content(row: Row, commit: str, changed: bool) -> dict[str, Any]:
    """A row as results.json has it; values that a failed cell lacks are null."""
    cell = row.cell
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
        "stage_seconds": {stage: cost["seconds"] for stage, cost in row.costs.items()},
        "stage_peak_mb": {stage: cost["peak_mb"] for stage, cost in row.costs.items()},
        "peak_device_mb": max((cost["peak_device_mb"] or 0 for cost in row.costs.values()), default=0) or None,
        "device": next(reversed([cost["device"] for cost in row.costs.values()]), None),
        "failed_stage": row.failed_stage or None,
        "failure": row.failure or None,
        "detector": row.detector or None,
        "evaluation": row.evaluation or None,
        "commit": commit,
        "commit_changed": changed,
    }


def write_results(out: Path, rows: Sequence[Row], commit: str, changed: bool) -> None:
    """results.json and results.parquet."""
    content = [row_content(row, commit, changed) for row in rows]
    write_json(out / "results.json", content)
    write_table(out / "results.parquet", content)


def write_table(path: Path, content: Sequence[Mapping[str, Any]]) -> None:
    """The rows as a flat table: a column a stage (`seconds_distill`), a grid key (`grid_distill.batch`); a grid value
    that is no number, and the defects, are JSON texts."""
    import pandas as pd  # not needed to run stages

    keys = list(dict.fromkeys(key for row in content for key in row["grid"]))
    stages = [stage for stage in STAGES if any(stage in row["stage_seconds"] for row in content)]
    flat = []
    for row in content:
        plain = {key: value for key, value in row.items() if not isinstance(value, dict)}
        plain["image_auroc_by_defect"] = json.dumps(row["image_auroc_by_defect"], sort_keys=True)
        for short in ("seconds", "peak_mb"):
            plain |= {f"{short}_{stage}": row[f"stage_{short}"].get(stage) for stage in stages}
        flat.append(plain)
    frame = pd.DataFrame(flat)
    for key in keys:
        values = [row["grid"].get(key) for row in content]
        if not all(value is None or _is_number(value) for value in values):
            values = [None if value is None else json.dumps(value) for value in values]
        frame[f"grid_{key}"] = values
    with atomic_file(path) as temporary:
        frame.to_parquet(temporary, index=False)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)

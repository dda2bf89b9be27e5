"""The gate: measure the triplets of a synthesize folder, judge them, and leave a report that says why."""

from dataclasses import asdict
from pathlib import Path

import pandas as pd

from flawsmith.data.images import write_png
from flawsmith.data.triplets import read_manifest
from flawsmith.errors import QualityGateError
from flawsmith.files import atomic_file, read_json, write_json
from flawsmith.quality.config import ValidateSettings
from flawsmith.quality.expectations import check
from flawsmith.quality.measures import Measures, Scale, measure_folder
from flawsmith.quality.sheet import draw_sheet, rank_worst
from flawsmith.quality.verdict import DISTANCE, NOVELTY, Verdict, ddpm_rules, rules

KINDS: dict[object, str] = {str: "string", bool: "bool", bool | None: "boolean", float: "float64"}


def read_manifest_ids(path: Path) -> list[str]:
    """The triplet ids that the manifest lists, in its order.

    Raises:
        UserError: the manifest cannot be read.
    """
    return [str(value) for value in read_manifest(path)["triplet_id"].to_pylist()]


def to_frame(rows: list[Measures]) -> pd.DataFrame:
    """One row a triplet; the columns and their types are the same for no rows at all."""
    names = Measures.__dataclass_fields__
    frame = pd.DataFrame([asdict(row) for row in rows], columns=list(names))
    return frame.astype({name: KINDS[field.type] for name, field in names.items()})


def inspect_triplets(
    triplets: Path, report: Path, settings: ValidateSettings, side: int, readiness: Path | None = None
) -> Verdict:
    """Judge the triplets in the folder `triplets`, whose images must have the shorter side `side` (pixels).

    `readiness` is the readiness.json of the DDPM behind them, None if they were made without one. Writes
    measures.parquet, verdict.json, docs/ (Data Docs) and worst.png into the existing folder `report`.

    Raises:
        UserError: the manifest cannot be read.
    """
    listed = read_manifest_ids(triplets / "manifest.parquet")
    rows = measure_folder(triplets, listed, Scale(settings.visible_change, settings.outside_margin, side))
    frame = to_frame(rows)
    with atomic_file(report / "measures.parquet") as temporary:
        frame.to_parquet(temporary, index=False)
    suite, ddpm = rules(settings), None
    if readiness is not None:
        found = read_json(readiness)
        ddpm = str(found["verdict"])
        if rows:
            frame = frame.assign(**{name: float(found[name]) for name in (DISTANCE, NOVELTY)})
            suite = (*ddpm_rules(settings), *suite)
    verdict = check(frame, suite, report / "docs" / "index.html", ddpm)
    write_json(report / "verdict.json", verdict.to_json())
    write_png(report / "worst.png", draw_sheet(triplets, rank_worst(rows, verdict, settings.worst)))
    return verdict


def enforce(verdict: Verdict, category: str, report: Path) -> None:
    """Let a verdict that passed through; `report` is where the report will lie.

    Raises:
        QualityGateError: it did not pass.
    """
    if not verdict.passed:
        unready = any(
            not item.passed and item.rule.kind == "of all" and item.rule.severity == "critical"
            for item in verdict.outcomes
        )
        remedy = f"{verdict.ddpm} Or correct" if unready else "Then correct"
        raise QualityGateError(
            f"The triplets of '{category}' failed the quality gate: {verdict.reason()}; "
            f"read {report / 'docs' / 'index.html'} and {report / 'worst.png'}. {remedy} `synthesize` or the "
            "bounds in `validate` of params.yaml."
        )

"""What a run of the pipeline came to, in a few lines: verdict, report, next command."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from flawsmith.files import read_json
from flawsmith.layout import Layout


def conclude(layout: Layout) -> list[str]:
    """The lines of one category, three or with a quick look four, from what its stages wrote.

    Raises:
        UserError: a result cannot be read.
    """
    metrics, model = layout.stage("evaluate") / "metrics.json", layout.stage("export") / "model.onnx"
    report, gate = layout.stage("evaluate") / "report.html", layout.stage("validate") / "verdict.json"
    if metrics.is_file() and model.is_file():
        found = read_json(metrics)
        hits = _count(found, "test_detection_rate", "n_defective")
        alarms = _count(found, "test_false_alarm_rate", "n_good")
        said = (
            f"the detector finds {hits} of {found['n_defective']} defective images and flags {alarms} of "
            f"{found['n_good']} good ones ({found['scored_on']})"
        )
        following = f"{_command()} predict {shlex.quote(str(model))} FOLDER --out results"
    elif gate.is_file() and not read_json(gate)["passed"]:
        said, report = "the quality gate refused the triplets, so there is no detector", gate.parent / "docs/index.html"
        following = "correct `synthesize` or `validate` in params.yaml, then make repro"
    else:
        said, following = "no detector yet", "make repro"
    return [
        f"{layout.category}: {said}.",
        *_beside_quick_look(layout),
        f"Report: {report if report.is_file() else 'none yet'}",
        f"Next:   {following}",
    ]


def _beside_quick_look(layout: Layout) -> list[str]:
    """What the memories alone did on the same images, if there is a quick look at them: so one sees what training adds.

    The stages know nothing of it: a report must not depend on what DVC does not see.
    """
    full, quick = (layout.stage(name) / "metrics.json" for name in ("evaluate", "quick"))
    if not (full.is_file() and quick.is_file()):
        return []
    found, first = read_json(full), read_json(quick)
    if any(found[key] != first[key] for key in ("scored_on", "n_defective", "n_good", "n_calibration")):
        return []
    areas = " to ".join(f"{one['image_auroc']:.3f}" for one in (first, found))
    hits, alarms = _count(first, "test_detection_rate", "n_defective"), _count(first, "test_false_alarm_rate", "n_good")
    return [f"Before training (quick look): {hits} found, {alarms} flagged; training changed image AUROC from {areas}."]


def _count(metrics: dict[str, Any], rate: str, of: str) -> int:
    return round((metrics[rate] or 0) * metrics[of])


def _command() -> str:
    """This program as one calls it from here: an environment below this folder need not be active."""
    here = Path(os.path.relpath(sys.argv[0]))
    return "flawsmith" if ".." in here.parts else shlex.quote(str(here))

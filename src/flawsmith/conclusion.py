"""What a run of the pipeline came to, in three lines: verdict, report, next command."""

import os
import shlex
import sys
from pathlib import Path

from flawsmith.files import read_json
from flawsmith.layout import Layout


def conclude(layout: Layout) -> list[str]:
    """The three lines of one category, from what its stages wrote.

    Raises:
        UserError: a result cannot be read.
    """
    metrics, model = layout.stage("evaluate") / "metrics.json", layout.stage("export") / "model.onnx"
    report, gate = layout.stage("evaluate") / "report.html", layout.stage("validate") / "verdict.json"
    if metrics.is_file() and model.is_file():
        found = read_json(metrics)
        hits, alarms = (
            round((found[rate] or 0) * found[count])
            for rate, count in (("test_detection_rate", "n_defective"), ("test_false_alarm_rate", "n_good"))
        )
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
        f"Report: {report if report.is_file() else 'none yet'}",
        f"Next:   {following}",
    ]


def _command() -> str:
    """This program as one calls it from here: an environment below this folder need not be active."""
    here = Path(os.path.relpath(sys.argv[0]))
    return "flawsmith" if ".." in here.parts else shlex.quote(str(here))

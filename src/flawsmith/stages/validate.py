"""validate: judge the triplets before anything learns from them; a critical failure stops the pipeline here.

flawsmith validate --category C: reads synthesize/ and, where the denoiser is used, ddpm-train/readiness.json;
writes measures.parquet, verdict.json, docs/ and worst.png. The report is in place whatever the verdict.
"""

import logging

from flawsmith.errors import QualityGateError
from flawsmith.files import atomic_folder
from flawsmith.layout import Layout
from flawsmith.quality.gate import enforce, inspect_triplets
from flawsmith.sections import section_values
from flawsmith.tracking import stage_run

log = logging.getLogger(__name__)


def run(layout: Layout) -> None:
    """Run the quality gate for one category.

    Raises:
        QualityGateError: a critical expectation failed; the report says which.
        UserError: there is no manifest, or no readiness.json where the denoiser is used.
    """
    settings = layout.settings.validate
    triplets, report = layout.input("synthesize", "manifest.parquet").parent, layout.stage("validate")
    readiness = None
    if "diffusion" in layout.settings.synthesize.shares:
        readiness = layout.input("ddpm-train", "readiness.json")
    params = {"validate": section_values(settings), "data": section_values(layout.settings.data)}
    with (
        stage_run(layout, "validate", params) as tracked,
        atomic_folder(report, keep_on=QualityGateError) as folder,
    ):
        verdict = inspect_triplets(triplets, folder, settings, layout.settings.data.image_size, readiness)
        tracked.log_metrics(
            {
                f"failing_{item.rule.name}": not item.passed if item.rule.kind == "of all" else len(item.failing_ids)
                for item in verdict.outcomes
            }
        )
        for name in ("verdict.json", "worst.png", "docs"):
            tracked.log_artifact(folder / name)
        log.info("%s: %d triplets, worst failure: %s", layout.category, verdict.triplets, verdict.severity or "none")
        enforce(verdict, layout.category, report)
        tracked.set_output(report / "measures.parquet")

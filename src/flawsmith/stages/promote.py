"""promote: judge the newest registered model beside the champion on today's images; if it holds, it is the champion.

flawsmith promote --category C. No stage of dvc.yaml: it changes the registry, which `dvc repro` must never do. Both
models are finished when they come here, so reading the test set is an evaluation: nothing is trained or tuned on it.
"""

from flawsmith.evaluation.paired import Comparison, compare_models
from flawsmith.evaluation.scoring import normal_items
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith.registry.promotion import Outcome, promote
from flawsmith.stages.evaluate import judged_images


def run(
    layout: Layout, *, version: str = "", reason: str = "", readmit: bool = False, dry_run: bool = False
) -> Outcome:
    """Compare, decide and act for one category; arguments and errors are those of `registry.promotion.promote`."""

    def compare(challenger: Predictor, champion: Predictor | None) -> tuple[Comparison, bool]:
        judged = judged_images(layout)
        rules, data, evaluate = layout.settings.promote, layout.settings.data, layout.settings.evaluate
        comparison = compare_models(
            challenger,
            champion,
            judged.items,
            normal_items(layout.split().calibration, data.image_size, data.max_pixels),
            numpy_generator(rules.seed, "promote"),
            bootstrap=rules.bootstrap,
            aupro_limit=evaluate.aupro_limit,
            batch=evaluate.batch,
            min_defect_images=rules.min_defect_images,
        )
        return comparison, judged.labelled

    return promote(layout, compare, version=version, reason=reason, readmit=readmit, dry_run=dry_run)

"""promote: judge the newest registered model beside the champion on today's images; if it holds, it is the champion.

flawsmith promote --category C. No stage of dvc.yaml: it changes the registry, which `dvc repro` must never do. Both
models are finished when they come here, so reading the test set is an evaluation: nothing is trained or tuned on it.
"""

import logging
from dataclasses import replace

from flawsmith.data.tiling import Tiling
from flawsmith.errors import UserError
from flawsmith.evaluation.compare import ComparedImages, ModelComparison, compare_models
from flawsmith.evaluation.samples import evaluation_set, normal_samples
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator
from flawsmith.registry.promotion import PromotionOutcome, promote

log = logging.getLogger(__name__)


def run(
    layout: Layout, *, version: str = "", reason: str = "", readmit: bool = False, dry_run: bool = False
) -> PromotionOutcome:
    """Compare, decide and act for one category; arguments and errors are those of `registry.promotion.promote`."""

    def compare(challenger: Predictor, champion: Predictor | None) -> tuple[ModelComparison, bool]:
        rules, data, evaluate = layout.settings.promote, layout.data, layout.settings.evaluate
        judged, tiling = evaluation_set(layout, original=True), Tiling.of(data)
        if not judged.labelled:
            for model in (challenger, champion):
                _demand_scale(model, data.scale)
        if champion is not None and champion.metadata.white_level != data.white_level:
            log.warning(
                "%s: the champion has learned images whose white is %d (0: the files' full scale) and is judged on "
                "images whose white is %d, as the challenger has learned them.",
                layout.category,
                champion.metadata.white_level,
                data.white_level,
            )
        images = ComparedImages(
            judged.samples,
            normal_samples(layout.split().calibration, tiling, data.reading, original=judged.labelled),
            judged.shades,
            tiling if judged.labelled else None,
        )
        generator = numpy_generator(rules.seed, "promote")
        options = replace(evaluate, bootstrap=rules.bootstrap)
        comparison = compare_models(challenger, champion, images, generator, options, rules.min_defect_images)
        return comparison, judged.labelled

    return promote(layout, compare, version=version, reason=reason, readmit=readmit, dry_run=dry_run)


def _demand_scale(model: Predictor | None, scale: float) -> None:
    if model is not None and model.metadata.scale != scale:
        raise UserError(
            f"A model of this category sees images at scale {model.metadata.scale:g}, but the held-out triplets, which "
            f"stand in for a labelled test set, were made at data.scale {scale:g} and exist at no other; add a "
            "labelled test set to compare them."
        )

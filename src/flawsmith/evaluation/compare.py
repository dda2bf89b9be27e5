"""Champion and challenger on the same images: what a promotion is decided on.

Both are exported models, scored through the one inference path (`Predictor`), with one draw of resamples, so that the
interval of a difference is free of what is hard about the images for both.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.tiling import Tiling
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.evaluation.intervals import Estimate, share_interval
from flawsmith.evaluation.measure import Performance, flagged_share, measure, paired_difference
from flawsmith.evaluation.samples import Sample
from flawsmith.evaluation.scoring import Scorer
from flawsmith.inference.draw import resize_map
from flawsmith.inference.predictor import Predictor, flags

RARE = "rare types"  # defect types too rare to be judged one by one, pooled
COMPARED = ("image_auroc", "aupro", "pixel_ap")


@dataclass(frozen=True)
class ModelScores:
    """One model on today's images.

    Attributes:
        values: each of COMPARED.
        by_defect: image AUROC by defect type.
        false_alarms: share of the calibration normals that it flags at the threshold in its own file.
        flagged_shades: the same share of the shades; None if there are none.
    """

    values: Mapping[str, Estimate]
    by_defect: Mapping[str, Estimate]
    false_alarms: Estimate
    flagged_shades: Estimate | None = None


@dataclass(frozen=True)
class ModelComparison:
    """Challenger beside champion; differences are challenger minus champion.

    Attributes:
        counts: how many images each defect type and `good` have.
        calibration_images: how many normals the false-alarm rates are shares of.
        challenger: its scores.
        champion: its scores; None if there is none yet, and then there are no differences.
        differences: of each of COMPARED.
        defect_differences: of image AUROC, by defect type.
        has_masks: whether any defective image has a mask; without them no figure of pixels is a number.
    """

    counts: Mapping[str, int]
    calibration_images: int
    challenger: ModelScores
    champion: ModelScores | None
    differences: Mapping[str, Estimate]
    defect_differences: Mapping[str, Estimate]
    has_masks: bool = True


@dataclass(frozen=True)
class ComparedImages:
    """What two models are compared on.

    Attributes:
        samples: the test set, good and defective.
        calibration: normal images.
        shades: images whose light alone was changed; they have no part in any difference.
        tiling: given if images come as they are, with masks at its working resolution: each model then sees them at
            its own resolution. Without it they are at the models' working resolution already.
    """

    samples: Sequence[Sample]
    calibration: Sequence[Sample]
    shades: Sequence[Sample] = ()
    tiling: Tiling | None = None


def compare_models(
    challenger: Predictor,
    champion: Predictor | None,
    images: ComparedImages,
    generator: np.random.Generator,
    options: EvaluateSettings,
    min_defect_images: int,
) -> ModelComparison:
    """Score both models on the same images.

    Defect types with fewer than `min_defect_images` images are pooled: an interval of two images says nothing.

    Raises:
        UserError: the images lack one of the classes, or there is no calibration image.
        FlawsmithError: a model answered NaN.
    """
    pooled = pool_rare(images.samples, min_defect_images)
    models = [challenger] if champion is None else [challenger, champion]
    scorers = [predictor_scorer(model, images.tiling) for model in models]
    found = measure(scorers, pooled, images.calibration, generator, options)
    scores = [
        _model_scores(one, model.threshold, flagged_share(scorer, images.shades, model.threshold, options.batch))
        for one, model, scorer in zip(found, models, scorers, strict=True)
    ]
    first, other = found[0], found[-1]
    paired = champion is not None
    return ModelComparison(
        counts=dict(sorted(Counter(sample.defect for sample in pooled).items())),
        calibration_images=len(images.calibration),
        challenger=scores[0],
        champion=scores[1] if paired else None,
        differences={key: paired_difference(first, other, key) for key in COMPARED if paired},
        defect_differences={
            name: paired_difference(first, other, "image_auroc", name) for name in first.by_defect if paired
        },
        has_masks=any(sample.is_defective and sample.has_pixel_labels for sample in pooled),
    )


def pool_rare(samples: Sequence[Sample], minimum: int) -> tuple[Sample, ...]:
    """The samples, with the defect types of fewer than `minimum` images renamed to RARE."""
    counts = Counter(sample.defect for sample in samples)
    return tuple(
        replace(sample, defect=RARE) if sample.is_defective and counts[sample.defect] < minimum else sample
        for sample in samples
    )


def predictor_scorer(predictor: Predictor, tiling: Tiling | None = None) -> Scorer:
    """An exported model as a `Scorer`.

    With `tiling` it takes images as they are, and its maps come back at that tiling's working resolution. Without it
    images and maps are at working resolution, whatever the model's own size.
    """

    def score(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        height, width = tiling.working_shape(*images.shape[2:]) if tiling else images.shape[2:]
        answers = (predictor.predict if tiling else predictor.predict_prepared)(list(images))
        maps = np.stack([resize_map(answer.anomaly_map, height, width) for answer in answers])
        return maps, np.array([answer.score for answer in answers], np.float32)

    return score


def _model_scores(performance: Performance, threshold: float, flagged_shades: Estimate | None) -> ModelScores:
    flagged = flags(performance.calibration.scores, threshold)
    return ModelScores(
        values={key: performance.values[key] for key in COMPARED},
        by_defect={name: values["image_auroc"] for name, values in performance.by_defect.items()},
        false_alarms=share_interval(int(flagged.sum()), len(flagged)),
        flagged_shades=flagged_shades,
    )

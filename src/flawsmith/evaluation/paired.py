"""Champion and challenger on the same images: what a promotion is decided on.

Both are exported models, scored through the one inference path (`Predictor`), with one draw of resamples, so that the
interval of a difference is free of what is hard about the images for both.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.dataset import GOOD
from flawsmith.data.tiling import Tiling
from flawsmith.evaluation.assess import Performance, flagged_share, measure, paired_difference
from flawsmith.evaluation.intervals import Estimate, share_interval
from flawsmith.evaluation.scoring import Item, Scorer, open_spools
from flawsmith.inference.draw import resize_map
from flawsmith.inference.predictor import Predictor, flags

RARE = "rare types"  # defect types too rare to be judged one by one, pooled
COMPARED = ("image_auroc", "aupro", "pixel_ap")


@dataclass(frozen=True)
class Standing:
    """One model on today's images: each of COMPARED, image AUROC by defect type, and the shares of calibration normals
    and of the shades set apart (None: there are none) that it flags at the threshold in its own file."""

    values: Mapping[str, Estimate]
    by_defect: Mapping[str, Estimate]
    false_alarms: Estimate
    flagged_shades: Estimate | None = None


@dataclass(frozen=True)
class Comparison:
    """Challenger beside champion (None: there is none yet); differences are challenger minus champion.

    `counts` tells how many images each defect type and `good` have; `calibration_images` how many normals the
    false-alarm rates are shares of.
    """

    counts: Mapping[str, int]
    calibration_images: int
    challenger: Standing
    champion: Standing | None
    differences: Mapping[str, Estimate]
    defect_differences: Mapping[str, Estimate]
    has_masks: bool = True  # of any defective image; without them no figure of pixels is a number


def compare_models(
    challenger: Predictor,
    champion: Predictor | None,
    items: Sequence[Item],
    calibration: Sequence[Item],
    generator: np.random.Generator,
    *,
    bootstrap: int,
    aupro_limit: float,
    batch: int,
    min_defect_images: int,
    tiling: Tiling | None = None,
    shades: Sequence[Item] = (),
) -> Comparison:
    """Score both models on `items` (good and defective) and on the `calibration` normals.

    With `tiling` the images come as they are, and masks at its working resolution: each model then sees them at its
    own, whatever it is. Without it they are at the models' working resolution already.

    `shades`, images whose light alone was changed, have no part in any difference.

    Defect types with fewer than `min_defect_images` images are pooled: an interval of two images says nothing.

    Raises:
        UserError: the images lack one of the classes, or there is no calibration image.
        FlawsmithError: a model answered NaN.
    """
    pooled = pool_rare(items, min_defect_images)
    models = [challenger] if champion is None else [challenger, champion]
    with open_spools(len(models) + 1) as (masks, *maps):
        found = measure(
            [predictor_scorer(model, tiling) for model in models],
            pooled,
            calibration,
            generator,
            maps,
            masks,
            false_alarm_rate=challenger.metadata.false_alarm_rate,
            bootstrap=bootstrap,
            aupro_limit=aupro_limit,
            batch=batch,
        )
    standings = [
        replace(
            _standing(one, model.threshold),
            flagged_shades=flagged_share(predictor_scorer(model, tiling), shades, model.threshold, batch),
        )
        for one, model in zip(found, models, strict=True)
    ]
    first, types = found[0], tuple(found[0].by_defect)
    paired = champion is not None
    return Comparison(
        counts=dict(sorted(Counter(item.defect for item in pooled).items())),
        has_masks=any(item.is_defective and item.has_pixel_labels for item in items),
        calibration_images=len(calibration),
        challenger=standings[0],
        champion=standings[1] if paired else None,
        differences={key: paired_difference(first, found[1], key) for key in COMPARED} if paired else {},
        defect_differences=(
            {name: paired_difference(first, found[1], "image_auroc", name) for name in types} if paired else {}
        ),
    )


def pool_rare(items: Sequence[Item], minimum: int) -> tuple[Item, ...]:
    """The items with the defect types of fewer than `minimum` images renamed to RARE."""
    counts = Counter(item.defect for item in items)
    return tuple(
        replace(item, defect=RARE) if item.defect != GOOD and counts[item.defect] < minimum else item for item in items
    )


def predictor_scorer(predictor: Predictor, tiling: Tiling | None = None) -> Scorer:
    """An exported model as a `Scorer`, of images as they are if the `tiling` is given to which their maps are brought,
    else of images at working resolution: their maps come back at that, whatever the model's own size."""

    def score(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        height, width = tiling.shape(*images.shape[2:]) if tiling else images.shape[2:]
        answers = (predictor.predict if tiling else predictor.predict_prepared)(list(images))
        maps = np.stack([resize_map(answer.anomaly_map, height, width) for answer in answers])
        return maps, np.array([answer.score for answer in answers], np.float32)

    return score


def _standing(performance: Performance, threshold: float) -> Standing:
    flagged = flags(performance.calibration.scores, threshold)
    return Standing(
        values={key: performance.values[key] for key in COMPARED},
        by_defect={name: values["image_auroc"] for name, values in performance.by_defect.items()},
        false_alarms=share_interval(int(flagged.sum()), len(flagged)),
    )

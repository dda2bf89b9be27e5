"""Measures detectors on the same images with the same resamples, in memory that does not grow with the test set.

Pass 1 scores the images and writes maps and masks to disk. Pass 2 chooses pixel bins from a sample of these maps and
reduces each map to its counts. The bootstrap works on these counts alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.dataset import GOOD
from flawsmith.errors import UserError
from flawsmith.evaluation import metrics
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.evaluation.intervals import Estimate, percentile_interval, resample_counts, share_interval
from flawsmith.evaluation.metrics import HEADLINE, KEYS, METRICS, Binned, Curve
from flawsmith.evaluation.samples import Sample
from flawsmith.evaluation.scoring import ArrayFile, Scorer, Scores, array_files, score_samples
from flawsmith.evaluation.threshold import Threshold, conformal_threshold
from flawsmith.inference.predictor import flags, is_defective
from flawsmith.sequences import batched

NO_CURVE = Curve(np.zeros(0), np.zeros(0), np.zeros(0))  # of pixels, without any mask
UNKNOWN = Estimate(np.nan, np.nan, np.nan)
SAMPLED_PIXELS = 2**20  # of each class, to choose the bins from
RESAMPLES_AT_ONCE = 50  # bounds the bootstrap's memory: 3 x 50 x 4096 counts of 8 bytes are 5 MB
IMAGES_AT_ONCE = 32  # the same, 3 MB

Values = Mapping[tuple[str, str], NDArray[np.float64]]
"""(defect type or "" for all, key of METRICS) → values `(B,)`, one for each resample."""


@dataclass(frozen=True)
class Performance:
    """One detector on one test set.

    Attributes:
        values: each of KEYS with its interval; those of pixels are NaN where no defective image has a mask, and all of
            them where no image is defective.
        by_defect: defect type → each of HEADLINE, that type's images against all good ones.
        draws: each of KEYS under each resample, `(B,)`; all detectors of one `measure` have the same resamples.
        defect_draws: the same for `by_defect`.
        curves: `image`: exact ROC and precision-recall of images; `pixel`: the same of pixels, at the bins' resolution;
            `region`: its `recall` is the mean per-region overlap (PRO).
        scores: test scores, in the samples' order.
        calibration: scores of the calibration normals.
        threshold: on image scores.
        pixel_threshold: on map values: the same rule on each calibration map's highest value, so that at most the
            target share of normal parts shows any region at all.
        calibration_false_alarms, test_false_alarms, test_detections: shares flagged at the threshold.
        detections: defect type → share of its images flagged.
        areas: pixels of each test image's mask, `(N,)`; 0 without one.
    """

    values: Mapping[str, Estimate]
    by_defect: Mapping[str, Mapping[str, Estimate]]
    draws: Mapping[str, NDArray[np.float64]]
    defect_draws: Mapping[str, Mapping[str, NDArray[np.float64]]]
    curves: Mapping[str, Curve]
    scores: Scores
    calibration: Scores
    threshold: Threshold
    pixel_threshold: Threshold
    calibration_false_alarms: Estimate
    test_false_alarms: Estimate
    test_detections: Estimate
    detections: Mapping[str, Estimate]
    areas: NDArray[np.int64]

    @property
    def measured(self) -> dict[str, float]:
        """The values of METRICS that are numbers: those of pixels need masks."""
        return {key: one.value for key, one in self.values.items() if np.isfinite(one.value)}

    def is_flagged(self, score: float) -> bool:
        """The verdict on a score."""
        return is_defective(score, self.threshold.value)


def measure(
    scorers: Sequence[Scorer],
    samples: Sequence[Sample],
    calibration: Sequence[Sample],
    generator: np.random.Generator,
    options: EvaluateSettings,
    maps: Sequence[ArrayFile] = (),
) -> tuple[Performance, ...]:
    """Score and measure every scorer on the same images and the same resamples.

    Args:
        scorers: the detectors.
        samples: the test set, good and defective; or `calibration` itself where there is nothing else to look at.
        calibration: the normal images that set the threshold.
        generator: draws the resamples.
        options: how to evaluate.
        maps: one empty file a scorer, for who wants the anomaly maps of `samples` afterwards.

    Raises:
        UserError: `samples` lack good or defective images, or there is no calibration image.
        FlawsmithError: a detector answered NaN or wrong shapes.
    """
    if samples is not calibration and len({sample.is_defective for sample in samples}) < 2:
        raise UserError("An evaluation needs good and defective images; add the missing ones to the test set.")
    calibrations = score_samples(scorers, calibration, options.batch, title="calibration")
    strata = [sample.defect + ("" if sample.has_pixel_labels else " without mask") for sample in samples]
    weights = resample_counts(strata, options.bootstrap, generator)  # each keeps as many masks as there are
    with array_files(len(scorers) + 1) as (masks, *own):
        maps = maps or own
        scores = score_samples(scorers, samples, options.batch, maps, masks, title="test images")
        performances = []
        for found, calibrated, answered in zip(scores, calibrations, maps, strict=True):
            with array_files(1) as (counts,):
                _count_pixels(samples, answered, masks, counts)
                performances.append(_perform(samples, found, calibrated, counts, weights, options))
    return tuple(performances)


def flagged_share(detector: Scorer, samples: Sequence[Sample], threshold: float, batch: int) -> Estimate | None:
    """The share of images that a detector flags at a threshold, with Wilson's interval; None without an image."""
    if not samples:
        return None
    (found,) = score_samples([detector], samples, batch, title="shades")
    return _share(flags(found.scores, threshold))


def paired_difference(one: Performance, other: Performance, key: str, defect: str = "") -> Estimate:
    """`one` minus `other` with the paired bootstrap's interval; of one defect type if it is named.

    Both must come from the same `measure`: their resamples are then the same, so what is hard about the images for
    both of them cancels.
    """
    if defect:
        values = (one.by_defect[defect][key].value, other.by_defect[defect][key].value)
        draws = one.defect_draws[defect][key] - other.defect_draws[defect][key]
    else:
        values = (one.values[key].value, other.values[key].value)
        draws = one.draws[key] - other.draws[key]
    return percentile_interval(values[0] - values[1], draws)


def _perform(
    samples: Sequence[Sample],
    scores: Scores,
    calibration: Scores,
    counts: ArrayFile,
    weights: NDArray[np.uint16],
    options: EvaluateSettings,
) -> Performance:
    """`counts` holds the pixel counts `(3, K)` of each sample; `weights` are `(B, N)`."""
    names = np.asarray([sample.defect for sample in samples])
    defective = names != GOOD
    types = sorted({*names.tolist()} - {GOOD})
    threshold = conformal_threshold(calibration.scores, options.false_alarm_rate)
    flagged = flags(scores.scores, threshold.value)

    once = np.ones((1, len(names)), np.uint16)
    points, *parts = (
        _values(names, scores.scores, counts, part, options.aupro_limit)
        for part in (once, *(weights[rows] for rows in batched(range(len(weights)), RESAMPLES_AT_ONCE)))
    )
    draws = {key: np.concatenate([part[key] for part in parts]) for key in points}
    estimates = {key: percentile_interval(float(points[key][0]), draws[key]) for key in points}

    normal, inside, overlap = reduce(np.add, (counts.read(index) for index in range(len(counts))))
    images = metrics.counts_by_score(scores.scores, defective, once)
    return Performance(
        values={key: estimates["", key] for key in KEYS},
        by_defect={name: {key: estimates[name, key] for key in HEADLINE} for name in types},
        draws={key: draws["", key] for key in KEYS},
        defect_draws={name: {key: draws[name, key] for key in HEADLINE} for name in types},
        curves={
            "image": metrics.curve(Binned(images.negatives[0], images.positives[0])) if defective.any() else NO_CURVE,
            "pixel": metrics.curve(Binned(normal, inside)) if inside.any() else NO_CURVE,
            "region": metrics.curve(Binned(normal, overlap)) if inside.any() else NO_CURVE,
        },
        scores=scores,
        calibration=calibration,
        threshold=threshold,
        pixel_threshold=conformal_threshold(calibration.peaks, options.false_alarm_rate),
        calibration_false_alarms=_share(flags(calibration.scores, threshold.value)),
        test_false_alarms=_share(flagged[~defective]),
        test_detections=_share(flagged[defective]),
        detections={name: _share(flagged[names == name]) for name in types},
        areas=np.asarray([counts.read(index)[1].sum() for index in range(len(counts))]).astype(np.int64),
    )


def _values(
    names: NDArray[np.str_],
    scores: NDArray[np.float32],
    counts: ArrayFile,
    weights: NDArray[np.uint16],
    aupro_limit: float,
) -> Values:
    """All metrics under each row of weights `(B, N)`.

    Pixel counts of a subset are a weighted sum over its images. All counts but the region shares are whole numbers in
    float64, so the sums are exact whatever the order in which a BLAS adds them.
    """
    found: dict[tuple[str, str], NDArray[np.float64]] = {}

    def add(name: str, members: NDArray[np.bool_], pixels: NDArray[np.float64]) -> None:
        of_images = metrics.counts_by_score(scores[members], names[members] != GOOD, weights[:, members])
        of_pixels = Binned(pixels[:, 0], pixels[:, 1], pixels[:, 2], aupro_limit)
        for key in HEADLINE if name else KEYS:
            metric = METRICS[key]
            counted = of_pixels if metric.of_pixels else of_images
            found[name, key] = metric.value(counted) if counted.positives.any() else np.full(len(weights), np.nan)

    good = _weighted_counts(counts, names == GOOD, weights)
    total = good.copy()
    for name in sorted({*names.tolist()} - {GOOD}):
        of_type = _weighted_counts(counts, names == name, weights)
        total += of_type
        add(name, (names == name) | (names == GOOD), of_type + good)
    add("", np.ones(len(names), np.bool_), total)
    return found


def _weighted_counts(counts: ArrayFile, members: NDArray[np.bool_], weights: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Counts of the member images, one or more, summed with each row of weights: `(B, 3, K)`."""
    sums: Iterator[NDArray[np.float64]] = (
        np.tensordot(weights[:, part].astype(np.float64), np.stack([counts.read(index) for index in part]), axes=1)
        for part in batched(np.flatnonzero(members).tolist(), IMAGES_AT_ONCE)
    )
    return reduce(np.add, sums)


def _count_pixels(samples: Sequence[Sample], maps: ArrayFile, masks: ArrayFile, counts: ArrayFile) -> None:
    """Write the pixel counts `(3, K)` of each sample to `counts`: zeros where its pixels have no labels."""
    known = [sample.has_pixel_labels for sample in samples]
    edges = metrics.bin_edges(*_sample_pixels(maps, masks, np.flatnonzero(known).tolist()))
    for index, is_known in enumerate(known):
        counted = metrics.pixel_counts(maps.read(index), masks.read(index), edges)
        counts.append(counted if is_known else np.zeros_like(counted))


def _sample_pixels(
    maps: ArrayFile, masks: ArrayFile, indices: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Every k-th defect-free and every m-th defect pixel of the images at `indices`, at most SAMPLED_PIXELS of each."""
    totals = np.sum([np.bincount(masks.read(index).ravel(), minlength=2) for index in indices], axis=0).tolist()
    # odd steps share no factor with the usual powers of two of an image's width, so they walk through all columns
    steps = [-(-total // SAMPLED_PIXELS) | 1 for total in totals]
    seen = [0, 0]
    picked: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
    for index in indices:
        anomaly_map, mask = maps.read(index), masks.read(index)
        for side, values in enumerate((anomaly_map[~mask], anomaly_map[mask])):
            picked[side].append(values[-seen[side] % steps[side] :: steps[side]].copy())
            seen[side] += len(values)
    return np.concatenate(picked[0]), np.concatenate(picked[1])


def _share(flagged: NDArray[np.bool_]) -> Estimate:
    return share_interval(int(flagged.sum()), len(flagged)) if len(flagged) else UNKNOWN

"""The evaluation itself: detector and baseline over the same images by the same code, in memory that does not grow.

Pass 1 scores the images and spools maps and masks to disk; pass 2 chooses pixel bins from a sample of the spooled maps
and reduces each map to its counts; the bootstrap works on these counts alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.dataset import GOOD
from flawsmith.data.images import FloatImage, Mask
from flawsmith.errors import UserError
from flawsmith.evaluation import metrics
from flawsmith.evaluation.intervals import (
    Estimate,
    blocks,
    percentile_interval,
    resample_counts,
    share_interval,
)
from flawsmith.evaluation.scoring import Item, Scorer, Scores, Spool, open_spools, score_items
from flawsmith.evaluation.threshold import Threshold, conformal_threshold
from flawsmith.inference.predictor import flags, is_defective

KEYS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro")
DEFECT_KEYS = ("image_auroc", "pixel_auroc", "aupro")
NO_CURVE = metrics.Curve(np.zeros(0), np.zeros(0), np.zeros(0))  # of pixels, without any mask
FAILURES = 8  # of each class, shown whatever the gallery's size
LIMITING = 6  # calibration normals shown
SAMPLED_PIXELS = 2**20  # of each class, to choose the bins from
RESAMPLES_AT_ONCE = 50  # bounds the bootstrap's memory: 3 x 50 x 4096 counts of 8 bytes are 5 MB


@dataclass(frozen=True)
class Performance:
    """One detector on one test set.

    Attributes:
        values: each of KEYS with its interval; those of pixels are NaN where no defective image has a mask.
        by_defect: defect type → each of DEFECT_KEYS, that type's images against all good ones.
        draws: each of KEYS under each resample, `(B,)`; resamples are the same for every detector of one `assess`.
        defect_draws: the same for `by_defect`.
        image_curve: exact image-level ROC and precision-recall.
        pixel_curve: the same for pixels, at the bins' resolution.
        region_curve: `recall` is the mean per-region overlap (PRO) here.
        scores: test scores, in the items' order.
        calibration: scores of the calibration normals.
        threshold: on image scores.
        pixel_threshold: on map values: the same rule on each calibration map's highest value, so that at most the
            target share of normal parts shows any region at all.
        calibration_false_alarms, test_false_alarms, test_detections: shares flagged at the threshold.
        detections: defect type → share of its images flagged.
    """

    values: Mapping[str, Estimate]
    by_defect: Mapping[str, Mapping[str, Estimate]]
    draws: Mapping[str, NDArray[np.float64]]
    defect_draws: Mapping[str, Mapping[str, NDArray[np.float64]]]
    image_curve: metrics.Curve
    pixel_curve: metrics.Curve
    region_curve: metrics.Curve
    scores: Scores
    calibration: Scores
    threshold: Threshold
    pixel_threshold: Threshold
    calibration_false_alarms: Estimate
    test_false_alarms: Estimate
    test_detections: Estimate
    detections: Mapping[str, Estimate]

    def is_flagged(self, score: float) -> bool:
        """The verdict on a score."""
        return is_defective(score, self.threshold.value)


@dataclass(frozen=True)
class Example:
    """A scored image with everything needed to show it; `error` > 0 (or a miss at 0) is a wrong verdict."""

    name: str
    defect: str
    score: float
    is_flagged: bool
    error: float
    image: FloatImage
    mask: Mask
    anomaly_map: NDArray[np.float32]
    has_pixel_labels: bool = True

    @property
    def is_wrong(self) -> bool:
        return self.is_flagged != (self.defect != GOOD)


@dataclass(frozen=True)
class Assessment:
    """Detector and baseline on the same images.

    Attributes:
        advantage: detector minus baseline for each of KEYS, with the paired bootstrap's interval.
        gallery: worst errors first.
        misses, alarms: defective and good images apart, the FAILURES worst of each; where fewer verdicts are wrong, the
            closest calls follow.
        typical: the median-scored image of each defect type and of the good ones.
        limiting: the LIMITING calibration normals of the highest scores, highest first. The threshold lies among them
            or below, so one that is defective, or of a rare look, hides defects.
    """

    items: tuple[Item, ...]
    calibration_items: tuple[Item, ...]
    detector: Performance
    baseline: Performance
    advantage: Mapping[str, Estimate]
    gallery: tuple[Example, ...]
    misses: tuple[Example, ...]
    alarms: tuple[Example, ...]
    typical: tuple[Example, ...]
    limiting: tuple[Example, ...]

    @property
    def defects(self) -> tuple[str, ...]:
        return tuple(self.detector.by_defect)


def assess(
    detector: Scorer,
    baseline: Scorer,
    items: Sequence[Item],
    calibration: Sequence[Item],
    generator: np.random.Generator,
    *,
    false_alarm_rate: float,
    bootstrap: int,
    aupro_limit: float,
    batch: int,
    gallery: int,
) -> Assessment:
    """Score, measure and pick what to show; arguments are those of the `evaluate` settings.

    Raises:
        UserError: `items` lack good or defective images, or there is no calibration image.
        FlawsmithError: a detector answered NaN or wrong shapes.
    """
    with open_spools(3) as (detector_maps, baseline_maps, masks):
        performances = measure(
            (detector, baseline),
            items,
            calibration,
            generator,
            (detector_maps, baseline_maps),
            masks,
            false_alarm_rate=false_alarm_rate,
            bootstrap=bootstrap,
            aupro_limit=aupro_limit,
            batch=batch,
        )
        first = performances[0]
        groups = [item.defect for item in items]
        ranked = rank_errors(first.scores.scores, groups, first.threshold.value)
        worst = ranked[:gallery]
        misses = [index for index in ranked if groups[index] != GOOD][:FAILURES]
        alarms = [index for index in ranked if groups[index] == GOOD][:FAILURES]
        typical = [_median_index(first.scores.scores, groups, name) for name in (*first.by_defect, GOOD)]
        shown = {
            index: _example(items[index], first.scores.scores[index], first, _map(detector_maps, index))
            for index in {*worst, *misses, *alarms, *typical}
        }
    limiting = np.argsort(-first.calibration.scores, kind="stable")[:LIMITING]
    with open_spools(1) as (maps,):
        # of all calibration maps these few alone are ever shown: cheaper to make again than to keep
        score_items([detector], [calibration[index] for index in limiting], batch, [maps], title="normals to show")
        limits = [
            _example(calibration[index], first.calibration.scores[index], first, _map(maps, place))
            for place, index in enumerate(limiting)
        ]
    return Assessment(
        items=tuple(items),
        calibration_items=tuple(calibration),
        detector=first,
        baseline=performances[1],
        advantage={key: paired_difference(first, performances[1], key) for key in KEYS},
        gallery=tuple(shown[index] for index in worst),
        misses=tuple(shown[index] for index in misses),
        alarms=tuple(shown[index] for index in alarms),
        typical=tuple(shown[index] for index in typical),
        limiting=tuple(limits),
    )


def measure(
    scorers: Sequence[Scorer],
    items: Sequence[Item],
    calibration: Sequence[Item],
    generator: np.random.Generator,
    maps: Sequence[Spool],
    masks: Spool,
    *,
    false_alarm_rate: float,
    bootstrap: int,
    aupro_limit: float,
    batch: int,
) -> tuple[Performance, ...]:
    """Score and measure every scorer on the same images and the same resamples; one empty spool of maps a scorer.

    Raises:
        UserError: `items` lack good or defective images, or there is no calibration image.
        FlawsmithError: a detector answered NaN or wrong shapes.
    """
    if len({item.is_defective for item in items}) < 2:
        raise UserError("An evaluation needs good and defective images; add the missing ones to the test set.")
    calibrations = score_items(scorers, calibration, batch, title="calibration")
    groups = [item.defect for item in items]
    known = np.asarray([item.has_pixel_labels for item in items])
    strata = [item.defect + ("" if item.has_pixel_labels else " without mask") for item in items]
    weights = resample_counts(strata, bootstrap, generator)  # each keeps as many masks as there are
    scores = score_items(scorers, items, batch, maps, masks, title="test images")
    return tuple(
        _perform(groups, known, found, calibrated, spool, masks, weights, false_alarm_rate, aupro_limit)
        for found, calibrated, spool in zip(scores, calibrations, maps, strict=True)
    )


def flagged_share(detector: Scorer, items: Sequence[Item], threshold: float, batch: int) -> Estimate | None:
    """The share of images that a detector flags at a threshold, with Wilson's interval; None without an image."""
    if not items:
        return None
    (found,) = score_items([detector], items, batch, title="shades")
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


def rank_errors(scores: NDArray[np.float32], groups: Sequence[str], threshold: float) -> list[int]:
    """Indices of images, worst first: wrong verdicts by how far off they are, then right ones by how close it was."""
    errors = _errors(scores, np.asarray([group != GOOD for group in groups]), threshold)
    return [int(index) for index in np.argsort(-errors, kind="stable")]


def spread(items: Sequence[Item], count: int) -> list[int]:
    """Indices of up to `count` images, half good and half defective, evenly spaced in listing order (so over types).

    Where one half has too few images the other fills up.
    """
    good = [index for index, item in enumerate(items) if not item.is_defective]
    bad = [index for index, item in enumerate(items) if item.is_defective]
    of_good = min(len(good), max(count // 2, count - len(bad)))
    picked = []
    for part, size in ((good, of_good), (bad, min(len(bad), count - of_good))):
        places = ((np.arange(size) + 0.5) * len(part) / max(size, 1)).astype(np.int64)
        picked += [part[place] for place in places]
    return picked


def _errors(scores: NDArray[np.float32], defective: NDArray[np.bool_], threshold: float) -> NDArray[np.float64]:
    """Signed distance to the right side of the threshold, `(N,)`: positive where the verdict is wrong."""
    margins = scores.astype(np.float64) - threshold
    return np.where(defective, -margins, margins)


def _perform(
    groups: Sequence[str],
    known: NDArray[np.bool_],
    scores: Scores,
    calibration: Scores,
    maps: Spool,
    masks: Spool,
    weights: NDArray[np.uint16],
    false_alarm_rate: float,
    aupro_limit: float,
) -> Performance:
    names = np.asarray(groups)
    defective = names != GOOD
    types = sorted(set(groups) - {GOOD})
    threshold = conformal_threshold(calibration.scores, false_alarm_rate)
    flagged = flags(scores.scores, threshold.value)

    with open_spools(1) as (counts,):
        edges = metrics.bin_edges(*_sample_pixels(maps, masks, known))
        for index in range(len(maps)):
            counted = metrics.pixel_counts(*_pair(maps, masks, index), edges)
            counts.append(counted if known[index] else np.zeros_like(counted))
        once = np.ones((1, len(groups)), np.uint16)
        points = _measure(names, types, scores.scores, counts, once, aupro_limit)
        parts = [
            _measure(names, types, scores.scores, counts, weights[part], aupro_limit)
            for part in blocks(len(weights), RESAMPLES_AT_ONCE)
        ]
        totals = sum(cast(NDArray[np.float64], counts.read(index)) for index in range(len(counts)))
    draws = {key: np.concatenate([part[key] for part in parts]) for key in points}
    estimates = {key: percentile_interval(float(points[key][0]), draws[key]) for key in points}

    normal, inside, overlap = np.asarray(totals)
    image_counts = metrics.counts_by_score(scores.scores, defective, once)
    return Performance(
        values={key: estimates["", key] for key in KEYS},
        by_defect={name: {key: estimates[name, key] for key in DEFECT_KEYS} for name in types},
        draws={key: draws["", key] for key in KEYS},
        defect_draws={name: {key: draws[name, key] for key in DEFECT_KEYS} for name in types},
        image_curve=metrics.curve(image_counts[0][0], image_counts[1][0]),
        pixel_curve=metrics.curve(normal, inside) if inside.any() else NO_CURVE,
        region_curve=metrics.curve(normal, overlap) if inside.any() else NO_CURVE,
        scores=scores,
        calibration=calibration,
        threshold=threshold,
        pixel_threshold=conformal_threshold(calibration.peaks, false_alarm_rate),
        calibration_false_alarms=_share(flags(calibration.scores, threshold.value)),
        test_false_alarms=_share(flagged[~defective]),
        test_detections=_share(flagged[defective]),
        detections={name: _share(flagged[names == name]) for name in types},
    )


def _measure(
    names: NDArray[np.str_],
    types: Sequence[str],
    scores: NDArray[np.float32],
    counts: Spool,
    weights: NDArray[np.uint16],
    aupro_limit: float,
) -> dict[tuple[str, str], NDArray[np.float64]]:
    """All values under each row of weights `(B, N)`: (defect type or "" for all, key) → `(B,)`.

    Pixel counts of a subset are a weighted sum over its images. All counts but the region shares are whole numbers in
    float64, so the sums are exact whatever the order in which a BLAS adds them.
    """
    found: dict[tuple[str, str], NDArray[np.float64]] = {}

    def add(name: str, members: NDArray[np.bool_], pixels: NDArray[np.float64]) -> None:
        image = metrics.ranking(*metrics.counts_by_score(scores[members], names[members] != GOOD, weights[:, members]))
        pixel: tuple[NDArray[np.float64], ...] = (np.full(len(weights), np.nan),) * 4
        if pixels[:, 1].any():
            overlap = metrics.aupro(pixels[:, 0], pixels[:, 2], aupro_limit)
            pixel = (*metrics.ranking(pixels[:, 0], pixels[:, 1]), overlap)
        for key, value in zip(KEYS, (*image, *pixel), strict=True):
            if not name or key in DEFECT_KEYS:
                found[name, key] = value

    good = _weighted_counts(counts, names == GOOD, weights)
    total = good.copy()
    for name in types:
        of_type = _weighted_counts(counts, names == name, weights)
        total += of_type
        add(name, (names == name) | (names == GOOD), of_type + good)
    add("", np.ones(len(names), np.bool_), total)
    return found


def _weighted_counts(counts: Spool, members: NDArray[np.bool_], weights: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Counts of the member images summed with each row of weights: `(B, 3, K)`."""
    indices = np.flatnonzero(members)
    total: NDArray[np.float64] | None = None
    for part in blocks(len(indices), 32):
        chunk = np.stack([cast(NDArray[np.float64], counts.read(int(index))) for index in indices[part]])  # (n, 3, K)
        added = np.tensordot(weights[:, indices[part]].astype(np.float64), chunk, axes=1)
        total = added if total is None else np.add(total, added, out=total)
    if total is None:
        raise ValueError("no member image")
    return total


def _sample_pixels(
    maps: Spool, masks: Spool, known: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Every k-th defect-free and every m-th defect pixel of the images that have both labelled, at most SAMPLED_PIXELS
    of each."""
    indices = np.flatnonzero(known).tolist()
    inside = sum(int(np.count_nonzero(masks.read(index))) for index in indices)
    everything = sum(maps.read(index).size for index in indices) if len(indices) < len(maps) else maps.elements
    # odd steps share no factor with the usual powers of two of an image's width, so they walk through all columns
    steps = [-(-total // SAMPLED_PIXELS) | 1 for total in (everything - inside, inside)]
    seen = [0, 0]
    picked: tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]] = ([], [])
    for index in indices:
        anomaly_map, mask = _pair(maps, masks, index)
        for side, values in enumerate((anomaly_map[~mask], anomaly_map[mask])):
            picked[side].append(values[-seen[side] % steps[side] :: steps[side]].copy())
            seen[side] += len(values)
    return np.concatenate(picked[0]), np.concatenate(picked[1])


def _pair(maps: Spool, masks: Spool, index: int) -> tuple[NDArray[np.float32], Mask]:
    return _map(maps, index), cast(Mask, masks.read(index))


def _map(maps: Spool, index: int) -> NDArray[np.float32]:
    return cast(NDArray[np.float32], maps.read(index))


def _share(flags: NDArray[np.bool_]) -> Estimate:
    return share_interval(int(flags.sum()), len(flags))


def _median_index(scores: NDArray[np.float32], groups: Sequence[str], name: str) -> int:
    members = [index for index, group in enumerate(groups) if group == name]
    return sorted(members, key=lambda index: (float(scores[index]), index))[len(members) // 2]


def _example(item: Item, score: np.float32, performance: Performance, anomaly_map: NDArray[np.float32]) -> Example:
    image, mask = item.load()
    error = _errors(np.asarray([score]), np.asarray([item.is_defective]), performance.threshold.value)[0]
    return Example(
        name=item.name,
        defect=item.defect,
        score=float(score),
        is_flagged=performance.is_flagged(float(score)),
        error=float(error),
        image=image,
        mask=mask,
        anomaly_map=anomaly_map,
        has_pixel_labels=item.has_pixel_labels,
    )

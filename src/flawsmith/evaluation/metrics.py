"""Ranking metrics from counts: one code for images and pixels, for point values and for a thousand resamples at once.

Every metric here is a function of how many normal and how many defective things (images, pixels) fall into each bin of
an ascending score axis. For images the bins are the distinct scores, so the values are exact; for pixels they are fine
bins chosen from the data (`bin_edges`), and per-image counts are all that a bootstrap over images needs.

Definitions: AUROC and average precision as scikit-learn's `roc_auc_score` and `average_precision_score`; F1-max is the
best F1 over all thresholds; AUPRO is Bergmann et al., "The MVTec Anomaly Detection Dataset" (IJCV 2021), section 5.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Counts = NDArray[np.float64]  # (..., K): how many fall into each of K bins of ascending score

EIGHT_NEIGHBOURS = np.ones((3, 3), np.bool_)  # as in MVTec AD's own evaluation: diagonal pixels are one region
BINS_PER_CLASS = 2048
NONE = np.zeros(0)


class Binned(NamedTuple):
    """What metrics are computed from.

    Attributes:
        negatives: how many normal things (images, pixels) fall into each bin, `(..., K)`.
        positives: the same for defective things.
        overlaps: of pixels alone: share of its region that falls into each bin, summed over regions, `(..., K)`. A
            pixel of a region of n pixels counts 1/n, so that a large region weighs no more than a small one.
        limit: the false positive rate that AUPRO goes up to, in (0, 1].
    """

    negatives: Counts
    positives: Counts
    overlaps: Counts = NONE
    limit: float = 1.0


class Curve(NamedTuple):
    """Vertices from the strictest threshold to the loosest, K + 1 of them; the first flags nothing."""

    false_positive_rate: NDArray[np.float64]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]


def auroc(counts: Binned) -> NDArray[np.float64]:
    """Area under the ROC curve, of the counts' leading shape; both classes must be present."""
    false_alarms = _from_the_top(counts.negatives)
    below = false_alarms[..., -1:] - false_alarms + 0.5 * counts.negatives[..., ::-1]  # a tie counts half
    defective = _from_the_top(counts.positives)[..., -1]
    return (counts.positives[..., ::-1] * below).sum(-1) / (false_alarms[..., -1] * defective)


def average_precision(counts: Binned) -> NDArray[np.float64]:
    """Mean over the defective things of the precision at each one's score, of the counts' leading shape."""
    false_alarms, hits = _from_the_top(counts.negatives), _from_the_top(counts.positives)
    flagged = np.maximum(false_alarms + hits, 1e-300)  # an empty top bin flags nothing: 0 / tiny = 0, weighted by 0
    return (counts.positives[..., ::-1] * hits / flagged).sum(-1) / hits[..., -1]


def f1_max(counts: Binned) -> NDArray[np.float64]:
    """Best F1 over all thresholds, of the counts' leading shape."""
    false_alarms, hits = _from_the_top(counts.negatives), _from_the_top(counts.positives)
    return (2 * hits / (false_alarms + hits + hits[..., -1:])).max(-1)


def aupro(counts: Binned) -> NDArray[np.float64]:
    """Area under per-region overlap against false positive rate from 0 to the limit, divided by the limit."""
    limit = counts.limit
    x, y = (_with_origin(_from_the_top(part)) for part in (counts.negatives, counts.overlaps))
    x, y = x / x[..., -1:], y / y[..., -1:]
    left, right = np.minimum(x[..., :-1], limit), np.minimum(x[..., 1:], limit)
    step = x[..., 1:] - x[..., :-1]
    inside = np.divide(right - left, step, out=np.zeros_like(step), where=step > 0)  # the last segment is cut at limit
    height = y[..., :-1] + 0.5 * inside * (y[..., 1:] - y[..., :-1])
    return ((right - left) * height).sum(-1) / limit


@dataclass(frozen=True)
class Metric:
    """One figure of a detector.

    Attributes:
        title: its name in reports.
        meaning: what it says, in a few words.
        value: computes it.
        of_pixels: it counts pixels, so it needs masks; the others count images.
        is_headline: reports show it first, and it is measured for each defect type too.
    """

    title: str
    meaning: str
    value: Callable[[Binned], NDArray[np.float64]]
    of_pixels: bool = False
    is_headline: bool = False


METRICS = {  # key in metrics.json → metric: a new one is one entry here
    "image_auroc": Metric(
        "Image AUROC", "chance that a defective image scores above a good one", auroc, is_headline=True
    ),
    "image_ap": Metric("Image AP", "average precision of images sorted by score", average_precision),
    "image_f1_max": Metric(
        "Image F1-max", "best F1 over all thresholds, picked with the labels: an upper bound", f1_max
    ),
    "pixel_auroc": Metric(
        "Pixel AUROC", "chance that a defect pixel is hotter than a normal one", auroc, of_pixels=True, is_headline=True
    ),
    "pixel_ap": Metric(
        "Pixel AP",
        "average precision of pixels sorted by heat; strict where defects are small",
        average_precision,
        of_pixels=True,
    ),
    "pixel_f1_max": Metric(
        "Pixel F1-max", "best F1 of marked pixels, picked with the labels: an upper bound", f1_max, of_pixels=True
    ),
    "aupro": Metric(
        "AUPRO",
        "mean overlap with each defect region while few normal pixels are marked",
        aupro,
        of_pixels=True,
        is_headline=True,
    ),
}
KEYS = tuple(METRICS)
HEADLINE = tuple(key for key, metric in METRICS.items() if metric.is_headline)


def curve(counts: Binned) -> Curve:
    """ROC and precision-recall vertices from counts `(K,)`."""
    false_alarms, hits = (_with_origin(_from_the_top(part)) for part in counts[:2])
    flagged = false_alarms + hits
    precision = np.divide(hits, flagged, out=np.ones_like(hits), where=flagged > 0)
    return Curve(false_alarms / false_alarms[-1], hits / hits[-1], precision)


def counts_by_score(scores: NDArray[np.float32], defective: NDArray[np.bool_], weights: NDArray[np.integer]) -> Binned:
    """Counts `(B, K)` of normal and defective images at each of the K distinct scores, exact under ties.

    Args:
        scores: `(N,)`.
        defective: `(N,)`.
        weights: how often each image occurs in each resample, `(B, N)`; ones for the test set itself.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)
    ordered = weights[:, order].astype(np.float64)
    is_defective = defective[order]
    positives = np.add.reduceat(ordered * is_defective, starts, axis=1)
    return Binned(np.add.reduceat(ordered * ~is_defective, starts, axis=1), positives)


def region_shares(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """For each mask pixel 1 / (pixels of its 8-connected region), 0 elsewhere, `(H, W)`; sums to the region count."""
    labels, _ = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
    sizes = np.bincount(labels.ravel())
    return mask / sizes[labels]


def bin_edges(
    negatives: NDArray[np.float32], positives: NDArray[np.float32], bins: int = BINS_PER_CLASS
) -> NDArray[np.float32]:
    """Ascending bin edges at equally spaced ranks of either class's pixel values; edge i opens bin i + 1.

    No bin holds more than 1/`bins` of either class (ties apart), so that AUROC is off by at most 1/(2 `bins`) and
    average precision by at most the precision curve's total variation / `bins`. Edges are values that occur, so ties
    stay ties.
    """
    picked = []
    for values in (negatives, positives):
        ranks = np.linspace(0, len(values) - 1, min(bins, len(values))).round().astype(np.int64)
        picked.append(np.sort(values)[ranks])
    return np.unique(np.concatenate(picked))


def pixel_counts(anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_], edges: NDArray[np.float32]) -> Counts:
    """Counts of one image `(3, K)`, K = len(edges) + 1: defect-free pixels, defect pixels, region shares."""
    bins = np.searchsorted(edges, anomaly_map.ravel(), side="right")
    inside = mask.ravel()
    size = len(edges) + 1
    return np.stack(
        [
            np.bincount(bins[~inside], minlength=size).astype(np.float64),
            np.bincount(bins[inside], minlength=size).astype(np.float64),
            np.bincount(bins[inside], weights=region_shares(mask).ravel()[inside], minlength=size),
        ]
    )


def _from_the_top(counts: Counts) -> Counts:
    """How many lie in each bin or above it, highest bin first."""
    return np.cumsum(counts[..., ::-1], axis=-1)


def _with_origin(cumulated: Counts) -> Counts:
    return np.concatenate([np.zeros_like(cumulated[..., :1]), cumulated], axis=-1)

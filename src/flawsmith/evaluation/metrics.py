"""Ranking metrics from counts: one code for images and pixels, for point values and for a thousand resamples at once.

Every metric here is a function of how many normal and how many defective things (images, pixels) fall into each bin of
an ascending score axis. For images the bins are the distinct scores, so the values are exact; for pixels they are fine
bins chosen from the data (`bin_edges`), and per-image counts are all that a bootstrap over images needs.

Definitions: AUROC and average precision as scikit-learn's `roc_auc_score` and `average_precision_score`; F1-max is the
best F1 over all thresholds; AUPRO is Bergmann et al., "The MVTec Anomaly Detection Dataset" (IJCV 2021), section 5.2.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Counts = NDArray[np.float64]  # (..., K): how many fall into each of K bins of ascending score

EIGHT_NEIGHBOURS = np.ones((3, 3), np.bool_)  # as in MVTec AD's own evaluation: diagonal pixels are one region
BINS_PER_CLASS = 2048


class Ranking(NamedTuple):
    """Three values of how well scores put defective above normal, each of the counts' leading shape."""

    auroc: NDArray[np.float64]
    ap: NDArray[np.float64]
    f1_max: NDArray[np.float64]


class Curve(NamedTuple):
    """Vertices from the strictest threshold to the loosest, K + 1 of them; the first flags nothing."""

    false_positive_rate: NDArray[np.float64]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]


def ranking(negatives: Counts, positives: Counts) -> Ranking:
    """AUROC, average precision and F1-max from counts `(..., K)`; both classes must be present."""
    false_alarms, hits = _from_the_top(negatives), _from_the_top(positives)
    normal, defective = false_alarms[..., -1:], hits[..., -1:]
    up = positives[..., ::-1]
    below = normal - false_alarms + 0.5 * negatives[..., ::-1]  # a tie counts half
    flagged = np.maximum(false_alarms + hits, 1e-300)  # an empty top bin flags nothing: 0 / tiny = 0, weighted by 0
    return Ranking(
        auroc=(up * below).sum(-1) / (normal * defective)[..., 0],
        ap=(up * hits / flagged).sum(-1) / defective[..., 0],
        f1_max=(2 * hits / (false_alarms + hits + defective)).max(-1),
    )


def aupro(negatives: Counts, overlaps: Counts, limit: float) -> NDArray[np.float64]:
    """Area under per-region overlap against false positive rate from 0 to `limit`, divided by `limit`.

    Args:
        negatives: defect-free pixels in each bin, `(..., K)`.
        overlaps: share of its region that falls into each bin, summed over regions, `(..., K)`: a pixel of a region of
            n pixels counts 1/n, so that a large region weighs no more than a small one.
        limit: in (0, 1].
    """
    x, y = (_with_origin(_from_the_top(counts)) for counts in (negatives, overlaps))
    x, y = x / x[..., -1:], y / y[..., -1:]
    left, right = np.minimum(x[..., :-1], limit), np.minimum(x[..., 1:], limit)
    step = x[..., 1:] - x[..., :-1]
    inside = np.divide(right - left, step, out=np.zeros_like(step), where=step > 0)  # the last segment is cut at limit
    height = y[..., :-1] + 0.5 * inside * (y[..., 1:] - y[..., :-1])
    return ((right - left) * height).sum(-1) / limit


def curve(negatives: Counts, positives: Counts) -> Curve:
    """ROC and precision-recall vertices from counts `(K,)`."""
    false_alarms, hits = (_with_origin(_from_the_top(counts)) for counts in (negatives, positives))
    flagged = false_alarms + hits
    precision = np.divide(hits, flagged, out=np.ones_like(hits), where=flagged > 0)
    return Curve(false_alarms / false_alarms[-1], hits / hits[-1], precision)


def counts_by_score(
    scores: NDArray[np.float32], defective: NDArray[np.bool_], weights: NDArray[np.integer]
) -> tuple[Counts, Counts]:
    """Counts of normal and defective images at each distinct score, exact under ties.

    Args:
        scores: `(N,)`.
        defective: `(N,)`.
        weights: how often each image occurs in each resample, `(B, N)`; ones for the test set itself.

    Returns:
        negatives and positives, `(B, K)` with K distinct scores.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf) > 0)
    ordered = weights[:, order].astype(np.float64)
    is_defective = defective[order]
    positives = np.add.reduceat(ordered * is_defective, starts, axis=1)
    return np.add.reduceat(ordered * ~is_defective, starts, axis=1), positives


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

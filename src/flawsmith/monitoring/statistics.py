"""Distances between a reference sample and a current one. Pure.

MMD compares feature vectors and comes with the p-value of no drift, valid whatever the distribution, as long as
reference and current images are exchangeable when nothing has drifted. Frames taken a moment apart are not independent
and make small p-values too easy, which is why `drift.judge` asks for an effect of some size besides. PSI compares
scores and is told alone: it has no part in the verdict.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform

BINS = 10
SMOOTHING = 0.5  # counted into each bin of PSI on both sides (Jeffreys), so that an empty bin is no infinity
BLOCK = 64  # permutations computed together


class Comparison(NamedTuple):
    """A statistic of two samples: its value, the value to expect without drift, and the p-value of no drift."""

    value: float
    expected: float
    p_value: float


def population_stability_index(reference: NDArray[np.floating], current: NDArray[np.floating]) -> float:
    """PSI = sum over bins of (q - p) ln(q / p), with p the shares of `reference` and q of `current`.

    Ten bins end at the quantiles of the reference (fewer where values are tied); the outer ones are open. Each share is
    (count + 0.5) / (n + 0.5 bins). Without drift PSI is about 9 (1/n + 1/m), not 0 (Yurdakul 2018).
    """
    inner = np.linspace(0, 1, BINS + 1)[1:-1]
    edges = np.unique(np.quantile(reference, inner, method="inverted_cdf"))
    counts = np.array([np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
                       for values in (reference, current)])  # fmt: skip
    counts = counts[:, counts.any(axis=0)] + SMOOTHING
    p, q = counts / counts.sum(axis=1, keepdims=True)
    return float(((q - p) * np.log(q / p)).sum())


def compare_mmd(
    reference: NDArray[np.floating],
    current: NDArray[np.floating],
    permutations: int,
    generator: np.random.Generator,
) -> Comparison:
    """The squared maximum mean discrepancy of feature vectors `(n, D)` and `(m, D)`, with its permutation p-value.

    The unbiased estimate (Gretton et al. 2012, lemma 6) with the kernel exp(-|x - y|^2 / (2 s^2)) and s the median
    distance (there, section 8), so that its mean without drift is 0 and it never passes 2. Features are first brought
    to unit deviation, channel by channel: some are 100 times as large as others. Both scale and s come from the pooled
    sample, hence do not know which image came from where, and the permutation test stays exact.
    """
    n = len(reference)
    kernel = rbf_kernel(np.concatenate([reference, current]))
    draws = np.concatenate([_mmd(kernel, chosen) for chosen in _permutations(n, len(current), permutations, generator)])
    value = float(_mmd(kernel, (np.arange(len(kernel)) < n)[None])[0])
    return Comparison(value, 0.0, permutation_p_value(value, draws))


def rbf_kernel(pooled: NDArray[np.floating]) -> NDArray[np.float64]:
    """Kernel values of all pairs `(N, N)` with a zero diagonal, which the unbiased estimate leaves out."""
    values = np.asarray(pooled, np.float64)
    spread = values.std(axis=0)
    # a channel whose deviation is rounding noise would be blown up to the size of real ones
    alive = spread > 1e-6 * np.abs(values).max(axis=0)
    squares = pdist(values[:, alive] / spread[alive], "sqeuclidean")
    median = float(np.median(squares))
    if median <= 0:  # more than half of the pairs are identical images
        median = float(squares.mean()) or 1.0
    kernel: NDArray[np.float64] = squareform(np.exp(-squares / (2 * median)))
    return kernel


def permutation_p_value(value: float, draws: NDArray[np.float64]) -> float:
    """The share of permutations, the observed one counted in, at or above `value` (Phipson & Smyth 2010): never 0."""
    return float(1 + np.sum(draws >= value - 1e-12)) / (1 + len(draws))


def _mmd(kernel: NDArray[np.float64], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """MMD^2 of each row of `chosen` `(B, N)`, which marks the reference, from a kernel with zero diagonal."""
    marks = chosen.astype(np.float64)
    n = int(np.count_nonzero(chosen[0]))
    m = len(kernel) - n
    rows = marks @ kernel  # (B, N): sum of kernel values with the reference
    inside = (rows * marks).sum(axis=1)
    across = rows.sum(axis=1) - inside
    outside = kernel.sum() - inside - 2 * across
    answer: NDArray[np.float64] = inside / (n * (n - 1)) + outside / (m * (m - 1)) - 2 * across / (n * m)
    return answer


def _permutations(n: int, m: int, count: int, generator: np.random.Generator) -> Iterator[NDArray[np.bool_]]:
    """Random choices of n out of n + m, as rows of marks, in blocks that bound memory."""
    marks = np.arange(n + m) < n
    for start in range(0, count, BLOCK):
        yield generator.permuted(np.tile(marks, (min(BLOCK, count - start), 1)), axis=1)

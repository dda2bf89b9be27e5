"""Three distances between a reference sample and a current one, each with the p-value of no drift. Pure.

PSI and KS compare scores, which are numbers; MMD compares features, which are vectors. Each p-value is valid whatever
the distribution, as long as reference and current images are exchangeable when nothing has drifted. Frames taken
a moment apart are not independent and make small p-values too easy, which is why `drift.judge` asks for an effect of
some size besides. Large samples make any statistic significant, small ones make PSI and KS large by chance alone:
`expected` is the value to be expected without drift, and what lies above it is the effect.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist, squareform
from scipy.stats import ks_2samp

SMOOTHING = 0.5  # counted into each bin of PSI on both sides (Jeffreys), so that an empty bin is no infinity
EXACT_KS = 10_000  # images; scipy's own limit for the exact distribution
KOLMOGOROV_MEAN = 0.8687311606361592  # sqrt(pi / 2) * ln 2: mean of Kolmogorov's limiting distribution
BLOCK = 64  # permutations computed together


class Comparison(NamedTuple):
    """A statistic of two samples: its value, the value to expect without drift, and the p-value of no drift."""

    value: float
    expected: float
    p_value: float

    @property
    def effect(self) -> float:
        """What the value says beyond chance."""
        return self.value - self.expected


def population_stability_index(reference: NDArray[np.floating], current: NDArray[np.floating], bins: int = 10) -> float:
    """PSI = sum over bins of (q - p) ln(q / p), with p the shares of `reference` and q of `current`.

    Bins end at the quantiles of the reference (at a smallest value not exceeded by that share; fewer bins where values
    are tied); the outer ones are open. Each share is (count + 0.5) / (n + 0.5 bins). Without drift PSI is about
    (bins - 1)(1/n + 1/m), not 0 (Yurdakul 2018).
    """
    marks = np.arange(len(reference) + len(current)) < len(reference)
    return float(_psi(_Ranked.of(np.concatenate([reference, current])), marks[None], bins)[0])


def compare_psi(
    reference: NDArray[np.floating],
    current: NDArray[np.floating],
    bins: int,
    permutations: int,
    generator: np.random.Generator,
) -> Comparison:
    """PSI with its permutation p-value; in each permutation the bins are drawn anew, as they depend on the data."""
    ranked = _Ranked.of(np.concatenate([reference, current]))
    rounds = _permutations(len(reference), len(current), permutations, generator)
    draws = np.concatenate([_psi(ranked, chosen, bins) for chosen in rounds])
    value = population_stability_index(reference, current, bins)
    return Comparison(value, float(draws.mean()), permutation_p_value(value, draws))


def compare_ks(reference: NDArray[np.floating], current: NDArray[np.floating]) -> Comparison:
    """The two-sample Kolmogorov-Smirnov statistic: the largest distance of the distribution functions, in [0, 1]."""
    n, m = len(reference), len(current)
    found = ks_2samp(reference, current, method="exact" if max(n, m) <= EXACT_KS else "asymp")
    expected = min(1.0, KOLMOGOROV_MEAN * float(np.sqrt(1 / n + 1 / m)))
    return Comparison(float(found.statistic), expected, float(found.pvalue))


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


def holm(p_values: list[float]) -> list[float]:
    """P-values adjusted for their number (Holm 1979): rejecting those <= alpha keeps any false alarm below alpha."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    stepped = np.minimum(1, np.maximum.accumulate(np.asarray(p_values, np.float64)[order] * factors))
    adjusted = np.empty(len(p_values))
    adjusted[order] = stepped
    return [float(value) for value in adjusted]


class _Ranked(NamedTuple):
    """The order of pooled values, and for each place in it the last place of an equal value."""

    order: NDArray[np.intp]
    last: NDArray[np.intp]

    @classmethod
    def of(cls, pooled: NDArray[np.floating]) -> "_Ranked":
        order = np.argsort(pooled, kind="stable")
        values = pooled[order]
        return cls(order, np.searchsorted(values, values, side="right") - 1)


def _psi(ranked: _Ranked, chosen: NDArray[np.bool_], bins: int) -> NDArray[np.float64]:
    """PSI of each row of `chosen` `(B, N)`, which marks the reference among the pooled values."""
    n = int(np.count_nonzero(chosen[0]))
    m = chosen.shape[1] - n
    reached = np.cumsum(chosen[:, ranked.order], axis=1)  # (B, N): reference values up to each place
    ends = [ranked.last[(reached < -(-n * step // bins)).sum(axis=1)] for step in range(1, bins)]
    edges = np.stack([*ends, np.full(len(chosen), n + m - 1)], axis=1)  # (B, bins): the last place of each bin
    old = np.diff(np.take_along_axis(reached, edges, axis=1), axis=1, prepend=0)
    new = np.diff(edges + 1, axis=1, prepend=0) - old
    alive = (old + new) > 0  # tied quantiles make bins without width
    count = alive.sum(axis=1, keepdims=True)
    p = (old + SMOOTHING) / (n + SMOOTHING * count)
    q = (new + SMOOTHING) / (m + SMOOTHING * count)
    answer: NDArray[np.float64] = np.where(alive, (q - p) * np.log(q / p), 0.0).sum(axis=1)
    return answer


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

"""Is one row better than another? Spread over seeds, paired tests over (category, seed), a bootstrap over images.

The tests ask whether the difference outlives the randomness of training on these categories; the interval asks whether
it outlives another draw of test images of the same kind. Neither says anything about categories that were not tried.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from flawsmith.evaluation.intervals import Estimate, percentile_interval

ALPHA = 0.05
EXACT_PAIRS = 12  # all 2^n sign patterns are tried up to here; beyond, scipy's own choice is good
Draws = NDArray[np.float64]  # (B,): one value a bootstrap resample


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (ddof = 1) of `n` values; nan where they do not exist."""

    n: int
    mean: float
    deviation: float


@dataclass(frozen=True)
class PairedTest:
    """Two-sided tests of paired differences against 0.

    Attributes:
        n: pairs.
        mean: of the differences.
        t: p of Student's t; nan with fewer than two pairs or where all differences are the same but not 0.
        wilcoxon: p of Wilcoxon's signed-rank test, exact for few pairs; nan without a pair.
        smallest: the least p that Wilcoxon can give with n pairs, 2^(1 - n).
    """

    n: int
    mean: float
    t: float
    wilcoxon: float
    smallest: float

    @property
    def can_be_significant(self) -> bool:
        """Whether n pairs can reach p < 0.05 by ranks at all: 6 or more."""
        return self.smallest < ALPHA


def spread(values: Sequence[float]) -> Spread:
    """Mean and standard deviation of values over seeds."""
    if not values:
        return Spread(0, math.nan, math.nan)
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return Spread(len(values), float(np.mean(values)), deviation)


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Test differences of pairs (one row minus the other, the same category and seed) against 0.

    No difference anywhere gives p = 1. Pairs without a difference carry no rank (Wilcoxon 1945), so they cost power.
    """
    found = np.asarray(differences, np.float64)
    n = len(found)
    if n == 0:
        return PairedTest(0, math.nan, math.nan, math.nan, math.nan)
    smallest = 2.0 ** (1 - n)
    mean = float(found.mean())
    moved = found[found != 0]
    if len(moved) == 0:
        return PairedTest(n, 0.0, 1.0, 1.0, smallest)
    # of equal differences the computed deviation is rounding alone
    varies = n > 1 and np.ptp(found) > 1e-12 * np.abs(found).max()
    t = float(stats.ttest_1samp(found, 0.0).pvalue) if varies else math.nan
    exact = len(moved) <= EXACT_PAIRS
    ranks = _exact_signed_rank(moved) if exact else float(stats.wilcoxon(moved).pvalue)
    return PairedTest(n, mean, t, ranks, smallest)


def _exact_signed_rank(differences: NDArray[np.float64]) -> float:
    """Two-sided p of the signed-rank sum over all sign patterns, ties sharing their mean rank.

    scipy's exact distribution does not know ties, which rounded metrics of few images often have.
    """
    ranks = stats.rankdata(np.abs(differences))
    signs = (np.arange(2 ** len(ranks))[:, None] >> np.arange(len(ranks))) & 1  # (2^n, n)
    sums = signs @ ranks
    centre = ranks.sum() / 2
    observed = abs(float(ranks[differences > 0].sum()) - centre)
    return float(np.mean(np.abs(sums - centre) >= observed - 1e-9))  # sums of halves are exact; 1e-9 is caution


def over_seeds(draws: Sequence[Draws]) -> Draws:
    """The bootstrap distribution of the mean over seeds, of each seed's own; `(B,)`, sorted.

    All seeds are judged on the same images, but each with resamples of its own, so averaging draw by draw would shrink
    the interval with every seed as if it brought new images. Averaging quantile by quantile takes the seeds' draws as
    moving together, the widest interval that they allow (Kaas, Dhaene & Goovaerts 2000: comonotone sums).
    """
    return np.asarray(np.mean([np.sort(one) for one in draws], axis=0), np.float64)


def over_categories(draws: Sequence[Draws], generator: np.random.Generator) -> Draws:
    """The bootstrap distribution of the mean over categories, whose images are independent; `(B,)`."""
    return np.asarray(np.mean([generator.permutation(one) for one in draws], axis=0), np.float64)


def bootstrap_difference(
    value: float, categories: Sequence[Sequence[Draws]], generator: np.random.Generator
) -> Estimate | None:
    """The difference `value` with its 95 % interval over images, from category → seed → paired draws of the difference.

    None where there is nothing to draw from, or the numbers of resamples differ.
    """
    sizes = {len(one) for seeds in categories for one in seeds}
    if len(sizes) != 1 or not all(categories):
        return None
    return percentile_interval(value, over_categories([over_seeds(seeds) for seeds in categories], generator))

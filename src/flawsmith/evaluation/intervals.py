"""How sure a figure is: bootstrap over images, and Wilson's interval for shares."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_Z = 1.959963984540054  # standard normal quantile at (1 + LEVEL) / 2


class Estimate(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def resample_counts(groups: Sequence[str], resamples: int, generator: np.random.Generator) -> NDArray[np.uint16]:
    """How often each image occurs in each bootstrap resample, `(resamples, N)`.

    Images are drawn with replacement within their group (defect type), since a test set's make-up is designed, not
    drawn: every resample then holds both classes, and a subset of the columns is a bootstrap of a subset of types.
    """
    names = np.asarray(groups)
    counts = np.zeros((resamples, len(names)), np.uint16)
    for name in sorted(set(groups)):
        members = np.flatnonzero(names == name)
        counts[:, members] = generator.multinomial(
            len(members), np.full(len(members), 1 / len(members)), size=resamples
        )
    return counts


def percentile_interval(value: float, draws: NDArray[np.float64]) -> Estimate:
    """The percentile bootstrap's 95 % interval around `value` from `draws` `(B,)` (Efron & Tibshirani 1993, ch. 13).

    It cannot look beyond the sample: a perfect score has an interval of zero width.
    """
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def share_interval(count: int, total: int) -> Estimate:
    """The share count / total with Wilson's 95 % interval (Wilson 1927), honest at 0 and at `total` too."""
    share = count / total
    shrink = 1 + _Z**2 / total
    centre = (share + _Z**2 / (2 * total)) / shrink
    half = _Z / shrink * float(np.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2)))
    # clipped to the share itself: at 0 and 1 rounding would leave the point just outside its own interval
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))

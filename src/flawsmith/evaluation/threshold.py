"""The decision threshold, from calibration normals alone: no defect and no test image is asked.

Split conformal prediction (Vovk, Gammerman & Shafer 2005; Angelopoulos & Bates 2023, section 1): if a new normal part
is exchangeable with the n calibration parts, its score exceeds their ceil((n + 1)(1 - alpha))-th smallest with
probability at most alpha, whatever the scores' distribution.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flawsmith.errors import UserError

MARGIN = 0.01


@dataclass(frozen=True)
class Threshold:
    """A part is flagged if its score is strictly above `value`.

    Attributes:
        value: a hair (`MARGIN` of the distance to its neighbour) above the score of that rank, so that the rounding of
            another runtime flips no calibration image.
        rank: its rank among them, 1 the smallest.
        calibration_images: n.
        target_rate: the false-alarm rate asked for.
        expected_rate: the rate the rank stands for, (n + 1 - rank) / (n + 1).
    """

    value: float
    rank: int
    calibration_images: int
    target_rate: float
    expected_rate: float

    @property
    def is_reachable(self) -> bool:
        """Whether the calibration images are enough for the target."""
        return self.expected_rate <= self.target_rate + 1e-12

    @property
    def explanation(self) -> str:
        """One or two sentences for a person."""
        n, target = self.calibration_images, _percent(self.target_rate)
        if self.is_reachable:
            return (
                f"The threshold lies just above the {_ordinal(self.rank)} smallest of {n} scores of normal calibration "
                f"images that trained no network: at most {target} of normal parts from the same process are expected "
                f"above it."
            )
        needed = math.ceil(1 / self.target_rate - 1e-9) - 1
        return (
            f"{n} calibration images are too few for a false-alarm rate of {target}: the threshold is their highest "
            f"score, which stands for a rate of 1/{n + 1} = {_percent(self.expected_rate)}. A rate of {target} takes "
            f"{needed} calibration images or more."
        )


def conformal_threshold(scores: NDArray[np.floating], false_alarm_rate: float) -> Threshold:
    """The ceil((n + 1)(1 - rate))-th smallest of `scores` `(n,)`, or the largest where n is too small for the rate.

    Raises:
        UserError: there is no calibration score.
    """
    count = len(scores)
    if count == 0:
        raise UserError("There is no calibration image; raise data.calibration_fraction in params.yaml.")
    wanted = math.ceil((count + 1) * (1 - false_alarm_rate) - 1e-9)  # 1e-9: 20 * 0.95 must not round up to 20
    rank = min(wanted, count)
    ordered = np.sort(np.asarray(scores, np.float64))
    pair = ordered[rank - 1 : rank + 1] if rank < count else ordered[-2:]
    return Threshold(
        value=float(ordered[rank - 1] + MARGIN * (pair[-1] - pair[0])),
        rank=rank,
        calibration_images=count,
        target_rate=false_alarm_rate,
        expected_rate=(count + 1 - rank) / (count + 1),
    )


def reachable_thresholds(scores: NDArray[np.floating]) -> list[Threshold]:
    """Every threshold that a `false_alarm_rate` up to a half gives on `scores` `(n,)`, lowest first.

    Each `target_rate` is the shortest decimal that stands for its threshold.

    Raises:
        UserError: there is no calibration score.
    """
    return [
        conformal_threshold(scores, _short_rate(above, len(scores) + 1))
        for above in range(max((len(scores) + 1) // 2, 1), 0, -1)
    ]


def _short_rate(above: int, count: int) -> float:
    """The decimal of fewest digits in [above / count, (above + 1) / count)."""
    for digits in range(1, 16):
        scale = 10**digits
        numerator = -(-above * scale // count)  # rounded up, exactly
        if numerator * count < (above + 1) * scale:
            break
    return numerator / scale


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g} %"


def _ordinal(number: int) -> str:
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix}"

"""Whether new images have drifted from what the model was calibrated on. Pure: a measurement each, a verdict.

Defects among new images are what the product is for, so they must not look like drift. Features are therefore compared
among the images judged good alone, on both sides: a part that is flagged has been dealt with, and a drift that matters
shows on the good ones too. Images that drift over the threshold leave that comparison; they are seen by the second
statistic, the flagged share. Its limit is what a batch of bad parts may explain.

A statistic speaks of drift only if it is both significant (p-values are multiplied by the number of statistics, so that
a folder's false-alarm chance stays below `alpha`) and larger than its limit (with many images a harmless difference is
significant as well).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom

from flawsmith.errors import UserError
from flawsmith.evaluation.intervals import Estimate, share_interval
from flawsmith.inference.predictor import flags
from flawsmith.monitoring.config import TESTS, MonitorSettings
from flawsmith.monitoring.reference import IMAGE_STATISTICS, Measurement
from flawsmith.monitoring.statistics import Comparison, compare_mmd, population_stability_index

FLAGGED, MMD = "flagged share", "feature MMD"
VISIBLE_CHANGE = 0.5  # deviations of the calibration normals by which brightness, ... must move to be named
MIN_COMPARED = 5  # images judged good on either side; fewer make no distribution


@dataclass(frozen=True)
class Statistic:
    """One look at the images: drift if it is significant and its effect is above the limit.

    Attributes:
        value, expected: as measured, and as expected without drift.
        effect: what is held against `limit`: the value; of a share the lower end of its interval.
        p_value: of no drift.
    """

    name: str
    value: float
    expected: float
    effect: float
    limit: float
    p_value: float
    alpha: float

    @property
    def adjusted_p(self) -> float:
        """The p-value adjusted for both tests (Bonferroni), even where one could not be made: else `alpha` would depend
        on how many images were flagged."""
        return min(1.0, TESTS * self.p_value)

    @property
    def is_significant(self) -> bool:
        """Whether chance alone does not explain it."""
        return self.adjusted_p <= self.alpha

    @property
    def is_large(self) -> bool:
        """Whether it is more than harmless."""
        return self.effect > self.limit

    @property
    def drifted(self) -> bool:
        """Whether it speaks of drift."""
        return self.is_significant and self.is_large

    @property
    def verdict(self) -> str:
        """In two or three words."""
        if self.drifted:
            return "drift"
        if self.is_significant:
            return "significant but small"
        return "large but not significant" if self.is_large else "no drift"


@dataclass(frozen=True)
class Change:
    """How brightness, contrast or sharpness differs on average, in deviations of the calibration normals too.

    It explains a verdict and has no part in it.
    """

    name: str
    before: float
    after: float
    deviations: float

    @property
    def words(self) -> str:
        """As in `brightness 0.5 → 0.4 (-20 %)`."""
        change = f" ({100 * (self.after / self.before - 1):+.0f} %)" if self.before else ""
        return f"{self.name} {self.before:.3g} → {self.after:.3g}{change}"


@dataclass(frozen=True)
class DriftReport:
    """The verdict on a set of new images, and what it rests on.

    Attributes:
        flagged: the share of new images judged defective, with Wilson's 95 % interval.
        expected_flagged: the share that the threshold's rank among the calibration scores stands for.
        reference_images, reference_compared, images, compared: how many there are, and how many of them judged good
            were compared, on each side.
        changes: of brightness, contrast and sharpness, over all images of both sides.
        score_psi: population stability index of the scores of images judged good; None if they were not compared.
        notes: what a reader must know besides.
    """

    statistics: tuple[Statistic, ...]
    flagged: Estimate
    expected_flagged: float
    flagged_images: int
    reference_images: int
    reference_compared: int
    images: int
    compared: int
    changes: tuple[Change, ...]
    score_psi: float | None
    reason: str
    notes: tuple[str, ...]

    @property
    def drifted(self) -> bool:
        """Whether any statistic speaks of drift."""
        return any(statistic.drifted for statistic in self.statistics)

    @property
    def verdict(self) -> str:
        """In one or two words."""
        return "drift" if self.drifted else "no drift"


def judge(
    reference: Measurement,
    current: Measurement,
    threshold: float,
    settings: MonitorSettings,
    generator: np.random.Generator,
) -> DriftReport:
    """Compare `current` with `reference`, both measured by the model whose `threshold` is given.

    Raises:
        UserError: they come from different models or teachers, there are fewer new images than
            `settings.min_images`, or all reference images are flagged, which no calibrated threshold does.
    """
    _check(reference, current, threshold, settings)
    good = np.flatnonzero(~flags(current.scores, threshold))
    before = _draw(_below_rank(reference.scores, threshold), settings.max_images, generator)
    after = _draw(good, settings.max_images, generator)
    passed = int(np.sum(~flags(reference.scores, threshold)))
    flagged_images = len(current) - len(good)
    flagged = share_interval(flagged_images, len(current))
    alarms = compare_flagged(flagged_images, len(current), passed, len(reference))
    alpha, psi, notes = settings.alpha, None, []
    statistics = [Statistic(FLAGGED, *alarms[:2], flagged.low, settings.max_flagged_share, alarms.p_value, alpha)]
    if min(len(before), len(after)) >= MIN_COMPARED:
        psi = population_stability_index(reference.scores[before], current.scores[after])
        mmd = compare_mmd(reference.features[before], current.features[after], settings.permutations, generator)
        statistics.append(Statistic(MMD, *mmd[:2], mmd.value, settings.max_mmd, mmd.p_value, alpha))
    else:
        notes.append(
            f"Scores and features were not compared: it takes {MIN_COMPARED} images judged good on either side, and "
            f"there are {len(after)} new ones and {len(before)} of the calibration."
        )
    report = DriftReport(
        statistics=tuple(statistics),
        flagged=flagged,
        expected_flagged=alarms.expected,
        flagged_images=flagged_images,
        reference_images=len(reference),
        reference_compared=len(before),
        images=len(current),
        compared=len(after),
        changes=find_changes(reference, current),
        score_psi=psi,
        reason="",
        notes=tuple(notes),
    )
    return replace(report, reason=_reason(report))


def find_changes(reference: Measurement, current: Measurement) -> tuple[Change, ...]:
    """What moved, in words that a person at the line knows; medians, so that a few odd images do not count."""
    before, after = np.median(reference.image_statistics, axis=0), np.median(current.image_statistics, axis=0)
    spread = np.maximum(reference.image_statistics.std(axis=0), 1e-6)
    return tuple(
        Change(name, float(old), float(new), float((new - old) / deviation))
        for name, old, new, deviation in zip(IMAGE_STATISTICS, before, after, spread, strict=True)
    )


def compare_flagged(flagged: int, images: int, passed: int, calibration: int) -> Comparison:
    """The flagged share beside that expected, with the p-value of as many flags or more.

    Where the threshold is the k-th smallest of n calibration scores and a new normal part is exchangeable with them,
    the chance of a flag has a Beta(n + 1 - k, k) distribution, and the number of flags among m a beta-binomial one:
    exact for any distribution of scores (Vovk 2012), and true to how little a small calibration set can promise.
    """
    above = calibration + 1 - passed
    p_value = float(betabinom.sf(flagged - 1, images, above, passed))
    return Comparison(flagged / images, above / (calibration + 1), min(1.0, max(0.0, p_value)))


def _check(reference: Measurement, current: Measurement, threshold: float, settings: MonitorSettings) -> None:
    if reference.detector_digest != current.detector_digest:
        raise UserError(
            "The drift reference was measured with another model than the one that scores now; "
            "use the reference.npz that was registered with the model."
        )
    if reference.teacher_digest != current.teacher_digest or reference.features.shape[1] != current.features.shape[1]:
        raise UserError(
            "The drift reference was measured with another teacher than `teacher` in params.yaml names now; "
            "name the teacher of that model again, or register a model trained with the new one."
        )
    if len(current) < settings.min_images:
        raise UserError(
            f"Only {len(current)} new images can be read, too few to tell drift from chance; collect "
            f"{settings.min_images} (monitor.min_images) or more."
        )
    if flags(reference.scores, threshold).all():
        raise UserError(
            "The model flags every image of its drift reference, so the two do not belong together; register it again."
        )


def _below_rank(scores: NDArray[np.float32], threshold: float) -> NDArray[np.intp]:
    """Reference images to compare: those judged good, less the one whose score the threshold was taken from.

    Given that score, the ones below it are a plain sample of scores up to there, as the new ones judged good are;
    with it the reference would hold its own maximum by construction, and the comparison would not be exact.
    """
    good = np.flatnonzero(~flags(scores, threshold))
    return np.delete(good, int(scores[good].argmax()))


def _draw(rows: NDArray[np.intp], count: int, generator: np.random.Generator) -> NDArray[np.intp]:
    """At most `count` of the rows, at random: the time and memory of MMD grow with the square."""
    return rows if len(rows) <= count else np.sort(generator.choice(rows, count, replace=False))


def _reason(report: DriftReport) -> str:
    """The verdict in words: what moved, by how much, and what to look at."""
    shares = (
        f"{report.flagged_images} of {report.images} new images are flagged "
        f"({_percent(report.flagged.value)}, interval {_percent(report.flagged.low)} to "
        f"{_percent(report.flagged.high)}; {_percent(report.expected_flagged)} false alarms are expected)"
    )
    found = {statistic.name: statistic for statistic in report.statistics if statistic.drifted}
    if not found:
        minor = [statistic.name for statistic in report.statistics if statistic.is_significant]
        small = f" Significant but too small to matter: {', '.join(minor)}." if minor else ""
        return f"No drift: nothing goes beyond chance and the limits. {shares[0].upper()}{shares[1:]}.{small}"
    parts = []
    if mmd := found.get(MMD):
        figures = f"{MMD} {mmd.value:.3g}, limit {mmd.limit:g}, p {mmd.adjusted_p:.2g}"
        parts.append(f"the images judged good look different to the frozen teacher ({figures})")
    if FLAGGED in found:
        parts.append(
            f"{shares}, more than {_percent(found[FLAGGED].limit)}: either many parts are bad or the images have "
            "changed; look at the highest-scoring ones"
        )
    moved = [change.words for change in report.changes if abs(change.deviations) >= VISIBLE_CHANGE]
    hint = (
        f"What has moved: {', '.join(moved)}"
        if moved
        else "Brightness, contrast and sharpness have hardly moved: compare position, product and texture"
    )
    return f"Drift: {'; '.join(parts)}. {hint}."


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

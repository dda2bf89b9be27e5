"""Whether new images have drifted from what the model was calibrated on. Pure: a measurement each, a verdict.

Defects among new images are what the product is for, so they must not look like drift. Scores and features are
therefore compared among the images judged good alone, on both sides: a part that is flagged has been dealt with, and
a drift that matters shows on the good ones too. Images that drift over the threshold leave that comparison; they are
seen by the fourth statistic, the flagged share, whose limit is what a batch of bad parts may explain.

A statistic speaks of drift only if it is both significant (Holm over all four, so that a folder's false-alarm chance
stays below `alpha`) and larger than its limit (with many images a harmless difference is significant as well).
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import betabinom

from flawsmith.errors import UserError
from flawsmith.evaluation.intervals import Estimate, share_interval
from flawsmith.inference.predictor import flags
from flawsmith.monitoring.reference import LOOKS, Measurement
from flawsmith.monitoring.statistics import Comparison, compare_ks, compare_mmd, compare_psi, holm
from flawsmith.settings import MonitorSettings

FLAGGED, PSI, KS, MMD = "flagged share", "score PSI", "score KS", "feature MMD"
TESTS = (FLAGGED, PSI, KS, MMD)
VISIBLE_SHIFT = 0.5  # deviations of the calibration normals by which brightness, ... must move to be named
MIN_COMPARED = 5  # images judged good on either side; fewer make no distribution


@dataclass(frozen=True)
class Statistic:
    """One look at the images: drift if it is significant and its effect is above the limit.

    Attributes:
        value, expected: as measured, and as expected without drift.
        effect: what is held against `limit`: the value beyond chance; of a share the lower end of its interval.
        p_value, adjusted_p: of no drift, alone and adjusted for the number of statistics (Holm).
    """

    name: str
    value: float
    expected: float
    effect: float
    limit: float
    p_value: float
    adjusted_p: float
    alpha: float

    @property
    def is_significant(self) -> bool:
        return self.adjusted_p <= self.alpha

    @property
    def is_large(self) -> bool:
        return self.effect > self.limit

    @property
    def drifted(self) -> bool:
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
class Shift:
    """How brightness, contrast or sharpness differs on average, in deviations of the calibration normals too.

    It explains a verdict and has no part in it.
    """

    name: str
    before: float
    after: float
    deviations: float

    @property
    def words(self) -> str:
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
        shifts: of brightness, contrast and sharpness, over all images of both sides.
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
    shifts: tuple[Shift, ...]
    reason: str
    notes: tuple[str, ...]

    @property
    def drifted(self) -> bool:
        return any(statistic.drifted for statistic in self.statistics)

    @property
    def verdict(self) -> str:
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
    found: dict[str, tuple[Comparison, float, float]] = {}  # name: what was found, effect, limit

    passed = int(np.sum(~flags(reference.scores, threshold)))
    flagged_images = len(current) - len(good)
    flagged = share_interval(flagged_images, len(current))
    alarms = compare_flagged(flagged_images, len(current), passed, len(reference))
    found[FLAGGED] = (alarms, flagged.low, settings.max_flagged_share)
    notes = []
    if min(len(before), len(after)) >= MIN_COMPARED:
        old, new, rounds = reference.scores[before], current.scores[after], settings.permutations
        psi = compare_psi(old, new, settings.bins, rounds, generator)
        ks = compare_ks(old, new)
        mmd = compare_mmd(reference.features[before], current.features[after], rounds, generator)
        found[PSI] = (psi, psi.effect, settings.max_psi)
        found[KS] = (ks, ks.effect, settings.max_ks)
        found[MMD] = (mmd, mmd.effect, settings.max_mmd)
    else:
        notes.append(
            f"Scores and features were not compared: it takes {MIN_COMPARED} images judged good on either side, and "
            f"there are {len(after)} new ones and {len(before)} of the calibration."
        )
    # what was not compared counts as a test all the same: alpha must not depend on how many images were flagged
    adjusted = holm([found[name][0].p_value if name in found else 1.0 for name in TESTS])
    statistics = tuple(
        Statistic(
            name, got.value, got.expected, effect, limit, got.p_value, adjusted[TESTS.index(name)], settings.alpha
        )
        for name, (got, effect, limit) in found.items()
    )
    report = DriftReport(
        statistics=statistics,
        flagged=flagged,
        expected_flagged=alarms.expected,
        flagged_images=flagged_images,
        reference_images=len(reference),
        reference_compared=len(before),
        images=len(current),
        compared=len(after),
        shifts=shifts(reference, current),
        reason="",
        notes=tuple(notes),
    )
    direction = float(np.median(current.scores) - np.median(reference.scores))
    return replace(report, reason=_reason(report, direction))


def shifts(reference: Measurement, current: Measurement) -> tuple[Shift, ...]:
    """What moved, in words that a person at the line knows; medians, so that a few odd images do not count."""
    before, after = np.median(reference.looks, axis=0), np.median(current.looks, axis=0)
    spread = np.maximum(reference.looks.std(axis=0), 1e-6)
    return tuple(
        Shift(name, float(old), float(new), float((new - old) / deviation))
        for name, old, new, deviation in zip(LOOKS, before, after, spread, strict=True)
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


def _reason(report: DriftReport, direction: float) -> str:
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
    if MMD in found:
        parts.append(f"the images judged good look different to the frozen teacher ({_figures(found[MMD])})")
    scores = [found[name] for name in (KS, PSI) if name in found]
    if scores:
        figures = "; ".join(_figures(statistic) for statistic in scores)
        way = "higher" if direction > 0 else "lower"
        parts.append(f"images judged good score differently, on the whole {way} ({figures})")
    if FLAGGED in found:
        parts.append(
            f"{shares}, more than {_percent(found[FLAGGED].limit)}: either many parts are bad or the images have "
            "changed; look at the highest-scoring ones"
        )
    moved = [shift.words for shift in report.shifts if abs(shift.deviations) >= VISIBLE_SHIFT]
    hint = (
        f"What has moved: {', '.join(moved)}"
        if moved
        else "Brightness, contrast and sharpness have hardly moved: compare position, product and texture"
    )
    return f"Drift: {'; '.join(parts)}. {hint}."


def _figures(statistic: Statistic) -> str:
    beyond = f", {statistic.effect:.3g} beyond chance" if statistic.expected else ""
    return f"{statistic.name} {statistic.value:.3g}{beyond}, limit {statistic.limit:g}, p {statistic.adjusted_p:.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"

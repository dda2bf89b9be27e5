"""The verdict: defects are no drift, drift is, few images are refused, and chance alone stays below alpha."""

from dataclasses import replace

import numpy as np
import pytest
from monitoring_samples import measurement
from numpy.typing import NDArray
from scipy.stats import binom

from flawsmith.errors import UserError
from flawsmith.evaluation.threshold import conformal_threshold
from flawsmith.monitoring.config import MonitorSettings
from flawsmith.monitoring.drift import FLAGGED, MMD, DriftReport, compare_flagged, judge
from flawsmith.monitoring.reference import Measurement

RATE = 0.05


def normals(generator: np.random.Generator, count: int, score: float = 0.0, look: float = 0.0) -> Measurement:
    """Scores of unit deviation, moved by `score`; six features of unit deviation, moved by `look`."""
    return measurement(generator.gumbel(score, 1.0, count), generator.normal(look, 1.0, (count, 6)))


def with_defects(parts: Measurement, count: int) -> Measurement:
    """The last `count` parts are bad: far above any threshold, and odd in one feature."""
    scores, features = parts.scores.copy(), parts.features.copy()
    scores[-count:], features[-count:, 0] = 50.0, 3.0
    return replace(parts, scores=scores, features=features)


def decide(reference: Measurement, current: Measurement, settings: MonitorSettings, seed: int = 0) -> DriftReport:
    threshold = conformal_threshold(reference.scores, RATE).value
    return judge(reference, current, threshold, settings, np.random.default_rng(seed))


def loosened(settings: MonitorSettings, **changes: float) -> MonitorSettings:
    """Settings with limits that no file could set."""
    made = replace(settings)
    for name, value in changes.items():
        object.__setattr__(made, name, value)
    return made


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.mark.parametrize(("calibration", "new"), [(32, 40), (12, 100), (120, 30)])
def test_chance_alone_raises_no_more_alarms_than_alpha(settings: MonitorSettings, calibration: int, new: int) -> None:
    # without limits of size, so that significance alone must hold
    bare = loosened(settings, alpha=0.05, permutations=99, max_mmd=-2.0, max_flagged_share=-1.0)
    generator, trials = np.random.default_rng(21), 120
    alarms = 0
    for trial in range(trials):
        alarms += decide(normals(generator, calibration), normals(generator, new), bare, trial).drifted
    assert alarms <= binom.ppf(0.999, trials, bare.alpha)


def test_the_shipped_limits_cry_wolf_even_less(settings: MonitorSettings, generator: np.random.Generator) -> None:
    cheap = replace(settings, alpha=0.05, permutations=99)
    alarms = sum(decide(normals(generator, 32), normals(generator, 25), cheap, seed).drifted for seed in range(60))
    assert alarms <= binom.ppf(0.999, 60, 0.05)


@pytest.mark.parametrize("share", [0.05, 0.15, 0.25])
def test_defects_are_no_drift(settings: MonitorSettings, generator: np.random.Generator, share: float) -> None:
    new = with_defects(normals(generator, 200), int(200 * share))
    report = decide(normals(generator, 60), new, settings)
    assert report.verdict == "no drift"
    assert report.flagged.value >= share
    assert report.compared == 200 - report.flagged_images


def test_many_flagged_images_are_reported(settings: MonitorSettings, generator: np.random.Generator) -> None:
    report = decide(normals(generator, 60), with_defects(normals(generator, 100), 60), settings)
    assert [item.name for item in report.statistics if item.drifted] == [FLAGGED]
    assert "either many parts are bad or the images have changed" in report.reason


def test_a_change_of_looks_that_leaves_the_scores_alone_is_drift(
    settings: MonitorSettings, generator: np.random.Generator
) -> None:
    report = decide(normals(generator, 40), normals(generator, 60, look=1.0), settings)
    assert [item.name for item in report.statistics if item.drifted] == [MMD]
    assert "look different to the frozen teacher" in report.reason


def test_scores_that_moved_are_told_and_decide_nothing(
    settings: MonitorSettings, generator: np.random.Generator
) -> None:
    still, moved = (decide(normals(generator, 60), normals(generator, 80, score=x), settings) for x in (0, -1.2))
    assert not moved.drifted
    assert still.score_psi is not None
    assert moved.score_psi is not None
    assert moved.score_psi > 2 * still.score_psi


def test_what_has_moved_is_named(settings: MonitorSettings, generator: np.random.Generator) -> None:
    new = normals(generator, 60, look=1.0)
    darker = new.image_statistics.copy()
    darker[:, 0] = 0.4
    report = decide(normals(generator, 40), replace(new, image_statistics=darker), settings)
    assert "What has moved: brightness 0.5 → 0.4 (-20 %)." in report.reason
    unmoved = decide(normals(generator, 40), new, settings)
    assert "hardly moved" in unmoved.reason


def test_a_significant_difference_that_is_small_is_none(
    settings: MonitorSettings, generator: np.random.Generator
) -> None:
    report = decide(normals(generator, 900), normals(generator, 900, look=0.12), settings)
    (mmd,) = [item for item in report.statistics if item.name == MMD]
    assert mmd.is_significant
    assert mmd.verdict == "significant but small"
    assert not report.drifted
    assert "Significant but too small to matter: feature MMD." in report.reason


def test_without_good_images_the_flagged_share_decides_alone(
    settings: MonitorSettings, generator: np.random.Generator
) -> None:
    report = decide(normals(generator, 40), normals(generator, 30, score=40.0), settings)
    assert [item.name for item in report.statistics] == [FLAGGED]
    assert report.drifted
    assert report.score_psi is None
    assert "0 new ones" in report.notes[0]


def test_one_calibration_image_proves_nothing(settings: MonitorSettings, generator: np.random.Generator) -> None:
    report = decide(normals(generator, 1), normals(generator, 30, score=40.0), settings)
    assert not report.drifted  # all new images lie above the one known: with chance 1/31
    assert report.expected_flagged == pytest.approx(0.5)


def test_the_same_images_give_the_same_report_in_any_order(
    settings: MonitorSettings, generator: np.random.Generator
) -> None:
    reference, current = normals(generator, 40), normals(generator, 60, look=0.5)
    report = decide(reference, current, settings)
    assert report == decide(reference, current, settings)
    assert [item.name for item in report.statistics] == [FLAGGED, MMD]
    assert all(item.p_value <= item.adjusted_p <= 1 for item in report.statistics)
    assert report.reference_compared == 38  # of 40: one lies above the threshold, and one sets it
    assert report.expected_flagged == pytest.approx(2 / 41)
    order = generator.permutation(60)
    turned = replace(current, scores=current.scores[order], features=current.features[order])
    for first, second in zip(report.statistics, decide(reference, turned, settings).statistics, strict=True):
        assert first.value == pytest.approx(second.value)


def test_large_sets_are_compared_by_a_sample(settings: MonitorSettings, generator: np.random.Generator) -> None:
    report = decide(normals(generator, 90), normals(generator, 40), replace(settings, max_images=30))
    assert (report.reference_compared, report.reference_images) == (30, 90)


def test_too_few_images_are_refused(settings: MonitorSettings, generator: np.random.Generator) -> None:
    with pytest.raises(UserError, match=r"Only 19 new images can be read.*20 \(monitor\.min_images\)"):
        decide(normals(generator, 40), normals(generator, 19), settings)


@pytest.mark.parametrize(
    ("field", "word"), [("detector_digest", "another model"), ("teacher_digest", "another teacher")]
)
def test_answers_of_another_model_are_refused(
    settings: MonitorSettings, generator: np.random.Generator, field: str, word: str
) -> None:
    with pytest.raises(UserError, match=word):
        decide(normals(generator, 40), replace(normals(generator, 40), **{field: "x"}), settings)


def test_a_reference_that_its_model_flags_is_refused(settings: MonitorSettings, generator: np.random.Generator) -> None:
    with pytest.raises(UserError, match="do not belong together"):
        judge(normals(generator, 40), normals(generator, 40), -100.0, settings, generator)


def test_the_number_of_flags_has_its_exact_distribution() -> None:
    """Simulated: the threshold is the k-th of n calibration scores, whatever they are distributed like."""
    generator, n, m, trials = np.random.default_rng(22), 19, 30, 4000
    scores: NDArray[np.float64] = generator.exponential(size=(trials, n + m))
    thresholds = np.sort(scores[:, :n], axis=1)[:, 18]  # k = n = 19: a rate of 5 %
    flags = (scores[:, n:] > thresholds[:, None]).sum(axis=1)
    for seen in (1, 3, 8):
        share = float(np.mean(flags >= seen))
        assert compare_flagged(seen, m, 19, n).p_value == pytest.approx(share, abs=4 * 0.5 / np.sqrt(trials))
    assert compare_flagged(0, m, 19, n).p_value == 1
    assert compare_flagged(0, m, 19, n).expected == pytest.approx(0.05)

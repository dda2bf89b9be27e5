"""The probability of detection against known truths: what it gives back, and when it says that it cannot tell."""

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import expit, logit
from small_settings import SHIPPED

from flawsmith.config import load_settings
from flawsmith.data.foreground import Foreground
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.evaluation.detection import Detection, Findings, Trials, Unit, detection, findings, real_defects
from flawsmith.evaluation.trials import CONTRASTS, DIAMETERS, NOTHING, judge_by, spots, try_defects
from flawsmith.randomness import numpy_generator
from flawsmith.synthesis.generate import TripletGenerator

TRUE_A90, CONTRAST = 12.0, 10.0
UNIT = Unit()


def law(sizes: NDArray[np.float64], contrasts: NDArray[np.float64]) -> NDArray[np.float64]:
    """A true curve: 90 % at TRUE_A90 and CONTRAST."""
    return np.asarray(expit(np.log(9) + 3 * np.log(sizes / TRUE_A90) + 4 * np.log(contrasts / CONTRAST)))


def trials(seed: int, chance: Callable[..., NDArray[np.float64]] = law, images: int = 30) -> Trials:
    generator = np.random.default_rng(seed)
    sizes, contrasts = np.exp(generator.uniform(np.log([[3], [3]]), np.log([[60], [40]]), (2, 4 * images)))
    hits = generator.random(4 * images) < chance(sizes, contrasts)
    return Trials(sizes, contrasts, hits, np.arange(4 * images) % images)


def told(one: Trials, resamples: int = 60, contrast: float = CONTRAST) -> Detection:
    return detection(one, contrast, resamples, numpy_generator(0, "test"))


def width(one: Detection) -> float:
    """Mean width of the curve's bounds."""
    _, low, high = one.curve
    return float((high - low).mean())


def test_hits_that_follow_a_curve_give_back_its_a90_within_the_bounds() -> None:
    found = [told(trials(seed), 40) for seed in range(24)]
    best, sure = np.asarray([[one.a90, one.a90_95] for one in found], np.float64).T
    assert np.median(best) == pytest.approx(TRUE_A90, rel=0.1)
    assert (sure >= best).all()
    assert (sure >= TRUE_A90).sum() >= 20  # 95 % of times, less what 24 draws may miss
    assert np.median(sure) < 1.4 * TRUE_A90
    value, low, high = found[0].curve
    assert ((low <= value) & (value <= high)).mean() > 0.9
    assert (np.diff(value) > 0).all()


def test_what_the_defects_of_one_image_share_widens_the_bounds() -> None:
    """Twelve images, each easy or hard as a whole: 240 defects know less than as many of 240 images."""
    ease = np.random.default_rng(0).normal(0, 2, 12)[np.arange(240) % 12]
    tied = trials(3, lambda sizes, contrasts: expit(logit(law(sizes, contrasts)) + ease), 60)
    by_image, by_defect = (replace(tied, images=np.arange(240) % images) for images in (12, 240))
    assert width(told(by_image)) > 1.15 * width(told(by_defect))


def test_where_hits_and_misses_do_not_overlap_the_curve_is_a_finite_step_between_them() -> None:
    found = told(trials(0, lambda sizes, contrasts: (sizes > 8) & (contrasts > 0)))
    assert np.isfinite(found.coefficients).all()
    assert found.a90 is not None
    assert found.a90_95 is not None
    assert 8 < found.a90 <= found.a90_95 < 16  # on the careful side


def test_all_found_is_found_from_the_smallest_size_tried_and_nothing_found_tells_nothing() -> None:
    everything = told(trials(0, lambda sizes, contrasts: np.ones_like(sizes)))
    assert everything.a90 == everything.a90_95 == pytest.approx(everything.trials.sizes.min())
    nothing = told(trials(0, lambda sizes, contrasts: np.zeros_like(sizes)))
    assert (nothing.a90, nothing.a90_95) == (None, None)
    assert "cannot be said to find 90 %" in nothing.sentence(UNIT, 0.05)


def test_no_a90_is_told_that_the_trials_do_not_bear_out() -> None:
    """A logistic curve always reaches 90 %; a detector that is blind in a fifth of all places never does."""
    blind = told(trials(1, lambda sizes, contrasts: 0.8 * law(sizes, contrasts)))
    assert blind.a90 is None
    assert f"{blind.large[1]} of {blind.large[0]}" in blind.sentence(UNIT, 0.05)
    assert told(trials(1), contrast=39.9).a90 is None  # hardly any has so much contrast


def test_the_sentence_states_rate_contrast_size_and_unit() -> None:
    one = replace(told(trials(0)), a90=7.04, a90_95=12.4)
    assert one.sentence(UNIT, 0.05) == (
        "At 5 % false alarms it finds 90 % of spots with a contrast of 10 grey levels or more that measure 12 px and "
        "more (95 % sure; best estimate 7.0 px)."
    )
    assert "from 7.04 mm on, but too few" in replace(one, a90_95=None).sentence(Unit("mm", 4), 0.05)


def test_a_unit_is_a_stored_pixel_or_a_millimetre_of_the_part() -> None:
    """1024 x 2048 px are seen as 256 x 256, so a stored pixel is the geometric mean of 1/4 and 1/8 px."""
    pixel, millimetre = (Unit.of((1024, 2048), (256, 256), per_mm) for per_mm in (0.0, 20.0))
    assert pixel.diameter(np.pi * 4.0) == pytest.approx(4 * np.sqrt(32))
    assert millimetre.diameter(np.pi * 4.0) == pytest.approx(4 * np.sqrt(32) / 20)
    assert (pixel.name, millimetre.name) == ("px", "mm")


def test_real_defects_stand_beside_and_judge_how_far_the_curve_can_be_believed() -> None:
    def beside(share: float) -> Findings:
        hits = np.arange(100) < 100 * share
        real = real_defects(np.r_[0, np.full(100, np.pi * 36)], np.r_[True, hits], UNIT)  # diameter 12: 90 % expected
        return findings({"own": trials(0, images=200)}, real, UNIT, EvaluateSettings(bootstrap=20))

    for share, words, contrasts in ((0.9, "they agree", (8, 12)), (0.6, "harder", (5, 9)), (0.99, "easier", (12, 40))):
        found = beside(share)
        assert words in found.trust("own")
        (alike,) = re.findall(r"as often as spots of their sizes with a contrast of (\d+) grey", found.trust("own"))
        assert contrasts[0] <= int(alike) <= contrasts[1]
        content = found.content()["own"]
        assert content["real"] == {
            "defects": 100,
            "found": round(100 * share),
            "expected": pytest.approx(0.9, abs=0.03),
        }
        assert (content["images"], content["defects"], content["unit"]) == (200, 800, "px")
    assert "harder" in beside(0).trust("own")
    assert "less often than spots of their sizes of any contrast tried" in beside(0).trust("own")
    nobody = real_defects(np.zeros(3, np.int64), np.ones(3, bool), UNIT)
    alone = findings({"own": trials(0)}, nobody, UNIT, EvaluateSettings(bootstrap=20))
    assert (alone.real, alone.trust("own")) == (None, "")


SHAPE = (96, 128)
PART = np.hypot(*(np.indices(SHAPE) - np.array([[[48]], [[60]]]))) < 40
SETTINGS = spots(replace(load_settings(SHIPPED).synthesize, batch=4, windows=(48, 64), mixture={"own": 1.0}), 96 * 128)


SURFACE = Foreground(False, (0.0, 0.0, 0.0), 0.0)


def maker(foreground: Foreground = SURFACE) -> TripletGenerator:
    generator = np.random.default_rng(0)
    gray = np.where(PART, 90, 200) + generator.normal(0, 4, (6, *SHAPE))
    images = np.repeat(np.clip(gray, 0, 255)[:, None], 3, axis=1).astype(np.uint8)
    return TripletGenerator(None, None, images, [f"{index}.png" for index in range(6)], foreground, SETTINGS)


class Recorder:
    """Flags what differs from all normals in more than `least` pixels, and keeps what it was shown."""

    def __init__(self, normals: NDArray[np.uint8], least: int = 40) -> None:
        self.normals, self.least, self.changed = normals.astype(np.int16), least, []  # type: ignore[var-annotated]

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
        changes = [np.abs(self.normals - image).max(axis=1) for image in images.astype(np.int16)]
        nearest = [change[change.sum(axis=(1, 2)).argmin()] for change in changes]
        self.changed += nearest
        return np.asarray([(change > 0).sum() > self.least for change in nearest])


@pytest.fixture(scope="module")
def tried() -> tuple[Trials, Recorder]:
    judge = Recorder(maker().normals)
    return try_defects(maker(), "own", judge, np.arange(1, 6), UNIT, 24), judge


def test_each_defect_is_shown_at_two_contrasts_on_the_images_asked_for(tried: tuple[Trials, Recorder]) -> None:
    found, judge = tried
    assert len(judge.changed) == 48
    assert len(found.hits) > 40
    assert set(found.images.tolist()) == set(range(1, 6))
    assert DIAMETERS[0] <= found.sizes.min() < 8 < 16 < found.sizes.max() <= DIAMETERS[1]
    assert NOTHING <= found.contrasts.min() < CONTRASTS[0][1] < found.contrasts.max() < 1.1 * CONTRASTS[1][1]
    assert found.hits[found.sizes > 16].all()
    assert not found.hits[found.sizes < 4].any()


def test_trials_are_the_same_again(tried: tuple[Trials, Recorder]) -> None:
    again = try_defects(maker(), "own", Recorder(maker().normals), np.arange(1, 6), UNIT, 24)
    for name, values in vars(again).items():
        np.testing.assert_array_equal(values, getattr(tried[0], name))


def test_on_a_part_no_defect_lies_beside_it() -> None:
    normals = maker().normals
    foreground = Foreground.estimate(normals.astype(np.float32) / 255)
    assert foreground.is_object
    judge = Recorder(normals)
    try_defects(maker(foreground), "own", judge, np.arange(6), UNIT, 12)
    parts = np.any([foreground.mask(image.astype(np.float32) / 255) for image in normals], axis=0)
    beside = ndimage.distance_transform_edt(~parts) > SETTINGS.feather + 1  # a soft edge reaches over the outline
    assert all(change.any() and not change[beside].any() for change in judge.changed)


def test_without_a_normal_that_passes_nothing_is_tried() -> None:
    nobody = try_defects(maker(), "own", Recorder(maker().normals), np.arange(0), UNIT, 12)
    assert nobody.hits.size == 0
    assert findings({"own": nobody}, nobody, UNIT, EvaluateSettings()).content() == {}


def test_a_judge_decides_as_the_product_does() -> None:
    def run(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        assert images.dtype == np.float32
        assert len(images) <= 2
        return images.mean(axis=1), images.max(axis=(1, 2, 3))

    images = np.zeros((5, 3, 4, 4), np.uint8)
    images[[1, 3, 4], 0, 0, 0] = (255, 50, 52)
    assert judge_by(run, 0.2, 2)(images).tolist() == [False, True, False, False, True]

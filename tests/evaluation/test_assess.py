"""The whole evaluation against scikit-learn, its invariants, and its memory."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from synthetic import assess_synthetic, contrast_scorer, main, synthetic_sample

from flawsmith.data.dataset import GOOD
from flawsmith.errors import UserError
from flawsmith.evaluation import threshold as threshold_module
from flawsmith.evaluation.assess import FAILURES, LIMITING, assess, rank_errors, spread
from flawsmith.evaluation.config import EvaluateSettings
from flawsmith.evaluation.measure import measure
from flawsmith.evaluation.metrics import HEADLINE, KEYS
from flawsmith.randomness import numpy_generator

OPTIONS = EvaluateSettings(false_alarm_rate=0.1, bootstrap=60, aupro_limit=0.3, batch=4, gallery=8)
SAMPLES = [synthetic_sample(index, 48) for index in range(20)]
CALIBRATION = [synthetic_sample(4 * index, 48) for index in range(50, 70)]


def blunt(images):
    return contrast_scorer(images, 0.7)


def assessed(detector=contrast_scorer, baseline=blunt, samples=SAMPLES, calibration=CALIBRATION, **changes):
    options = replace(OPTIONS, **changes)
    return assess(detector, baseline, samples, calibration, numpy_generator(0, "test"), options)


@pytest.fixture(scope="module")
def result():
    return assessed()


def test_values_agree_with_scikit_learn_on_all_pixels(result):
    loaded = [sample.load() for sample in SAMPLES]
    maps, scores = contrast_scorer(np.stack([image for image, _ in loaded]))
    masks = np.stack([mask for _, mask in loaded])
    labels = [sample.is_defective for sample in SAMPLES]
    values = result.detector.values
    assert values["image_auroc"].value == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert values["image_ap"].value == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    assert values["pixel_auroc"].value == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-3)
    assert values["pixel_ap"].value == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-3)
    names = np.asarray([sample.defect for sample in SAMPLES])
    for defect, found in result.detector.by_defect.items():
        of_type = (names == defect) | (names == GOOD)
        expected = roc_auc_score(names[of_type] == defect, scores[of_type])
        assert found["image_auroc"].value == pytest.approx(expected, abs=1e-9)
        expected = roc_auc_score(masks[of_type].ravel(), maps[of_type].ravel())
        assert found["pixel_auroc"].value == pytest.approx(expected, abs=1e-3)


def test_every_value_lies_in_its_interval(result):
    for performance in (result.detector, result.baseline):
        assert tuple(performance.values) == KEYS
        for estimate in performance.values.values():
            assert 0 <= estimate.low < estimate.value < estimate.high <= 1
        assert all(tuple(values) == HEADLINE for values in performance.by_defect.values())


def test_sharper_scorer_beats_the_blunt_one_by_the_paired_difference(result):
    for key in KEYS:
        expected = result.detector.values[key].value - result.baseline.values[key].value
        assert result.advantage[key].value == pytest.approx(expected)
    assert result.advantage["pixel_auroc"].low > 0


def test_same_detector_twice_has_no_advantage_and_no_doubt_about_it():
    assert all(estimate == (0, 0, 0) for estimate in assessed(baseline=contrast_scorer).advantage.values())


def test_result_depends_on_the_generator_alone(result):
    again = assessed(batch=7)
    assert again.detector.values == result.detector.values
    assert again.detector.by_defect == result.detector.by_defect
    assert [example.name for example in again.gallery] == [example.name for example in result.gallery]


def test_rates_are_judged_in_double_precision_as_the_product_judges(monkeypatch):
    """Float32 scores a rounding apart, and a threshold between them that float32 would round up to the higher one."""
    low = np.float32(1.3)
    middle, high = np.nextafter(low, np.float32(2)), np.nextafter(np.nextafter(low, np.float32(2)), np.float32(2))
    scores = iter(np.float32([low, middle, middle, high]))
    samples = [synthetic_sample(index, 16) for index in (4, 8, 4, 5)]
    assert [sample.is_defective for sample in samples] == [False, False, False, True]

    def scorer(images):
        return np.zeros(images.shape[:1] + images.shape[2:], np.float32), np.asarray([next(scores)])

    monkeypatch.setattr(threshold_module, "MARGIN", 0.9)
    options = replace(OPTIONS, false_alarm_rate=0.4, bootstrap=10, batch=1)
    (found,) = measure([scorer], samples[2:], samples[:2], numpy_generator(0, "test"), options)
    assert float(middle) < found.threshold.value < float(high)
    assert np.float32(found.threshold.value) == high
    assert (found.test_detections.value, found.test_false_alarms.value) == (1, 0)
    assert found.is_flagged(float(high))


def test_oracle_has_perfect_values_and_finds_everything():
    def oracle(images):
        maps = np.stack([truth[image.tobytes()] for image in images]).astype(np.float32)
        return maps, maps.max(axis=(1, 2))

    loaded = [sample.load() for sample in (*SAMPLES, *CALIBRATION)]
    truth = {image.tobytes(): mask for image, mask in loaded}
    perfect = assessed(detector=oracle, baseline=contrast_scorer)
    assert all(estimate == pytest.approx((1, 1, 1)) for estimate in perfect.detector.values.values())
    assert perfect.detector.test_detections.value == 1
    assert perfect.detector.test_false_alarms.value == 0
    assert not any(example.is_wrong for example in perfect.gallery)


def test_threshold_comes_from_calibration_alone(result):
    other = assessed(samples=SAMPLES[:6]).detector
    assert other.threshold == result.detector.threshold
    assert other.pixel_threshold == result.detector.pixel_threshold
    for threshold, scores in (
        (result.detector.threshold, result.detector.calibration.scores),
        (result.detector.pixel_threshold, result.detector.calibration.peaks),
    ):
        assert (scores <= threshold.value).sum() == threshold.rank


def test_rates_count_verdicts(result):
    flags = np.asarray([result.detector.is_flagged(float(score)) for score in result.detector.scores.scores])
    defective = np.asarray([sample.is_defective for sample in SAMPLES])
    assert result.detector.test_false_alarms.value == flags[~defective].mean()
    assert result.detector.test_detections.value == flags[defective].mean()
    assert result.flagged == (flags[defective].sum(), flags[~defective].sum())
    for name, share in result.detector.detections.items():
        assert share.value == flags[[sample.defect == name for sample in SAMPLES]].mean()


def test_gallery_holds_the_errors_first_then_the_closest_calls(result):
    wrong = [example.is_wrong for example in result.gallery]
    assert wrong == sorted(wrong, reverse=True)
    assert [example.error for example in result.gallery] == sorted((e.error for e in result.gallery), reverse=True)
    assert len(result.gallery) == OPTIONS.gallery
    for example in (*result.gallery, *result.limiting):
        np.testing.assert_allclose(contrast_scorer(example.image[None])[0][0], example.anomaly_map, atol=1e-6)


def test_the_normals_that_set_the_threshold_are_shown_highest_first(result):
    scores = result.detector.calibration.scores
    highest = np.argsort(-scores)[:LIMITING]
    assert [example.name for example in result.limiting] == [CALIBRATION[index].name for index in highest]
    assert [example.score for example in result.limiting] == scores[highest].tolist()
    above = len(scores) - result.detector.threshold.rank
    assert 0 < above < LIMITING
    assert [example.is_wrong for example in result.limiting] == [True] * above + [False] * (LIMITING - above)


def test_few_normals_are_all_shown():
    few = assessed(calibration=CALIBRATION[: LIMITING - 1])
    assert {example.name for example in few.limiting} == {sample.name for sample in CALIBRATION[: LIMITING - 1]}


def test_failures_are_the_worst_of_each_class_whatever_the_gallery_shows(result):
    small = assessed(gallery=1)
    scores = small.detector.scores.scores.tolist()
    for part, is_defective in ((small.misses, True), (small.alarms, False)):
        of_class = [score for sample, score in zip(SAMPLES, scores, strict=True) if sample.is_defective == is_defective]
        assert [example.score for example in part] == sorted(of_class, reverse=not is_defective)[:FAILURES]
        assert all((example.defect != GOOD) == is_defective for example in part)
    assert [example.name for example in small.misses] == [example.name for example in result.misses]


def test_typical_images_cover_each_kind_once(result):
    assert [example.defect for example in result.typical] == [*result.detector.by_defect, GOOD]


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([GOOD, "dent"])), min_size=1, max_size=30),
    st.integers(0, 9),
)
def test_no_right_verdict_ranks_above_a_wrong_one(cases, threshold):
    scores = np.asarray([score for score, _ in cases], np.float32)
    order = rank_errors(scores, [group for _, group in cases], threshold)
    assert sorted(order) == list(range(len(cases)))
    distance = [abs(cases[index][0] - threshold) for index in order]
    wrong = [(cases[index][0] > threshold) != (cases[index][1] != GOOD) for index in order]
    # a score on the threshold itself is a tie: a missed defect (wrong) and a passed good image (right) are equally far
    judged = [(flag, far) for flag, far in zip(wrong, distance, strict=True) if far > 0]
    assert [flag for flag, _ in judged] == sorted((flag for flag, _ in judged), reverse=True)
    assert [far for flag, far in judged if flag] == sorted((far for flag, far in judged if flag), reverse=True)
    assert [far for flag, far in judged if not flag] == sorted(far for flag, far in judged if not flag)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 50))
def test_spread_takes_both_halves_evenly_and_nothing_twice(good, bad, count):
    picked = spread([synthetic_sample(0, 8)] * good + [synthetic_sample(1, 8)] * bad, count)
    assert len(picked) == len(set(picked)) == min(count, good + bad)
    of_good = sum(index < good for index in picked)
    assert of_good >= min(good, count // 2)
    assert len(picked) - of_good >= min(bad, count // 2)


def test_one_class_alone_is_refused():
    with pytest.raises(UserError, match="good and defective"):
        assessed(samples=[sample for sample in SAMPLES if not sample.is_defective])


def test_memory_does_not_grow_with_the_test_set(monkeypatch):
    """72 more images have 2.3 MB of maps; both runs hold a full gallery and a full set of bins."""
    monkeypatch.setattr("flawsmith.evaluation.measure.SAMPLED_PIXELS", 2**9)  # so that few images fill the bins too

    def peak(images):
        tracemalloc.start()
        try:
            assess_synthetic(images, 64, bootstrap=10)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(8)  # caches of the first call
    few, many = peak(36), peak(108)
    assert many < few + 2**20


def test_memory_command_prints_the_peak(capsys):
    main(["--images", "8", "--size", "32", "--bootstrap", "10"])
    assert "8 images of 32 px, 10 resamples: peak" in capsys.readouterr().out

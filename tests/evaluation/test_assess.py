"""The whole evaluation against scikit-learn, its invariants, and its memory."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score
from synthetic import assess_synthetic, contrast_scorer, synthetic_item

from flawsmith.data.dataset import GOOD
from flawsmith.errors import UserError
from flawsmith.evaluation import threshold as threshold_module
from flawsmith.evaluation.assess import DEFECT_KEYS, FAILURES, KEYS, LIMITING, assess, measure, rank_errors, spread
from flawsmith.evaluation.scoring import open_spools
from flawsmith.randomness import numpy_generator

OPTIONS = {"false_alarm_rate": 0.1, "bootstrap": 60, "aupro_limit": 0.3, "batch": 4, "gallery": 8}


@pytest.fixture(scope="module")
def items():
    return [synthetic_item(index, 48) for index in range(20)]


@pytest.fixture(scope="module")
def calibration():
    return [synthetic_item(4 * index, 48) for index in range(50, 70)]


@pytest.fixture(scope="module")
def result(items, calibration):
    return assess(
        contrast_scorer,
        lambda batch: contrast_scorer(batch, 0.7),
        items,
        calibration,
        numpy_generator(0, "test"),
        **OPTIONS,
    )


def test_values_agree_with_scikit_learn_on_all_pixels(result, items):
    loaded = [item.load() for item in items]
    maps, scores = contrast_scorer(np.stack([image for image, _ in loaded]))
    masks = np.stack([mask for _, mask in loaded])
    labels = [item.is_defective for item in items]
    values = result.detector.values
    assert values["image_auroc"].value == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)
    assert values["image_ap"].value == pytest.approx(average_precision_score(labels, scores), abs=1e-9)
    assert values["pixel_auroc"].value == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-3)
    assert values["pixel_ap"].value == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-3)
    names = np.asarray([item.defect for item in items])
    for defect, found in result.detector.by_defect.items():
        of_type = (names == defect) | (names == GOOD)
        assert found["image_auroc"].value == pytest.approx(
            roc_auc_score(names[of_type] == defect, scores[of_type]), abs=1e-9
        )
        expected = roc_auc_score(masks[of_type].ravel(), maps[of_type].ravel())
        assert found["pixel_auroc"].value == pytest.approx(expected, abs=1e-3)


def test_every_value_lies_in_its_interval(result):
    for performance in (result.detector, result.baseline):
        assert set(performance.values) == set(KEYS)
        for estimate in performance.values.values():
            assert 0 <= estimate.low <= estimate.high <= 1
            assert estimate.low < estimate.value < estimate.high
        for values in performance.by_defect.values():
            assert set(values) == set(DEFECT_KEYS)


def test_sharper_scorer_beats_the_blunt_one_by_the_paired_difference(result):
    for key in KEYS:
        expected = result.detector.values[key].value - result.baseline.values[key].value
        assert result.advantage[key].value == pytest.approx(expected)
    assert result.advantage["pixel_auroc"].low > 0


def test_same_detector_twice_has_no_advantage_and_no_doubt_about_it(items, calibration):
    same = assess(contrast_scorer, contrast_scorer, items, calibration, numpy_generator(0, "test"), **OPTIONS)
    assert all(estimate == (0, 0, 0) for estimate in same.advantage.values())


def test_result_depends_on_the_generator_alone(result, items, calibration):
    again = assess(
        contrast_scorer,
        lambda batch: contrast_scorer(batch, 0.7),
        items,
        calibration,
        numpy_generator(0, "test"),
        **OPTIONS | {"batch": 7},
    )
    assert again.detector.values == result.detector.values
    assert again.detector.by_defect == result.detector.by_defect
    assert [example.name for example in again.gallery] == [example.name for example in result.gallery]


def test_rates_are_judged_in_double_precision_as_the_product_judges(monkeypatch):
    """Float32 scores a rounding apart, and a threshold between them that float32 would round up to the higher one."""
    low = np.float32(1.3)
    middle, high = np.nextafter(low, np.float32(2)), np.nextafter(np.nextafter(low, np.float32(2)), np.float32(2))
    names = ["calibration", "calibration", "good", "bad"]
    scores = iter(np.float32([low, middle, middle, high]))
    items = [replace(synthetic_item(index, 16), name=name) for index, name in zip((4, 8, 4, 5), names, strict=True)]
    assert [item.is_defective for item in items] == [False, False, False, True]

    def scorer(images):
        return np.zeros(images.shape[:1] + images.shape[2:], np.float32), np.asarray([next(scores)])

    monkeypatch.setattr(threshold_module, "MARGIN", 0.9)
    with open_spools(2) as (maps, masks):
        (found,) = measure([scorer], items[2:], items[:2], numpy_generator(0, "test"), [maps], masks,
                           false_alarm_rate=0.4, bootstrap=10, aupro_limit=0.3, batch=1)  # fmt: skip
    assert float(middle) < found.threshold.value < float(high)
    assert np.float32(found.threshold.value) == high
    assert (found.test_detections.value, found.test_false_alarms.value) == (1, 0)
    assert found.is_flagged(float(high))


def test_oracle_has_perfect_values_and_finds_everything(items, calibration):
    def oracle(images):
        masks = np.stack([truth[image.tobytes()] for image in images])
        maps = masks.astype(np.float32)
        return maps, maps.max(axis=(1, 2))

    truth = {}
    for item in [*items, *calibration]:
        image, mask = item.load()
        truth[image.tobytes()] = mask
    perfect = assess(oracle, contrast_scorer, items, calibration, numpy_generator(0, "test"), **OPTIONS)
    assert all(estimate == pytest.approx((1, 1, 1)) for estimate in perfect.detector.values.values())
    assert perfect.detector.test_detections.value == 1
    assert perfect.detector.test_false_alarms.value == 0
    assert not any(example.is_wrong for example in perfect.gallery)


def test_threshold_comes_from_calibration_alone(result, items, calibration):
    other = assess(
        contrast_scorer, contrast_scorer, items[:6], calibration, numpy_generator(0, "test"), **OPTIONS
    ).detector
    assert other.threshold == result.detector.threshold
    assert other.pixel_threshold == result.detector.pixel_threshold
    for threshold, scores in (
        (result.detector.threshold, result.detector.calibration.scores),
        (result.detector.pixel_threshold, result.detector.calibration.peaks),
    ):
        assert (scores <= threshold.value).sum() == threshold.rank


def test_rates_count_verdicts(result, items):
    flags = np.asarray([result.detector.is_flagged(float(score)) for score in result.detector.scores.scores])
    defective = np.asarray([item.is_defective for item in items])
    assert result.detector.test_false_alarms.value == flags[~defective].mean()
    assert result.detector.test_detections.value == flags[defective].mean()
    for name, share in result.detector.detections.items():
        assert share.value == flags[[item.defect == name for item in items]].mean()


def test_gallery_holds_the_errors_first_then_the_closest_calls(result):
    wrong = [example.is_wrong for example in result.gallery]
    assert wrong == sorted(wrong, reverse=True)
    assert [example.error for example in result.gallery] == sorted((e.error for e in result.gallery), reverse=True)
    assert len(result.gallery) == OPTIONS["gallery"]
    for example in result.gallery:
        np.testing.assert_allclose(contrast_scorer(example.image[None])[0][0], example.anomaly_map, atol=1e-6)


def test_the_normals_that_set_the_threshold_are_shown_highest_first(result, calibration):
    scores = result.detector.calibration.scores
    highest = np.argsort(-scores)[:LIMITING]
    assert [example.name for example in result.limiting] == [calibration[index].name for index in highest]
    assert [example.score for example in result.limiting] == scores[highest].tolist()
    above = len(scores) - result.detector.threshold.rank
    assert 0 < above < LIMITING
    assert [example.is_wrong for example in result.limiting] == [True] * above + [False] * (LIMITING - above)
    for example in result.limiting:
        np.testing.assert_allclose(contrast_scorer(example.image[None])[0][0], example.anomaly_map, atol=1e-6)


def test_few_normals_are_all_shown(items, calibration):
    few = assess(
        contrast_scorer, contrast_scorer, items, calibration[: LIMITING - 1], numpy_generator(0, "test"), **OPTIONS
    )
    assert {example.name for example in few.limiting} == {item.name for item in calibration[: LIMITING - 1]}


def test_failures_are_the_worst_of_each_class_whatever_the_gallery_shows(result, items, calibration):
    small = assess(
        contrast_scorer,
        contrast_scorer,
        items,
        calibration,
        numpy_generator(0, "test"),
        **OPTIONS | {"gallery": 1},
    )
    for part, is_defective in ((small.misses, True), (small.alarms, False)):
        scores = sorted(
            (float(score) for item, score in zip(items, small.detector.scores.scores, strict=True)
             if item.is_defective == is_defective),
            reverse=not is_defective,
        )  # fmt: skip
        assert [example.score for example in part] == scores[:FAILURES]
        assert all((example.defect != GOOD) == is_defective for example in part)
    assert [example.name for example in small.misses] == [example.name for example in result.misses]


def test_typical_images_cover_each_kind_once(result):
    assert [example.defect for example in result.typical] == [*result.defects, GOOD]


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
    items = [synthetic_item(0, 8)] * good + [synthetic_item(1, 8)] * bad
    picked = spread(items, count)
    assert len(picked) == len(set(picked)) == min(count, good + bad)
    of_good = sum(index < good for index in picked)
    assert of_good >= min(good, count // 2)
    assert len(picked) - of_good >= min(bad, count // 2)


def test_one_class_alone_is_refused(items, calibration):
    good = [item for item in items if not item.is_defective]
    with pytest.raises(UserError, match="good and defective"):
        assess(contrast_scorer, contrast_scorer, good, calibration, numpy_generator(0, "test"), **OPTIONS)


def test_memory_does_not_grow_with_the_test_set(monkeypatch):
    """72 more images have 2.3 MB of maps; both runs hold a full gallery and a full set of bins."""
    monkeypatch.setattr("flawsmith.evaluation.assess.SAMPLED_PIXELS", 2**9)  # so that few images fill the bins too

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

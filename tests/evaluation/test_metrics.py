"""Ranking metrics against scikit-learn and first principles."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from flawsmith.evaluation import metrics
from flawsmith.evaluation.metrics import METRICS, Binned, aupro, auroc, average_precision, f1_max

scored = st.integers(2, 40).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(0, 12), min_size=count, max_size=count),  # few values: many ties
        st.lists(st.booleans(), min_size=count, max_size=count).filter(lambda labels: len(set(labels)) == 2),
    )
)


def sklearn_ranking(labels, scores, weights=None):
    precision, recall, _ = precision_recall_curve(labels, scores, sample_weight=weights)
    with np.errstate(invalid="ignore"):
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    return (
        roc_auc_score(labels, scores, sample_weight=weights),
        average_precision_score(labels, scores, sample_weight=weights),
        f1.max(),
    )


def ranking(counts):
    return auroc(counts), average_precision(counts), f1_max(counts)


@given(scored)
def test_image_ranking_equals_scikit_learn_under_ties(case):
    scores, labels = np.asarray(case[0], np.float32), np.asarray(case[1])
    counts = metrics.counts_by_score(scores, labels, np.ones((1, len(scores)), np.int64))
    np.testing.assert_allclose(np.ravel(ranking(counts)), sklearn_ranking(labels, scores), atol=1e-12)


@given(scored, st.integers(0, 100))
@settings(max_examples=15)
def test_weighted_rows_equal_scikit_learn_with_sample_weights(case, seed):
    scores, labels = np.asarray(case[0], np.float32), np.asarray(case[1])
    weights = np.random.default_rng(seed).integers(1, 4, (3, len(scores)))
    found = ranking(metrics.counts_by_score(scores, labels, weights))
    for row in range(3):
        expected = sklearn_ranking(labels, scores, weights[row])
        np.testing.assert_allclose([value[row] for value in found], expected, atol=1e-12)


def random_maps(count, size, seed, contrast=1.5):
    """Smooth noise maps with small bright regions: defect pixels are rare, as in real test sets."""
    generator = np.random.default_rng(seed)
    maps = ndimage.gaussian_filter(generator.standard_normal((count, size, size)), (0, 2, 2)).astype(np.float32) * 6
    masks = np.zeros(maps.shape, np.bool_)
    for index in range(0, count, 2):
        for _ in range(generator.integers(1, 4)):
            row, column = generator.integers(0, size - 8, 2)
            masks[index, row : row + generator.integers(2, 8), column : column + generator.integers(2, 8)] = True
    maps[masks] += generator.normal(contrast, 1, masks.sum()).astype(np.float32)
    return maps, masks


def counts_of(maps, masks, bins=metrics.BINS_PER_CLASS):
    edges = metrics.bin_edges(maps[~masks], maps[masks], bins)
    return Binned(*np.stack([metrics.pixel_counts(*pair, edges) for pair in zip(maps, masks, strict=True)]).sum(axis=0))


@pytest.mark.parametrize("contrast", [0.3, 1.5, 4.0])
def test_binned_pixel_ranking_agrees_with_exact_scikit_learn(contrast):
    maps, masks = random_maps(24, 96, 1, contrast)
    assert np.unique(maps).size > 20 * metrics.BINS_PER_CLASS  # so that binning is at work
    found = ranking(counts_of(maps, masks))
    np.testing.assert_allclose(found, sklearn_ranking(masks.ravel(), maps.ravel()), atol=1e-3)


def exact_aupro(maps, masks, limit):
    """Every distinct value a threshold, each region's overlap computed by itself."""
    regions = []
    for anomaly_map, mask in zip(maps, masks, strict=True):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [np.sort(anomaly_map[labels == label]) for label in range(1, count + 1)]
    normal = np.sort(maps[~masks])
    thresholds = np.unique(maps)[::-1]
    fpr = np.concatenate([[0], 1 - np.searchsorted(normal, thresholds) / len(normal)])
    overlap = np.mean([1 - np.searchsorted(region, thresholds) / len(region) for region in regions], axis=0)
    pro = np.concatenate([[0], overlap])
    grid = np.append(fpr[fpr < limit], limit)
    return np.trapezoid(np.append(pro[fpr < limit], np.interp(limit, fpr, pro)), grid) / limit


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_agrees_with_its_definition(limit):
    maps, masks = random_maps(8, 48, 2)
    found = aupro(counts_of(maps, masks)._replace(limit=limit))
    assert found == pytest.approx(exact_aupro(maps, masks, limit), abs=1e-3)


def test_perfect_map_has_all_values_one():
    _, masks = random_maps(4, 32, 3)
    maps = masks.astype(np.float32)
    counts = counts_of(maps, masks)._replace(limit=0.3)
    assert [metric.value(counts) for metric in METRICS.values() if metric.of_pixels] == pytest.approx([1, 1, 1, 1])


def test_constant_map_knows_nothing():
    _, masks = random_maps(4, 32, 3)
    counts = counts_of(np.zeros(masks.shape, np.float32), masks)._replace(limit=0.3)
    assert auroc(counts) == pytest.approx(0.5)
    assert average_precision(counts) == pytest.approx(masks.mean())
    assert aupro(counts) == pytest.approx(0.15)  # the diagonal's area up to .3, over .3


def test_large_region_weighs_no_more_than_a_small_one_in_aupro():
    mask = np.zeros((32, 32), np.bool_)
    mask[2:22, 2:22] = True  # 400 pixels, missed
    mask[28:30, 28:30] = True  # 4 pixels, found
    anomaly_map = np.zeros((32, 32), np.float32)
    anomaly_map[28:30, 28:30] = 1
    anomaly_map[mask & (anomaly_map == 0)] = -1
    counts = metrics.pixel_counts(anomaly_map, mask, np.asarray([-1, 0, 1], np.float32))
    assert aupro(Binned(*counts, limit=0.3)) == pytest.approx(0.5)


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_region_shares_sum_to_the_number_of_regions(seed):
    mask = np.random.default_rng(seed).random((20, 20)) < 0.3
    shares = metrics.region_shares(mask)
    assert shares.sum() == pytest.approx(ndimage.label(mask, np.ones((3, 3)))[1])
    assert not shares[~mask].any()


def test_diagonal_pixels_are_one_region():
    assert metrics.region_shares(np.eye(3, dtype=np.bool_)).sum() == pytest.approx(1)


def test_counts_lose_no_pixel_and_bins_are_even():
    maps, masks = random_maps(6, 64, 4)
    normal, inside, overlap, _ = counts_of(maps, masks, bins=64)
    assert normal.sum() == (~masks).sum()
    assert inside.sum() == masks.sum()
    assert overlap.sum() == pytest.approx(sum(ndimage.label(mask, np.ones((3, 3)))[1] for mask in masks))
    assert normal.max() <= 1.05 * normal.sum() / 63 + 1
    assert inside.max() <= 1.05 * inside.sum() / 63 + 1


def test_curve_runs_from_nothing_flagged_to_everything():
    found = metrics.curve(Binned(np.asarray([5.0, 3, 0]), np.asarray([0.0, 1, 4])))
    np.testing.assert_allclose(found.false_positive_rate, [0, 0, 3 / 8, 1])
    np.testing.assert_allclose(found.recall, [0, 0.8, 1, 1])
    np.testing.assert_allclose(found.precision, [1, 1, 5 / 8, 5 / 13])

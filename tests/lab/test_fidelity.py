"""Distances of distributions keep their mathematical promises; windows obey one law."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith_lab import fidelity
from flawsmith_lab.fidelity import MEASURES, MIN_SAMPLES, WINDOW, Space, compare, frechet, kid, precision_recall

SEEDS = st.integers(0, 10_000)


def normal(seed, count=60, width=6, shift=0.0):
    return np.random.default_rng(seed).standard_normal((count, width)) + shift


@given(SEEDS, st.floats(-5, 5), st.floats(0.1, 4))
def test_frechet_is_zero_to_itself_symmetric_and_known_for_a_shift_and_a_scale(seed, shift, scale):
    one, other = normal(seed), normal(seed + 1) * 2
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet(one, other) == pytest.approx(frechet(other, one), rel=1e-6)
    assert frechet(one, one + shift) == pytest.approx(one.shape[1] * shift**2, abs=1e-8)
    one -= one.mean(axis=0)
    # covariances S and s^2 S: tr(S)(1 - s)^2
    assert frechet(one, scale * one) == pytest.approx(np.trace(np.cov(one.T)) * (1 - scale) ** 2, rel=1e-6, abs=1e-9)


def test_kid_is_the_definition_s_sums_and_has_mean_zero_for_equal_distributions():
    one, other = normal(0, 5, 3), normal(1, 4, 3, shift=1)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    inside = np.mean([kernel(a, b) for i, a in enumerate(one) for j, b in enumerate(one) if i != j])
    outside = np.mean([kernel(a, b) for i, a in enumerate(other) for j, b in enumerate(other) if i != j])
    across = np.mean([kernel(a, b) for a in one for b in other])
    assert kid(one, other) == pytest.approx(inside + outside - 2 * across)
    values = np.asarray([kid(normal(2 * seed, 15), normal(2 * seed + 1, 12)) for seed in range(600)])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert (values < 0).any()  # unbiased, so not clipped


@given(SEEDS)
def test_precision_and_recall_are_one_on_the_same_set_and_zero_on_far_ones(seed):
    one, other = normal(seed, 20), normal(seed + 1, 20, shift=0.5)
    assert precision_recall(one, one) == (1, 1)
    assert precision_recall(one, one + 100) == (0, 0)
    assert precision_recall(other, one) == precision_recall(one, other)[::-1]


def test_copies_of_one_real_defect_are_precise_and_recall_little():
    real = normal(0, 40)
    precision, recall = precision_recall(real, real[:1] + 1e-3 * normal(1, 40))
    assert precision == 1
    assert recall <= 0.05


def test_a_space_scales_by_the_normals_and_ignores_dead_channels():
    normals = normal(0, 200) * np.array([1, 10, 100, 1, 0, 1]) + 7
    space = Space.of(normals, 3)
    scaled = space.scaled(normals)
    assert scaled.shape == (200, 5)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(scaled.std(axis=0), 1)
    spread = space.projected(scaled).var(axis=0)
    assert spread.shape == (3,)
    assert (np.diff(spread) <= 0).all()
    assert spread[0] == pytest.approx(np.linalg.eigvalsh(np.cov(scaled.T, bias=True))[-1])


def test_rows_come_in_the_order_of_nearness_and_the_same_generator_gives_the_same_table():
    def measured():
        others = {"close": normal(1, 50, 12, shift=1), "far": normal(2, 70, 12, shift=-1)}
        return compare(normal(0, 60, 12, shift=1), others, normal(3, 100, 12), np.random.default_rng(0), subsets=40)

    table = measured()
    assert table == measured()
    assert (table.samples, table.dimensions, table.crops) == (30, 12, {"real": 60, "close": 50, "far": 70})
    for values in table.rows.values():
        assert set(values) == set(MEASURES)
        assert all(estimate.low <= estimate.value <= estimate.high for estimate in values.values())
    for measure in ("frechet", "kid"):
        assert table.rows["close"][measure].high < table.rows["far"][measure].low
    chance = table.rows["real"]["kid"]
    assert chance.low < 0 < chance.high
    assert "30 crops a subset of 60 real, 50 close, 70 far" in table.table()


@pytest.mark.parametrize("sizes", [(2 * MIN_SAMPLES - 1, 50), (50, MIN_SAMPLES - 1)])
def test_too_few_crops_of_a_kind_are_no_table(sizes):
    real, other = (normal(seed, size) for seed, size in enumerate(sizes))
    assert compare(real, {"synthetic": other}, normal(2), np.random.default_rng(0), subsets=2) is None


@given(st.integers(WINDOW, 120), st.integers(WINDOW, 120), SEEDS)
def test_windows_lie_inside_and_hold_their_place(height, width, seed):
    generator = np.random.default_rng(seed)
    image = generator.random((3, height, width), np.float32)
    for place in ((0, 0), (height - 1, width - 1), fidelity.random_place(image, generator)):
        window = fidelity.crop(image, place)
        assert window.shape == (3, WINDOW, WINDOW)
        assert image[(0, *place)] in window[0]


def test_the_place_is_in_the_largest_region_nearest_its_middle():
    mask = np.zeros((40, 40), np.bool_)
    mask[2:4, 2:4] = True
    mask[20:25, 10:31] = True
    assert fidelity.defect_place(mask) == (22, 20)
    ring = np.zeros((40, 40), np.bool_)
    ring[10:31, 10:31] = True
    ring[12:29, 12:29] = False
    assert ring[fidelity.defect_place(ring)]  # the centroid itself is a hole


@given(st.integers(0, 3 * fidelity.MAX_CROPS), SEEDS)
def test_a_pick_is_sorted_and_without_replacement(count, seed):
    chosen = fidelity.pick(count, np.random.default_rng(seed))
    assert len(chosen) == min(count, fidelity.MAX_CROPS)
    assert list(chosen) == sorted(set(chosen))
    assert all(0 <= index < count for index in chosen)

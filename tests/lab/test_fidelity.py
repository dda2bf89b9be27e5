"""Distances of distributions keep their mathematical promises; windows obey one law."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith_lab.fidelity import (
    MAX_CROPS,
    MEASURES,
    MIN_SAMPLES,
    WINDOW,
    Space,
    compare,
    crop,
    defect_place,
    frechet,
    kid,
    pick,
    precision_recall,
    random_place,
)

SEEDS = st.integers(0, 10_000)


def normal(seed, count=60, width=6, shift=0.0):
    return np.random.default_rng(seed).standard_normal((count, width)) + shift


@given(SEEDS, st.floats(-5, 5))
def test_frechet_is_zero_to_itself_symmetric_and_the_square_of_a_translation(seed, shift):
    one, other = normal(seed), normal(seed + 1) * 2
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert frechet(one, other) == pytest.approx(frechet(other, one), rel=1e-6)
    assert frechet(one, one + shift) == pytest.approx(one.shape[1] * shift**2, abs=1e-8)
    assert frechet(one + shift, other + shift) == pytest.approx(frechet(one, other), rel=1e-6)


@given(SEEDS, st.floats(0.1, 4))
def test_frechet_of_scaled_samples_is_known(seed, scale):
    one = normal(seed)
    one -= one.mean(axis=0)
    # covariances S and s^2 S: tr(S)(1 - s)^2
    assert frechet(one, scale * one) == pytest.approx(np.trace(np.cov(one.T)) * (1 - scale) ** 2, rel=1e-6, abs=1e-9)


@given(SEEDS)
def test_no_distance_depends_on_the_order_of_rows(seed):
    one, other = normal(seed, 20), normal(seed + 1, 25, shift=0.5)
    generator = np.random.default_rng(seed)
    mixed = generator.permutation(one), generator.permutation(other)
    assert frechet(*mixed) == pytest.approx(frechet(one, other), rel=1e-6)
    assert kid(*mixed) == pytest.approx(kid(one, other), rel=1e-9, abs=1e-12)
    assert precision_recall(*mixed) == precision_recall(one, other)


def test_kid_has_mean_zero_for_equal_distributions_and_grows_with_a_shift():
    values = np.asarray([kid(normal(2 * seed, 15), normal(2 * seed + 1, 12)) for seed in range(600)])
    assert abs(values.mean()) < 3 * values.std() / np.sqrt(len(values))
    assert (values < 0).any()  # unbiased, so not clipped
    means = [
        np.mean([kid(normal(2 * seed, 15), normal(2 * seed + 1, 12, shift=shift)) for seed in range(60)])
        for shift in (0, 0.5, 1, 2)
    ]
    assert means == sorted(means)
    assert means[1] > 5 * values.std() / np.sqrt(len(values))


def test_kid_is_the_definition_s_sums():
    one, other = normal(0, 5, 3), normal(1, 4, 3, shift=1)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    inside = np.mean([kernel(a, b) for i, a in enumerate(one) for j, b in enumerate(one) if i != j])
    outside = np.mean([kernel(a, b) for i, a in enumerate(other) for j, b in enumerate(other) if i != j])
    across = np.mean([kernel(a, b) for a in one for b in other])
    assert kid(one, other) == pytest.approx(inside + outside - 2 * across)


@given(SEEDS)
def test_precision_and_recall_are_one_on_the_same_set_and_zero_on_far_ones(seed):
    one = normal(seed, 20)
    assert precision_recall(one, one) == (1, 1)
    assert precision_recall(one, one + 100) == (0, 0)
    one_way = precision_recall(one, normal(seed + 1, 20, shift=0.5))
    assert precision_recall(normal(seed + 1, 20, shift=0.5), one) == one_way[::-1]


def test_copies_of_one_real_defect_are_precise_and_recall_little():
    real = normal(0, 40)
    copies = real[:1] + 1e-3 * normal(1, 40)
    precision, recall = precision_recall(real, copies)
    assert precision == 1
    assert recall <= 0.05


def test_a_space_scales_by_the_normals_and_ignores_dead_channels():
    normals = normal(0, 200) * np.array([1, 10, 100, 1, 0, 1]) + 7
    space = Space.of(normals, 3)
    scaled = space.scaled(normals)
    assert scaled.shape == (200, 5)
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(scaled.std(axis=0), 1)
    projected = space.projected(scaled)
    assert projected.shape == (200, 3)
    spread = projected.var(axis=0)
    assert (np.diff(spread) <= 0).all()
    assert spread[0] == pytest.approx(np.linalg.eigvalsh(np.cov(scaled.T, bias=True))[-1])


@pytest.fixture(scope="module")
def table():
    real = normal(0, 60, 12, shift=1)
    others = {"close": normal(1, 50, 12, shift=1), "far": normal(2, 70, 12, shift=-1)}
    return compare(real, others, normal(3, 100, 12), np.random.default_rng(0), subsets=40)


def test_rows_come_in_the_order_of_nearness(table):
    assert table.samples == 30
    assert table.dimensions == 12
    assert table.crops == {"real": 60, "close": 50, "far": 70}
    assert set(table.rows) == {"real", "close", "far"}
    for values in table.rows.values():
        assert set(values) == set(MEASURES)
        assert all(estimate.low <= estimate.value <= estimate.high for estimate in values.values())
    for measure in ("frechet", "kid"):
        assert table.rows["close"][measure].high < table.rows["far"][measure].low
    assert table.rows["far"]["recall"].high < table.rows["close"]["recall"].low
    chance = table.rows["real"]["kid"]
    assert chance.low < 0 < chance.high


def test_the_same_generator_gives_the_same_table(table):
    real = normal(0, 60, 12, shift=1)
    others = {"close": normal(1, 50, 12, shift=1), "far": normal(2, 70, 12, shift=-1)}
    assert compare(real, others, normal(3, 100, 12), np.random.default_rng(0), subsets=40) == table


@pytest.mark.parametrize("sizes", [(2 * MIN_SAMPLES - 1, 50), (50, MIN_SAMPLES - 1)])
def test_too_few_crops_of_a_kind_are_no_table(sizes):
    real, other = (normal(seed, size) for seed, size in enumerate(sizes))
    assert compare(real, {"synthetic": other}, normal(2), np.random.default_rng(0), subsets=2) is None


def test_as_many_components_as_half_the_crops_allow():
    found = compare(normal(0, 16), {"synthetic": normal(1, 9)}, normal(2), np.random.default_rng(0), subsets=3)
    assert found is not None
    assert (found.samples, found.dimensions) == (8, 4)


@given(st.integers(WINDOW, 120), st.integers(WINDOW, 120), SEEDS)
def test_windows_lie_inside_and_hold_their_place(height, width, seed):
    generator = np.random.default_rng(seed)
    image = generator.random((3, height, width), np.float32)
    for place in ((0, 0), (height - 1, width - 1), random_place(image, generator)):
        window = crop(image, place)
        assert window.shape == (3, WINDOW, WINDOW)
        assert image[(0, *place)] in window[0]
        assert window.base is None


def test_random_places_reach_every_window():
    image = np.zeros((3, WINDOW + 2, WINDOW), np.float32)
    generator = np.random.default_rng(0)
    places = {random_place(image, generator) for _ in range(100)}
    assert places == {(WINDOW // 2 + row, WINDOW // 2) for row in range(3)}


def test_the_place_is_in_the_largest_region_nearest_its_middle():
    mask = np.zeros((40, 40), np.bool_)
    mask[2:4, 2:4] = True
    mask[20:25, 10:31] = True
    assert defect_place(mask) == (22, 20)
    ring = np.zeros((40, 40), np.bool_)
    ring[10:31, 10:31] = True
    ring[12:29, 12:29] = False
    assert ring[defect_place(ring)]  # the centroid itself is a hole
    diagonal = np.eye(9, dtype=np.bool_)
    assert defect_place(diagonal) == (4, 4)  # eight neighbours: one region


@given(st.integers(0, 3 * MAX_CROPS), SEEDS)
def test_a_pick_is_without_replacement(count, seed):
    chosen = pick(count, np.random.default_rng(seed))
    assert len(chosen) == len(set(chosen)) == min(count, MAX_CROPS)
    assert list(chosen) == sorted(chosen)
    assert all(0 <= index < count for index in chosen)

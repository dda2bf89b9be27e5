"""Properties of the statistics behind a study's table."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from flawsmith_lab.study.statistics import bootstrap_difference, over_categories, over_seeds, paired_test, spread

values = st.floats(-1, 1).map(lambda value: round(value, 6))
differences = st.lists(values, min_size=1, max_size=9)


@given(differences)
def test_swapping_the_rows_turns_the_sign_and_keeps_the_p_values_which_are_probabilities(found):
    one, other = paired_test(found), paired_test([-value for value in found])
    assert one.mean == pytest.approx(-other.mean, abs=1e-12)
    assert one.wilcoxon == pytest.approx(other.wilcoxon)
    assert one.t == pytest.approx(other.t, nan_ok=True)
    assert one.smallest - 1e-12 <= one.wilcoxon <= 1
    assert math.isnan(one.t) or 0 <= one.t <= 1
    same = paired_test([0 * value for value in found])
    assert (same.mean, same.t, same.wilcoxon) == (0.0, 1.0, 1.0)


@given(st.integers(1, 10))
def test_the_smallest_p_is_reached_when_all_pairs_agree(n):
    test = paired_test([0.1 * (index + 1) for index in range(n)])
    assert test.wilcoxon == pytest.approx(test.smallest)
    assert test.can_be_significant == (n >= 6)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=9, unique=True), st.data())
def test_the_tests_are_scipys(sizes, data):
    signs = data.draw(st.lists(st.sampled_from([-1, 1]), min_size=len(sizes), max_size=len(sizes)))
    found = [sign * size / 1000 for sign, size in zip(signs, sizes, strict=True)]
    assert paired_test(found).wilcoxon == pytest.approx(stats.wilcoxon(found, method="exact").pvalue)
    assert paired_test(found).t == pytest.approx(stats.ttest_1samp(found, 0).pvalue)


def test_pairs_without_spread_or_partner_have_no_t():
    assert math.isnan(paired_test([0.1]).t)
    assert math.isnan(paired_test([0.1, 0.1, 0.1]).t)
    assert math.isnan(paired_test([]).wilcoxon)


def test_many_pairs_are_tested_too():
    generator = np.random.default_rng(0)
    assert paired_test(list(generator.normal(0.5, 0.1, 40))).wilcoxon < 1e-6
    assert paired_test(list(generator.normal(0, 0.1, 40))).wilcoxon > 0.01


def test_spread_is_the_sample_deviation_and_one_value_has_none():
    found = spread([1.0, 2.0, 4.0])
    assert (found.n, found.mean, found.deviation) == (3, pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert math.isnan(spread([1.0]).deviation)
    assert spread([]).n == 0


@given(st.integers(1, 5), st.integers(10, 60), st.integers(0, 1000))
def test_more_seeds_on_the_same_images_do_not_narrow_the_interval(seeds, resamples, seed):
    generator = np.random.default_rng(seed)
    draws = [generator.normal(0.1, 0.02, resamples) for _ in range(seeds)]
    joined = over_seeds(draws)
    assert joined.mean() == pytest.approx(np.mean(draws))
    assert np.ptp(joined) == pytest.approx(np.mean([np.ptp(one) for one in draws]))


def test_independent_categories_do_narrow_the_interval():
    generator = np.random.default_rng(1)
    draws = [np.sort(generator.normal(0, 1, 4000)) for _ in range(4)]
    assert over_categories(draws, generator).std() == pytest.approx(0.5, rel=0.1)


def test_a_difference_beyond_the_images_noise_is_seen_and_one_within_is_not():
    generator = np.random.default_rng(2)
    seeds = [generator.normal(0.05, 0.01, 1000) for _ in range(3)]
    seen, hidden = (
        bootstrap_difference(value, [[one - 0.05 + value for one in seeds]], generator) for value in (0.05, 0.005)
    )
    assert seen is not None
    assert hidden is not None
    assert seen.low > 0
    assert hidden.low < 0 < hidden.high


@pytest.mark.parametrize("draws", [[], [[]], [[np.zeros(5)], []], [[np.zeros(5), np.zeros(6)]]])
def test_what_cannot_be_paired_has_no_interval(draws):
    assert bootstrap_difference(0.1, draws, np.random.default_rng(0)) is None

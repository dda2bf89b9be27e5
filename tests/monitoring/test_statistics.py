"""Properties of the drift statistics: valid p-values without drift, power with it, and what must not change them."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from flawsmith.monitoring.statistics import (
    Comparison,
    compare_ks,
    compare_mmd,
    compare_psi,
    holm,
    permutation_p_value,
    population_stability_index,
    rbf_kernel,
)

ROUNDS = 99
Sample = NDArray[np.float64]


def psi(reference: Sample, current: Sample, generator: np.random.Generator) -> Comparison:
    return compare_psi(reference[:, 0], current[:, 0], 10, ROUNDS, generator)


def ks(reference: Sample, current: Sample, generator: np.random.Generator) -> Comparison:
    return compare_ks(reference[:, 0], current[:, 0])


def mmd(reference: Sample, current: Sample, generator: np.random.Generator) -> Comparison:
    return compare_mmd(reference, current, ROUNDS, generator)


COMPARE = pytest.mark.parametrize("compare", [psi, ks, mmd])
Compare = Callable[[Sample, Sample, np.random.Generator], Comparison]


def draw(generator: np.random.Generator, count: int, shift: float = 0.0) -> Sample:
    """Skewed, correlated, of very different scales: nothing here is Gaussian."""
    values = generator.gamma(2.0, size=(count, 4)) + generator.gamma(1.0, size=(count, 1)) + shift
    return values * np.array([1.0, 100.0, 0.01, 5.0])


@COMPARE
@pytest.mark.parametrize(("n", "m"), [(15, 60), (60, 20)])
def test_no_drift_raises_no_more_alarms_than_alpha(compare: Compare, n: int, m: int) -> None:
    trials = 250
    generator = np.random.default_rng(1)
    p_values = np.array([compare(draw(generator, n), draw(generator, m), generator).p_value for _ in range(trials)])
    assert p_values.min() > 0
    assert p_values.max() <= 1
    for alpha in (0.02, 0.1, 0.3):  # a valid p-value passes all three; 0.1 % is the chance that a valid one fails
        assert np.sum(p_values <= alpha) <= binom.ppf(0.999, trials, alpha)


@COMPARE
def test_a_shift_is_detected(compare: Compare) -> None:
    generator = np.random.default_rng(2)
    found = [compare(draw(generator, 40), draw(generator, 40, shift=3.0), generator) for _ in range(20)]
    assert all(item.p_value <= 0.01 and item.effect > 0 for item in found)


@COMPARE
def test_the_order_of_images_does_not_matter(compare: Compare) -> None:
    generator = np.random.default_rng(3)
    reference, current = draw(generator, 30), draw(generator, 25, shift=0.5)
    expected = compare(reference, current, np.random.default_rng(0)).value
    for _ in range(5):
        shuffled = compare(generator.permutation(reference), generator.permutation(current), np.random.default_rng(0))
        assert shuffled.value == pytest.approx(expected, rel=1e-9)


@COMPARE
def test_a_generator_of_the_same_seed_gives_the_same_answer(compare: Compare) -> None:
    generator = np.random.default_rng(4)
    reference, current = draw(generator, 30), draw(generator, 25)
    first, second = (compare(reference, current, np.random.default_rng(9)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("n", "m"), [(20, 20), (30, 200)])
def test_the_expected_values_are_the_means_without_drift(n: int, m: int) -> None:
    generator = np.random.default_rng(5)
    pairs = [(draw(generator, n), draw(generator, m)) for _ in range(200)]
    for compare, tolerance in ((psi, 0.1), (ks, 0.1)):
        found = [compare(reference, current, generator) for reference, current in pairs]
        assert np.mean([item.value for item in found]) == pytest.approx(
            np.mean([item.expected for item in found]), rel=tolerance
        )


def test_few_images_alone_make_psi_large_but_no_effect() -> None:
    generator = np.random.default_rng(6)
    found = [psi(draw(generator, 30), draw(generator, 30), generator) for _ in range(100)]
    assert np.mean([item.value for item in found]) > 0.25  # the customary limit for "significant shift"
    assert abs(np.mean([item.effect for item in found])) < 0.05


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60), st.integers(2, 12))
def test_psi_of_identical_samples_is_zero(values: list[float], bins: int) -> None:
    scores = np.asarray(values)
    assert population_stability_index(scores, scores, bins) == 0


@given(
    st.lists(st.floats(-100, 100), min_size=1, max_size=40),
    st.lists(st.floats(-100, 100), min_size=1, max_size=40),
)
def test_psi_is_finite_and_never_negative(before: list[float], after: list[float]) -> None:
    value = population_stability_index(np.asarray(before), np.asarray(after))
    assert np.isfinite(value)
    assert value >= 0


def test_psi_of_two_bins_by_hand() -> None:
    # median 1.5; reference 2 | 2, current 1 | 3; smoothed (2.5, 2.5) / 5 and (1.5, 3.5) / 5
    value = population_stability_index(np.array([0.0, 1, 2, 3]), np.array([0.0, 2, 3, 3]), bins=2)
    assert value == pytest.approx((0.3 - 0.5) * np.log(0.3 / 0.5) + (0.7 - 0.5) * np.log(0.7 / 0.5))


def test_mmd_is_unbiased() -> None:
    generator = np.random.default_rng(7)
    values = np.array([compare_mmd(draw(generator, 20), draw(generator, 30), 1, generator).value for _ in range(600)])
    assert values.min() < 0  # as an unbiased estimate of 0 must be at times
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))


def test_mmd_agrees_with_the_sums_of_the_paper() -> None:
    generator = np.random.default_rng(8)
    reference, current = draw(generator, 7), draw(generator, 5, shift=1.0)
    kernel = rbf_kernel(np.concatenate([reference, current]))
    x, y = range(7), range(7, 12)
    expected = (
        sum(kernel[i, j] for i in x for j in x if i != j) / (7 * 6)
        + sum(kernel[i, j] for i in y for j in y if i != j) / (5 * 4)
        - 2 * sum(kernel[i, j] for i in x for j in y) / (7 * 5)
    )
    assert compare_mmd(reference, current, 1, generator).value == pytest.approx(expected)


def test_a_few_strange_images_cannot_move_mmd_beyond_their_share_squared() -> None:
    generator = np.random.default_rng(9)
    reference, current = draw(generator, 100), draw(generator, 100)
    current[:10] = 1e4
    assert compare_mmd(reference, current, ROUNDS, generator).value < 2 * 0.1**2 + 0.01


def test_a_channel_that_never_changes_counts_for_nothing() -> None:
    generator = np.random.default_rng(10)
    values = draw(generator, 20)
    constant = np.full((20, 1), 3.0) + 1e-12 * generator.random((20, 1))
    assert np.array_equal(rbf_kernel(np.hstack([values, constant])), rbf_kernel(values))


def test_identical_images_are_no_drift() -> None:
    same = np.ones((12, 3))
    found = compare_mmd(same[:6], same[6:], ROUNDS, np.random.default_rng(0))
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.p_value == 1


def test_large_samples_leave_the_exact_ks_without_a_warning() -> None:
    generator = np.random.default_rng(11)
    assert compare_ks(generator.normal(size=12_000), generator.normal(1, size=50)).p_value < 1e-6


def test_a_permutation_p_value_counts_the_observed_one() -> None:
    draws = np.array([0.0, 1.0, 2.0])
    assert [permutation_p_value(value, draws) for value in (5.0, 2.0, 0.5, -1.0)] == [0.25, 0.5, 0.75, 1.0]


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.5 times 4, 3, 2, 1, made monotone
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_p_value_and_bonferroni(p_values: list[float]) -> None:
    for raw, adjusted in zip(p_values, holm(p_values), strict=True):
        assert raw <= adjusted <= min(1.0, raw * len(p_values)) + 1e-12

"""Properties of the drift statistics: valid p-values without drift, power with it, and what must not change them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom

from flawsmith.monitoring.statistics import (
    compare_mmd,
    permutation_p_value,
    population_stability_index,
    rbf_kernel,
)

ROUNDS = 99
Sample = NDArray[np.float64]


def draw(generator: np.random.Generator, count: int, shift: float = 0.0) -> Sample:
    """Skewed, correlated, of very different scales: nothing here is Gaussian."""
    values = generator.gamma(2.0, size=(count, 4)) + generator.gamma(1.0, size=(count, 1)) + shift
    return values * np.array([1.0, 100.0, 0.01, 5.0])


@pytest.mark.parametrize(("n", "m"), [(15, 60), (60, 20)])
def test_no_drift_raises_no_more_alarms_than_alpha(n: int, m: int) -> None:
    trials = 250
    generator = np.random.default_rng(1)
    found = [compare_mmd(draw(generator, n), draw(generator, m), ROUNDS, generator) for _ in range(trials)]
    p_values, values = np.array([item.p_value for item in found]), np.array([item.value for item in found])
    assert p_values.min() > 0
    assert p_values.max() <= 1
    for alpha in (0.02, 0.1, 0.3):  # a valid p-value passes all three; 0.1 % is the chance that a valid one fails
        assert np.sum(p_values <= alpha) <= binom.ppf(0.999, trials, alpha)
    assert values.min() < 0  # as an unbiased estimate of 0 must be at times
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(trials)


def test_a_shift_is_detected() -> None:
    generator = np.random.default_rng(2)
    for _ in range(10):
        reference, current = draw(generator, 40), draw(generator, 40, shift=3.0)
        found = compare_mmd(reference, current, ROUNDS, generator)
        assert found.p_value <= 0.01
        assert found.value > found.expected == 0
        assert population_stability_index(reference[:, 0], current[:, 0]) > 0.5


def test_the_order_of_images_does_not_matter() -> None:
    generator = np.random.default_rng(3)
    reference, current = draw(generator, 30), draw(generator, 25, shift=0.5)
    turned = generator.permutation(reference), generator.permutation(current)
    first, second = (compare_mmd(*pair, ROUNDS, np.random.default_rng(0)) for pair in ((reference, current), turned))
    assert second.value == pytest.approx(first.value, rel=1e-9)
    assert first == compare_mmd(reference, current, ROUNDS, np.random.default_rng(0))
    assert population_stability_index(*(part[:, 0] for part in turned)) == population_stability_index(
        reference[:, 0], current[:, 0]
    )


SCORES = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 7.0]) | st.floats(-5, 5), min_size=1, max_size=30)


@given(SCORES, SCORES)
def test_psi_is_finite_and_not_negative_even_where_values_are_tied(before: list[float], after: list[float]) -> None:
    value = population_stability_index(np.asarray(before), np.asarray(after))
    assert np.isfinite(value)
    assert value >= 0
    assert population_stability_index(np.asarray(before), np.asarray(before)) == pytest.approx(0)


def test_psi_by_hand() -> None:
    # the quantiles are 0 and 1: three bins, the last of which holds 1 of the new ones alone
    value = population_stability_index(np.array([0.0] * 5 + [1.0] * 5), np.array([0.0, 1.0, 1.0, 9.0]))
    p, q = np.array([5.5, 5.5, 0.5]) / 11.5, np.array([1.5, 2.5, 1.5]) / 5.5
    assert value == pytest.approx(((q - p) * np.log(q / p)).sum())


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


def test_a_permutation_p_value_counts_the_observed_one() -> None:
    draws = np.array([0.0, 1.0, 2.0])
    assert [permutation_p_value(value, draws) for value in (5.0, 2.0, 0.5, -1.0)] == [0.25, 0.5, 0.75, 1.0]

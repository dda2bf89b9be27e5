"""The conformal threshold keeps its promise."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith.errors import UserError
from flawsmith.evaluation.threshold import conformal_threshold, reachable_thresholds


@given(st.integers(1, 400), st.floats(0.001, 0.5))
def test_rank_is_the_conformal_one_or_the_last(count, rate):
    scores = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    found = conformal_threshold(scores, rate)
    assert found.rank == (scores <= found.value).sum()
    if count > 1:  # a hair above that score, so that rounding flips nothing
        assert found.value > np.sort(scores)[found.rank - 1]
    assert found.expected_rate == (count + 1 - found.rank) / (count + 1)
    if found.is_reachable:
        assert found.expected_rate <= rate + 1e-9
        # one rank lower would already promise too much
        assert (count + 2 - found.rank) / (count + 1) > rate - 1e-9
    else:
        assert found.rank == count
        assert 1 / (count + 1) > rate


@given(st.integers(1, 1200))
def test_each_reachable_threshold_is_what_its_own_rate_gives(count):
    scores = np.random.default_rng(count).standard_normal(count)
    found = reachable_thresholds(scores)
    assert [one.rank for one in found] == list(range(count + 1 - max((count + 1) // 2, 1), count + 1))
    for one in (found[0], found[len(found) // 2], found[-1]):
        assert one.is_reachable
        assert one == conformal_threshold(scores, one.target_rate)
        assert one.target_rate <= 0.5 or count == 1
        assert len(f"{one.target_rate:g}") <= 6


def test_rates_that_divide_evenly_are_not_rounded_up():
    assert conformal_threshold(np.arange(19.0), 0.05).rank == 19
    assert conformal_threshold(np.arange(99.0), 0.05).rank == 95
    assert conformal_threshold(np.arange(9.0), 0.1).rank == 9


@pytest.mark.parametrize("count", [19, 30, 80])
def test_false_alarm_rate_on_new_normals_is_at_most_the_target_on_average(count):
    generator = np.random.default_rng(0)
    scores = generator.gumbel(size=(4000, count + 1))  # skewed, as anomaly scores are
    alarms = [row[-1] > conformal_threshold(row[:-1], 0.1).value for row in scores]
    expected = conformal_threshold(scores[0, :-1], 0.1).expected_rate
    assert np.mean(alarms) == pytest.approx(expected, abs=0.015)
    assert expected <= 0.1


def test_too_few_images_are_said_in_words():
    found = conformal_threshold(np.asarray([0.3, 0.9, 0.1]), 0.05)
    assert found.value == pytest.approx(0.9, abs=0.01)
    assert not found.is_reachable
    assert "too few" in found.explanation
    assert "1/4 = 25 %" in found.explanation
    assert "19 calibration images or more" in found.explanation
    assert conformal_threshold(np.arange(19.0), 0.05).is_reachable  # the number it names is true
    assert not conformal_threshold(np.arange(18.0), 0.05).is_reachable


def test_enough_images_are_said_in_words():
    assert "95th smallest of 99" in conformal_threshold(np.arange(99.0), 0.05).explanation
    assert "22nd smallest of 23" in conformal_threshold(np.arange(23.0), 0.1).explanation


def test_no_calibration_image_is_the_users_to_mend():
    with pytest.raises(UserError, match="calibration_fraction"):
        conformal_threshold(np.empty(0), 0.05)

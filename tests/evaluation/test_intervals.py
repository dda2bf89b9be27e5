"""Resampling and intervals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith.evaluation.intervals import percentile_interval, resample_counts, share_interval


def test_every_resample_keeps_each_groups_size():
    groups = ["good"] * 7 + ["dent"] * 3 + ["good"] * 2 + ["scratch"]
    counts = resample_counts(groups, 200, np.random.default_rng(0))
    names = np.asarray(groups)
    assert counts.shape == (200, 13)
    for name in set(groups):
        assert (counts[:, names == name].sum(axis=1) == groups.count(name)).all()
    assert counts[:, :7].std() > 0


def test_same_generator_same_resamples():
    draws = [resample_counts(["good", "dent", "good"], 50, np.random.default_rng(5)) for _ in range(2)]
    np.testing.assert_array_equal(*draws)


def test_bootstrap_interval_of_a_mean_matches_the_normal_theory():
    generator = np.random.default_rng(1)
    values = generator.normal(3, 2, 400)
    counts = resample_counts(["good"] * 400, 4000, generator)
    found = percentile_interval(values.mean(), counts @ values / 400)
    assert found.value == values.mean()
    half = 1.96 * values.std() / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


@given(st.integers(1, 500).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_share_interval_surrounds_the_share_and_stays_a_share(case):
    count, total = case
    found = share_interval(count, total)
    assert 0 <= found.low <= count / total <= found.high <= 1
    assert found.low < found.high


def test_share_interval_is_wilsons():
    """Its ends are the shares p from which 2 of 40 lies 1.96 standard errors away: |2/40 - p| = z sqrt(p(1-p)/40)."""
    found = share_interval(2, 40)
    for end in (found.low, found.high):
        assert abs(2 / 40 - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / 40), abs=1e-6)

"""Gradient noise: what it must be at lattice points, between them, and from one seed, shape or angle to the next."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flawsmith.synthesis.perlin import FloatField, perlin_noise

SEEDS = st.integers(0, 2**32 - 1)
# |grad n| <= |sum w g| + |sum (grad w) (g . d)| <= 1 + sqrt(2) * 15/8 * 2 * sqrt(2) in cells, and the scale is sqrt(2)
STEEPEST = np.sqrt(2) * (1 + 7.5)


def noise(seed: int, *args: object, **options: object) -> FloatField:
    return perlin_noise(*args, generator=np.random.default_rng(seed), **options)  # type: ignore[misc,arg-type]


def correlation_length(field: FloatField) -> int:
    """The least shift along a row at which the autocorrelation falls below one half."""
    for shift in range(1, field.shape[1]):
        if np.corrcoef(field[:, :-shift].ravel(), field[:, shift:].ravel())[0, 1] < 0.5:
            return shift
    raise AssertionError("the field does not decorrelate")


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, period=st.sampled_from([2, 5, 8, 16]), top=st.integers(0, 7), left=st.integers(0, 7))
def test_noise_vanishes_at_lattice_points_and_only_there(seed: int, period: int, top: int, left: int) -> None:
    field = noise(seed, (40, 56), float(period), origin=(float(top), float(left)))
    on_lattice = field[top % period :: period, left % period :: period]
    assert np.abs(on_lattice).max() < 1e-6
    assert (np.abs(field) > 1e-3).mean() > (0.4 if period > 2 else 0.2)


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    periods=st.tuples(st.floats(1.0, 90.0), st.floats(1.0, 90.0)),
    angle=st.floats(-7.0, 7.0),
    octaves=st.integers(1, 4),
    persistence=st.floats(0.1, 1.0),
)
def test_any_shape_period_and_angle_gives_finite_values_in_the_range(
    seed: int,
    height: int,
    width: int,
    periods: tuple[float, float],
    angle: float,
    octaves: int,
    persistence: float,
) -> None:
    field = noise(seed, (height, width), periods, angle_rad=angle, octaves=octaves, persistence=persistence)
    assert field.shape == (height, width)
    assert field.dtype == np.float32
    assert np.isfinite(field).all()
    assert np.abs(field).max() <= 1 + 1e-5


def test_the_range_is_used_and_the_mean_over_seeds_is_zero() -> None:
    fields = np.stack([noise(seed, (64, 64), 7.3) for seed in range(100)])
    assert fields.max() > 0.85
    assert fields.min() < -0.85
    # about 77 independent cells a field, so the mean's standard error is 0.31 / sqrt(7700)
    assert abs(fields.mean()) < 5 * 0.31 / np.sqrt(7700)
    assert fields.std() == pytest.approx(0.31, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, period=st.floats(4.0, 100.0), angle=st.floats(0.0, np.pi))
def test_neighbouring_pixels_differ_by_no_more_than_the_lipschitz_bound(seed: int, period: float, angle: float) -> None:
    field = noise(seed, (48, 48), period, angle_rad=angle)
    steps = max(np.abs(np.diff(field, axis=0)).max(), np.abs(np.diff(field, axis=1)).max())
    assert steps <= STEEPEST / period


def test_the_slope_is_continuous_across_lattice_lines() -> None:
    field = noise(3, (256, 256), 128.0).astype(np.float64)
    bends = np.abs(np.diff(field, n=2, axis=1))  # bounded second derivative: the bend shrinks with the period squared
    assert bends.max() < 40 / 128**2
    assert bends.max() > 1 / 128**2  # else the bound would say nothing


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, octaves=st.integers(1, 3))
def test_same_seed_same_noise_and_another_seed_another(seed: int, octaves: int) -> None:
    first = noise(seed, (24, 24), 6.0, octaves=octaves)
    assert np.array_equal(first, noise(seed, (24, 24), 6.0, octaves=octaves))
    assert not np.allclose(first, noise(seed + 1, (24, 24), 6.0, octaves=octaves))


def test_the_generator_is_left_alike_whatever_shape_period_or_angle() -> None:
    generators = [np.random.default_rng(5) for _ in range(3)]
    perlin_noise((8, 8), 4.0, generators[0], octaves=3)
    perlin_noise((70, 33), (50.0, 7.0), generators[1], angle_rad=1.0, octaves=3)
    perlin_noise((8, 8), 2.0, generators[2], octaves=3)  # its finer octaves are left out
    assert len({generator.integers(2**62) for generator in generators}) == 1


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, period=st.floats(3.0, 40.0), angle=st.floats(0.0, np.pi))
def test_a_larger_field_contains_the_smaller_one(seed: int, period: float, angle: float) -> None:
    small = noise(seed, (20, 31), period, angle_rad=angle, octaves=2)
    large = noise(seed, (53, 47), period, angle_rad=angle, octaves=2)
    np.testing.assert_allclose(large[:20, :31], small, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, period=st.floats(3.0, 40.0), turns=st.integers(1, 3), angle=st.floats(0.0, 3.0))
def test_a_quarter_turn_of_the_angle_turns_the_field(seed: int, period: float, turns: int, angle: float) -> None:
    options = {"origin": (16.0, 16.0), "octaves": 2}
    upright = noise(seed, (33, 33), (period, 2 * period), angle_rad=angle, **options)
    turned = noise(seed, (33, 33), (period, 2 * period), angle_rad=angle + turns * np.pi / 2, **options)
    # the angle runs clockwise on the screen, rot90 anticlockwise
    np.testing.assert_allclose(turned, np.rot90(upright, -turns), atol=1e-4)


@pytest.mark.parametrize("angle", [0.3, 1.1, 2.5])
def test_features_run_along_the_angle_of_the_longer_period(angle: float) -> None:
    covariance = np.zeros((2, 2))
    for seed in range(12):  # the structure tensor: its weak axis is the direction in which the noise changes least
        slopes = np.stack(np.gradient(noise(seed, (96, 96), (8.0, 48.0), angle_rad=angle))).reshape(2, -1)
        covariance += slopes @ slopes.T
    weak_y, weak_x = np.linalg.eigh(covariance)[1][:, 0]
    off = (np.arctan2(weak_y, weak_x) - angle + np.pi / 2) % np.pi - np.pi / 2
    assert abs(off) < np.deg2rad(3)


def test_the_correlation_length_grows_with_the_period() -> None:
    lengths = [correlation_length(noise(11, (256, 256), period)) for period in (6.0, 12.0, 24.0, 48.0)]
    assert lengths == sorted(set(lengths))
    assert lengths[-1] >= 4 * lengths[0]


def test_each_axis_has_its_own_period() -> None:
    field = noise(2, (256, 256), (6.0, 36.0))
    assert correlation_length(field) >= 3 * correlation_length(field.T)


def test_octaves_add_detail_and_stop_before_they_alias() -> None:
    def roughness(octaves: int, period: float = 32.0) -> float:
        field = noise(4, (128, 128), period, octaves=octaves)
        return float(np.abs(np.diff(field)).mean() / field.std())

    assert roughness(1) < roughness(2) < roughness(4)
    # 32, 16, 8, 4, 2: the sixth would be 1 px, where every pixel is a lattice point
    assert np.array_equal(noise(4, (64, 64), 32.0, octaves=5), noise(4, (64, 64), 32.0, octaves=8))


def test_there_is_no_preferred_sign_or_direction() -> None:
    fields = [noise(seed, (96, 96), 12.0) for seed in range(40)]
    slopes_y, slopes_x = np.gradient(np.stack(fields), axis=(1, 2))
    assert slopes_y.std() == pytest.approx(slopes_x.std(), rel=0.1)
    assert np.mean([(field > 0).mean() for field in fields]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("shape", "period", "options"),
    [
        ((0, 4), 8.0, {}),
        ((4, 4), 0.0, {}),
        ((4, 4), (8.0, -1.0), {}),
        ((4, 4), float("nan"), {}),
        ((4, 4), 8.0, {"octaves": 0}),
        ((4, 4), 8.0, {"persistence": 0.0}),
        ((4, 4), 8.0, {"persistence": 1.5}),
    ],
)
def test_arguments_out_of_range_are_refused(
    shape: tuple[int, int], period: float | tuple[float, float], options: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match="perlin_noise needs"):
        noise(0, shape, period, **options)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_far_from_the_origin_the_noise_is_the_same_kind(seed: int) -> None:
    field = noise(seed, (64, 64), 5.0, origin=(-990.7, 870.2), angle_rad=0.4)
    assert 0.2 < field.std() < 0.45

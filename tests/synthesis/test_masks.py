"""Defect masks: where they may lie, how large they are, how they end, and what the soft edge does to them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, stats

from flawsmith.config import load_settings
from flawsmith.data.images import Mask
from flawsmith.errors import UserError
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.masks import FILL, MAX_PARTS, MaskDraw, _close, feathered, margin, sample_mask

SEEDS = st.integers(0, 2**32 - 1)
EIGHT = np.ones((3, 3), bool)
# the keys that masks read are fixed here, so that tuning params.yaml breaks no test
DEFAULTS: SynthesizeSettings = replace(
    load_settings(Path(__file__).parents[2] / "params.yaml").synthesize,
    windows=(64, 96, 128),
    feather=2.0,
    perlin_periods=(8, 16, 32, 64),
    perlin_threshold=(-0.1, 0.3),
    ridge_share=0.3,
    area=(0.0003, 0.08),
)


def draw(seed: int, shape: tuple[int, int] = (256, 256), foreground: Mask | None = None, **changes: Any) -> MaskDraw:
    return sample_mask(np.random.default_rng(seed), shape, replace(DEFAULTS, **changes), foreground)


@cache
def many(ridge_share: float, count: int = 250) -> tuple[MaskDraw, ...]:
    return tuple(draw(seed, ridge_share=ridge_share) for seed in range(count))


def disc(size: int, radius: float, centre: tuple[float, float] | None = None) -> Mask:
    row, column = centre or ((size - 1) / 2, (size - 1) / 2)
    y, x = np.mgrid[:size, :size]
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


def inside(window: tuple[int, int, int], shape: tuple[int, int], rim: int) -> Mask:
    """The window less `rim` pixels along those of its borders that are not the image's."""
    top, left, side = window
    result = np.zeros(shape, bool)
    result[
        top + rim * (top > 0) : top + side - rim * (top + side < shape[0]),
        left + rim * (left > 0) : left + side - rim * (left + side < shape[1]),
    ] = True
    return result


def thickness(mask: Mask) -> float:
    """The diameter of the largest disc inside."""
    return float(2 * ndimage.distance_transform_edt(np.pad(mask, 1)).max() - 1)


@settings(max_examples=50, deadline=None)
@given(
    seed=SEEDS,
    shape=st.sampled_from([(128, 128), (160, 160), (256, 256), (128, 224), (320, 128)]),
    windows=st.sampled_from([(64,), (32, 64), (64, 96, 128)]),
    feather=st.sampled_from([0.0, 1.5, 3.0]),
    ridge_share=st.sampled_from([0.0, 1.0]),
)
def test_a_mask_lies_in_its_window_off_its_borders_and_in_the_area_asked_for(
    seed: int, shape: tuple[int, int], windows: tuple[int, ...], feather: float, ridge_share: float
) -> None:
    drawn = draw(seed, shape, windows=windows, feather=feather, ridge_share=ridge_share)
    top, left, side = drawn.window
    assert side in windows
    assert 0 <= top <= shape[0] - side
    assert 0 <= left <= shape[1] - side
    assert margin(feather) >= 2 * feather + 1
    assert not (drawn.mask & ~inside(drawn.window, shape, margin(feather))).any()
    assert drawn.mask.shape == shape
    assert drawn.mask.dtype == np.bool_
    assert DEFAULTS.area[0] <= drawn.mask.mean() <= DEFAULTS.area[1]
    assert drawn.kind == ("ridge" if ridge_share else "perlin")
    assert 0 <= drawn.angle <= np.pi
    assert drawn.period in DEFAULTS.perlin_periods
    # the soft edge stays inside, too, and leaves untouched texture along the window's borders
    assert not feathered(drawn.mask, feather)[~inside(drawn.window, shape, int(feather) + 1)].any()


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_same_seed_same_mask_and_another_seed_another(seed: int) -> None:
    first, again, other = draw(seed), draw(seed), draw(seed + 1)
    assert np.array_equal(first.mask, again.mask)
    assert (first.kind, first.period, first.threshold, first.angle, first.window) == (
        again.kind,
        again.period,
        again.threshold,
        again.angle,
        again.window,
    )
    assert not np.array_equal(first.mask, other.mask)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, radius=st.floats(12, 60), row=st.floats(40, 215), column=st.floats(40, 215))
def test_a_mask_stays_on_the_foreground(seed: int, radius: float, row: float, column: float) -> None:
    foreground = disc(256, radius, (row, column))
    drawn = draw(seed, foreground=foreground)
    assert drawn.mask.any()
    assert not (drawn.mask & ~foreground).any()


def test_areas_of_blobs_are_log_uniform() -> None:
    logs = np.log([drawn.mask.mean() for drawn in many(0.0)])
    low, high = np.log(DEFAULTS.area[0]), np.log(DEFAULTS.area[1])
    assert stats.kstest((logs - low) / (high - low), "uniform").statistic < 0.15


def test_larger_areas_take_larger_windows() -> None:
    by_side = {side: [d.mask.sum() for d in many(0.0) if d.window[2] == side] for side in DEFAULTS.windows}
    assert all(len(areas) >= 10 for areas in by_side.values())
    for side, areas in by_side.items():
        assert max(areas) <= FILL * side**2
    means = [np.mean(by_side[side]) for side in sorted(by_side)]
    assert means == sorted(means)


def test_every_part_of_a_strip_is_hit_too() -> None:
    hits = np.zeros((128, 384))
    for seed in range(150):
        drawn = draw(seed, hits.shape, windows=(64,), area=(0.0005, 0.01))
        hits += drawn.mask / drawn.mask.sum()
    blocks = hits.reshape(2, 64, 6, 64).sum(axis=(1, 3)) / hits.sum() * 12
    assert blocks.min() > 0.4
    assert blocks.max() < 2


def test_every_part_of_the_image_is_hit_about_equally() -> None:
    hits = np.zeros((256, 256))
    for drawn in (*many(0.0), *many(1.0)):
        hits += drawn.mask / drawn.mask.sum()  # every mask counts alike, whatever its size
    blocks = hits.reshape(4, 64, 4, 64).sum(axis=(1, 3)) / hits.sum() * 16
    assert blocks.min() > 0.6
    assert blocks.max() < 1.5


def test_blobs_are_regions_and_ridges_are_lines() -> None:
    blobs, ridges = many(0.0), many(1.0)
    assert np.quantile([thickness(drawn.mask) for drawn in ridges], 0.95) <= 5
    large = [drawn.mask for drawn in blobs if drawn.mask.sum() > 400]
    assert np.median([thickness(mask) for mask in large]) > 10
    extents = [max(np.ptp(np.argwhere(drawn.mask), axis=0)) for drawn in ridges]
    assert np.quantile(extents, 0.9) > 50  # some are long
    assert min(extents) >= 4


def test_a_mask_is_one_region_or_a_small_cluster() -> None:
    for drawns in (many(0.0), many(1.0)):
        parts = np.array([ndimage.label(drawn.mask, EIGHT)[1] for drawn in drawns])
        assert parts.max() <= MAX_PARTS
        assert (parts == 1).mean() > 0.4
        assert (parts > 1).mean() > 0.05


def test_no_shape_is_cut_straight_by_its_window() -> None:
    """Along the window's margin a shape closes as a curve does: it has no long run of pixels on a row next to it."""
    for drawn in many(0.0):
        top, left, side = drawn.window
        inner = drawn.mask[top : top + side, left : left + side]
        rim = margin(DEFAULTS.feather)
        for row, cut in ((inner[rim], top > 0), (inner[-rim - 1], top + side < 256)):
            assert not cut or row.sum() <= 0.25 * side
        for column, cut in ((inner[:, rim], left > 0), (inner[:, -rim - 1], left + side < 256)):
            assert not cut or column.sum() <= 0.25 * side


def test_of_confetti_the_largest_parts_stay() -> None:
    reach = np.full((64, 64), np.inf, np.float32)
    for part in range(12):  # squares of 2 to 13 pixels a side, in no order of size
        side = 2 + (part * 5) % 12
        row, column = divmod(part, 4)
        reach[1 + 21 * row : 1 + 21 * row + side, 1 + 16 * column : 1 + 16 * column + side] = 1.0
    closed = _close(reach, 1e6, np.zeros((64, 64), bool))
    labels, count = ndimage.label(closed, EIGHT)
    assert sorted(np.bincount(labels.ravel())[1:]) == [side**2 for side in range(14 - MAX_PARTS, 14)]
    assert count == MAX_PARTS


def test_shapes_differ_in_elongation_and_roughness() -> None:
    solidity, elongation = [], []
    for drawn in many(0.0):
        points = np.argwhere(drawn.mask)
        if len(points) < 60:
            continue
        minor, major = np.linalg.eigvalsh(np.cov(points.T))
        elongation.append(np.sqrt(major / minor))
        solidity.append(len(points) / (4 * np.pi * np.sqrt(major * minor)))  # 1 for an ellipse, less for the ragged
    assert np.quantile(elongation, 0.1) < 1.5
    assert np.quantile(elongation, 0.9) > 2.2
    assert np.quantile(solidity, 0.1) < 0.75
    assert np.quantile(solidity, 0.9) > 0.93


def test_ridge_share_is_the_share_of_ridges() -> None:
    kinds = [draw(seed, ridge_share=0.3).kind for seed in range(150)]
    assert 0.18 < kinds.count("ridge") / len(kinds) < 0.42


def test_an_image_of_the_size_of_the_window_is_used_whole() -> None:
    drawn = draw(1, (64, 64), windows=(64, 96), area=(0.01, 0.3))
    assert drawn.window == (0, 0, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"area": (0.3, 0.5)}, r"synthesize\.area .* synthesize\.windows"),
        ({"windows": (512,)}, r"synthesize\.windows"),
        ({"windows": (16,), "feather": 8.0}, r"synthesize\.windows"),
        ({"area": (0.0, 0.0)}, r"synthesize\.area"),
        ({"perlin_threshold": (0.9, 0.9), "ridge_share": 0.0}, r"synthesize\.area .* synthesize\.perlin_threshold"),
        ({"area": (0.06, 0.08), "ridge_share": 1.0}, r"synthesize\.area .* synthesize\.ridge_share"),
    ],
)
def test_settings_that_cannot_be_met_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        draw(0, **changes)


@pytest.mark.parametrize(
    ("foreground", "error", "message"),
    [
        (np.zeros((256, 256), bool), UserError, "foreground is empty"),
        (disc(256, 1.5), UserError, r"foreground has \d+ pixels.* synthesize\.area"),
        (np.ones((128, 128), bool), ValueError, "256"),
    ],
)
def test_a_foreground_that_cannot_hold_a_defect_is_refused(
    foreground: Mask, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw(0, foreground=foreground)


MASKS: st.SearchStrategy[Mask] = st.builds(
    lambda seed, share: np.random.default_rng(seed).random((24, 31)) < share, SEEDS, st.sampled_from([0.005, 0.05, 0.5])
)
WIDTHS = st.floats(0.0, 9.0)


@settings(max_examples=40, deadline=None)
@given(mask=MASKS, width=WIDTHS)
def test_alpha_is_one_on_the_mask_and_zero_beyond_the_width(mask: Mask, width: float) -> None:
    alpha = feathered(mask, width)
    assert alpha.shape == mask.shape
    assert alpha.dtype == np.float32
    assert alpha.min() >= 0
    assert alpha.max() <= 1
    assert (alpha[mask] == 1).all()
    if mask.any():
        distance = ndimage.distance_transform_edt(~mask)
        assert (alpha[distance > width] == 0).all()
        if width > 1.5:
            assert (alpha[(distance > 0) & (distance <= 1)] > 0).all()
    assert (alpha[~mask] < 1).all()


@settings(max_examples=10, deadline=None)
@given(width=WIDTHS)
def test_an_empty_mask_has_no_alpha(width: float) -> None:
    assert not feathered(np.zeros((9, 14), bool), width).any()


@settings(max_examples=40, deadline=None)
@given(mask=MASKS, more=MASKS, width=WIDTHS)
def test_alpha_grows_with_the_mask_and_with_the_width(mask: Mask, more: Mask, width: float) -> None:
    assert (feathered(mask, width) <= feathered(mask | more, width)).all()
    assert (feathered(mask, width) <= feathered(mask, width + 1)).all()


@settings(max_examples=40, deadline=None)
@given(mask=MASKS)
def test_without_a_width_alpha_is_the_mask(mask: Mask) -> None:
    assert np.array_equal(feathered(mask, 0.0), mask.astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(mask=MASKS, width=WIDTHS, turn=st.sampled_from([np.flipud, np.fliplr, np.transpose]))
def test_alpha_has_no_preferred_direction(
    mask: Mask, width: float, turn: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> None:
    np.testing.assert_allclose(feathered(turn(mask), width), turn(feathered(mask, width)), atol=1e-6)


def test_alpha_falls_smoothly() -> None:
    alpha = feathered(disc(101, 20), 12.0)[50, 50:]
    steps = -np.diff(alpha)
    assert (steps >= 0).all()
    assert steps.max() < 1.6 / 12  # the steepest slope of the smoothstep is 1.5 over its width
    assert np.abs(np.diff(steps)).max() < 6.5 / 12**2


def test_a_line_of_one_pixel_keeps_its_full_alpha() -> None:
    line = np.zeros((32, 32), bool)
    line[16, 4:28] = True
    alpha = feathered(line, 2.0)
    assert (alpha[16, 4:28] == 1).all()
    assert alpha[15, 16] == pytest.approx(0.5)
    assert alpha[14, 16] == 0

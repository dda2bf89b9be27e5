"""Polygons beside the pixels they stand for."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.inference.contours import MAX_CORNERS, MAX_POINTS, Point, outline, simplify
from flawsmith.inference.regions import Region, find_regions, region_mask

EIGHT = np.ones((3, 3))


def covered(polygon: tuple[Point, ...], height: int, width: int) -> NDArray[np.bool_]:
    """The pixels whose centres lie inside."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    inside = Outline(polygon).contains_points(np.column_stack([columns.ravel(), rows.ravel()]))
    return np.asarray(inside, bool).reshape(height, width)


def overlap(region: Region, mask: NDArray[np.bool_]) -> float:
    """IoU of a region's polygon with its pixels in the mask, holes filled."""
    labels, _ = ndimage.label(mask, EIGHT)
    pixels = ndimage.binary_fill_holes(labels == labels[region.peak_y, region.peak_x])
    inside = covered(region.polygon, *mask.shape)
    return float((pixels & inside).sum() / (pixels | inside).sum())


def ring_area(polygon: tuple[Point, ...]) -> float:
    """Signed: positive if the polygon goes clockwise on the screen."""
    x, y = np.asarray(polygon).T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)


def blob_map(seed: int, rows: int, columns: int, smooth: float) -> NDArray[np.float32]:
    noise = np.random.default_rng(seed).random((rows, columns))
    return ndimage.gaussian_filter(noise, smooth).astype(np.float32)


@given(
    st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5), st.integers(1, 5),
    st.sampled_from([0.0, 0.7, 1.5, 3.0]), st.floats(0.2, 0.98),
)  # fmt: skip
def test_a_polygon_covers_its_regions_pixels_and_its_box_holds_it(
    seed: int, rows: int, columns: int, down: int, across: int, smooth: float, share: float
) -> None:
    anomaly_map = blob_map(seed, rows, columns, smooth)
    threshold = float(np.quantile(anomaly_map, share))
    height, width = rows * down, columns * across
    mask = region_mask(anomaly_map, threshold, height, width)
    regions = find_regions(anomaly_map, threshold, height, width)
    assert mask.sum() == pytest.approx(sum(region.area for region in regions))
    for region in regions[:6]:
        assert region.polygon[0] == region.polygon[-1]
        assert 5 <= len(region.polygon) <= MAX_POINTS + 1
        assert ring_area(region.polygon) > 0
        for x, y in region.polygon:
            assert region.x <= x <= region.x + region.width
            assert region.y <= y <= region.y + region.height
        if len(region.polygon) <= MAX_POINTS:  # else more ragged than any real map: bounded, and cruder
            assert overlap(region, mask) > 0.9


@given(st.integers(0, 10_000), st.floats(0.3, 0.9), st.integers(60, 300), st.integers(60, 300))
def test_a_region_of_a_smooth_map_is_told_in_few_points_at_any_size(
    seed: int, share: float, height: int, width: int
) -> None:
    anomaly_map = blob_map(seed, 20, 20, 2.0)
    threshold = float(np.quantile(anomaly_map, share))
    mask = region_mask(anomaly_map, threshold, height, width)
    _, count = ndimage.label(mask, EIGHT)
    regions = find_regions(anomaly_map, threshold, height, width)
    assert len(regions) == count
    for region in regions:
        assert len(region.polygon) < 60
        if region.area * 400 > 16 * height * width:  # more than 16 pixels of the map
            assert overlap(region, mask) > 0.85


@given(arrays(bool, st.tuples(st.integers(1, 8), st.integers(1, 8))))
def test_an_outline_encloses_exactly_its_region(mask: NDArray[np.bool_]) -> None:
    labels, count = ndimage.label(mask, EIGHT)
    for label in range(1, count + 1):
        region = labels == label
        corners = outline(region)
        closed = (*corners, corners[0])
        assert ring_area(closed) == ndimage.binary_fill_holes(region).sum()
        for (x0, y0), (x1, y1) in pairwise(closed):
            assert (x0 == x1) != (y0 == y1)  # every side runs across or down


def test_a_rectangle_keeps_its_four_corners_and_a_staircase_loses_its_steps() -> None:
    anomaly_map = np.zeros((32, 32), np.float32)
    anomaly_map[4:8, 10:20] = 1
    (region,) = find_regions(anomaly_map, 0.5, height=64, width=32)  # twice as high
    assert region.polygon == ((10, 8), (20, 8), (20, 16), (10, 16), (10, 8))
    stairs = np.tril(np.ones((100, 100), np.float32))
    (region,) = find_regions(stairs, 0.5, 100, 100)
    assert len(outline(stairs > 0)) == 202
    assert len(region.polygon) < 30
    assert overlap(region, stairs > 0) > 0.95


def test_diagonal_pixels_make_one_polygon_and_a_hole_is_ignored() -> None:
    (region,) = find_regions(np.eye(3, dtype=np.float32), 0.5, 3, 3)
    assert ring_area(region.polygon) == pytest.approx(3)
    ring = np.ones((9, 9), np.float32)
    ring[3:6, 3:6] = 0
    (region,) = find_regions(ring, 0.5, 9, 9)
    assert region.polygon == ((0, 0), (9, 0), (9, 9), (0, 9), (0, 0))
    assert region.area == 72


def test_a_region_that_is_all_edge_is_told_in_bounded_time_and_points() -> None:
    comb = np.zeros((400, 400), np.float32)
    comb[:, ::2] = 1
    comb[0] = 1
    (region,) = find_regions(comb, 0.5, 400, 400)
    assert len(outline(comb > 0)) <= MAX_CORNERS
    assert len(region.polygon) <= MAX_POINTS + 1
    assert covered(region.polygon, 400, 400)[comb > 0].mean() > 0.9


@given(st.integers(0, 1000), st.integers(5, 60))
def test_simplifying_keeps_the_order_and_takes_points_only(seed: int, most: int) -> None:
    corners = outline(blob_map(seed, 30, 30, 1.0) > 0.5) if seed % 2 else outline(np.tri(25, dtype=bool))
    kept = simplify(corners, most)
    assert len(kept) <= max(most, 4)
    rest = iter(corners)
    assert all(point in rest for point in kept)


@given(
    arrays(np.float32, st.tuples(st.integers(1, 30), st.integers(1, 30)), elements=st.floats(0, 1, width=32)),
    st.integers(1, 60),
    st.integers(1, 60),
)
def test_no_region_vanishes_from_the_mask_whatever_the_size(
    anomaly_map: NDArray[np.float32], height: int, width: int
) -> None:
    mask = region_mask(anomaly_map, 0.5, height, width)
    assert mask.shape == (height, width)
    assert mask.dtype == np.bool_
    for region in find_regions(anomaly_map, 0.5, height, width):
        assert mask[region.y : region.y + region.height, region.x : region.x + region.width].any()
    if not (anomaly_map > 0.5).any():
        assert not mask.any()

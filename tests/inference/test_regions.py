import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from flawsmith.inference.regions import find_peak, find_regions

maps = arrays(np.float32, (9, 9), elements=st.floats(0, 1, width=32))


@settings(deadline=None)
@given(maps, st.floats(0, 1), st.integers(1, 40), st.integers(1, 40))
def test_regions_cover_exactly_the_pixels_above_the_threshold(
    anomaly_map: NDArray[np.float32], threshold: float, height: int, width: int
) -> None:
    regions = find_regions(anomaly_map, threshold, height, width)
    above = anomaly_map > threshold
    assert sum(region.area for region in regions) == pytest.approx(above.mean() * height * width)
    assert [region.peak for region in regions] == sorted((region.peak for region in regions), reverse=True)
    if above.any():
        value, x, y = find_peak(anomaly_map, height, width)
        assert regions[0].peak == value
        assert any((region.peak_x, region.peak_y) == (x, y) for region in regions if region.peak == value)
    for region in regions:
        assert 0 <= region.x <= region.peak_x < region.x + region.width <= width
        assert 0 <= region.y <= region.peak_y < region.y + region.height <= height


def test_a_rectangle_is_found_where_it_is_on_a_larger_image() -> None:
    anomaly_map = np.zeros((16, 16), np.float32)
    anomaly_map[4:6, 8:12] = 1
    anomaly_map[5, 10] = 2
    (region,) = find_regions(anomaly_map, 0.5, height=32, width=64)  # twice as high, four times as wide
    assert (region.x, region.y, region.width, region.height) == (32, 8, 16, 4)
    assert region.area == 64
    assert (region.peak, region.peak_x, region.peak_y) == (2, 42, 11)
    assert find_peak(anomaly_map, 32, 64) == (2, 42, 11)


def test_touching_corners_make_one_region_and_a_gap_makes_two() -> None:
    anomaly_map = np.eye(6, dtype=np.float32)
    assert len(find_regions(anomaly_map, 0.5, 6, 6)) == 1
    anomaly_map[3, 3] = 0
    assert len(find_regions(anomaly_map, 0.5, 6, 6)) == 2


def test_a_region_does_not_take_the_peak_of_a_neighbour_in_its_box() -> None:
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[0, :] = anomaly_map[:, 0] = 1  # an angle, its box is the whole map
    anomaly_map[5, 5] = 3
    strong, weak = find_regions(anomaly_map, 0.5, 8, 8)
    assert (strong.peak, strong.area) == (3, 1)
    assert (weak.peak, weak.area, weak.width, weak.height) == (1, 15, 8, 8)

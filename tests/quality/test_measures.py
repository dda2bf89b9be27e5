"""What is measured of a triplet: properties first, then files that are not as they should be."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from triplet_sets import SIDE, make_set, make_triplet, write_triplet

from flawsmith.data.images import FloatImage
from flawsmith.data.triplets import part_path
from flawsmith.quality.measures import (
    Measures,
    Scale,
    count_duplicates,
    measure_folder,
    measure_triplet,
    ssim,
)

SCALE = Scale(visible_change=8 / 255, outside_margin=4, side=SIDE)
ROW = Measures("fit-00000", in_manifest=True, on_disk=True, decodable=True)
EVERYWHERE = np.ones((SIDE, SIDE), np.bool_)
seeds = st.integers(0, 2**32 - 1)


def measure(normal: FloatImage, defect: FloatImage, mask: np.ndarray, foreground: np.ndarray = EVERYWHERE) -> Measures:
    return measure_triplet(ROW, normal, defect, mask, SCALE, foreground)


def whole_ssim(first: FloatImage, second: FloatImage) -> float:
    """Equation 13 of Wang et al. 2004 written out over the whole image with explicit window weights."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    total = 0.0
    for x, y in zip(first.astype(float), second.astype(float), strict=True):
        mean_x, mean_y = ndimage.correlate(x, window), ndimage.correlate(y, window)
        var_x = ndimage.correlate(x * x, window) - mean_x**2
        var_y = ndimage.correlate(y * y, window) - mean_y**2
        cov = ndimage.correlate(x * y, window) - mean_x * mean_y
        index = (
            (2 * mean_x * mean_y + 1e-4) * (2 * cov + 9e-4) / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
        )
        total += index.mean()
    return total / len(first)


@given(seeds)
def test_identity_triplet_has_no_change(seed: int) -> None:
    normal, _, mask = make_triplet(np.random.default_rng(seed))
    row = measure(normal, normal, mask)
    assert row.change_inside == row.change_outside == row.visible_share == 0
    assert row.ssim == 1
    assert row.mask_area == mask.mean()


@given(seeds, st.integers(0, 64), st.integers(0, 64))
def test_ssim_is_symmetric_bounded_and_the_published_one(seed: int, height: int, width: int) -> None:
    generator = np.random.default_rng(seed)
    first = generator.uniform(size=(3, 64, 64)).astype(np.float32)
    second = first.copy()
    second[:, :height, 64 - width :] = generator.uniform(size=second[:, :height, 64 - width :].shape)
    value = ssim(first, second)
    assert value == ssim(second, first)
    assert -1 <= value <= 1
    assert value == pytest.approx(whole_ssim(first, second), abs=1e-9)
    assert ssim(first, first) == 1


def test_ssim_of_constants_follows_the_formula() -> None:
    low, high = np.full((1, 32, 32), 0.2, np.float32), np.full((1, 32, 32), 0.6, np.float32)
    assert ssim(low, high) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-6)


def test_ssim_falls_as_the_defect_grows_stronger() -> None:
    normal, defect, mask = make_triplet(np.random.default_rng(1))
    values = [ssim(normal, np.where(mask, (1 - a) * normal + a * defect, normal)) for a in (0, 0.2, 0.5, 1)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4


@given(st.floats(0.05, 0.5))
def test_changes_are_those_that_were_made(change: float) -> None:
    normal = np.full((3, SIDE, SIDE), 0.25, np.float32)
    mask = np.zeros((SIDE, SIDE), np.bool_)
    mask[10:20, 10:14] = mask[40:44, 40:50] = True
    defect = normal.copy()
    defect[0, 10:20, 10:14] += np.float32(change)  # half of the mask, one of three channels
    defect[:, 60, 60] += 0.125  # far from the mask
    defect[:, 24, 12] += 0.5  # 5 px below it, one more than the margin
    defect[:, 23, 12] += 0.75  # within the margin
    row = measure(normal, defect, mask)
    assert row.change_inside == pytest.approx(change / 2, abs=1e-6)
    assert row.visible_share == 0.5
    assert row.change_outside == 0.5
    assert row.components == 2
    assert row.mask_area == 80 / SIDE**2


def test_diagonal_neighbours_are_one_component() -> None:
    normal, _, _ = make_triplet(np.random.default_rng(0))
    assert measure(normal, normal, np.eye(SIDE, dtype=np.bool_)).components == 1


def test_overlap_is_the_share_of_the_mask_on_the_part() -> None:
    normal, _, _ = make_triplet(np.random.default_rng(0))
    mask, part = np.zeros((SIDE, SIDE), np.bool_), np.zeros((SIDE, SIDE), np.bool_)
    mask[10:20, 10:20], part[:, 17:] = True, True
    assert measure(normal, normal, mask, part).foreground_overlap == pytest.approx(0.3)


def test_mask_over_everything_leaves_no_outside() -> None:
    normal, defect, _ = make_triplet(np.random.default_rng(0))
    assert measure(normal, defect, EVERYWHERE).change_outside == 0


def test_empty_mask_has_no_inside() -> None:
    normal, defect, mask = make_triplet(np.random.default_rng(0))
    row = measure(normal, defect, ~EVERYWHERE)
    assert row.mask_area == row.components == 0
    assert math.isnan(row.change_inside)
    assert math.isnan(row.visible_share)
    assert row.change_outside == pytest.approx(float(np.abs(normal - defect).max()))
    assert mask.any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("which", ["normal", "defect"])
def test_nan_pixel_is_seen(value: float, which: str) -> None:
    normal, defect, mask = make_triplet(np.random.default_rng(0))
    {"normal": normal, "defect": defect}[which][0, 3, 3] = value
    row = measure(normal, defect, mask)
    assert row.size_agrees
    assert not row.finite
    assert math.isnan(row.ssim)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_size_that_disagrees_is_seen(which: int) -> None:
    parts = list(make_triplet(np.random.default_rng(0)))
    parts[which] = parts[which][..., : SIDE - 1]
    row = measure(*parts)
    assert not row.size_agrees
    assert math.isnan(row.mask_area)
    other = Scale(SCALE.visible_change, SCALE.outside_margin, SIDE * 2)
    assert not measure_triplet(ROW, *make_triplet(np.random.default_rng(0)), other, EVERYWHERE).size_agrees


def test_duplicates_are_counted_by_pixels_not_by_file(tmp_path: Path) -> None:
    make_set(tmp_path, 3)
    generator = np.random.default_rng(9)
    normal, defect, mask = make_triplet(generator)
    write_triplet(tmp_path, "a", normal, defect, mask)
    write_triplet(tmp_path, "b", normal, defect, ~mask)
    rows = {row.triplet_id: row for row in measure_folder(tmp_path, ["a", "b"], SCALE)}
    assert rows["a"].duplicates == rows["b"].duplicates == 1
    assert rows["fit-00000"].duplicates == 0


def test_rows_without_pixels_are_no_duplicates() -> None:
    assert all(math.isnan(row.duplicates) for row in count_duplicates([ROW, ROW]))


def test_manifest_order_then_strays(tmp_path: Path) -> None:
    make_set(tmp_path, 4)
    rows = measure_folder(tmp_path, ["fit-00002", "fit-00777"], SCALE)
    assert [row.triplet_id for row in rows] == ["fit-00002", "fit-00777", "fit-00000", "fit-00001", "fit-00003"]
    assert [row.in_manifest for row in rows] == [True, True, False, False, False]
    assert [row.on_disk for row in rows] == [True, False, True, True, True]


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("part", ["normal", "defect", "mask"])
def test_broken_file_gives_a_row_not_a_crash(tmp_path: Path, part: str, content: bytes) -> None:
    (triplet_id,) = make_set(tmp_path, 1)
    part_path(tmp_path, part, triplet_id).write_bytes(content)
    (row,) = measure_folder(tmp_path, [triplet_id], SCALE)
    assert row.on_disk
    assert not row.decodable
    assert math.isnan(row.mask_area)


def test_mask_beside_an_object_is_seen(tmp_path: Path) -> None:
    """The foreground is estimated from the triplets' own normals: discs on a white ground, defects on the ground."""
    generator = np.random.default_rng(3)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for index in range(8):
        centre = generator.uniform(28, 36, 2)
        disc = np.hypot(rows - centre[0], columns - centre[1]) < 18
        normal = np.repeat(np.where(disc, 0.3, 0.9)[None], 3, 0) + generator.normal(0, 0.01, (3, SIDE, SIDE))
        normal = np.clip(normal, 0, 1).astype(np.float32)
        mask = np.zeros((SIDE, SIDE), np.bool_)
        mask[(slice(4, 9), slice(4, 9)) if index % 2 else (slice(30, 35), slice(30, 35))] = True
        write_triplet(tmp_path, f"{index}", normal, np.where(mask, 0.6, normal).astype(np.float32), mask)
    measured = measure_folder(tmp_path, [str(index) for index in range(8)], SCALE)
    assert [row.foreground_overlap for row in measured] == [1, 0, 1, 0, 1, 0, 1, 0]

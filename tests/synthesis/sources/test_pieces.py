"""Pieces: across the part's outline, marked where the image changed, and of three kinds that keep their names."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from flawsmith.config import load_settings
from flawsmith.data.foreground import Foreground
from flawsmith.data.triplets import FIT
from flawsmith.synthesis.generate import Triplet, TripletGenerator, generate, remake
from flawsmith.synthesis.sources.pieces import HALO, REACH, _mirrored
from flawsmith.synthesis.sources.texture import largest_change

SETTINGS = replace(
    load_settings(Path(__file__).parents[3] / "params.yaml").synthesize, mixture={"pieces": 1.0}, batch=4,
    windows=(48, 64), area=(0.001, 0.04),
)  # fmt: skip
SHAPE = (96, 128)
PART = np.hypot(*(np.indices(SHAPE) - np.array([[[45]], [[60]]]))) < 28
SURFACE = Foreground(False, (0.0, 0.0, 0.0), 0.0)


def maker(is_object: bool) -> TripletGenerator:
    """A ridged dark disc on a bright ground, or the ridges alone."""
    generator = np.random.default_rng(0)
    ridges = 70 + 30 * np.sin(np.indices(SHAPE)[0] / 2)
    normals = []
    for _ in range(6):
        gray = (np.where(PART, ridges, 200) if is_object else ridges) + generator.normal(0, 2, SHAPE)
        normals.append(np.repeat(np.clip(gray, 0, 255)[None], 3, axis=0).astype(np.uint8))
    images = np.stack(normals)
    foreground = Foreground.estimate(images.astype(np.float32) / 255) if is_object else SURFACE
    names = [f"{index}.png" for index in range(6)]
    return TripletGenerator(None, None, images, names, foreground, SETTINGS)


@pytest.fixture(scope="module")
def on_ground() -> list[Triplet]:
    made_by = maker(True)
    assert made_by.foreground.is_object
    return list(generate(made_by, FIT, 24))


def kind(triplet: Triplet) -> str:
    return triplet.candidate.defect.outline.kind


def test_pieces_of_every_kind_lie_across_the_parts_outline(on_ground: list[Triplet]) -> None:
    assert {kind(triplet) for triplet in on_ground} == {"missing", "bent", "moved"}
    from_outline = np.maximum(ndimage.distance_transform_edt(PART), ndimage.distance_transform_edt(~PART))
    for triplet in on_ground:
        assert from_outline[triplet.mask].min() <= HALO + 1
        assert from_outline[triplet.mask].max() <= min(SHAPE) * REACH + SETTINGS.feather + 3
        change = largest_change(triplet.normal, triplet.defect)
        assert (change[triplet.mask] > SETTINGS.visibility * 255).mean() > 0.6
        assert not change[ndimage.distance_transform_edt(~triplet.mask) > SETTINGS.feather + 1].any()


def test_where_a_piece_is_missing_the_ground_is_seen(on_ground: list[Triplet]) -> None:
    for triplet in on_ground:
        if kind(triplet) == "missing":
            gone = triplet.mask & PART & (triplet.candidate.defect.alpha == 1)
            assert gone.any()
            assert triplet.defect[0][gone].mean() == pytest.approx(200, abs=10)


def test_the_ground_is_mirrored_at_the_outline() -> None:
    where = np.rint(_mirrored(PART)).astype(int)
    assert not PART[tuple(where)].any()
    assert np.array_equal(where[:, ~PART], np.indices(SHAPE)[:, ~PART])
    assert where[:, 45, 60 - 26].tolist() == [45, 30]  # 2 pixels inside the left end: as far beyond it
    assert np.array_equal(_mirrored(np.ones(SHAPE, bool)), np.indices(SHAPE))


def test_a_surface_that_fills_the_image_has_none_missing_and_a_bent_one_moves_little_at_its_rim() -> None:
    made_by = maker(False)
    triplets = list(generate(made_by, FIT, 16))
    assert {kind(triplet) for triplet in triplets} == {"bent", "moved"}
    for triplet in triplets:
        alpha = triplet.candidate.defect.alpha
        assert not (triplet.defect != triplet.normal)[:, alpha == 0].any()
        again = remake(made_by, FIT, triplet.candidate.number)
        assert again is not None
        assert np.array_equal(again.defect, triplet.defect)
        assert made_by.row("a", again) == made_by.row("a", triplet)
    depth, rim, middle = HALO, [], []
    for triplet in triplets:
        if kind(triplet) == "bent":
            inside = ndimage.distance_transform_edt(triplet.candidate.defect.alpha == 1)
            change = np.abs(triplet.defect.astype(int) - triplet.normal.astype(int))[0]
            rim.append(change[(inside > 0) & (inside < 2)].mean())
            middle.append(change[inside >= min(depth, inside.max())].mean())
    assert np.mean(rim) < np.mean(middle)

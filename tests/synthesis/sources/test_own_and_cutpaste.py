"""The sources that need no diffusion model: the papers' sizes, the images' own pixels, and repeatable."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.config import load_settings
from flawsmith.data.foreground import Foreground
from flawsmith.data.images import Mask
from flawsmith.data.triplets import FIT, VALIDATION
from flawsmith.errors import UserError
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.generate import TripletGenerator, generate, remake
from flawsmith.synthesis.sources.cutpaste import (
    RECTANGLE_AREA,
    SCAR_LENGTH,
    SCAR_WIDTH,
    cutpaste_texture,
    rectangle_mask,
)
from flawsmith.synthesis.sources.own import AUGMENTERS, own_texture
from flawsmith.synthesis.sources.texture import changed_mask, rotated_hue, turned

SEEDS = st.integers(0, 2**32 - 1)
PARAMS = Path(__file__).parents[3] / "params.yaml"
DEFAULTS: SynthesizeSettings = replace(
    load_settings(PARAMS).synthesize, windows=(64, 96, 128), feather=2.0, area=(0.0003, 0.08),
    visibility=0.0314, min_changed=0.4, opacity=(0.5, 1.0),
    perlin_periods=(8, 16, 32, 64),
)  # fmt: skip


def surface(seed: int, size: int = 128) -> NDArray[np.uint8]:
    """A coloured brushed surface, (3, size, size)."""
    generator = np.random.default_rng(seed)
    grain = ndimage.gaussian_filter(generator.normal(0, 60, (size, size)), (6, 0.5)) + generator.normal(
        0, 3, (size, size)
    )
    return np.clip(np.array([120, 110, 100])[:, None, None] + grain, 0, 255).astype(np.uint8)


def maker(source: str, count: int = 8, **changes: Any) -> TripletGenerator:
    normals = np.stack([surface(seed) for seed in range(count)])
    return TripletGenerator(
        denoiser=None,
        scheduler=None,
        normals=normals,
        names=[f"{index:03d}.png" for index in range(count)],
        foreground=Foreground(False, (0.0, 0.0, 0.0), 0.0),
        settings=replace(DEFAULTS, mixture={source: 1.0}, windows=(64, 96), batch=4, **changes),
    )


def half(height: int, width: int) -> Mask:
    return np.broadcast_to(np.arange(width) < width // 2, (height, width)).copy()


@given(seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_rectangles_and_scars_have_the_papers_sizes(seed: int) -> None:
    drawn = rectangle_mask(np.random.default_rng(seed), (256, 256))
    top, left, side = drawn.window
    assert 0 <= top <= 256 - side
    assert 0 <= left <= 256 - side
    assert drawn.mask[top : top + side, left : left + side].sum() == drawn.mask.sum()
    rows, columns = np.flatnonzero(drawn.mask.any(axis=1)), np.flatnonzero(drawn.mask.any(axis=0))
    box = rows.size * columns.size
    if drawn.kind == "rectangle":
        assert drawn.mask.sum() == box  # full and upright
        assert RECTANGLE_AREA[0] - 0.003 <= drawn.mask.mean() <= RECTANGLE_AREA[1] + 0.003
        assert 0.28 <= columns.size / rows.size <= 3.5
    else:
        assert drawn.kind == "scar"
        assert (
            (SCAR_WIDTH[0] - 1) * (SCAR_LENGTH[0] - 2) <= drawn.mask.sum() <= (SCAR_WIDTH[1] + 1) * (SCAR_LENGTH[1] + 1)
        )
        assert SCAR_WIDTH[0] <= drawn.period <= SCAR_WIDTH[1]
        assert ndimage.label(drawn.mask, np.ones((3, 3)))[1] == 1


def test_patches_are_half_scars_and_lie_on_the_part() -> None:
    drawn = [rectangle_mask(np.random.default_rng(seed), (128, 128), half(128, 128)) for seed in range(100)]
    assert 30 < sum(item.kind == "scar" for item in drawn) < 70
    assert not any((item.mask & ~half(128, 128)).any() for item in drawn)
    with pytest.raises(UserError, match="foreground is empty"):
        rectangle_mask(np.random.default_rng(0), (128, 128), np.zeros((128, 128), bool))


def test_an_unturned_region_is_the_images_own_pixels_and_a_quarter_turn_only_moves_them() -> None:
    image = surface(3)
    for side in (31, 32):
        top = 40 - side // 2
        crop = image[:, top : top + side, top : top + side]
        centre = (top + (side - 1) / 2,) * 2
        assert np.abs(turned(image, side, centre, 0.0) - crop).max() < 0.01
        assert np.abs(turned(image, side, centre, 0.0, mirrored=True) - crop[:, :, ::-1]).max() < 0.01
        quarter = turned(image, side, centre, np.pi / 2)
        assert min(np.abs(quarter - np.rot90(crop, k, (1, 2))).max() for k in (1, 3)) < 0.01


@given(seed=SEEDS, side=st.sampled_from([64, 96]))
@settings(max_examples=25, deadline=None)
def test_textures_are_finite_of_the_windows_size_and_repeatable(seed: int, side: int) -> None:
    image = surface(seed % 5)
    outline = rectangle_mask(np.random.default_rng(seed), (128, 128))
    for texture, again, wanted in (
        (*(own_texture(np.random.default_rng(seed), image, side) for _ in range(2)), side),
        (*(cutpaste_texture(np.random.default_rng(seed), image, outline) for _ in range(2)), outline.window[2]),
    ):
        assert texture.shape == (3, wanted, wanted)
        assert texture.dtype == np.float32
        assert 0 <= texture.min() <= texture.max() <= 255
        assert np.array_equal(texture, again)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_surfaces_break_no_augmenter(level: int) -> None:
    flat = np.full((3, 16, 16), level, np.float32)
    for augment in AUGMENTERS:
        assert np.isfinite(augment(np.random.default_rng(0), flat)).all()


def test_every_augmenter_changes_a_surface() -> None:
    image = surface(0)[:, :64, :64].astype(np.float32)
    for augment in AUGMENTERS:
        changes = [np.abs(augment(np.random.default_rng(seed), image) - image).mean() for seed in range(10)]
        assert np.median(changes) > 1, augment


def test_turning_the_hue_leaves_gray_gray_and_a_full_turn_changes_nothing() -> None:
    gray, image = np.full((3, 8, 8), 77, np.float32), surface(1)[:, :8, :8].astype(np.float32)
    assert np.abs(rotated_hue(gray, 1.5, 0.1) - gray).max() < 0.1
    assert np.abs(rotated_hue(image, 1.0, 1.0) - image).max() < 0.1
    assert np.abs(rotated_hue(image, 1.0, 0.25) - image).max() > 5


@pytest.mark.parametrize(("source", "mask"), [("own", "noise"), ("own", "perlin"), ("cutpaste", "perlin")])
def test_triplets_are_local_visible_and_made_again_bit_for_bit(source: str, mask: str) -> None:
    made_by = maker(source, mask=mask)
    kinds = {"cutpaste": {"rectangle", "scar"}, "own": {"noise"} if mask == "noise" else {"perlin", "ridge"}}
    for triplet in generate(made_by, FIT, 10):
        change = np.abs(triplet.defect.astype(int) - triplet.normal.astype(int)).max(axis=0)
        far = ndimage.distance_transform_edt(~triplet.mask) > DEFAULTS.feather + 1
        assert change[far].max(initial=0) == 0
        assert (change[triplet.mask] > DEFAULTS.visibility * 255).mean() >= 0.5
        again = remake(made_by, FIT, triplet.candidate.number)
        assert again is not None
        assert np.array_equal(again.defect, triplet.defect)
        assert np.array_equal(again.mask, triplet.mask)
        row = made_by.row("a", triplet)
        assert row == made_by.row("a", again)
        assert row["defect_source"] == source
        assert row["mask_kind"] in kinds[source]
        assert row.get("donor", "000.png") in made_by.names


def test_own_textures_come_from_other_normals_of_the_same_role() -> None:
    made_by = maker("own")
    for role in (FIT, VALIDATION):
        sources = made_by.normals_of(role)
        candidates = [made_by.candidate(role, number) for number in range(30)]
        donors = {item.defect.values["donor"] for item in candidates}
        assert donors <= set(sources.tolist())
        if len(sources) > 1:
            assert all(item.defect.values["donor"] != item.normal for item in candidates)
            assert len(donors) > 2
        else:  # a lone normal must lend to itself
            assert donors == set(sources.tolist())


def test_a_pasted_patch_is_hard_edged_and_nearly_the_image_itself() -> None:
    for triplet in generate(maker("cutpaste"), FIT, 6):
        outline = triplet.candidate.defect.outline.mask
        assert (triplet.defect == triplet.normal)[:, ~outline].all()
        region = changed_mask(triplet.normal, triplet.defect, outline, DEFAULTS.visibility)
        assert np.array_equal(region, triplet.mask)


def test_gray_surfaces_get_gray_controls() -> None:
    made_by = maker("own")
    gray = replace(made_by, normals=np.repeat(made_by.normals[:, :1], 3, axis=1))
    assert all((triplet.defect == triplet.defect[:1]).all() for triplet in generate(gray, FIT, 4))


def test_diffusion_asks_for_its_denoiser() -> None:
    with pytest.raises(ValueError, match="denoiser"):
        list(generate(maker("diffusion"), FIT, 1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mixture": {"dtd": 1.0}}, "any of illumination, .*, own, diffusion, each to a number from 0 to 1"),
        ({"mixture": {"own": -0.1}}, r"`synthesize\.mixture` is .*each to a number from 0 to 1"),
        ({"mixture": {"own": 0.0}}, r"`synthesize\.mixture` has no share above 0"),
        ({"mixture": {}}, r"`synthesize\.mixture` has no share above 0"),
        ({"mixture": "own"}, r"`synthesize\.mixture` is 'own'; it must be a mapping"),
        ({"shade_area": [0.02, 0.9]}, r"`synthesize\.shade_area` reaches 0\.9"),
        ({"shade_change": [0.01, 0.3]}, r"`synthesize\.shade_change` begins at 0\.01"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_settings(PARAMS, {f"synthesize.{key}": value for key, value in overrides.items()})

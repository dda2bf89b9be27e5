"""The controls: the law of areas, windows and visibility of the method's own defects, without a diffusion model."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage, stats

from flawsmith.config import load_settings
from flawsmith.data.foreground import Foreground
from flawsmith.data.images import Mask
from flawsmith.data.triplets import FIT, VALIDATION
from flawsmith.errors import UserError
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.controls import (
    AUGMENTERS,
    RECTANGLE_AREA,
    SCAR_LENGTH,
    SCAR_WIDTH,
    _rotated_hue,
    _turned,
    cutpaste_texture,
    noise_mask,
    own_texture,
    rectangle_mask,
)
from flawsmith.synthesis.generate import TripletGenerator, changed_mask, generate, remake
from flawsmith.synthesis.manifest import manifest_row
from flawsmith.synthesis.masks import margin, sample_mask

SEEDS = st.integers(0, 2**32 - 1)
PARAMS = Path(__file__).parents[2] / "params.yaml"
DEFAULTS: SynthesizeSettings = replace(
    load_settings(PARAMS).synthesize, windows=(64, 96, 128), feather=2.0, area=(0.0003, 0.08), defects=(1, 1),
    shade_share=0.0, patch_share=0.0, visibility=0.0314, min_changed=0.4, opacity=(0.5, 1.0),
    perlin_periods=(8, 16, 32, 64),
)  # fmt: skip
CONTROLS = {"own": "perlin", "cutpaste": "rectangle"}


def surface(seed: int, size: int = 128) -> NDArray[np.uint8]:
    """A coloured brushed surface, (3, size, size)."""
    generator = np.random.default_rng(seed)
    grain = ndimage.gaussian_filter(generator.normal(0, 60, (size, size)), (6, 0.5)) + generator.normal(
        0, 3, (size, size)
    )
    return np.clip(np.array([120, 110, 100])[:, None, None] + grain, 0, 255).astype(np.uint8)


def maker(count: int = 8, **changes: Any) -> TripletGenerator:
    normals = np.stack([surface(seed) for seed in range(count)])
    return TripletGenerator(
        denoiser=None,
        scheduler=None,
        normals=normals,
        names=[f"{index:03d}.png" for index in range(count)],
        foreground=Foreground(False, (0.0, 0.0, 0.0), 0.0),
        settings=replace(DEFAULTS, windows=(64, 96), batch=4, **changes),
    )


def half(height: int, width: int) -> Mask:
    return np.broadcast_to(np.arange(width) < width // 2, (height, width)).copy()


@given(
    seed=SEEDS,
    feather=st.sampled_from([0.0, 2.0, 3.5]),
    shape=st.sampled_from([(128, 128), (256, 256), (128, 288), (288, 128)]),
)
@settings(max_examples=40, deadline=None)
def test_a_noise_mask_keeps_to_window_margin_area_and_foreground(
    seed: int, feather: float, shape: tuple[int, int]
) -> None:
    drawn = noise_mask(np.random.default_rng(seed), shape, replace(DEFAULTS, feather=feather), half(*shape))
    top, left, side = drawn.window
    rim = margin(feather)
    inner = np.zeros(shape, bool)
    inner[
        top + rim * (top > 0) : top + side - rim * (top + side < shape[0]),
        left + rim * (left > 0) : left + side - rim * (left + side < shape[1]),
    ] = True
    assert side in DEFAULTS.windows
    assert not (drawn.mask & ~(inner & half(*shape))).any()
    assert DEFAULTS.area[0] <= drawn.mask.mean() <= DEFAULTS.area[1]
    assert drawn.kind == "noise"
    again = noise_mask(np.random.default_rng(seed), shape, replace(DEFAULTS, feather=feather), half(*shape))
    assert np.array_equal(drawn.mask, again.mask)


def test_areas_of_noise_masks_are_log_uniform_like_those_of_perlin_masks() -> None:
    drawn = [noise_mask(np.random.default_rng(seed), (256, 256), DEFAULTS).mask.mean() for seed in range(200)]
    low, high = np.log(DEFAULTS.area)
    assert stats.kstest((np.log(drawn) - low) / (high - low), "uniform").statistic < 0.12


def test_noise_has_no_shape() -> None:
    """Neighbours agree no more than chance at the mask's density (blocks of one pixel), far less than in a blob."""

    def agreement(mask: Mask) -> float:
        return float(mask[1:][mask[:-1]].mean())  # chance that the pixel below a marked one is marked

    noise = [noise_mask(np.random.default_rng(seed), (256, 256), DEFAULTS) for seed in range(120)]
    single = [agreement(drawn.mask) for drawn in noise if drawn.period == 1 and drawn.mask.sum() > 200]
    blobs = [
        agreement(
            sample_mask(
                np.random.default_rng(seed), (256, 256), replace(DEFAULTS, ridge_share=0.0, area=(0.01, 0.08))
            ).mask
        )
        for seed in range(20)
    ]
    assert len(single) >= 5
    assert max(single) < 0.85 < min(blobs)
    assert {drawn.period for drawn in noise} == {1.0, 2.0, 4.0, 8.0}


def test_a_foreground_that_holds_no_noise_is_one_clear_error() -> None:
    scattered = np.zeros((256, 256), bool)
    scattered[::50, ::50] = True  # 36 pixels, no two in one small square
    with pytest.raises(UserError, match=r"No noise mask of 20 to 39 pixels .* widen synthesize\.area"):
        noise_mask(np.random.default_rng(0), (256, 256), replace(DEFAULTS, area=(0.0003, 0.0006)), scattered)
    with pytest.raises(UserError, match=r"The foreground has 36 pixels.* lower synthesize\.area"):
        noise_mask(np.random.default_rng(0), (256, 256), replace(DEFAULTS, area=(0.001, 0.002)), scattered)


@given(seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_rectangles_and_scars_have_the_papers_sizes(seed: int) -> None:
    drawn = rectangle_mask(np.random.default_rng(seed), (256, 256), DEFAULTS)
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
    drawn = [rectangle_mask(np.random.default_rng(seed), (128, 128), DEFAULTS, half(128, 128)) for seed in range(100)]
    assert 30 < sum(item.kind == "scar" for item in drawn) < 70
    assert not any((item.mask & ~half(128, 128)).any() for item in drawn)
    with pytest.raises(UserError, match="foreground is empty"):
        rectangle_mask(np.random.default_rng(0), (128, 128), DEFAULTS, np.zeros((128, 128), bool))


def test_an_unturned_region_is_the_images_own_pixels_and_a_quarter_turn_only_moves_them() -> None:
    image = surface(3)
    for side in (31, 32):
        top = 40 - side // 2
        crop = image[:, top : top + side, top : top + side]
        centre = (top + (side - 1) / 2,) * 2
        assert np.abs(_turned(image, side, centre, 0.0) - crop).max() < 0.01
        assert np.abs(_turned(image, side, centre, 0.0, mirrored=True) - crop[:, :, ::-1]).max() < 0.01
        turned = _turned(image, side, centre, np.pi / 2)
        assert min(np.abs(turned - np.rot90(crop, k, (1, 2))).max() for k in (1, 3)) < 0.01


@given(seed=SEEDS, side=st.sampled_from([64, 96]))
@settings(max_examples=25, deadline=None)
def test_textures_are_finite_of_the_windows_size_and_repeatable(seed: int, side: int) -> None:
    image = surface(seed % 5)
    outline = rectangle_mask(np.random.default_rng(seed), (128, 128), DEFAULTS)
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
    assert np.abs(_rotated_hue(gray, 1.5, 0.1) - gray).max() < 0.1
    assert np.abs(_rotated_hue(image, 1.0, 1.0) - image).max() < 0.1
    assert np.abs(_rotated_hue(image, 1.0, 0.25) - image).max() > 5


@pytest.mark.parametrize(
    "changes", [{"texture": "own", "mask": "noise"}, *({"texture": t, "mask": m} for t, m in CONTROLS.items())]
)
def test_a_controls_triplets_are_local_visible_and_made_again_bit_for_bit(changes: Mapping[str, Any]) -> None:
    made_by = maker(**changes)
    for triplet in generate(made_by, FIT, 10):
        change = np.abs(triplet.defect.astype(int) - triplet.normal.astype(int)).max(axis=0)
        far = ndimage.distance_transform_edt(~triplet.mask) > DEFAULTS.feather + 1
        assert change[far].max(initial=0) == 0
        assert (change[triplet.mask] > DEFAULTS.visibility * 255).mean() >= 0.5
        again = remake(made_by, FIT, triplet.candidate.number)
        assert again is not None
        assert np.array_equal(again.defect, triplet.defect)
        assert np.array_equal(again.mask, triplet.mask)
        row = manifest_row(made_by, "a", triplet)
        assert row == manifest_row(made_by, "a", again)
        assert row["texture"] == changes["texture"]
        assert (
            row["mask_kind"]
            in {"perlin": ("perlin", "ridge"), "noise": ("noise",), "rectangle": ("rectangle", "scar")}[changes["mask"]]
        )
        assert row["strength"] is None


def test_own_textures_come_from_other_normals_of_the_same_role() -> None:
    made_by = maker(texture="own")
    for role in (FIT, VALIDATION):
        sources = made_by.sources(role)
        candidates = [made_by.candidate(role, number) for number in range(30)]
        donors = {defect.donor for item in candidates for defect in item.defects}
        assert donors <= set(sources.tolist())
        if len(sources) > 1:
            assert all(defect.donor != item.source for item in candidates for defect in item.defects)
            assert len(donors) > 2
        else:  # a lone normal must lend to itself
            assert donors == set(sources.tolist())


def test_a_pasted_patch_is_hard_edged_and_nearly_the_image_itself() -> None:
    for triplet in generate(maker(texture="cutpaste", mask="rectangle"), FIT, 6):
        outline = triplet.candidate.outline.mask
        assert (triplet.defect == triplet.normal)[:, ~outline].all()
        assert triplet.candidate.defects[0].opacity == 1.0
        region = changed_mask(triplet.normal, triplet.defect, outline, DEFAULTS.visibility)
        assert np.array_equal(region, triplet.mask)


def test_gray_surfaces_get_gray_controls() -> None:
    made_by = maker(texture="own")
    gray = replace(made_by, normals=np.repeat(made_by.normals[:, :1], 3, axis=1))
    assert all((triplet.defect == triplet.defect[:1]).all() for triplet in generate(gray, FIT, 4))


def test_diffusion_asks_for_its_denoiser() -> None:
    with pytest.raises(ValueError, match="denoiser"):
        list(generate(maker(texture="diffusion"), FIT, 1))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"mask": "rectangle"}, r"`synthesize\.mask` is rectangle"),
        ({"texture": "dtd"}, "one of diffusion, own, cutpaste"),
        ({"shade_share": 0.1, "shade_area": [0.02, 0.9]}, r"`synthesize\.shade_area` reaches 0\.9"),
        ({"shade_share": 0.1, "shade_change": [0.01, 0.3]}, r"`synthesize\.shade_change` begins at 0\.01"),
        ({"defects": [0, 2]}, r"`synthesize\.defects` is \[0, 2\]"),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides: Mapping[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_settings(PARAMS, {f"synthesize.{key}": value for key, value in overrides.items()})

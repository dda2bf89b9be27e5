"""Shades: of the area asked for, soft, on the part, never seen outside their mask; and several defects in one image."""

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
from flawsmith.data.triplets import FIT
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.generate import TripletGenerator, generate, quotas, remake
from flawsmith.synthesis.manifest import manifest_row
from flawsmith.synthesis.shades import sample_shade, shaded

SEEDS = st.integers(0, 2**32 - 1)
DEFAULTS: SynthesizeSettings = replace(
    load_settings(Path(__file__).parents[2] / "params.yaml").synthesize, texture="own", mask="perlin", batch=4,
    windows=(64, 96), area=(0.002, 0.08), visibility=0.0314, min_changed=0.4, shade_area=(0.02, 0.2),
    shade_change=(0.05, 0.3), defects=(1, 1), shade_share=0.0, patch_share=0.0,
)  # fmt: skip
SIZE = 128
LIMIT = DEFAULTS.visibility * 255


def surface(seed: int, level: float = 120, grain: float = 4) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).normal(level, grain, (1, SIZE, SIZE))
    return np.repeat(np.clip(noise, 0, 255), 3, axis=0).astype(np.uint8)


def maker(**changes: Any) -> TripletGenerator:
    return TripletGenerator(
        denoiser=None,
        scheduler=None,
        normals=np.stack([surface(seed) for seed in range(6)]),
        names=[f"{index:03d}.png" for index in range(6)],
        foreground=Foreground(False, (0.0, 0.0, 0.0), 0.0),
        settings=replace(DEFAULTS, **changes),
    )


@given(seed=SEEDS, level=st.floats(40, 215), low=st.floats(0.02, 0.1), part=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_shade_has_its_area_and_is_not_seen_outside(seed: int, level: float, low: float, part: bool) -> None:
    normal = surface(0, level)
    foreground = None
    if part:
        foreground = np.zeros((SIZE, SIZE), bool)
        foreground[20:110, 15:100] = True
    wanted = replace(DEFAULTS, shade_area=(low, 2 * low))
    outline, shade = sample_shade(np.random.default_rng(seed), normal, wanted, foreground)
    assert low * 0.99 <= outline.mask.mean() <= 2 * low * 1.01
    assert 0 <= shade.alpha.min() <= shade.alpha.max() <= 1
    assert DEFAULTS.shade_change[0] * 0.9 <= abs(shade.change) <= DEFAULTS.shade_change[1]
    defect = shaded(normal, shade, outline.mask, wanted.visibility)
    change = np.abs(defect.astype(int) - normal.astype(int)).max(axis=0)
    assert change[~outline.mask].max() <= LIMIT
    assert (change[outline.mask] > LIMIT).mean() > 0.6
    if foreground is not None:
        assert not change[~foreground].any()


def test_a_shade_is_soft() -> None:
    """On a flat surface the change rises from nothing over many pixels: no step anywhere, not at the mask's edge."""
    flat = surface(0, 120, 0)
    for seed in range(20):
        outline, shade = sample_shade(np.random.default_rng(seed), flat, DEFAULTS)
        change = shaded(flat, shade, outline.mask, DEFAULTS.visibility)[0].astype(float) - 120
        step = max(np.abs(np.diff(change, axis=axis)).max() for axis in (0, 1))
        assert step <= 3 + 0.2 * np.abs(change).max()
        assert np.array_equal(np.abs(change) > LIMIT, outline.mask & (np.abs(change) > LIMIT))


def test_light_scales_the_texture_and_a_film_leaves_it() -> None:
    normal = surface(1, 100, 6)
    outline, shade = sample_shade(np.random.default_rng(2), normal, DEFAULTS)
    everywhere, inside = np.ones((SIZE, SIZE), np.float32), np.ones((SIZE, SIZE), bool)
    light = replace(shade, alpha=everywhere, gain=0.5, offset=0.0)
    film = replace(shade, alpha=everywhere, gain=0.0, offset=0.2)
    spread = normal[0].std()
    assert shaded(normal, light, inside, DEFAULTS.visibility)[0].std() == pytest.approx(1.5 * spread, rel=0.02)
    assert shaded(normal, film, inside, DEFAULTS.visibility)[0].std() == pytest.approx(spread, rel=0.02)
    nothing = replace(shade, alpha=0 * everywhere)
    assert np.array_equal(shaded(normal, nothing, outline.mask, DEFAULTS.visibility), normal)


@pytest.mark.parametrize(("level", "sign"), [(4, 1), (251, -1)])
def test_black_surfaces_only_brighten_and_white_ones_darken(level: int, sign: int) -> None:
    signs = {
        np.sign(sample_shade(np.random.default_rng(seed), surface(0, level, 0), DEFAULTS)[1].change)
        for seed in range(20)
    }
    assert signs == {sign}


def test_both_signs_occur_on_a_gray_surface() -> None:
    signs = [np.sign(sample_shade(np.random.default_rng(seed), surface(0), DEFAULTS)[1].change) for seed in range(40)]
    assert 8 < signs.count(1.0) < 32


@pytest.mark.parametrize(("share", "texture"), [("shade_share", "shade"), ("patch_share", "cutpaste")])
def test_what_some_carry_instead_leaves_the_other_candidates_as_they_were(share: str, texture: str) -> None:
    plain, mixed = maker(), maker(**{share: 0.5})
    kinds = []
    for number in range(40):
        before, after = plain.candidate(FIT, number), mixed.candidate(FIT, number)
        kinds.append(after.defects[0].texture)
        assert before.source == after.source
        if kinds[-1] != texture:
            assert np.array_equal(before.outline.mask, after.outline.mask)
            assert replace(before.defects[0], outline=after.outline) == after.defects[0]
    assert 10 < kinds.count(texture) < 30


@pytest.mark.parametrize(("shades", "patches"), [(0.2, 0.0), (0.2, 0.5), (0.0, 0.3), (1.0, 0.0), (0.0, 1.0)])
def test_shares_are_of_triplets_though_candidates_are_dropped(shades: float, patches: float) -> None:
    """So strict a rule of what is seen that many a defect is dropped and no shade."""
    made_by = maker(shade_share=shades, patch_share=patches, opacity=(0.05, 1.0), shade_change=(0.2, 0.3))
    kinds = [triplet.candidate.kind for triplet in generate(made_by, FIT, 20)]
    assert kinds.count("shade") == round(20 * shades)
    assert kinds.count("patch") == round((20 - kinds.count("shade")) * patches)
    assert len(kinds) == 20


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 500))
def test_quotas_add_up_and_leave_one_to_each_share_below_one(shades: float, patches: float, count: int) -> None:
    found = quotas(replace(DEFAULTS, shade_share=shades, patch_share=patches), count)
    assert sum(found.values()) == count
    assert min(found.values()) >= 0
    assert abs(found["shade"] - shades * count) <= 1
    assert found["texture"] > 0 or 1 in (shades, patches)


def test_shades_patches_and_several_defects_are_made_again_bit_for_bit() -> None:
    made_by = maker(shade_share=0.3, patch_share=0.3, defects=(1, 3))
    rows = []
    for triplet in generate(made_by, FIT, 24):
        again = remake(made_by, FIT, triplet.candidate.number)
        assert again is not None
        assert np.array_equal(again.defect, triplet.defect)
        assert np.array_equal(again.mask, triplet.mask)
        rows.append(manifest_row(made_by, "a", triplet))
        assert rows[-1] == manifest_row(made_by, "a", again)
        assert rows[-1]["defects"] == 1 + len(rows[-1]["further"])
        assert (rows[-1]["shade_change"] is not None) == (rows[-1]["mask_kind"] == "shade")
    assert {row["defects"] for row in rows} == {1, 2, 3}
    assert {row["texture"] for row in rows} == {"own", "shade", "cutpaste"}
    assert {row["mask_kind"] for row in rows if row["texture"] == "cutpaste"} == {"rectangle", "scar"}


def test_several_defects_share_the_area_and_all_are_marked() -> None:
    made_by = maker(defects=(3, 3))
    strengths = set()
    for triplet in generate(made_by, FIT, 8):
        outlines = [defect.outline.mask for defect in triplet.candidate.defects]
        assert len(outlines) == 3
        assert sum(outline.mean() for outline in outlines) <= DEFAULTS.area[1]
        strengths |= {defect.strength for defect in triplet.candidate.defects}
        touched = [bool((outline & triplet.mask).any()) for outline in outlines]
        assert sum(touched) >= 2
        change = np.abs(triplet.defect.astype(int) - triplet.normal.astype(int)).max(axis=0)
        assert change[ndimage.distance_transform_edt(~triplet.mask) > DEFAULTS.feather + 1].max(initial=0) == 0
    assert len(strengths) == 24


def test_an_image_of_one_defect_is_the_same_whatever_others_carry() -> None:
    single, mixed = maker(), maker(defects=(1, 2))
    same = 0
    for number in range(20):
        candidate = mixed.candidate(FIT, number)
        if len(candidate.defects) == 1:
            assert np.array_equal(candidate.outline.mask, single.candidate(FIT, number).outline.mask)
            same += 1
    assert 3 < same < 17


def test_a_change_that_nobody_can_see_leaves_an_empty_mask_and_the_image_as_it_is() -> None:
    black = np.zeros((3, 64, 64), np.uint8)
    hidden = replace(DEFAULTS, visibility=0.9)
    outline, shade = sample_shade(np.random.default_rng(3), black, hidden)
    assert not outline.mask.any()
    assert not shade.alpha.any()
    assert np.array_equal(shaded(black, shade, outline.mask, hidden.visibility), black)

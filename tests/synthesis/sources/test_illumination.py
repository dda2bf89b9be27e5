"""Shades: of the area asked for, soft, on the part, never seen outside their mask."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flawsmith.config import load_settings
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.sources.illumination import sample_shade, shaded

SEEDS = st.integers(0, 2**32 - 1)
DEFAULTS: SynthesizeSettings = replace(
    load_settings(Path(__file__).parents[3] / "params.yaml").synthesize, visibility=0.0314, shade_area=(0.02, 0.2),
    shade_change=(0.05, 0.3),
)  # fmt: skip
SIZE = 128
LIMIT = DEFAULTS.visibility * 255


def surface(seed: int, level: float = 120, grain: float = 4) -> NDArray[np.uint8]:
    noise = np.random.default_rng(seed).normal(level, grain, (1, SIZE, SIZE))
    return np.repeat(np.clip(noise, 0, 255), 3, axis=0).astype(np.uint8)


@given(seed=SEEDS, level=st.floats(40, 215), low=st.floats(0.02, 0.1), part=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_shade_has_its_area_and_is_not_seen_outside(seed: int, level: float, low: float, part: bool) -> None:
    normal = surface(0, level)
    foreground = None
    if part:
        foreground = np.zeros((SIZE, SIZE), bool)
        foreground[20:110, 15:100] = True
    wanted = replace(DEFAULTS, shade_area=(low, 2 * low))
    shade = sample_shade(np.random.default_rng(seed), normal, wanted, foreground)
    mask = shade.outline.mask
    assert low * 0.99 <= mask.mean() <= 2 * low * 1.01
    assert 0 <= shade.alpha.min() <= shade.alpha.max() <= 1
    assert DEFAULTS.shade_change[0] * 0.9 <= abs(shade.values["shade_change"]) <= DEFAULTS.shade_change[1]
    defect = shaded(normal, shade, wanted.visibility)
    change = np.abs(defect.astype(int) - normal.astype(int)).max(axis=0)
    assert change[~mask].max() <= LIMIT
    assert (change[mask] > LIMIT).mean() > 0.6
    if foreground is not None:
        assert not change[~foreground].any()


def test_a_shade_is_soft() -> None:
    """On a flat surface the change rises from nothing over many pixels: no step anywhere, not at the mask's edge."""
    flat = surface(0, 120, 0)
    for seed in range(20):
        shade = sample_shade(np.random.default_rng(seed), flat, DEFAULTS)
        change = shaded(flat, shade, DEFAULTS.visibility)[0].astype(float) - 120
        step = max(np.abs(np.diff(change, axis=axis)).max() for axis in (0, 1))
        assert step <= 3 + 0.2 * np.abs(change).max()
        assert np.array_equal(np.abs(change) > LIMIT, shade.outline.mask & (np.abs(change) > LIMIT))


def test_light_scales_the_texture_and_a_film_leaves_it() -> None:
    normal = surface(1, 100, 6)
    drawn = sample_shade(np.random.default_rng(2), normal, DEFAULTS)
    everywhere, inside = np.ones((SIZE, SIZE), np.float32), np.ones((SIZE, SIZE), bool)
    shade = replace(drawn, alpha=everywhere, outline=replace(drawn.outline, mask=inside))
    light = replace(shade, values={"shade_gain": 0.5, "shade_offset": 0.0})
    film = replace(shade, values={"shade_gain": 0.0, "shade_offset": 0.2})
    spread = normal[0].std()
    assert shaded(normal, light, DEFAULTS.visibility)[0].std() == pytest.approx(1.5 * spread, rel=0.02)
    assert shaded(normal, film, DEFAULTS.visibility)[0].std() == pytest.approx(spread, rel=0.02)
    nothing = replace(shade, alpha=0 * everywhere)
    assert np.array_equal(shaded(normal, nothing, DEFAULTS.visibility), normal)


@pytest.mark.parametrize(("level", "sign"), [(4, 1), (251, -1)])
def test_black_surfaces_only_brighten_and_white_ones_darken(level: int, sign: int) -> None:
    signs = {
        np.sign(sample_shade(np.random.default_rng(seed), surface(0, level, 0), DEFAULTS).values["shade_change"])
        for seed in range(20)
    }
    assert signs == {sign}


def test_both_signs_occur_on_a_gray_surface() -> None:
    signs = [
        np.sign(sample_shade(np.random.default_rng(seed), surface(0), DEFAULTS).values["shade_change"])
        for seed in range(40)
    ]
    assert 8 < signs.count(1.0) < 32


def test_a_change_that_nobody_can_see_leaves_an_empty_mask_and_the_image_as_it_is() -> None:
    black = np.zeros((3, 64, 64), np.uint8)
    hidden = replace(DEFAULTS, visibility=0.9, mixture={"own": 1.0})
    shade = sample_shade(np.random.default_rng(3), black, hidden)
    assert not shade.outline.mask.any()
    assert not shade.alpha.any()
    assert np.array_equal(shaded(black, shade, hidden.visibility), black)

"""Noise masks: the law of areas and windows of Perlin masks, and no shape."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flawsmith.config import load_settings
from flawsmith.data.images import Mask
from flawsmith.errors import UserError
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.masks import margin, sample_mask
from flawsmith.synthesis.noise import noise_mask

SEEDS = st.integers(0, 2**32 - 1)
DEFAULTS: SynthesizeSettings = replace(
    load_settings(Path(__file__).parents[2] / "params.yaml").synthesize, windows=(64, 96, 128), feather=2.0,
    area=(0.0003, 0.08), perlin_periods=(8, 16, 32, 64),
)  # fmt: skip


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

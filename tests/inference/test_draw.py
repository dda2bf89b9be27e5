import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import colormaps

from flawsmith.data.images import to_uint8
from flawsmith.inference.draw import (
    ALARM,
    QUIET,
    draw_overlay,
    heat_colours,
    paint_heat,
    resize_map,
    ring,
    write_caption,
)

RANGE = (0.0, 1.0)


@given(st.integers(1, 90), st.integers(1, 90))
def test_an_overlay_has_the_size_of_its_image_however_small(height: int, width: int) -> None:
    image = np.random.default_rng(0).random((3, height, width), np.float32)
    anomaly_map = np.random.default_rng(1).random((16, 16), np.float32)
    drawn = draw_overlay(image, anomaly_map, RANGE, 0.5)
    captioned = write_caption(drawn, ["DEFECT  1.23 > 0.5", "and more"], ALARM, resize_map(anomaly_map, height, width))
    for pixels in (drawn, captioned):
        assert pixels.shape == (height, width, 3)
        assert pixels.dtype == np.uint8


def test_normal_surface_is_seen_as_it_is() -> None:
    image = np.random.default_rng(0).random((3, 40, 60), np.float32)
    drawn = draw_overlay(image, np.full((16, 16), -5, np.float32), RANGE, 0.5)
    np.testing.assert_array_equal(drawn, to_uint8(image))


def test_colour_covers_the_image_as_far_as_asked_and_no_further() -> None:
    white, heat = np.full((1, 3, 3), 255, np.uint8), np.array([[0.0, 0.5, 1.0]])
    for faint, strong in ((0.0, 0.6), (0.3, 0.9)):
        share = np.array([[faint], [(faint + strong) / 2], [strong]])
        expected = (1 - share) * 255 + share * heat_colours(heat)[0]
        np.testing.assert_allclose(paint_heat(white, heat, (faint, strong))[0], expected, atol=1)


def test_the_outline_lies_around_the_region_and_leaves_it_free() -> None:
    image = np.full((3, 64, 64), 0.5, np.float32)
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[20:30, 40:50] = 1
    with_outline, without = (draw_overlay(image, anomaly_map, RANGE, threshold) for threshold in (0.5, 2.0))
    changed = (with_outline != without).any(axis=2)
    np.testing.assert_array_equal(changed, ring(anomaly_map > 0.5, 2))
    assert not changed[20:30, 40:50].any()
    assert (with_outline[19, 40:50] == 255).all()
    assert (with_outline[18, 40:50] == 0).all()
    assert not changed[:18].any()
    assert not changed[:, :38].any()


@pytest.mark.parametrize("is_hot_above", [True, False])
def test_the_caption_avoids_the_corner_that_is_hot(is_hot_above: bool) -> None:
    plain, heat = np.full((256, 256, 3), 128, np.uint8), np.zeros((256, 256))
    heat[: 32 if is_hot_above else 0] = 1
    heat[256 if is_hot_above else 224 :] = 1
    changed = (plain != write_caption(plain, ["good  0.1 <= 0.5"], QUIET, heat)).any(axis=(1, 2))
    assert (changed[:20].any(), changed[-20:].any()) == (not is_hot_above, is_hot_above)


def test_the_caption_has_the_colour_of_the_verdict() -> None:
    black = np.zeros((128, 256, 3), np.uint8)
    quiet, alarm = (write_caption(black, ["text"], colour, np.zeros((128, 256))) for colour in (QUIET, ALARM))
    assert quiet[..., 1].max() > quiet[..., 0].max()
    assert alarm[..., 0].max() > alarm[..., 1].max()


def test_colours_are_matplotlibs_inferno_and_clip() -> None:
    levels = np.linspace(0, 1, 256).reshape(16, 16)
    expected = colormaps["inferno"](levels, bytes=True)[..., :3]
    assert np.abs(heat_colours(levels).astype(int) - expected).max() <= 2
    np.testing.assert_array_equal(heat_colours(np.array([-1.0, 7.0])), heat_colours(np.array([0.0, 1.0])))


def test_a_resized_map_keeps_places_and_values() -> None:
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[:, 4:] = 3
    resized = resize_map(anomaly_map, 32, 80)
    assert resized.shape == (32, 80)
    np.testing.assert_allclose(resized[:, :30], 0, atol=1e-6)
    np.testing.assert_allclose(resized[:, 50:], 3, atol=1e-6)


def test_a_map_need_not_be_square() -> None:
    anomaly_map = np.zeros((4, 16), np.float32)
    anomaly_map[:, 12:] = 1
    drawn = draw_overlay(np.full((3, 40, 80), 0.5, np.float32), anomaly_map, RANGE, 0.5)
    changed = (drawn != 128).any(axis=2)
    assert changed[:, 64:].all()
    assert not changed[:, :50].any()


def test_what_does_not_fit_is_left_out_of_the_caption_from_its_end() -> None:
    words = ["good 0.9 <= 1", "score 1 <= 2"]
    for width, parts in ((400, 2), (100, 1), (12, 0)):
        black, heat = np.zeros((64, width, 3), np.uint8), np.zeros((64, width))
        whole, expected = (write_caption(black, part, QUIET, heat) for part in (words, words[:parts]))
        np.testing.assert_array_equal(whole, expected)
        assert whole.any() == (parts > 0)

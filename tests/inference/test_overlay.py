import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flawsmith.data.images import to_uint8
from flawsmith.inference.overlay import MAX_OPACITY, draw_overlay, heat_colours, resize_map

RANGE = (0.0, 1.0)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 90), st.integers(1, 90), st.booleans())
def test_an_overlay_has_the_size_of_its_image_however_small(height: int, width: int, alarm: bool) -> None:
    image = np.random.default_rng(0).random((3, height, width), np.float32)
    anomaly_map = np.random.default_rng(1).random((16, 16), np.float32)
    drawn = draw_overlay(image, anomaly_map, RANGE, 0.5, ["DEFECT  1.23 > 0.5", "and more"], alarm)
    assert drawn.shape == (height, width, 3)
    assert drawn.dtype == np.uint8


def test_normal_surface_is_seen_as_it_is() -> None:
    image = np.random.default_rng(0).random((3, 40, 60), np.float32)
    drawn = draw_overlay(image, np.full((16, 16), -5, np.float32), RANGE, 0.5)
    np.testing.assert_array_equal(drawn, to_uint8(image))


def test_colour_covers_the_image_as_far_as_allowed_and_no_further() -> None:
    drawn = draw_overlay(np.ones((3, 8, 8), np.float32), np.full((8, 8), 9, np.float32), RANGE, 99)
    strongest = heat_colours(np.ones(1))[0]
    expected = 255 * ((1 - MAX_OPACITY) + MAX_OPACITY * strongest)
    np.testing.assert_allclose(drawn[4, 4], expected, atol=1)


def test_the_outline_lies_around_the_region_and_leaves_it_free() -> None:
    image = np.full((3, 64, 64), 0.5, np.float32)
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[20:30, 40:50] = 1
    with_outline, without = (draw_overlay(image, anomaly_map, RANGE, threshold) for threshold in (0.5, 2.0))
    changed = (with_outline != without).any(axis=2)
    assert not changed[20:30, 40:50].any()
    assert (with_outline[19, 40:50] == 255).all()
    assert (with_outline[18, 40:50] == 0).all()
    assert not changed[:17].any()
    assert not changed[:, :36].any()


@pytest.mark.parametrize(("hot", "written", "free"), [((0, 8), -20, 0), ((56, 64), 0, -20)])
def test_the_caption_avoids_the_corner_that_is_hot(hot: tuple[int, int], written: int, free: int) -> None:
    image = np.full((3, 256, 256), 0.5, np.float32)
    anomaly_map = np.zeros((64, 64), np.float32)
    anomaly_map[hot[0] : hot[1], :8] = 1
    plain, captioned = (draw_overlay(image, anomaly_map, RANGE, 2.0, text) for text in ((), ("good  0.1 <= 0.5",)))
    changed = (plain != captioned).any(axis=(1, 2))
    top, bottom = changed[:20], changed[-20:]
    assert (top.any(), bottom.any()) == (written == 0, free == 0)


def test_the_caption_has_the_colour_of_the_verdict() -> None:
    image, anomaly_map = np.zeros((3, 128, 256), np.float32), np.zeros((8, 8), np.float32)
    quiet, alarm = (draw_overlay(image, anomaly_map, RANGE, 2.0, ["text"], flag) for flag in (False, True))
    assert quiet[..., 1].max() > quiet[..., 0].max()
    assert alarm[..., 0].max() > alarm[..., 1].max()


def test_colours_run_from_blue_to_red_and_clip() -> None:
    colours = heat_colours(np.array([[-1.0, 0.0, 0.1], [0.9, 1.0, 7.0]]))
    assert colours.shape == (2, 3, 3)
    assert ((colours >= 0) & (colours <= 1)).all()
    np.testing.assert_array_equal(colours[0, 0], colours[0, 1])
    np.testing.assert_array_equal(colours[1, 1], colours[1, 2])
    assert colours[0, 2, 2] > colours[0, 2, 0]
    assert colours[1, 0, 0] > colours[1, 0, 2]


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
    anomaly_map = np.zeros((8, 8), np.float32)
    for width, parts in ((400, 2), (100, 1), (12, 0)):
        image, words = np.zeros((3, 64, width), np.float32), ["good 0.9 <= 1", "score 1 <= 2"]
        whole, expected = (draw_overlay(image, anomaly_map, RANGE, 2.0, part) for part in (words, words[:parts]))
        np.testing.assert_array_equal(whole, expected)
        assert whole.any() == (parts > 0)

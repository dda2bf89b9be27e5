"""Draws an anomaly map over its image: heat colours, the outline of what lies above the threshold, and the verdict."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from flawsmith.data.images import FloatImage, to_uint8

MAX_OPACITY = 0.6  # of the strongest colour: the defect stays visible under it
ALARM, QUIET = (255, 96, 80), (120, 230, 140)  # caption colours: red for a defect, green for a good part

# Turbo, a rainbow map of even lightness: its polynomial fit by R. Du (A. Mikhailov, Google AI blog, 2019);
# a row a channel, powers 0 to 5.
_TURBO = np.array(
    [
        [0.13572138, 4.61539260, -42.66032258, 132.13108234, -152.94239396, 59.28637943],
        [0.09140261, 2.19418839, 4.84296658, -14.18503333, 4.27729857, 2.82956604],
        [0.10667330, 12.64194608, -60.58204836, 110.36276771, -89.90310912, 27.34824973],
    ]
)


def heat_colours(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """Values in [0, 1] (clipped) of shape `(...)` to RGB `(..., 3)` in [0, 1]."""
    powers = np.linspace(0, 1, 256)[:, None] ** np.arange(6)  # (256, 6)
    table = np.clip(powers @ _TURBO.T, 0, 1).astype(np.float32)  # (256, 3)
    picked: NDArray[np.float32] = table[np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)]
    return picked


def resize_map(anomaly_map: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Bring a map `(h, w)` to `(height, width)`, the size of the image it belongs to, bilinearly."""
    resized = Image.fromarray(anomaly_map.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32)


def draw_overlay(
    image: FloatImage,
    anomaly_map: NDArray[np.float32],
    map_range: tuple[float, float],
    pixel_threshold: float,
    caption: Sequence[str] = (),
    alarm: bool = False,
) -> NDArray[np.uint8]:
    """Draw a map `(h, w)` over an image `(3, H, W)`; returns `(H, W, 3)` uint8, of the image's own size.

    Colours run over `map_range` and their opacity rises from 0 to `MAX_OPACITY` with them, so that normal surface is
    seen as it is. The outline lies just outside the region above `pixel_threshold`, for a thin defect must not vanish
    under it. Of the parts of the `caption` as many are written as fit into one line.
    """
    height, width = image.shape[1:]
    low, high = map_range
    values = resize_map(anomaly_map, height, width)
    heat = np.clip((values - low) / (high - low), 0, 1)  # (H, W)
    opacity = (MAX_OPACITY * heat)[..., None]
    drawn = to_uint8(image) * (1 - opacity) + heat_colours(heat) * (255 * opacity)
    pixels = np.rint(drawn).astype(np.uint8)
    _outline(pixels, values > pixel_threshold)
    return _caption(pixels, caption, ALARM if alarm else QUIET, heat)


def _outline(pixels: NDArray[np.uint8], region: NDArray[np.bool_]) -> None:
    """Mark the border of a region in place: white inside black is seen on any surface."""
    if not region.any():
        return
    thickness = max(1, round(min(region.shape) / 400))
    inner = ndimage.binary_dilation(region, iterations=thickness)
    outer = ndimage.binary_dilation(inner, iterations=thickness)
    pixels[outer & ~inner] = 0
    pixels[inner & ~region] = 255


def _caption(
    pixels: NDArray[np.uint8], parts: Sequence[str], colour: tuple[int, int, int], heat: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Write one line on a dark plate in the upper or lower left corner, the cooler one, so that it hides no defect.

    It is as large as suits the image; its last parts are left out where they cannot fit, and so may be all of it.
    """
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture, "RGBA")
    sizes = range(max(10, min(height, width) // 20), 7, -1)
    for count, size in product(range(len(parts), 0, -1), sizes):
        text, font = ", ".join(parts[:count]), ImageFont.load_default(size)
        left, top, right, bottom = (round(edge) for edge in draw.textbbox((0, 0), text, font=font))
        margin = size // 3
        across, down = right - left + 2 * margin, bottom - top + 2 * margin
        if across <= width and down <= height / 4:
            lower = heat[:down, :across].max() > heat[-down:, :across].max()
            edge = height - down if lower else 0
            draw.rectangle((0, edge, across - 1, edge + down - 1), fill=(0, 0, 0, 170))
            draw.text((margin - left, edge + margin - top), text, font=font, fill=colour)
            break
    return np.asarray(picture, np.uint8)

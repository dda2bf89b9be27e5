"""Draws anomaly maps: heat colours over an image, the outline of regions, and a caption with the verdict.

The only painter and palette of the project: overlays, reports and the web page use it.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from flawsmith.data.images import FloatImage, Mask, to_uint8
from flawsmith.inference.predictor import Prediction, Predictor, is_defective
from flawsmith.inference.regions import find_peak

Pixels = NDArray[np.uint8]  # (H, W, 3)

ALARM, QUIET = (255, 96, 80), (120, 230, 140)  # caption colours: red for a defect, green for a good part

# Every fifth colour of matplotlib's "inferno" (S. van der Walt, N. Smith, CC0): the base install has no matplotlib.
_INFERNO = bytes.fromhex(
    "00000402020c0504170a072210092d160b391e0c45260c512f0a5b380962400a67490b6a510e6c59106e61136e69166e71196e78"
    "1c6d801f6c88226a902568982766a02a63a82e5fb0315bb73557bf3952c63d4dcc4248d34743d94d3ddf5337e45a31e9612bed69"
    "25f1711ff47918f78212f98b0bfa9407fb9d07fca60cfcb014fbba1ffac42af8cd37f6d746f4e156f2ea69f2f27df5f992fcffa4"
)


def heat_colours(heat: NDArray[np.floating]) -> Pixels:
    """Map values in [0, 1] (clipped) of shape `(...)` to RGB colours `(..., 3)`, from black over red to pale yellow."""
    anchors = np.frombuffer(_INFERNO, np.uint8).reshape(-1, 3)  # (52, 3)
    steps = np.linspace(0, 1, len(anchors))
    table = np.stack([np.interp(np.linspace(0, 1, 256), steps, channel) for channel in anchors.T], axis=1)
    picked: Pixels = np.rint(table).astype(np.uint8)[np.rint(np.clip(heat, 0, 1) * 255).astype(np.uint8)]
    return picked


def paint_heat(pixels: Pixels, heat: NDArray[np.floating], opacity: tuple[float, float] = (0.0, 0.6)) -> Pixels:
    """Lay heat colours over an image `(H, W, 3)`.

    Args:
        heat: `(H, W)` in [0, 1].
        opacity: of the colour where the heat is 0, and where it is 1; the default leaves a cold image as it is, and
            lets a defect be seen under the hottest colour.
    """
    faint, strong = opacity
    share = (faint + (strong - faint) * heat)[..., None]
    return np.rint(pixels * (1 - share) + heat_colours(heat) * share).astype(np.uint8)


def ring(region: Mask, thickness: int = 1) -> Mask:
    """Mark the pixels just outside a region `(H, W)`, so that an outline never hides the defect that it shows."""
    return np.asarray(ndimage.binary_dilation(region, np.ones((3, 3), bool), iterations=thickness) & ~region)


def resize_map(anomaly_map: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Bring a map `(h, w)` to `(height, width)`, the size of the image it belongs to, bilinearly."""
    resized = Image.fromarray(anomaly_map.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.float32)


def draw_prediction(image: FloatImage, prediction: Prediction, predictor: Predictor) -> Pixels:
    """Draw heat, outlined regions and verdict over an image `(3, H, W)`; returns `(H, W, 3)`."""
    value_range = (predictor.metadata.map_low, predictor.metadata.map_high)
    drawn = draw_overlay(image, prediction.anomaly_map, value_range, predictor.regions_above(prediction))
    lines = caption_parts(prediction, predictor, *image.shape[1:])
    heat = _scaled(resize_map(prediction.anomaly_map, *image.shape[1:]), value_range)
    return write_caption(drawn, lines, ALARM if prediction.is_defective else QUIET, heat)


def draw_overlay(
    image: FloatImage, anomaly_map: NDArray[np.float32], value_range: tuple[float, float], pixel_threshold: float
) -> Pixels:
    """Draw a map `(h, w)` over an image `(3, H, W)`, with an outline around what lies above the threshold.

    The lower end of `value_range` gets the first colour, fully transparent, the upper end the last one.
    """
    values = resize_map(anomaly_map, *image.shape[1:])
    drawn = paint_heat(to_uint8(image), _scaled(values, value_range))
    region = values > pixel_threshold
    if region.any():  # white inside black is seen on any surface
        thickness = max(1, round(min(region.shape) / 400))
        drawn[ring(region, 2 * thickness)] = 0
        drawn[ring(region, thickness)] = 255
    return drawn


def caption_parts(prediction: Prediction, predictor: Predictor, height: int, width: int) -> list[str]:
    """Say a verdict in words, the most important first, for an image of `height` x `width` pixels.

    Numbers are rounded so that they still lie on the side of the threshold where the verdict is.
    """
    score, threshold, is_bad = prediction.score, predictor.threshold, prediction.is_defective
    relation = ">" if is_bad else "<="
    shown = next(
        pair
        for pair in ((f"{score:.{digits}g}", f"{threshold:.{digits}g}") for digits in range(3, 18))
        if is_defective(float(pair[0]), float(pair[1])) == is_bad  # 17 digits tell all numbers apart
    )
    parts = [
        f"{'DEFECTIVE' if is_bad else 'good'}  {predictor.relative_score(score, 2):.2f} {relation} 1",
        f"score {shown[0]} {relation} {shown[1]}",
    ]
    if is_bad and not (prediction.anomaly_map > predictor.regions_above(prediction)).any():
        _, x, y = find_peak(prediction.anomaly_map, height, width)
        parts.append(f"no region, peak at {x}, {y}")
    return parts


def write_caption(
    pixels: Pixels, parts: Sequence[str], colour: tuple[int, int, int], heat: NDArray[np.floating]
) -> Pixels:
    """Write one line on a dark plate in the upper or lower left corner, the one with less `heat` `(H, W)`.

    The letters suit the size of the image. The last parts are left out where they do not fit, if need be all of them.
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


def _scaled(values: NDArray[np.float32], value_range: tuple[float, float]) -> NDArray[np.float32]:
    """Map values to heat in [0, 1]."""
    low, high = value_range
    return np.clip((values - low) / (high - low), 0, 1)

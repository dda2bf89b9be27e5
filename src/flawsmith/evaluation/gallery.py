"""Pictures of single images: the panels image | truth | heat map, and contact sheets of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from flawsmith.data.images import FloatImage, fitted, resize_image, to_uint8
from flawsmith.evaluation.assess import Assessment, Example
from flawsmith.evaluation.measure import Performance
from flawsmith.inference.draw import Pixels, paint_heat, ring
from flawsmith.inference.predictor import region_threshold
from flawsmith.pages import LIGHT

Column = tuple[str, Sequence[Example]]

SHOWN_SIDE = 1024  # pixels: larger images are shrunk before they are drawn
TRUTH = (0, 200, 255)  # cyan: rare on metal, fabric, tiles, and far from the heat map's colours
REGION = (255, 255, 255)


@dataclass(frozen=True)
class HeatScale:
    """Map values to heat, the same for all images: the upper half of the colours is what hardly any normal part shows.

    Attributes:
        floor: the median map value of calibration normals; it has the darkest colour.
        threshold: the pixel threshold; it has the middle colour.
        ceiling: the highest map value of a hot test image; it has the brightest colour.
    """

    floor: float
    threshold: float
    ceiling: float

    @classmethod
    def of(cls, performance: Performance) -> "HeatScale":
        """The scale of one detector on one test set."""
        threshold = performance.pixel_threshold.value
        floor = min(float(np.median(performance.calibration.medians)), threshold)
        ceiling = max(float(np.quantile(performance.scores.peaks, 0.95)), threshold)
        return cls(floor, threshold, ceiling)

    def __call__(self, anomaly_map: NDArray[np.float32]) -> NDArray[np.float64]:
        """Bring a map `(H, W)` to [0, 1]."""
        below = (anomaly_map - self.floor) / max(self.threshold - self.floor, 1e-12)
        above = (anomaly_map - self.threshold) / max(self.ceiling - self.threshold, 1e-12)
        return np.where(anomaly_map <= self.threshold, 0.5 * np.clip(below, 0, 1), 0.5 + 0.5 * np.clip(above, 0, 1))


def panels(example: Example, scale: HeatScale) -> tuple[Pixels, Pixels, Pixels]:
    """The image; the image with its ground truth outlined; the heat map with the regions over the pixel threshold."""
    example = _shrunk(example)
    plain = to_uint8(example.image)
    truth = plain.copy()
    if example.mask.any():
        truth[example.mask] = (0.75 * truth[example.mask] + 0.25 * np.asarray(TRUTH)).astype(np.uint8)
        truth[ring(example.mask)] = TRUTH
    return plain, truth, heat_panel(example.image, example.anomaly_map, scale, example.is_flagged)


def heat_panel(image: FloatImage, anomaly_map: NDArray[np.float32], scale: HeatScale, flagged: bool) -> Pixels:
    """The heat map over the gray image: faint where all is normal, opaque where it is hot; regions where flagged."""
    gray = to_uint8(np.repeat(image.mean(axis=0)[None], 3, axis=0))
    drawn = paint_heat(gray, scale(anomaly_map), opacity=(0.3, 0.9))
    drawn[ring(anomaly_map > region_threshold(flagged, scale.threshold))] = REGION
    return drawn


def sheet(examples: Sequence[Example], scale: HeatScale, title: str, side: int = 160) -> Pixels:
    """A contact sheet of rows image | truth | heat map | verdict, two rows abreast."""
    return _two_columns((("image", examples[::2]), ("image", examples[1::2])), scale, title, "", side)


def failures_sheet(result: Assessment, title: str, side: int = 160) -> Pixels:
    """The worst misses (left) and the worst false alarms (right), worst on top, all heat maps on one colour scale.

    Where fewer verdicts are wrong the closest calls follow; the caption of each row says which it is.
    """
    scale = HeatScale.of(result.detector)
    missed, alarms = (sum(example.is_wrong for example in part) for part in (result.misses, result.alarms))
    note = (
        f"threshold on the score {result.detector.threshold.value:.4g}; heat: dark {scale.floor:.3g}, middle "
        f"{scale.threshold:.3g} (the map's threshold, outlined white where flagged), bright {scale.ceiling:.3g}"
    )
    columns = ((f"defective: {missed} missed", result.misses), (f"good: {alarms} false alarms", result.alarms))
    return _two_columns(columns, scale, title, note, side)


def _two_columns(columns: tuple[Column, Column], scale: HeatScale, title: str, note: str, side: int) -> Pixels:
    """Rows image | truth | heat map | verdict in two columns: heading (no wider than a pane) and examples."""
    margin, words, header = 10, 150, 54 + (20 if note else 0)
    row_width, row_height = 3 * (side + margin) + words, side + margin
    rows = max(len(examples) for _, examples in columns)
    page = Image.new("RGB", (2 * row_width + 3 * margin, header + rows * row_height + margin), LIGHT.paper)
    draw = ImageDraw.Draw(page)
    large, small = ImageFont.load_default(17), ImageFont.load_default(13)
    draw.text((margin, margin), title, LIGHT.ink, large)
    draw.text((margin, margin + 22), note, LIGHT.soft, small)
    for column, (heading, examples) in enumerate(columns):
        start = margin + column * (row_width + margin)
        for index, text in enumerate((heading, "truth", "heat map", "verdict")):
            draw.text((start + index * (side + margin), header - 19), text, LIGHT.soft, small)
        for row, example in enumerate(examples):
            left, top = start, header + row * row_height
            for pane in panels(example, scale):
                height, width = fitted(pane.shape[:2], side)
                shown = Image.fromarray(pane).resize((width, height), Image.Resampling.LANCZOS)
                page.paste(shown, (left + (side - shown.width) // 2, top + (side - shown.height) // 2))
                left += side + margin
            colour = LIGHT.bad if example.is_wrong else LIGHT.good
            draw.text((left, top + 4), example.verdict.upper(), colour, large)
            folder, _, name = example.name.rpartition("/")
            for line, text in enumerate((folder, name, f"score {example.score:.4g}")):
                draw.text((left, top + 32 + 18 * line), _shorten(text, 22), LIGHT.ink, small)
    return np.asarray(page)


def _shrunk(example: Example) -> Example:
    """A large image at SHOWN_SIDE at most; of map and mask the highest value stays, so that no defect is lost."""
    factor = -(-max(example.mask.shape) // SHOWN_SIDE)
    if factor == 1:
        return example
    height, width = (-(-side // factor) for side in example.mask.shape)

    def highest(values: NDArray[Any]) -> NDArray[Any]:
        missing = [(0, size * factor - side) for size, side in zip((height, width), values.shape, strict=True)]
        return np.pad(values, missing, mode="edge").reshape(height, factor, width, factor).max(axis=(1, 3))

    return replace(
        example,
        image=resize_image(example.image, (height, width)),
        mask=highest(example.mask),
        anomaly_map=highest(example.anomaly_map),
    )


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width - width // 2) :]}"

"""Pictures of an evaluation: curves, score histogram, and the panels image | truth | heat map.

Nothing here decides anything. PNG bytes carry no time and no version, so equal results give equal files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from flawsmith.data.dataset import GOOD
from flawsmith.data.images import FloatImage, Mask, resize_image, to_uint8
from flawsmith.evaluation.assess import Assessment, Example, Performance
from flawsmith.evaluation.metrics import EIGHT_NEIGHBOURS, Curve
from flawsmith.inference.predictor import region_threshold
from flawsmith.pages import LIGHT, Theme, dress, figure_png

Pixels = NDArray[np.uint8]  # (H, W, 3)
Corner = Literal["lower left", "lower right", "upper right"]  # matplotlib's search for the best place is slow

SHOWN_SIDE = 1024  # pixels: larger images are shrunk before they are drawn
TRUTH = (0, 200, 255)  # cyan: rare on metal, fabric, tiles, and far from the heat map's colours
REGION = (255, 255, 255)


@dataclass(frozen=True)
class HeatScale:
    """Map values to colours, the same for all images: `floor` is dark, `threshold` the middle, `ceiling` bright.

    floor: the median map value of calibration normals; threshold: the pixel threshold; so the upper half of the
    colours is what hardly any normal part shows.
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
        """`(H, W)` to [0, 1]."""
        below = (anomaly_map - self.floor) / max(self.threshold - self.floor, 1e-12)
        above = (anomaly_map - self.threshold) / max(self.ceiling - self.threshold, 1e-12)
        return np.where(anomaly_map <= self.threshold, 0.5 * np.clip(below, 0, 1), 0.5 + 0.5 * np.clip(above, 0, 1))


def panels(example: Example, scale: HeatScale) -> tuple[Pixels, Pixels, Pixels]:
    """The image; the image with its ground truth outlined; the heat map with the regions over the pixel threshold."""
    example = _shrunk(example)
    plain = to_uint8(example.image)
    truth = plain.copy()
    if example.mask.any():
        tinted = 0.75 * truth[example.mask] + 0.25 * np.asarray(TRUTH)
        truth[example.mask] = tinted.astype(np.uint8)
        truth[_outline(example.mask)] = TRUTH
    return plain, truth, heat_panel(example.image, example.anomaly_map, scale, example.is_flagged)


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


def heat_panel(image: FloatImage, anomaly_map: NDArray[np.float32], scale: HeatScale, flagged: bool) -> Pixels:
    """The heat map over the grayed image: faint where all is normal, opaque where it is hot; regions where flagged."""
    heat = scale(anomaly_map)
    colours = np.asarray(colormaps["inferno"](heat))[..., :3]
    gray = np.repeat(image.mean(axis=0)[..., None], 3, axis=2)
    opacity = (0.3 + 0.6 * heat)[..., None]
    mixed = np.rint(255 * np.clip((1 - opacity) * gray + opacity * colours, 0, 1)).astype(np.uint8)
    mixed[_outline(anomaly_map > region_threshold(flagged, scale.threshold))] = REGION
    return mixed


def verdict_text(example: Example) -> str:
    """What the detector decided, and whether that was right."""
    if example.is_flagged:
        return "found" if example.defect != GOOD else "false alarm"
    return "missed" if example.defect != GOOD else "passed"


def curves_png(result: Assessment, title: str, theme: Theme = LIGHT) -> bytes:
    """Image-level ROC and precision-recall, detector and baseline."""
    figure = _figure(9.6, 4.4, title, theme)
    roc, recall = figure.subplots(1, 2)
    for performance, style in ((result.baseline, "baseline"), (result.detector, "detector")):
        shape = performance.image_curve
        label, values = _label(style), performance.values
        _line(roc, shape.false_positive_rate, shape.recall, style, theme, f"{label} {values['image_auroc'].value:.3f}")
        _precision_line(recall, shape, style, theme, f"{label} {values['image_ap'].value:.3f}")
    detector = result.detector
    spot = {"marker": "o", "ms": 7, "mfc": theme.bad, "mec": theme.paper, "ls": "none", "zorder": 5}
    roc.plot(detector.test_false_alarms.value, detector.test_detections.value, label="at the threshold", **spot)
    roc.axvline(detector.threshold.target_rate, color=theme.soft, lw=0.8, ls=":")
    _dress(roc, "Images: ROC (area)", "good images flagged", "defective images flagged", theme)
    _dress(
        recall,
        "Images: precision-recall (average precision)",
        "defective images flagged",
        "precision",
        theme,
        legend="lower left",
    )
    return figure_png(figure)


def pixel_curves_png(result: Assessment, title: str, aupro_limit: float, theme: Theme = LIGHT) -> bytes:
    """Pixel ROC, pixel precision-recall and per-region overlap, detector and baseline."""
    figure = _figure(12.6, 4.4, title, theme)
    roc, recall, overlap = figure.subplots(1, 3)
    for performance, style in ((result.baseline, "baseline"), (result.detector, "detector")):
        pixel, region, values, label = (
            performance.pixel_curve,
            performance.region_curve,
            performance.values,
            _label(style),
        )
        _line(roc, pixel.false_positive_rate, pixel.recall, style, theme, f"{label} {values['pixel_auroc'].value:.3f}")
        _precision_line(recall, pixel, style, theme, f"{label} {values['pixel_ap'].value:.3f}")
        _line(overlap, region.false_positive_rate, region.recall, style, theme, f"{label} {values['aupro'].value:.3f}")
    _dress(roc, "Pixels: ROC (area)", "normal pixels flagged", "defect pixels flagged", theme)
    _dress(
        recall,
        "Pixels: precision-recall (average precision)",
        "defect pixels flagged",
        "precision",
        theme,
        legend="lower left",
    )
    _dress(overlap, "Regions: overlap (AUPRO)", "normal pixels flagged", "mean overlap with a region", theme)
    overlap.set_xlim(0, aupro_limit)
    return figure_png(figure)


def histogram_png(result: Assessment, title: str, theme: Theme = LIGHT) -> bytes:
    """Scores of calibration normals, good and defective test images, with the threshold."""
    figure = _figure(9.6, 3.6, title, theme)
    axes = figure.subplots()
    performance = result.detector
    scores = performance.scores.scores
    defective = np.asarray([item.is_defective for item in result.items])
    everything = np.concatenate([scores, performance.calibration.scores])
    bins = np.linspace(everything.min(), max(everything.max(), everything.min() + 1e-6), 41)
    axes.hist(scores[~defective], bins=bins.tolist(), color=theme.good, alpha=0.75, label="good")
    axes.hist(scores[defective], bins=bins.tolist(), color=theme.bad, alpha=0.65, label="defective")
    axes.hist(
        performance.calibration.scores,
        bins=bins.tolist(),
        histtype="step",
        color=theme.ink,
        lw=1.1,
        label="calibration normals",
    )
    axes.axvline(performance.threshold.value, color=theme.ink, lw=1.4, ls="--", label="threshold")
    _dress(axes, "Image scores", "anomaly score", "images", theme, unit_square=False, legend="upper right")
    return figure_png(figure)


def sheet(examples: Sequence[Example], scale: HeatScale, title: str, side: int = 160) -> Pixels:
    """A contact sheet of rows image | truth | heat map | verdict, two rows abreast."""
    return _two_columns((examples[::2], examples[1::2]), ("image", "image"), scale, title, "", side)


def failures_sheet(result: Assessment, title: str, side: int = 160) -> Pixels:
    """The worst misses (left) and the worst false alarms (right), worst on top, all heat maps on one colour scale.

    Where fewer verdicts are wrong the closest calls follow; the caption of each row says which it is.
    """
    scale, detector = HeatScale.of(result.detector), result.detector
    missed, alarms = (sum(example.is_wrong for example in part) for part in (result.misses, result.alarms))
    note = (
        f"threshold on the score {detector.threshold.value:.4g}; heat: dark {scale.floor:.3g}, middle "
        f"{scale.threshold:.3g} (the map's threshold, outlined white where flagged), bright {scale.ceiling:.3g}"
    )
    headings = (f"defective: {missed} missed", f"good: {alarms} false alarms")  # no wider than a pane
    return _two_columns((result.misses, result.alarms), headings, scale, title, note, side)


def _two_columns(
    columns: tuple[Sequence[Example], Sequence[Example]],
    headings: tuple[str, str],
    scale: HeatScale,
    title: str,
    note: str,
    side: int,
) -> Pixels:
    """Rows image | truth | heat map | verdict in two columns; each column's heading stands over its images."""
    margin, words, header = 10, 150, 54 + (20 if note else 0)
    row_width, row_height = 3 * (side + margin) + words, side + margin
    rows = max(len(column) for column in columns)
    page = Image.new("RGB", (2 * row_width + 3 * margin, header + rows * row_height + margin), LIGHT.paper)
    draw = ImageDraw.Draw(page)
    fonts = {size: ImageFont.load_default(size) for size in (13, 17)}
    draw.text((margin, margin), title, LIGHT.ink, fonts[17])
    draw.text((margin, margin + 22), note, LIGHT.soft, fonts[13])
    for column, heading in enumerate(headings):
        for index, text in enumerate((heading, "truth", "heat map", "verdict")):
            left = margin + column * (row_width + margin) + index * (side + margin)
            draw.text((left, header - 19), text, LIGHT.soft, fonts[13])
    for column, row, example in (
        (column, row, example) for column, examples in enumerate(columns) for row, example in enumerate(examples)
    ):
        left = margin + column * (row_width + margin)
        top = header + row * row_height
        for pane in panels(example, scale):
            shown = Image.fromarray(pane).resize(_fitted(pane.shape[:2], side), Image.Resampling.LANCZOS)
            page.paste(shown, (left + (side - shown.width) // 2, top + (side - shown.height) // 2))
            left += side + margin
        colour = LIGHT.bad if example.is_wrong else LIGHT.good
        draw.text((left, top + 4), verdict_text(example).upper(), colour, fonts[17])
        folder, _, name = example.name.rpartition("/")
        for line, text in enumerate((folder, name, f"score {example.score:.4g}")):
            draw.text((left, top + 32 + 18 * line), _shorten(text, 22), LIGHT.ink, fonts[13])
    return np.asarray(page)


def _fitted(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Width and height of an image `(H, W)` whose longer side is brought to `side`."""
    height, width = (max(1, round(side * length / max(shape))) for length in shape)
    return width, height


def _outline(mask: Mask) -> Mask:
    """Pixels just outside a mask, so that an outline never hides the defect it shows."""
    return ndimage.binary_dilation(mask, EIGHT_NEIGHBOURS) & ~mask


def _shorten(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width - width // 2) :]}"


def _label(style: str) -> str:
    return {"detector": "detector", "baseline": "kNN baseline"}[style]


def _figure(width: float, height: float, title: str, theme: Theme) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor=theme.paper)
    figure.suptitle(title, color=theme.ink, fontsize=11, x=0.01, ha="left")
    return figure


def _precision_line(axes: Axes, shape: Curve, style: str, theme: Theme, label: str) -> None:
    """Precision holds from the recall before, as average precision counts it; without any hit there is no line."""
    hit = shape.recall > 0
    recall = np.concatenate([[0.0], shape.recall[hit]])
    precision = np.concatenate([shape.precision[hit][:1], shape.precision[hit]])
    _line(axes, recall, precision, style, theme, label, steps=True)


def _line(
    axes: Axes,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    style: str,
    theme: Theme,
    label: str,
    steps: bool = False,
) -> None:
    colour, width, dashes = (theme.detector, 2.2, "-") if style == "detector" else (theme.baseline, 1.6, "--")
    axes.plot(
        x, y, color=colour, lw=width, ls=dashes, label=label, drawstyle="steps-pre" if steps else "default", alpha=0.95
    )


def _dress(
    axes: Axes, title: str, x: str, y: str, theme: Theme, unit_square: bool = True, legend: Corner = "lower right"
) -> None:
    dress(axes, theme, title, x, y, grid=unit_square)
    if unit_square:
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.02)
    axes.legend(loc=legend, fontsize=8, frameon=False, labelcolor=theme.ink)

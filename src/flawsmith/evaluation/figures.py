"""Curves and histograms of an evaluation, for light and for dark readers.

Nothing here decides anything. PNG bytes carry no time and no version, so equal results give equal files.
"""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flawsmith.evaluation.assess import Assessment
from flawsmith.evaluation.metrics import Curve
from flawsmith.pages import Corner, Theme, dress, new_figure


class Panel(NamedTuple):
    """One panel of a figure: the curve drawn, the metric named in its legend, and its axes."""

    title: str
    curve: str  # one of `Performance.curves`
    metric: str
    x: str
    y: str


IMAGES = "defective images flagged"
PIXELS = "defect pixels flagged"
IMAGE_PANELS: tuple[Panel, ...] = (
    Panel("Images: ROC (area)", "image", "image_auroc", "good images flagged", IMAGES),
    Panel("Images: precision-recall (average precision)", "image", "image_ap", IMAGES, "precision"),
)
PIXEL_PANELS: tuple[Panel, ...] = (
    Panel("Pixels: ROC (area)", "pixel", "pixel_auroc", "normal pixels flagged", PIXELS),
    Panel("Pixels: precision-recall (average precision)", "pixel", "pixel_ap", PIXELS, "precision"),
    Panel("Regions: overlap (AUPRO)", "region", "aupro", "normal pixels flagged",
     "mean overlap with a region"),
)  # fmt: skip


def draw_image_curves(result: Assessment, title: str, theme: Theme) -> Figure:
    """Image-level ROC and precision-recall, detector and baseline."""
    figure = new_figure(9.6, 4.4, theme, title)
    roc, recall = figure.subplots(1, 2)
    for axes, panel in zip((roc, recall), IMAGE_PANELS, strict=True):
        _draw_panel(axes, panel, result, theme)
    detector = result.detector
    spot = {"marker": "o", "ms": 7, "mfc": theme.bad, "mec": theme.paper, "ls": "none", "zorder": 5}
    roc.plot(detector.test_false_alarms.value, detector.test_detections.value, label="at the threshold", **spot)
    roc.axvline(detector.threshold.target_rate, color=theme.soft, lw=0.8, ls=":")
    roc.legend(loc="lower right", fontsize=8, frameon=False, labelcolor=theme.ink)  # again, with the spot
    return figure


def draw_pixel_curves(result: Assessment, title: str, aupro_limit: float, theme: Theme) -> Figure:
    """Pixel ROC, pixel precision-recall and per-region overlap, detector and baseline."""
    figure = new_figure(12.6, 4.4, theme, title)
    panes = figure.subplots(1, 3)
    for axes, panel in zip(panes, PIXEL_PANELS, strict=True):
        _draw_panel(axes, panel, result, theme)
    panes[-1].set_xlim(0, aupro_limit)
    return figure


def draw_histogram(result: Assessment, title: str, theme: Theme) -> Figure:
    """Scores of calibration normals, good and defective test images, with the threshold."""
    figure = new_figure(9.6, 3.6, theme, title)
    axes = figure.subplots()
    detector = result.detector
    scores, calibration = detector.scores.scores, detector.calibration.scores
    defective = np.asarray([sample.is_defective for sample in result.samples])
    everything = np.concatenate([scores, calibration])
    bins = np.linspace(everything.min(), max(everything.max(), everything.min() + 1e-6), 41).tolist()
    axes.hist(scores[~defective], bins=bins, color=theme.good, alpha=0.75, label="good")
    if defective.any():
        axes.hist(scores[defective], bins=bins, color=theme.bad, alpha=0.65, label="defective")
    axes.hist(calibration, bins=bins, histtype="step", color=theme.ink, lw=1.1, label="calibration normals")
    axes.axvline(detector.threshold.value, color=theme.ink, lw=1.4, ls="--", label="threshold")
    dress(axes, theme, "Image scores", "anomaly score", "images", legend="upper right")
    return figure


def _draw_panel(axes: Axes, panel: Panel, result: Assessment, theme: Theme) -> None:
    by_recall = panel.y == "precision"
    for performance, label, colour, width, dashes in (
        (result.baseline, "PatchCore", theme.baseline, 1.6, "--"),
        (result.detector, "detector", theme.detector, 2.2, "-"),
    ):
        curve, value = performance.curves[panel.curve], performance.values[panel.metric].value
        across, up = _precision_steps(curve) if by_recall else (curve.false_positive_rate, curve.recall)
        axes.plot(
            across,
            up,
            color=colour,
            lw=width,
            ls=dashes,
            label=f"{label} {value:.3f}",
            drawstyle="steps-pre" if by_recall else "default",
            alpha=0.95,
        )
    corner: Corner = "lower left" if by_recall else "lower right"
    dress(axes, theme, panel.title, panel.x, panel.y, grid=True, legend=corner)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.02)


def _precision_steps(curve: Curve) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Recall and precision: a precision holds from the recall before, as average precision counts it.

    Both are empty without any hit.
    """
    hit = curve.recall > 0
    recall = np.concatenate([[0.0], curve.recall[hit]])
    return recall, np.concatenate([curve.precision[hit][:1], curve.precision[hit]])

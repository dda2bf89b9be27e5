"""Curves and histograms of an evaluation, for light and for dark readers.

Nothing here decides anything. PNG bytes carry no time and no version, so equal results give equal files.
"""

from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from flawsmith.evaluation.assess import Assessment
from flawsmith.evaluation.detection import WANTED, Detection, Findings, probability
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


def draw_detection(findings: Findings, title: str, theme: Theme) -> Figure:
    """A row for each source: the probability of detection over size and contrast, and over size at one contrast."""
    figure = new_figure(9.6, 0.5 + 3.9 * len(findings.by_source), theme, title)
    rows = figure.subplots(len(findings.by_source), 2, squeeze=False)
    for (plane, curve), (name, found) in zip(rows, findings.by_source.items(), strict=True):
        _draw_plane(plane, found, theme)
        dress(plane, theme, f"{name}: size and contrast", f"diameter, {findings.unit.name}", "contrast, grey levels")
        found_by_size = [(found, theme.detector, f"{name}, {found.contrast:g} grey levels")]
        if findings.real is not None:
            found_by_size.append((findings.real, theme.bad, f"{len(findings.real.trials.hits)} real defects"))
        for one, colour, label in found_by_size:
            value, low, high = one.curve
            curve.fill_between(one.sizes, low, high, color=colour, alpha=0.18, lw=0)
            curve.plot(one.sizes, value, color=colour, lw=2, label=label, ls="-" if one is found else "--")
        curve.axhline(WANTED, color=theme.soft, lw=0.8, ls=":")
        if found.a90_95 is not None:
            curve.axvline(found.a90_95, color=theme.ink, lw=1, ls="--", label="a90/95")
        curve.set_xscale("log")
        curve.set_ylim(-0.01, 1.02)
        dress(curve, theme, f"{name}: size", f"diameter, {findings.unit.name}", "share found", True, "lower right")
        for axis in (plane.xaxis, plane.yaxis, curve.xaxis):
            axis.set_major_locator(LogLocator(10, (1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_locator(NullLocator())
    return figure


def _draw_plane(axes: Axes, found: Detection, theme: Theme) -> None:
    trials = found.trials
    contrasts = np.geomspace(trials.contrasts.min(), trials.contrasts.max(), 100)
    first = found.coefficients[:1]
    plane = np.concatenate([probability(first, found.sizes, float(contrast)) for contrast in contrasts])
    shown = axes.pcolormesh(found.sizes, contrasts, plane, vmin=0, vmax=1, cmap="viridis", alpha=0.85, rasterized=True)
    if plane.min() < WANTED < plane.max():
        axes.contour(found.sizes, contrasts, plane, [WANTED], colors="white", linewidths=1.5)
    for hits, marker in ((trials.hits, "o"), (~trials.hits, "x")):
        axes.plot(trials.sizes[hits], trials.contrasts[hits], marker, color=theme.bad, ms=3.5, mew=1, ls="none")
    axes.set_xscale("log")
    axes.set_yscale("log")
    bar = axes.figure.colorbar(shown, ax=axes)
    bar.ax.tick_params(colors=theme.soft, labelsize=8)


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

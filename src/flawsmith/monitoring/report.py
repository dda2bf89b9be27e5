"""What a look at new images leaves: report.html for a person, drift.json for a program, scores.csv for a table.

Nothing here decides anything, and nothing tells of the time or the machine: equal images give equal files.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flawsmith.data.images import FloatImage
from flawsmith.files import write_csv, write_json
from flawsmith.inference.draw import draw_prediction
from flawsmith.inference.predictor import Predictor, flags, is_defective
from flawsmith.inference.sources import Unreadable
from flawsmith.monitoring.config import MonitorSettings
from flawsmith.monitoring.drift import FLAGGED, MMD, DriftReport
from flawsmith.monitoring.reference import IMAGE_STATISTICS, Measurement
from flawsmith.pages import Theme, dress, jpeg_uri, new_figure, themed, write_page
from flawsmith.sections import section_values

HTML, JSON, CSV = "report.html", "drift.json", "scores.csv"
PICTURE_SIDE = 360  # pixels of an overlay in the report
MAX_NAMED = 50  # unreadable files named in the report; scores.csv names all
MEANINGS = {
    FLAGGED: "share of all new images over the threshold; effect: lower end of its interval",
    MMD: "squared maximum mean discrepancy of the frozen teacher's pooled features of images judged good",
}


@dataclass(frozen=True)
class Watched:
    """All that the outputs tell."""

    category: str
    model: str
    report: DriftReport
    reference: Measurement
    current: Measurement
    threshold: float
    files_found: int
    unreadable: tuple[Unreadable, ...]
    settings: MonitorSettings

    @property
    def files_looked_at(self) -> int:
        """How many files were read or tried."""
        return len(self.current) + len(self.unreadable)


@dataclass(frozen=True)
class Picture:
    """One new image with its heat map, as a data URI."""

    name: str
    score: float
    is_flagged: bool
    uri: str

    @classmethod
    def of(cls, predictor: Predictor, name: str, image: FloatImage) -> "Picture":
        """Score the image once more and draw it."""
        (prediction,) = predictor.predict([image])
        drawn = draw_prediction(image, prediction, predictor)
        return cls(name, prediction.score, prediction.is_defective, jpeg_uri(drawn, PICTURE_SIDE))


def write_outputs(folder: Path, watched: Watched, pictures: Iterable[Picture]) -> None:
    """All three files."""
    write_json(folder / JSON, drift_content(watched))
    write_csv(folder / CSV, ["file", "verdict", "score", "highest_pixel", "error"], _rows(watched))
    drawings = (draw_scores, draw_image_statistics, draw_features)
    write_page(
        folder / HTML,
        Path(__file__).with_name(HTML),
        watched=watched,
        report=watched.report,
        settings=watched.settings,
        pictures=list(pictures),
        figures=[themed(partial(drawing, watched)) for drawing in drawings],
        meanings=MEANINGS,
        named=watched.unreadable[:MAX_NAMED],
        flagged=FLAGGED,
    )


def drift_content(watched: Watched) -> dict[str, Any]:
    """drift.json: the verdict with every figure it rests on."""
    report = watched.report
    return {
        "category": watched.category,
        "model": watched.model,
        "detector_digest": watched.current.detector_digest,
        "teacher_digest": watched.current.teacher_digest,
        "verdict": report.verdict,
        "drifted": report.drifted,
        "reason": report.reason,
        "notes": list(report.notes),
        "statistics": [
            {
                **{key: _rounded(value) for key, value in asdict(statistic).items()},
                "adjusted_p": _rounded(statistic.adjusted_p),
                "drifted": statistic.drifted,
                "verdict": statistic.verdict,
            }
            for statistic in report.statistics
        ],
        "score_psi": _rounded(report.score_psi),
        "shifts": [{key: _rounded(value) for key, value in asdict(change).items()} for change in report.changes],
        "flagged": {
            "images": report.flagged_images,
            "share": _rounded(report.flagged.value),
            "interval": [_rounded(report.flagged.low), _rounded(report.flagged.high)],
            "expected": _rounded(report.expected_flagged),
            "threshold": watched.threshold,
        },
        "files": {
            "found": watched.files_found,
            "looked_at": watched.files_looked_at,
            "unreadable": [{"file": item.name, "reason": item.reason} for item in watched.unreadable],
        },
        "images": {"measured": report.images, "compared": report.compared},
        "reference": {"measured": report.reference_images, "compared": report.reference_compared},
        "settings": section_values(watched.settings),
    }


def draw_scores(watched: Watched, theme: Theme) -> Figure:
    """Shares of the calibration normals and of the new images over the score, with the threshold."""
    figure = new_figure(9.6, 3.4, theme)
    axes = figure.subplots()
    _histogram(axes, watched.reference.scores, watched.current.scores, 36, theme)
    axes.axvline(watched.threshold, color=theme.bad, lw=1.4, ls="--", label="threshold")
    dress(axes, theme, "Image scores", "anomaly score", "share of images", legend="upper right")
    return figure


def draw_image_statistics(watched: Watched, theme: Theme) -> Figure:
    """The same over brightness, contrast and sharpness."""
    figure = new_figure(9.6, 3.4, theme)
    before, after = watched.reference.image_statistics, watched.current.image_statistics
    panels = figure.subplots(1, len(IMAGE_STATISTICS))
    for place, (axes, name) in enumerate(zip(panels, IMAGE_STATISTICS, strict=True)):
        _histogram(axes, before[:, place], after[:, place], 20, theme)
        dress(axes, theme, name.capitalize(), name, "" if place else "share of images")
    return figure


def draw_features(watched: Watched, theme: Theme) -> Figure:
    """The teacher's features in the plane in which all images together differ most, a dot an image."""
    before, after = plane(watched.reference.features, watched.current.features)
    flagged = flags(watched.current.scores, watched.threshold)
    figure = new_figure(9.6, 3.4, theme)
    axes = figure.subplots()
    for points, colour, marker, label in (
        (after[~flagged], theme.detector, "o", "new, judged good"),
        (after[flagged], theme.bad, "x", "new, flagged"),
        (before, theme.ink, "+", "calibration normals"),
    ):
        if len(points):
            axes.scatter(points[:, 0], points[:, 1], s=26, c=colour, marker=marker, alpha=0.75, label=label, lw=1.1)
    dress(axes, theme, "Teacher features", "first principal component", "second", legend="upper right")
    return figure


def plane(
    reference: NDArray[np.floating], current: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both sets `(n, D)` and `(m, D)` on the first two principal components of all, channels at unit deviation."""
    pooled = np.concatenate([reference, current]).astype(np.float64)
    pooled -= pooled.mean(axis=0)
    pooled /= np.maximum(pooled.std(axis=0), 1e-12)
    _, axes = np.linalg.eigh(pooled.T @ pooled)  # ascending; D is a few hundred
    chosen = axes[:, :-3:-1]
    # a component's sign is arbitrary: settle it, so that equal images give equal pictures on any machine
    chosen = chosen * np.where(chosen[np.abs(chosen).argmax(axis=0), np.arange(chosen.shape[1])] < 0, -1, 1)
    points = pooled @ chosen
    if points.shape[1] == 1:  # one feature alone has no second axis
        points = np.pad(points, ((0, 0), (0, 1)))
    return points[: len(reference)], points[len(reference) :]


def _rows(watched: Watched) -> list[list[Any]]:
    current = watched.current
    verdicts = ("good", "defective")
    measured: list[list[Any]] = [
        [str(name), verdicts[is_defective(float(score), watched.threshold)], float(score), float(peak), ""]
        for name, score, peak in zip(current.names, current.scores, current.peaks, strict=True)
    ]
    skipped: list[list[Any]] = [[item.name, "unreadable", "", "", item.reason] for item in watched.unreadable]
    return sorted([*measured, *skipped], key=lambda row: str(row[0]))


def _histogram(axes: Axes, before: NDArray[np.float32], after: NDArray[np.float32], bins: int, theme: Theme) -> None:
    both = np.concatenate([before, after])
    edges = np.linspace(both.min(), max(both.max(), both.min() + 1e-6), bins + 1).tolist()
    shares = [np.full(len(values), 1 / len(values)) for values in (before, after)]
    axes.hist(after, edges, weights=shares[1], color=theme.detector, alpha=0.6, label="new images")
    axes.hist(before, edges, weights=shares[0], histtype="step", color=theme.ink, lw=1.4, label="calibration normals")


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value

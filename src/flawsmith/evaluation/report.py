"""The report a person reads: one HTML file with every picture inside, and the figures as PNG files beside it."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flawsmith.config import Settings
from flawsmith.data.dataset import GOOD
from flawsmith.data.images import write_png
from flawsmith.evaluation.assess import Assessment, Example
from flawsmith.evaluation.figures import draw_detection, draw_histogram, draw_image_curves, draw_pixel_curves
from flawsmith.evaluation.gallery import HeatScale, failures_sheet, panels, sheet
from flawsmith.evaluation.intervals import Estimate
from flawsmith.evaluation.measure import Performance
from flawsmith.evaluation.metrics import HEADLINE, METRICS
from flawsmith.evaluation.samples import EvaluationSet
from flawsmith.evaluation.threshold import Threshold, reachable_thresholds
from flawsmith.files import atomic_file
from flawsmith.pages import DARK, LIGHT, Drawing, data_uri, figure_png, jpeg_uri, listed, percent, signed, write_page

PANE_SIDE = 512  # pixels; the lossless ones stay in the data folder
SHEET_EXAMPLES = 16


@dataclass(frozen=True)
class ReportHeader:
    """What is evaluated and how: titles and notes are made of it.

    Attributes:
        category: its name.
        settings: what the run was asked for.
        judged: the images.
        verdict: the content of the quality gate's verdict.json; empty if there is none.
        flagged_shades: share of the shades that is flagged; None if there are none.
        quick: whether this is a quick look, a detector of memories alone.
    """

    category: str
    settings: Settings
    judged: EvaluationSet
    verdict: Mapping[str, Any] = field(default_factory=dict)
    flagged_shades: Estimate | None = None
    quick: bool = False

    @property
    def warnings(self) -> list[str]:
        """Expectations that the triplets do not meet."""
        return [item["name"] for item in self.verdict.get("expectations", ()) if not item["passed"]]

    @property
    def gate(self) -> str:
        """What the quality gate said of the triplets and the DDPM behind them."""
        if not self.verdict:
            return ""
        said = f"with warnings ({', '.join(self.warnings)})" if self.warnings else "without a warning"
        return f"The triplets passed the quality gate {said}. {self.verdict.get('ddpm') or ''}".strip()

    @property
    def title(self) -> str:
        """Category and what was scored; a figure without a labelled test set says so itself."""
        images = len(self.judged.samples)
        if self.quick:
            return f"{self.category}, quick look: {images} images of the {self.judged.scored_on}"
        if not self.judged.labelled:
            return f"{self.category}: {images} SYNTHETIC images, no labelled test set"
        half = "" if self.judged.part == "all" else f" ({self.judged.part} half)"
        return f"{self.category}: {images} labelled test images{half}"


def write_report(folder: Path, result: Assessment, header: ReportHeader) -> None:
    """report.html, and for DVC and MLflow figures/{scores,curves,pixel_curves,detection,failures}.png and
    gallery/{worst,typical,limiting}.png."""
    title, scale = header.title, HeatScale.of(result.detector)
    drawings: dict[str, Drawing] = {"scores": partial(draw_histogram, result, title)}
    if header.judged.has_defects:
        drawings["curves"] = partial(draw_image_curves, result, title)
    if len(result.detector.curves["pixel"].recall):
        drawings["pixel_curves"] = partial(draw_pixel_curves, result, title, header.settings.evaluate.aupro_limit)
    if result.findings.by_source:
        drawings["detection"] = partial(draw_detection, result.findings, title)
    figures = {}
    for name, drawing in drawings.items():
        light, dark = (figure_png(drawing(theme)) for theme in (LIGHT, DARK))
        with atomic_file(folder / "figures" / f"{name}.png") as path:
            path.write_bytes(light)
        figures[name] = (data_uri(light), data_uri(dark))
    for name, examples, words in (
        ("worst", result.gallery[:SHEET_EXAMPLES], "worst first"),
        ("typical", result.typical, "the median-scored image of each kind"),
        ("limiting", result.limiting, "the calibration normals of the highest scores"),
    ):
        write_png(folder / "gallery" / f"{name}.png", sheet(examples, scale, f"{title}; {words}"))
    write_png(folder / "figures" / "failures.png", failures_sheet(result, f"{title}; worst misses and false alarms"))
    write_html(folder / "report.html", result, header, figures)


def write_html(path: Path, result: Assessment, header: ReportHeader, figures: dict[str, tuple[str, str]]) -> None:
    """The page alone. `figures` maps a name to its data URIs for light and dark."""
    detector, baseline, scale = result.detector, result.baseline, HeatScale.of(result.detector)
    counts = Counter(sample.defect for sample in result.samples)
    headline = [key for key in HEADLINE if key in detector.measured]
    gallery, thresholds = gallery_order(result), slider_thresholds(detector)
    lowest = min((one.values[key].low for one in (detector, baseline) for key in headline), default=1.0)
    write_page(
        path,
        Path(__file__).with_name("report.html"),
        {"number": _number, "interval": _interval},
        header=header,
        judged=header.judged,
        result=result,
        detector=detector,
        baseline=baseline,
        metrics=METRICS,
        keys=list(detector.measured),
        headline=headline,
        by_defect=HEADLINE,
        axis=min(0.9, int(10 * lowest) / 10),
        place=lambda value, start: round(100 * (max(value, start) - start) / (1 - start), 2),
        counts=counts,
        findings=result.findings,
        alarms=max(detector.threshold.target_rate, detector.threshold.expected_rate),
        good=counts[GOOD],
        defective=len(result.samples) - counts[GOOD],
        summary=summary(result, header.judged),
        comparison=compare_to_baseline(result),
        alarm_warning=alarm_warning(detector),
        figures=figures,
        panes=lambda example: [jpeg_uri(pane, PANE_SIDE) for pane in panels(example, scale)],
        gallery=gallery,
        wrong=sum(example.is_wrong for example in gallery),
        steps=[_step(result, threshold) for threshold in thresholds],
        chosen=thresholds.index(detector.threshold),
        saturated=any(estimate.low == estimate.high for estimate in detector.values.values()),
    )


def gallery_order(result: Assessment) -> list[Example]:
    """The typical images, found defects first, then the other worst verdicts, worst first."""
    typical = sorted(
        result.typical, key=lambda example: ("found", "missed", "false alarm", "passed").index(example.verdict)
    )
    names = {example.name for example in typical}
    return [*typical, *(example for example in result.gallery if example.name not in names)]


def slider_thresholds(detector: Performance) -> list[Threshold]:
    """The thresholds that a setting can give, lowest first, the detector's own among them."""
    chosen = detector.threshold
    others = reachable_thresholds(detector.calibration.scores)
    return sorted([chosen, *(one for one in others if one.rank != chosen.rank)], key=lambda one: one.rank)


def _step(result: Assessment, threshold: Threshold) -> dict[str, Any]:
    """What the slider shows at one threshold."""
    defective = np.asarray([sample.is_defective for sample in result.samples])
    flagged = result.detector.scores.scores.astype(np.float64) > threshold.value
    return {
        "value": threshold.value,
        "threshold": f"{threshold.value:.4g}",
        "rate": f"{threshold.target_rate:g}",
        "missed": int((defective & ~flagged).sum()),
        "alarms": int((flagged & ~defective).sum()),
        "note": "of this model" if threshold == result.detector.threshold else "",
    }


def summary(result: Assessment, judged: EvaluationSet) -> str:
    """What the detector does at its threshold, in one sentence."""
    found, false = result.flagged
    if not judged.has_defects:
        return f"At its threshold the detector flags {false} of {len(result.samples)} calibration normals."
    defective = sum(sample.is_defective for sample in result.samples)
    return (
        f"At its threshold the detector finds {found} of {defective} defective images "
        f"and flags {false} of {len(result.samples) - defective} good ones. {judged.pixel_note}"
    ).rstrip()


def compare_to_baseline(result: Assessment) -> str:
    """Whether the detector beats the baseline, as far as the paired bootstrap can tell; "" without any defect."""
    found: dict[str, list[str]] = {"clearly better": [], "clearly worse": [], "not distinguishable on these images": []}
    better, worse, unclear = found.values()
    for key in HEADLINE:
        advantage = result.advantage[key]
        if math.isfinite(advantage.value):
            side = better if advantage.low > 0 else worse if advantage.high < 0 else unclear
            side.append(f"{METRICS[key].title} ({signed(advantage.value)})")
    parts = [f"{words} in {listed(named)}" for words, named in found.items() if named]
    return f"Against PatchCore on the same teacher's features it is {'; '.join(parts)}." if parts else ""


def alarm_warning(performance: Performance) -> str | None:
    """Say so if good test images are flagged more often than the threshold can explain."""
    rate, expected = performance.test_false_alarms, performance.threshold.expected_rate
    if rate.low <= max(expected, performance.threshold.target_rate):
        return None
    return (
        f"Good test images are flagged more often ({percent(rate.value)}, interval {_interval(rate)}) than the "
        f"calibration images let expect ({percent(expected)}): the test images differ from the normal images of "
        "training (light, position, product). Add such normal images to train/good."
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "no mask"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.3f}\N{EN DASH}{estimate.high:.3f}" if math.isfinite(estimate.low) else ""

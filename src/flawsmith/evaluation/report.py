"""The report a person reads: one HTML file with every picture inside, and the figures as PNG files beside it."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flawsmith.data.images import write_png
from flawsmith.evaluation.assess import KEYS, Assessment, Example, Performance
from flawsmith.evaluation.figures import (
    HeatScale,
    curves_png,
    failures_sheet,
    histogram_png,
    panels,
    pixel_curves_png,
    sheet,
    verdict_text,
)
from flawsmith.evaluation.intervals import Estimate
from flawsmith.evaluation.outputs import pixel_note, scored_on
from flawsmith.files import atomic_file
from flawsmith.pages import DARK, LIGHT, Theme, data_uri, jpeg_uri, listed, percent, render, signed

PANE_SIDE = 256  # pixels; the lossless ones stay in the data folder
NAMES = {
    "image_auroc": ("Image AUROC", "chance that a defective image scores above a good one"),
    "image_ap": ("Image AP", "average precision of images sorted by score"),
    "image_f1_max": ("Image F1-max", "best F1 over all thresholds, picked with the labels: an upper bound"),
    "pixel_auroc": ("Pixel AUROC", "chance that a defect pixel is hotter than a normal one"),
    "pixel_ap": ("Pixel AP", "average precision of pixels sorted by heat; strict where defects are small"),
    "pixel_f1_max": ("Pixel F1-max", "best F1 of marked pixels, picked with the labels: an upper bound"),
    "aupro": ("AUPRO", "mean overlap with each defect region while few normal pixels are marked"),
}
HEADLINE = ("image_auroc", "pixel_auroc", "aupro")
SHEET_EXAMPLES = 16


@dataclass(frozen=True)
class Subject:
    """What is evaluated and how: the words and numbers of titles and notes."""

    category: str
    labelled: bool
    aupro_limit: float
    bootstrap: int
    image_size: int
    teacher: str
    part: str = "all"
    gate: str = ""  # what the quality gate said of the triplets and the DDPM behind them
    warned: bool = False  # and whether that is a warning
    shades: int = 0  # held-out triplets that change the light alone, and the share of them that is flagged
    flagged_shades: Estimate | None = None


def write_report(folder: Path, result: Assessment, subject: Subject) -> None:
    """report.html, and for DVC and MLflow figures/{scores,curves,pixel_curves,failures}.png and
    gallery/{worst,typical,limiting}.png."""
    title = figure_title(result, subject)
    drawings: dict[str, Callable[[Theme], bytes]] = {
        "scores": lambda theme: histogram_png(result, title, theme),
        "curves": lambda theme: curves_png(result, title, theme),
    }
    if len(result.detector.pixel_curve.recall):
        drawings["pixel_curves"] = lambda theme: pixel_curves_png(result, title, subject.aupro_limit, theme)
    light = {name: draw(LIGHT) for name, draw in drawings.items()}
    for name, picture in light.items():
        with atomic_file(folder / "figures" / f"{name}.png") as path:
            path.write_bytes(picture)
    scale = HeatScale.of(result.detector)
    for name, examples, words in (
        ("worst", result.gallery[:SHEET_EXAMPLES], "worst first"),
        ("typical", result.typical, "the median-scored image of each kind"),
        ("limiting", result.limiting, "the calibration normals of the highest scores"),
    ):
        write_png(folder / "gallery" / f"{name}.png", sheet(examples, scale, f"{title}; {words}"))
    write_png(folder / "figures" / "failures.png", failures_sheet(result, f"{title}; worst misses and false alarms"))
    figures = {name: (data_uri(light[name]), data_uri(draw(DARK))) for name, draw in drawings.items()}
    with atomic_file(folder / "report.html") as path:
        path.write_text(render_report(result, subject, figures), encoding="utf-8")


def figure_title(result: Assessment, subject: Subject) -> str:
    """Category and what was scored; a figure without a labelled test set says so itself."""
    if subject.labelled:
        half = "" if subject.part == "all" else f" ({subject.part} half)"
        return f"{subject.category}: {len(result.items)} labelled test images{half}"
    return f"{subject.category}: {len(result.items)} SYNTHETIC images, no labelled test set"


def render_report(result: Assessment, subject: Subject, figures: dict[str, tuple[str, str]]) -> str:
    """The HTML text. `figures` maps a name to its data URIs for light and dark."""
    detector, scale = result.detector, HeatScale.of(result.detector)
    counts = Counter(item.defect for item in result.items)
    measured = [key for key in KEYS if math.isfinite(detector.values[key].value)]
    headline = [key for key in HEADLINE if key in measured]
    lows = [performance.values[key].low for performance in (detector, result.baseline) for key in headline]
    axis = min(0.9, int(10 * min(lows)) / 10)
    return render(
        Path(__file__).with_name("report.html"),
        {"number": _number, "interval": _interval},
        subject=subject,
        result=result,
        detector=detector,
        baseline=result.baseline,
        title=figure_title(result, subject),
        scored_on=scored_on(subject.labelled, subject.part),
        names=NAMES,
        keys=measured,
        headline=headline,
        axis=axis,
        place=lambda value, start: round(100 * (max(value, start) - start) / (1 - start), 2),
        good=counts["good"],
        defective=len(result.items) - counts["good"],
        counts=counts,
        summary=summary(result),
        comparison=compare(result),
        alarm_warning=alarm_warning(detector),
        flagged=_flagged_counts(result),
        figures=figures,
        gallery=[_card(example, scale) for example in result.gallery],
        typical=[_card(example, scale) for example in result.typical],
        limiting=[_card(example, scale) for example in result.limiting],
        wrong=sum(example.is_wrong for example in result.gallery),
        kinds=Counter(verdict_text(example) for example in result.gallery),
        saturated=any(estimate.low == estimate.high for estimate in detector.values.values()),
    )


def summary(result: Assessment) -> str:
    """What the detector does at its threshold, in one sentence."""
    found, false = _flagged_counts(result)
    defective = sum(item.is_defective for item in result.items)
    return (
        f"At its threshold the detector finds {found} of {defective} defective images "
        f"and flags {false} of {len(result.items) - defective} good ones. {pixel_note(result.items)}"
    ).rstrip()


def compare(result: Assessment) -> str:
    """Whether the detector beats the baseline, as far as the paired bootstrap can tell."""
    better: list[str] = []
    worse: list[str] = []
    open_: list[str] = []
    for key in HEADLINE:
        advantage = result.advantage[key]
        if math.isnan(advantage.value):
            continue
        side = better if advantage.low > 0 else worse if advantage.high < 0 else open_
        side.append(f"{NAMES[key][0]} ({signed(advantage.value)})")
    parts = [
        f"{words} in {listed(side)}"
        for words, side in (
            ("clearly better", better),
            ("clearly worse", worse),
            ("not distinguishable on these images", open_),
        )
        if side
    ]
    return f"Against kNN on the same teacher's features it is {'; '.join(parts)}."


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


def _flagged_counts(result: Assessment) -> tuple[int, int]:
    """Defective and good images flagged."""
    flags = [
        (item.is_defective, result.detector.is_flagged(float(score)))
        for item, score in zip(result.items, result.detector.scores.scores, strict=True)
    ]
    return sum(bad and flag for bad, flag in flags), sum(flag and not bad for bad, flag in flags)


def _card(example: Example, scale: HeatScale) -> dict[str, Any]:
    return {
        "example": example,
        "verdict": verdict_text(example),
        "kind": verdict_text(example).replace(" ", "-"),
        "panes": [jpeg_uri(pane, PANE_SIDE) for pane in panels(example, scale)],
    }


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "no mask"


def _interval(estimate: Estimate) -> str:
    return f"{estimate.low:.3f}\N{EN DASH}{estimate.high:.3f}" if math.isfinite(estimate.low) else ""

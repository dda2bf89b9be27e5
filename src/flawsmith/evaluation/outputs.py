"""What an evaluation leaves on disk in formats that others read: metrics.json, bootstrap draws, CSV curves and scores,
parity images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.images import Mask, write_png
from flawsmith.data.tiling import Place, Tiling
from flawsmith.evaluation.assess import Assessment, spread
from flawsmith.evaluation.intervals import Estimate
from flawsmith.evaluation.measure import Performance
from flawsmith.evaluation.metrics import KEYS, Curve
from flawsmith.evaluation.samples import EvaluationSet, Sample
from flawsmith.files import atomic_file, fit_name, write_csv, write_json

GRID = np.linspace(0, 1, 201)


def write_data(
    folder: Path,
    result: Assessment,
    judged: EvaluationSet,
    training_precision: str = "",
    flagged_shades: Estimate | None = None,
) -> None:
    """metrics.json, draws.npz, summary/ for `dvc metrics`, curves for `dvc plots`, and the scores as CSV."""
    detector, baseline = result.detector, result.baseline
    content = metrics_content(result, judged) | {"training_precision": training_precision}
    content["detection"] = result.findings.content()
    if flagged_shades:
        content["shades"] = {"n": len(judged.shades), **_flat({"flagged_rate": flagged_shades})}
    write_json(folder / "metrics.json", content)
    write_draws(folder / "draws.npz", detector)
    # `dvc metrics show` makes a row of a file and a column of a key: all of metrics.json would be 60 columns
    for name, performance in (("detector", detector), ("patchcore", baseline)):
        headline = {key: None if is_missing(one) else round(one.value, 4) for key, one in performance.values.items()}
        write_json(folder / "summary" / f"{name}.json", headline)
    for roc, pr, curves in (
        ("roc.csv", "pr.csv", (detector.curves["image"], baseline.curves["image"])),
        ("curves/pixel_roc.csv", "curves/pixel_pr.csv", (detector.curves["pixel"], baseline.curves["pixel"])),
    ):
        _write_curve(folder / roc, "fpr", "tpr", [_recall_at(curve) for curve in curves], judged.scored_on)
        _write_curve(folder / pr, "recall", "precision", [_precision_at(curve) for curve in curves], judged.scored_on)
    overlap = [_recall_at(curve) for curve in (detector.curves["region"], baseline.curves["region"])]
    _write_curve(folder / "curves/pro.csv", "fpr", "region_overlap", overlap, judged.scored_on)
    others = [_exact(score) for score in baseline.scores.scores]
    write_csv(
        folder / "scores.csv",
        ["file", "defect", "score", "verdict", "baseline_score"],
        ([*row, other] for row, other in zip(_score_rows(result.samples, detector), others, strict=True)),
    )
    write_csv(
        folder / "calibration_scores.csv",
        ["file", "score", "highest_pixel"],
        (
            [sample.name, _exact(score), _exact(peak)]
            for sample, score, peak in zip(
                result.calibration, detector.calibration.scores, detector.calibration.peaks, strict=True
            )
        ),
    )


def write_performance(folder: Path, performance: Performance, judged: EvaluationSet) -> None:
    """metrics.json, draws.npz and scores.csv of one detector judged alone, in the form that `write_data` gives them."""
    write_json(folder / "metrics.json", performance_content(performance, judged))
    write_draws(folder / "draws.npz", performance)
    rows = _score_rows(judged.samples, performance)
    write_csv(folder / "scores.csv", ["file", "defect", "score", "verdict"], rows)


def metrics_content(result: Assessment, judged: EvaluationSet) -> dict[str, Any]:
    """metrics.json: flat keys, each with `<key>_ci`, null where not measured (pixels without masks); rates at the
    threshold; the baseline.

    Metrics are rounded to 6 decimals; thresholds are exact, since a verdict hangs on them.
    """
    return {
        **performance_content(result.detector, judged),
        "baseline": _figures(result.baseline),
        "over_baseline": _flat(result.advantage),
    }


def performance_content(performance: Performance, judged: EvaluationSet) -> dict[str, Any]:
    """The part of metrics.json that one detector alone has."""
    samples = judged.samples
    defective = sum(sample.is_defective for sample in samples)
    by_defect = {
        name: {
            "n": sum(sample.defect == name for sample in samples),
            **_flat({**values, "detection_rate": performance.detections[name]}),
        }
        for name, values in performance.by_defect.items()
    }
    return {
        **_figures(performance),
        "by_defect": by_defect,
        "labelled": judged.labelled,
        "part": judged.part,
        "scored_on": judged.scored_on,
        "n_good": len(samples) - defective,
        "n_defective": defective,
        "n_with_mask": sum(sample.is_defective and sample.has_pixel_labels for sample in samples),
        "n_calibration": len(performance.calibration.scores),
        "false_alarm_rate": performance.threshold.target_rate,
        "expected_false_alarm_rate": round(performance.threshold.expected_rate, 6),
    }


def write_draws(path: Path, performance: Performance) -> None:
    """The bootstrap draws as .npz: one float64 array `(B,)` for each of KEYS that was measured.

    Evaluations of the same images with the same evaluate.seed and evaluate.bootstrap share their resamples, so their
    draws may be subtracted one by one: a paired bootstrap over images.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as stream:
        measured = {key: performance.draws[key] for key in KEYS if not is_missing(performance.values[key])}
        np.savez(stream, **measured)  # type: ignore[arg-type]


def write_parity_images(folder: Path, samples: Sequence[Sample], count: int, tiling: Tiling) -> None:
    """Up to `count` test images, good and defective, as lossless PNG at the size of the model's input: the export stage
    may not open the test set itself. A name tells order, defect type and file.

    Of an image in tiles it is the one with the most defective pixels, of a good image the one in the middle.
    """
    for place, index in enumerate(spread(samples, count)):
        sample = samples[index]
        image, mask = sample.load()
        if tiling.is_tiled:
            image = tiling.cut(tiling.pad(image), _telling_tile(tiling, mask))
        write_png(folder / fit_name(f"{place:03d}-{sample.defect}-{Path(sample.name).stem}.png"), image)


def _telling_tile(tiling: Tiling, mask: Mask) -> Place:
    places = tiling.places(*mask.shape)
    marked = [np.count_nonzero(mask[top : top + tiling.size, left : left + tiling.size]) for top, left in places]
    return places[int(np.argmax(marked))] if any(marked) else places[len(places) // 2]


def _figures(performance: Performance) -> dict[str, Any]:
    rates = {
        "calibration_false_alarm_rate": performance.calibration_false_alarms,
        "test_false_alarm_rate": performance.test_false_alarms,
        "test_detection_rate": performance.test_detections,
    }
    return {
        **_flat({**performance.values, **rates}),
        "threshold": performance.threshold.value,
        "pixel_threshold": performance.pixel_threshold.value,
        "typical_score": float(np.median(performance.calibration.scores)),
    }


def _flat(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, estimate in estimates.items():
        missing = is_missing(estimate)
        flat[key] = None if missing else round(estimate.value, 6)
        flat[f"{key}_ci"] = None if missing else [round(estimate.low, 6), round(estimate.high, 6)]
    return flat


def is_missing(estimate: Estimate) -> bool:
    """Whether a figure was not measured, for want of masks; a value that went wrong has bounds."""
    return bool(np.isnan(estimate).all())


def _score_rows(samples: Sequence[Sample], performance: Performance) -> list[list[str]]:
    return [
        [sample.name, sample.defect, _exact(score), "defective" if performance.is_flagged(float(score)) else "good"]
        for sample, score in zip(samples, performance.scores.scores, strict=True)
    ]


def _recall_at(curve: Curve) -> NDArray[np.float64]:
    """The recall reached without a higher false positive rate than each of GRID: a curve's step, no interpolation."""
    if not len(curve.recall):
        return curve.recall
    return curve.recall[np.searchsorted(curve.false_positive_rate, GRID, side="right") - 1]


def _precision_at(curve: Curve) -> NDArray[np.float64]:
    """The precision where each recall of GRID is reached first."""
    return curve.precision[np.searchsorted(curve.recall, GRID)] if len(curve.recall) else curve.precision


def _write_curve(path: Path, x: str, y: str, values: Sequence[NDArray[np.float64]], words: str) -> None:
    places = GRID[: len(values[0])]  # none, of pixels without masks
    rows = ([float(place), float(ours), float(theirs)] for place, ours, theirs in zip(places, *values, strict=True))
    write_csv(path, [x, y, f"baseline_{y}", "scored_on"], ([*row, words] for row in rows))


def _exact(value: np.float32) -> str:
    return repr(float(value))  # every digit in double precision too, so a reader's verdicts are ours

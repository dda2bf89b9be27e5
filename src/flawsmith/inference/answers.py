"""What is told about one image: plain values for tables and wires, and the overlay."""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.images import FloatImage
from flawsmith.inference.overlay import draw_overlay
from flawsmith.inference.predictor import Prediction, Predictor, is_defective
from flawsmith.inference.regions import MAX_REGIONS, find_peak, find_regions


def describe(prediction: Prediction, predictor: Predictor, height: int, width: int) -> dict[str, Any]:
    """A prediction as plain JSON values, places in pixels of the `height` x `width` original.

    The verdict follows from what is shown: `score` lies above `threshold`, and `relative_score` above 1, if and only if
    the image is defective; `regions` are those of a defective image alone.
    """
    peak, peak_x, peak_y = find_peak(prediction.anomaly_map, height, width)
    regions = find_regions(prediction.anomaly_map, predictor.regions_above(prediction), height, width)
    score, threshold = _short(prediction.score), predictor.threshold
    return {
        "verdict": "defective" if prediction.is_defective else "good",
        "score": score if is_defective(score, threshold) == prediction.is_defective else prediction.score,
        "threshold": threshold,
        "relative_score": predictor.relative_score(prediction.score),
        "peak_x": peak_x,
        "peak_y": peak_y,
        "peak_value": _short(peak),
        "width": width,
        "height": height,
        "region_count": len(regions),
        "regions": [
            {
                **asdict(region),
                "area": _short(region.area),
                "peak": _short(region.peak),
                "polygon": [[x, y] for x, y in region.polygon],
            }
            for region in regions[:MAX_REGIONS]
        ],
    }


def draw(image: FloatImage, prediction: Prediction, predictor: Predictor) -> NDArray[np.uint8]:
    """The overlay of an image `(3, H, W)`: heat, outline and verdict; `(H, W, 3)`."""
    return draw_overlay(
        image,
        prediction.anomaly_map,
        (predictor.metadata.map_low, predictor.metadata.map_high),
        predictor.regions_above(prediction),
        _stamp(prediction, predictor, *image.shape[1:]),
        prediction.is_defective,
    )


def _stamp(prediction: Prediction, predictor: Predictor, height: int, width: int) -> list[str]:
    """What is written on an overlay, the most important first."""
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


def _short(value: float) -> float:
    """7 significant digits: all that float32 holds."""
    return float(f"{value:.7g}")

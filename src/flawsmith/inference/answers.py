"""What is told about one image: plain values for tables and wires, and the overlay."""

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flawsmith.images import FloatImage
from flawsmith.inference.overlay import draw_overlay
from flawsmith.inference.predictor import Prediction, Predictor
from flawsmith.inference.regions import MAX_REGIONS, find_peak, find_regions


def describe(prediction: Prediction, predictor: Predictor, height: int, width: int) -> dict[str, Any]:
    """A prediction as plain JSON values, places in pixels of the `height` x `width` original."""
    peak, peak_x, peak_y = find_peak(prediction.anomaly_map, height, width)
    regions = find_regions(prediction.anomaly_map, predictor.pixel_threshold, height, width)
    return {
        "verdict": "defective" if prediction.is_defective else "good",
        "score": _short(prediction.score),
        "threshold": _short(predictor.threshold),
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
    verdict = "DEFECTIVE" if prediction.is_defective else "good"
    relation = ">" if prediction.is_defective else "<="
    return draw_overlay(
        image,
        prediction.anomaly_map,
        (predictor.metadata.map_low, predictor.metadata.map_high),
        predictor.pixel_threshold,
        f"{verdict}  {prediction.score:.3g} {relation} {predictor.threshold:.3g}",
        prediction.is_defective,
    )


def _short(value: float) -> float:
    """7 significant digits: all that float32 holds."""
    return float(f"{value:.7g}")

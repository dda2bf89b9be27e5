"""Turns a prediction into plain values and bytes: for tables, JSON and the network."""

import base64
import io
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawsmith.inference.predictor import Prediction, Predictor, is_defective
from flawsmith.inference.regions import MAX_REGIONS, find_peak, find_regions


def describe(prediction: Prediction, predictor: Predictor, height: int, width: int) -> dict[str, Any]:
    """Turn a prediction into JSON values, with places in pixels of the `height` x `width` original.

    The verdict follows from the numbers shown: `score` lies above `threshold`, and `relative_score` above 1, if and
    only if the image is defective. Only a defective image has `regions`.
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


def identify(predictor: Predictor, version: str = "") -> dict[str, str]:
    """Say which model answered; `version` is its version in the registry, "" for a file."""
    return {
        "category": predictor.metadata.title,
        "version": version,
        "digest": predictor.digest,
        "provider": predictor.provider,
    }


def encode_map(anomaly_map: NDArray[np.float32]) -> dict[str, Any]:
    """Encode a map `(h, w)` as a 16-bit gray PNG in base64: a value is `low + pixel / 65535 * (high - low)`."""
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    levels = np.rint((anomaly_map.astype(np.float64) - low) / ((high - low) or 1.0) * 65535).astype(np.uint16)
    return {"png": encode_png(levels), "low": low, "high": high}


def encode_png(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> str:
    """Encode `(H, W[, 3])` as a PNG in base64."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def _short(value: float) -> float:
    """Round to 7 significant digits: all that float32 holds."""
    return float(f"{value:.7g}")

"""Images and maps as bytes, for whoever asks over a wire."""

import base64
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def encode_map(anomaly_map: NDArray[np.float32]) -> dict[str, Any]:
    """A map `(h, w)` as a 16-bit gray PNG in base64: a value is `low + pixel / 65535 * (high - low)`."""
    low, high = float(anomaly_map.min()), float(anomaly_map.max())
    levels = np.rint((anomaly_map.astype(np.float64) - low) / ((high - low) or 1.0) * 65535).astype(np.uint16)
    return {"png": encode_png(levels), "low": low, "high": high}


def encode_png(pixels: NDArray[np.uint8] | NDArray[np.uint16]) -> str:
    """`(H, W[, 3])` as a PNG in base64."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG", compress_level=1)
    return base64.b64encode(stream.getvalue()).decode("ascii")

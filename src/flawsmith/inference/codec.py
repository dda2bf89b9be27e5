"""Images and maps as bytes, for whoever asks over a wire."""

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawsmith.errors import UserError
from flawsmith.images import FloatImage, read_image


def decode_image(content: bytes | bytearray | memoryview, name: str, max_pixels: int) -> FloatImage:
    """The bytes of an image file to pixels, through the same door as files.

    Raises:
        UserError: as `read_image`; `name` stands for the file.
    """
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        try:
            return read_image(Path(file.name), max_pixels)
        except UserError as error:
            raise UserError(str(error).replace(file.name, name)) from error


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

"""Parts photographed under one light, as images and as plain numbers."""

from dataclasses import replace

import numpy as np
import toy_onnx
from numpy.typing import NDArray
from toy_onnx import SIZE

from flawsmith.data.images import FloatImage
from flawsmith.monitoring.reference import Measurement

METADATA = replace(toy_onnx.METADATA, threshold=0.7, pixel_threshold=0.6, map_high=0.9)


def part(index: int, light: float = 1.0, defect: bool = False) -> FloatImage:
    """A speckled plate; its brightest pixel stays below the threshold unless it bears a defect."""
    generator = np.random.default_rng([5, index])
    image = (0.4 + 0.15 * generator.random((1, SIZE, SIZE)) + 0.05 * generator.random()).repeat(3, axis=0) * light
    if defect:
        image[:, 8:11, 8:11] = 0.95
    return np.clip(image, 0, 1).astype(np.float32)


def measurement(
    scores: NDArray[np.floating], features: NDArray[np.floating], detector: str = "d", teacher: str = "t"
) -> Measurement:
    """A measurement made of numbers."""
    count = len(scores)
    return Measurement(
        np.asarray([f"{index:04d}.png" for index in range(count)]),
        np.asarray(scores, np.float32),
        np.asarray(scores, np.float32),
        np.tile(np.asarray([[0.5, 0.1, 0.2]], np.float32), (count, 1)),
        np.asarray(features, np.float32),
        detector,
        teacher,
    )

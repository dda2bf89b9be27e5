"""Parts photographed under one light, as images and as plain numbers."""

import numpy as np
from numpy.typing import NDArray

from flawsmith.images import FloatImage
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.monitoring.reference import Measurement

SIZE = 32
METADATA = ModelMetadata(
    category="plate",
    threshold=0.7,
    pixel_threshold=0.6,
    false_alarm_rate=0.05,
    input_size=SIZE,
    map_low=0.1,
    map_high=0.9,
    detector_digest="ab" * 32,
    teacher="none",
    flawsmith_version="0.1.0",
)


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

"""Scores images with an exported model: onnxruntime only, no torch, so that it runs on a small machine at the line.

predictor = Predictor(Path("model.onnx"))
prediction, = predictor.predict([read_image(Path("part.png"))])
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.images import MAX_PIXELS, FloatImage, Reading
from flawsmith.data.tiling import Tiling
from flawsmith.errors import UserError
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.inference.network import Network


@dataclass(frozen=True)
class Prediction:
    """The verdict on one image; higher map values are more anomalous.

    `anomaly_map` is `(H, W)`, of the shape of the model's input, or of a model that looks at tiles `(h, w)`, at the
    image's working resolution.
    """

    score: float
    is_defective: bool
    anomaly_map: NDArray[np.float32]


class Predictor:
    """An exported model, ready to score images of any size.

    Args:
        model_path: the `model.onnx` of the export stage.
        threads: CPU threads of one run; None leaves the choice to onnxruntime (one a physical core).
        threshold, pixel_threshold: replace the ones calibrated at training time, which the file carries.
        provider: as `Network`'s.

    Raises:
        UserError: the file is missing, no ONNX model, not exported by flawsmith, or an argument is out of range; or
            the provider demanded is not there.
    """

    def __init__(
        self,
        model_path: Path,
        threads: int | None = None,
        threshold: float | None = None,
        pixel_threshold: float | None = None,
        provider: str | None = None,
    ) -> None:
        self._network = Network(model_path, threads, provider)
        self.metadata = ModelMetadata.from_properties(self._network.properties, str(model_path))
        self.input_shape = self._network.input_shape  # height and width
        try:
            self.tiling = Tiling(self.input_shape, self.metadata.scale, self.metadata.tile_overlap)
        except ValueError as error:
            raise UserError(f"{model_path} has damaged metadata ({error}); export the model again.") from error
        self.digest = self._network.digest  # of the bytes that were loaded
        self.provider = self._network.provider  # where it really computes
        self.threshold = _chosen("threshold", threshold, self.metadata.threshold)
        self.pixel_threshold = _chosen("pixel_threshold", pixel_threshold, self.metadata.pixel_threshold)

    def reading(self, max_pixels: int = MAX_PIXELS, limit: str = Reading.limit) -> Reading:
        """Say how images are read for this model: on the scale of values that it has learned."""
        return Reading(max_pixels, self.metadata.white_level, limit)

    def predict(self, images: Sequence[FloatImage]) -> list[Prediction]:
        """Score RGB images `(3, H, W)` in [0, 1] of any sizes: memory grows with their number.

        Raises:
            UserError: an image has another shape or range.
            FlawsmithError: the model answers with NaN or infinity, which no threshold could judge.
        """
        for index, image in enumerate(images):
            _check_image(image, index)
        return self._judge([self.tiling.prepare(image) for image in images])

    def predict_prepared(self, images: Sequence[FloatImage]) -> list[Prediction]:
        """Score images that are at this model's working resolution already, so that they are not resized again.

        A model without tiles resizes them as it does any image.

        Raises:
            UserError, FlawsmithError: as `predict`.
        """
        if not self.tiling.is_tiled:
            return self.predict(images)
        for index, image in enumerate(images):
            _check_image(image, index)
        return self._judge(images)

    def relative_score(self, score: float, decimals: int = 4) -> float:
        """Bring a score to the scale on which the threshold in force is 1: 1 + (score - threshold) / score_unit.

        With the threshold that the file carries a typical normal part lies at 0. The result is rounded away from 1, so
        that it lies above 1 if and only if the score lies above the threshold.
        """
        steps = (score - self.threshold) / self.metadata.score_unit * 10**decimals
        whole = math.ceil(steps) if is_defective(score, self.threshold) else math.floor(steps)
        return round(1 + whole / 10**decimals, decimals)

    def regions_above(self, prediction: Prediction) -> float:
        """Return the map value above which a pixel of this image is shown as part of a region."""
        return region_threshold(prediction.is_defective, self.pixel_threshold)

    def _judge(self, prepared: Sequence[FloatImage]) -> list[Prediction]:
        return [
            Prediction(score, is_defective(score, self.threshold), anomaly_map)
            for anomaly_map, score in self.tiling.answer(self._network.run, prepared)
        ]


def is_defective(score: float, threshold: float) -> bool:
    """Decide: a part is flagged if its score lies strictly above the threshold."""
    return score > threshold


def flags(scores: NDArray[np.floating], threshold: float) -> NDArray[np.bool_]:
    """Decide on scores `(N,)` as `is_defective` does on each.

    In double precision: numpy would round the threshold to float32 beside a float32 array.
    """
    return np.asarray(scores, np.float64) > threshold


def region_threshold(flagged: bool, pixel_threshold: float) -> float:
    """Return the map value above which a pixel is shown as part of a region, in every output.

    Only a flagged image has regions, so that no output contradicts the verdict: of any other it is infinity. Else it is
    the pixel threshold, rounded down to float32: it divides the maps' float32 values as the exact one does.
    """
    if not flagged:
        return math.inf
    with np.errstate(over="ignore"):
        nearest = np.float32(pixel_threshold)
    return float(nearest if float(nearest) <= pixel_threshold else np.nextafter(nearest, np.float32(-np.inf)))


def _check_image(image: FloatImage, index: int) -> None:
    if image.ndim != 3 or image.shape[0] != 3 or 0 in image.shape:
        raise UserError(f"Image {index} has shape {image.shape}; pass RGB images of shape (3, H, W).")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # NaN fails both
        raise UserError(f"Image {index} has values from {low} to {high}; pass values in [0, 1] (divide 8 bits by 255).")


def _chosen(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if not np.isfinite(value):
        raise UserError(f"{name} is {value}; it must be a finite number.")
    return value

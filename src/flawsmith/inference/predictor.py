"""Scores images with an exported model: onnxruntime only, no torch, so that it runs on a small machine at the line.

predictor = Predictor(Path("model.onnx"))
prediction, = predictor.predict([read_image(Path("part.png"))])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.images import FloatImage, resize_image
from flawsmith.inference.metadata import INPUT_NAME, OUTPUT_NAMES, ModelMetadata

_SILENT = 4  # onnxruntime's severity "fatal": errors reach the caller as exceptions, not as log lines


@dataclass(frozen=True)
class Prediction:
    """The verdict on one image; `anomaly_map` is `(S, S)` at the model's input size, higher = more anomalous."""

    score: float
    is_defective: bool
    anomaly_map: NDArray[np.float32]


class Predictor:
    """An exported model, ready to score images of any size.

    Args:
        model_path: the `model.onnx` of the export stage.
        threads: CPU threads of one run; None leaves the choice to onnxruntime (one a physical core).
        threshold, pixel_threshold: replace the ones calibrated at training time, which the file carries.

    Raises:
        UserError: the file is missing, no ONNX model, not exported by flawsmith, or an argument is out of range.
    """

    def __init__(
        self,
        model_path: Path,
        threads: int | None = None,
        threshold: float | None = None,
        pixel_threshold: float | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise UserError(f"threads is {threads}; it must be 1 or more.")
        self._session = _open(model_path, threads)
        properties = self._session.get_modelmeta().custom_metadata_map
        self.metadata = ModelMetadata.from_properties(properties, str(model_path))
        _check_interface(self._session, self.metadata.input_size, model_path)
        self.threshold = _chosen("threshold", threshold, self.metadata.threshold)
        self.pixel_threshold = _chosen("pixel_threshold", pixel_threshold, self.metadata.pixel_threshold)

    def predict(self, images: Sequence[FloatImage]) -> list[Prediction]:
        """Score RGB images `(3, H, W)` in [0, 1] of any sizes, all in one batch: memory grows with their number.

        Raises:
            UserError: an image has another shape or range.
            FlawsmithError: the model answers with NaN or infinity, which no threshold could judge.
        """
        if not images:
            return []
        for index, image in enumerate(images):
            _check_image(image, index)
        size = self.metadata.input_size
        batch = np.stack([resize_image(image, size) for image in images]).astype(np.float32, copy=False)
        maps, scores = self._session.run(list(OUTPUT_NAMES), {INPUT_NAME: batch})  # (B, 1, S, S), (B,)
        if not (np.isfinite(maps).all() and np.isfinite(scores).all()):
            raise FlawsmithError("The model answered with NaN or infinity; export it again and check its certificate.")
        return [
            Prediction(float(score), is_defective(float(score), self.threshold), anomaly_map[0])
            for anomaly_map, score in zip(maps, scores, strict=True)
        ]


def is_defective(score: float, threshold: float) -> bool:
    """The verdict: a part is flagged if its score lies strictly above the threshold."""
    return score > threshold


def _open(path: Path, threads: int | None) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; pass the model.onnx of the export stage.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a class of its own for each status, all derived from Exception
        reason = " ".join(str(error).replace(str(path), "the file").split())
        raise UserError(f"{path} cannot be loaded as an ONNX model ({reason}); export the model again.") from error


def _check_interface(session: Any, size: int, path: Path) -> None:
    inputs = {item.name: item.shape for item in session.get_inputs()}
    outputs = {item.name for item in session.get_outputs()}
    if list(inputs) != [INPUT_NAME] or not outputs.issuperset(OUTPUT_NAMES):
        raise UserError(
            f"{path} takes {sorted(inputs)} and gives {sorted(outputs)}, not `{INPUT_NAME}` and "
            f"{list(OUTPUT_NAMES)}; use the model.onnx of the export stage."
        )
    batch, *rest = inputs[INPUT_NAME]
    if isinstance(batch, int) or rest != [3, size, size]:
        raise UserError(
            f"{path} takes images of shape {inputs[INPUT_NAME]}, not (batch, 3, {size}, {size}) as its metadata says; "
            "export the model again."
        )


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

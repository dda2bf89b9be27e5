"""What a model and its frozen teacher answer on a set of images: kept of the calibration normals as `reference.npz`.

The scores follow the product's own path (the ONNX file through `Predictor`); the features are the teacher's, pooled
over the image, so that a local defect hardly moves them while light, focus, position or another product do. Torch is
imported only where features are computed: a stored reference is read, saved and judged without it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.images import FloatImage, resize_image
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import atomic_file
from flawsmith.inference.predictor import Predictor
from flawsmith.sequences import batched

if TYPE_CHECKING:
    from flawsmith.detector.teacher import Teacher


@dataclass(frozen=True, eq=False)
class Measurement:
    """Answers on N images, one row an image, in the order in which they came.

    Attributes:
        names: of the files, `(N,)` text.
        scores: the model's image scores, `(N,)`.
        peaks: the largest value of each anomaly map, `(N,)`.
        image_statistics: brightness, contrast and sharpness, `(N, 3)`: in words what features say in numbers.
        features: of the teacher, `(N, D)`: mean and standard deviation of every channel (`detector.teacher`).
        detector_digest: of the model that scored (as in its metadata): scores of two models cannot be compared.
        teacher_digest: of the teacher's weights: nor can features of two teachers.
    """

    names: NDArray[np.str_]
    scores: NDArray[np.float32]
    peaks: NDArray[np.float32]
    image_statistics: NDArray[np.float32]
    features: NDArray[np.float32]
    detector_digest: str
    teacher_digest: str

    def __len__(self) -> int:
        return len(self.scores)


IMAGE_STATISTICS = ("brightness", "contrast", "sharpness")
STORED_AS = {"image_statistics": "looks"}  # in the file: versions that were registered long ago have it


def measure(
    predictor: Predictor, teacher: "Teacher", images: Iterable[tuple[str, FloatImage]], batch: int = 8
) -> Measurement:
    """Score images and pool their teacher features; `images` yields `(name, (3, H, W) in [0, 1])` at the working
    resolution of the model. Statistics and features are those of the whole image at the size of the model's input.

    At most `batch` images are held at a time; what stays is about 2 kB an image.

    Raises:
        UserError: there is no image, or one has another shape or range.
        FlawsmithError: the model or the teacher answers with NaN or infinity.
    """
    names: list[str] = []
    scores: list[float] = []
    peaks: list[float] = []
    statistics: list[tuple[float, float, float]] = []
    features: list[NDArray[np.float32]] = []
    for group in batched(images, 1 if predictor.tiling.is_tiled else batch):
        predictions = predictor.predict_prepared([image for _, image in group])
        names += [name for name, _ in group]
        scores += [prediction.score for prediction in predictions]
        peaks += [float(prediction.anomaly_map.max()) for prediction in predictions]
        resized = np.stack([resize_image(image, predictor.input_shape) for _, image in group])
        statistics += [image_statistics(image) for image in resized]
        features.append(_features(teacher, resized))
    if not names:
        raise UserError("There is no image to measure; name a folder that holds some.")
    return Measurement(
        np.asarray(names, np.str_),
        np.asarray(scores, np.float32),
        np.asarray(peaks, np.float32),
        np.asarray(statistics, np.float32),
        np.concatenate(features),
        predictor.metadata.detector_digest,
        teacher_digest(teacher),
    )


def _features(teacher: "Teacher", images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Images `(B, 3, H, W)` to `(B, D)`; a local defect hardly moves them."""
    from flawsmith.detector.teacher import pooled_features  # brings torch

    pooled = pooled_features(teacher, images)
    if not np.isfinite(pooled).all():
        raise FlawsmithError("The teacher answered with NaN or infinity; check teacher.weights in params.yaml.")
    return pooled


def image_statistics(image: FloatImage) -> tuple[float, float, float]:
    """Brightness, contrast and sharpness of an image `(3, H, W)`, as in `IMAGE_STATISTICS`.

    Mean and standard deviation of the gray values in [0, 1], and the mean difference of neighbouring pixels per
    unit of contrast: blur lowers it, noise raises it, light leaves it.
    """
    gray = image.mean(axis=0, dtype=np.float64)
    contrast = float(gray.std())
    steps = float(np.abs(np.diff(gray, axis=0)).mean() + np.abs(np.diff(gray, axis=1)).mean()) / 2
    return float(gray.mean()), contrast, steps / contrast if contrast > 1e-6 else 0.0


def teacher_digest(teacher: "Teacher") -> str:
    """SHA-256 of the teacher's weights and buffers, names included."""
    total = hashlib.sha256()
    for name, tensor in sorted(teacher.state_dict().items()):
        values = tensor.cpu().numpy()
        total.update(f"{name}\0{values.dtype.str}\0{values.shape}\n".encode())
        total.update(np.ascontiguousarray(values).tobytes())
    return total.hexdigest()


def save_reference(path: Path, reference: Measurement) -> None:
    """Write a measurement as .npz, in place at once; equal measurements give equal bytes (numpy dates entries 1980)."""
    arrays: dict[str, Any] = {
        STORED_AS.get(item.name, item.name): np.asarray(getattr(reference, item.name)) for item in fields(reference)
    }
    with atomic_file(path) as temporary, temporary.open("wb") as stream:  # a stream: to a name numpy would add .npz
        np.savez(stream, **arrays)


def load_reference(path: Path) -> Measurement:
    """Read what `save_reference` wrote; nothing in it is ever unpickled.

    Raises:
        UserError: the file is missing, damaged, no measurement, empty, or holds NaN.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; pass the reference.npz of a registered model.")
    wanted = {item.name: STORED_AS.get(item.name, item.name) for item in fields(Measurement)}
    try:
        # a stream of our own: given a path, numpy leaves the file open where it finds it damaged
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            arrays = {name: content[stored] for name, stored in wanted.items()}
    except Exception as error:  # zipfile, zlib and numpy raise many kinds for the many ways to be damaged
        reason = " ".join(str(error).replace(str(path), "the file").split()) or type(error).__name__
        raise UserError(f"{path} is no drift reference ({reason}); register the model again.") from error
    problem = _problem(arrays)
    if problem:
        raise UserError(f"{path} is no drift reference ({problem}); register the model again.")
    checked: dict[str, Any] = {name: array if array.ndim else str(array) for name, array in arrays.items()}
    return Measurement(**checked)


def _problem(arrays: dict[str, NDArray[Any]]) -> str | None:
    """Why arrays are no measurement, or None."""
    count = len(arrays["scores"]) if arrays["scores"].ndim else 0
    if not count:
        return "it holds no score"
    for name, dimensions in (("names", 1), ("scores", 1), ("peaks", 1), ("image_statistics", 2), ("features", 2)):
        array = arrays[name]
        if array.ndim != dimensions or len(array) != count or 0 in array.shape:
            return f"`{name}` has shape {array.shape} beside {count} scores"
        if name == "names":
            if array.dtype.kind != "U":
                return f"`names` is {array.dtype}, not text"
        elif array.dtype != np.float32:
            return f"`{name}` is {array.dtype}, not float32"
        elif not np.isfinite(array).all():
            return f"`{name}` holds NaN or infinity"
    columns = arrays["image_statistics"].shape[1]
    if columns != len(IMAGE_STATISTICS):
        return f"`image_statistics` has {columns} columns, not {len(IMAGE_STATISTICS)}"
    for name in ("detector_digest", "teacher_digest"):
        if arrays[name].ndim or arrays[name].dtype.kind != "U":
            return f"`{name}` is no text"
    return None

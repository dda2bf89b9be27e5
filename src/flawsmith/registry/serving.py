"""The registered model: what `mlflow models serve` answers with, and how it gets into the store, without a pickle.

    mlflow models serve -m models:/flawsmith-bottle@champion --env-manager local --port 5001
    curl -H 'Content-Type: application/json' http://127.0.0.1:5001/invocations \
         -d '{"dataframe_records": [{"image": "'$(base64 <part.png | tr -d '[:space:]')'"}], "params": {"map": "none"}}'

A version holds `model.onnx`, this package (it is on no index) and three lines that MLflow runs to get the model. The
process that serves imports no torch. Importing this module costs the seconds that MLflow takes: import it where needed.
"""

import io
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import AnyType, Array, Object, Property

from flawsmith.data.images import MAX_PIXELS, FloatImage, Reading, decode_image
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.providers import package_version
from flawsmith.inference.serialise import describe, encode_map

with warnings.catch_warnings():  # MLflow's own classes warn of their type hints when they are first imported
    warnings.filterwarnings("ignore", message=r".*AnyType", category=UserWarning)
    from mlflow.pyfunc import PythonModel, PythonModelContext

PACKAGE = Path(__file__).parents[1]
# what MLflow runs to get a registered model ("models from code")
ENTRY = """from mlflow.models import set_model
from flawsmith.registry.serving import SurfaceModel
set_model(SurfaceModel())
"""
MODEL, NAME = "model", "model"  # of the ONNX file among the artifacts; of the logged model
COLUMN = "image"
MAPS = ("array", "png", "none")
REQUIREMENTS = (
    "filelock",
    "mlflow",
    "numpy",
    "onnxruntime",
    "pandas",
    "pillow",
    "scipy",
    "tqdm",
)  # all that serving imports


class SurfaceModel(PythonModel):
    """Scores encoded image files; one row in, one dictionary out: what `flawsmith predict` writes, and the map."""

    _predictor: Predictor
    _max_pixels: int

    def load_context(self, context: PythonModelContext) -> None:
        """Open the ONNX file of this version."""
        self._predictor = Predictor(Path(context.artifacts[MODEL]))
        self._max_pixels = int((context.model_config or {})["max_pixels"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Score each row by itself, so that memory does not grow with the number of rows.

        Args:
            context: unused; `load_context` has read it.
            model_input: the column `image` holds the bytes of PNG, JPEG, BMP or TIFF files.
            params: `map` is how `anomaly_map` is given: "array" (nested list), "png" (see
                `encode_map`) or "none" (left out).

        Raises:
            MlflowException: HTTP status 400 for a row that is no image or another `map`, 500 for a model that answers
                with NaN; the message is one sentence and names the row, counted from 0.
        """
        kind = (params or {}).get("map", MAPS[0])
        if kind not in MAPS:
            raise mlflow.MlflowException(
                f"`map` is {kind!r}; it must be one of {', '.join(MAPS)}.", INVALID_PARAMETER_VALUE
            )
        try:
            return [self._answer(content, f"row {row}", kind) for row, content in enumerate(model_input[COLUMN])]
        except FlawsmithError as error:
            code = INVALID_PARAMETER_VALUE if isinstance(error, UserError) else INTERNAL_ERROR
            raise mlflow.MlflowException(str(error), code) from None

    def _answer(self, content: object, row: str, kind: str) -> dict[str, Any]:
        image = _decode(content, row, self._predictor.reading(self._max_pixels))
        (prediction,) = self._predictor.predict([image])
        answer = describe(prediction, self._predictor, image.shape[1], image.shape[2])
        if kind == "array":
            answer["anomaly_map"] = prediction.anomaly_map.tolist()
        elif kind == "png":
            answer["anomaly_map"] = encode_map(prediction.anomaly_map)
        return answer


def signature() -> ModelSignature:
    """One binary column in (base64 in JSON), what `SurfaceModel.predict` answers out, and the parameter `map`."""
    whole = ("x", "y", "width", "height", "peak_x", "peak_y")
    region = [Property(name, DataType.long) for name in whole]
    region += [Property(name, DataType.double) for name in ("area", "peak")]
    region.append(Property("polygon", Array(Array(DataType.double))))
    outputs = [
        ColSpec(DataType.string, "verdict"),
        *(ColSpec(DataType.double, name) for name in ("score", "threshold", "relative_score", "peak_value")),
        *(ColSpec(DataType.long, name) for name in ("peak_x", "peak_y", "width", "height", "region_count")),
        ColSpec(Array(Object(region)), "regions"),
        ColSpec(AnyType(), "anomaly_map", required=False),
    ]
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, COLUMN)]),
        outputs=Schema(outputs),
        params=ParamSchema([ParamSpec("map", DataType.string, MAPS[0])]),
    )


def pip_requirements() -> list[str]:
    """What an environment that serves must hold beside this package, in the versions installed here."""
    return [f"{name}=={package_version(name)}" for name in REQUIREMENTS]


def log_serving_model(
    model: Path, artifacts: Mapping[str, Path] | None = None, max_pixels: int = MAX_PIXELS
) -> ModelInfo:
    """Log the ONNX file as the model of MLflow's active run, ready to be registered and served.

    Args:
        model: the `model.onnx` of the export stage.
        artifacts: files and folders that belong to the version (a report, Data Docs), by a short name under which
            `fetch_artifact` finds them again.
        max_pixels: larger images are refused before they are decoded.

    Raises:
        UserError: a file is missing, or is no ONNX model of flawsmith.
    """
    held = {MODEL: model, **(artifacts or {})}
    missing = next((path for path in held.values() if not path.exists()), None)
    if missing is not None:
        raise UserError(f"{missing} does not exist; run the stage that writes it first (`dvc repro`).")
    Predictor(model)  # refuses now what could not be served later
    # an input example, which MLflow warns for, would be a second way to say what the signature says
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        entry = Path(folder, "served.py")
        entry.write_text(ENTRY)
        warnings.filterwarnings("ignore", message=r".*input example was not provided", category=UserWarning)
        return mlflow.pyfunc.log_model(
            name=NAME,
            python_model=str(entry),
            artifacts={name: str(path.resolve()) for name, path in held.items()},
            code_paths=[str(_copy_package(Path(folder)))],
            signature=signature(),
            pip_requirements=pip_requirements(),
            model_config={"max_pixels": max_pixels},
        )


def fetch_artifact(model_uri: str, name: str, folder: Path) -> Path:
    """Download one artifact of a registered version, and nothing else.

    Args:
        model_uri: `models:/<name>/<version>` or `models:/<name>@<alias>`.
        name: as given to `log_serving_model`; `MODEL` is the ONNX file.
        folder: an existing folder to put it into.

    Raises:
        UserError: the model has no artifact of that name.
    """
    held = mlflow.models.get_model_info(model_uri).flavors["python_function"].get("artifacts", {})
    if name not in held:
        raise UserError(f"{model_uri} holds no artifact `{name}` (it holds {', '.join(sorted(held))}).")
    return Path(mlflow.artifacts.download_artifacts(f"{model_uri}/{held[name]['path']}", dst_path=str(folder)))


def _copy_package(folder: Path) -> Path:
    """This package's files in `folder`. MLflow copies rights too, and could not work on a copy of a read-only tree."""
    copy = folder / PACKAGE.name
    for path in PACKAGE.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            target = copy / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return copy


def _decode(content: object, row: str, reading: Reading) -> FloatImage:
    if not isinstance(content, bytes | bytearray | memoryview):
        raise UserError(f"The image of {row} is {type(content).__name__}, not the bytes of an image file.")
    return decode_image(io.BytesIO(content), f"The image of {row}", reading)

"""What an exported model says about itself: written into the ONNX file by export, read back here without torch."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flawsmith.errors import UserError

INPUT_NAME = "image"
OUTPUT_NAMES = ("anomaly_map", "score")
PREFIX = "flawsmith."  # of every metadata key, so that other tools' properties do not collide


@dataclass(frozen=True)
class ModelMetadata:
    """Everything a machine on the line needs beside the network itself.

    A part is defective if its score lies above `threshold`; a pixel belongs to a defect if its map value lies above
    `pixel_threshold`. Both are in units of the map, which is real-valued and unbounded.
    """

    category: str
    threshold: float
    pixel_threshold: float
    false_alarm_rate: float  # share of normal parts that `threshold` may flag
    map_low: float  # map values drawn as the first ...
    map_high: float  # ... and the last colour of a heat map
    detector_digest: str  # SHA-256 of the weights this model was exported from: the hook of the lineage
    teacher: str
    flawsmith_version: str
    scale: float = 0.0  # of the working resolution, 0 for whole images; files from before tiles do not say
    tile_overlap: int = 0  # least overlap of neighbouring tiles in pixels; without tiles it has no meaning
    training_precision: str = ""  # what student and heads were trained in; files from before do not say
    white_level: int = 0  # the value that is white in images of more than 8 bits; 0: the full scale of their files
    precision: str = "fp32"  # what most of it computes in: fp32, or a variant's fp16 or int8
    typical_score: float = 0.0  # median score of the calibration normals; older files do not say, and 0 is near it
    quick_look: int = 0  # 1: memories alone, with no training, no quality gate and no lineage behind them

    @property
    def title(self) -> str:
        """The category as outputs name it: a quick look must not pass for a trained detector."""
        return f"{self.category} (quick look)" if self.quick_look else self.category

    @property
    def score_unit(self) -> float:
        """The unit of a relative score: the way from a typical normal part to the threshold, or 1 if there is none."""
        way = self.threshold - self.typical_score
        return way if way > 1e-6 else 1.0

    def to_properties(self) -> dict[str, str]:
        """The metadata as ONNX metadata properties; floats keep every digit."""
        return {f"{PREFIX}{key}": str(value) for key, value in vars(self).items()}

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], source: str) -> "ModelMetadata":
        """Read ONNX metadata properties; `source` names the file in errors.

        Raises:
            UserError: a property is missing or no value of its kind, so the file is no flawsmith model.
        """
        values: dict[str, Any] = {}
        for item in dataclasses.fields(cls):
            key = f"{PREFIX}{item.name}"
            text = properties.get(key)
            if text is None and item.default is dataclasses.MISSING:
                raise UserError(
                    f"{source} is not a flawsmith model (its metadata lacks `{key}`); "
                    "use the model.onnx of the export stage."
                )
            if text is None:
                continue  # written before there was such a property
            try:
                values[item.name] = _KINDS[item.type](text)
                if item.type is float and not math.isfinite(values[item.name]):
                    raise ValueError(text)
            except ValueError as error:
                raise UserError(
                    f"{source} has damaged metadata (`{key}` is {text!r}); export the model again."
                ) from error
        return cls(**values)


_KINDS: dict[Any, Callable[[str], Any]] = {str: str, float: float, int: int}

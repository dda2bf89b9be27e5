"""What /openapi.json says of requests and answers. The answers themselves come from `inference.serialise`."""

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema

from flawsmith.inference.regions import Region

FORM, BINARY = "multipart/form-data", "application/octet-stream"
CURL = "application/x-www-form-urlencoded"  # what `curl --data-binary @part.png` calls the bytes it sends

REFUSALS: dict[int, str] = {
    400: "No image in the request, or a damaged form.",
    408: "The image did not arrive in time.",
    413: "The body is too large.",
    415: "The content type is no image's.",
    422: "The image cannot be read, or has too many pixels.",
    429: "All workers are busy and the queue is full.",
    503: "There is no model yet.",
    504: "There was no verdict in time.",
}
_BYTES = {"type": "string", "format": "binary"}
_IMAGE_FORM = {"type": "object", "properties": {"image": _BYTES}, "required": ["image"]}
REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            **{kind: {"schema": _BYTES} for kind in ("image/png", "image/jpeg", "image/bmp", "image/tiff", BINARY)},
            FORM: {"schema": _IMAGE_FORM},
        },
    }
}


class Model(BaseModel):
    """Which model answered."""

    category: str
    version: str
    digest: str
    provider: str


class Picture(BaseModel):
    """The anomaly map as 16-bit gray PNG in base64: a value is `low + pixel / 65535 * (high - low)`."""

    png: str
    low: float
    high: float


class Answer(BaseModel):
    """The verdict on one image: defective if `score` lies above `threshold`, which is `relative_score` above 1. Regions
    are those of a defective image alone."""

    verdict: Literal["good", "defective"]
    score: float
    threshold: float
    relative_score: float
    peak_x: int
    peak_y: int
    peak_value: float
    width: int
    height: int
    region_count: int
    regions: list[Region]
    model: Model
    anomaly_map: Picture | SkipJsonSchema[None] = None
    overlay: str | SkipJsonSchema[None] = None


class Problem(BaseModel):
    """Why there is no verdict, in one sentence."""

    error: str


RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem, "description": words} for status, words in REFUSALS.items()
}

"""`export`: the ONNX file and its variants."""

from typing import Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from flawsmith.sections import STRICT, Share


@dataclass(frozen=True, config=STRICT)
class ExportSettings:
    """`export`: the ONNX file, its parity certificate, and variants of it in lower precision."""

    opset: int = Field(18, ge=17, le=28, description="ONNX opset")
    tolerance: float = Field(
        1e-2,
        ge=1e-9,
        le=1,
        description="largest difference of map and score, torch against ONNX, in deviations of normal images; of "
        "values above 1 a share",
    )
    latency_runs: int = Field(20, ge=3, le=10_000, description="timed runs a batch size")
    variants: tuple[Literal["fp16", "int8"], ...] = Field((), description="lower precisions to write too")
    variant_images: int = Field(
        64, ge=1, le=10_000, description="normals, and synthetic defects, a variant is made from"
    )
    max_auroc_loss: Share = Field(0.005, description="most image AUROC on synthetic defects a variant may lose")
    max_flip_share: Share = Field(0.05, description="largest share of images a variant may judge otherwise")

    @model_validator(mode="after")
    def _check(self) -> "ExportSettings":
        if len(set(self.variants)) < len(self.variants):
            raise ValueError("`export.variants` names one twice; remove it.")
        return self

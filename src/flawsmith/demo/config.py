"""`demo-data`: the embedded surfaces."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from flawsmith.sections import STRICT, Seed

Count = Annotated[int, Field(ge=1, le=100_000)]


@dataclass(frozen=True, config=STRICT)
class DemoDataSettings:
    """`demo-data`: the embedded surfaces (brushed_metal, woven_fabric) that `categories` names."""

    seed: Seed = Field(7, description="seed of everything rendered")
    image_size: int = Field(256, ge=128, le=2048, description="side of the rendered images in pixels")
    train_good: int = Field(160, ge=4, le=100_000, description="normal images for training and calibration")
    test_good: Count = Field(40, description="normal images in the test set")
    test_per_defect: Count = Field(12, description="test images of each kind of defect")

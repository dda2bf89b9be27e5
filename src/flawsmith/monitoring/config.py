"""`monitor`: when new images count as drifted."""

import math

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from flawsmith.sections import STRICT, Seed, Share

TESTS = 2  # of one folder: flagged share and MMD; they share `alpha`


@dataclass(frozen=True, config=STRICT)
class MonitorSettings:
    """`monitor`: when new images count as drifted from what the champion was calibrated on."""

    seed: Seed = Field(0, description="seed of permutations and of the sample from a large folder")
    min_images: int = Field(20, ge=5, le=100_000, description="fewer readable images cannot be judged")
    max_images: int = Field(1000, ge=5, le=4000, description="of a larger folder this many images are drawn at random")
    alpha: float = Field(0.01, ge=0.0001, le=0.2, description="chance of a false drift alarm a folder, over all tests")
    permutations: int = Field(999, ge=99, le=100_000, description="relabellings behind a p-value; at least 2 / alpha")
    max_mmd: float = Field(0.03, ge=0, le=2, description="largest harmless squared MMD of the teacher's features")
    max_flagged_share: Share = Field(0.3, description="share of flagged images that a batch of bad parts may explain")
    gallery: int = Field(12, ge=0, le=1000, description="highest-scoring images drawn in the report")

    @model_validator(mode="after")
    def _check(self) -> "MonitorSettings":
        if self.permutations + 1 < TESTS / self.alpha:  # the smallest p-value could never be significant
            raise ValueError(
                f"`monitor.permutations` is {self.permutations}; with `monitor.alpha` {self.alpha:g} it must be "
                f"{math.ceil(TESTS / self.alpha)} or more."
            )
        if self.min_images > self.max_images:
            raise ValueError(
                f"`monitor.min_images` is {self.min_images}, above `monitor.max_images` ({self.max_images}); lower it."
            )
        return self

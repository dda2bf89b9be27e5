"""`promote`: what a model must show to become the champion."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from flawsmith.sections import STRICT, Seed, Share

Loss = Annotated[float, Field(ge=0, le=0.5)]


@dataclass(frozen=True, config=STRICT)
class PromoteSettings:
    """`promote`: what a model must show, on today's data and beside the champion, to become the champion."""

    seed: Seed = Field(0, description="seed of the paired bootstrap")
    bootstrap: int = Field(1000, ge=100, le=100_000, description="resamples of the paired differences")
    margin: Loss = Field(0.02, description="most image AUROC a challenger may lose (lower bound of the difference)")
    pixel_margin: Loss = Field(0.02, description="most AUPRO a challenger may lose (lower bound of the difference)")
    defect_margin: Loss = Field(0.05, description="most image AUROC it may lose on any one defect type (lower bound)")
    min_defect_images: int = Field(
        5, ge=1, le=1000, description="types of defect with fewer images are judged together"
    )
    min_image_auroc: Share = Field(0.8, description="absolute floor, binding the first model and every later one")
    min_aupro: Share = Field(0.5, description="absolute floor, binding the first model and every later one")
    max_false_alarm_rate: Share = Field(0.1, description="largest flagged share of today's calibration normals")
    max_latency_ms: float = Field(500.0, ge=0.1, le=600_000, description="largest p95 of one image, milliseconds")
    max_latency_ratio: float = Field(
        1.5, ge=1, le=100, description="largest p95 over the champion's, measured in turns"
    )
    max_a90_ratio: float = Field(
        0.0, ge=0, le=100, description="largest a90/95 of each source of defects over the champion's; 0 asks nothing"
    )
    latency_runs: int = Field(30, ge=3, le=10_000, description="timed runs a model")
    max_megabytes: float = Field(100.0, ge=0.1, le=100_000, description="largest model file")
    health_images: int = Field(8, ge=2, le=256, description="images a version must score as when it was registered")
    health_tolerance: Share = Field(1e-3, description="largest difference of those scores")

"""`evaluate`: metrics, threshold and report."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from flawsmith.sections import STRICT, Seed
from flawsmith.synthesis.config import SourceName


@dataclass(frozen=True, config=STRICT)
class EvaluateSettings:
    """`evaluate`: metrics, threshold and report."""

    seed: Seed = Field(0, description="seed of the bootstrap and of the baseline's sampling")
    part: Literal["all", "research", "report"] = Field(
        "all",
        description="which half of each type of labelled test image is judged (a fixed rule halves them): look as "
        "often as you like at `research`, keep `report` for final figures",
    )
    false_alarm_rate: float = Field(
        0.05, ge=1e-6, le=0.5, description="share of good parts that may be flagged; sets the threshold"
    )
    bootstrap: int = Field(1000, ge=10, le=100_000, description="resamples of the 95 % intervals")
    aupro_limit: float = Field(0.3, ge=0.01, le=1, description="integration limit of AUPRO (false positive rate)")
    batch: int = Field(8, ge=1, le=1024, description="images scored together")
    gallery: int = Field(32, ge=1, le=1000, description="images in the report's gallery")
    baseline_vectors: int = Field(
        10_000, ge=100, le=10_000_000, description="patches that the baseline, PatchCore, remembers"
    )
    baseline_candidates: int = Field(
        200_000, ge=100, le=100_000_000, description="patches of all normals, drawn at random, that these are chosen of"
    )
    parity_images: int = Field(16, ge=8, le=1024, description="test images handed on for the parity certificate")
    detection_sources: tuple[SourceName, ...] = Field(
        ("diffusion", "own"),
        description="sources of the defects whose probability of detection is measured; `diffusion` counts where "
        "synthesize.mixture has it; [] measures none",
    )
    detection_defects: int = Field(
        48, ge=10, le=100_000, description="defects of each source, on calibration normals; each is shown twice"
    )
    detection_contrast: float = Field(
        10.0, ge=1, le=255, description="contrast in grey levels (of 255) that a90 and a90/95 hold for"
    )
    pixels_per_mm: float = Field(
        0.0,
        ge=0,
        le=100_000,
        description="pixels of a stored image that make one mm of the part; 0: sizes in pixels",
    )

"""`validate`: the bounds of the quality gate."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from flawsmith.sections import STRICT, Range, Share

Similarity = Annotated[float, Field(ge=-1, le=1)]
Distance = Annotated[float, Field(ge=0, le=100)]


@dataclass(frozen=True, config=STRICT)
class ValidateSettings:
    """`validate`: bounds of the quality gate; each names the severity of what breaks it."""

    max_sample_distance: Range[Distance] = Field(
        (0.25, 0.75),
        description="way of the DDPM's plain samples from real surface (0) to coloured noise (1): above the first a "
        "warning, above the second critical",
    )
    min_sample_novelty: Range[Distance] = Field(
        (0.25, 0.5),
        description="distance of its samples to the training crops over that of unseen crops: below the first "
        "critical, below the second a warning",
    )
    min_triplets: int = Field(100, ge=1, description="critical: fewest triplets")
    mask_area: Range[Share] = Field((0.00005, 0.2), description="critical: bounds of a mask's share of the image")
    visible_change: Share = Field(0.0314, description="least change of a channel that counts as seen (of 1)")
    min_change_inside: Share = Field(
        0.005, description="critical: mean change in the mask, of the most changed channel"
    )
    min_visible_share: Share = Field(0.5, description="critical for `mostly`: visibly changed share of a mask")
    outside_margin: int = Field(4, ge=0, le=64, description="pixels; further from the mask is outside")
    max_change_outside: Share = Field(0.0314, description="critical: largest change of a pixel outside the mask (of 1)")
    max_duplicate_share: Share = Field(0.0, description="critical: share of triplets whose defect image is not unique")
    min_foreground_overlap: Share = Field(0.9, description="warning: share of the mask on the object")
    ssim: Range[Similarity] = Field((0.5, 0.9999), description="warning: bounds of SSIM between normal and defect")
    max_components: int = Field(12, ge=1, description="warning: most connected parts of a mask")
    mostly: Share = Field(0.9, description="share of triplets that must keep the bounds of looks; integrity binds all")
    worst: int = Field(32, ge=1, le=256, description="triplets on the contact sheet of the worst")

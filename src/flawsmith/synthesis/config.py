"""`synthesize`: the synthetic defects."""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from flawsmith.sections import STRICT, Range, Seed, Share

Side = Annotated[int, Field(ge=16, le=1024)]
Period = Annotated[int, Field(ge=2, le=512)]
Strength = Annotated[float, Field(ge=0, le=10)]
Start = Annotated[float, Field(ge=0.01, le=1)]
Opacity = Annotated[float, Field(ge=0.05, le=1)]
Threshold = Annotated[float, Field(ge=-1, le=0.9)]
# Diffusion comes last: what takes a share from it alone moves no candidate of the sources before
SourceName = Literal["illumination", "pieces", "cutpaste", "own", "diffusion"]


def default_windows(image_size: int, multiple: int) -> tuple[int, ...]:
    """Sides from a quarter to half of the image's shorter side, in pixels.

    They are multiples of `multiple`, the divisor of the UNet's input.
    No side is under 32 pixels (a mask's soft edge needs room) or over 1024.
    """
    sides = (max(32, image_size * sixteenths // 16) for sixteenths in range(4, 9))
    return tuple(sorted({min(-(-side // multiple) * multiple, 1024) for side in sides}))


@dataclass(frozen=True, config=STRICT)
class SynthesizeSettings:
    """`synthesize`: triplets (normal, defect, mask) from the disturbed reverse process and other sources of defects."""

    seed: Seed = Field(0, description="seed of all triplets")
    triplets: int = Field(
        480, ge=2, le=1_000_000, description="triplets to make, for training and for choosing the checkpoint"
    )
    mixture: dict[SourceName, Share] = Field(
        {"diffusion": 0.8, "illumination": 0.2},
        description="shares of triplets by what makes their defects (divided by their sum): `diffusion` (the DDPM), "
        "`illumination` (shades: large soft changes of light), `own` (another normal's region, strongly jittered), "
        "`pieces` (of the part: missing, bent or moved), `cutpaste` (patches and scars of the same image, of the "
        "paper's sizes)",
    )
    mask: Literal["perlin", "noise"] = Field(
        "perlin",
        description="outlines of `diffusion` and `own`: `perlin` (and ridges), or the control `noise` (random pixels "
        "and blocks)",
    )
    shade_area: Range[Share] = Field((0.02, 0.2), description="a shade's visible share of the image")
    shade_change: Range[Share] = Field((0.05, 0.3), description="a shade's largest change of brightness (of 1)")
    rule: Literal["constant", "realnet"] = Field("constant", description="how the disturbance enters the variance")
    strength: Range[Strength] = Field((0.1, 0.4), description="s, the disturbance's deviation per T/20; 0: plain DDPM")
    start: Range[Start] = Field((0.5, 0.9), description="starting time t0 as a share of T")
    steps: int = Field(14, ge=2, le=1000, description="reverse steps from t0 to 0")
    disturb_until: Share = Field(0.35, description="disturb only while t/t0 is above this share")
    octaves: int = Field(4, ge=1, le=6, description="1: white disturbance; more add coarser octaves, same variance")
    windows: tuple[Side, ...] = Field(
        (64, 80, 96, 112, 128), min_length=1, description="sides of the sampled windows in pixels"
    )
    batch: int = Field(16, ge=1, le=1024, description="windows sampled together")
    opacity: Range[Opacity] = Field((0.5, 1.0), description="the blend's opacity")
    feather: float = Field(2.0, ge=0, le=32, description="width of the mask's soft edge in pixels")
    perlin_periods: tuple[Period, ...] = Field(
        (8, 16, 32, 64), min_length=1, description="Perlin lattice periods in pixels"
    )
    perlin_threshold: Range[Threshold] = Field((-0.1, 0.3), description="threshold on Perlin noise (-1 to 1)")
    ridge_share: Share = Field(0.3, description="share of drawn masks that are ridges (thin, crack-like)")
    area: Range[Share] = Field((0.0003, 0.08), description="a mask's share of the image area")
    min_changed: Share = Field(0.5, description="share of the mask that must have changed, else the triplet is dropped")
    visibility: float = Field(0.0314, ge=0, le=0.9, description="least change of a channel that counts as seen (of 1)")
    validation_fraction: float = Field(0.15, ge=0.001, le=0.5, description="share that only chooses the checkpoint")

    @model_validator(mode="after")
    def _check(self) -> "SynthesizeSettings":
        if not any(self.mixture.values()):
            raise ValueError("`synthesize.mixture` has no share above 0; give one to a source, such as {diffusion: 1}.")
        if "illumination" in self.shares and self.shade_change[0] <= self.visibility:
            raise ValueError(
                f"`synthesize.shade_change` begins at {self.shade_change[0]:g}; it must be above synthesize.visibility "
                f"({self.visibility:g}), or nobody could see the shade."
            )
        return self

    @property
    def shares(self) -> dict[str, float]:
        """The sources of the mixture that have a share above 0, in the order of `SourceName`; they add up to 1."""
        total = sum(self.mixture.values())
        return {name: self.mixture[name] / total for name in get_args(SourceName) if self.mixture.get(name)}

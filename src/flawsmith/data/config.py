"""`data`: where categories lie and how their images are read."""

from typing import TYPE_CHECKING

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from flawsmith.sections import STRICT, Seed

if TYPE_CHECKING:
    from flawsmith.data.images import Reading

MIN_SCALE = 0.01  # of data.scale but 0
MAX_ASPECT = 4.0  # longer over shorter side; what is longer is squashed to it
MULTIPLE = 32  # of the sides of what models see: no teacher's third level is coarser
TILE_KEYS = ("scale", "tile_overlap", "max_tiles")  # without a scale they decide nothing


@dataclass(frozen=True, config=STRICT)
class DataSettings:
    """`data`: where categories lie and how their normal images are used."""

    root: str = Field("data", description="folder that holds one folder a category")
    image_size: int = Field(
        256, ge=64, le=2048, multiple_of=MULTIPLE, description="shorter side in pixels of the image every model sees"
    )
    aspect: float = Field(
        0.0,
        ge=0,
        description="width over height of the image every model sees, at most 4 to 1 either way; 0 asks the normals",
    )
    calibration_fraction: float = Field(0.2, ge=0.01, le=0.5, description="share of train/good that only calibrates")
    split_seed: Seed = Field(0, description="seed of the fit/calibration split")
    max_megapixels: float = Field(100, ge=0.01, le=10_000, description="larger images are refused before decoding")
    white_level: int = Field(
        0,
        ge=0,
        le=2**31,
        description="value of white in images of more than 8 bits (12 bits: 4095); 0 asks the normals",
    )
    scale: float = Field(
        0.0,
        ge=0,
        le=2,
        description="0 brings every image as a whole to image_size and aspect; else the factor it is resized by before "
        "it is cut into square tiles of image_size",
    )
    tile_overlap: int = Field(
        32, ge=0, le=1024, description="least overlap of neighbouring tiles in pixels; up to half a tile"
    )
    max_tiles: int = Field(
        2000, ge=2, description="most tiles of normals that training holds, taken evenly from the images"
    )

    @model_validator(mode="after")
    def _check(self) -> "DataSettings":
        if 0 < self.scale < MIN_SCALE:
            raise ValueError(
                f"`data.scale` is {self.scale:g}; it must be 0 (the whole image is seen) or from {MIN_SCALE:g} to 2."
            )
        if self.scale and self.tile_overlap > self.image_size // 2:
            raise ValueError(
                f"`data.tile_overlap` is {self.tile_overlap}; it must be at most half of data.image_size "
                f"({self.image_size // 2})."
            )
        return self

    @property
    def idle(self) -> tuple[str, ...]:
        """Keys that decide nothing: the shape of a whole image beside tiles, and without tiles how they are cut."""
        return ("aspect",) if self.scale else TILE_KEYS

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels of the image every model sees: square for tiles, and with `aspect` 0.

        The longer side is the multiple of MULTIPLE that is nearest to the aspect.
        """
        aspect = 1.0 if self.scale else self.aspect or 1.0
        longer = round(self.image_size * min(max(aspect, 1 / aspect), MAX_ASPECT) / MULTIPLE) * MULTIPLE
        return (self.image_size, longer) if aspect > 1 else (longer, self.image_size)

    @property
    def reading(self) -> "Reading":
        """How images are read; with `white_level` 0 those of more than 8 bits by the full scale of their files."""
        from flawsmith.data.images import Reading  # who only reads settings need not wait for it

        return Reading(int(self.max_megapixels * 1e6), self.white_level)

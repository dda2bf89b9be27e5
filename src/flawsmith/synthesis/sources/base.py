"""What every source of defects is given, and what it gives back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.foreground import Foreground
from flawsmith.data.images import Mask, Shape
from flawsmith.synthesis.masks import MaskDraw
from flawsmith.synthesis.perlin import FloatField

Pixels = NDArray[np.uint8]  # (3, H, W)
Made = tuple[Pixels, Mask]  # the image with its defect, and (H, W) the pixels that changed


@dataclass(frozen=True, eq=False)
class Normals:
    """The normal images of a category, (N, 3, H, W) uint8, and how their parts are told from the ground."""

    images: NDArray[np.uint8]
    foreground: Foreground

    @property
    def shape(self) -> Shape:
        """Height and width of the images in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def part(self, index: int) -> Mask | None:
        """Where one image may have a defect, (H, W); None is everywhere."""
        if not self.foreground.is_object:
            return None
        return self.foreground.mask(self.images[index].astype(np.float32) / np.float32(255))


@dataclass(frozen=True, eq=False)
class Defect:
    """What a source has drawn, before a pixel is made.

    Attributes:
        outline: the mask as it was drawn, and the window in which pixels may change.
        alpha: (H, W) float32 in [0, 1], the weight of what is new.
        values: all else that was drawn, by the manifest's names.
    """

    outline: MaskDraw
    alpha: FloatField
    values: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Candidate:
    """All that is drawn for one triplet; `normal` is the index of its normal image, `source` the defect's."""

    role: str
    number: int
    normal: int
    source: str
    defect: Defect


class DefectSource(Protocol):
    """One way to make defects; `remedy` begins the advice when too few of them can be seen."""

    remedy: ClassVar[str]

    def draw(self, generator: np.random.Generator, index: int, others: NDArray[np.int64]) -> Defect:
        """Draw a defect for one normal image; `others` are the images that may lend to it.

        Raises:
            UserError: no place or outline was found.
        """

    def make(self, batch: Sequence[Candidate]) -> list[Made]:
        """Make the defects of candidates of this source with windows of one size."""

"""CutPaste (Li et al., CVPR 2021, section 2.1): a patch or scar of the same image, slightly jittered, pasted elsewhere.

What is merely in the wrong place is a defect that a DDPM, which denoises in place, never makes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.images import Mask, Shape
from flawsmith.errors import UserError
from flawsmith.randomness import numpy_generator
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.masks import TRIES, MaskDraw, MaskKind, Places
from flawsmith.synthesis.sources.base import Candidate, Defect, Made, Normals, Pixels
from flawsmith.synthesis.sources.texture import MIN_PIXELS, Texture, blend, rotated_hue, stretched, turned

RECTANGLE_AREA = (0.02, 0.15)  # of the image; this and the following from section 2.1 and appendix
RECTANGLE_ASPECTS = ((0.3, 1.0), (1.0, 3.3))
SCAR_SHARE = 0.5
SCAR_WIDTH, SCAR_LENGTH = (2.0, 16.0), (10.0, 25.0)  # pixels at PAPER_SIDE
SCAR_ANGLE = np.pi / 4  # turned by up to so much
PASTE_JITTER = 0.1  # of brightness, contrast, saturation and hue
PAPER_SIDE = 256


@dataclass(frozen=True)
class CutPaste:
    """A `DefectSource`: hard-edged patches and scars of the paper's sizes, whatever `synthesize.area` says."""

    settings: SynthesizeSettings
    normals: Normals
    remedy: ClassVar[str] = "lower cutpaste in synthesize.mixture, or "

    def draw(self, generator: np.random.Generator, index: int, _others: NDArray[np.int64]) -> Defect:
        """Draw the outline."""
        outline = rectangle_mask(generator, self.normals.shape, self.normals.part(index))
        return Defect(outline, outline.mask.astype(np.float32), {})

    def make(self, batch: Sequence[Candidate]) -> list[Made]:
        """Paste the patches."""
        return [self._make(item) for item in batch]

    def _make(self, item: Candidate) -> Made:
        normal = self.normals.images[item.normal]
        generator = numpy_generator(self.settings.seed, "texture", item.role, item.number)
        return blend(normal, cutpaste_texture(generator, normal, item.defect.outline), item.defect, self.settings)


def rectangle_mask(generator: np.random.Generator, shape: Shape, foreground: Mask | None = None) -> MaskDraw:
    """A patch or a scar inside the image, as large as in the paper for an image of the shorter side.

    On an object, its centre lies on the part and the background is left out (the paper pastes anywhere).

    Raises:
        UserError: the foreground is empty, or holds no pixels of any patch drawn.
    """
    places, size = Places.of(shape, foreground), min(shape)
    for _ in range(TRIES):
        scar = generator.random() < SCAR_SHARE
        angle = float(generator.uniform(-SCAR_ANGLE, SCAR_ANGLE)) if scar else 0.0
        if scar:
            scale = size / PAPER_SIDE
            height, width = (generator.uniform(*bounds) * scale for bounds in (SCAR_LENGTH, SCAR_WIDTH))
        else:
            area = generator.uniform(*RECTANGLE_AREA) * size**2
            aspect = generator.uniform(*RECTANGLE_ASPECTS[generator.integers(2)])
            height, width = np.sqrt(area / aspect), np.sqrt(area * aspect)
        # half the sides of the upright box around it; the centre is moved so that it lies inside the image
        cos, sin = abs(np.cos(angle)), abs(np.sin(angle))
        reach = ((height * cos + width * sin) / 2, (height * sin + width * cos) / 2)
        centre = [
            float(np.clip(at, half - 0.5, max(length - half - 0.5, half - 0.5)))
            for at, half, length in zip(places.draw(generator), reach, shape, strict=True)
        ]
        y, x = np.arange(shape[0])[:, None] - centre[0], np.arange(shape[1])[None, :] - centre[1]
        down, across = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
        mask = (np.abs(down) <= height / 2) & (np.abs(across) <= width / 2)
        if foreground is not None:
            mask &= foreground
        if mask.sum() < MIN_PIXELS:
            continue
        kind: MaskKind = "scar" if scar else "rectangle"
        window = _square_around(mask)
        return MaskDraw(mask, kind, float(min(height, width)), 0.0, angle % np.pi, window)
    raise UserError(f"No patch lay on the part in {TRIES} tries; check the normal images.")


def cutpaste_texture(generator: np.random.Generator, image: Pixels, outline: MaskDraw) -> Texture:
    """A patch from a random place of the same `image` (3, H, W), in the window of `outline`; a scar's is turned."""
    side = outline.window[2]
    row, column = (float(generator.uniform((side - 1) / 2, length - (side + 1) / 2)) for length in image.shape[1:])
    texture = turned(image, side, (row, column), outline.angle if outline.kind == "scar" else 0.0)
    brightness, contrast, saturation, hue = generator.uniform(-PASTE_JITTER, PASTE_JITTER, 4)
    texture = np.clip(texture * (1 + brightness), 0, 255)
    texture = np.clip(stretched(texture, 1 + contrast), 0, 255)
    if (image != image[:1]).any():
        texture = rotated_hue(texture, 1 + saturation, hue)
    return np.clip(texture, 0, 255).astype(np.float32)


def _square_around(mask: Mask) -> tuple[int, int, int]:
    """The smallest square window (top, left, side) inside the image that holds the mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    side = int(max(np.ptp(rows), np.ptp(columns))) + 1
    top, left = (int(min(index[0], length - side)) for index, length in zip((rows, columns), mask.shape, strict=True))
    return top, left, side

"""Texture of another normal image, strongly jittered: defects that need no diffusion model.

DRAEM (Zavrtanik et al., ICCV 2021, section 3.2) with the category itself in place of its texture set: a region of
another normal, cropped, turned and mirrored at random and changed by three random augmenters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.images import Mask
from flawsmith.randomness import numpy_generator
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.masks import Places
from flawsmith.synthesis.sources.base import Candidate, Defect, Made, Normals, Pixels
from flawsmith.synthesis.sources.texture import Texture, blend, rotated_hue, soft_defect, stretched, turned

AUGMENTERS_USED = 3  # of DRAEM's, for one texture


@dataclass(frozen=True)
class OwnTexture:
    """A `DefectSource`: outlines of `synthesize.mask`, filled with `own_texture`."""

    settings: SynthesizeSettings
    normals: Normals
    remedy: ClassVar[str] = "raise synthesize.opacity, or "

    def draw(self, generator: np.random.Generator, index: int, others: NDArray[np.int64]) -> Defect:
        """Draw the image that lends its texture (the own one where there is no other), an opacity and an outline."""
        donor = int(generator.choice(others)) if others.size else index
        part = self.normals.part(index)
        return soft_defect(generator, self.normals.shape, self.settings, part, {"donor": donor})

    def make(self, batch: Sequence[Candidate]) -> list[Made]:
        """Fill the outlines."""
        return [self._make(item) for item in batch]

    def _make(self, item: Candidate) -> Made:
        donor = int(item.defect.values["donor"])
        generator = numpy_generator(self.settings.seed, "texture", item.role, item.number)
        side, part = item.defect.outline.window[2], self.normals.part(donor)
        texture = own_texture(generator, self.normals.images[donor], side, part)
        return blend(self.normals.images[item.normal], texture, item.defect, self.settings)


def own_texture(generator: np.random.Generator, donor: Pixels, side: int, foreground: Mask | None = None) -> Texture:
    """A region of `donor` (3, H, W), turned, mirrored and changed by three of DRAEM's augmenters, (3, side, side).

    Args:
        foreground: (H, W) bool, where the region's centre may lie; None is everywhere.
    """
    centre = Places.of(donor.shape[1:], foreground).draw(generator)
    texture = turned(donor, side, centre, float(generator.uniform(0, 2 * np.pi)), bool(generator.integers(2)))
    coloured = bool((donor != donor[:1]).any())
    augmenters = [*AUGMENTERS, *([_recolour] if coloured else [])]
    for index in generator.permutation(len(augmenters))[:AUGMENTERS_USED]:
        texture = np.clip(augmenters[index](generator, texture), 0, 255).astype(np.float32)
    return texture


# DRAEM's augmenters (its code, data_loader.py), with brightness and contrast made stronger: a texture of the category
# itself is much nearer to the normal than one of DRAEM's texture set. Its rotation is `turned`.


def _gamma(generator: np.random.Generator, texture: Texture) -> Texture:
    exponents = np.exp(generator.uniform(-np.log(2), np.log(2), (3, 1, 1))).astype(np.float32)
    return np.float32(255) * (texture / np.float32(255)) ** exponents


def _brightness(generator: np.random.Generator, texture: Texture) -> Texture:
    return texture * np.float32(generator.uniform(0.7, 1.3)) + np.float32(generator.uniform(-50, 50))


def _contrast(generator: np.random.Generator, texture: Texture) -> Texture:
    return stretched(texture, float(np.exp(generator.uniform(-np.log(2.5), np.log(2.5)))))


def _sharpness(generator: np.random.Generator, texture: Texture) -> Texture:
    smooth = ndimage.gaussian_filter(texture, (0, sigma := generator.uniform(0.7, 3.0), sigma))
    return smooth + np.float32(generator.choice([0.0, generator.uniform(1.5, 4.0)])) * (texture - smooth)


def _solarise(generator: np.random.Generator, texture: Texture) -> Texture:
    return np.where(texture >= generator.uniform(32, 128), 255 - texture, texture)


def _posterise(generator: np.random.Generator, texture: Texture) -> Texture:
    step = np.float32(256 / 2 ** generator.integers(1, 4))
    return np.floor(texture / step) * step


def _invert(_generator: np.random.Generator, texture: Texture) -> Texture:
    return 255 - texture


def _autocontrast(_generator: np.random.Generator, texture: Texture) -> Texture:
    low, high = np.quantile(texture, (0.01, 0.99))
    return (texture - np.float32(low)) * np.float32(255 / max(high - low, 1.0))


def _equalise(_generator: np.random.Generator, texture: Texture) -> Texture:
    counts = np.bincount(texture.astype(np.uint8).ravel(), minlength=256)
    ranks = (np.cumsum(counts) / counts.sum() * 255).astype(np.float32)
    return ranks[texture.astype(np.uint8)]


def _recolour(generator: np.random.Generator, texture: Texture) -> Texture:
    return rotated_hue(texture, float(generator.uniform(0.5, 1.8)), float(generator.uniform(-0.2, 0.2)))


AUGMENTERS: tuple[Callable[[np.random.Generator, Texture], Texture], ...] = (
    _gamma, _brightness, _contrast, _sharpness, _solarise, _posterise, _invert, _autocontrast, _equalise,
)  # fmt: skip

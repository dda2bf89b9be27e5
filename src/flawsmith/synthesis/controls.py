"""The controls: masks and textures that need no diffusion model, and that its triplets must beat to earn their cost.

- Texture `own`: DRAEM (Zavrtanik et al., ICCV 2021, section 3.2) with the category itself in place of its texture set:
  a region of another normal, cropped, turned and mirrored at random and changed by three random augmenters.
- Texture `cutpaste`: CutPaste (Li et al., CVPR 2021, section 2.1): a patch of the same image, slightly jittered.
- Mask `noise`: white noise, thresholded: no shape at all, but the areas, windows and extents of the Perlin masks.
- Mask `rectangle`: CutPaste's patches and scars, of the paper's sizes.

CutPaste's patches are no control alone: `synthesize.patch_share` puts them beside whatever fills the other masks, for
what is merely in the wrong place is a defect that a DDPM, which denoises in place, never makes. Where defects have
plain edges that helps, where they are faint it harms (docs/experiments.md, round 15).

Textures are float32 (3, side, side) in [0, 255].
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.images import Mask
from flawsmith.errors import UserError
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.masks import (
    TRIES,
    MaskDraw,
    MaskKind,
    Places,
    WindowLimits,
    log_uniform,
    on_margin,
    window_around,
)

Texture = NDArray[np.float32]  # (3, side, side) in [0, 255]

BLOCKS = (1, 2, 4, 8)  # sides of the blocks of a noise mask in pixels
DENSITY = (0.4, 0.8)  # share of its square that is marked; Perlin masks fill 0.4 of theirs (masks.FILL)
AUGMENTERS_USED = 3  # of DRAEM's, for one texture
RECTANGLE_AREA = (0.02, 0.15)  # of the image; this and the following from CutPaste, section 2.1 and appendix
RECTANGLE_ASPECTS = ((0.3, 1.0), (1.0, 3.3))
SCAR_SHARE = 0.5
SCAR_WIDTH, SCAR_LENGTH = (2.0, 16.0), (10.0, 25.0)  # pixels at PAPER_SIDE
SCAR_ANGLE = np.pi / 4  # turned by up to so much
PASTE_JITTER = 0.1  # of brightness, contrast, saturation and hue
PAPER_SIDE = 256
MIN_PIXELS = 4  # what is left of a mask on the foreground
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def noise_mask(
    generator: np.random.Generator,
    shape: tuple[int, int],
    settings: SynthesizeSettings,
    foreground: Mask | None = None,
) -> MaskDraw:
    """Random pixels, or blocks of 2, 4 or 8 pixels a side, that cover 40 to 80 % of a square.

    Area (log-uniform in `settings.area`), place and window follow the law of `sample_mask`.

    Raises:
        UserError: as `sample_mask`.
    """
    limits = WindowLimits.of(shape, settings, foreground)
    area = log_uniform(generator, (limits.low, limits.most))
    extent = int(np.ceil(np.sqrt(area / generator.uniform(*DENSITY))))
    side = limits.window(extent)
    blocks = [block for block in BLOCKS if block <= max(1.0, np.sqrt(area) / 2)]  # larger ones would decide the area
    for attempt in range(TRIES):
        row, column = limits.places.draw(generator)
        top, left = window_around((row, column), side, shape)
        here = np.s_[top : top + side, left : left + side]
        block = int(generator.choice(blocks))
        coarse = generator.random((side // block + 2,) * 2, dtype=np.float32)
        shift = generator.integers(0, block, 2)
        noise = np.repeat(np.repeat(coarse, block, 0), block, 1)[shift[0] :, shift[1] :][:side, :side]
        allowed = np.zeros((side, side), bool)
        rows, columns = (
            slice(start := int(np.clip(at - origin - extent // 2, 0, side - extent)), start + extent)
            for at, origin in ((row, top), (column, left))
        )
        allowed[rows, columns] = True
        allowed &= ~on_margin((top, left, side), shape, limits.rim)
        if foreground is not None:
            allowed &= foreground[here]
        values = np.sort(noise[allowed])
        wanted = area / 2 if attempt < TRIES // 2 else 0
        if values.size < max(limits.low, wanted):
            continue
        threshold = float(values[min(round(area), values.size) - 1])
        chosen = allowed & (noise <= threshold)
        if limits.low <= chosen.sum() <= limits.high:
            mask = np.zeros(shape, bool)
            mask[here] = chosen
            return MaskDraw(mask, "noise", float(block), threshold, 0.0, (top, left, side))
    raise UserError(
        f"No noise mask of {limits.low} to {limits.high} pixels was found in {TRIES} tries; widen synthesize.area."
    )


def rectangle_mask(
    generator: np.random.Generator,
    shape: tuple[int, int],
    _settings: SynthesizeSettings,
    foreground: Mask | None = None,
) -> MaskDraw:
    """A patch or a scar of CutPaste inside the image, as large as in the paper, whatever the settings say, for an image
    of the shorter side.

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


def own_texture(
    generator: np.random.Generator, donor: NDArray[np.uint8], side: int, foreground: Mask | None = None
) -> Texture:
    """A region of `donor` (3, H, W), turned, mirrored and changed by three of DRAEM's augmenters, (3, side, side).

    Args:
        foreground: (H, W) bool, where the region's centre may lie; None is everywhere.
    """
    centre = Places.of(donor.shape[1:], foreground).draw(generator)
    texture = _turned(donor, side, centre, float(generator.uniform(0, 2 * np.pi)), bool(generator.integers(2)))
    coloured = bool((donor != donor[:1]).any())
    augmenters = [*AUGMENTERS, *([_recolour] if coloured else [])]
    for index in generator.permutation(len(augmenters))[:AUGMENTERS_USED]:
        texture = np.clip(augmenters[index](generator, texture), 0, 255).astype(np.float32)
    return texture


def cutpaste_texture(generator: np.random.Generator, image: NDArray[np.uint8], outline: MaskDraw) -> Texture:
    """A patch from a random place of the same `image` (3, H, W), in the window of `outline`; a scar's is turned."""
    side = outline.window[2]
    row, column = (float(generator.uniform((side - 1) / 2, length - (side + 1) / 2)) for length in image.shape[1:])
    texture = _turned(image, side, (row, column), outline.angle if outline.kind == "scar" else 0.0)
    brightness, contrast, saturation, hue = generator.uniform(-PASTE_JITTER, PASTE_JITTER, 4)
    texture = np.clip(texture * (1 + brightness), 0, 255)
    texture = np.clip(_stretched(texture, 1 + contrast), 0, 255)
    if (image != image[:1]).any():
        texture = _rotated_hue(texture, 1 + saturation, hue)
    return np.clip(texture, 0, 255).astype(np.float32)


def _turned(
    image: NDArray[np.uint8], side: int, centre: tuple[float, float], angle: float, mirrored: bool = False
) -> Texture:
    """The square of `image` (3, H, W) around `centre`, turned by `angle`; beyond the image it is mirrored."""
    offset = np.arange(side) - (side - 1) / 2
    y, x = offset[:, None], offset[None, :] * (-1 if mirrored else 1)
    if angle == 0.0:  # whole pixels, so that a straight patch is no smoother than its image
        centre = (np.floor(centre[0]) + offset[0] % 1, np.floor(centre[1]) + offset[0] % 1)
    where = np.stack(
        np.broadcast_arrays(
            centre[0] + np.cos(angle) * y - np.sin(angle) * x, centre[1] + np.sin(angle) * y + np.cos(angle) * x
        )
    )  # (2, side, side)
    gray = bool((image == image[:1]).all())
    channels = [  # cubic: linear interpolation would rub out the grain
        ndimage.map_coordinates(channel.astype(np.float32), where, order=3, mode="mirror")
        for channel in (image[:1] if gray else image)
    ]
    return np.clip(np.stack(channels * 3 if gray else channels), 0, 255).astype(np.float32)


def _square_around(mask: Mask) -> tuple[int, int, int]:
    """The smallest square window (top, left, side) inside the image that holds the mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    side = int(max(np.ptp(rows), np.ptp(columns))) + 1
    top, left = (int(min(index[0], length - side)) for index, length in zip((rows, columns), mask.shape, strict=True))
    return top, left, side


def _stretched(texture: Texture, factor: float) -> Texture:
    """Contrast around the mean brightness."""
    mean = np.float32(texture.mean())
    return mean + np.float32(factor) * (texture - mean)


def _rotated_hue(texture: Texture, saturation: float, hue: float) -> Texture:
    """Saturation times a factor and hue turned by a share of the colour circle, both around the gray axis (YIQ)."""
    to_yiq = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = saturation * np.cos(2 * np.pi * hue), saturation * np.sin(2 * np.pi * hue)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    matrix = (np.linalg.inv(to_yiq) @ turn @ to_yiq).astype(np.float32)
    return np.einsum("dc,chw->dhw", matrix, texture)


# DRAEM's augmenters (its code, data_loader.py), with brightness and contrast made stronger: a texture of the category
# itself is much nearer to the normal than one of DRAEM's texture set. Its rotation is `_turned`.


def _gamma(generator: np.random.Generator, texture: Texture) -> Texture:
    exponents = np.exp(generator.uniform(-np.log(2), np.log(2), (3, 1, 1))).astype(np.float32)
    return np.float32(255) * (texture / np.float32(255)) ** exponents


def _brightness(generator: np.random.Generator, texture: Texture) -> Texture:
    return texture * np.float32(generator.uniform(0.7, 1.3)) + np.float32(generator.uniform(-50, 50))


def _contrast(generator: np.random.Generator, texture: Texture) -> Texture:
    return _stretched(texture, float(np.exp(generator.uniform(-np.log(2.5), np.log(2.5)))))


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
    return _rotated_hue(texture, float(generator.uniform(0.5, 1.8)), float(generator.uniform(-0.2, 0.2)))


AUGMENTERS: tuple[Callable[[np.random.Generator, Texture], Texture], ...] = (
    _gamma, _brightness, _contrast, _sharpness, _solarise, _posterise, _invert, _autocontrast, _equalise,
)  # fmt: skip

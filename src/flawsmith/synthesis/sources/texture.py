"""What sources share that fill an outline with a texture, float32 (3, side, side) in [0, 255]."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.images import Mask, Shape
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.masks import feathered, sample_mask
from flawsmith.synthesis.noise import noise_mask
from flawsmith.synthesis.sources.base import Defect, Made, Pixels

Texture = NDArray[np.float32]  # (3, side, side) in [0, 255]

CLOSING = 2  # pixels: radius of the square that closes gaps in the mask of changed pixels
MIN_PIXELS = 4  # a smaller speck of changed pixels is no defect
OUTLINES = {"perlin": sample_mask, "noise": noise_mask}  # of `synthesize.mask`
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def soft_defect(
    generator: np.random.Generator,
    shape: Shape,
    settings: SynthesizeSettings,
    part: Mask | None,
    values: Mapping[str, float],
) -> Defect:
    """Draw the opacity and an outline of `synthesize.mask` with its soft edge; `values` are added to those drawn.

    Raises:
        UserError: as `sample_mask`.
    """
    opacity = float(generator.uniform(*settings.opacity))
    outline = OUTLINES[settings.mask](generator, shape, settings, part)
    alpha = np.float32(opacity) * feathered(outline.mask, settings.feather)
    return Defect(outline, alpha, {**values, "opacity": opacity, "feather": settings.feather})


def blend(normal: Pixels, texture: Texture, defect: Defect, settings: SynthesizeSettings) -> Made:
    """Image = normal + alpha (texture - normal) inside the defect's window, untouched outside; and what changed."""
    if (normal == normal[:1]).all():  # a gray surface has gray defects
        texture = np.repeat(texture.mean(axis=0, keepdims=True), 3, axis=0)
    top, left, side = defect.outline.window
    here = np.s_[..., top : top + side, left : left + side]
    image, inside = normal.copy(), normal[here].astype(np.float32)
    image[here] = np.rint(np.clip(inside + defect.alpha[here] * (texture - inside), 0, 255)).astype(np.uint8)
    mask = changed_mask(normal, image, defect.alpha > 0, settings.visibility)
    # what changed too little to be marked is put back, so that nothing changes far from the mask
    return np.where(ndimage.distance_transform_edt(~mask) <= settings.feather + 1, image, normal), mask


def changed_mask(normal: Pixels, defect: Pixels, region: Mask, visibility: float) -> Mask:
    """Where a defect can be seen: pixels of `region` (H, W) moved by more than `visibility` in any channel.

    Gaps of up to four pixels between changed pixels are closed (texture crosses its own brightness there); lone specks
    of fewer than four pixels are dropped.
    """
    changed = largest_change(normal, defect) > visibility * 255
    closed = ndimage.binary_closing(np.pad(changed, CLOSING), np.ones((2 * CLOSING + 1,) * 2, bool))
    mask = closed[CLOSING:-CLOSING, CLOSING:-CLOSING] & region
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray((sizes >= MIN_PIXELS)[labels], np.bool_)


def largest_change(normal: Pixels, defect: Pixels) -> NDArray[np.int16]:
    """(H, W): the change of the channel that changed most."""
    return np.asarray(np.abs(defect.astype(np.int16) - normal.astype(np.int16)).max(axis=0), np.int16)


def turned(
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
    return resample(image, where)


def resample(image: Pixels, where: NDArray[np.float64]) -> Texture:
    """`image` (3, S, S) read at places (2, h, w) in pixels: (3, h, w); beyond the image it is mirrored."""
    gray = bool((image == image[:1]).all())
    channels = [  # cubic: linear interpolation would rub out the grain
        ndimage.map_coordinates(channel.astype(np.float32), where, order=3, mode="mirror")
        for channel in (image[:1] if gray else image)
    ]
    return np.clip(np.stack(channels * 3 if gray else channels), 0, 255).astype(np.float32)


def stretched(texture: Texture, factor: float) -> Texture:
    """Contrast around the mean brightness."""
    mean = np.float32(texture.mean())
    return mean + np.float32(factor) * (texture - mean)


def rotated_hue(texture: Texture, saturation: float, hue: float) -> Texture:
    """Saturation times a factor and hue turned by a share of the colour circle, both around the gray axis (YIQ)."""
    to_yiq = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    cos, sin = saturation * np.cos(2 * np.pi * hue), saturation * np.sin(2 * np.pi * hue)
    turn = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    matrix = (np.linalg.inv(to_yiq) @ turn @ to_yiq).astype(np.float32)
    return np.einsum("dc,chw->dhw", matrix, texture)

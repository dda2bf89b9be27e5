"""Where the part is: a category shows either objects on a plain background or a texture that fills the image.

A defect synthesised on the background teaches nothing, so masks are kept to the part. The decision is made once a
category, from a sample of its normal images; an image counts as an object on a plain background if

1. its border is one colour, but for a slow gradient of the light and for noise,
2. what differs from that colour lies inside rather than at the border (a texture is the same in both places), and
3. it ends abruptly (a hot spot or vignette of the light on a texture fades out).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.images import FloatImage, Mask
from flawsmith.errors import UserError

BLUR = 1.0  # px; sigma of the Gaussian that takes the pixel noise out before any comparison
BORDER_SHARE = 0.03  # width of the border as a share of the shorter side
MIN_CONTRAST = 0.03  # of 1; a part this close to its background cannot be told from it
NOISE_FACTOR = 5.0  # foreground deviates by this many standard deviations of the border, or more
STEEPEST = 0.8  # of the deviation where it is steepest: there a part begins
MAX_BORDER_NOISE = 0.03  # of 1; a border that varies more is a texture
MIN_AREA = 0.02  # share of the image; less is a speck on a plain surface, not a part
MAX_BORDER_TO_AREA = 0.6  # share of foreground in the border over that in the image; 1 for a stationary texture
MIN_EDGE = 0.25  # jump across the outline over the typical deviation of the part
MIN_PART = 0.1  # parts smaller than this share of the largest one are dirt


@dataclass(frozen=True)
class Foreground:
    """What a category's images show; `background` and `threshold` matter for objects only.

    Attributes:
        is_object: objects on a plain background (True) or a texture that fills the image (False).
        background: RGB of the background in [0, 1].
        threshold: a pixel that deviates from the background by more than this in any channel is foreground, of 1.
    """

    is_object: bool
    background: tuple[float, float, float]
    threshold: float

    @classmethod
    def estimate(cls, images: NDArray[np.float32]) -> "Foreground":
        """Decide from a sample of normal images `(N, 3, H, W)` in [0, 1]; 8 are enough, the median image decides.

        Raises:
            UserError: no image was given.
        """
        if len(images) == 0:
            raise UserError("The foreground needs at least one normal image; add images to train/good.")
        backgrounds = [_fit_background(image) for image in images]
        noise = float(np.median([item.noise for item in backgrounds]))
        threshold = max(MIN_CONTRAST, NOISE_FACTOR * noise)
        # The outline runs where the deviation is steepest; soft shadows beside the part deviate, too, but slowly.
        deviation = np.stack([item.deviation for item in backgrounds])  # (N, H, W)
        steep = sum(slope**2 for slope in np.gradient(deviation, axis=(1, 2))) * (deviation > threshold)
        if steep.any():
            threshold = max(threshold, STEEPEST * float(np.average(deviation, weights=steep)))
        colour = np.median([item.surface.mean(axis=(1, 2)) for item in backgrounds], axis=0)
        found = [_parts(item.deviation > threshold) for item in backgrounds]
        border = _border(images.shape[2:])
        area = float(np.mean([mask.mean() for mask in found]))
        at_border = float(np.mean([mask[border].mean() for mask in found]))
        edges = [_edge(item.deviation, mask) for item, mask in zip(backgrounds, found, strict=True)]
        is_object = (
            noise <= MAX_BORDER_NOISE
            and area >= MIN_AREA
            and at_border <= MAX_BORDER_TO_AREA * area
            and float(np.median(edges)) >= MIN_EDGE
        )
        red, green, blue = (round(float(value), 6) for value in colour)
        return cls(is_object, (red, green, blue), round(threshold, 6))

    def mask(self, image: FloatImage) -> Mask:
        """The part in an image `(3, H, W)` as `(H, W)` bool, holes filled; all True for a texture.

        If nothing stands out from the background, the whole image is the part: better a defect anywhere than none.
        """
        if not self.is_object:
            return np.ones(image.shape[1:], np.bool_)
        parts = _parts(_fit_background(image, np.asarray(self.background)).deviation > self.threshold)
        return parts if parts.any() else np.ones(image.shape[1:], np.bool_)


@dataclass(frozen=True)
class _Background:
    surface: NDArray[np.float64]  # (3, H, W): the background's colour, a plane in x and y
    deviation: NDArray[np.float64]  # (H, W): largest difference to it over the channels
    noise: float  # standard deviation of the background around the plane, estimated from the median


def _border(shape: tuple[int, ...]) -> Mask:
    width = max(2, round(min(shape) * BORDER_SHARE))
    border = np.ones(shape, np.bool_)
    border[width:-width, width:-width] = False
    return border


def _fit_background(image: FloatImage, colour: NDArray[np.float64] | None = None) -> _Background:
    """Fit a plane a channel to the border by trimmed least squares, from `colour` (default: the border's median)."""
    smooth = ndimage.gaussian_filter(image.astype(np.float64), (0, BLUR, BLUR))  # (3, H, W)
    rows, columns = (np.linspace(-1, 1, side) for side in image.shape[1:])
    design = np.stack(np.broadcast_arrays(1.0, rows[:, None], columns[None, :]))  # (3 terms, H, W)
    border = _border(image.shape[1:])
    values, terms = smooth[:, border], design[:, border]  # (3, P), (3 terms, P)
    start = np.median(values, axis=1) if colour is None else colour
    fitted = np.repeat(start[:, None], values.shape[1], axis=1)
    coefficients = np.stack([start, np.zeros(3), np.zeros(3)])  # (3 terms, 3 channels)
    for _ in range(3):
        residual = np.abs(values - fitted).max(axis=0)  # (P,)
        # The nearer half always counts: a gradient must be learnt although it deviates from the starting colour.
        near = residual <= max(float(np.median(residual)), MIN_CONTRAST)
        coefficients = np.linalg.lstsq(terms[:, near].T, values[:, near].T, rcond=None)[0]
        fitted = coefficients.T @ terms
    surface = np.einsum("tc,thw->chw", coefficients, design)
    noise = 1.4826 * float(np.median(np.abs(values - fitted), axis=1).max())
    return _Background(surface, np.abs(smooth - surface).max(axis=0), noise)


def _parts(raw: Mask) -> Mask:
    """Specks removed, holes filled, dirt dropped."""
    # Edge padding keeps a part that leaves the image whole at the border.
    tidy = ndimage.binary_opening(ndimage.binary_closing(np.pad(raw, 2, mode="edge")))[2:-2, 2:-2]
    labels, count = ndimage.label(ndimage.binary_fill_holes(tidy))
    if count == 0:
        return np.zeros(raw.shape, np.bool_)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.asarray((sizes >= MIN_PART * sizes.max())[labels] & (labels > 0), np.bool_)


def _edge(deviation: NDArray[np.float64], mask: Mask) -> float:
    """Jump of the deviation across the outline (4 px) over its median inside; 0 if there is no outline."""
    inside = mask & ~ndimage.binary_erosion(mask, iterations=3, border_value=1)
    outside = ~mask & ndimage.binary_dilation(mask, iterations=3)
    if not inside.any() or not outside.any():
        return 0.0
    return float((deviation[inside].mean() - deviation[outside].mean()) / np.median(deviation[mask]))

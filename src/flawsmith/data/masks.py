"""Ground-truth masks as tools write them: the content of a file decides how it is read, and what was assumed is told.

A mask may lie in a channel (gray, any colour, alpha) or in a palette, as one value, as levels, as numbers of classes,
or with the soft edges and the noise that resizing and JPEG leave.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawsmith.data.images import READING, Mask, Reading, open_upright
from flawsmith.errors import UserError, tell_once

NUMBERS = 32  # values up to this are numbers of classes, in a file without loss
FEW = 3  # values beside 0 that are taken as they are; soft edges have more
NOISE = 0.125  # of the highest value: what JPEG may leave around a mask


class MaskFile(NamedTuple):
    """A mask `(H, W)`, and what was assumed in reading it: the end of a sentence, "" for a plain mask of one value."""

    mask: Mask
    assumed: str


def read_mask(path: Path, reading: Reading = READING) -> Mask:
    """Decode a ground-truth mask to `(H, W)` bool.

    Raises:
        UserError: as `images.read_image`.
    """
    return inspect_mask(path, reading).mask


def inspect_mask(path: Path, reading: Reading = READING) -> MaskFile:
    """Decode a mask as `read_mask` does, and tell what was assumed.

    Raises:
        UserError: as `images.read_image`.
    """
    image = open_upright(path, reading)
    with path.open("rb") as stream:
        is_lossy = stream.read(2) == b"\xff\xd8"
    is_wide = image.mode.startswith(("I", "F"))
    if "A" in image.getbands() or ("transparency" in image.info and not is_wide):
        colours = np.asarray(image.convert("RGBA"))
        alpha, colours = colours[..., 3], colours[..., :3]
        if alpha.min() < alpha.max():
            if (colours == colours[:1, :1]).all():
                return MaskFile(
                    _mark(alpha, is_lossy)[0], "its alpha channel is the mask, since its colours are constant"
                )
            colours = colours * (alpha > 0)[..., None]  # what nobody sees marks nothing
        return MaskFile(*_mark(colours.max(axis=2), is_lossy))
    if image.mode == "P":
        return _by_palette(image)
    if image.mode in ("1", "L") or is_wide:
        return MaskFile(*_mark(np.asarray(image), is_lossy))
    return MaskFile(*_mark(np.asarray(image.convert("RGB")).max(axis=2), is_lossy))


def load_mask(path: Path, shape: tuple[int, ...], defect: str, reading: Reading = READING) -> Mask:
    """Read the mask of an image of this shape `(H, W)`; what is assumed is logged once a kind and type of defect.

    Raises:
        UserError: it has another shape that is not a multiple of the image's, or marks nothing.
    """
    mask, assumed = inspect_mask(path, reading)
    where = f"{path.parents[2].name}/{defect}"
    if assumed:
        kind = " ".join(assumed.split()[:2])
        tell_once(f"mask {where} {kind}", f"{path}: {assumed}; so in all masks like it.")
    height, width = shape
    if mask.shape != (height, width):
        if abs(mask.shape[0] * width - mask.shape[1] * height) > max(height, width, *mask.shape):
            raise UserError(
                f"{path} is {mask.shape[1]} x {mask.shape[0]} pixels but its image is {width} x {height}; a mask must "
                "have its image's size, or at least its proportions."
            )
        tell_once(f"mask {where} size", f"{path} has not its image's size and is scaled to it, as are all like it.")
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
    if not mask.any():
        raise UserError(
            f"{path} marks no pixel; correct it, or remove it if nobody has drawn it: its image then counts without "
            "a mask."
        )
    if mask.mean() > 0.5:
        tell_once(
            f"mask {where} large",
            f"{path} marks {mask.mean():.0%} of its image as defective; if that is the background, invert the mask.",
        )
    return mask


def _by_palette(image: Image.Image) -> MaskFile:
    """Black is the background; without black among the colours used it is class 0."""
    classes, colours = np.asarray(image), np.asarray(image.convert("RGB"))
    if colours.any() and (colours == colours[..., :1]).all():  # gray values that were stored with a palette
        return MaskFile(*_mark(colours[..., 0], is_lossy=False))
    black = (colours == 0).all(axis=2)
    mask = ~black if black.any() and not black.all() else classes != 0
    return MaskFile(mask, "every class of its palette but the background marks a defect")


def _mark(values: NDArray[Any], is_lossy: bool) -> tuple[Mask, str]:
    """Which pixels are marked, and what was assumed.

    Among many values the lowest above 0 that fills an area is a level of the mask. Soft edges are cut at half of it.
    """
    high = values.max()
    if is_lossy and high < NUMBERS:
        return np.zeros(values.shape, np.bool_), "all of it is taken as noise"
    whole = values.dtype in (np.uint8, np.uint16)  # counting beats sorting
    found = np.flatnonzero(np.bincount(values.ravel())[1:]) if whole else np.unique(values[values > 0])
    are_numbers = 1 < high < NUMBERS and np.issubdtype(values.dtype, np.integer)
    if not is_lossy and (len(found) <= FEW or are_numbers):
        return values > 0, "every value but 0 marks a defect" if len(found) > 1 or are_numbers else ""
    inside, noise = values[1:-1, 1:-1].astype(np.float64), high * NOISE if is_lossy else 0.0
    flat = inside > noise
    for neighbour in (values[:-2, 1:-1], values[2:, 1:-1], values[1:-1, :-2], values[1:-1, 2:]):
        flat &= np.abs(neighbour - inside) <= noise / 4
    level = np.quantile(inside[flat], 0.05 if is_lossy else 0) if flat.any() else float(high)
    return values >= level / 2, f"values from {level / 2:g} of {high:g} mark a defect, which divides soft edges"

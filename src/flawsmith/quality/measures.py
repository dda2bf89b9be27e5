"""Measures of a triplet (normal, defect, mask): plain numbers, no judgement.

A file that cannot be read gives a row with `decodable` False and NaN in what could not be measured, never a crash:
the gate is there to report it.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.foreground import Foreground
from flawsmith.data.images import FloatImage, Mask, read_image, to_uint8
from flawsmith.data.masks import read_mask
from flawsmith.data.triplets import PARTS, part_path
from flawsmith.errors import UserError
from flawsmith.progress import bar

FOREGROUND_SAMPLE = 24  # normal images from which the foreground is estimated
NAN = float("nan")

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # Wang et al. 2004, section III-B: 11 x 11 Gaussian window
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 with L = 1


@dataclass(frozen=True)
class Measures:
    """One triplet. Shares and changes are of 1; NaN (or None) means that it could not be measured.

    Attributes:
        triplet_id: name of the triplet's three files.
        in_manifest: the manifest lists it.
        on_disk: all three files exist.
        decodable: all three files are images.
        size_agrees: all three have one size, of the expected shorter side.
        finite: no NaN and no infinite pixel.
        mask_area: share of the image that the mask covers.
        components: connected parts of the mask (8 neighbours).
        change_inside: mean over the mask's pixels of the absolute change of the channel that changed most.
        change_outside: largest absolute change of a pixel further from the mask than the margin.
        visible_share: share of the mask's pixels in which some channel changed by more than the visible change.
        ssim: mean SSIM between normal and defect.
        foreground_overlap: share of the mask on the part; 1 for a texture.
        defect_sha256: digest of the defect image's pixels, empty if there are none.
        duplicates: how many other triplets have the same defect image.
    """

    triplet_id: str
    in_manifest: bool
    on_disk: bool
    decodable: bool
    size_agrees: bool | None = None
    finite: bool | None = None
    mask_area: float = NAN
    components: float = NAN
    change_inside: float = NAN
    change_outside: float = NAN
    visible_share: float = NAN
    ssim: float = NAN
    foreground_overlap: float = NAN
    defect_sha256: str = ""
    duplicates: float = NAN


@dataclass(frozen=True)
class Scale:
    """What the measures depend on: the change that counts as visible (of 1), the margin around the mask in pixels,
    and the shorter side that every image must have, in pixels."""

    visible_change: float
    outside_margin: int
    side: int


def measure_folder(folder: Path, listed: Sequence[str], scale: Scale) -> list[Measures]:
    """Measure every triplet that the manifest lists, in its order, then those only found on disk, sorted."""
    known = set(listed)
    found = {path.stem for part in PARTS for path in (folder / part).glob("*.png") if not path.name.startswith(".")}
    ids = [(triplet_id, True) for triplet_id in listed] + [(name, False) for name in sorted(found - known)]
    foreground = _estimate_foreground(folder, [triplet_id for triplet_id, _ in ids])
    rows = [
        _measure_files(folder, triplet_id, in_manifest, scale, foreground)
        for triplet_id, in_manifest in bar(ids, "validate", unit="triplet")
    ]
    return count_duplicates(rows)


def measure_triplet(
    row: Measures, normal: FloatImage, defect: FloatImage, mask: Mask, scale: Scale, foreground: Mask
) -> Measures:
    """Fill the pixel measures of `row` from normal and defect `(3, H, W)`, mask and foreground `(H, W)`.

    An empty mask leaves the measures over its pixels NaN; sizes that disagree or NaN pixels leave all of them NaN.
    """
    sizes = {normal.shape[1:], defect.shape[1:], mask.shape}
    finite = bool(np.isfinite(normal).all() and np.isfinite(defect).all())
    agrees = len(sizes) == 1 and min(mask.shape) == scale.side
    row = replace(row, defect_sha256=_digest_pixels(defect), size_agrees=agrees, finite=finite)
    if not row.size_agrees or not finite:
        return row
    largest = np.abs(defect.astype(np.float64) - normal.astype(np.float64)).max(axis=0)  # (H, W)
    outside = ~_dilate(mask, scale.outside_margin)
    row = replace(
        row,
        mask_area=float(mask.mean()),
        components=float(ndimage.label(mask, np.ones((3, 3)))[1]),
        change_outside=float(largest[outside].max(initial=0.0)),
        ssim=ssim(normal, defect),
    )
    if not mask.any():
        return row
    return replace(
        row,
        change_inside=float(largest[mask].mean()),
        visible_share=float((largest[mask] > scale.visible_change).mean()),
        foreground_overlap=float(foreground[mask].mean()),
    )


def ssim(first: FloatImage, second: FloatImage) -> float:
    """Mean structural similarity of two images `(C, H, W)` in [0, 1]: 1 for equal images, symmetric, at least -1.

    Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment: from error visibility to structural similarity", IEEE
    TIP 13(4), 2004, equation 13 averaged over pixels and channels. Where the windows hold equal pixels the index is
    exactly 1, so it is computed only around the pixels that differ. (scikit-image computes the whole image.)
    """
    differs = (first != second).any(axis=0)  # (H, W)
    if not differs.any():
        return 1.0
    reach = 2 * SSIM_RADIUS  # beyond it every window is equal in both, also those that the crop's edge reflects
    rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
    crop = (
        slice(None),
        slice(max(0, rows[0] - reach), rows[-1] + reach + 1),
        slice(max(0, columns[0] - reach), columns[-1] + reach + 1),
    )
    x, y = first[crop].astype(np.float64), second[crop].astype(np.float64)
    mean_x, mean_y = _window(x), _window(y)
    variance_x, variance_y = _window(x * x) - mean_x**2, _window(y * y) - mean_y**2
    covariance = _window(x * y) - mean_x * mean_y
    index = ((2 * mean_x * mean_y + SSIM_C1) * (2 * covariance + SSIM_C2)) / (
        (mean_x**2 + mean_y**2 + SSIM_C1) * (variance_x + variance_y + SSIM_C2)
    )
    return float(1 - (1 - index).sum() / first.size)


def count_duplicates(rows: Sequence[Measures]) -> list[Measures]:
    """Fill `duplicates` of every row that has a digest."""
    counts = Counter(row.defect_sha256 for row in rows)
    return [replace(row, duplicates=counts[row.defect_sha256] - 1.0) if row.defect_sha256 else row for row in rows]


def _measure_files(folder: Path, triplet_id: str, in_manifest: bool, scale: Scale, foreground: Foreground) -> Measures:
    paths = [part_path(folder, part, triplet_id) for part in PARTS]
    row = Measures(triplet_id, in_manifest, on_disk=all(path.is_file() for path in paths), decodable=False)
    try:
        normal, defect, mask = read_image(paths[0]), read_image(paths[1]), read_mask(paths[2])
    except UserError:
        return row
    return measure_triplet(replace(row, decodable=True), normal, defect, mask, scale, foreground.mask(normal))


def _estimate_foreground(folder: Path, ids: Sequence[str]) -> Foreground:
    """From normals of the triplets, evenly spaced and of one size; without any, a texture: everything is the part."""
    images: list[FloatImage] = []
    for triplet_id in ids[:: max(1, len(ids) // FOREGROUND_SAMPLE)]:
        try:
            images.append(read_image(part_path(folder, "normal", triplet_id)))
        except UserError:
            continue
    usable = [image for image in images if image.shape == images[0].shape]
    return Foreground.estimate(np.stack(usable)) if usable else Foreground(False, (0.0, 0.0, 0.0), 0.0)


def _digest_pixels(image: FloatImage) -> str:
    pixels = to_uint8(np.nan_to_num(image))
    return hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()


def _dilate(mask: Mask, margin: int) -> Mask:
    """Grow by `margin` pixels (Euclidean)."""
    if margin == 0 or not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask) <= margin, np.bool_)


def _window(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return ndimage.gaussian_filter(values, (0, SSIM_SIGMA, SSIM_SIGMA), radius=(0, SSIM_RADIUS, SSIM_RADIUS))

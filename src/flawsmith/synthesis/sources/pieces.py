"""Pieces of the part that are missing, bent or moved: what breaks and bends parts shows at their outline.

Each pixel of a piece is read from another place of the same image. With c the piece's centre and R a turn,

- `missing`: from the ground, mirrored at the part's outline;
- `bent`: from x + w (t + (R - 1)(x - c)), where w rises smoothly from 0 at the piece's rim to 1 at its middle;
- `moved`: from c + t + R (x - c), a piece of elsewhere.

Where a category has a ground, pieces lie across the part's outline; a surface that fills the image has none missing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.images import Mask
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.masks import PieceKind, Places, feathered, log_uniform, sample_mask
from flawsmith.synthesis.sources.base import Candidate, Defect, Made, Normals, Pixels
from flawsmith.synthesis.sources.texture import blend, resample

REACH = 1 / 24  # of the shorter side: how far a piece may lie to either side of the outline
HALO = 3  # pixels beside the part whose colour is still the part's
TURN = 0.5  # standard deviation of the angle by which a bent piece is turned, in radians
SHIFT = (1.0, 2.0)  # of the depth of a bent piece: how far its middle moves, at least MIN_SHIFT
MIN_SHIFT = 2.0  # pixels
TRIES = 8  # pieces drawn until one can be seen


@dataclass(frozen=True)
class Pieces:
    """A `DefectSource`: the mask is where the image visibly changed, whatever outline the piece has."""

    settings: SynthesizeSettings
    normals: Normals
    remedy: ClassVar[str] = "lower pieces in synthesize.mixture, or "

    def draw(self, generator: np.random.Generator, index: int, _others: NDArray[np.int64]) -> Defect:
        """Draw kind, outline, shift and turn of a piece, again where it is as good as invisible or off the part."""
        normal, part, shape = self.normals.images[index], self.normals.part(index), self.normals.shape
        settings, kinds = replace(self.settings, ridge_share=0.0), list(get_args(PieceKind))
        across = None if part is None else _across(part, min(shape) * REACH)
        near = np.ones(shape, np.bool_) if part is None else ndimage.binary_dilation(part, iterations=HALO)
        for _ in range(TRIES):
            kind: PieceKind = kinds[int(generator.integers(part is None, len(kinds)))]
            outline = replace(sample_mask(generator, shape, settings, across), kind=kind)
            shift, turn = np.zeros(2), 0.0
            if kind == "bent":
                depth = float(ndimage.distance_transform_edt(outline.mask).max())
                length = max(MIN_SHIFT, log_uniform(generator, SHIFT) * depth)
                direction = generator.uniform(0, 2 * np.pi)
                shift, turn = length * np.array([np.sin(direction), np.cos(direction)]), generator.normal(0, TURN)
            elif kind == "moved":
                place = np.array(Places.of(shape, across).draw(generator))
                shift, turn = place - np.argwhere(outline.mask).mean(axis=0), generator.uniform(-np.pi, np.pi)
            values = {"piece_down": float(shift[0]), "piece_right": float(shift[1]), "piece_turn": float(turn)}
            defect = Defect(outline, feathered(outline.mask, settings.feather), values)
            _, changed = self._make(normal, part, defect)
            defect = replace(defect, outline=replace(outline, mask=changed))
            if changed.sum() >= settings.area[0] * changed.size and changed[near].any():
                break
        return defect

    def make(self, batch: Sequence[Candidate]) -> list[Made]:
        """Read the pieces from their places."""
        return [
            self._make(self.normals.images[item.normal], self.normals.part(item.normal), item.defect) for item in batch
        ]

    def _make(self, normal: Pixels, part: Mask | None, defect: Defect) -> Made:
        top, left, side = defect.outline.window
        here = np.s_[..., top : top + side, left : left + side]
        if part is not None and defect.outline.kind == "missing":
            where = _mirrored(ndimage.binary_dilation(part, iterations=HALO))
        else:
            where = _moved(defect)
        return blend(normal, resample(normal, where[here]), defect, self.settings)


def _across(part: Mask, reach: float) -> Mask:
    """The pixels within `reach` of the part's outline, on either side; the whole part where it has no outline."""
    near = ndimage.distance_transform_edt(part) + ndimage.distance_transform_edt(~part) <= reach
    return np.asarray(near if not part.all() else part, np.bool_)


def _mirrored(part: Mask) -> NDArray[np.float64]:
    """Where each pixel of the part is read from on the ground, (2, H, W): as far beyond the outline as it lies within.

    Where that is no ground, from the nearest pixel of the ground; a ground pixel from itself.
    """
    here = np.indices(part.shape)
    if part.all():
        return here.astype(np.float64)
    nearest = ndimage.distance_transform_edt(part, return_distances=False, return_indices=True)
    limit = np.array(part.shape)[:, None, None] - 1
    beyond = np.clip(2 * nearest - here, 0, limit)
    return np.where(part[tuple(beyond)], nearest, beyond).astype(np.float64)


def _moved(defect: Defect) -> NDArray[np.float64]:
    """Where each pixel of a bent or moved piece is read from, (2, H, W)."""
    piece = defect.alpha >= 1
    depth = ndimage.distance_transform_edt(piece)
    share = np.clip(depth / depth.max(), 0, 1) if defect.outline.kind == "bent" else np.ones_like(depth)
    centre = np.argwhere(piece).mean(axis=0)[:, None, None]
    shift = np.array([defect.values["piece_down"], defect.values["piece_right"]])[:, None, None]
    here = np.indices(piece.shape).astype(np.float64)
    down, right = here - centre
    cos, sin = np.cos(defect.values["piece_turn"]), np.sin(defect.values["piece_turn"])
    turned = np.stack([cos * down - sin * right, sin * down + cos * right])
    there = centre + shift + turned
    return here + share * share * (3 - 2 * share) * (there - here)

"""Contact sheets of triplets: normal | defect | mask, and the defect's neighbourhood enlarged."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flawsmith.data.images import Mask, draw_outline

OUTLINE = (255, 60, 60)


def triplet_row(normal: NDArray[np.uint8], defect: NDArray[np.uint8], mask: Mask) -> NDArray[np.uint8]:
    """(H, 3 W + 2 H, 3): normal, defect, mask, and the mask's surroundings in normal and defect with its outline."""
    size = mask.shape[0]
    first, second = (part.transpose(1, 2, 0) for part in (normal, defect))
    white = np.repeat(mask[..., None] * np.uint8(255), 3, axis=2)
    outlined = draw_outline(second, mask, OUTLINE)
    return np.concatenate([first, second, white, zoom(second, mask, size), zoom(outlined, mask, size)], axis=1)


def zoom(image: NDArray[np.uint8], mask: Mask, size: int) -> NDArray[np.uint8]:
    """The square around the mask with some context, (H, W, 3) → (size, size, 3), enlarged without smoothing."""
    shown = mask if mask.any() else np.ones_like(mask)
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    side = min(max(np.ptp(rows), np.ptp(columns)) * 3 // 2 + 16, min(mask.shape))
    top, left = (
        int(np.clip((index[0] + index[-1] - side) // 2, 0, extent - side))
        for index, extent in zip((rows, columns), mask.shape, strict=True)
    )
    crop = Image.fromarray(np.ascontiguousarray(image[top : top + side, left : left + side]))
    return np.asarray(crop.resize((size, size), Image.Resampling.NEAREST))


def contact_sheet(rows: Sequence[NDArray[np.uint8]], columns: int = 2) -> NDArray[np.uint8]:
    """Stack equal rows into `columns` columns with a thin gap."""
    gap = 4
    height, width, _ = rows[0].shape
    lines = -(-len(rows) // columns)
    sheet = np.full((lines * (height + gap) - gap, columns * (width + gap) - gap, 3), 32, np.uint8)
    for index, row in enumerate(rows):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = row
    return sheet

"""Masks of thresholded white noise, the control of the Perlin masks: no shape at all, but their areas and windows."""

import numpy as np

from flawsmith.data.images import Mask, Shape
from flawsmith.errors import UserError
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.masks import TRIES, MaskDraw, WindowLimits, log_uniform, on_margin, window_around

BLOCKS = (1, 2, 4, 8)  # sides of the blocks in pixels
DENSITY = (0.4, 0.8)  # share of its square that is marked; Perlin masks fill 0.4 of theirs (masks.FILL)


def noise_mask(
    generator: np.random.Generator, shape: Shape, settings: SynthesizeSettings, foreground: Mask | None = None
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

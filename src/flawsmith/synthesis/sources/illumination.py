"""Illumination defects, or shades: large soft areas where light or coating differ, as `uneven` spots on real surfaces.

The image changes by a gain and an offset, both scaled by one soft field alpha in [0, 1]:

    defect = normal + alpha (gain normal + offset)

Other illumination (or absorption) is a pure gain, a haze or film a pure offset; a shade is anything between. Its area
is that of the pixels whose change can be seen. As for masks, every pixel has a *reach*: the radius R of the field at
which its change becomes visible. With alpha = (1 - (r / R)^p)^2, and c the change that alpha = 1 would make, the change
alpha c exceeds v where

    R > r / (1 - sqrt(v / c))^(1/p)

so R is solved for the area wanted, and the edge is as wide as the field itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.images import Mask
from flawsmith.synthesis.config import SynthesizeSettings
from flawsmith.synthesis.masks import MaskDraw, Places, distance_to, log_uniform
from flawsmith.synthesis.perlin import FloatField, perlin_noise
from flawsmith.synthesis.sources.base import Candidate, Defect, Made, Normals, Pixels

SOFTNESS = (1.5, 5.0)  # range of p: 1.5 is a peaked hill, 5 a plateau with a soft rim
ASPECT = (1.0, 4.0)
WARP = 0.8  # the distance r is multiplied by 1 +- this, after low-frequency noise
WARP_PERIOD = 1.0  # of that noise, in diameters of the visible area
SMOOTHING = 1 / 40  # of the shorter side: sigma of the Gaussian behind which brightness, not texture, is left
ROOM = 0.8  # share of the way to black or white that a shade may go


@dataclass(frozen=True)
class Illumination:
    """A `DefectSource`: soft changes of light, marked where their own change can be seen."""

    settings: SynthesizeSettings
    normals: Normals
    remedy: ClassVar[str] = "raise synthesize.shade_change, or "

    def draw(self, generator: np.random.Generator, index: int, _others: NDArray[np.int64]) -> Defect:
        """Draw a shade, see `sample_shade`."""
        return sample_shade(generator, self.normals.images[index], self.settings, self.normals.part(index))

    def make(self, batch: Sequence[Candidate]) -> list[Made]:
        """Change the light; a mask is as it was drawn, whatever the texture under it adds to the change."""
        return [
            (shaded(self.normals.images[item.normal], item.defect, self.settings.visibility), item.defect.outline.mask)
            for item in batch
        ]


def sample_shade(
    generator: np.random.Generator, normal: Pixels, settings: SynthesizeSettings, foreground: Mask | None = None
) -> Defect:
    """Draw a shade for one image, on the foreground (H, W) where there is one.

    The visible area is log-uniform in `settings.shade_area`, as far as the foreground can hold it, the largest change
    log-uniform in `settings.shade_change`, dark or bright; it is smaller and of the other sign where the surface is too
    dark or too bright for it. The mask may be empty: there is nothing to see then. Its values are the module's `gain`
    and `offset` for pixels in [0, 1], the largest change of brightness and how much of that is gain (1 is light, 0 a
    film).
    """
    shape = (normal.shape[1], normal.shape[2])
    sigma, pixels = min(shape) * SMOOTHING, shape[0] * shape[1]
    level = ndimage.gaussian_filter(normal.astype(np.float32) / np.float32(255), (0, sigma, sigma))
    row, column = Places.of(shape, foreground).draw(generator)
    low, high = settings.shade_area
    area = log_uniform(generator, (max(low * pixels, 1.0), max(high * pixels, 1.0)))
    wished, sign = log_uniform(generator, settings.shade_change), float(generator.choice([-1.0, 1.0]))
    gain_share, softness = float(generator.uniform(0, 1)), log_uniform(generator, SOFTNESS)
    angle, aspect = float(generator.uniform(0, np.pi)), log_uniform(generator, ASPECT)

    here = float(level[:, row, column].mean())
    rooms = {-1.0: ROOM * here, 1.0: ROOM * (1 - here)}
    sign = sign if rooms[sign] >= wished else max(rooms, key=lambda key: rooms[key])
    change = sign * min(wished, rooms[sign])
    gain, offset = gain_share * change / max(here, 1e-3), (1 - gain_share) * change

    period = WARP_PERIOD * 2 * float(np.sqrt(area / np.pi))
    origin = generator.uniform(0, 1000, 2)
    noise = perlin_noise(shape, period, generator, angle, 3, 0.5, (float(origin[0]), float(origin[1])))
    distance = distance_to(shape, (row, column), angle, aspect) * (1 + np.float32(WARP) * noise)
    largest = np.abs(np.float32(gain) * level + np.float32(offset)).max(axis=0)  # (H, W), c of the module's equation
    seen = largest > settings.visibility
    if foreground is not None:
        seen &= foreground
    reach = np.full(shape, np.inf, np.float32)
    reach[seen] = distance[seen] / (1 - np.sqrt(settings.visibility / largest[seen])) ** np.float32(1 / softness)
    inside = np.sort(reach[seen])
    radius = inside[min(round(area), inside.size) - 1] if inside.size else np.float32(0)
    far = np.clip(distance / max(radius, np.float32(1e-6)), 0, 1)
    alpha: FloatField = np.asarray((1 - far ** np.float32(softness)) ** 2, np.float32)
    if foreground is not None:
        alpha *= foreground
    values = {"shade_change": change, "shade_gain_share": gain_share, "shade_gain": gain, "shade_offset": offset}
    return Defect(MaskDraw(reach <= radius, "shade", period, 0.0, angle, (0, 0, max(shape))), alpha, values)


def shaded(normal: Pixels, shade: Defect, visibility: float) -> Pixels:
    """`normal` under the shade; outside its mask no pixel moves by more than `visibility` (of 1)."""
    values = normal.astype(np.float32)
    gain, offset = (shade.values[f"shade_{name}"] for name in ("gain", "offset"))
    change = shade.alpha * (np.float32(gain) * values + np.float32(255 * offset))
    limit = np.floor(np.float32(visibility * 255))  # grain brighter than its surroundings would cross it here and there
    change = np.where(shade.outline.mask, change, np.clip(change, -limit, limit))
    return np.rint(np.clip(values + change, 0, 255)).astype(np.uint8)

"""A 2/1 twill of two yarns: every yarn is a twisted cylinder that climbs over and dives under the ones it crosses.

The cloth is drawn at twice the picture's resolution: each sample asks for the warp and the weft yarn at its place, how
high each runs there, and shows the upper one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from flawsmith.demo.optics import Camera, Field, Overlay, draw_camera, smooth_field

OVERSAMPLING = 2
PITCH = (5.8, 6.4)  # pixels between warp yarns (vertical) and between weft yarns (horizontal)
CLIMB = 0.45  # how far a yarn's centre line rises above the middle of the cloth, in yarn radii
GROUND = -1.6  # height of the dark table under the cloth, in yarn radii
_LUT = 16  # entries per pixel of the tables from place to yarn
_TABLE = 256  # side of the fibre texture, a power of 2

Index = NDArray[np.int32]


@dataclass(frozen=True)
class Yarns:
    """One set of parallel yarns: where each lies and how it looks."""

    index: Index  # (places * _LUT,) which yarn is at a place
    across: Field  # (places * _LUT,) where on it, from -1 to 1
    tone: Field  # (yarns, steps) brightness along each yarn, around 1
    offset: Index  # (yarns, 2) each yarn's own piece of the fibre texture
    colour: Field  # (3,) reflectance


@dataclass(frozen=True)
class Fabric:
    """One piece of cloth in front of one camera; a defect is a copy with other fields. Fields are oversampled."""

    place: tuple[Field, Field]  # (S, S) pixels: position across the warp yarns, and across the weft yarns
    yarns: tuple[Yarns, Yarns]  # warp, weft
    phase: int  # of the twill's diagonal
    fibres: Field  # (_TABLE, _TABLE) texture of the fibres in a yarn
    thickness: tuple[Field | None, Field | None]  # (S, S) of each set, 1 = whole, 0 = yarn missing
    hairs: Field  # (S, S) opacity of the cloth's own stray fibres
    lamp: tuple[float, float]  # direction (row, column) of length 1
    tint: Field | None  # (H, W, 3) reflectance factor
    camera: Camera
    overlay: Overlay | None = None

    @property
    def size(self) -> int:
        return self.hairs.shape[0] // OVERSAMPLING

    def crossing(self) -> tuple[tuple[Index, Field], tuple[Index, Field]]:
        """For the warp and for the weft: which yarn is at each sample, and where on it (-1 to 1); both `(S, S)`."""
        found = []
        for place, yarns in zip(self.place, self.yarns, strict=True):
            entry = np.clip((place * _LUT).astype(np.int32), 0, len(yarns.index) - 1)
            found.append((yarns.index[entry], yarns.across[entry]))
        return found[0], found[1]

    def light(self) -> Field:
        """Linear light `(H, W, 3)` towards the camera."""
        (i, a), (j, b) = self.crossing()
        here = _up(i, j, self.phase)
        along_warp = _rise(here, _up(i, j + np.where(b > 0, 1, -1), self.phase), b)
        along_weft = -_rise(here, _up(i + np.where(a > 0, 1, -1), j, self.phase), a)
        warp = _height(a, along_warp, self.thickness[0])
        weft = _height(b, along_weft, self.thickness[1])
        top = warp > weft
        height = np.maximum(np.maximum(warp, weft), GROUND)
        bare = np.maximum(warp, weft) <= GROUND

        colour = self._colour(top, i, a, j, b)
        colour[bare] = 0.03

        radius = OVERSAMPLING * PITCH[0] / 2
        down = (height[2:, 1:-1] - height[:-2, 1:-1]) * (radius / 2)
        right = (height[1:-1, 2:] - height[1:-1, :-2]) * (radius / 2)
        tilt = np.clip(-(down * self.lamp[0] + right * self.lamp[1]), -1.5, 1.5)
        shading = np.pad(0.80 + 0.34 * tilt / np.sqrt(1 + tilt**2), 1, mode="edge")
        # crevices see less of the room: how far a sample lies below its surroundings
        depth = ndimage.uniform_filter(height, 2 * OVERSAMPLING * 4 + 1, mode="nearest") - height
        shading = shading * np.exp(-0.55 * np.clip(depth, -0.4, 2.5))
        light = colour * shading[..., None].astype(np.float64)
        light = light + self.hairs[..., None] * (0.55 - light)
        light = _halve(light)
        if self.tint is not None:
            light = light * self.tint
        if self.overlay is not None:
            light = self.overlay.over(light, np.ones(light.shape[:2], np.float64))
        return np.asarray(light, np.float64)

    def _colour(self, top: NDArray[np.bool_], warp: Index, a: Field, weft: Index, b: Field) -> Field:
        """Reflectance `(S, S, 3)` of the yarn on top: dye, unevenness, and fibres at the angle of its twist."""
        first, second = self.yarns
        yarn = np.where(top, warp, weft + len(first.tone))
        along = np.where(top, self.place[1], self.place[0])
        sideways = np.where(top, a * (PITCH[0] / 2), b * (PITCH[1] / 2))
        turn = 0.42  # radians, the twist's angle
        thread = ((sideways * np.cos(turn) + along * np.sin(turn)) * 3).astype(np.int32)
        length = ((along * np.cos(turn) - sideways * np.sin(turn)) * 2).astype(np.int32)
        offset = np.concatenate([first.offset, second.offset])
        entry = ((thread + offset[:, 0][yarn]) & (_TABLE - 1)) * _TABLE + ((length + offset[:, 1][yarn]) & (_TABLE - 1))
        tone = np.concatenate([first.tone, second.tone])
        step = np.clip((along * (1 / 4)).astype(np.int32), 0, tone.shape[1] - 1)
        factor = tone.ravel()[yarn * tone.shape[1] + step] * self.fibres.ravel()[entry]
        return np.where(top[..., None], first.colour, second.colour) * factor[..., None]


def draw_fabric(generator: np.random.Generator, size: int) -> Fabric:
    """A new piece: the loom's timing, the yarns, the dye, the cloth's lie and the lamp vary a little."""
    samples = size * OVERSAMPLING
    line = (np.arange(samples) + 0.5) / OVERSAMPLING
    turn = float(np.deg2rad(generator.normal(0, 0.8)))
    skew = float(np.deg2rad(generator.normal(0, 0.4)))
    lie = [0.9 * smooth_field(generator, samples, max(2, size // 80)) for _ in range(2)]
    margin = 24.0  # pixels, so that no sample falls off the cloth
    columns, rows = line[None, :] - size / 2, line[:, None] - size / 2
    across_warp = columns * np.cos(turn) + rows * np.sin(turn) + lie[0] + size / 2 + margin
    across_weft = rows * np.cos(turn + skew) - columns * np.sin(turn + skew) + lie[1] + size / 2 + margin
    reach = int(size + 2 * margin)
    dye = np.array([0.135, 0.19, 0.285]) * np.exp(0.06 * generator.standard_normal())
    raw = np.array([0.47, 0.455, 0.415]) * np.exp(0.03 * generator.standard_normal())
    fibres = ndimage.gaussian_filter(
        generator.standard_normal((_TABLE, _TABLE), dtype=np.float32).astype(np.float64), (0.7, 7.0), mode="wrap"
    )
    direction = float(np.deg2rad(generator.normal(225, 8)))
    return Fabric(
        place=(np.asarray(across_warp, np.float64), np.asarray(across_weft, np.float64)),
        yarns=(
            _draw_yarns(generator, reach, PITCH[0], dye, 0.06),
            _draw_yarns(generator, reach, PITCH[1], raw, 0.04),
        ),
        phase=int(generator.integers(3)),
        fibres=np.asarray(np.exp(0.16 * fibres / fibres.std()), np.float64),
        thickness=(None, None),
        hairs=draw_hairs(generator, size, generator.uniform(0, size, (round(220 * (size / 256) ** 2), 2)), (30, 110)),
        lamp=(float(np.sin(direction)), float(np.cos(direction))),
        tint=None,
        camera=draw_camera(generator, size),
    )


def _draw_yarns(
    generator: np.random.Generator, reach: int, pitch: float, colour: NDArray[np.float64], unevenness: float
) -> Yarns:
    """Yarns side by side over `reach` pixels, each of its own width and tone."""
    count = int(reach / pitch) + 3
    widths = pitch * (1 + 0.03 * generator.standard_normal(count))
    edges = np.cumsum(widths) - pitch * generator.random()
    entries = (np.arange(reach * _LUT) + 0.5) / _LUT
    index = np.clip(np.searchsorted(edges, entries), 0, count - 1)
    middle, half = edges - widths / 2, widths / 2
    steps = reach // 4 + 2
    along = ndimage.gaussian_filter1d(generator.standard_normal((count, steps)), 3.0, axis=1)
    tone = unevenness * (0.8 * generator.standard_normal((count, 1)) + 0.7 * along / along.std())
    return Yarns(
        index=index.astype(np.int32),
        across=np.asarray(np.clip((entries - middle[index]) / half[index], -1, 1), np.float64),
        tone=np.asarray(np.exp(tone), np.float64),
        offset=generator.integers(0, _TABLE, (count, 2), dtype=np.int32),
        colour=np.asarray(colour, np.float64),
    )


def draw_hairs(
    generator: np.random.Generator, size: int, roots: NDArray[np.float64], strength: tuple[int, int]
) -> Field:
    """Opacity `(S, S)` of short curled fibres that stand out of the yarns at `roots` (N, 2: column, row in pixels)."""
    samples, count = size * OVERSAMPLING, len(roots)
    canvas = Image.new("L", (samples, samples))
    pen = ImageDraw.Draw(canvas)
    heading = generator.uniform(0, 2 * np.pi, (count, 1)) + np.cumsum(generator.normal(0, 0.35, (count, 5)), axis=1)
    stride = generator.uniform(2, 6, (count, 1, 1))
    steps = stride * np.stack([np.cos(heading), np.sin(heading)], axis=2)
    path = roots[:, None] * OVERSAMPLING + np.cumsum(steps, axis=1)
    for points, shade in zip(path, generator.integers(*strength, count), strict=True):
        pen.line([tuple(point) for point in points], fill=int(shade), width=1)
    return np.asarray(canvas, np.float64) / 255


def _up(warp: Index, weft: Index, phase: int) -> Field:
    """+1 where the warp yarn lies above the weft yarn, -1 where below: two over, one under, shifted by one a row."""
    table = np.tile(np.array([-1, 1, 1], np.float64), warp.max() + weft.max() + 6)  # a lookup is faster than % 3
    return np.asarray(table[warp + weft + (phase + 3)])


def _rise(here: Field, there: Field, position: Field) -> Field:
    """Height of a centre line between this crossing (position 0) and the next (position ±2)."""
    share = 0.5 * (1 - np.cos((np.pi / 2) * np.abs(position)))
    return np.asarray(here * (1 - share) + there * share, np.float64)


def _height(across: Field, rise: Field, thickness: Field | None) -> Field:
    """Height of a yarn's surface in yarn radii; far below everything where there is no yarn."""
    if thickness is not None:
        across = np.asarray(across / np.maximum(thickness, 0.02), np.float64)
    inside = 1 - (across / 0.98) ** 2
    bulge = np.sqrt(np.maximum(inside, 0))
    if thickness is not None:
        bulge = np.asarray(bulge * np.maximum(thickness, 1), np.float64)
    return np.asarray(np.where(inside > 0, CLIMB * rise + bulge, (2 * GROUND)), np.float64)


def _halve(light: Field) -> Field:
    """Mean over each pixel's 2 x 2 samples."""
    halves = light[::2] + light[1::2]
    return np.asarray((halves[:, ::2] + halves[:, 1::2]) / 4, np.float64)

"""Gradient noise on a rotated, stretched lattice: the shapes of synthetic defects start here.

Perlin, "An image synthesizer" (SIGGRAPH 1985), with the quintic fade of "Improving noise" (SIGGRAPH 2002). Gradients
are unit vectors in 256 random directions, picked for a lattice point by a hash through a permutation (as in both
papers). So a pixel's value depends on nothing but the seed and its place: a larger field contains the smaller one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatField = NDArray[np.float32]  # (H, W)

DIRECTIONS = 256  # lattice points repeat after as many cells
MIN_PERIOD = 2.0  # a finer octave would be aliased to a lattice-shaped pattern, so it is left out
_UNIT_RANGE = np.sqrt(2.0)  # the extreme of one octave is sqrt(1/2): all four gradients point at the cell's centre


def perlin_noise(
    shape: tuple[int, int],
    period_px: float | tuple[float, float],
    generator: np.random.Generator,
    angle_rad: float = 0.0,
    octaves: int = 1,
    persistence: float = 0.5,
    origin: tuple[float, float] = (0.0, 0.0),
) -> FloatField:
    """Sum of octaves of gradient noise, `(H, W)` float32 in [-1, 1], of zero mean over seeds; one octave's std is 0.31.

    Args:
        shape: height and width in pixels; need not be multiples of the period.
        period_px: distance of lattice points, one number or (down the rows, along the columns), before rotation.
        generator: source of the gradients; what it is left at does not depend on shape, period or angle.
        angle_rad: turns the lattice about `origin`, from the x axis towards the y axis (clockwise on the screen).
        octaves: each further octave halves the period and has `persistence` times the amplitude; octaves whose period
            falls below 2 px are left out.
        persistence: amplitude ratio of one octave to the next coarser one, in (0, 1].
        origin: the (y, x) pixel position of one lattice point, where the noise is 0.

    Raises:
        ValueError: a shape, period, octave count or persistence outside its range.
    """
    periods = (period_px, period_px) if isinstance(period_px, int | float) else period_px
    if min(shape) < 1 or octaves < 1 or not 0 < persistence <= 1 or not min(periods) > 0:
        raise ValueError(
            f"perlin_noise needs a non-empty shape, positive periods, 1 or more octaves and persistence in (0, 1]; "
            f"got {shape}, {period_px}, {octaves}, {persistence}"
        )
    # the lattice's own axes, in pixels
    y = np.arange(shape[0], dtype=np.float64)[:, None] - origin[0]
    x = np.arange(shape[1], dtype=np.float64)[None, :] - origin[1]
    cos, sin = np.cos(angle_rad), np.sin(angle_rad)
    along_y, along_x = cos * y - sin * x, sin * y + cos * x  # (H, W) each

    total = np.zeros(shape, np.float32)
    weights = 0.0
    for octave in range(octaves):
        gradients = _Gradients.draw(
            generator
        )  # drawn even if left out, so that the stream does not depend on the period
        scale, weight = 2.0**octave, persistence**octave
        if octave and min(periods) / scale < MIN_PERIOD:
            continue
        total += np.float32(weight) * _one_octave(
            along_y * (scale / periods[0]), along_x * (scale / periods[1]), gradients
        )
        weights += weight
    total *= np.float32(_UNIT_RANGE / weights)
    return total


@dataclass(frozen=True)
class _Gradients:
    """A random direction for every lattice point."""

    permutation: NDArray[np.intp]  # (256,)
    angles: NDArray[np.float64]  # (256,)

    @classmethod
    def draw(cls, generator: np.random.Generator) -> "_Gradients":
        return cls(generator.permutation(DIRECTIONS), generator.uniform(0, 2 * np.pi, DIRECTIONS))

    def table(self, rows: NDArray[np.intp], columns: NDArray[np.intp]) -> tuple[FloatField, FloatField]:
        """Components (y, x) of the gradients at the lattice points `rows` x `columns`, row by row."""
        hashed = self.permutation[(self.permutation[rows % DIRECTIONS][:, None] + columns[None, :]) % DIRECTIONS]
        angles = self.angles[hashed.ravel()]
        return np.sin(angles).astype(np.float32), np.cos(angles).astype(np.float32)


def _one_octave(v: NDArray[np.float64], u: NDArray[np.float64], gradients: _Gradients) -> FloatField:
    """Noise at lattice coordinates (v, u), in [-sqrt(1/2), sqrt(1/2)]."""
    floor_v, floor_u = np.floor(v), np.floor(u)
    dv, du = (v - floor_v).astype(np.float32), (u - floor_u).astype(np.float32)
    rows = np.arange(int(floor_v.min()), int(floor_v.max()) + 2)
    columns = np.arange(int(floor_u.min()), int(floor_u.max()) + 2)
    table_y, table_x = gradients.table(rows, columns)
    # (H, W) index into the flat tables of each pixel's upper left lattice point
    corner = ((floor_v - rows[0]) * columns.size + (floor_u - columns[0])).astype(np.intp)

    def ramp(down: int, right: int) -> FloatField:
        """The plane through 0 at one corner of each pixel's cell, with that corner's gradient."""
        first = down * columns.size + right
        plane = table_y[first:].take(corner, mode="clip")  # never out of bounds: "clip" only skips the check
        plane *= dv - np.float32(down)
        plane += table_x[first:].take(corner, mode="clip") * (du - np.float32(right))
        return plane

    fade_u = _fade(du)
    upper, lower = ramp(0, 0), ramp(1, 0)
    upper += fade_u * (ramp(0, 1) - upper)
    lower += fade_u * (ramp(1, 1) - lower)
    upper += _fade(dv) * (lower - upper)
    return upper


def _fade(t: FloatField) -> FloatField:
    """6 t^5 - 15 t^4 + 10 t^3: first and second derivatives vanish at lattice lines (Perlin 2002, eq. 1)."""
    result: FloatField = t * np.float32(6)
    result -= np.float32(15)
    result *= t
    result += np.float32(10)
    result *= t * t * t
    return result

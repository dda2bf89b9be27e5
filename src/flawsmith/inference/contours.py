"""The outline of a region of an anomaly map as a polygon of few points, for machines that act on places.

Pixels are squares here, not points: a polygon has the area of its region, and reaches the border of the image where the
region does. Written by hand: OpenCV (61 MB) and scikit-image (45 MB with what it needs) go through the pixels' centres,
and would grow the base install for this alone.
"""

import numpy as np
from numpy.typing import NDArray

MAX_CORNERS = 512  # of an outline before it is simplified: what is more ragged is looked at more coarsely
MAX_POINTS = 128  # of a polygon
SLACK = 0.05  # share of a polygon's area by which simplifying may change it, unless it has more than MAX_POINTS

Point = tuple[float, float]


def outline(region: NDArray[np.bool_]) -> list[Point]:
    """Return the outer outline of an 8-connected region `(h, w)`: corners `(x, y)`, clockwise on the screen.

    Holes are ignored. Where two pixels touch at a corner alone, the outline passes that corner twice. A region with
    more than `MAX_CORNERS` corners is taken in blocks of 2 x 2 pixels (4 x 4, ...); a block counts if it holds any.
    """
    height, width = region.shape
    step = 1
    while len(corners := _trace(region)) > MAX_CORNERS:
        odd = [(0, side % 2) for side in region.shape]
        region = np.logical_or.reduceat(np.pad(region, odd), range(0, region.shape[0], 2), axis=0)
        region = np.logical_or.reduceat(region, range(0, region.shape[1], 2), axis=1)
        step *= 2
    return [(float(min(x * step, width)), float(min(y * step, height))) for x, y in corners]


def simplify(points: list[Point], most: int = MAX_POINTS, slack: float = SLACK) -> list[Point]:
    """Leave out the corners that matter least (Visvalingam and Whyatt, 1993): those that span the smallest triangles.

    Stops before the triangles left out add up to more than `slack` of the polygon's area, yet goes on while there are
    more than `most` points. A corner stays if the shortcut would run across another one, so the outline does not cross
    itself. Only if nothing else brings it down to `most` points, it may.
    """
    kept = np.asarray(points, np.float64)  # (N, 2)
    needed = np.zeros(len(kept), bool)  # corners whose shortcut would run across another one
    is_careful = True
    budget = slack * abs(float(_cross(kept, np.roll(kept, -1, axis=0)).sum())) / 2
    while len(kept) > 4:
        before, after = np.roll(kept, 1, axis=0), np.roll(kept, -1, axis=0)
        sizes = np.abs(_cross(kept - before, after - before)) / 2  # (N,)
        if is_careful and needed.all():
            if len(kept) <= most:
                break
            is_careful = False
        index = int((np.where(needed, np.inf, sizes) if is_careful else sizes).argmin())
        if len(kept) <= most and sizes[index] > budget:
            break
        if is_careful and _is_crossed(kept, index):
            needed[index] = True
            continue
        budget -= float(sizes[index])
        needed[[index - 1, (index + 1) % len(kept)]] = False
        kept, needed = np.delete(kept, index, axis=0), np.delete(needed, index)
    return [(float(x), float(y)) for x, y in kept]


def _cross(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cross products of vectors `(N, 2)`: twice the signed areas of the triangles that they span."""
    return one[:, 0] * other[:, 1] - other[:, 0] * one[:, 1]


def _is_crossed(ring: NDArray[np.float64], index: int) -> bool:
    """Whether another point lies in the triangle that leaving out a corner would cut off or add, edges included."""
    a, b, c = ring[index - 1], ring[index], ring[(index + 1) % len(ring)]
    sides = np.stack([_cross(np.broadcast_to(q - p, ring.shape), ring - p) for p, q in ((a, b), (b, c), (c, a))])
    inside = (sides >= 0).all(axis=0) | (sides <= 0).all(axis=0)
    inside &= (ring != a).any(axis=1) & (ring != c).any(axis=1)
    inside[index] = False
    return bool(inside.any())


def _trace(region: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Walk along the pixels' edges, clockwise with the region on the right hand; return the corners where it turns."""
    cells, width = np.pad(region, 1).tobytes(), region.shape[1] + 2
    top = int(region.any(axis=1).argmax())
    start = x, y = int(region[top].argmax()), top  # the upper left corner of the leftmost of the uppermost pixels
    across, down = 1, 0
    corners = [start]
    while True:
        x, y = x + across, y + down
        ahead_left = (y + (down - across + 1) // 2) * width + x + (across + down + 1) // 2
        ahead_right = (y + (down + across + 1) // 2) * width + x + (across - down + 1) // 2
        if cells[ahead_left]:  # where two pixels touch at a corner alone, this leads on to the other one
            across, down = down, -across
        elif cells[ahead_right]:
            continue
        else:
            across, down = -down, across
        if (x, y) == start:
            return corners
        corners.append((x, y))

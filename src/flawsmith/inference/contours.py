"""The outline of a region of an anomaly map as a polygon of few points, for machines that act on places.

Pixels are squares here, not points: the outline of one pixel is the square around it, so that a polygon's area is the
region's, and a region on the border of the image reaches the border.
"""

import heapq
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

MAX_CORNERS = 512  # of an outline before it is simplified: what is more ragged is looked at more coarsely
MAX_POINTS = 128  # of a polygon
SLACK = 0.05  # share of a polygon's area by which simplifying may change it, unless it has more than MAX_POINTS

Point = tuple[float, float]


def outline(region: NDArray[np.bool_]) -> list[Point]:
    """The outer outline of an 8-connected region `(h, w)`: corners `(x, y)`, clockwise on the screen, holes ignored.

    Where two pixels touch at a corner alone, the outline passes that corner twice. With more than `MAX_CORNERS` corners
    the region is taken in blocks of 2 x 2 pixels (4 x 4, ...), all of which count that hold any of it.
    """
    height, width = region.shape
    step = 1
    corners = _trace(region)
    while len(corners) > MAX_CORNERS:
        region = _coarser(region)
        step *= 2
        corners = _trace(region)
    return [(float(min(x * step, width)), float(min(y * step, height))) for x, y in corners]


def simplify(points: list[Point], most: int = MAX_POINTS, slack: float = SLACK) -> list[Point]:
    """Leave out the corners that matter least (Visvalingam and Whyatt): those that span the smallest triangles.

    Stops before the triangles left out add up to more than `slack` of the polygon's area, yet goes on while there are
    more than `most` points. A corner stays if the shortcut would run across another one, so the outline does not cross
    itself; only where nothing else brings it down to `most` points, that is given up.
    """
    count = len(points)
    if count <= 4:
        return points
    kept = _Ring(points)
    budget = slack * abs(_area(points))
    for careful in (True, False):
        heap = [(kept.triangle(index), index) for index in kept.indices()]
        heapq.heapify(heap)
        while heap and kept.count > 4:
            size, index = heapq.heappop(heap)
            if not kept.alive[index] or size != kept.triangle(index):
                continue  # its neighbours have changed; it lies in the heap once more
            if kept.count <= most and size > budget:
                break
            if careful and kept.is_crossed(index):
                continue
            budget -= size
            for neighbour in kept.remove(index):
                heapq.heappush(heap, (kept.triangle(neighbour), neighbour))
        if kept.count <= most:
            break
    return [points[index] for index in kept.indices()]


class _Ring:
    """A closed chain of points from which points can be taken."""

    def __init__(self, points: list[Point]) -> None:
        self._points = points
        self._places = np.asarray(points, np.float64)  # (N, 2)
        self.count = len(points)
        self.alive = np.ones(self.count, bool)
        self._before = [index - 1 for index in range(self.count)]
        self._before[0] = self.count - 1
        self._after = [*range(1, self.count), 0]

    def indices(self) -> list[int]:
        return [int(index) for index in np.flatnonzero(self.alive)]

    def triangle(self, index: int) -> float:
        a, b, c = (self._points[i] for i in (self._before[index], index, self._after[index]))
        return abs((b[0] - a[0]) * (c[1] - a[1]) - (c[0] - a[0]) * (b[1] - a[1])) / 2

    def is_crossed(self, index: int) -> bool:
        """Whether another point lies in the triangle that would be cut off or added (its edges included)."""
        a, b, c = (self._places[i] for i in (self._before[index], index, self._after[index]))
        x, y = self._places.T
        sides = [
            (q[0] - p[0]) * (y - p[1]) - (q[1] - p[1]) * (x - p[0])  # (N,), sign: on which side of p-q
            for p, q in ((a, b), (b, c), (c, a))
        ]
        inside = np.logical_and.reduce([side >= 0 for side in sides])
        inside |= np.logical_and.reduce([side <= 0 for side in sides])
        ends = ((x == a[0]) & (y == a[1])) | ((x == c[0]) & (y == c[1]))
        inside &= self.alive & ~ends
        inside[index] = False
        return bool(inside.any())

    def remove(self, index: int) -> tuple[int, int]:
        before, after = self._before[index], self._after[index]
        self._after[before], self._before[after] = after, before
        self.alive[index] = False
        self.count -= 1
        return before, after


def _trace(region: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Walk along the pixels' edges with the region on the right hand, clockwise; sides alternate across and down."""
    cells = np.pad(region, 1).astype(np.int8)
    across, down = defaultdict(list), defaultdict(list)  # corner -> ends of the sides that start there
    for y, low, high, sign in _runs(np.diff(cells, axis=0)):  # sign 1: the region lies below, so the walk goes right
        start, end = ((low, y), (high, y)) if sign > 0 else ((high, y), (low, y))
        across[start].append(end)
    first = next(iter(across))  # the leftmost of the uppermost sides: it belongs to the outer outline
    for x, low, high, sign in _runs(np.diff(cells, axis=1).T):  # sign 1: it lies to the right, so the walk goes up
        start, end = ((x, high), (x, low)) if sign > 0 else ((x, low), (x, high))
        down[start].append(end)
    corners: list[tuple[int, int]] = []
    start, end = first, across[first][0]
    while True:
        corners += [start, end]
        # where two pixels touch at a corner alone, two sides start there: turning left leads on to the other pixel
        bottom = max(down[end], key=lambda place: place[1] * (-1 if end[0] > start[0] else 1))
        if bottom == first:
            return corners
        start, end = bottom, max(across[bottom], key=lambda place: place[0] * (1 if bottom[1] > end[1] else -1))


def _runs(edges: NDArray[np.int8]) -> list[tuple[int, int, int, int]]:
    """Runs of equal non-zero values in the rows of a padded edge map: (line, low, high, sign), in cell borders."""
    before = np.pad(edges, ((0, 0), (1, 0)))[:, :-1]
    after = np.pad(edges, ((0, 0), (0, 1)))[:, 1:]
    lines, lows = np.nonzero((edges != 0) & (edges != before))
    _, highs = np.nonzero((edges != 0) & (edges != after))
    signs = edges[lines, lows]
    return list(zip(lines.tolist(), (lows - 1).tolist(), highs.tolist(), signs.tolist(), strict=True))


def _coarser(region: NDArray[np.bool_]) -> NDArray[np.bool_]:
    height, width = region.shape
    even = np.pad(region, ((0, height % 2), (0, width % 2)))
    blocks = even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2)
    return np.asarray(blocks.any(axis=(1, 3)), np.bool_)


def _area(points: list[Point]) -> float:
    x, y = np.asarray(points, np.float64).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2

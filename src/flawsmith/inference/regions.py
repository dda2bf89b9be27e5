"""Finds places on the image in an anomaly map: connected regions above the pixel threshold, their mask, and the peak.

A pixel of the map is a rectangle of the image. Boxes, areas, polygons and the mask all are made of these rectangles, so
they agree with each other.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from flawsmith.data.images import Mask
from flawsmith.inference.contours import Point, outline, simplify

MAX_REGIONS = 100  # with a polygon, and listed in results: a map that is hot all over must not fill the disk


@dataclass(frozen=True)
class Region:
    """One connected area above the pixel threshold, in pixels of the original image, origin top left."""

    x: int  # left edge of the bounding box
    y: int  # top edge
    width: int
    height: int
    area: float  # in square pixels; not whole, for the map's pixels are not the image's
    peak: float  # largest map value inside
    peak_x: int
    peak_y: int
    polygon: tuple[Point, ...] = ()  # the outer outline (holes ignored), closed: the last point is the first


def find_regions(anomaly_map: NDArray[np.float32], pixel_threshold: float, height: int, width: int) -> list[Region]:
    """List the regions (8-connected) of a map `(h, w)` above the threshold, strongest first, in pixels of the image.

    The image has `height` x `width` pixels. The `MAX_REGIONS` strongest regions have a polygon of at most
    `contours.MAX_POINTS` corners, inside their box.
    """
    labels, count = ndimage.label(anomaly_map > pixel_threshold, structure=np.ones((3, 3)))
    if not count:
        return []
    rows, columns = anomaly_map.shape
    down, across = height / rows, width / columns
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    found: list[tuple[Region, int, tuple[slice, ...]]] = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        window = np.where(labels[box] == label, anomaly_map[box], -np.inf)
        peak_row, peak_column = np.unravel_index(int(window.argmax()), window.shape)
        top, bottom = int(box[0].start * down), int(np.ceil(box[0].stop * down))
        left, right = int(box[1].start * across), int(np.ceil(box[1].stop * across))
        region = Region(
            x=left,
            y=top,
            width=min(right, width) - left,
            height=min(bottom, height) - top,
            area=float(areas[label] * down * across),
            peak=float(window.max()),
            peak_x=_centre(box[1].start + int(peak_column), across),
            peak_y=_centre(box[0].start + int(peak_row), down),
        )
        found.append((region, label, box))
    found.sort(key=lambda item: (-item[0].peak, item[0].y, item[0].x))
    return [
        replace(region, polygon=_polygon(labels[box] == label, box, down, across)) if rank < MAX_REGIONS else region
        for rank, (region, label, box) in enumerate(found)
    ]


def region_mask(anomaly_map: NDArray[np.float32], pixel_threshold: float, height: int, width: int) -> Mask:
    """Return the regions of a map `(h, w)` as a mask `(height, width)` of the image.

    A pixel of the image is set if the map's pixel at its centre lies above the threshold. Where the image has fewer
    pixels than the map, it is set if any of the map's pixels under it does: no region may vanish.
    """
    above = anomaly_map > pixel_threshold
    for axis, size in enumerate((height, width)):
        cells = above.shape[axis]
        if size >= cells:
            above = above.take(((2 * np.arange(size) + 1) * cells) // (2 * size), axis=axis)
        else:
            above = np.logical_or.reduceat(above, (np.arange(size) * cells) // size, axis=axis)
    return above


def find_peak(anomaly_map: NDArray[np.float32], height: int, width: int) -> tuple[float, int, int]:
    """Return a map's largest value and its place `(value, x, y)` in pixels of a `height` x `width` image."""
    row, column = np.unravel_index(int(anomaly_map.argmax()), anomaly_map.shape)
    rows, columns = anomaly_map.shape
    return float(anomaly_map.max()), _centre(int(column), width / columns), _centre(int(row), height / rows)


def _polygon(region: NDArray[np.bool_], box: tuple[slice, ...], down: float, across: float) -> tuple[Point, ...]:
    """Outline a region, given in its box of the map, in pixels of the image to two decimals."""
    corners = [((box[1].start + x) * across, (box[0].start + y) * down) for x, y in outline(region)]
    points = [(round(x, 2), round(y, 2)) for x, y in simplify(corners)]
    return (*points, points[0])


def _centre(index: int, scale: float) -> int:
    return int((index + 0.5) * scale)

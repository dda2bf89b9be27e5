"""From an anomaly map to places on the image: connected regions above the pixel threshold, and the peak."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage


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


def find_regions(anomaly_map: NDArray[np.float32], pixel_threshold: float, height: int, width: int) -> list[Region]:
    """Regions (8-connected) of a map `(S, S)` above the threshold, strongest first, scaled to `height` x `width`."""
    labels, count = ndimage.label(anomaly_map > pixel_threshold, structure=np.ones((3, 3)))
    if not count:
        return []
    rows, columns = anomaly_map.shape
    down, across = height / rows, width / columns
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    regions = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        window = np.where(labels[box] == label, anomaly_map[box], -np.inf)
        peak_row, peak_column = np.unravel_index(int(window.argmax()), window.shape)
        top, bottom = int(box[0].start * down), int(np.ceil(box[0].stop * down))
        left, right = int(box[1].start * across), int(np.ceil(box[1].stop * across))
        regions.append(
            Region(
                x=left,
                y=top,
                width=min(right, width) - left,
                height=min(bottom, height) - top,
                area=float(areas[label] * down * across),
                peak=float(window.max()),
                peak_x=_centre(box[1].start + int(peak_column), across),
                peak_y=_centre(box[0].start + int(peak_row), down),
            )
        )
    return sorted(regions, key=lambda region: (-region.peak, region.y, region.x))


def find_peak(anomaly_map: NDArray[np.float32], height: int, width: int) -> tuple[float, int, int]:
    """The map's largest value and its place `(value, x, y)` in pixels of a `height` x `width` image."""
    row, column = np.unravel_index(int(anomaly_map.argmax()), anomaly_map.shape)
    rows, columns = anomaly_map.shape
    return float(anomaly_map.max()), _centre(int(column), width / columns), _centre(int(row), height / rows)


def _centre(index: int, scale: float) -> int:
    return int((index + 0.5) * scale)

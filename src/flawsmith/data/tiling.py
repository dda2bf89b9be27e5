"""How an image comes before a network of fixed input size: resized to it as a whole, or cut into overlapping tiles.

The one place that resizes, pads, cuts and merges, for training, evaluation and inference alike. No torch here.

`scale` 0 resizes the whole image to `shape`. Any other scale resizes the image by that factor, the same in both
directions (the *working resolution*), pads what is smaller than a tile by reflection, and covers it with evenly spaced
square tiles that overlap by `overlap` pixels or more. Maps of tiles are merged with weights that fall linearly over
each overlap and are full at the image's own borders; the image's score is the highest of its tiles' scores.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.images import FloatImage, Mask, Shape, on_levels, resize_image, resize_mask
from flawsmith.sequences import batched

if TYPE_CHECKING:  # inference, which is served without it, needs no YAML
    from flawsmith.data.config import DataSettings

Run = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""A network: (B, 3, H, W) in [0, 1] → anomaly maps (B, H, W) and scores (B,)."""

Place = tuple[int, int]  # top and left of a tile in pixels of the padded working image
SHRINK = 4  # an image seen whole is told of if a side shrinks by more: a defect of 4 pixels has none left ...
STRETCH = 1.5  # ... or if its sides shrink so differently
BATCH = 8  # tiles that go through a network together: bounds the memory of one image of any size


@dataclass(frozen=True)
class Tiling:
    """The `shape` (height, width) of the network's input, the `scale` of the working resolution, the least `overlap` in
    pixels.

    Raises:
        ValueError: the overlap is negative or above half a tile, a tile is not square, or the scale is negative or not
            finite.
    """

    shape: Shape
    scale: float = 0.0
    overlap: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.scale < np.inf:
            raise ValueError(f"scale is {self.scale}; it must be 0 or more")
        if self.is_tiled and self.shape[0] != self.shape[1]:
            raise ValueError(f"the shape of a tile is {self.shape}; it must be square")
        if self.is_tiled and not 0 <= self.overlap <= self.size // 2:
            raise ValueError(f"the overlap is {self.overlap}; it must be from 0 to half a tile ({self.size // 2})")

    @classmethod
    def of(cls, data: "DataSettings") -> "Tiling":
        """The tiling that params.yaml asks for."""
        return cls(data.shape, data.scale, data.tile_overlap)

    @property
    def is_tiled(self) -> bool:
        """Whether images are cut into tiles rather than seen whole."""
        return self.scale > 0

    @property
    def size(self) -> int:
        """The side of a tile."""
        return self.shape[0]

    def working_shape(self, height: int, width: int) -> Shape:
        """The working resolution of an image, which is that of its anomaly map too."""
        if not self.is_tiled:
            return self.shape
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))

    def objection(self, height: int, width: int) -> str:
        """Say what an image of this size loses by being seen whole, and the scale to try; "" if little."""
        least, most = sorted((height / self.shape[0], width / self.shape[1]))  # by which its sides shrink
        if self.is_tiled or (most <= SHRINK and most <= STRETCH * least):
            return ""
        scale = min(1.0, max(1 / least, 1 / SHRINK))
        return (
            f"{width} x {height} pixels become {self.shape[1]} x {self.shape[0]}, so that defects below about "
            f"{max(4, round(4 * most))} pixels are lost; try data.scale {scale:.2g} (docs/tiles.md)."
        )

    def prepare(self, image: FloatImage) -> FloatImage:
        """An image `(3, H, W)` at its working resolution, on the 256 levels that training keeps."""
        resized = resize_image(image, self.working_shape(*image.shape[1:]))
        return image if resized is image else on_levels(resized)

    def prepare_mask(self, mask: Mask) -> Mask:
        """A mask `(H, W)` at the working resolution of its image."""
        return resize_mask(mask, self.working_shape(*mask.shape))

    def places(self, height: int, width: int) -> tuple[Place, ...]:
        """Places of the tiles of an image of this working resolution, row by row; they cover every pixel."""
        rows, columns = (self._starts(length) for length in (height, width))
        return tuple((int(top), int(left)) for top in rows for left in columns)

    def pad(self, prepared: FloatImage) -> FloatImage:
        """A prepared image, mirrored at its lower and right border where it is smaller than `shape`."""
        missing = [max(0, side - length) for side, length in zip(self.shape, prepared.shape[1:], strict=True)]
        if not any(missing):
            return prepared
        return np.pad(prepared, ((0, 0), (0, missing[0]), (0, missing[1])), mode="reflect")

    def cut(self, padded: FloatImage, place: Place) -> FloatImage:
        """The tile of a padded image at a place, a view `(3, size, size)`."""
        top, left = place
        return padded[:, top : top + self.size, left : left + self.size]

    def answer(
        self, run: Run, prepared: Sequence[FloatImage], batch: int = BATCH
    ) -> list[tuple[NDArray[np.float32], float]]:
        """The anomaly map, at working resolution, and the score of each prepared image `(3, h, w)`.

        Tiles go through `run` in batches, those of small images together, and are merged as they come: beside the
        images and their maps one batch is held. Without tiles all images are one batch.

        Args:
            run: the network.
            prepared: images at working resolution; of one size each unless tiled.
            batch: tiles a batch.
        """
        if not prepared:
            return []
        if not self.is_tiled:
            maps, scores = run(np.stack(prepared))
            return [(anomaly_map, float(score)) for anomaly_map, score in zip(maps, scores, strict=True)]
        merged = [np.zeros(image.shape[1:], np.float32) for image in prepared]
        highest = np.full(len(prepared), -np.inf)
        for part in batched(self._tiles(prepared), batch):
            maps, scores = run(np.stack([tile for _, _, tile in part]))
            for (index, place, _), anomaly_map, score in zip(part, maps, scores, strict=True):
                self._merge(merged[index], place, anomaly_map)
                highest[index] = max(highest[index], score)
        return [(anomaly_map, float(score)) for anomaly_map, score in zip(merged, highest, strict=True)]

    def weights(self, length: int) -> NDArray[np.float64]:
        """Weight of each tile along one side of a working image at each of its own pixels, `(tiles, size)`.

        At every pixel of the image the tiles' weights sum to 1; a pixel of one tile alone has 1.
        """
        return _weights(tuple(int(start) for start in self._starts(length)), self.size)

    def _starts(self, length: int) -> NDArray[np.int64]:
        """First pixels of the tiles along one side: as few as overlap enough, evenly spaced, ending at the border."""
        beyond = max(0, length - self.size)
        count = 1 + -(-beyond // (self.size - self.overlap))
        return np.linspace(0, beyond, count).round().astype(np.int64)

    def _tiles(self, prepared: Sequence[FloatImage]) -> Iterator[tuple[int, Place, FloatImage]]:
        for index, image in enumerate(prepared):
            padded = self.pad(image)
            for place in self.places(*image.shape[1:]):
                yield index, place, self.cut(padded, place)

    def _merge(self, merged: NDArray[np.float32], place: Place, anomaly_map: NDArray[np.float32]) -> None:
        """Add a tile's map to that of its image, in place; what was padded is left out."""
        sides = []
        for length, start in zip(merged.shape, place, strict=True):
            row = int(np.searchsorted(self._starts(length), start))
            sides.append(self.weights(length)[row, : min(self.size, length - start)])
        height, width = (len(side) for side in sides)
        weight = (sides[0][:, None] * sides[1][None, :]).astype(np.float32)
        window = merged[place[0] : place[0] + height, place[1] : place[1] + width]
        window += weight * anomaly_map[:height, :width]


@lru_cache(maxsize=32)
def _weights(starts: tuple[int, ...], size: int) -> NDArray[np.float64]:
    """Linear ramps over the overlap with each neighbour, brought to sum 1 where more than two tiles meet."""
    inside = np.arange(size, dtype=np.float64)
    raw = np.ones((len(starts), size))
    for index, start in enumerate(starts):
        if index:
            overlap = starts[index - 1] + size - start
            raw[index] = np.minimum(raw[index], (inside + 1) / (overlap + 1))
        if index + 1 < len(starts):
            overlap = start + size - starts[index + 1]
            raw[index] = np.minimum(raw[index], (size - inside) / (overlap + 1))
    total = np.zeros(starts[-1] + size)
    for row, start in zip(raw, starts, strict=True):
        total[start : start + size] += row
    weights = np.stack([row / total[start : start + size] for row, start in zip(raw, starts, strict=True)])
    weights.setflags(write=False)
    return weights

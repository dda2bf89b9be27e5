"""Windows around real and synthetic defects, and of normals beside them, for `evaluation.fidelity`.

A crop is a square window of fixed side around a defect, by the same law for real and synthetic ones, at working
resolution.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from flawsmith.data.dataset import Split, load_prepared
from flawsmith.data.images import FloatImage, Mask, resize_image, resize_mask
from flawsmith.data.tiling import Tiling
from flawsmith.data.triplets import TripletFolder
from flawsmith.evaluation.metrics import EIGHT_NEIGHBOURS
from flawsmith.evaluation.scoring import Item
from flawsmith.settings import DataSettings

WINDOW = 64  # pixels; at 256 px a sixteenth of the image, and four cells of the teacher's coarsest level
MAX_CROPS = 200  # of each kind: bounds the cost to that of 50 whole images


def gather_crops(
    defective: Sequence[Item],
    triplets: TripletFolder,
    ids: Sequence[str],
    split: Split,
    data: DataSettings,
    generator: np.random.Generator,
) -> Mapping[str, Sequence[FloatImage]]:
    """Up to MAX_CROPS crops `(3, WINDOW, WINDOW)` of each kind.

    Args:
        defective: real defects with their masks.
        triplets: where those named `ids` lie.
        split: the normals: crops to compare come from calibration, those for the scale from the fit part.
        data: how images are brought to working resolution.
        generator: draws images and the places of normals.

    Returns:
        `real` and `synthetic` defects, the synthetic ones' places `before` the defect was put in, `normal` and `basis`
        places of normals.
    """
    tiling = Tiling.of(data)

    def normals(paths: Sequence[Path]) -> list[FloatImage]:
        crops = []
        for number in range(MAX_CROPS):  # several places of an image where there are few images
            image = tiling.pad(load_prepared(paths[number % len(paths)], data))
            crops.append(crop(image, random_place(image, generator)))
        return crops

    crops: dict[str, list[FloatImage]] = {"real": [], "synthetic": [], "before": []}
    for index in pick(len(defective), generator):
        image, mask = defective[index].load()
        crops["real"].append(crop(tiling.pad(image), defect_place(mask)))
    for index in pick(len(ids), generator):
        normal, defect, mask = triplets.read(ids[index])
        place = defect_place(resize_mask(mask, data.image_size))
        for name, image in (("synthetic", defect), ("before", normal)):
            crops[name].append(crop(resize_image(image, data.image_size), place))
    return crops | {"normal": normals(split.calibration), "basis": normals(split.fit)}


def defect_place(mask: Mask) -> tuple[int, int]:
    """Where to put a window: the pixel (row, column) of the largest region nearest to its centroid."""
    labels, _ = ndimage.label(mask, EIGHT_NEIGHBOURS)
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    pixels = np.argwhere(labels == largest)
    row, column = pixels[np.argmin(((pixels - pixels.mean(axis=0)) ** 2).sum(axis=1))]
    return int(row), int(column)


def random_place(image: FloatImage, generator: np.random.Generator) -> tuple[int, int]:
    """Row and column of the centre of a window drawn evenly among those inside the image."""
    row, column = (WINDOW // 2 + int(generator.integers(0, side - WINDOW + 1)) for side in image.shape[1:])
    return row, column


def crop(image: FloatImage, place: tuple[int, int]) -> FloatImage:
    """The window `(3, WINDOW, WINDOW)` around a place, pushed inside the image `(3, H, W)` where it would stick out."""
    top, left = (
        min(max(centre - WINDOW // 2, 0), side - WINDOW) for centre, side in zip(place, image.shape[1:], strict=True)
    )
    return image[:, top : top + WINDOW, left : left + WINDOW].copy()  # a view would keep the whole image in memory


def pick(count: int, generator: np.random.Generator) -> Sequence[int]:
    """Sorted indices of up to MAX_CROPS of `count` things, drawn without replacement."""
    return [int(index) for index in np.sort(generator.permutation(count)[:MAX_CROPS])]

"""One streaming pass of detectors over images: a batch in memory, anomaly maps spooled to disk.

Memory does not grow with the number of images: `python tests/evaluation/synthetic.py` measures it.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.dataset import GOOD, LabelledImage, load_labelled, normal_name
from flawsmith.data.images import FloatImage, Mask, Reading, resize_image, resize_mask
from flawsmith.data.tiling import Run, Tiling
from flawsmith.data.triplets import VALIDATION, TripletFolder
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.progress import bar

if TYPE_CHECKING:
    import torch
    from torch import nn

Scorer = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""(B, 3, H, W) in [0, 1] → anomaly maps (B, h, w) of the masks' size and scores (B,), higher = more anomalous."""

HELD_PIXELS = 2**24  # a batch is closed early when its images reach this (200 MB as floats)
SYNTHETIC = "synthetic"  # the defect type of held-out triplets


@dataclass(frozen=True)
class Item:
    """One image to score: its name for people, its defect type ("good" for a normal one), and how to load it."""

    name: str
    defect: str
    load: Callable[[], tuple[FloatImage, Mask]]
    has_pixel_labels: bool = True  # False: nobody has drawn its mask, which is empty

    @property
    def is_defective(self) -> bool:
        return self.defect != GOOD


def labelled_items(
    images: Sequence[LabelledImage], tiling: Tiling, reading: Reading, original: bool = False
) -> tuple[Item, ...]:
    """The labelled test set at working resolution, or the images as they are (`original`); nothing is read yet."""
    return tuple(
        Item(
            image.shown_name,
            image.defect,
            partial(load_labelled, image, tiling, reading, original),
            image.has_pixel_labels,
        )
        for image in images
    )


def normal_items(paths: Sequence[Path], tiling: Tiling, reading: Reading, original: bool = False) -> tuple[Item, ...]:
    """Normal images (calibration) with empty masks, as `labelled_items` gives them; nothing is read yet."""
    images = (LabelledImage(path, GOOD, None) for path in paths)
    return tuple(
        Item(normal_name(image.path), GOOD, partial(load_labelled, image, tiling, reading, original))
        for image in images
    )


def triplet_items(triplets: TripletFolder, sources: Mapping[str, str], size: int) -> tuple[Item, ...]:
    """Held-out triplets as a test set: each defect image with its mask, and each distinct normal once, as good. Shades
    do not belong among them (`triplets.is_illumination_defect`).

    Args:
        triplets: what the synthesize stage wrote.
        sources: triplet id → name of what its normal is, of the triplets to score.
        size: side of the model's input in pixels.

    Raises:
        UserError: there is no triplet.
    """
    if not sources:
        raise UserError(
            f"{triplets.folder} holds no held-out (`{VALIDATION}-`) triplets but shades, and there is no labelled test "
            "set, so nothing can be scored; raise synthesize.validation_fraction or synthesize.triplets, or lower "
            "synthesize.shade_share."
        )

    def normal(identity: str) -> tuple[FloatImage, Mask]:
        return resize_image(triplets.read(identity)[0], size), np.zeros((size, size), np.bool_)

    first_of_source = {source: identity for identity, source in sorted(sources.items(), reverse=True)}
    return (
        *(
            Item(f"normal/{identity}.png", GOOD, partial(normal, identity))
            for identity in sorted(first_of_source.values())
        ),
        *defect_items(triplets, sources, size),
    )


def defect_items(triplets: TripletFolder, ids: Iterable[str], size: int) -> tuple[Item, ...]:
    """The defect images of triplets, with their masks."""

    def defect(identity: str) -> tuple[FloatImage, Mask]:
        _, image, mask = triplets.read(identity)
        return resize_image(image, size), resize_mask(mask, size)

    return tuple(Item(f"defect/{identity}.png", SYNTHETIC, partial(defect, identity)) for identity in sorted(ids))


def tiled_scorer(run: Run, tiling: Tiling) -> Scorer:
    """A network for one input size as a `Scorer` of images at working resolution."""

    def score(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        answers = tiling.answer(run, list(images))
        return np.stack([anomaly_map for anomaly_map, _ in answers]), np.asarray([s for _, s in answers], np.float32)

    return score if tiling.is_tiled else run


def torch_scorer(detector: "nn.Module", place: "torch.device") -> Scorer:
    """A detector module as a `Scorer`, in float32 (as exported) on a device."""
    import torch

    module = detector.to(place).eval()

    def score(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            maps, scores = module(torch.from_numpy(images).to(place))  # (B, 1, H, W), (B,)
        return maps[:, 0].float().cpu().numpy(), scores.float().cpu().numpy()

    return score


class Spool:
    """Arrays of one type and any shapes on disk in a temporary file; reading one costs its own size in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._dtype: np.dtype[np.generic] = np.dtype(np.float32)
        self._places: list[tuple[int, tuple[int, ...]]] = []  # of each array: its first byte and its shape
        self._end = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def elements(self) -> int:
        """How many numbers all arrays hold."""
        return self._end // self._dtype.itemsize

    def append(self, array: NDArray[np.generic]) -> None:
        """Add one array; the first one sets the type."""
        if not self._places:
            self._dtype = array.dtype
        if array.dtype != self._dtype:
            raise ValueError(f"array is {array.dtype}, the spool holds {self._dtype}")
        self._file.seek(self._end)
        self._file.write(np.ascontiguousarray(array).tobytes())
        self._places.append((self._end, array.shape))
        self._end += array.nbytes

    def read(self, index: int) -> NDArray[np.generic]:
        """The array at `index`, a copy."""
        first, shape = self._places[index]
        self._file.seek(first)
        return np.frombuffer(self._file.read(math.prod(shape) * self._dtype.itemsize), self._dtype).reshape(shape)


@contextmanager
def open_spools(count: int) -> Iterator[tuple[Spool, ...]]:
    """`count` empty spools in unnamed temporary files (in TMPDIR), gone when the block ends."""
    with ExitStack() as stack:
        yield tuple(Spool(cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))) for _ in range(count))


@dataclass(frozen=True)
class Scores:
    """What one detector said of N images: `scores` and the highest and median map value of each, `(N,)` float32."""

    scores: NDArray[np.float32]
    peaks: NDArray[np.float32]
    medians: NDArray[np.float32]


def score_items(
    scorers: Sequence[Scorer],
    items: Sequence[Item],
    batch: int,
    maps: Sequence[Spool] = (),
    masks: Spool | None = None,
    title: str = "scoring",
) -> tuple[Scores, ...]:
    """Score every item with every scorer, each image read once; optionally spool its maps and its mask.

    Neighbours of one size are scored together, at most `batch` of them and HELD_PIXELS pixels.

    Raises:
        FlawsmithError: a detector answered NaN, or maps or scores of the wrong shape.
    """
    rows: list[list[tuple[np.float32, ...]]] = [[] for _ in scorers]
    with bar(what=title, total=len(items), unit="image") as progress:
        for loaded in _batches(items, batch):
            images = loaded[0].image[None] if len(loaded) == 1 else np.stack([one.image for one in loaded])
            if masks is not None:
                for one in loaded:
                    masks.append(one.mask)
            for index, scorer in enumerate(scorers):
                batch_maps, batch_scores = _checked(scorer(images), images, loaded)
                for anomaly_map, score in zip(batch_maps, batch_scores, strict=True):
                    rows[index].append((score, anomaly_map.max(), np.median(anomaly_map)))
                    if maps:
                        maps[index].append(anomaly_map)
            progress.update(len(loaded))
    return tuple(Scores(*np.asarray(found, np.float32).reshape(-1, 3).T) for found in rows)


class _Loaded(NamedTuple):
    name: str
    image: FloatImage
    mask: Mask


def _batches(items: Sequence[Item], count: int) -> Iterator[list[_Loaded]]:
    """Loaded items in order, in groups of equal sizes that can be stacked."""
    part: list[_Loaded] = []
    for item in items:
        loaded = _Loaded(item.name, *item.load())
        height, width = loaded.image.shape[1:]
        fits = len(part) < count and (len(part) + 1) * height * width <= HELD_PIXELS
        if part and not (
            fits and loaded.image.shape == part[0].image.shape and loaded.mask.shape == part[0].mask.shape
        ):
            yield part
            part = []
        part.append(loaded)
    if part:
        yield part


def _checked(
    answer: tuple[NDArray[np.float32], NDArray[np.float32]], images: NDArray[np.float32], loaded: Sequence[_Loaded]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    maps, scores = (np.asarray(part, np.float32) for part in answer)
    if maps.shape != (len(images), *loaded[0].mask.shape) or scores.shape != (len(images),):
        raise FlawsmithError(
            f"The detector answered maps {maps.shape} and scores {scores.shape} to images {images.shape}; it needs one "
            "map of the image's size and one score for each image."
        )
    bad = ~(np.isfinite(maps).all(axis=(1, 2)) & np.isfinite(scores))
    if bad.any():
        name = loaded[int(np.argmax(bad))].name
        raise FlawsmithError(f"The detector answered NaN or infinity for {name}; train it again (`flawsmith distill`).")
    return maps, scores

"""One streaming pass of detectors over images: a batch in memory, anomaly maps spooled to disk.

Memory does not grow with the number of images: `python -m flawsmith.evaluation.memory` measures it.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.evaluation.intervals import blocks
from flawsmith.images import FloatImage, Mask, resize_image, resize_mask
from flawsmith.inference.network import Network
from flawsmith.surfaces import GOOD, LabelledImage, load_image, load_labelled
from flawsmith.triplets import VALIDATION, TripletFolder

if TYPE_CHECKING:
    from torch import nn

Scorer = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""(B, 3, H, W) in [0, 1] → anomaly maps (B, H, W) and scores (B,), higher = more anomalous."""

SYNTHETIC = "synthetic"  # the defect type of held-out triplets


@dataclass(frozen=True)
class Item:
    """One image to score: its name for people, its defect type ("good" for a normal one), and how to load it."""

    name: str
    defect: str
    load: Callable[[], tuple[FloatImage, Mask]]

    @property
    def is_defective(self) -> bool:
        return self.defect != GOOD


def labelled_items(images: Sequence[LabelledImage], size: int, max_pixels: int) -> tuple[Item, ...]:
    """The labelled test set at the model's size; nothing is read yet."""
    return tuple(
        Item(f"{image.defect}/{image.path.name}", image.defect, partial(load_labelled, image, size, max_pixels))
        for image in images
    )


def normal_items(paths: Sequence[Path], size: int, max_pixels: int) -> tuple[Item, ...]:
    """Normal images (calibration) at the model's size, with empty masks; nothing is read yet."""

    def load(path: Path) -> tuple[FloatImage, Mask]:
        return load_image(path, size, max_pixels), np.zeros((size, size), np.bool_)

    return tuple(Item(path.name, GOOD, partial(load, path)) for path in paths)


def triplet_items(triplets: TripletFolder, sources: Mapping[str, str], size: int) -> tuple[Item, ...]:
    """Held-out triplets as a test set: each defect image with its mask, and each distinct normal once, as good.

    Args:
        triplets: what the synthesize stage wrote.
        sources: triplet id → file name of its normal image, of the triplets to score.
        size: side of the model's input in pixels.

    Raises:
        UserError: there is no triplet.
    """
    if not sources:
        raise UserError(
            f"{triplets.folder} holds no held-out (`{VALIDATION}-`) triplets and there is no labelled test set, so "
            "nothing can be scored; raise synthesize.validation_fraction or synthesize.triplets."
        )

    def normal(identity: str) -> tuple[FloatImage, Mask]:
        return resize_image(triplets.read(identity)[0], size), np.zeros((size, size), np.bool_)

    def defect(identity: str) -> tuple[FloatImage, Mask]:
        _, image, mask = triplets.read(identity)
        return resize_image(image, size), resize_mask(mask, size)

    first_of_source = {source: identity for identity, source in sorted(sources.items(), reverse=True)}
    return (
        *(
            Item(f"normal/{identity}.png", GOOD, partial(normal, identity))
            for identity in sorted(first_of_source.values())
        ),
        *(Item(f"defect/{identity}.png", SYNTHETIC, partial(defect, identity)) for identity in sorted(sources)),
    )


def network_scorer(network: Network) -> Scorer:
    """An exported network as a `Scorer`, for images of its input's size."""
    return network.run


def torch_scorer(detector: "nn.Module", device: str | None = None) -> Scorer:
    """A detector module as a `Scorer`, in float32 (as exported) on `device`, by default the GPU where there is one."""
    import torch

    from flawsmith.devices import best_device

    place = torch.device(device) if device else best_device()
    module = detector.to(place).eval()

    def score(images: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            maps, scores = module(torch.from_numpy(images).to(place))  # (B, 1, H, W), (B,)
        return maps[:, 0].float().cpu().numpy(), scores.float().cpu().numpy()

    return score


class Spool:
    """Arrays of one shape on disk in a temporary file; reading one costs its own size in memory."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._shape: tuple[int, ...] = ()
        self._dtype: np.dtype[np.generic] = np.dtype(np.float32)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, array: NDArray[np.generic]) -> None:
        """Add one array; the first one sets shape and type."""
        if not self._count:
            self._shape, self._dtype = array.shape, array.dtype
        if array.shape != self._shape or array.dtype != self._dtype:
            raise ValueError(f"array is {array.dtype}{array.shape}, the spool holds {self._dtype}{self._shape}")
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(array).tobytes())
        self._count += 1

    def read(self, index: int) -> NDArray[np.generic]:
        """The array at `index`, a copy."""
        size = int(np.prod(self._shape)) * self._dtype.itemsize
        self._file.seek(index * size)
        return np.frombuffer(self._file.read(size), self._dtype).reshape(self._shape)


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

    Raises:
        FlawsmithError: a detector answered NaN, or maps or scores of the wrong shape.
    """
    rows: list[list[tuple[np.float32, ...]]] = [[] for _ in scorers]
    with tqdm(total=len(items), desc=title, unit="image", disable=None) as progress:
        for part in blocks(len(items), batch):
            loaded = [item.load() for item in items[part]]
            images = np.stack([image for image, _ in loaded])  # (B, 3, H, W)
            if masks is not None:
                for _, mask in loaded:
                    masks.append(mask)
            for index, scorer in enumerate(scorers):
                batch_maps, batch_scores = _checked(scorer(images), images, items[part])
                for anomaly_map, score in zip(batch_maps, batch_scores, strict=True):
                    rows[index].append((score, anomaly_map.max(), np.median(anomaly_map)))
                    if maps:
                        maps[index].append(anomaly_map)
            progress.update(len(loaded))
    return tuple(Scores(*np.asarray(found, np.float32).reshape(-1, 3).T) for found in rows)


def _checked(
    answer: tuple[NDArray[np.float32], NDArray[np.float32]], images: NDArray[np.float32], items: Sequence[Item]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    maps, scores = (np.asarray(part, np.float32) for part in answer)
    if maps.shape != (len(images), *images.shape[2:]) or scores.shape != (len(images),):
        raise FlawsmithError(
            f"The detector answered maps {maps.shape} and scores {scores.shape} to images {images.shape}; it needs one "
            "map of the image's size and one score for each image."
        )
    bad = ~(np.isfinite(maps).all(axis=(1, 2)) & np.isfinite(scores))
    if bad.any():
        name = items[int(np.argmax(bad))].name
        raise FlawsmithError(f"The detector answered NaN or infinity for {name}; train it again (`flawsmith distill`).")
    return maps, scores

"""One streaming pass of detectors over images: a batch in memory, anomaly maps in files on disk.

Memory does not grow with the number of images.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from flawsmith.data.images import FloatImage, Mask
from flawsmith.data.tiling import Run, Tiling
from flawsmith.errors import FlawsmithError
from flawsmith.evaluation.samples import Sample
from flawsmith.progress import bar

if TYPE_CHECKING:
    import torch
    from torch import nn

Scorer = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""(B, 3, H, W) in [0, 1] → anomaly maps (B, h, w) of the masks' size and scores (B,), higher = more anomalous."""

HELD_PIXELS = 2**24  # a batch is closed early when its images reach this (200 MB as floats)


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


class ArrayFile:
    """Arrays of any shapes in one file; reading one costs its own size in memory.

    A memory map would need them all of one shape, but a test set's images may differ in size.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._starts: list[int] = []  # first byte of each array

    def __len__(self) -> int:
        return len(self._starts)

    def append(self, array: NDArray[Any]) -> None:
        """Add one array."""
        self._starts.append(self._file.seek(0, os.SEEK_END))
        np.save(self._file, array, allow_pickle=False)

    def read(self, index: int) -> NDArray[Any]:
        """The array at `index`, a copy."""
        self._file.seek(self._starts[index])
        array: NDArray[Any] = np.load(self._file, allow_pickle=False)
        return array


@contextmanager
def array_files(count: int) -> Iterator[tuple[ArrayFile, ...]]:
    """`count` empty array files, unnamed and temporary (in TMPDIR), gone when the block ends."""
    with ExitStack() as stack:
        yield tuple(ArrayFile(cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))) for _ in range(count))


@dataclass(frozen=True)
class Scores:
    """What one detector said of N images: `scores` and the highest and median map value of each, `(N,)` float32."""

    scores: NDArray[np.float32]
    peaks: NDArray[np.float32]
    medians: NDArray[np.float32]


def score_samples(
    scorers: Sequence[Scorer],
    samples: Sequence[Sample],
    batch: int,
    maps: Sequence[ArrayFile] = (),
    masks: ArrayFile | None = None,
    title: str = "scoring",
) -> tuple[Scores, ...]:
    """Score every sample with every scorer, each image read once; keep maps and masks in files if some are given.

    Neighbours of one size are scored together, at most `batch` of them and HELD_PIXELS pixels.

    Raises:
        FlawsmithError: a detector answered NaN, or maps or scores of the wrong shape.
    """
    rows: list[list[tuple[np.float32, ...]]] = [[] for _ in scorers]
    with bar(what=title, total=len(samples), unit="image") as progress:
        for loaded in _batches(samples, batch):
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


def _batches(samples: Sequence[Sample], count: int) -> Iterator[list[_Loaded]]:
    """Loaded samples in order, in groups of equal sizes that can be stacked."""
    part: list[_Loaded] = []
    for sample in samples:
        loaded = _Loaded(sample.name, *sample.load())
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

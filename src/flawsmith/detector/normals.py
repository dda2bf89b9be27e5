"""The normal images that the memory bank may hold, and what is asked of them before training.

No image may recognise itself. The sources of validation triplets are no part of the memory bank, since `evaluate`
scores these triplets where there is no labelled test set. The sources of training triplets are, so each is left out for
its own triplets: `image_ids` and `source_ids` say which patches those are.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawsmith.data.config import DataSettings
from flawsmith.data.dataset import Split, Tile, iter_tiles, normal_name, plan_tiles
from flawsmith.data.images import to_uint8
from flawsmith.data.triplets import VALIDATION, TripletFolder, is_illumination_defect, read_manifest
from flawsmith.detector.augmentation import (
    AUTO,
    SAMPLE,
    augmentation_distances,
    choose_augmentation,
    fits,
    images_asked,
    transformed,
)
from flawsmith.detector.batches import TripletSources
from flawsmith.detector.config import DistillSettings
from flawsmith.detector.memory import as_patches
from flawsmith.detector.model import Detector, remember
from flawsmith.detector.teacher import Teacher, as_batch
from flawsmith.errors import UserError
from flawsmith.progress import bar
from flawsmith.sequences import batched, evenly

BATCH = 8  # images that the teacher sees at once
NO_TWINS: Mapping[str, str] = MappingProxyType({})
ManifestRows = Mapping[str, Mapping[str, Any]]  # by triplet id


@dataclass(frozen=True)
class Normals:
    """The images that the memory bank may hold.

    Attributes:
        twins: as `Split.twins`.
    """

    images: Sequence[Path]
    data: DataSettings
    twins: Mapping[str, str]

    @cached_property
    def tiles(self) -> list[Tile]:
        """All tiles of the images, in their order."""
        return list(plan_tiles(self.images, self.data))

    @cached_property
    def sample(self) -> list[Tile]:
        """One tile each of some images, evenly spread: tiles of one image resemble each other too much.

        The tile is the first of the first image, the second of the second, and so on.
        """
        of_image: dict[Path, list[Tile]] = {}
        for tile in self.tiles:
            of_image.setdefault(tile.path, []).append(tile)
        one_each = [group[index % len(group)] for index, group in enumerate(of_image.values())]
        return [one_each[index] for index in evenly(len(one_each), SAMPLE)]

    @cached_property
    def sample_pixels(self) -> NDArray[np.uint8]:
        """The sample's pixels (N, 3, S, S)."""
        return np.stack(list(pixels(self.sample, self.data)))

    def augmented(self, elements: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield every tile (3, S, S) under each element of an augmentation."""
        return (transformed(image, element) for image in pixels(self.tiles, self.data) for element in elements)


def find_augmentation(normals: Normals, teacher: Teacher, settings: DistillSettings) -> tuple[str, dict[str, float]]:
    """The name of the augmentation that is set, or that the normals show, and the distances that decided.

    Raises:
        UserError: what is set does not fit the images.
    """
    if settings.symmetry != AUTO:
        height, width = normals.data.shape
        if not fits(settings.symmetry, (height, width)):
            raise UserError(
                f"`distill.symmetry` is {settings.symmetry}, but images of {width} x {height} pixels have no quarter "
                "turns; set rot180, flips or none, or data.aspect to 1."
            )
        return settings.symmetry, {}
    distances: dict[str, float] = {}
    if settings.memory:
        share = len(normals.sample) / len(normals.tiles)
        with bar(what="distill augmentation", total=images_asked(len(normals.sample)), unit="image") as progress:
            distances = augmentation_distances(
                lambda images: _patches(teacher, images, progress.update),
                normals.sample_pixels,
                settings.memory,
                settings.memory_dimensions,
                share,
            )
    return choose_augmentation(distances), distances


def fill_memory(detector: Detector, normals: Normals, elements: Sequence[int]) -> Tensor | None:
    """Fill the memory bank with all normals under each element, and set its norm power.

    Returns:
        (M,) the index in `normals.images` behind each patch; None without a memory bank.
    """
    device = detector.teacher.mean.device
    count = len(normals.tiles) * len(elements)
    shown = bar(normals.augmented(elements), "distill memory", count, "image")
    kept = remember(detector, tensor_batches(shown, device), count)
    if kept is None or detector.memory is None:
        return None
    source_ids = image_ids(normals.tiles, normals.images, normals.twins)[kept.cpu() // len(elements)]
    own = ((source_ids == image).to(device) for image in image_ids(normals.sample, normals.images, normals.twins))
    sample = bar(normals.sample_pixels, "distill norm power", unit="image")
    detector.memory.fit_norm_power(
        (_patches(detector.teacher, image[None]), excluded) for image, excluded in zip(sample, own, strict=True)
    )
    return source_ids


def tensor_batches(images: Iterable[NDArray[np.uint8]], device: torch.device) -> Iterator[Tensor]:
    """Yield images (3, S, S) in batches (B, 3, S, S) in [0, 1]."""
    return (as_batch(np.stack(group), device) for group in batched(images, BATCH))


def pixels(tiles: Sequence[Tile], data: DataSettings) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels (3, S, S) of each tile."""
    return (to_uint8(tile).transpose(2, 0, 1) for tile in iter_tiles(tiles, data))


def _patches(
    teacher: Teacher, images: NDArray[np.uint8], on_batch: Callable[[int], Any] = lambda count: None
) -> Tensor:
    """What the memory bank compares, of images (N, 3, S, S)."""
    found = []
    with torch.no_grad():
        for batch in tensor_batches(images, teacher.mean.device):
            found.append(as_patches(teacher(batch)[-1]))
            on_batch(len(batch))
    return torch.cat(found)


def manifest_rows(folder: TripletFolder, normals: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Triplet id → its row of the manifest.

    Raises:
        UserError: a triplet was made from an image that is no fit normal now.
    """
    rows = read_manifest(folder.folder / "manifest.parquet").to_pylist()
    strangers = sorted({row["source"] for row in rows} - {normal_name(path) for path in normals})
    if strangers:
        raise UserError(
            f"{folder.folder} was made from {strangers[0]}, which is no normal image for training now; run "
            "`flawsmith synthesize` again."
        )
    return {row["triplet_id"]: row for row in rows}


def remembered_normals(split: Split, rows: ManifestRows) -> list[Path]:
    """The fit normals without the sources of validation triplets and their copies."""
    return split.fit_without({row["source"] for row in rows.values() if row["role"] == VALIDATION})


def image_ids(tiles: Sequence[Tile], images: Sequence[Path], twins: Mapping[str, str] = NO_TWINS) -> Tensor:
    """(N,) the index in `images` of each tile's image; copies of a picture share the index of the first."""
    first = _first_index(images, twins)
    return torch.tensor([first[normal_name(tile.path)] for tile in tiles])


def triplet_sources(
    normals: Sequence[Path], rows: ManifestRows, ids: Sequence[str], twins: Mapping[str, str] = NO_TWINS
) -> TripletSources:
    """The sources of the triplets `ids` as indices in `normals` (-1 if none of them), and which triplets are textured.

    If all are illumination defects, all count as textured.
    """
    first = _first_index(normals, twins)
    sources = np.array([first.get(rows[one]["source"], -1) for one in ids], np.int64)
    textured = [index for index, one in enumerate(ids) if not is_illumination_defect(rows[one])]
    return TripletSources(sources, np.array(textured or range(len(ids)), np.int64))


def _first_index(images: Sequence[Path], twins: Mapping[str, str]) -> dict[str, int]:
    """Name → index in `images` of the first copy of its picture."""
    first: dict[str, int] = {}
    names = [normal_name(path) for path in images]
    return {name: first.setdefault(twins.get(name, name), index) for index, name in enumerate(names)}

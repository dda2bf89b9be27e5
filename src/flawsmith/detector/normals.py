"""The normal images that the memories may hold.

No image may recognise itself. The sources of validation triplets are no part of the memories, since `evaluate` scores
these triplets where there is no labelled test set. The sources of training triplets are, so each is left out for its
own triplets: `image_ids` and `source_ids` say which patches those are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from flawsmith.detector.batches import TripletSources
from flawsmith.detector.config import DistillSettings
from flawsmith.detector.memory import MEMORIES, rows_of
from flawsmith.detector.model import Detector
from flawsmith.detector.teacher import Teacher, as_batch
from flawsmith.errors import UserError
from flawsmith.progress import bar
from flawsmith.randomness import torch_generator
from flawsmith.sequences import batched, evenly

BATCH = 8  # images that the teacher sees at once
SAMPLE = 96  # normal images that are enough to tell what is normal at each patch
NO_TWINS: Mapping[str, str] = MappingProxyType({})
ManifestRows = Mapping[str, Mapping[str, Any]]  # by triplet id


@dataclass(frozen=True)
class Normals:
    """The images that the memories may hold.

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


def memory_sizes(settings: DistillSettings, teacher: Teacher, images: int, shape: tuple[int, int]) -> tuple[int, ...]:
    """How many patches each of MEMORIES keeps of `images` of a shape: `settings.memory`, or all that there are."""
    if not settings.memory:
        return ()
    counts = (images * kind.count(teacher, shape) for kind in MEMORIES.values())
    return tuple(min(settings.memory, settings.memory_candidates, count) for count in counts)


@torch.no_grad()
def fill_memories(detector: Detector, normals: Normals, settings: DistillSettings) -> dict[str, Tensor]:
    """Fill the memories with patches of all normals, and set what is normal at each.

    Returns:
        memory → (M,) the index in `normals.images` behind each of its patches.
    """
    if not detector.memories:
        return {}
    ids, device = image_ids(normals.tiles, normals.images, normals.twins), detector.teacher.mean.device
    candidates = _candidates(detector, normals, settings)
    source_ids = {}
    for name, memory in detector.banks.items():
        rows, tiles = candidates[name]
        with bar(what=f"distill {name}", total=len(memory.patches), unit="patch") as progress:
            kept = memory.fill(rows, torch_generator(settings.seed, name), progress.update)
        source_ids[name] = ids[tiles[kept.cpu()]].to(device)
    tallies = {name: torch.zeros(2, len(bank.patches), device=device) for name, bank in detector.banks.items()}
    shown = bar(normals.sample_pixels, "distill what the memories allow", unit="image")
    sample = image_ids(normals.sample, normals.images, normals.twins).to(device)
    for batch, own in zip(tensor_batches(shown, device), sample.split(BATCH), strict=True):
        features = detector.teacher(batch)
        for name, bank in detector.banks.items():
            tallies[name] += bank.tally(MEMORIES[name].patches(features), source_ids[name] == own[:, None])
    for name, bank in detector.banks.items():
        bank.allow(tallies[name])
    return source_ids


def _candidates(detector: Detector, normals: Normals, settings: DistillSettings) -> dict[str, tuple[Tensor, Tensor]]:
    """Memory → patches (N, C) drawn at random over all tiles, and the tile of each (N,)."""
    teacher, tiles = detector.teacher, normals.tiles
    counts = {name: MEMORIES[name].count(teacher, normals.data.shape) for name in detector.memories}
    drawn = {}
    for name, count in counts.items():
        order = torch.randperm(count * len(tiles), generator=torch_generator(settings.seed, "cells", name))
        drawn[name] = order[: settings.memory_candidates].sort().values
    found: dict[str, list[Tensor]] = {name: [] for name in counts}
    shown = bar(pixels(tiles, normals.data), "distill memory", len(tiles), "image")
    for index, batch in enumerate(tensor_batches(shown, teacher.mean.device)):
        features = teacher(batch)
        for name, parts in found.items():
            rows, first = rows_of(MEMORIES[name].patches(features)), index * BATCH * counts[name]
            here = drawn[name][(drawn[name] >= first) & (drawn[name] < first + len(rows))]
            parts.append(rows[(here - first).to(rows.device)])
    return {name: (torch.cat(parts), drawn[name] // counts[name]) for name, parts in found.items()}


def tensor_batches(images: Iterable[NDArray[np.uint8]], device: torch.device) -> Iterator[Tensor]:
    """Yield images (3, S, S) in batches (B, 3, S, S) in [0, 1]."""
    return (as_batch(np.stack(group), device) for group in batched(images, BATCH))


def pixels(tiles: Sequence[Tile], data: DataSettings) -> Iterator[NDArray[np.uint8]]:
    """Yield the pixels (3, S, S) of each tile."""
    return (to_uint8(tile).transpose(2, 0, 1) for tile in iter_tiles(tiles, data))


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

"""Stage distill: triplets that passed the gate + calibration normals → a trained, calibrated detector."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
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
from flawsmith.data.triplets import FIT, VALIDATION, TripletArrays, TripletFolder, is_illumination_defect, read_manifest
from flawsmith.detector.config import DistillSettings
from flawsmith.detector.distill import LOSS_COLUMNS, Origins, Provenance, as_batch, distill
from flawsmith.detector.memory import as_places, memory_size
from flawsmith.detector.model import Detector, DetectorConfig, remember, save_detector
from flawsmith.detector.symmetry import (
    AUTO,
    SYMMETRIES,
    choose_symmetry,
    evenly,
    images_asked,
    symmetry_distances,
    turned,
)
from flawsmith.detector.teacher import Teacher, build_teacher
from flawsmith.devices import Compute
from flawsmith.errors import QualityGateError, UserError
from flawsmith.files import atomic_folder, digest_json, digest_path, read_json, sole_writer, write_csv
from flawsmith.layout import Layout
from flawsmith.progress import bar
from flawsmith.randomness import numpy_generator
from flawsmith.sections import section_values, settings_digest
from flawsmith.tracking import stage_run
from flawsmith.training import ResumePoint

STAGE = "distill"
NORMALS_BATCH = 8
NO_TWINS: Mapping[str, str] = MappingProxyType({})

log = logging.getLogger(__name__)


def run(layout: Layout) -> None:
    """Train student and head, calibrate the maps, write `detector.safetensors`, `config.json`, `losses.csv`."""
    settings, teacher = layout.settings.distill, layout.settings.teacher
    data = layout.data
    triplets = layout.stage("synthesize")
    verdict = layout.input("validate", "verdict.json")
    if not read_json(verdict)["passed"]:
        raise QualityGateError(f"The triplets of {layout.category} did not pass the quality gate; see {verdict}.")
    params = {STAGE: section_values(settings), "teacher": section_values(teacher), "data": section_values(data)}
    compute = Compute.choose(layout.settings.compute)
    params["compute"], device = compute.describe(), compute.device
    with (
        stage_run(layout, STAGE, params) as tracked,
        sole_writer(layout.stage(STAGE)),
        compute.fast_math(),
    ):
        folder, split = TripletFolder(triplets), layout.split()
        parts = {role: TripletArrays.load(folder, folder.ids(role)) for role in (FIT, VALIDATION)}
        rows_of = _manifest_rows(folder, split.fit)
        normals = _Normals(remembered_normals(split, rows_of), data, split.twins)
        frozen = build_teacher(teacher, layout.root).to(device)
        symmetry, distances = _find_symmetry(normals, frozen, settings)
        elements = SYMMETRIES[symmetry]
        log.info("%s: turns and mirror images of normal parts that count as normal: %s.", layout.category, symmetry)
        size = parts[FIT].mask.shape[-1]
        cells = size // frozen.strides[-1]
        places = memory_size(settings.memory, len(normals.tiles) * len(elements), cells, cells)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)  # layers draw their initial weights from the global generator
            detector = Detector(DetectorConfig.of(teacher, settings, size, places), frozen)
        detector.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        owners = _fill_memory(detector, normals, elements)
        origins = {
            role: Origins(source_indices(normals.images, rows_of, part.ids, normals.twins), textured(rows_of, part.ids))
            for role, part in parts.items()
        }
        turns = numpy_generator(settings.seed, "symmetry")
        fit, validation = (_turned_triplets(part, turns.choice(elements, len(part.ids))) for part in parts.values())
        identity = digest_json(
            {
                "settings": settings_digest(settings, teacher, data),
                "triplets": digest_path(triplets),
                "precision": compute.precision,
            }
        )
        resume = ResumePoint(layout.resume(STAGE), identity)
        rows = distill(
            detector,
            fit,
            validation,
            settings,
            resume,
            compute,
            lambda step, metrics: tracked.log_metrics(metrics, step=step),
            Provenance(owners, origins),
        )
        detector.eval().calibrate(_batches(_pixels(plan_tiles(split.calibration, data), data), device))
        with atomic_folder(layout.stage(STAGE)) as out:
            found = {
                "precision": compute.precision,
                "symmetry": symmetry,
                "symmetry_distances": {name: round(distance, 6) for name, distance in distances.items()},
                "energy_exponents": [round(exponent, 4) for exponent in detector.energy_exponents],
            }
            save_detector(detector, out, teacher, settings, found)
            write_csv(
                out / "losses.csv",
                LOSS_COLUMNS,
                [["" if isinstance(value, float) and math.isnan(value) else value for value in row] for row in rows],
            )
        resume.clear()
        tracked.log_artifact(layout.stage(STAGE) / "losses.csv")
        tracked.set_output(layout.stage(STAGE) / "detector.safetensors")


class _Normals:
    """What the memory may show: the `tiles` of the `images`, and an even `sample` of them to ask questions of."""

    def __init__(self, images: Sequence[Path], data: DataSettings, twins: Mapping[str, str]) -> None:
        self.images, self.data, self.twins = images, data, twins
        self.tiles = plan_tiles(images, data)
        self.sample = _sample(self.tiles)

    @cached_property
    def looked_at(self) -> NDArray[np.uint8]:
        """The sample's pixels (N, 3, S, S)."""
        return np.stack(list(_pixels(self.sample, self.data)))

    def shown(self, elements: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Every tile under each element of the symmetry."""
        return (turned(image, element) for image in _pixels(self.tiles, self.data) for element in elements)


def _find_symmetry(normals: _Normals, teacher: Teacher, settings: DistillSettings) -> tuple[str, dict[str, float]]:
    """The symmetry that is set, or that the normals show, and what they said."""
    if settings.symmetry != AUTO:
        return settings.symmetry, {}
    distances: dict[str, float] = {}
    if settings.memory:
        share = len(normals.sample) / len(normals.tiles)
        with bar(what="distill symmetry", total=images_asked(len(normals.sample)), unit="image") as shown:
            distances = symmetry_distances(
                lambda images: _places(teacher, images, shown.update),
                normals.looked_at,
                settings.memory,
                settings.memory_dimensions,
                share,
            )
    return choose_symmetry(distances), distances


def _fill_memory(detector: Detector, normals: _Normals, elements: Sequence[int]) -> Tensor | None:
    """Show the memory all normals and ask them how much energy counts; return the image behind each key, (M,) places in
    `normals.images`, or None if the detector has no memory."""
    device = detector.teacher.mean.device
    count = len(normals.tiles) * len(elements)
    images = bar(normals.shown(elements), "distill memory", count, "image")
    shown = remember(detector, _batches(images, device), count)
    if shown is None or detector.memory is None:
        return None
    owners = image_of(normals.tiles, normals.images, normals.twins)[shown.cpu() // len(elements)]
    own_keys = ((owners == image).to(device) for image in image_of(normals.sample, normals.images, normals.twins))
    detector.memory.fit_exponent(
        (_places(detector.teacher, image[None]), own)
        for image, own in zip(bar(normals.looked_at, "distill energy", unit="image"), own_keys, strict=True)
    )
    return owners


def _places(teacher: Teacher, images: NDArray[np.uint8], on_batch: Callable[[int], Any] = lambda count: None) -> Tensor:
    """What the memory compares, of images (N, 3, S, S)."""
    found = []
    with torch.no_grad():
        for batch in _batches(images, teacher.mean.device):
            found.append(as_places(teacher(batch)[-1]))
            on_batch(len(batch))
    return torch.cat(found)


def _pixels(tiles: Sequence[Tile], data: DataSettings) -> Iterator[NDArray[np.uint8]]:
    """(3, S, S) each."""
    return (to_uint8(tile).transpose(2, 0, 1) for tile in iter_tiles(tiles, data))


def _batches(images: Iterable[NDArray[np.uint8]], device: torch.device) -> Iterator[Tensor]:
    rest = iter(images)
    while group := list(islice(rest, NORMALS_BATCH)):
        yield as_batch(np.stack(group), device)


def _sample(tiles: Sequence[Tile]) -> list[Tile]:
    """An even part of the images, of each one tile, from another place each time: tiles of one image are no strangers
    to each other."""
    of_image: dict[Path, list[Tile]] = {}
    for tile in tiles:
        of_image.setdefault(tile.path, []).append(tile)
    one_each = [group[place % len(group)] for place, group in enumerate(of_image.values())]
    return [one_each[index] for index in evenly(len(one_each))]


def _turned_triplets(triplets: TripletArrays, elements: NDArray[np.int64]) -> TripletArrays:
    """Each triplet as one element of the symmetry shows it."""
    if not elements.any():
        return triplets

    def each(images: NDArray[Any]) -> NDArray[Any]:
        return np.stack([turned(image, element) for image, element in zip(images, elements, strict=True)])

    return replace(triplets, normal=each(triplets.normal), defect=each(triplets.defect), mask=each(triplets.mask))


def _manifest_rows(folder: TripletFolder, normals: Sequence[Path]) -> dict[str, dict[str, Any]]:
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


def remembered_normals(split: Split, rows: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """The fit normals without those behind validation triplets and their copies, which must stay new to the whole
    detector: where there is no labelled test set, `evaluate` scores these very triplets."""
    held_out = {row["source"] for row in rows.values() if row["role"] == VALIDATION}
    return split.fit_without(held_out)


def image_of(tiles: Sequence[Tile], images: Sequence[Path], twins: Mapping[str, str] = NO_TWINS) -> Tensor:
    """Of each tile the place of its image among `images`, (N,), of copies that of their first: in training a triplet
    may not recognise any part of the picture it was made from."""
    places = _picture_places(images, twins)
    return torch.tensor([places[normal_name(tile.path)] for tile in tiles])


def source_indices(
    normals: Sequence[Path],
    rows: Mapping[str, Mapping[str, Any]],
    ids: Sequence[str],
    twins: Mapping[str, str] = NO_TWINS,
) -> NDArray[np.int64]:
    """Of each triplet the place of its source among `normals`, as `image_of` says it; -1 if it is none of them."""
    places = _picture_places(normals, twins)
    return np.array([places.get(rows[one]["source"], -1) for one in ids], np.int64)


def _picture_places(images: Sequence[Path], twins: Mapping[str, str]) -> dict[str, int]:
    first: dict[str, int] = {}
    names = [normal_name(path) for path in images]
    return {name: first.setdefault(twins.get(name, name), place) for place, name in enumerate(names)}


def textured(rows: Mapping[str, Mapping[str, Any]], ids: Sequence[str]) -> NDArray[np.int64]:
    """Places in `ids` of the triplets whose defect has a texture of its own and is no shade; all if there are none."""
    found = [place for place, one in enumerate(ids) if not is_illumination_defect(rows[one])]
    return np.array(found or range(len(ids)), np.int64)

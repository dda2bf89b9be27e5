"""Stage distill: triplets that passed the gate + calibration normals → a trained, calibrated detector."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flawsmith.detector.distill import LOSS_COLUMNS, Origins, as_batch, distill
from flawsmith.detector.memory import memory_size
from flawsmith.detector.model import Detector, DetectorConfig, remember, save_detector
from flawsmith.detector.teacher import build_teacher
from flawsmith.devices import best_device, fast_math
from flawsmith.errors import QualityGateError, UserError
from flawsmith.files import atomic_folder, digest_json, digest_path, read_json, write_csv
from flawsmith.images import to_uint8
from flawsmith.layout import Layout
from flawsmith.resume import ResumePoint
from flawsmith.settings import section_values, settings_digest
from flawsmith.surfaces import Tile, iter_tiles, plan_tiles
from flawsmith.tracking import stage_run
from flawsmith.triplets import FIT, VALIDATION, TripletArrays, TripletFolder, read_manifest

STAGE = "distill"
NORMALS_BATCH = 8


def run(layout: Layout) -> None:
    """Train student and head, calibrate the maps, write `detector.safetensors`, `config.json`, `losses.csv`."""
    settings, teacher = layout.settings.distill, layout.settings.teacher
    data = layout.settings.data
    triplets = layout.stage("synthesize")
    verdict = layout.input("validate", "verdict.json")
    if not read_json(verdict)["passed"]:
        raise QualityGateError(f"The triplets of {layout.category} did not pass the quality gate; see {verdict}.")
    inputs = {"synthesize": triplets, "verdict": verdict, "data": layout.surface().folder / "train"}
    params = {STAGE: section_values(settings), "teacher": section_values(teacher), "data": section_values(data)}
    device = best_device()
    with stage_run(layout, STAGE, inputs, params) as tracked, fast_math(device):
        folder = TripletFolder(triplets)
        fit, validation = (TripletArrays.load(folder, folder.ids(role)) for role in (FIT, VALIDATION))
        size, split = fit.mask.shape[-1], layout.split()
        frozen = build_teacher(teacher, layout.root)
        cells = size // frozen.strides[-1]
        rows_of = _manifest_rows(folder, split.fit)
        known = remembered_normals(split.fit, rows_of)
        normals = plan_tiles(known, data)
        places = memory_size(settings.memory, len(normals), cells, cells)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)  # layers draw their initial weights from the global generator
            detector = Detector(DetectorConfig.of(teacher, settings, size, places), frozen)
        detector.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]

        def batches(tiles: Sequence[Tile]) -> Iterator[Tensor]:
            pixels = (to_uint8(tile).transpose(2, 0, 1) for tile in iter_tiles(tiles, data))
            while group := list(islice(pixels, NORMALS_BATCH)):
                yield as_batch(np.stack(group), device)

        owners = remember(detector, batches(normals), len(normals))
        sources = {
            role: source_indices(known, rows_of, part.ids) for role, part in ((FIT, fit), (VALIDATION, validation))
        }
        origins = None if owners is None else Origins(image_of(normals, known)[owners.cpu()], sources)
        identity = digest_json(
            {"settings": settings_digest(settings, teacher, data), "triplets": digest_path(triplets)}
        )
        resume = ResumePoint(layout.resume(STAGE), identity)
        rows = distill(
            detector,
            fit,
            validation,
            settings,
            resume,
            device,
            lambda step, metrics: tracked.log_metrics(metrics, step=step),
            origins,
        )
        detector.eval().calibrate(batches(plan_tiles(split.calibration, data)))
        with atomic_folder(layout.stage(STAGE)) as out:
            save_detector(detector, out, teacher, settings)
            write_csv(
                out / "losses.csv",
                LOSS_COLUMNS,
                [["" if isinstance(value, float) and math.isnan(value) else value for value in row] for row in rows],
            )
        resume.clear()
        tracked.log_artifact(layout.stage(STAGE) / "losses.csv")
        tracked.set_outputs({STAGE: layout.stage(STAGE)})


def _manifest_rows(folder: TripletFolder, normals: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Triplet id → its row of the manifest.

    Raises:
        UserError: a triplet was made from an image that is no fit normal now.
    """
    rows = read_manifest(folder.folder / "manifest.parquet").to_pylist()
    strangers = sorted({row["source"] for row in rows} - {path.name for path in normals})
    if strangers:
        raise UserError(
            f"{folder.folder} was made from {strangers[0]}, which is no normal image for training now; run "
            "`flawsmith synthesize` again."
        )
    return {row["triplet_id"]: row for row in rows}


def remembered_normals(normals: Sequence[Path], rows: Mapping[str, Mapping[str, Any]]) -> list[Path]:
    """The fit normals without those behind validation triplets, which must stay new to the whole detector: where there
    is no labelled test set, `evaluate` scores these very triplets."""
    held_out = {row["source"] for row in rows.values() if row["role"] == VALIDATION}
    return [path for path in normals if path.name not in held_out]


def image_of(tiles: Sequence[Tile], images: Sequence[Path]) -> Tensor:
    """Of each tile the place of its image among `images`, (N,): in training a triplet may not recognise any part of the
    image it was made from."""
    places = {path: place for place, path in enumerate(images)}
    return torch.tensor([places[tile.path] for tile in tiles])


def source_indices(
    normals: Sequence[Path], rows: Mapping[str, Mapping[str, Any]], ids: Sequence[str]
) -> NDArray[np.int64]:
    """Of each triplet the place of its source among `normals`, -1 if it is none of them."""
    places = {path.name: place for place, path in enumerate(normals)}
    return np.array([places.get(rows[one]["source"], -1) for one in ids], np.int64)

"""Stage distill: triplets that passed the gate + calibration normals → a trained, calibrated detector."""

import logging

import torch

from flawsmith.data.dataset import plan_tiles
from flawsmith.data.triplets import FIT, VALIDATION, TripletArrays, TripletFolder
from flawsmith.detector.batches import TrainingTriplets
from flawsmith.detector.model import Detector, DetectorConfig, save_detector
from flawsmith.detector.normals import (
    Normals,
    fill_memories,
    manifest_rows,
    memory_sizes,
    pixels,
    remembered_normals,
    tensor_batches,
    triplet_sources,
)
from flawsmith.detector.teacher import build_teacher
from flawsmith.detector.train import LOSS_COLUMNS, distill
from flawsmith.devices import Compute
from flawsmith.errors import QualityGateError
from flawsmith.files import atomic_folder, digest_json, digest_path, read_json, sole_writer, write_csv
from flawsmith.layout import Layout
from flawsmith.sections import section_values, settings_digest
from flawsmith.tracking import stage_run
from flawsmith.training import ResumePoint

STAGE = "distill"

log = logging.getLogger(__name__)


def run(layout: Layout) -> None:
    """Train and calibrate the detector, write `detector.safetensors`, `config.json`, `losses.csv`.

    Raises:
        QualityGateError: the triplets did not pass the quality gate.
        UserError: an earlier stage's output is missing, or does not fit the data.
    """
    settings, teacher, data = layout.settings.distill, layout.settings.teacher, layout.data
    folder = TripletFolder(layout.stage("synthesize"))
    verdict = layout.input("validate", "verdict.json")
    if not read_json(verdict)["passed"]:
        raise QualityGateError(f"The triplets of {layout.category} did not pass the quality gate; see {verdict}.")
    compute = Compute.choose(layout.settings.compute)
    params = {STAGE: section_values(settings), "teacher": section_values(teacher), "data": section_values(data)}
    params["compute"] = compute.describe()
    with stage_run(layout, STAGE, params) as tracked, sole_writer(layout.stage(STAGE)), compute.fast_math():
        split = layout.split()
        arrays = {role: TripletArrays.load(folder, folder.ids(role)) for role in (FIT, VALIDATION)}
        rows = manifest_rows(folder, split.fit)
        normals = Normals(remembered_normals(split, rows), data, split.twins)
        frozen = build_teacher(teacher, layout.root).to(compute.device)
        memories = memory_sizes(settings, frozen, len(normals.tiles), data.shape)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)  # layers draw their initial weights from the global generator
            detector = Detector(DetectorConfig.of(teacher, settings, data.shape, memories), frozen)
        detector.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        source_ids = fill_memories(detector, normals, settings)
        sources = {
            role: triplet_sources(normals.images, rows, part.ids, normals.twins) for role, part in arrays.items()
        }
        made_from = {
            "settings": settings_digest(settings, teacher, data),
            "triplets": digest_path(folder.folder),
            "precision": compute.precision,
        }
        resume = ResumePoint(layout.resume(STAGE), digest_json(made_from))
        losses = distill(
            detector,
            TrainingTriplets(arrays, source_ids, sources),
            lambda: tensor_batches(pixels(plan_tiles(split.calibration, data), data), compute.device),
            settings,
            resume,
            compute,
            lambda step, metrics: tracked.log_metrics(metrics, step=step),
        )
        log.info("%s: what counts how much: %s.", layout.category, detector.told())
        with atomic_folder(layout.stage(STAGE)) as out:
            found = {"precision": compute.precision, "counts": detector.told()}
            save_detector(detector, out, teacher, settings, found)
            table = [["" if value != value else value for value in row] for row in losses]  # NaN: not validated
            write_csv(out / "losses.csv", LOSS_COLUMNS, table)
        resume.clear()
        tracked.log_artifact(layout.stage(STAGE) / "losses.csv")
        tracked.set_output(layout.stage(STAGE) / "detector.safetensors")

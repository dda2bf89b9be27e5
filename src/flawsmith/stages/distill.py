"""Stage distill: triplets that passed the gate + calibration normals → a trained, calibrated detector."""

import logging

import torch

from flawsmith.data.dataset import plan_tiles
from flawsmith.data.triplets import FIT, VALIDATION, TripletArrays, TripletFolder
from flawsmith.detector.augmentation import AUGMENTATIONS, transformed_triplets
from flawsmith.detector.batches import TrainingTriplets
from flawsmith.detector.memory import memory_size
from flawsmith.detector.model import Detector, DetectorConfig, save_detector
from flawsmith.detector.normals import (
    Normals,
    fill_memory,
    find_augmentation,
    manifest_rows,
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
from flawsmith.randomness import numpy_generator
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
        augmentation, distances = find_augmentation(normals, frozen, settings)
        elements = AUGMENTATIONS[augmentation]
        log.info("%s: turns and mirror images of normal parts that count as normal: %s.", layout.category, augmentation)

        cells = (side // frozen.strides[-1] for side in data.shape)
        patches = memory_size(settings.memory, len(normals.tiles) * len(elements), *cells)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)  # layers draw their initial weights from the global generator
            detector = Detector(DetectorConfig.of(teacher, settings, data.shape, patches), frozen)
        detector.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        source_ids = fill_memory(detector, normals, elements)
        turns = numpy_generator(settings.seed, "symmetry")
        sources, seen = {}, {}
        for role, part in arrays.items():
            sources[role] = triplet_sources(normals.images, rows, part.ids, normals.twins)
            seen[role] = transformed_triplets(part, turns.choice(elements, len(part.ids)))
        made_from = {
            "settings": settings_digest(settings, teacher, data),
            "triplets": digest_path(folder.folder),
            "precision": compute.precision,
        }
        resume = ResumePoint(layout.resume(STAGE), digest_json(made_from))
        losses = distill(
            detector,
            TrainingTriplets(seen, source_ids, sources),
            settings,
            resume,
            compute,
            lambda step, metrics: tracked.log_metrics(metrics, step=step),
        )
        calibration = pixels(plan_tiles(split.calibration, data), data)
        detector.eval().calibrate(tensor_batches(calibration, compute.device))
        with atomic_folder(layout.stage(STAGE)) as out:
            found = {
                "precision": compute.precision,
                "augmentation": augmentation,
                "augmentation_distances": {name: round(distance, 6) for name, distance in distances.items()},
                "norm_powers": [round(power, 4) for power in detector.all_norm_powers],
            }
            save_detector(detector, out, teacher, settings, found)
            table = [["" if value != value else value for value in row] for row in losses]  # NaN: not validated
            write_csv(out / "losses.csv", LOSS_COLUMNS, table)
        resume.clear()
        tracked.log_artifact(layout.stage(STAGE) / "losses.csv")
        tracked.set_output(layout.stage(STAGE) / "detector.safetensors")

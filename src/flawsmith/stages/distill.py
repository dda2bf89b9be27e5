"""Stage distill: triplets that passed the gate + calibration normals → a trained, calibrated detector."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flawsmith.detector.distill import LOSS_COLUMNS, as_batch, distill
from flawsmith.detector.model import Detector, DetectorConfig, save_detector
from flawsmith.detector.teacher import build_teacher
from flawsmith.devices import best_device, fast_math
from flawsmith.errors import QualityGateError
from flawsmith.files import atomic_folder, digest_json, digest_path, read_json, write_csv
from flawsmith.layout import Layout
from flawsmith.resume import ResumePoint
from flawsmith.settings import section_values, settings_digest
from flawsmith.surfaces import load_images_uint8
from flawsmith.tracking import stage_run
from flawsmith.triplets import FIT, VALIDATION, TripletArrays, TripletFolder

STAGE = "distill"
CALIBRATION_BATCH = 8


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
        size = fit.mask.shape[-1]
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)  # layers draw their initial weights from the global generator
            detector = Detector(DetectorConfig.of(teacher, settings, size), build_teacher(teacher, layout.root))
        detector.to(memory_format=torch.channels_last)
        identity = digest_json(
            {"settings": settings_digest(settings, teacher, data), "triplets": digest_path(triplets)}
        )
        resume = ResumePoint(layout.resume(STAGE), identity)
        rows = distill(
            detector, fit, validation, settings, resume, device, lambda step, m: tracked.log_metrics(m, step=step)
        )
        normals = load_images_uint8(layout.split().calibration, data.image_size, data.max_pixels)

        def batches() -> Iterator[Tensor]:
            for first in range(0, len(normals), CALIBRATION_BATCH):
                yield as_batch(normals[first : first + CALIBRATION_BATCH], device)

        detector.eval().calibrate(batches())
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

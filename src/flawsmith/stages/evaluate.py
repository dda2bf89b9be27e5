"""evaluate: how good the detector is, beside a kNN baseline; the only stage that opens the labelled test set.

flawsmith evaluate --category C: reads distill/ and data/C (synthesize/ where there is no labelled test set), writes
metrics.json, roc.csv, pr.csv, curves/, scores.csv, calibration_scores.csv, figures/, gallery/, parity/ and report.html.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flawsmith.detector.knn import KnnBaseline
from flawsmith.detector.model import load_detector
from flawsmith.detector.teacher import build_teacher
from flawsmith.devices import best_device
from flawsmith.evaluation.assess import KEYS, Assessment, assess
from flawsmith.evaluation.outputs import write_data, write_parity_images
from flawsmith.evaluation.report import Subject, summary, write_report
from flawsmith.evaluation.scoring import Item, labelled_items, normal_items, torch_scorer, triplet_items
from flawsmith.files import atomic_folder
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator, torch_generator
from flawsmith.settings import section_values
from flawsmith.surfaces import load_images
from flawsmith.tracking import stage_run
from flawsmith.triplets import VALIDATION, TripletFolder, read_manifest

STAGE = "evaluate"

log = logging.getLogger(__name__)


def run(layout: Layout) -> None:
    """Score one category and write its report.

    Raises:
        UserError: an earlier stage's output is missing, or the test set is not usable as it is.
        FlawsmithError: the detector answers NaN.
    """
    everything, settings, data = layout.settings, layout.settings.evaluate, layout.settings.data
    weights = layout.input("distill", "detector.safetensors").parent
    surface, split = layout.surface(), layout.split()
    items, labelled, held_out = test_items(layout)
    inputs = {"distill": weights, "data": surface.folder / "train"}
    if labelled:
        inputs |= {"test": surface.folder / "test", "ground_truth": surface.folder / "ground_truth"}
    else:
        inputs["synthesize"] = layout.stage("synthesize")
    sections = {STAGE: settings, "data": data, "teacher": everything.teacher}
    params = {name: section_values(section) for name, section in sections.items()}
    with stage_run(layout, STAGE, inputs, params) as tracked:
        # the normals that held-out triplets were made from must not sit in the baseline's memory
        baseline = fit_baseline(layout, [path for path in split.fit if path.name not in set(held_out.values())])
        result = assess(
            torch_scorer(load_detector(weights)),
            torch_scorer(baseline),
            items,
            normal_items(split.calibration, data.image_size, data.max_pixels),
            numpy_generator(settings.seed, "bootstrap"),
            false_alarm_rate=settings.false_alarm_rate,
            bootstrap=settings.bootstrap,
            aupro_limit=settings.aupro_limit,
            batch=settings.batch,
            gallery=settings.gallery,
        )
        with atomic_folder(layout.stage(STAGE)) as folder:
            write_outputs(folder, result, layout, items, labelled)
        out = layout.stage(STAGE)
        tracked.log_metrics(_tracked_values(result))
        for name in ("report.html", "metrics.json", "figures", "gallery"):
            tracked.log_artifact(out / name)
        tracked.set_outputs({"metrics": out / "metrics.json", "scores": out / "scores.csv", "parity": out / "parity"})
    log.info("%s: %s", layout.category, summary(result))


def test_items(layout: Layout) -> tuple[tuple[Item, ...], bool, Mapping[str, str]]:
    """The images that finished models are judged on: the labelled test set, or held-out triplets where there is none.

    Returns:
        the images; whether they are the labelled test set; of the triplets, id → file name of the source image.

    Raises:
        UserError: the test set is not usable as it is, or there is neither it nor a held-out triplet.
    """
    data = layout.settings.data
    items = labelled_items(layout.surface().labelled_test(), data.image_size, data.max_pixels)
    if items:
        return items, True, {}
    manifest = layout.input("synthesize", "manifest.parquet")
    held_out = held_out_sources(manifest)
    log.warning("%s has no labelled test set: held-out synthetic triplets are scored instead.", layout.category)
    return triplet_items(TripletFolder(manifest.parent), held_out, data.image_size), False, held_out


def fit_baseline(layout: Layout, paths: list[Path]) -> KnnBaseline:
    """The kNN baseline of one category, from its fit images alone."""
    settings, data = layout.settings.evaluate, layout.settings.data
    device = best_device()

    def batches() -> Iterator[Tensor]:
        for first in range(0, len(paths), settings.batch):
            images = load_images(paths[first : first + settings.batch], data.image_size, data.max_pixels)
            yield torch.from_numpy(images).to(device)

    teacher = build_teacher(layout.settings.teacher, layout.root).to(device)
    generator = torch_generator(settings.seed, "baseline")
    return KnnBaseline.fit(teacher, batches(), settings.baseline_vectors, generator)


def held_out_sources(manifest: Path) -> dict[str, str]:
    """Id → file name of the source image, of the triplets that trained nothing."""
    rows = read_manifest(manifest).to_pylist()
    return {str(row["triplet_id"]): str(row["source"]) for row in rows if row["role"] == VALIDATION}


def write_outputs(folder: Path, result: Assessment, layout: Layout, items: tuple[Item, ...], labelled: bool) -> None:
    """Everything the stage leaves."""
    settings = layout.settings
    subject = Subject(
        category=layout.category,
        labelled=labelled,
        aupro_limit=settings.evaluate.aupro_limit,
        bootstrap=settings.evaluate.bootstrap,
        image_size=settings.data.image_size,
        teacher=settings.teacher.backbone,
    )
    write_data(folder, result, labelled)
    write_parity_images(folder / "parity", items, settings.evaluate.parity_images)
    write_report(folder, result, subject)


def _tracked_values(result: Assessment) -> dict[str, float]:
    values = {key: result.detector.values[key].value for key in KEYS}
    values |= {f"baseline_{key}": result.baseline.values[key].value for key in KEYS}
    values["test_detection_rate"] = result.detector.test_detections.value
    values["test_false_alarm_rate"] = result.detector.test_false_alarms.value
    values["threshold"] = result.detector.threshold.value
    return values

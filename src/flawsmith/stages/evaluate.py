"""evaluate: how good the detector is, beside a kNN baseline; of dvc.yaml's stages it alone opens the labelled test set.

flawsmith evaluate --category C: reads distill/, validate/verdict.json and data/C (synthesize/ where there is no
labelled test set), writes metrics.json, draws.npz, roc.csv, pr.csv, curves/, scores.csv, calibration_scores.csv,
figures/, gallery/, parity/ and report.html. `run_baseline` judges the kNN baseline alone, which needs the data and no
trained model.
"""

import logging
import math
import tempfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flawsmith.data.dataset import Split, iter_tiles, labelled_part, plan_tiles
from flawsmith.data.tiling import Tiling
from flawsmith.data.triplets import VALIDATION, TripletFolder, is_illumination_defect, read_manifest
from flawsmith.detector.knn import KnnBaseline, MemoryBaseline
from flawsmith.detector.model import load_detector
from flawsmith.detector.teacher import build_teacher
from flawsmith.devices import Compute
from flawsmith.errors import UserError
from flawsmith.evaluation.assess import KEYS, Assessment, Performance, assess, flagged_share, measure
from flawsmith.evaluation.intervals import Estimate
from flawsmith.evaluation.outputs import write_data, write_parity_images, write_performance
from flawsmith.evaluation.report import Subject, summary, write_report
from flawsmith.evaluation.scoring import (
    Item,
    defect_items,
    labelled_items,
    normal_items,
    open_spools,
    tiled_scorer,
    torch_scorer,
    triplet_items,
)
from flawsmith.export.onnx import export_network
from flawsmith.files import atomic_folder, read_json, sole_writer
from flawsmith.inference.network import Network
from flawsmith.layout import Layout
from flawsmith.randomness import numpy_generator, torch_generator
from flawsmith.settings import section_values
from flawsmith.tracking import stage_run

STAGE, BASELINE = "evaluate", "knn"

log = logging.getLogger(__name__)


class Judged(NamedTuple):
    """The images that finished models are judged on.

    Attributes:
        items: images of the labelled test set, or held-out triplets where there is none.
        labelled: whether they are of the labelled test set.
        part: one of `surfaces.PARTS`; `all` of held-out triplets.
        held_out: of the triplets, id → `normal_name` of the source image.
        shades: of the held-out triplets those that change the light alone: no defects to find, and told apart.
    """

    items: tuple[Item, ...]
    labelled: bool
    part: str
    held_out: Mapping[str, str]
    shades: tuple[Item, ...] = ()

    def foreign_to(self, split: Split) -> list[Path]:
        """The fit normals that no held-out triplet was made from, so that a baseline may remember them."""
        return split.fit_without(self.held_out.values())


def run(layout: Layout) -> None:
    """Score one category and write its report.

    Raises:
        UserError: an earlier stage's output is missing, or the test set is not usable as it is.
        FlawsmithError: the detector answers NaN.
    """
    settings, data, tiling = layout.settings.evaluate, layout.data, Tiling.of(layout.settings.data)
    weights = layout.input("distill", "detector.safetensors").parent
    split = layout.split()
    judged = judged_images(layout)
    if judged.labelled:
        log.info("%s: test: %s", layout.category, layout.surface().find_test())
    params = _params(layout) | {"export": {"opset": layout.settings.export.opset}}
    device = Compute.choose(layout.settings.compute).device
    with stage_run(layout, STAGE, params) as tracked, sole_writer(layout.stage(STAGE)):
        baseline = fit_baseline(layout, judged.foreign_to(split))
        network = exported_network(layout, weights)
        tracked.set_tag("provider", network.provider)
        detector = tiled_scorer(network.run, tiling)
        result = assess(
            detector,
            tiled_scorer(torch_scorer(baseline, device), tiling),
            judged.items,
            normal_items(split.calibration, tiling, data.reading),
            numpy_generator(settings.seed, "bootstrap"),
            false_alarm_rate=settings.false_alarm_rate,
            bootstrap=settings.bootstrap,
            aupro_limit=settings.aupro_limit,
            batch=settings.batch,
            gallery=settings.gallery,
        )
        with atomic_folder(layout.stage(STAGE)) as folder:
            shades = flagged_share(detector, judged.shades, result.detector.threshold.value, settings.batch)
            write_outputs(folder, result, layout, judged, shades)
        out = layout.stage(STAGE)
        tracked.log_metrics(_tracked_values(result))
        for name in ("report.html", "metrics.json", "figures", "gallery"):
            tracked.log_artifact(out / name)
        tracked.set_output(out / "metrics.json")
    log.info("%s: %s (computed on %s)", layout.category, summary(result), network.provider)


def exported_network(layout: Layout, weights: Path) -> Network:
    """The trained detector as every later user runs it: exported, in onnxruntime, so that the threshold is chosen, and
    the figures are measured, on the answers that the product gives.

    Raises:
        UserError: `weights` holds no detector.
        FlawsmithError: the detector does not export.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"  # it has no threshold yet, so it is no model
        export_network(load_detector(weights), layout.settings.data.image_size, layout.settings.export.opset, path)
        return Network(path)


def run_baseline(layout: Layout) -> None:
    """Judge the kNN baseline alone, as `run` judges it beside the detector: the same images, split and resamples.

    Writes metrics.json, draws.npz and scores.csv into the folder `knn` beside the stages' own.

    Raises:
        UserError: the test set is not usable as it is, or there is neither it nor a held-out triplet.
    """
    settings, data, tiling = layout.settings.evaluate, layout.data, Tiling.of(layout.settings.data)
    split, judged = layout.split(), judged_images(layout)
    device = Compute.choose(layout.settings.compute).device
    with stage_run(layout, BASELINE, _params(layout)) as tracked, open_spools(2) as spools:
        maps, masks = spools
        (result,) = measure(
            [tiled_scorer(torch_scorer(fit_baseline(layout, judged.foreign_to(split)), device), tiling)],
            judged.items,
            normal_items(split.calibration, tiling, data.reading),
            numpy_generator(settings.seed, "bootstrap"),
            [maps],
            masks,
            false_alarm_rate=settings.false_alarm_rate,
            bootstrap=settings.bootstrap,
            aupro_limit=settings.aupro_limit,
            batch=settings.batch,
        )
        with atomic_folder(layout.stage(BASELINE)) as folder:
            write_performance(folder, result, judged.items, judged.labelled, judged.part)
        out = layout.stage(BASELINE)
        tracked.log_metrics(_measured(result))
        tracked.set_output(out / "metrics.json")


def judged_images(layout: Layout, original: bool = False) -> Judged:
    """The images that finished models are judged on: of the labelled test set the part that `evaluate.part` names, or
    held-out triplets where there is none.

    They come at working resolution; `original` images of a labelled test set as they are, with masks at that.

    Raises:
        UserError: the test set is not usable as it is, its part lacks good or defective images, or there is neither it
            nor a held-out triplet.
    """
    data, part = layout.data, layout.settings.evaluate.part
    surface = layout.surface()
    labelled = surface.labelled_test()
    if labelled:
        kept = labelled_part(labelled, part)
        if len({image.is_defective for image in kept}) < 2:
            raise UserError(
                f"The {part} half of {surface.folder / 'test'} lacks good or defective images: each type's images go "
                "to research and report by turns, so it takes two or more of a type; add images, or set "
                "evaluate.part to `all`."
            )
        return Judged(labelled_items(kept, Tiling.of(data), data.reading, original), True, part, {})
    manifest = layout.input("synthesize", "manifest.parquet")
    rows = _held_out(manifest)
    log.warning("%s has no labelled test set: held-out synthetic triplets are scored instead.", layout.category)
    normals = {name: _normal_of(row) for name, row in rows.items() if not is_illumination_defect(row)}
    triplets = TripletFolder(manifest.parent)
    items = triplet_items(triplets, normals, data.image_size)
    shades = defect_items(triplets, rows.keys() - normals.keys(), data.image_size)
    return Judged(items, False, "all", {name: row["source"] for name, row in rows.items()}, shades)


def fit_baseline(layout: Layout, paths: list[Path]) -> KnnBaseline | MemoryBaseline:
    """The baseline that `evaluate.baseline` names for one category, from its fit images alone."""
    settings, data = layout.settings.evaluate, layout.data
    device = Compute.choose(layout.settings.compute).device
    tiles = plan_tiles(paths, data)

    def batches() -> Iterator[Tensor]:
        images = iter_tiles(tiles, data)
        while group := list(islice(images, settings.batch)):
            yield torch.from_numpy(np.stack(group)).to(device)

    teacher = build_teacher(layout.settings.teacher, layout.root).to(device)
    if settings.baseline == "cosine":
        return MemoryBaseline.fit(teacher, batches(), settings.baseline_vectors, len(tiles), data.image_size)
    generator = torch_generator(settings.seed, "baseline")
    return KnnBaseline.fit(teacher, batches(), settings.baseline_vectors, generator)


def _held_out(manifest: Path) -> dict[str, dict[str, Any]]:
    """Id → row of the manifest, of the triplets that trained nothing."""
    rows = read_manifest(manifest).to_pylist()
    return {str(row["triplet_id"]): row for row in rows if row["role"] == VALIDATION}


def _normal_of(row: Mapping[str, Any]) -> str:
    """The normal that a triplet was made from: the image's name, with its place where it is a tile of one."""
    return f"{row['source']}@{row['source_top']},{row['source_left']}" if "source_top" in row else str(row["source"])


def _triplet_ids(layout: Layout) -> list[str]:
    return sorted(path.stem for path in (layout.stage("synthesize") / "mask").glob("*.png"))


def write_outputs(
    folder: Path,
    result: Assessment,
    layout: Layout,
    judged: Judged,
    shades: Estimate | None,
) -> None:
    """Everything the stage leaves. `shades`: share of the shades set apart that is flagged."""
    settings, (gate, warned) = layout.settings, _gate(layout)
    subject = Subject(
        category=layout.category,
        labelled=judged.labelled,
        aupro_limit=settings.evaluate.aupro_limit,
        bootstrap=settings.evaluate.bootstrap,
        image_size=settings.data.image_size,
        teacher=settings.teacher.backbone,
        part=judged.part,
        gate=gate,
        warned=warned,
        shades=len(judged.shades),
        flagged_shades=shades,
    )
    precision = read_json(layout.input("distill", "config.json")).get("precision", "")
    write_data(folder, result, judged.labelled, judged.part, precision, judged.shades, shades)
    write_parity_images(
        folder / "parity", judged.items, settings.evaluate.parity_images, Tiling.of(layout.settings.data)
    )
    write_report(folder, result, subject)


def _gate(layout: Layout) -> tuple[str, bool]:
    """What the quality gate said of the triplets, in words, and whether it warned."""
    verdict = read_json(layout.input("validate", "verdict.json"))
    warnings = [item["name"] for item in verdict["expectations"] if not item["passed"]]
    said = f"with warnings ({', '.join(warnings)})" if warnings else "without a warning"
    return f"The triplets passed the quality gate {said}. {verdict.get('ddpm') or ''}".strip(), bool(warnings)


def _params(layout: Layout) -> dict[str, dict[str, Any]]:
    settings = layout.settings
    sections = {STAGE: settings.evaluate, "data": settings.data, "teacher": settings.teacher}
    return {name: section_values(section) for name, section in sections.items()}


def _tracked_values(result: Assessment) -> dict[str, float]:
    values = _measured(result.detector)
    values |= {f"baseline_{key}": value for key, value in _measured(result.baseline).items()}
    values["test_detection_rate"] = result.detector.test_detections.value
    values["test_false_alarm_rate"] = result.detector.test_false_alarms.value
    values["threshold"] = result.detector.threshold.value
    return values


def _measured(performance: Performance) -> dict[str, float]:
    values = {key: performance.values[key].value for key in KEYS}
    return {key: value for key, value in values.items() if math.isfinite(value)}

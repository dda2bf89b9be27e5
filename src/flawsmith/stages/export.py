"""Stage 6: the trained detector as one ONNX file with a certificate that it decides the same.

Reads distill/, evaluate/metrics.json and evaluate/parity/, for variants also synthesize/ and data/C/train; writes
export/model.onnx, parity.json, cost.json and variants/: model-fp16.onnx, model-int8.onnx, a report on each, and
summary.json. How fast a model is on this machine goes to the log and to MLflow: it differs from run to run, so it is no
part of the result.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from flawsmith import __version__
from flawsmith.data.dataset import Tile, iter_tiles, load_images, plan_tiles
from flawsmith.data.images import FloatImage, resize_image
from flawsmith.data.triplets import FIT, VALIDATION, TripletFolder, is_illumination_defect, read_manifest
from flawsmith.detector.model import load_detector
from flawsmith.errors import UserError
from flawsmith.export.cost import count
from flawsmith.export.onnx import export_onnx, map_range
from flawsmith.export.parity import certificate, measure_latency, run_detector
from flawsmith.export.variant_report import Images, Limits, Samples, build_variant
from flawsmith.files import atomic_folder, digest_path, read_json, write_json
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.settings import section_values
from flawsmith.tracking import StageRun, stage_run

MODEL, PARITY, COST, VARIANTS = "model.onnx", "parity.json", "cost.json", "variants"

log = logging.getLogger(__name__)


def run(layout: Layout) -> None:
    """Export, prove and time the detector of one category.

    Raises:
        UserError: an earlier stage's output is missing, or an image of it cannot be read.
        FlawsmithError: the detector does not export, or the ONNX model disagrees with it; nothing is left then.
    """
    settings = layout.settings
    weights = layout.input("distill", "detector.safetensors")
    metrics_path = layout.input("evaluate", "metrics.json")
    parity = layout.input("evaluate", "parity")
    sources = sorted(parity.glob("*.png"))
    if not sources:
        raise UserError(f"{parity} holds no image; run `flawsmith evaluate --category {layout.category}` again.")

    if settings.export.variants:
        layout.input("synthesize", "mask")
    params = {"export": section_values(settings.export), "data": section_values(settings.data)}
    with stage_run(layout, "export", params) as tracked:
        detector = load_detector(weights.parent)
        metrics = read_json(metrics_path)
        for key in ("threshold", "pixel_threshold", "typical_score", "false_alarm_rate"):
            if key not in metrics:
                raise UserError(
                    f"{metrics_path} has no `{key}`; run `flawsmith evaluate --category {layout.category}` again."
                )
        size = detector.config.image_size
        images = load_images(sources, size, layout.data.reading)
        maps = np.concatenate([run_detector(detector, image[None])[0] for image in images])
        low, high = map_range(maps, metrics["pixel_threshold"])
        metadata = ModelMetadata(
            category=layout.category,
            threshold=metrics["threshold"],
            pixel_threshold=metrics["pixel_threshold"],
            typical_score=metrics["typical_score"],
            false_alarm_rate=metrics["false_alarm_rate"],
            input_size=size,
            map_low=low,
            map_high=high,
            detector_digest=digest_path(weights.parent),
            teacher=detector.config.backbone,
            flawsmith_version=__version__,
            training_precision=metrics.get("training_precision", ""),
            scale=settings.data.scale,
            tile_overlap=settings.data.tile_overlap if settings.data.scale else 0,
            white_level=layout.data.white_level,
        )
        with atomic_folder(layout.stage("export")) as folder:
            model = folder / MODEL
            export_onnx(detector, metadata, settings.export.opset, model)
            predictor = Predictor(model)
            tracked.set_tag("provider", predictor.provider)
            proof = certificate(
                detector, metadata.threshold, predictor, model, images, sources, settings.export.tolerance
            )
            write_json(folder / PARITY, proof)
            cost = count(onnx.load(model))
            write_json(folder / COST, cost.to_json())
            log.info("%s: %s", layout.category, cost.describe())
            latency = measure_latency(predictor, images, settings.export.latency_runs)
            for batch, figures in proof["batches"].items():
                tracked.log_metrics({f"batch_{batch}_{name}": float(value) for name, value in figures.items()})
            _say_latency(layout, tracked, "", latency, predictor.provider)
            tracked.log_metrics({"multiply_adds": float(cost.multiply_adds)})
            _write_variants(layout, tracked, folder, images)
        tracked.log_artifact(layout.stage("export"))
        tracked.set_output(layout.stage("export") / MODEL)


def _write_variants(layout: Layout, tracked: StageRun, folder: Path, parity: NDArray[np.float32]) -> None:
    """Fill `folder`/variants: each variant asked for that loses little enough, a report on each, and a summary.

    Raises:
        UserError: there is no triplet, or an image cannot be read.
    """
    settings = layout.settings.export
    limits = Limits(settings.max_auroc_loss, settings.max_flip_share)
    summary: dict[str, Any] = {}
    samples = _samples(layout, parity) if settings.variants else Samples([], [], [], [])
    for precision in settings.variants:
        path = folder / VARIANTS / f"model-{precision}.onnx"
        report = build_variant(precision, folder / MODEL, samples, limits, path)
        write_json(folder / VARIANTS / f"parity-{precision}.json", report)
        summary[precision] = {key: report[key] for key in ("exported", "reasons")}
        if not report["exported"]:
            log.warning("%s: no %s variant: %s.", layout.category, precision, "; ".join(report["reasons"]))
            continue
        loss, share = report["image_auroc"]["loss"], report["flip_share"]
        tracked.log_metrics({f"{precision}_auroc_loss": loss, f"{precision}_flip_share": share})
        log.info(
            "%s: %s: %.1f MB instead of %.1f, image AUROC %+.4f, %.1f %% of the images judged otherwise",
            layout.category, precision, report["model_bytes"] / 1e6, report["reference_bytes"] / 1e6, -loss, 100 * share
        )  # fmt: skip
        made = Predictor(path)
        latency = measure_latency(made, parity, settings.latency_runs)
        _say_latency(layout, tracked, precision, latency, made.provider)
    write_json(folder / VARIANTS / "summary.json", summary)


def _samples(layout: Layout, parity: NDArray[np.float32]) -> Samples:
    data, size = layout.data, parity.shape[-1]
    triplets = TripletFolder(layout.stage("synthesize"))

    def defect(identity: str) -> FloatImage:
        return resize_image(triplets.read(identity)[1], size)

    def normal(tile: Tile) -> FloatImage:
        return next(iter_tiles([tile], data))

    normals: Images = [partial(normal, tile) for tile in plan_tiles(layout.split().calibration, data)]
    rows = read_manifest(triplets.folder / "manifest.parquet").to_pylist()
    shades = {row["triplet_id"] for row in rows if is_illumination_defect(row)}  # nothing that a variant must find
    fit = [partial(defect, name) for name in triplets.ids(FIT)]
    held_out = [partial(defect, name) for name in triplets.ids(VALIDATION) if name not in shades]
    if not held_out:
        raise UserError(
            f"{triplets.folder} holds no held-out triplet but shades, so no variant can be judged; lower "
            "synthesize.shade_share, or leave export.variants empty."
        )
    limit = layout.settings.export.variant_images
    return Samples(
        making=[*_spaced(normals, limit), *_spaced(fit, limit)],
        normals=normals,
        defects=held_out,
        parity=[partial(parity.__getitem__, row) for row in range(len(parity))],
    )


def _spaced(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of them, evenly spaced."""
    return [items[place] for place in sorted({int(place) for place in np.linspace(0, len(items) - 1, count)})]


def _say_latency(
    layout: Layout, tracked: StageRun, precision: str, latency: dict[str, dict[str, float]], provider: str
) -> None:
    for batch, figures in latency.items():
        name = f"{precision}_batch_{batch}" if precision else f"batch_{batch}"
        tracked.log_metrics({f"{name}_{key}": value for key, value in figures.items()})
        log.info("%s: %sbatch %s: p50 %.1f ms, p95 %.1f ms, %.1f images/s on this machine (%s)", layout.category,
                 f"{precision}, " if precision else "", batch,
                 *(figures[key] for key in ("p50_ms", "p95_ms", "images_per_second")), provider)  # fmt: skip

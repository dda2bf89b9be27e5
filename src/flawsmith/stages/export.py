"""export: the judged network with its threshold inside, as one ONNX file, and a certificate that it decides the same.

flawsmith export --category C: reads distill/, evaluate/network.onnx, metrics.json and parity/, for variants also
synthesize/ and data/C/train; writes export/model.onnx, parity.json, cost.json and variants/: model-fp16.onnx,
model-int8.onnx, a report on each, and summary.json. How fast a model is on this machine goes to the log and to MLflow:
it differs from run to run, so it is no part of the result.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from flawsmith import __version__
from flawsmith.data.dataset import load_images
from flawsmith.detector.model import Detector, load_detector
from flawsmith.errors import UserError
from flawsmith.export.cost import count_cost, describe_cost
from flawsmith.export.onnx import map_range, write_model
from flawsmith.export.parity import certificate, run_detector, time_predictor
from flawsmith.export.variant_report import write_variants
from flawsmith.files import atomic_folder, digest_path, read_json, write_json
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.inference.network import Network
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.sections import section_values
from flawsmith.tracking import StageRun, stage_run

MODEL, PARITY, COST, VARIANTS = "model.onnx", "parity.json", "cost.json", "variants"

log = logging.getLogger(__name__)


def run(layout: Layout) -> None:
    """Stamp, prove and time the network of one category.

    Raises:
        UserError: an earlier stage's output is missing, or an image of it cannot be read.
        FlawsmithError: the ONNX model disagrees with the trained detector; nothing is left then.
    """
    settings, out = layout.settings, layout.stage("export")
    weights = layout.input("distill", "detector.safetensors").parent
    network, *_ = (layout.input("evaluate", name) for name in ("network.onnx", "metrics.json", "parity"))
    if settings.export.variants:
        layout.input("synthesize", "mask")
    params = {"export": section_values(settings.export), "data": section_values(layout.data)}
    try:
        Network(network)
    except UserError as error:
        again = f"run `flawsmith evaluate --category {layout.category}` again"
        raise UserError(f"{network} is damaged; {again}.") from error
    with stage_run(layout, "export", params) as tracked:
        detector = load_detector(weights)
        with atomic_folder(out) as folder:
            model = folder / MODEL
            predictor, images, proof = write_proven(layout, detector, digest_path(weights), network.parent, folder)
            tracked.set_tag("provider", predictor.provider)
            for batch, figures in proof["batches"].items():
                tracked.log_metrics({f"batch_{batch}_{name}": float(value) for name, value in figures.items()})
            cost = count_cost(detector, predictor.input_shape)
            write_json(folder / COST, cost)
            log.info("%s: %s", layout.category, describe_cost(cost))
            tracked.log_metrics({"multiply_adds": float(cost["multiply_adds"])})
            _time(layout, tracked, "", predictor, images)
            for precision, report in write_variants(layout, model, images, folder / VARIANTS).items():
                _say_variant(layout.category, tracked, report)
                if report["exported"]:
                    variant = Predictor(folder / VARIANTS / f"model-{precision}.onnx")
                    _time(layout, tracked, precision, variant, images)
        tracked.log_artifact(out)
        tracked.set_output(out / MODEL)


def write_proven(
    layout: Layout, detector: Detector, digest: str, judged: Path, folder: Path, quick_look: bool = False
) -> tuple[Predictor, NDArray[np.float32], dict[str, Any]]:
    """Write MODEL, a judged network with threshold and metadata inside, and PARITY, its certificate, into `folder`.

    Args:
        detector: what the network was exported from, on the CPU.
        digest: of its weights.
        judged: the folder that holds network.onnx, metrics.json and the images parity/*.png.
        quick_look: marks the model as one.

    Returns:
        the model, the images (N, 3, H, W) that it was proven on, and the certificate.

    Raises:
        UserError: there is no image, or a figure is missing.
        FlawsmithError: the model disagrees with the detector.
    """
    sources = sorted((judged / "parity").glob("*.png"))
    if not sources:
        raise UserError(
            f"{judged / 'parity'} holds no image; run `flawsmith evaluate --category {layout.category}` again."
        )
    images = load_images(sources, detector.config.shape, layout.data.reading)
    metadata = replace(_metadata(layout, detector, digest, judged / "metrics.json", images), quick_look=int(quick_look))
    write_model(onnx.load(judged / "network.onnx"), metadata, folder / MODEL)
    predictor = Predictor(folder / MODEL)
    tolerance = layout.settings.export.tolerance
    proof = certificate(detector, metadata.threshold, predictor, folder / MODEL, images, sources, tolerance)
    write_json(folder / PARITY, proof)
    return predictor, images, proof


def _metadata(
    layout: Layout, detector: Detector, digest: str, metrics_path: Path, images: NDArray[np.float32]
) -> ModelMetadata:
    data, metrics = layout.data, read_json(metrics_path)
    judged = {key: metrics.get(key) for key in ("threshold", "pixel_threshold", "typical_score", "false_alarm_rate")}
    for key, value in judged.items():
        if value is None:
            raise UserError(
                f"{metrics_path} has no `{key}`; run `flawsmith evaluate --category {layout.category}` again."
            )
    maps = np.concatenate([run_detector(detector, image[None])[0] for image in images])
    low, high = map_range(maps, metrics["pixel_threshold"])
    return ModelMetadata(
        category=layout.category,
        map_low=low,
        map_high=high,
        detector_digest=digest,
        teacher=detector.config.backbone,
        flawsmith_version=__version__,
        training_precision=metrics.get("training_precision", ""),
        scale=data.scale,
        tile_overlap=data.tile_overlap if data.scale else 0,
        white_level=data.white_level,
        **judged,
    )


def _say_variant(category: str, tracked: StageRun, report: dict[str, Any]) -> None:
    precision = report["precision"]
    if not report["exported"]:
        log.warning("%s: no %s variant: %s.", category, precision, "; ".join(report["reasons"]))
        return
    loss, share = report["image_auroc"]["loss"], report["flip_share"]
    tracked.log_metrics({f"{precision}_auroc_loss": loss, f"{precision}_flip_share": share})
    log.info(
        "%s: %s: %.1f MB instead of %.1f, image AUROC %+.4f, %.1f %% of the images judged otherwise",
        category, precision, report["model_bytes"] / 1e6, report["reference_bytes"] / 1e6, -loss, 100 * share
    )  # fmt: skip


def _time(layout: Layout, tracked: StageRun, precision: str, predictor: Predictor, images: NDArray[np.float32]) -> None:
    for batch, figures in time_predictor(predictor, images, layout.settings.export.latency_runs).items():
        name = f"{precision}_batch_{batch}" if precision else f"batch_{batch}"
        tracked.log_metrics({f"{name}_{key}": value for key, value in figures.items()})
        log.info("%s: %sbatch %s: p50 %.1f ms, p95 %.1f ms, %.1f images/s on this machine (%s)", layout.category,
                 f"{precision}, " if precision else "", batch,
                 *(figures[key] for key in ("p50_ms", "p95_ms", "images_per_second")), predictor.provider)  # fmt: skip

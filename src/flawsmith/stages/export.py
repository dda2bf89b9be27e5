"""Stage 6: the trained detector as one ONNX file with a certificate that it decides the same.

Reads distill/, evaluate/metrics.json and evaluate/parity/; writes export/model.onnx and parity.json. How fast the model
is on this machine goes to the log and to MLflow: it differs from run to run, so it is no part of the result.
"""

import logging

import numpy as np

from flawsmith import __version__
from flawsmith.detector.model import load_detector
from flawsmith.errors import UserError
from flawsmith.export.onnx import export_onnx, map_range
from flawsmith.export.parity import certificate, measure_latency, run_detector
from flawsmith.files import atomic_folder, digest_path, read_json, write_json
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.inference.predictor import Predictor
from flawsmith.layout import Layout
from flawsmith.settings import section_values
from flawsmith.surfaces import load_images
from flawsmith.tracking import stage_run

log = logging.getLogger(__name__)


def run(layout: Layout) -> None:
    """Export, prove and time the detector of one category.

    Raises:
        UserError: an earlier stage's output is missing.
        FlawsmithError: the detector does not export, or the ONNX model disagrees with it; nothing is left then.
    """
    settings = layout.settings
    weights = layout.input("distill", "detector.safetensors")
    metrics_path = layout.input("evaluate", "metrics.json")
    parity = layout.input("evaluate", "parity")
    sources = sorted(parity.glob("*.png"))
    if not sources:
        raise UserError(f"{parity} holds no image; run `flawsmith evaluate --category {layout.category}` again.")

    inputs = {"detector": weights.parent, "metrics": metrics_path, "images": parity}
    with stage_run(layout, "export", inputs, section_values(settings.export)) as tracked:
        detector = load_detector(weights.parent)
        metrics = read_json(metrics_path)
        for key in ("threshold", "pixel_threshold", "false_alarm_rate"):
            if key not in metrics:
                raise UserError(
                    f"{metrics_path} has no `{key}`; run `flawsmith evaluate --category {layout.category}` again."
                )
        size = detector.config.image_size
        images = load_images(sources, size, settings.data.max_pixels)
        maps = np.concatenate([run_detector(detector, image[None])[0] for image in images])
        low, high = map_range(maps, metrics["pixel_threshold"])
        metadata = ModelMetadata(
            category=layout.category,
            threshold=metrics["threshold"],
            pixel_threshold=metrics["pixel_threshold"],
            false_alarm_rate=metrics["false_alarm_rate"],
            input_size=size,
            map_low=low,
            map_high=high,
            detector_digest=digest_path(weights.parent),
            teacher=detector.config.backbone,
            flawsmith_version=__version__,
            scale=settings.data.scale,
            tile_overlap=settings.data.tile_overlap if settings.data.scale else 0,
        )
        with atomic_folder(layout.stage("export")) as folder:
            model = folder / "model.onnx"
            export_onnx(detector, metadata, settings.export.opset, model)
            predictor = Predictor(model)
            proof = certificate(
                detector, metadata.threshold, predictor, model, images, sources, settings.export.tolerance
            )
            write_json(folder / "parity.json", proof)
            latency = measure_latency(predictor, images, settings.export.latency_runs)
        for batch in proof["batches"]:
            tracked.log_metrics(
                {
                    f"batch_{batch}_{name}": float(value)
                    for name, value in (proof["batches"][batch] | latency[batch]).items()
                }
            )
            log.info("%s: batch %s: p50 %.1f ms, p95 %.1f ms, %.1f images/s on this machine", layout.category, batch,
                     *(latency[batch][key] for key in ("p50_ms", "p95_ms", "images_per_second")))  # fmt: skip
        tracked.log_artifact(layout.stage("export"))
        tracked.set_outputs({name: layout.stage("export") / name for name in ("model.onnx", "parity.json")})

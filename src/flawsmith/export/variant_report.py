"""Whether a variant in lower precision is worth exporting: model.onnx and it, on the same images, through one door."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from flawsmith.data.dataset import iter_tiles, plan_tiles
from flawsmith.data.images import FloatImage, resize_image
from flawsmith.data.triplets import FIT, VALIDATION, TripletFolder, is_illumination_defect, read_manifest
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.export.onnx import write_model
from flawsmith.export.parity import significant
from flawsmith.export.variants import MAKERS
from flawsmith.files import digest_file, write_json
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.providers import package_version
from flawsmith.layout import Layout
from flawsmith.sequences import evenly

Images = Sequence[Callable[[], FloatImage]]
"""Loaders of images or tiles (3, H, W) in [0, 1] of the model's size: only one is in memory at a time."""


@dataclass(frozen=True)
class VariantImages:
    """What variants are made from and judged on.

    Attributes:
        making: normal and defective ones to make a variant from.
        normals: calibration normals.
        defects: defects of held-out triplets.
        parity: the few test images that `evaluate` hands on.
    """

    making: Images
    normals: Images
    defects: Images
    parity: Images

    @classmethod
    def of(cls, layout: Layout, parity: NDArray[np.float32]) -> "VariantImages":
        """Find a category's; `parity` are (N, 3, H, W).

        Raises:
            UserError: there is no held-out triplet but shades, or an image cannot be read.
        """
        data, limit = layout.data, layout.settings.export.variant_images
        triplets = TripletFolder(layout.stage("synthesize"))
        rows = read_manifest(triplets.folder / "manifest.parquet").to_pylist()
        shades = {row["triplet_id"] for row in rows if is_illumination_defect(row)}  # nothing that a variant must find
        normals = [
            lambda tile=tile: next(iter_tiles([tile], data)) for tile in plan_tiles(layout.split().calibration, data)
        ]
        fit, held_out = (
            [lambda name=name: resize_image(triplets.read(name)[1], data.shape) for name in names]
            for names in (triplets.ids(FIT), [name for name in triplets.ids(VALIDATION) if name not in shades])
        )
        if not held_out:
            raise UserError(
                f"{triplets.folder} holds no held-out triplet but shades, so no variant can be judged; lower "
                "illumination in synthesize.mixture, or leave export.variants empty."
            )
        return cls(
            making=[part[place] for part in (normals, fit) for place in evenly(len(part), limit)],
            normals=normals,
            defects=held_out,
            parity=[partial(parity.__getitem__, row) for row in range(len(parity))],
        )


class Limits(NamedTuple):
    """What a variant may lose: image AUROC, and the share of images that it judges otherwise than model.onnx."""

    auroc_loss: float
    flip_share: float


def write_variants(layout: Layout, model: Path, parity: NDArray[np.float32], folder: Path) -> dict[str, dict[str, Any]]:
    """Fill `folder`: each variant asked for that loses little enough, a report on each, and summary.json.

    Returns precision → report. `parity` are the test images that `evaluate` hands on, (N, 3, H, W).

    Raises:
        UserError: there is no held-out triplet but shades, or an image cannot be read.
    """
    settings = layout.settings.export
    reports: dict[str, dict[str, Any]] = {}
    if settings.variants:
        images, limits = VariantImages.of(layout, parity), Limits(settings.max_auroc_loss, settings.max_flip_share)
        for precision in settings.variants:
            report = build_variant(precision, model, images, limits, folder / f"model-{precision}.onnx")
            write_json(folder / f"parity-{precision}.json", report)
            reports[precision] = report
    summary = {name: {key: report[key] for key in ("exported", "reasons")} for name, report in reports.items()}
    write_json(folder / "summary.json", summary)
    return reports


def build_variant(precision: str, model: Path, images: VariantImages, limits: Limits, path: Path) -> dict[str, Any]:
    """Make one variant of `model`, judge it, and leave it at `path` unless it loses too much.

    Returns:
        the report: `exported`, the `reasons` if it was not, and all figures.
    """
    report: dict[str, Any] = {
        "precision": precision,
        "made_from_images": len(images.making),
        "max_auroc_loss": limits.auroc_loss,
        "max_flip_share": limits.flip_share,
        "reference_digest": digest_file(model),
        "reference_bytes": model.stat().st_size,
        "versions": {name: package_version(name) for name in ("flawsmith", "onnx", "onnxruntime")},
    }
    reference = Predictor(model)
    try:
        made = MAKERS[precision](onnx.load(model), (load() for load in images.making))
        write_model(made, replace(reference.metadata, precision=precision), path)
        figures = _judge(reference, _opened(path), images)
    except UserError:  # an image: the variant is not to blame
        raise
    except FlawsmithError as error:
        path.unlink(missing_ok=True)
        return report | {"exported": False, "reasons": [str(error)]}
    report |= figures | {"model_bytes": path.stat().st_size, "model_digest": digest_file(path)}
    reasons = objections(report, limits)
    if reasons:
        path.unlink()
    return report | {"exported": not reasons, "reasons": reasons}


def objections(figures: Mapping[str, Any], limits: Limits) -> list[str]:
    """What speaks against a variant, in words; empty if nothing does."""
    found = []
    loss, share = figures["image_auroc"]["loss"], figures["flip_share"]
    if not loss <= limits.auroc_loss:
        found.append(f"it loses {loss:.3g} image AUROC (export.max_auroc_loss {limits.auroc_loss:g})")
    if not share <= limits.flip_share:
        found.append(f"it judges {share:.1%} of the images otherwise (export.max_flip_share {limits.flip_share:g})")
    return found


def _judge(model: Predictor, variant: Predictor, images: VariantImages) -> dict[str, Any]:
    """Compare both models on every image, one at a time."""
    figures: dict[str, Any] = {}
    scores: list[tuple[float, float]] = []
    groups = {"calibration_normals": images.normals, "held_out_defects": images.defects, "parity_images": images.parity}
    for name, loaders in groups.items():
        pairs, gaps, flips = [], [], 0
        for load in loaders:
            image = load()
            (one,), (other,) = model.predict_prepared([image]), variant.predict_prepared([image])
            gap = np.abs(one.anomaly_map.astype(np.float64) - other.anomaly_map)
            pairs.append((one.score, other.score))
            gaps.append((gap.max(), gap.mean()))
            flips += one.is_defective != other.is_defective
        scores += pairs
        figures[name] = {
            "images": len(loaders),
            "map_difference": significant(max(largest for largest, _ in gaps)),
            "map_difference_mean": significant(float(np.mean([mean for _, mean in gaps]))),
            "score_difference": significant(max(abs(before - after) for before, after in pairs)),
            "decision_flips": flips,
        }
    labelled = scores[: len(images.normals) + len(images.defects)]
    labels = np.arange(len(labelled)) >= len(images.normals)
    before, after = (float(roc_auc_score(labels, column)) for column in zip(*labelled, strict=True))
    flips = sum(part["decision_flips"] for part in figures.values())
    return figures | {
        "image_auroc": {"model": round(before, 6), "variant": round(after, 6), "loss": round(before - after, 6)},
        "flip_share": round(flips / len(scores), 6),
    }


def _opened(path: Path) -> Predictor:
    try:
        return Predictor(path)
    except UserError as error:  # what flawsmith wrote is no fault of its user
        raise FlawsmithError(f"onnxruntime does not run it: {error}") from error

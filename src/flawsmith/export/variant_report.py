"""Whether a variant in lower precision is worth exporting: model.onnx and it, on the same images, through one door."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from flawsmith.data.images import FloatImage
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.export.onnx import write_model
from flawsmith.export.parity import significant
from flawsmith.export.variants import MAKERS
from flawsmith.files import digest_file
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.providers import package_version

Images = Sequence[Callable[[], FloatImage]]
"""Loaders of images or tiles (3, S, S) in [0, 1] of the model's size: only one is in memory at a time."""

NORMALS, DEFECTS, PARITY = "calibration_normals", "held_out_defects", "parity_images"


@dataclass(frozen=True)
class Samples:
    """What variants are made from and judged on; no labelled test image but those that `evaluate` hands on."""

    making: Images
    normals: Images
    defects: Images  # of held-out triplets
    parity: Images


@dataclass(frozen=True)
class Limits:
    """What a variant may lose: image AUROC, and the share of images that it judges otherwise than model.onnx."""

    auroc_loss: float
    flip_share: float


@dataclass(frozen=True)
class Comparison:
    """Two models on the same N images: differences of maps and scores, and images that only one of them flags."""

    scores: NDArray[np.float64]  # (N, 2): of model.onnx, of the variant
    map_gaps: NDArray[np.float64]  # (N, 2): the largest and the mean difference over the pixels
    flips: int

    def to_json(self) -> dict[str, Any]:
        return {
            "images": len(self.scores),
            "map_difference": significant(self.map_gaps[:, 0].max()),
            "map_difference_mean": significant(self.map_gaps[:, 1].mean()),
            "score_difference": significant(np.abs(self.scores[:, 0] - self.scores[:, 1]).max()),
            "decision_flips": self.flips,
        }


def compare_models(model: Predictor, variant: Predictor, images: Images) -> Comparison:
    """Both models on every image, one at a time.

    Raises:
        FlawsmithError: a model answers with NaN.
    """
    scores, gaps, flips = [], [], 0
    for load in images:
        image = load()
        (one,), (other,) = model.predict_prepared([image]), variant.predict_prepared([image])
        gap = np.abs(one.anomaly_map.astype(np.float64) - other.anomaly_map)
        scores.append((one.score, other.score))
        gaps.append((gap.max(), gap.mean()))
        flips += one.is_defective != other.is_defective
    return Comparison(np.array(scores), np.array(gaps), flips)


def build_variant(precision: str, model: Path, samples: Samples, limits: Limits, path: Path) -> dict[str, Any]:
    """Make one variant of `model`, judge it, and leave it at `path` unless it loses too much.

    Returns:
        the report: `exported`, the `reasons` if it was not, and all figures.
    """
    report: dict[str, Any] = {
        "precision": precision,
        "made_from_images": len(samples.making),
        "max_auroc_loss": limits.auroc_loss,
        "max_flip_share": limits.flip_share,
        "reference_digest": digest_file(model),
        "reference_bytes": model.stat().st_size,
        "versions": {name: package_version(name) for name in ("flawsmith", "onnx", "onnxruntime")},
    }
    reference = Predictor(model)
    try:
        made = MAKERS[precision](onnx.load(model), _loaded(samples.making))
        write_model(made, replace(reference.metadata, precision=precision), path)
        figures = _judge(reference, _opened(path), samples)
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


def _judge(model: Predictor, variant: Predictor, samples: Samples) -> dict[str, Any]:
    found = {
        name: compare_models(model, variant, images)
        for name, images in ((NORMALS, samples.normals), (DEFECTS, samples.defects), (PARITY, samples.parity))
    }
    scores = np.concatenate([found[NORMALS].scores, found[DEFECTS].scores])
    labels = np.arange(len(scores)) >= len(samples.normals)
    before, after = (float(roc_auc_score(labels, column)) for column in scores.T)
    images = sum(len(item.scores) for item in found.values())
    return {name: item.to_json() for name, item in found.items()} | {
        "image_auroc": {"model": round(before, 6), "variant": round(after, 6), "loss": round(before - after, 6)},
        "flip_share": round(sum(item.flips for item in found.values()) / images, 6),
    }


def _loaded(images: Images) -> Iterator[FloatImage]:
    return (load() for load in images)


def _opened(path: Path) -> Predictor:
    try:
        return Predictor(path)
    except UserError as error:  # what flawsmith wrote is no fault of its user
        raise FlawsmithError(f"onnxruntime does not run it: {error}") from error
